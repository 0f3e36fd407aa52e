"""The report: its schema, its page, its verdicts; and the arguments of quickstart.sh."""

import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from step1_sft.config import SFTConfig
from step2_reward.config import RewardConfig
from step3_rlhf.config import EvaluationConfig, PPOConfig
from step3_rlhf.direct.config import DirectConfig
from step3_rlhf.evaluation.settings import run_settings
from step3_rlhf.paper.bars import abbreviated
from step3_rlhf.paper.quickstart import __main__ as report
from step3_rlhf.paper.quickstart import seeds
from step3_rlhf.paper.quickstart.findings import (
    EVALUATION_FILES,
    RUNS,
    Run,
    method_of,
    read_findings,
    training_costs,
)
from step3_rlhf.paper.quickstart.groups import draw_groups, group_shares
from step3_rlhf.paper.quickstart.machine import this_machine
from step3_rlhf.paper.quickstart.metrics import METRICS, number
from step3_rlhf.paper.quickstart.page import Pictures, page, policy_of
from step3_rlhf.paper.quickstart.report_json import all_seconds, report_json
from step3_rlhf.paper.quickstart.shares import in_columns, topic_shares
from step3_rlhf.paper.quickstart.table1 import verdict
from training import plotting
from training.config import apply_overrides, check_config, load_config
from training.data import split_rows
from training.errors import UserError

ROOT = Path(__file__).parents[3]
SAMPLED = (
    "pm_divergence reward length ended_fraction perplexity reference_perplexity entropy kl "
    "pm_divergence_unequal pm_divergence_reference equal_pairs optimum_kl optimum_gap"
)
EXACT = "tv_to_reward tv_to_population tv_to_optimum outside_mass natural_mass"
REGULARIZERS: dict[str, dict[str, Any] | None] = {
    "sft": None,
    "kl": {"name": "kl", "beta": 1.0},
    "pm": {"name": "pm", "beta": 1.0},
    "conditional_pm": {"name": "conditional_pm", "alpha": 0.02, "beta": 1.0, "level": "token"},
    "js_divergence": {"name": "f_divergence", "divergence": "js_divergence", "beta": 1.0},
}
METHODS_MEASURED = {"rloo": {"advantage_estimator": "rloo"}, "weighted_sum": {}, "pooled": {}} | {
    "mixture": {},
    "ema": {},
}
"""Further methods, and what their configs have beside conditional PM's."""
REGULARIZERS |= dict.fromkeys(METHODS_MEASURED, REGULARIZERS["conditional_pm"])
POLICIES = {
    "sft": [0.1, 0.9],
    "kl": [0.2, 0.8],
    "pm": [0.4, 0.6],
    "conditional_pm": [0.65, 0.35],
    "js_divergence": [0.3, 0.7],
    **{name: [0.5, 0.5] for name in METHODS_MEASURED},
}
PROMPTS_OF_COMPARISONS = ["Which pet?", "Which drink?", "Which fruit?", "Which day?"]
COMPARISONS = [
    {"prompt": prompt, "bayes_probability": p}
    for prompt in PROMPTS_OF_COMPARISONS
    for p in (0.7, 0.3)
]


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = content if isinstance(content, list) else [content]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def evaluation(name: str, **means: float) -> dict[str, Any]:
    """What evaluation.py writes, with a different number for every figure."""
    start = 0.001 * (1 + list(POLICIES).index(name))

    def figure(key: str, place: int) -> dict[str, float]:
        return {"mean": means.get(key, start + 0.01 * place), "ci95": 0.005, "count": 4}

    per_prompt = [
        {
            "prompt": f"{topic}, phrasing {phrasing}?",
            "topic": topic,
            "responses": ["Tea & <milk>", "A strong cup of coffee"],
            "policy": POLICIES[name] if phrasing else POLICIES[name][::-1],
            "population": [0.3, 0.7],
            "reward": [0.35, 0.65],
            "rewards": [-0.25, 0.5],
        }
        for topic in ("drink", "pet")
        for phrasing in range(2)
    ]
    exact: dict[str, Any] = {key: figure(key, i) for i, key in enumerate(EXACT.split())}
    if name == "sft":
        exact["tv_to_optimum"] = None
    sampled = {key: figure(key, 10 + i) for i, key in enumerate(SAMPLED.split())}
    return {**sampled, "prompts": 4, "exact": {**exact, "prompts": 4, "per_prompt": per_prompt}}


def write_run(directory: Path, name: str, **means: float) -> None:
    measured = evaluation(name, **means)
    write(directory / name / "evaluation.json", measured)
    config = {"seed": 7, "response_length": 16} | (
        {"regularizer": REGULARIZERS[name]} if REGULARIZERS[name] else {}
    )
    write(directory / name / "config.json", config)
    text = "<script>\u2028\x07 jam </script>" if name == "pm" else f"an answer of {name}"
    response = {"text": text, "ended": name != "pm", "length": 24, "reward": 1.0}
    prompts = [entry["prompt"] for entry in measured["exact"]["per_prompt"]]
    instances = [{"prompt": prompt, "responses": [response] * 2} for prompt in prompts]
    write(directory / name / "instances.jsonl", instances)


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    """A finished quickstart, as small as can be."""
    directory = tmp_path / "quickstart"
    for name in RUNS:
        write_run(directory, name)
    (directory / "sft" / "model").mkdir()
    write(directory / "pm" / "actor" / "config.json", {"vocab_size": 1002})
    write(directory / "world" / "comparisons_eval.jsonl", COMPARISONS)
    bins = [{"low": 0.5, "high": 0.55, "pairs": 9, "confidence": 0.52, "accuracy": 0.5}]
    calibration = {"pairs": 9, "accuracy": 0.64, "log_loss": 0.63, "ece": 0.02, "reliability": bins}
    write(directory / "reward" / "evaluation.json", calibration)
    phases = {"seconds": {"world": 5.5, "sft": 60.0, "total": 65.5}, "commands": {"sft": "bash a"}}
    (directory / "phases.json").write_text(json.dumps(phases))
    return directory


class Page(HTMLParser):
    """What a page fetches, and the cells of its tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [v or "" for k, v in attributes if k in ("src", "href", "srcset", "data")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.tables[-1][-1][-1] += data


@pytest.mark.long
def test_files_are_written_in_the_agreed_form(
    quickstart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(quickstart, "js_divergence")
    report.main([str(quickstart)])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:7])) <= 100
    assert all(name in shown for name in (*RUNS, "js_divergence", "report.html"))
    assert (quickstart / "shares.png").read_bytes().startswith(b"\x89PNG")

    found = json.loads((quickstart / "report.json").read_text())
    figures = {"accuracy", "log_loss", "bayes_log_loss", "ece", "calibration"}
    assert set(found["reward_model"]) == figures
    assert found["reward_model"]["calibration"] is None
    assert found["reward_model"]["bayes_log_loss"] == pytest.approx(0.780323874)
    assert "groups" in found["estimand"]
    # 16 log 1000 less the spread of the rewards, 1.0 − (−0.25); what was reached is 0.163
    pm = found["pm_convergence"]
    assert pm["least_entropy"] == pytest.approx(16 * math.log(1000) - 1.25, rel=1e-12)
    assert pm["entropy"] == found["runs"]["pm"]["entropy"]
    assert (pm["converged"], pm["lowest_reward"], pm["highest_reward"]) == (False, -0.25, 1.0)
    shown = " ".join((quickstart / "report.html").read_text().split())
    assert "Unconditional PM has not converged" in shown
    assert "at least 109 nats, and 0 nats were reached" in shown
    assert set(found["runs"]) == set(RUNS)
    assert set(found["further_runs"]) == {"js_divergence"}
    for name, means in {**found["runs"], **found["further_runs"]}.items():
        given = evaluation(name)
        assert set(means) == {metric.name for metric in METRICS}
        for key, value in means.items():
            if (name, key) == ("sft", "tv_to_optimum"):
                assert value is None
            else:
                assert value == (given["exact"].get(key) or given[key])["mean"]
                assert found["ci95"][name][key] == 0.005
    assert found["seconds"]["sft"] == 60.0
    assert found["seconds"]["total"] == pytest.approx(65.5 + found["seconds"]["report"], abs=0.11)
    assert set(found["versions"]) >= {"python", "torch", "deepspeed", "transformers"}

    html = Page(quickstart / "report.html")
    assert len(html.fetched) == 5
    assert all(uri.startswith("data:image/") for uri in html.fetched)
    assert not {"script", "link", "iframe", "object", "base"} & set(html.tags)
    text = (quickstart / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|https?://", re.sub(r'src="data:[^"]*"', "", text))

    metrics = next(table for table in html.tables if table[0][0] == "Run")
    assert len(metrics) == 1 + len(RUNS) + 1
    for name, row in zip((*RUNS, "js_divergence"), metrics[1:], strict=True):
        means = {**found["runs"], **found["further_runs"]}[name]
        for metric, cell in zip(METRICS, row[1:], strict=True):
            value = means[metric.name]
            assert cell == ("–" if value is None else f"{number(value)}± 0.005")


def test_the_reward_models_calibration_is_shown(quickstart: Path) -> None:
    before = rendered(quickstart)
    assert "bash scripts/calibrate.sh" in before
    bins = [{"low": 0.5, "high": 0.55, "pairs": 9, "confidence": 0.51, "accuracy": 0.5}]
    measured = {
        "beta": {"mean": 1.25, "low": 1.1, "high": 1.42, "clusters": 16},
        "after": {"log_loss": 0.612, "ece": 0.0123, "reliability": bins},
    }
    write(quickstart / "reward" / "calibration.json", measured)
    report.main([str(quickstart)])
    found = json.loads((quickstart / "report.json").read_text())["reward_model"]["calibration"]
    assert found == {
        "beta": 1.25, "low": 1.1, "high": 1.42, "clusters": 16, "log_loss": 0.612, "ece": 0.0123,
    }  # fmt: skip
    html = Page(quickstart / "report.html")
    assert len(html.fetched) == 6  # the diagram after beside that before
    rows = [row for table in html.tables for row in table]
    assert ["Calibrated β", "1.250 (1.100 to 1.420)"] in rows
    assert ["Log-loss, nats", "0.6300", "0.6120"] in rows
    assert ["Expected calibration error\xa0↓", "0.0200", "0.0123"] in rows


def rendered(quickstart: Path) -> str:
    """The page without its pictures."""
    nothing = Pictures("", "", "", "", "")
    return page(read_findings(quickstart), nothing, {"sft": 60.0}, this_machine())


def test_samples_stand_side_by_side_and_are_escaped(quickstart: Path) -> None:
    text = rendered(quickstart)
    assert text.count("an answer of kl") == 4  # two topics, two responses
    assert "&lt;script&gt; \ufffd jam &lt;/script&gt;" in text
    assert text.count("cut at 24 tokens") == 4
    assert "<script" not in text


def table1(quickstart: Path) -> str:
    text = rendered(quickstart)
    return text[text.index("The paper's Table 1") : text.index("Two sampled responses")]


@pytest.mark.parametrize(
    ("means", "language", "preferences"),
    [
        ({"outside_mass": 0.05, "reference_perplexity": 10.0, "tv_to_reward": 0.1}, True, True),
        ({"outside_mass": 0.0501, "reference_perplexity": 10.0, "tv_to_reward": 0.1}, False, True),
        ({"outside_mass": 0.05, "reference_perplexity": 10.1, "tv_to_reward": 0.1}, False, True),
        ({"outside_mass": 0.05, "reference_perplexity": 10.0, "tv_to_reward": 0.101}, True, False),
        ({"outside_mass": 0.9, "reference_perplexity": float("inf")}, None, True),
    ],
)
def test_ticks_follow_the_numbers(
    quickstart: Path, means: dict[str, float], language: bool | None, preferences: bool
) -> None:
    write_run(quickstart, "sft", reference_perplexity=2.0)
    write_run(quickstart, "pm", **means)
    runs = read_findings(quickstart).runs
    found = verdict(runs["pm"], runs["sft"])
    assert (found.language, found.preferences) == (language, preferences)
    row = next(r for r in table1(quickstart).split("<tr>") if "</i>PM<" in r)
    shown = re.findall(r"✓ yes|✗ no|<td>–</td>", row)
    words = {True: "✓ yes", False: "✗ no", None: "<td>–</td>"}
    assert shown[0] == words[language]
    assert shown[-1] == words[preferences]
    stated = report_json(read_findings(quickstart), {}, this_machine())["table1"]["rows"]["pm"]
    assert (stated["natural_language"], stated["preferences_matched"]) == (language, preferences)


def test_rows_of_table_1_are_in_the_papers_order(quickstart: Path) -> None:
    write_run(quickstart, "js_divergence")
    rows = re.findall(r"</i>([^<]+)<small>", table1(quickstart))
    assert rows == ["KL", "Jensen–Shannon", "PM", "Conditional PM"]


# Further methods


def write_methods(directory: Path) -> None:
    """The runs of METHODS_MEASURED, and the averaged weights of one of them."""
    for name, settings in METHODS_MEASURED.items():
        write_run(directory, name)
        path = directory / name / "config.json"
        write(path, json.loads(path.read_text()) | settings)
        lines = [
            {"step": 1, "time/iteration": 2.0, "time/rollout": 0.5, "memory/peak_gib": 0.5},
            {"step": 4, "time/iteration": 1.0, "time/rollout": 0.5, "memory/peak_gib": 0.75},
        ]
        write(directory / name / "metrics.jsonl", lines)
    for name in EVALUATION_FILES:
        (directory / "ema_average").mkdir(exist_ok=True)
        shutil.copy(directory / "ema" / name, directory / "ema_average" / name)


def test_further_methods_have_a_table_of_their_own(quickstart: Path) -> None:
    assert "Further methods" not in rendered(quickstart)
    write_methods(quickstart)
    (quickstart / "report.html").write_text(rendered(quickstart), encoding="utf-8")
    tables = Page(quickstart / "report.html").tables
    table = next(table for table in tables if table[0][-1:] == ["What it is"])
    assert [row[0].split("α")[0] for row in table[1:]] == [
        "Conditional PM",
        "Conditional PM, RLOO",
        "Conditional PM, last weights",
        "Conditional PM, averaged weights",
        "Conditional PM, weighted sum",
        "Conditional PM, pooled comparisons",
        "Conditional PM, mixture",
    ]
    costs = [row[4:6] for row in table[1:]]
    assert costs[0] == costs[3] == ["–", "–"]
    assert costs[1] == ["5.000", "0.750"]  # 2 s, and three times 1 s
    written = report_json(read_findings(quickstart), {}, this_machine())
    assert written["methods"]["rloo"] == {"training_seconds": 5.0, "peak_gib": 0.75}
    assert set(written["table1"]["rows"]) == {"kl", "pm", "conditional_pm"}
    assert re.findall(r"</i>([^<]+)<small>", table1(quickstart)) == ["KL", "PM", "Conditional PM"]


def test_direct_optimization_has_seconds_without_iterations(tmp_path: Path) -> None:
    lines = [
        {"step": 10, "time/forward": 0.5, "time/backward": 0.25, "memory/peak_gib": 0.5},
        {"step": 11, "test/loss": 0.5},
        {"step": 20, "time/forward": 0.25, "time/backward": 0.25, "memory/peak_gib": 0.25},
    ]
    write(tmp_path / "metrics.jsonl", lines)
    assert training_costs(tmp_path / "metrics.jsonl") == (12.5, 0.5)
    assert training_costs(tmp_path / "nothing.jsonl") == (None, None)


def test_two_groups_are_shown_on_topics_with_three_answers(quickstart: Path) -> None:
    def run(name: str, *policies: list[float]) -> Run:
        sets = [
            {
                "prompt": f"p{number}",
                "topic": "three" if len(policy) == 3 else "two",
                "responses": ["a", "b", "c"][: len(policy)],
                "policy": policy,
                "population": [0.45, 0.1, 0.45][: len(policy)],
            }
            for number, policy in enumerate(policies)
        ]
        return Run(name, {}, {"exact": {"per_prompt": sets}}, [])

    runs = {
        name: run(name, [0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.9, 0.1])
        for name in ("weighted_sum", "pooled", "mixture")
    }
    found = group_shares(runs)
    assert list(found) == ["population", "weighted_sum", "pooled", "mixture"]
    assert found["population"] == pytest.approx([0.45, 0.1, 0.45])
    assert found["pooled"] == pytest.approx([0.4, 0.4, 0.2])
    assert len(draw_groups(found).axes[0].patches) == 12
    del runs["pooled"]
    assert group_shares(runs) == {}


def test_seeds_are_averaged(
    quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_methods(quickstart)
    other = shutil.copytree(quickstart, tmp_path / "other")
    with pytest.raises(SystemExit):
        seeds.main([str(tmp_path), str(quickstart), str(other)])
    assert "[7, 7]" in capsys.readouterr().err
    for name in ("rloo", "conditional_pm"):
        write_run(other, name, outside_mass=0.5)
        write(other / name / "config.json", {"seed": 8, "regularizer": REGULARIZERS[name]})
    write_run(quickstart, "rloo", outside_mass=0.25)
    shutil.rmtree(other / "pooled")
    seeds.main([str(tmp_path / "table"), str(quickstart), str(other)])
    table = json.loads((tmp_path / "table" / "methods.json").read_text())
    assert table["seeds"] == [7, 8]
    assert "pooled" not in table["runs"]
    rloo = table["runs"]["rloo"]
    assert rloo["outside_mass"]["mean"] == 0.375
    assert rloo["outside_mass"]["sd"] == pytest.approx(0.25 / math.sqrt(2), rel=1e-12)
    assert rloo["outside_mass"]["values"] == [0.25, 0.5]
    assert table["runs"]["sft"]["tv_to_optimum"] is None
    lines = (tmp_path / "table" / "methods.md").read_text().splitlines()
    assert any("| 0.375 ± 0.177 | 5.000 ± 0.000 | 0.750 ± 0.000 |" in line for line in lines)


def test_everything_missing_is_named_with_its_command(
    quickstart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (quickstart / "kl" / "evaluation.json").unlink()
    (quickstart / "sft" / "evaluation.json").unlink()
    with pytest.raises(SystemExit) as ended:
        report.main([str(quickstart)])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert f"{quickstart / 'kl'}: evaluation.json missing" in message
    for phase in ("kl", "sft_evaluation"):
        assert f"bash scripts/quickstart.sh --output {quickstart} --only {phase}" in message
    with pytest.raises(UserError, match="world"):
        read_findings(quickstart / "nowhere")


def test_a_missing_matplotlib_names_the_extra(
    quickstart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plotting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\[plots\]"):
        report.write_report(quickstart)


def test_broken_lines_are_named(quickstart: Path) -> None:
    with (quickstart / "pm" / "instances.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=r"instances\.jsonl:5: "):
        read_findings(quickstart)


def test_shares_are_means_over_a_topics_prompts(quickstart: Path) -> None:
    sets = {name: run.sets for name, run in read_findings(quickstart).runs.items()}
    drink = next(topic for topic in topic_shares(sets) if topic.topic == "drink")
    assert drink.answers == ["A strong cup of coffee", "Tea & <milk>"]  # the favourite first
    assert drink.shares["population"] == pytest.approx([0.7, 0.3])
    assert drink.shares["reward"] == pytest.approx([0.65, 0.35])
    assert drink.shares["sft"] == pytest.approx([0.5, 0.5])


def test_columns_hold_every_topic_once(quickstart: Path) -> None:
    sets = {name: run.sets for name, run in read_findings(quickstart).runs.items()}
    columns = in_columns(topic_shares(sets), 4)
    assert sorted(topic.topic for column in columns for topic in column) == ["drink", "pet"]


def test_long_answers_are_abbreviated() -> None:
    assert abbreviated("Tea") == "Tea"
    assert abbreviated("The violin, even though it takes many years to learn") == (
        "The violin, even\nthough it takes many …"
    )


def test_numbers_fit_their_column() -> None:
    values = [None, 0.0, -0.0004, 9.8765, 54.321, 143.2, 2343.4, 999999.4, 3.2e9]
    shown = ["–", "0.000", "-0.000", "9.877", "54.32", "143.2", "2,343", "999,999", "3.2e+09"]
    assert [number(value) for value in values] == shown


def test_seconds_count_the_report_once() -> None:
    recorded = {"world": 5.0, "report": 9.0, "total": 14.0}
    assert all_seconds(recorded, 2.0) == {"world": 5.0, "report": 2.0, "total": 7.0}


# quickstart.sh, with stand-ins for what trains: they note their arguments and make empty outputs.

STAND_IN = """#!/usr/bin/env bash
case "$*" in
    *print\\(sys.prefix\\)*) echo "$NOTES" ;;
    "-m pip"*) ;;
    "-m step"*.config* | "-m step3_rlhf.evaluation.settings"*) # which would become the launcher
        module="${2/.config/.main}"
        set -- --module "${module%.settings}" "${@:3}"
        printf '%s\\0' "$@" >"$NOTES/call_$(date +%s%N)"
        [[ "$*" != *"$FAIL_ON"* ]] ;;
    "-m training.world"* | "-m step2_reward.calibrate"* | "-m step3_rlhf.paper.quickstart"*)
        printf '%s\\0' "$@" >"$NOTES/call_$(date +%s%N)"
        [[ "$*" != *"$FAIL_ON"* ]] ;;
    *) exec "$PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def run_quickstart(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess, list]]:
    """Runs the script; returns its result and the argument lists of its phases."""
    tools, notes = tmp_path / "tools", tmp_path / "notes"
    tools.mkdir()
    notes.mkdir()
    for name in ("python", "deepspeed", "g++"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(stat.S_IRWXU)

    def run(*arguments: str, fail_on: str = "(nothing)", root: Path = ROOT) -> Any:
        environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(tools),
            "PYTHON": sys.executable,
            "NOTES": str(notes),
            "FAIL_ON": fail_on,
        }
        done = subprocess.run(
            ["bash", "scripts/quickstart.sh", *arguments],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        calls = [path.read_text().split("\0")[:-1] for path in sorted(notes.glob("call_*"))]
        return done, calls

    return run


def make_inputs(directory: Path) -> None:
    """What the phases of a finished quickstart find on disk."""
    trained = [f"reward{kind}" for kind in ("", "_luce", "_group1", "_group2", "_pooled")] + ["sft"]
    for name in ("world/base", *trained, *(f"{name}/model" for name in trained)):
        write(directory / name / "config.json", {})
    record = {"prompt": "p", "chosen": "a", "rejected": "b", "response": "a"}
    groups = [f"two_groups/comparisons{group}" for group in ("", "_group1", "_group2")]
    for name in ("world/texts", "world/comparisons", *groups):
        for part in ("", "_eval"):
            write(directory / f"{name}{part}.jsonl", record)
    for world in ("world", "two_groups"):
        sets = {"prompt": "p", "responses": ["a", "b"]}
        write(directory / world / "response_sets.jsonl", sets)
    write(directory / "world" / "answer_key.jsonl", {"prompt": "p", "classes": {"a": ["a"]}})


def test_quickstart_passes_what_the_stages_understand(
    run_quickstart: Callable[..., Any], tmp_path: Path
) -> None:
    directory = tmp_path / "elsewhere"
    done, calls = run_quickstart("--full", "--seed", "5", "--output", f"{directory}/")
    assert done.returncode == 0, done.stderr
    assert calls.pop(0) == [
        "-m",
        "training.world",
        "--output_dir",
        f"{directory}/world",
        "--seed",
        "5",
    ]
    assert calls.pop() == ["-m", "step3_rlhf.paper.quickstart", str(directory)]
    phases = json.loads((directory / "phases.json").read_text())
    expected = "world sft reward calibration kl pm conditional_pm maximum_entropy js_divergence"
    expected += (
        " forward_kl chi_squared rloo classes reward_luce luce ptx ema ema_average dpo direct"
    )
    expected += " two_groups reward_group1 reward_group2 reward_pooled weighted_sum pooled mixture"
    expected += " sft_evaluation report"
    assert list(phases["commands"]) == expected.split()
    assert list(phases["seconds"]) == [*expected.split(), "total"]
    assert all(f"=== {name}: " in done.stdout for name in expected.split())

    make_inputs(directory)
    stages = {
        "step1_sft.main": SFTConfig,
        "step2_reward.main": RewardConfig,
        "step3_rlhf.main": PPOConfig,
        "step3_rlhf.direct.main": DirectConfig,
    }
    found: dict[str, Any] = {}
    for phase, call in zip(expected.split()[1:-1], calls, strict=True):
        if phase == "two_groups":
            made = ["-m", "training.world", "--output_dir", f"{directory}/two_groups"]
            assert call == [*made, "--seed", "5", "--groups", "2"]
            continue
        if phase == "calibration":
            assert call == ["-m", "step2_reward.calibrate.settings", f"{directory}/reward"]
            continue
        module, config, *overrides = call[call.index("--module") + 1 :]
        if module == "step3_rlhf.evaluation":
            if phase == "ema_average":
                write(directory / "ema" / "config.json", found["ema"].model_dump(mode="json"))
                for model in ("actor", "actor_ema"):
                    write(directory / "ema" / model / "config.json", {})
            settings = run_settings(config)
            faults = apply_overrides(settings, [o for o in overrides if o != "--overwrite"])
            found[phase] = check_config(EvaluationConfig, settings, "faults:", faults)
        else:
            anew = [*overrides, "overwrite_output_dir=true"]
            found[phase] = load_config(stages[module], str(ROOT / config), anew)
            assert found[phase].output_dir == f"{directory}/{phase}"
        assert found[phase].seed == 5
        assert "runs/quickstart" not in found[phase].model_dump_json()

    shipped = json.loads((ROOT / "step3_rlhf/configs/quickstart.json").read_text())
    sft, average = found["sft_evaluation"], found["ema_average"]
    assert (sft.model_name_or_path, sft.output_dir) == (
        f"{directory}/sft/model",
        f"{directory}/sft",
    )
    assert sft.response_length == shipped["response_length"]
    assert sft.regularizer is None
    assert average.model_name_or_path == f"{directory}/ema/actor_ema"
    assert average.output_dir == f"{directory}/ema_average"
    assert average.regularizer == found["conditional_pm"].regularizer
    assert found["maximum_entropy"].regularizer.tau == 0.5
    for name in ("js_divergence", "forward_kl", "chi_squared"):
        assert found[name].regularizer.divergence == name
    named = {"kl": "kl", "pm": "pm", "dpo": "kl", "luce": "generalized_pl"}
    for name in ("conditional_pm", "rloo", "classes", "ptx", "ema", "direct", "mixture"):
        named[name] = "conditional_pm"
    assert {name: found[name].regularizer.name for name in named} == named
    key = found["classes"].regularizer.response_classes.answer_key
    assert key == f"{directory}/world/answer_key.jsonl"
    assert found["luce"].reward.model_name_or_path == f"{directory}/reward_luce/model"
    assert found["luce"].regularizer.g == found["reward_luce"].link == "softplus"
    assert found["ptx"].ptx_data.sources[0].path == f"{directory}/world/texts.jsonl"
    assert (
        found["reward_group2"].data.sources[0].path.endswith("two_groups/comparisons_group2.jsonl")
    )
    of_groups = [f"{directory}/reward_group{group}/model" for group in (1, 2)]
    rewards = {name: found[name].reward for name in ("weighted_sum", "pooled", "mixture")}
    assert [m.model_name_or_path for m in rewards["weighted_sum"].models] == of_groups
    assert [m.model_name_or_path for m in rewards["mixture"].mixture] == of_groups
    assert rewards["mixture"].shares == (0.5, 0.5)
    assert rewards["pooled"].model_name_or_path == f"{directory}/reward_pooled/model"


def test_a_run_is_called_by_its_regularizer_and_its_method() -> None:
    def label(**config: Any) -> str:
        run = Run("own", config.get("regularizer"), {}, [], method_of(config))
        return policy_of(run).label

    kl = {"name": "kl", "beta": 1.0}
    assert label() == "SFT"
    assert label(regularizer=kl, advantage_estimator="gae") == "KL"
    assert label(regularizer=kl, advantage_estimator="rloo") == "KL, RLOO"
    assert label(regularizer=kl, anchor=None) == "KL, direct"


def test_quickstart_leaves_the_shipped_configs_as_they_are(
    run_quickstart: Callable[..., Any], tmp_path: Path
) -> None:
    """In the default folder only the seed, output_dir and the regularizer are overridden."""
    for name in ("scripts", "step3_rlhf/configs"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "copy")
    done, calls = run_quickstart(root=tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    given = {
        tuple(o.partition("=")[0] for o in call[call.index("--module") + 3 :])
        for call in calls[1:-2]
        if "--module" in call
    }
    assert given == {("seed", "output_dir"), ("seed", "output_dir", "regularizer")}
    assert "output_dir=runs/quickstart/kl" in calls[4]


def test_quickstart_names_the_phase_that_failed(
    run_quickstart: Callable[..., Any], tmp_path: Path
) -> None:
    done, calls = run_quickstart("--output", str(tmp_path / "q"), fail_on="step2_reward.main")
    assert done.returncode != 0
    assert "phase reward failed" in done.stderr
    assert len(calls) == 3
    assert list(json.loads((tmp_path / "q" / "phases.json").read_text())["commands"]) == [
        "world",
        "sft",
    ]


def test_quickstart_keeps_what_it_did_not_make(
    run_quickstart: Callable[..., Any], tmp_path: Path
) -> None:
    directory = tmp_path / "q"
    write(directory / "notes.txt", {})
    write(directory / "kl" / "config.json", {})
    done, calls = run_quickstart("--output", str(directory))
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    assert not calls
    done, _ = run_quickstart("--output", str(directory), "--overwrite")
    assert done.returncode == 0
    assert (directory / "notes.txt").exists()
    assert not (directory / "kl").exists()


def test_quickstart_repeats_one_phase(run_quickstart: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "q" / "kl" / "config.json", {})
    write(tmp_path / "q" / "pm" / "config.json", {})
    done, calls = run_quickstart("--output", str(tmp_path / "q"), "--only", "kl")
    assert done.returncode == 0
    assert len(calls) == 1
    assert f"output_dir={tmp_path / 'q' / 'kl'}" in calls[0]
    assert not (tmp_path / "q" / "kl").exists()
    assert (tmp_path / "q" / "pm").exists()


def test_seeds_that_have_a_report_are_not_run_again(
    run_quickstart: Callable[..., Any], tmp_path: Path
) -> None:
    directory = tmp_path / "q"
    write(directory / "seed-5" / "report.json", {})
    arguments = ("--seeds", "5,6", "--output", str(directory))
    done, calls = run_quickstart(*arguments, fail_on="training.world")
    assert done.returncode != 0
    assert [call[1:4] for call in calls] == [
        ["training.world", "--output_dir", f"{directory}/seed-6/world"]
    ]
    write(directory / "seed-6" / "report.json", {})
    done, calls = run_quickstart(*arguments)
    assert done.returncode == 0, done.stderr
    table = ["-m", "step3_rlhf.paper.quickstart.seeds", str(directory)]
    assert calls[1:] == [[*table, f"{directory}/seed-5", f"{directory}/seed-6"]]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sed", "1"],
        ["--seed"],
        ["--seed", "x"],
        ["--seeds", "1;2"],
        ["--seeds", "1,2", "--only", "kl"],
        ["--only", "klx"],
        ["--output", ""],
    ],
)
def test_quickstart_refuses_other_arguments(
    run_quickstart: Callable[..., Any], arguments: list[str]
) -> None:
    done, calls = run_quickstart(*arguments)
    assert done.returncode == 2
    assert "--help" in done.stderr
    assert not calls


def test_the_true_log_loss_is_that_of_the_pairs_that_report(quickstart: Path) -> None:
    """The reward model's own is of the test prompts; so must be what it is compared with."""
    path = quickstart / "world" / "comparisons_eval.jsonl"
    rows = split_rows([line["prompt"] for line in COMPARISONS], 0.5, 42)
    lines = [line | {"bayes_probability": 0.5} for line in COMPARISONS]
    write(path, [line | {"bayes_probability": 0.9} if i in rows["test"] else line
                 for i, line in enumerate(lines)])  # fmt: skip
    assert read_findings(quickstart).reward_model.bayes_log_loss == pytest.approx(-math.log(0.9))
