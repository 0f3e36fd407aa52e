"""The command line of a stage: CONFIG.json [key.path=value ...].

`command` is what scripts/launch.sh starts: it checks the config and launches the processes of the
run. `run_stage` is what each of these processes does.
"""

import argparse
import contextlib
import gc
import inspect
import json
import os
import runpy
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from training.config import (
    StrictModel,
    absolute_paths,
    apply_overrides,
    check_config,
    load_config,
    read_mapping,
    shipped_configs,
)
from training.errors import RunError, Stopped, UserError
from training.launch.gpus import require_usable_gpus
from training.launch.launcher import launch
from training.launch.lock import contents, occupy, require_free
from training.runtime.resume import check_resumable
from training.stage_config import RunConfig, StageConfig

if TYPE_CHECKING:
    from training.dry_run import DryRun

SECONDS_FOR_RANK_0 = 20.0
"""How long the other ranks wait for rank 0's message before they end."""
FOREIGN_CODE = """
WARNING: trust_remote_code=true: Python code that comes with any model named in the config
may run on this machine, with all that you may do on it. Use models whose code you have read.
"""

EXAMPLE = """example:
  bash scripts/{stage}.sh {example} seed=7 data.max_train_samples=1000
{directory}/ has more configs. Every setting below can be overridden as key.path=value."""

Stage = TypeVar("Stage", bound=StageConfig)


def command(config_class: type[Stage], module: str) -> None:
    """Check the command line and the config, then launch the stage's `module`.

    Help, a dry run and every mistake that the config alone shows end without a launcher.
    """
    arguments = sys.argv[1:]
    options = stage_parser(config_class).parse_intermixed_args(arguments)
    if options.dry_run:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    with errors_end_cleanly(options.debug):
        config = load_config(config_class, options.config, options.overrides)
        check_resumable(config, processes_in_all())
        launch_run(config, module, arguments)


def launch_run(config: RunConfig, module: str, arguments: list[str]) -> None:
    """Launch a run whose config is sound, unless another run works in its output directory."""
    require_free(Path(config.output_dir))
    require_usable_gpus()
    count = processes_in_all()
    print(f"Starting {count} process{'es' if count > 1 else ''}", flush=True)
    launch(module, arguments)


def processes_in_all() -> int:
    """How many processes scripts/launch.sh wants, over all nodes."""
    return int(os.environ.get("LAUNCH_PROCESSES", "1"))


def run_stage(
    config_class: type[Stage],
    stage: Callable[[Stage], None],
    arguments: list[str] | None = None,
    dry_run: "Callable[[Stage, DryRun], None] | None" = None,
) -> None:
    """Parse the command line, check the config, and run the stage.

    Every failure ends with a message and an exit code: 2 for a mistake of the user, 1 for a run
    that cannot continue, 143 and 130 for SIGTERM and SIGINT.

    Args:
        stage: trains and writes the models.
        dry_run: adds to a dry run what the stage would do and need.
    """
    gc.freeze()  # what the imports made stays, and is not looked through again
    gc.enable()  # off while the stage was imported, see process.py
    options = stage_parser(config_class).parse_intermixed_args(arguments)
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
    """Run `stage` in the process group of the launcher, with all random states seeded."""
    announce_foreign_code(config.trust_remote_code)
    require_usable_gpus()
    import transformers

    from training.runtime import engine, ranks
    from training.runtime.signals import stop_requests

    transformers.utils.logging.disable_progress_bar()  # one bar at a time: the stage's own
    engine.require_fp16(config.fp16)
    stop_requests.install()
    ranks.connect()
    transformers.set_seed(config.seed)
    stage()
    ranks.disconnect()  # not after an error: its message comes before those of the other ranks


def announce_foreign_code(trust_remote_code: bool) -> None:
    if trust_remote_code and os.environ.get("RANK", "0") == "0":
        print(FOREIGN_CODE, file=sys.stderr, flush=True)


@contextlib.contextmanager
def errors_end_cleanly(debug: bool) -> Iterator[None]:
    """Turn errors that explain themselves into a message and an exit code.

    Args:
        debug: let them through with their traceback.
    """
    try:
        yield
    except Stopped as stopped:
        _end(str(stopped), stopped.code)
    except UserError as error:
        if debug:
            raise
        _end(str(error), 2)
    except RunError as error:
        if debug:
            raise
        _end(str(error), 1, error.everywhere)
    except Exception as error:
        from training.runtime.faults import remedy  # needs torch

        if debug:
            raise
        if advice := remedy(error):
            _end(f"{error}\n\n{advice}", 1, everywhere=False)
        raise


def _end(message: str, code: int, everywhere: bool = True) -> NoReturn:
    """Print `message` and exit.

    Args:
        everywhere: all ranks fail in this way, and rank 0 gives the reason. The launcher ends all
            processes when the first one fails, so the other ranks wait and speak only if they are
            still there.
    """
    if everywhere and os.environ.get("RANK", "0") != "0":
        time.sleep(SECONDS_FOR_RANK_0)
    print(f"\n{message}\n", file=sys.stderr, flush=True)
    sys.exit(code)


class SettingsParser(argparse.ArgumentParser):
    """Its help ends with every setting of the config, by path, type, default and meaning."""

    def __init__(self, config_class: type[StrictModel], **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._config_class = config_class
        self._configs = shipped_configs().get(config_class.script, [])

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            message = "an argument is missing"
            if self._configs:
                names = ", ".join(file.name for file in self._configs)
                message += f"; {self._configs[0].parent}/ has {names}"
        self.exit(2, f"{self.format_usage()}{message}; --help shows an example and every setting\n")

    def format_help(self) -> str:
        from training.settings_reference import as_text, sections_of

        return f"{super().format_help()}\n{as_text(sections_of(self._config_class))}\n"


def stage_parser(config_class: type[StrictModel]) -> argparse.ArgumentParser:
    """The command line of a stage."""
    stage = config_class.script
    parser = SettingsParser(
        config_class,
        usage=f"bash scripts/{stage}.sh CONFIG.json [key.path=value ...] [options]",
        description=inspect.getdoc(config_class),
        epilog=example_of(stage),
    )
    parser.add_argument("config", help="the stage's JSON (or YAML) config")
    parser.add_argument("overrides", nargs="*", help="key.path=value, over the config's own")
    parser.add_argument("--dry-run", action="store_true", help="check the config, load no weights")
    parser.add_argument(
        "--processes",
        type=int,
        default=processes_in_all(),
        metavar="N",
        help="of a dry run: GPUs in all",
    )
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="of a dry run: memory of each GPU"
    )
    parser.add_argument(
        "--stand-in",
        metavar="MODEL",
        help="of a dry run: in place of models that earlier stages have yet to write",
    )
    add_common_options(parser)
    return parser


def example_of(script: str) -> str:
    """A command for the help of a script; empty if no configs are shipped for it."""
    shipped = shipped_configs().get(script, [])
    if not shipped:
        return ""
    ours = [file for file in shipped if file.stem.startswith("quickstart")]
    file = min(ours or shipped, key=lambda file: len(file.stem))  # not one of its variants
    directory = Path(*file.parts[-3:-1])
    return EXAMPLE.format(stage=script, example=directory / file.name, directory=directory)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def reserve(output: Path) -> None:
    """Create a directory and keep other runs out of it until this one ends; rank 0 does."""
    from training.runtime.ranks import rank

    if rank() == 0:
        occupy(output)


def prepare_output(config: StageConfig) -> Path:
    """Empty output_dir, unless the run resumes, and write the resolved config.json.

    Every rank must call it; rank 0 does the work.
    """
    from training.runtime.ranks import barrier, rank
    from training.runtime.tracking import say

    output = Path(config.output_dir)
    if config.description:
        say(config.description)
    barrier()  # no rank may still be checking whether the directory is empty
    if rank() == 0:
        occupy(output)
        if config.resume_from_checkpoint is None:
            for leftover in contents(output):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        resolved = absolute_paths(config.model_dump(mode="json"))
        (output / "config.json").write_text(json.dumps(resolved, indent=2) + "\n")
    barrier()
    return output
