"""How a stage starts: `MODULE CONFIG.json [key.path=value ...]`, one process of several."""

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from training.config import Config, apply_overrides, check_config, load_config, read_mapping
from training.errors import RunError, UserError
from training.stage_config import RunConfig, StageConfig

if TYPE_CHECKING:
    from training.dry_run import DryRun

SECONDS_FOR_RANK_0 = 20.0
"""How long the other ranks wait for rank 0's message before they end."""
FOREIGN_CODE = """
WARNING: trust_remote_code=true: Python code that comes with any model named in the config
may run on this machine, with all that you may do on it. Use models whose code you have read.
"""


Stage = TypeVar("Stage", bound=StageConfig)


def run_stage(
    config_class: type[Stage],
    stage: Callable[[Stage], None],
    arguments: list[str] | None = None,
    dry_run: "Callable[[Stage, DryRun], None] | None" = None,
) -> None:
    """Parse, check, run; every end but success has its message and its exit code.

    A user's mistake: 2. A run that cannot go on: 1. SIGTERM and SIGINT: 143 and 130.

    Args:
        stage: runs it.
        dry_run: adds to a dry run what the stage would do and need.
    """
    parser = stage_parser(config_class)
    options = parser.parse_intermixed_args(arguments)
    with errors_end_cleanly(options.debug):
        if options.dry_run and dry_run is not None:
            from training.dry_run import replace_missing_models
            from training.dry_run_text import print_dry_run

            data = read_mapping(options.config)
            faults = apply_overrides(data, options.overrides)
            if options.stand_in:
                replace_missing_models(data, options.stand_in)
            heading = f"{options.config} cannot be used:"
            config = check_config(config_class, data, heading, faults)
            announce_foreign_code(config.trust_remote_code)
            print_dry_run(config, dry_run, options.processes, options.gpu_memory, options.stand_in)
        else:
            config = load_config(config_class, options.config, options.overrides)
            start(lambda: stage(config), config)


def start(stage: Callable[[], None], config: RunConfig) -> None:
    """Run `stage` inside the process group, all random states seeded."""
    announce_foreign_code(config.trust_remote_code)
    import transformers

    from training.runtime import engine, ranks
    from training.runtime.signals import stop_requests

    transformers.utils.logging.disable_progress_bar()  # one bar at a time: the stage's own
    engine.require_fp16(config.fp16)
    stop_requests.install()
    ranks.connect()
    transformers.set_seed(config.seed)
    stage()
    ranks.disconnect()  # not after an error: what it says comes before what the others then say


def announce_foreign_code(trust_remote_code: bool) -> None:
    if trust_remote_code and os.environ.get("RANK", "0") == "0":
        print(FOREIGN_CODE, file=sys.stderr, flush=True)


@contextlib.contextmanager
def errors_end_cleanly(debug: bool) -> Iterator[None]:
    """Errors that explain themselves become their message and an exit code.

    Args:
        debug: let them through, with the traceback.
    """
    try:
        yield
    except Exception as error:
        from training.runtime.faults import remedy
        from training.runtime.signals import Stopped

        if debug and not isinstance(error, Stopped):
            raise
        if isinstance(error, Stopped):
            _end(str(error), error.code)
        if isinstance(error, UserError):
            _end(str(error), 2)
        if isinstance(error, RunError):
            _end(str(error), 1, error.everywhere)
        if advice := remedy(error):
            _end(f"{error}\n\n{advice}", 1, everywhere=False)
        raise


def _end(message: str, code: int, everywhere: bool = True) -> NoReturn:
    """Print `message` and exit.

    Args:
        everywhere: all ranks end in this way, and rank 0 says why. The launcher ends all processes
            with the first one that fails: the others wait, and speak only if still there.
    """
    if everywhere and os.environ.get("RANK", "0") != "0":
        time.sleep(SECONDS_FOR_RANK_0)
    print(f"\n{message}\n", file=sys.stderr, flush=True)
    sys.exit(code)


def stage_parser(config_class: type[Config]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(sys.modules[config_class.__module__].__doc__))
    parser.add_argument("config", help="the stage's JSON (or YAML) config")
    parser.add_argument("overrides", nargs="*", help="key.path=value, over the config's own")
    parser.add_argument("--dry-run", action="store_true", help="check the config, load no weights")
    parser.add_argument("--processes", type=int, default=1, help="of a dry run: GPUs in all")
    parser.add_argument("--gpu-memory", type=float, help="of a dry run: GiB of each GPU")
    parser.add_argument(
        "--stand-in",
        metavar="MODEL",
        help="of a dry run: in place of models that earlier stages have yet to write",
    )
    add_common_options(parser)
    return parser


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")


def prepare_output(config: StageConfig) -> Path:
    """Empty output_dir, unless the run resumes, and write the resolved config.json.

    Every rank calls; rank 0 acts.
    """
    from training.runtime.ranks import barrier, rank
    from training.runtime.tracking import say

    output = Path(config.output_dir)
    if config.description:
        say(config.description)
    barrier()  # no rank may still be checking whether the directory is empty
    if rank() == 0:
        if config.resume_from_checkpoint is None and output.is_dir():
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        resolved = config.model_dump(mode="json")
        (output / "config.json").write_text(json.dumps(resolved, indent=2) + "\n")
    barrier()
    return output
