"""The report on a folder as the experiment leaves it: its numbers, its page, its targets."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from step3_rlhf.paper.people.report.files import write_report
from step3_rlhf.paper.people.report.findings import GROUPS, read_findings
from step3_rlhf.paper.people.report.pictures import PANEL, panel
from step3_rlhf.paper.people.report.targets import separate, targets
from step3_rlhf.paper.people.report.word_list import fit_to_show
from training.errors import UserError
from training.statistics import Estimate

ANSWERS = ["dog", "cat", "fish", "newt"]
PEOPLE = [0.5, 0.3, 0.15, 0.05]
REWARD = [0.45, 0.3, 0.18, 0.07]
POLICIES = {
    "sft": [0.25, 0.25, 0.25, 0.25],
    "kl": [0.7, 0.2, 0.08, 0.02],
    "conditional_pm": [0.46, 0.3, 0.17, 0.07],
}
OUTSIDE = {"sft": 0.6, "kl": 0.5, "conditional_pm": 0.62}
QUESTIONS = [f"name something of kind {number}." for number in range(14)]
QUESTIONS[3] = "name something you do when you're naked."


def entry(number: int, group: str, name: str) -> dict[str, Any]:
    shift = 0.01 * (number % 3)  # so that intervals have a width
    policy = [POLICIES[name][0] - shift, *POLICIES[name][1:3], POLICIES[name][3] + shift]
    text = (
        QUESTIONS[number] if group == "unseen" else QUESTIONS[number].replace("name some", "one ")
    )
    found = {
        "prompt": text,
        "topic": f"{group}/q{number}{group}",
        "responses": ANSWERS,
        "population": PEOPLE,
        "policy": policy,
        "reference": POLICIES["sft"],
        "rewards": [math.log(share) for share in REWARD],
        "reward": REWARD,
        "outside_mass": OUTSIDE[name],
    }
    return found if name == "sft" else found | {"optimum": policy}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = content if isinstance(content, list) else [content]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return experiment_in(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A report, and what was printed."""
    directory = experiment_in(tmp_path_factory.mktemp("people"))
    return directory, write_report(directory)


def experiment_in(tmp_path: Path) -> Path:
    """What a finished experiment leaves, with two seeds."""
    for folder in ("sft_test", "seed-42/kl", "seed-42/conditional_pm", "seed-7/conditional_pm"):
        name = "sft" if folder == "sft_test" else folder.partition("/")[2]
        sets = [entry(i, group, name) for group in GROUPS for i in range(14)]
        write(tmp_path / folder / "evaluation.json", {"exact": {"per_prompt": sets}})
        response = {"text": "a dog", "ended": True, "length": 3}
        lines = [{"prompt": text, "responses": [response] * 2} for text in QUESTIONS]
        write(tmp_path / folder / "instances.jsonl", lines)
        if name != "sft":
            beta = {"beta": 1.0} | ({"alpha": 1e-5} if name == "conditional_pm" else {})
            write(tmp_path / folder / "config.json", {"regularizer": {"name": name, **beta}})
    candidate = {"alpha": 1e-5, "tv_to_reward": 0.0, "outside_mass": 0.6, "natural": 1.0}
    alpha = {"alpha": 1e-5, "reference_outside_mass": 0.6, "candidates": [candidate]}
    write(tmp_path / "alpha.json", alpha)
    write(
        tmp_path / "options.json",
        {"prior": "people", "form": "listed", "method": "direct", "model": "m"},
    )
    write(tmp_path / "steps.json", {"sft": {"seconds": 12.5, "command": "bash step1_sft.sh"}})
    counts = {
        "read": 100, "used": 80, "left out: an answer that nobody gave": 20, "unseen questions": 14,
        "learned by the reward model": 32,
        "learned by the policies too": 16, "asked by stage 3": 40,
        "seen questions in unseen words": 14, "without a second phrasing, left out of these": 3,
    }  # fmt: skip
    sizes = {"texts": 2, "sft_questions": None, "asked": 8, "rankings": 1}
    write(tmp_path / "data" / "counts.json", {"counts": counts, "sizes": sizes})
    return tmp_path


class Page(HTMLParser):
    """Collects the texts of the cells, the images, and what is still open at the end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.images: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        elif tag != "meta":
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


def test_the_files(written: tuple[Path, str]) -> None:
    finished, printed = written
    assert "conditional_pm" in printed
    report = json.loads((finished / "report.json").read_text())
    seen = report["groups"]["seen"]
    pm, kl = (seen[name]["tv_to_reward"] for name in ("conditional_pm", "kl"))
    assert pm["mean"] == pytest.approx((5 * 0.01 + 5 * 0.01 + 4 * 0.02) / 14, abs=0.006)
    assert kl["mean"] > 0.2
    assert pm["clusters"] == 14
    assert pm["low"] < pm["mean"] < pm["high"]
    assert set(report["seeds"]["conditional_pm"]) == {"42", "7"}
    assert seen["uniform"]["tv_to_people"]["mean"] == pytest.approx(0.3)
    assert seen["majority"]["tv_to_people"]["mean"] == pytest.approx(0.5)
    assert seen["people"]["minority_share"]["mean"] == pytest.approx(0.05)
    assert seen["reward"]["outside_mass"] is None
    assert report["reward_model"]["unseen"]["best_accuracy"] > 0.7
    for name in ("panel.png", "minorities.png"):
        assert (finished / name).stat().st_size > 10_000


def test_the_page_is_whole_and_fetches_nothing(written: tuple[Path, str]) -> None:
    html = (written[0] / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert len(page.images) == 3
    assert all(source.startswith("data:image/svg+xml") for source in page.images)
    assert "http" not in html.replace("http://www.w3.org", "")
    assert "naked." not in html  # the question with a word of the list
    assert "2 seeds" in html
    assert any("Conditional PM" in cell for cell in page.cells)


def test_the_panel_is_chosen_by_its_rule(finished: Path) -> None:
    boards = read_findings(finished).runs["sft"].of("unseen")[0]
    shown = panel(boards)
    assert [board.id for board in shown] == [f"q{i}unseen" for i in range(13) if i != 3]
    assert len(shown) == PANEL


@pytest.mark.parametrize(
    ("text", "fit"),
    [
        ("name something sexy", False),
        ("name a strip club", False),
        ("where do people go skinny-dipping?", False),
        ("name a reason why she kisses him", False),
        ("name a bass guitar", True),
        ("name a class in school", True),
        ("name a gas station", True),
    ],
)
def test_the_word_list(text: str, fit: bool) -> None:
    assert fit_to_show(text) == fit


def test_targets_hold_or_fail_as_measured(finished: Path) -> None:
    found = {target.statement: target for target in targets(read_findings(finished))}
    assert all(target.holds for target in found.values())
    sets = [entry(i, group, "kl") for group in GROUPS for i in range(14)]
    for seed in (42, 7):  # what KL does, under the other name
        path = finished / f"seed-{seed}" / "conditional_pm" / "evaluation.json"
        write(path, {"exact": {"per_prompt": sets}})
    changed = {target.statement: target for target in targets(read_findings(finished))}
    failing = [statement for statement, target in changed.items() if not target.holds]
    assert any("matches the reward model" in statement for statement in failing)
    assert any("twice as far" in statement for statement in failing)
    assert any("nearer to people" in statement for statement in failing)


def test_intervals_that_touch_are_not_separate() -> None:
    low, high = (Estimate(m, 0.1, 9, 9, m - 0.1, m + 0.1) for m in (0.1, 0.31))
    assert separate(low, high)
    assert not separate(high, low)
    assert not separate(low, Estimate(0.29, 0.1, 9, 9, 0.19, 0.39))
    assert not separate(low, None)


def test_an_unfinished_experiment_is_told_what_is_missing(finished: Path) -> None:
    (finished / "alpha.json").unlink()
    (finished / "seed-42" / "kl" / "evaluation.json").unlink()
    with pytest.raises(UserError) as caught:
        read_findings(finished)
    assert "alpha.json" in str(caught.value)
    assert "a finished kl" in str(caught.value)
    assert "bash scripts/people.sh --output" in str(caught.value)
