"""The settings' reference: complete, true to the classes, and not stale."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.direct.config import DirectConfig
from step3_rlhf.regularizers.registry import REGULARIZERS
from training.config import Count, Fraction, StrictModel
from training.settings_reference import (
    Setting,
    as_markdown,
    as_text,
    configs_readme,
    reference_file,
    sections_of,
)

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {
    "step1_sft.config:SFTConfig": SFTConfig,
    "step2_reward.config:RewardConfig": RewardConfig,
    "step3_rlhf.config:PPOConfig": PPOConfig,
    "step3_rlhf.direct.config:DirectConfig": DirectConfig,
}


class Inner(StrictModel):
    """An object of the JSON."""

    share: Fraction = 0.5
    """A share."""


class Outer(StrictModel):
    """The whole JSON.

    More that does not belong into a table.
    """

    steps: Count | None = None
    """Steps; null is
    any number."""
    kind: Literal["a", "b"]
    """A kind, a | b."""
    inner: Inner = Inner()
    """An object."""
    members: Annotated[tuple[Inner, ...], Field(strict=False)] = ()
    """Several objects."""


def test_every_part_of_a_setting() -> None:
    whole, inner, members = sections_of(Outer)
    assert whole.sentence == "The whole JSON."
    assert whole.settings == (
        Setting("steps", "integer ≥ 1 or null", "null", "Steps; null is any number."),
        Setting("kind", '"a" or "b"', "required", "A kind, a | b."),
        Setting("inner", "object", "its own defaults", "An object."),
        Setting("members", "list of object", "[]", "Several objects."),
    )
    share = Setting("inner.share", "number ≥ 0 and ≤ 1", "0.5", "A share.")
    assert (inner.path, inner.settings) == ("inner", (share,))
    assert (members.path, members.settings[0].path) == ("members[]", "members[].share")
    assert '| `kind` | "a" or "b" | required | A kind, a \\| b. |' in as_markdown([whole])
    assert "  steps  (integer ≥ 1 or null; = null)\n      Steps; null is" in as_text([whole])


def test_a_setting_without_a_docstring_is_found() -> None:
    class Silent(StrictModel):
        """One field says nothing."""

        count: int = 1

    with pytest.raises(ValueError, match=r"Silent\.count has no docstring"):
        sections_of(Silent)


@pytest.mark.parametrize("config_class", [*CLASSES.values(), EvaluationConfig])
def test_every_field_is_explained_once(config_class: type[StrictModel]) -> None:
    sections = sections_of(config_class)
    assert {s.path for s in sections[0].settings} == set(config_class.model_fields)
    paths = [s.path for section in sections for s in section.settings if "name" not in section.path]
    assert len(paths) == len(set(paths)) > 20
    for section in sections:
        for setting in section.settings:
            assert setting.sentence[0].isupper() or setting.sentence[0] in "λπ"
            assert setting.sentence.endswith(".")


def test_every_regularizer_has_its_parameters() -> None:
    found = {section.path: section for section in sections_of(PPOConfig)}
    for name, kind in REGULARIZERS.items():
        settings = found[f'regularizer {{"name": "{name}"}}'].settings
        wanted = {f"regularizer.{field}" for field in kind.model_fields if field != "name"}
        assert {setting.path for setting in settings} == wanted


@pytest.mark.parametrize("path", CLASSES)
def test_the_readme_of_the_configs_is_up_to_date(path: str) -> None:
    file = reference_file(path)
    command = f"python -m training.settings_reference {path}"
    assert file.read_text(encoding="utf-8") == configs_readme(path), f"stale; run `{command}`"


def test_each_script_has_its_own_reference() -> None:
    files = [reference_file(path).relative_to(ROOT).as_posix() for path in CLASSES]
    assert files == [
        "step1_sft/configs/README.md",
        "step2_reward/configs/README.md",
        "step3_rlhf/configs/README.md",
        "step3_rlhf/configs/step3_direct.md",
    ]


@pytest.mark.launcher
@pytest.mark.parametrize("path", CLASSES)
def test_help_shows_every_setting_and_no_internal_option(path: str) -> None:
    module, config_class = path.split(":")[0], CLASSES[path]
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    for section in sections_of(config_class):
        for setting in section.settings:
            assert f"  {setting.path}  (" in shown
    assert "local_rank" not in shown
    script, stage = config_class.script, module.split(".")[0]
    name = "quickstart.json" if script == stage else "quickstart-direct.json"
    assert f"bash scripts/{script}.sh {stage}/configs/{name}" in shown
