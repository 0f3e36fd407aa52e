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
from typing import TypeVar

from training.config import Config, load_config
from training.errors import UserError
from training.stage_config import StageConfig

SECONDS_FOR_RANK_0 = 20.0
"""How long the other ranks wait for rank 0's message before they end."""


Stage = TypeVar("Stage", bound=StageConfig)


def run_stage(
    config_class: type[Stage], stage: Callable[[Stage], None], arguments: list[str] | None = None
) -> None:
    """Parse, check, run. A user's mistake ends with its message and exit code 2."""
    parser = stage_parser(config_class)
    options = parser.parse_args(arguments)
    with user_errors_end_cleanly(options.debug):
        config = load_config(config_class, options.config, options.overrides)
        start(lambda: stage(config), config.seed)


def start(stage: Callable[[], None], seed: int) -> None:
    """Run `stage` inside the process group, all random states seeded."""
    import transformers

    from training import engine

    transformers.utils.logging.disable_progress_bar()  # one bar at a time: the stage's own
    engine.connect()
    transformers.set_seed(seed)
    try:
        stage()
    finally:
        engine.disconnect()


@contextlib.contextmanager
def user_errors_end_cleanly(debug: bool) -> Iterator[None]:
    """A UserError becomes its message, said once, and exit code 2; `debug` keeps the traceback."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        # Every rank finds the same fault and rank 0 says so. The launcher ends all processes with
        # the first one that ends: the others wait, and speak only if they are still there.
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SECONDS_FOR_RANK_0)
        print(f"\n{error}\n", file=sys.stderr, flush=True)
        sys.exit(2)


def stage_parser(config_class: type[Config]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(sys.modules[config_class.__module__].__doc__))
    parser.add_argument("config", help="the stage's JSON (or YAML) config")
    parser.add_argument("overrides", nargs="*", help="key.path=value, over the config's own")
    add_common_options(parser)
    return parser


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")


def prepare_output(config: StageConfig) -> Path:
    """Empty output_dir, unless the run resumes, and write the resolved config.json.

    Every rank calls; rank 0 acts.
    """
    from training.engine import barrier, rank

    output = Path(config.output_dir)
    barrier()  # no rank may still be checking whether the directory is empty
    if rank() == 0:
        if config.resume_from_checkpoint is None and output.is_dir():
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        resolved = config.model_dump(mode="json")
        (output / "config.json").write_text(json.dumps(resolved, indent=2) + "\n")
    barrier()
    return output
