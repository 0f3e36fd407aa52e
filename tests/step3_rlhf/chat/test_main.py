"""scripts/chat.sh from its command line to its exit code, as a user would start it."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from step3_rlhf.chat.arguments import chat_parser
from step3_rlhf.chat.session import Session
from step3_rlhf.chat.sources import sources_of
from step3_rlhf.chat.speakers import load_speakers
from step3_rlhf.config import SamplingSettings

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 3.0
"""Of CPU time: a check that imports torch takes longer."""


def chat(where: Path, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "chat.sh"), *arguments],
        env=os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path}, cwd=where,
        input=typed, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


@pytest.fixture
def runs(two_answers: Path, tmp_path: Path) -> Path:
    """A run of stage 3, one of stage 1, and a reward model."""
    for name, folder in (("pm", "actor"), ("sft", "model"), ("reward", "model")):
        shutil.copytree(two_answers, tmp_path / name / folder)
    config = tmp_path / "reward" / "model" / "config.json"
    config.write_text(config.read_text().replace("ForCausalLM", "ForSequenceClassification"))
    return tmp_path


@pytest.mark.launcher
def test_a_pipe_gets_one_answer_a_line(runs: Path) -> None:
    ended = chat(runs, "pm", "sft", "--max-tokens", "4", typed="Drink?\n\nPet?\n")
    assert ended.returncode == 0, ended.stderr
    speakers = load_speakers(sources_of([str(runs / "pm")]), SamplingSettings(response_length=4))
    session = Session(speakers, (), seed=42)
    expected = []
    for question in ("Drink?", "Pet?"):
        session.reset()
        (answer,) = session.ask(question)
        expected += [f"pm: {answer}", f"sft: {answer}"]
    assert ended.stdout.splitlines() == expected
    assert ended.stderr.splitlines() == [
        "pm: pm/actor (the actor of a run of stage 3)",
        "sft: sft/model (the model of a run of stage 1)",
    ]


@pytest.mark.launcher
def test_shares_of_one_prompt(runs: Path) -> None:
    ended = chat(runs, "pm", "--share", "--samples", "100", "--prompt", "Drink?", "--bf16")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[:2] == ["Drink?", ""]
    assert lines[2].startswith("pm: 100 answers, 2 different, entropy 0.")
    assert sum(int(line.split("]")[1].split()[0]) for line in lines[3:5]) == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing/run/x"], "MODEL: missing/run/x does not exist"),
        (["pm/nothing"], "MODEL: pm/nothing does not exist"),
        ([".."], "MODEL: .. is neither a model's directory"),
        (["reward", "pm"], "MODEL: reward/model is a reward model: it scores answers"),
        (["pm", "--chat-template", "nope"], "--chat-template: 'nope' is neither a file nor one of"),
    ],
)
def test_a_mistake_ends_with_its_message_alone(
    runs: Path, arguments: list[str], message: str
) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ended = chat(runs, *arguments)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.strip().splitlines()) == 1
    assert ended.stderr.strip().startswith(message)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < SECONDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pm", "--samples", "0"], "argument --samples: 0: a whole number above 0 was expected"),
        (["pm", "--temperature", "0"], "argument --temperature: 0: a number above 0 was expected"),
        (["pm", "--seed", "-1"], "argument --seed: -1: a whole number from 0 to 4294967295"),
        (
            ["pm", "--prompt", "caf\udce9"],
            "argument --prompt: it is not UTF-8; convert it with iconv",
        ),
        (
            ["pm", "--system", "caf\udce9"],
            "argument --system: it is not UTF-8; convert it with iconv",
        ),
        (["pm", "--shares"], "--shares: unknown option; did you mean '--share'?"),
        ([], "name at least one MODEL"),
    ],
)
def test_a_wrong_option_ends_with_usage_and_one_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        chat_parser().parse_intermixed_args(arguments)
    assert ended.value.code == 2
    usage, said = capsys.readouterr().err.splitlines()
    assert usage == "usage: bash scripts/chat.sh MODEL [MODEL ...] [options]"
    assert said.startswith(message)


def test_help_says_why_the_temperature_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        chat_parser().parse_intermixed_args(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "examples: bash scripts/chat.sh runs/quickstart/conditional_pm" in shown
    assert "the policy that training scores and evaluation measures" in shown
