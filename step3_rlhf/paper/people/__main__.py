"""What about 100 people answered, and who still hears the minority: the experiment on ProtoQA.

    bash scripts/people.sh [--data PATH] [--output DIR] [--model NAME] [--seed N]

SFT and a reward model are trained on people's answers, once; then KL-regularized RLHF and
conditional preference matching, for every seed that the command is given. What is finished is not
run again. report.html and report.json are written at the end, over all seeds in the folder.
"""

import argparse
from pathlib import Path

from step3_rlhf.paper.grid.launcher import Launcher
from step3_rlhf.paper.people.report.files import write_report
from step3_rlhf.paper.people.runs import Experiment, run
from training.cli import errors_end_cleanly
from training.plotting import require_matplotlib


def run_and_report(experiment: Experiment) -> None:
    """All steps that are not finished, then the report."""
    require_matplotlib()
    with Launcher() as launch:
        run(experiment, launch)
    print(write_report(experiment.directory))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="people.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="questions in ProtoQA's schema; default: the Hub's proto_qa")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything")
    parser.add_argument("--model", required=True, help="what SFT starts from: a path or a Hub name")
    parser.add_argument("--seed", type=int, default=42, help="of the aligned policies")
    parser.add_argument(
        "--prior",
        choices=("people", "uniform"),
        default="people",
        help="whether SFT learns answers in people's proportions or each answer once",
    )
    parser.add_argument(
        "--form",
        choices=("listed", "open"),
        default="listed",
        help="whether questions are asked with the board's answers, or by themselves",
    )
    parser.add_argument(
        "--method",
        choices=("direct", "rloo"),
        default="direct",
        help="whether policies learn from people's rankings, or from draws and their rewards",
    )
    parser.add_argument("--only-report", action="store_true", help="write the report again")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    options = parser.parse_args(arguments)
    with errors_end_cleanly(options.debug):
        if options.only_report:
            require_matplotlib()
            print(write_report(options.output))
            return
        experiment = Experiment(
            options.output,
            options.model,
            options.data,
            options.prior,
            options.form,
            options.method,
            options.seed,
        )
        run_and_report(experiment)


if __name__ == "__main__":
    main()
