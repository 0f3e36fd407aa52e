"""Measures a policy against a reference and a reward model, wherever they come from.

    bash scripts/evaluate.sh RUN_DIR [key.path=value ...]

RUN_DIR is the output directory of stage 3, whose config.json names the actor, reference, reward and
regularizer; or that of stage 1; or any other directory, which may not exist yet, if the overrides
name the models. Writes `evaluation.json` and `instances.jsonl` (one line per prompt) into RUN_DIR.
An evaluation that was stopped resumes where it was. One that is finished is replaced only with
--overwrite.
"""

import gc

from step3_rlhf.evaluation.run import run
from step3_rlhf.evaluation.settings import evaluation_config, evaluation_parser
from training.cli import errors_end_cleanly, start


def main(arguments: list[str] | None = None) -> None:
    gc.enable()  # off while this was imported, see training/launch/process.py
    options = evaluation_parser().parse_intermixed_args(arguments)
    with errors_end_cleanly(options.debug):
        config = evaluation_config(options)
        start(lambda: run(config), config)


if __name__ == "__main__":
    main()
