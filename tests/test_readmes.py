"""Every command in every README goes through the real parsers, and every relative link exists.

Nothing is launched. Words in capitals (CONFIG.json, RUN_DIR, PATH …) stand for what a user would
write; they are replaced by something real of their kind.
"""

import argparse
import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from step1_sft.config import SFTConfig
from step2_reward.calibrate.settings import CalibrationConfig, calibration_parser
from step2_reward.config import RewardConfig
from step3_rlhf.benchmark.__main__ import benchmark_parser
from step3_rlhf.chat.arguments import chat_parser
from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.direct.config import DirectConfig
from step3_rlhf.evaluation.settings import evaluation_parser
from step3_rlhf.gpu_check.__main__ import check_parser
from step3_rlhf.paper.grid.__main__ import parsed as grid_arguments
from training.cli import stage_parser
from training.config import StrictModel, apply_overrides, read_mapping
from training.world.files import WorldSizes

ROOT = Path(__file__).resolve().parents[1]
STAGES: dict[str, type[StrictModel]] = {
    "step1_sft.sh": SFTConfig,
    "step2_reward.sh": RewardConfig,
    "step3_rlhf.sh": PPOConfig,
    "step3_direct.sh": DirectConfig,
}
PLACEHOLDERS = {
    "CONFIG": "step3_rlhf/configs/opt-1.3b.json",
    "CONFIG.json": "step3_rlhf/configs/opt-1.3b.json",
    "STAGE3_CONFIG": "step3_rlhf/configs/opt-1.3b.json",
    "RUN_DIR": "runs/example",
    "DIR": "runs/example",
    "DIRECTORY": "runs/example",
    "OUT_DIR": "runs/example",
}
COMMAND = re.compile(r"(?:bash scripts/\w+\.sh|python -m [\w.]+)\b")
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


def readmes() -> list[Path]:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in tracked.stdout.split("\n") if name]


def commands(text: str) -> Iterator[str]:
    """Commands in code blocks, and in inline code that names a whole command."""
    for block in re.findall(r"^[ ]*```(?:bash|sh)\n(.*?)^[ ]*```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").split("\n"):
            if COMMAND.search(line):
                yield line.strip()
    prose = re.sub(r"^[ ]*```.*?^[ ]*```", "", text, flags=re.M | re.S)
    for code in re.findall(r"`([^`]+)`", prose):
        if COMMAND.match(code.strip()) or (ASSIGNMENT.match(code) and COMMAND.search(code)):
            yield " ".join(code.split())


def words_of(command: str) -> list[str]:
    """Without variables in front, a comment behind, and optional parts in brackets."""
    command = re.sub(r"\s\[[^\]'\"]*\](?=\s|$)", "", command)
    words = shlex.split(command, comments=True)
    while ASSIGNMENT.fullmatch(words[0]):
        words = words[1:]
    return words


def filled(word: str) -> str:
    return PLACEHOLDERS.get(word, word)


class NoSuchOptionError(Exception):
    """A command that its parser refuses."""


def check(command: str) -> None:
    """Give a command to the parser that it would meet.

    Raises:
        NoSuchOptionError: it is refused.
    """
    program, target, *arguments = words_of(command)
    arguments = [filled(argument) for argument in arguments]
    try:
        if program == "bash":
            check_script(Path(target).name, arguments)
        else:
            check_module(arguments[0] if target == "-m" else target, arguments[1:])
    except SystemExit as ended:
        if ended.code:
            raise NoSuchOptionError(command) from None


def check_script(script: str, arguments: list[str]) -> None:
    if not (ROOT / "scripts" / script).is_file():
        raise NoSuchOptionError(f"there is no scripts/{script}")
    if "--help" in arguments or not arguments:
        return
    if script in STAGES:
        options = stage_parser(STAGES[script]).parse_intermixed_args(arguments)
        data = read_mapping(str(ROOT / options.config))
        check_overrides(STAGES[script], data, options.overrides)
    elif script == "evaluate.sh":
        options = evaluation_parser().parse_intermixed_args(arguments)
        check_overrides(EvaluationConfig, {}, options.overrides)
    elif script == "calibrate.sh":
        options = calibration_parser().parse_intermixed_args(arguments)
        check_overrides(CalibrationConfig, {}, options.overrides)
    elif script == "chat.sh":
        chat_parser().parse_intermixed_args(arguments)
    elif script == "sweep.sh":
        options = grid_arguments(arguments)
        if options.config:
            check_overrides(PPOConfig, read_mapping(str(ROOT / options.config)), options.overrides)
    elif script == "benchmark.sh":
        benchmark_parser().parse_args(arguments)
    elif script == "gpu_check.sh":
        check_parser().parse_args(arguments)
    elif script == "test.sh":
        selected = [a for a in arguments if a not in ("--fast", "--all")]
        missing = [a for a in selected if a.startswith("tests/") and not (ROOT / a).exists()]
        if missing:
            raise NoSuchOptionError(f"there is no {missing[0]}")
    elif script == "slurm.sh":
        check_script(arguments[0], arguments[1:])
    else:
        check_own_options(script, arguments)


def check_overrides(
    config_class: type[StrictModel], data: dict[str, object], overrides: list[str]
) -> None:
    """Every override names a setting; the rest of the config is the user's."""
    faults = apply_overrides(data, overrides)
    for override in overrides:
        owner: object = config_class
        for key in override.partition("=")[0].split("."):
            fields = getattr(owner, "model_fields", None)
            if fields is None:
                break  # inside a plain object, such as DeepSpeed's section
            if key not in fields:
                faults.append(f"no setting {override}")
                break
            kinds = get_args(fields[key].annotation) or (fields[key].annotation,)
            owner = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    if faults:
        raise NoSuchOptionError("; ".join(faults))


def check_own_options(script: str, arguments: list[str]) -> None:
    """Scripts with an option loop in bash: each option is a case of that loop."""
    text = (ROOT / "scripts" / script).read_text(encoding="utf-8")
    known = set(re.findall(r"(--[a-z-]+)(?: \||\))", text))
    for argument in arguments:
        if argument.startswith("--") and argument not in known:
            raise NoSuchOptionError(f"{script} does not know {argument}")


def check_module(module: str, arguments: list[str]) -> None:
    if module == "pip":
        return
    if importlib.util.find_spec(module) is None:
        raise NoSuchOptionError(f"there is no module {module}")
    source_of = ROOT.joinpath(*module.split("."))
    file = source_of / "__main__.py" if source_of.is_dir() else source_of.with_suffix(".py")
    if not file.is_file():
        raise NoSuchOptionError(f"{module} is not a command")
    known = set(re.findall(r"[\"'](--[\w-]+)", file.read_text(encoding="utf-8")))
    if module == "training.world":
        known |= {"--output_dir", "--seed", *(f"--{size}" for size in vars(WorldSizes()))}
    for argument in arguments:
        if argument.startswith("--") and argument.partition("=")[0] not in known:
            raise NoSuchOptionError(f"{module} does not know {argument}")


@dataclass(frozen=True)
class Link:
    file: Path
    target: str

    def is_sound(self) -> bool:
        path, _, anchor = self.target.partition("#")
        file = (self.file.parent / path).resolve() if path else self.file
        if not file.exists():
            return False
        return not anchor or anchor in anchors(file.read_text(encoding="utf-8"))


def links(file: Path) -> list[Link]:
    text = re.sub(r"^[ ]*```.*?^[ ]*```", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [Link(file, t) for t in targets if not re.match(r"[a-z]+:", t)]


def anchors(text: str) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("file", readmes(), ids=name)
def test_commands_fit_their_parsers(file: Path) -> None:
    for command in commands(file.read_text(encoding="utf-8")):
        check(command)


@pytest.mark.parametrize("file", readmes(), ids=name)
def test_links_lead_somewhere(file: Path) -> None:
    assert not [link.target for link in links(file) if not link.is_sound()]


@pytest.mark.parametrize("file", readmes(), ids=name)
def test_json_examples_are_json(file: Path) -> None:
    for block in re.findall(r"```json\n(.*?)```", file.read_text(encoding="utf-8"), re.S):
        try:
            json.loads(block)
        except ValueError:
            for line in block.strip().split("\n"):  # JSON Lines
                json.loads(line)


def test_the_main_readme_has_commands() -> None:
    found = list(commands((ROOT / "README.md").read_text(encoding="utf-8")))
    assert len(found) >= 6
    assert any("quickstart.sh" in command for command in found)


@pytest.mark.parametrize(
    "command",
    [
        "bash scripts/step9_none.sh CONFIG.json",
        "bash scripts/step1_sft.sh step1_sft/configs/opt-1.3b.json --dri-run",
        "bash scripts/step1_sft.sh step1_sft/configs/opt-1.3b.json lerning_rate=1",
        "bash scripts/step3_rlhf.sh step3_rlhf/configs/opt-1.3b.json actor.rate=1",
        "bash scripts/step3_direct.sh step3_rlhf/configs/opt-1.3b-direct.json anchor.wait=1",
        "bash scripts/evaluate.sh RUN_DIR evaluation.prompts=3",
        "bash scripts/sweep.sh CONFIG --alpha 0.1,zero",
        "bash scripts/quickstart.sh --sed 4",
        "bash scripts/test.sh tests/step4",
        "python -m training.opinions --output_dir world",
        "python -m training.world --outputdir world",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((NoSuchOptionError, argparse.ArgumentTypeError)):
        check(command)


def test_a_wrong_link_is_found(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("# One heading\n[a](#one-heading) [b](#two) [c](none.md) [d](https://x.y)\n")
    assert [link.target for link in links(file) if not link.is_sound()] == ["#two", "none.md"]


def test_commands_are_found_in_blocks_and_in_prose() -> None:
    text = "Use `bash scripts/a.sh X` and\n```bash\nN=2 bash scripts/b.sh \\\n    y=1  # why\n```\n"
    assert list(commands(text)) == ["N=2 bash scripts/b.sh      y=1  # why", "bash scripts/a.sh X"]
    assert words_of("N=2 bash scripts/b.sh [--x] y=1  # why") == ["bash", "scripts/b.sh", "y=1"]
