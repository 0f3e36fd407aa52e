"""The report as one self-contained page: its pictures are data URIs, nothing is fetched."""

from html import escape
from string import Template
from typing import Any

from step3_rlhf.paper.html import STYLE, picture, responses_cell, table
from step3_rlhf.paper.quickstart.findings import (
    LANGUAGE_OUTSIDE_MASS,
    LANGUAGE_PERPLEXITY_RATIO,
    MATCHING_TV,
    METRICS,
    Findings,
    Run,
    number,
    verdict,
)
from step3_rlhf.paper.quickstart.pictures import DISTRIBUTIONS

SAMPLED_PROMPTS = 3
"""Prompts for which every run's sampled responses are shown."""


SHOWN_CHARACTERS = 90
"""Length beyond which a sampled response is abbreviated."""


ORDER = ("kl", "f_divergence", "kl_interpolation", "generalized_pl", "none", "maximum_entropy")
"""Regularizers in the order of Table 1; what is not named follows, then pm and conditional_pm."""


NAMES = {
    "kl": "KL",
    "kl_interpolation": "KL interpolation",
    "generalized_pl": "Generalized PL",
    "none": "No regularizer",
    "maximum_entropy": "Maximum entropy",
    "pm": "PM",
    "conditional_pm": "Conditional PM",
    "reverse_kl": "Reverse KL",
    "forward_kl": "Forward KL",
    "js_divergence": "Jensen–Shannon",
    "alpha_divergence": "α-divergence",
    "chi_squared": "χ²",
    "total_variation": "Total variation",
    "hellinger": "Squared Hellinger",
}


SYMBOLS = {"alpha": "α", "beta": "β", "tau": "τ", "kappa": "κ", "epsilon": "ε"}


TICK, CROSS = "✓", "✗"


PAPER = {
    "kl": (TICK, CROSS),
    "f_divergence": (TICK, CROSS),
    "maximum_entropy": (CROSS, f"{CROSS}, {TICK} at τ = 1"),
    "pm": (CROSS, TICK),
    "conditional_pm": (TICK, TICK),
}
"""Table 1: natural language generation, preference matching."""


def page(findings: Findings, report: dict[str, Any], pictures: dict[str, str]) -> str:
    """The whole page.

    Args:
        report: what report.json holds.
        pictures: data URIs by name.
    """
    return PAGE.substitute(
        style=STYLE,
        tiles=tiles(findings.runs),
        shares=picture(pictures["shares"], "Shares of each answer, per topic and distribution"),
        metrics=metrics(findings.runs),
        meanings=meanings(),
        table1=table1(findings.runs),
        thresholds=thresholds(findings.runs["sft"]),
        pm_note=pm_note(findings.runs["pm"]),
        samples=samples(findings.runs),
        reward=reward_table(report["reward_model"], findings.reward["pairs"]),
        reliability=picture(pictures["reliability"], "Reliability diagram of the reward model"),
        figure2=picture(pictures["figure2"], "Figure 2: bias of KL RLHF"),
        figure9=picture(pictures["figure9"], "Figure 9: bias of a coefficient other than 1"),
        f_divergences=picture(
            pictures["figure2_f_divergences"], "The counterpart of Figure 2 for f-divergences"
        ),
        phases=phases(report["seconds"], findings.commands),
        machine=machine(report),
    )


def tiles(runs: dict[str, Run]) -> str:
    """The headline: distance to the reward model of the three policies in the picture."""
    return "".join(
        f'<div class="tile" style="border-left-color:{DISTRIBUTIONS[name][1]}">'
        f"<span>{DISTRIBUTIONS[name][0]}</span><b>{number(runs[name].mean('tv_to_reward'))}</b>"
        f"<small>± {number(runs[name].ci95('tv_to_reward'))}</small></div>"
        for name in ("sft", "kl", "conditional_pm")
    )


def metrics(runs: dict[str, Run]) -> str:
    """All runs against all metrics, each with its confidence interval."""
    head = ["Run", *(m.title + ("\u00a0↓" if m.lower_is_better else "") for m in METRICS)]
    rows = [
        [name_cell(run), *(figure_cell(run, metric.name) for metric in METRICS)]
        for run in runs.values()
    ]
    return table(head, rows)


def meanings() -> str:
    """What the columns mean."""
    return "".join(f"<dt>{escape(m.title)}</dt><dd>{escape(m.meaning)}</dd>" for m in METRICS)


def figure_cell(run: Run, figure: str) -> str:
    if run.mean(figure) is None:
        return "–"
    return f"{number(run.mean(figure))}<small>± {number(run.ci95(figure))}</small>"


def name_cell(run: Run) -> str:
    """A run's name beside its colour in the picture, its parameters below."""
    _, colour = DISTRIBUTIONS.get(run.name, ("", "transparent"))
    swatch = f'<i style="background:{colour}"></i>'
    return f"{swatch}{escape(label(run))}<small>{escape(parameters(run))}</small>"


def label(run: Run) -> str:
    """What the run's regularizer is called."""
    if run.regularizer is None:
        return "SFT"
    name = kind(run)
    return NAMES.get(run.regularizer.get("divergence", name), run.name)


def kind(run: Run) -> str:
    """The regularizer's name in the registry; empty for one from elsewhere."""
    regularizer = run.regularizer or {}
    return "" if "class" in regularizer else regularizer.get("name", "")


def parameters(run: Run) -> str:
    """The regularizer's parameters, such as "α 0.02, β 1"."""
    regularizer = run.regularizer or {}
    hidden = ("name", "divergence", "max_marginal", "c2")
    return ", ".join(
        f"{SYMBOLS.get(key, key.replace('_', ' '))} {shown(value)}"
        for key, value in sorted(regularizer.items())
        if key not in hidden and value is not None
    )


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def table1(runs: dict[str, Run]) -> str:
    """Table 1 as measured, beside what the paper states."""
    head = [
        "Regularizer",
        "Natural language kept?",
        "Outside mass\u00a0↓",
        "Perplexity under reference",
        "Preferences matched?",
        "TV to reward model\u00a0↓",
        "In the paper: language",
        "In the paper: preferences",
    ]
    rows = []
    for run in sorted((run for run in runs.values() if run.regularizer), key=place):
        found = verdict(run, runs["sft"])
        language, preferences = PAPER.get(kind(run), ("–", "–"))
        rows.append(
            [
                name_cell(run),
                tick(found.language),
                figure_cell(run, "outside_mass"),
                figure_cell(run, "reference_perplexity"),
                tick(found.preferences),
                figure_cell(run, "tv_to_reward"),
                f'<span class="muted">{language}</span>',
                f'<span class="muted">{preferences}</span>',
            ]
        )
    return table(head, rows)


def place(run: Run) -> int:
    """Of its row in Table 1."""
    last = {"pm": len(ORDER) + 1, "conditional_pm": len(ORDER) + 2}
    name = kind(run)
    return ORDER.index(name) if name in ORDER else last.get(name, len(ORDER))


def tick(holds: bool | None) -> str:
    if holds is None:
        return "–"
    return f'<b class="yes">{TICK} yes</b>' if holds else f'<b class="no">{CROSS} no</b>'


def thresholds(sft: Run) -> str:
    """When a tick is given."""
    limit = sft.mean("reference_perplexity")
    at_most = number(None if limit is None else LANGUAGE_PERPLEXITY_RATIO * limit)
    return (
        f"Natural language is kept ({TICK}) if at most {LANGUAGE_OUTSIDE_MASS:.0%} of the "
        f"probability lies outside the response sets and the mean perplexity of the responses "
        f"under the reference is at most {LANGUAGE_PERPLEXITY_RATIO:g} times that of SFT's own "
        f"responses ({number(limit)}, so {at_most}). Preferences are matched ({TICK}) if the total "
        f"variation to the reward model is at most {MATCHING_TV:g}. It compares the shares "
        f"within the response sets; where most of the probability lies outside them, it speaks of "
        f"the little that remains."
    )


def pm_note(pm: Run) -> str:
    """What unconditional preference matching means on open-ended text, with its numbers."""
    outside = pm.mean("outside_mass")
    return (
        f"Unconditional PM puts {'–' if outside is None else f'{outside:.1%}'} of its probability "
        f"outside the response sets, and its responses have a mean perplexity of "
        f"{number(pm.mean('reference_perplexity'))} under the reference. It weighs every string "
        "of tokens by the reward alone, whether or not the string is language, and there are far "
        "more of those that are not; conditional PM keeps the reference's judgement of them."
    )


def samples(runs: dict[str, Run]) -> str:
    """Two responses of each run to the same prompts, one row per run."""
    by_prompt = {
        name: {entry["prompt"]: entry["responses"][:2] for entry in run.instances}
        for name, run in runs.items()
    }
    prompts = sampled_prompts(runs)
    rows = [
        [
            name_cell(run),
            *(responses_cell(by_prompt[name].get(p, []), SHOWN_CHARACTERS) for p in prompts),
        ]
        for name, run in runs.items()
    ]
    return table(["Run", *map(escape, prompts)], rows, kind="samples")


def sampled_prompts(runs: dict[str, Run]) -> list[str]:
    """The first prompts of different topics to which every run responded."""
    topics = {entry["prompt"]: entry.get("topic") for entry in runs["conditional_pm"].sets}
    everywhere = set.intersection(*({e["prompt"] for e in r.instances} for r in runs.values()))
    found: dict[str, str] = {}
    for entry in runs["conditional_pm"].instances:
        prompt = entry["prompt"]
        if prompt in everywhere:
            found.setdefault(topics.get(prompt) or prompt, prompt)
    return list(found.values())[:SAMPLED_PROMPTS]


def reward_table(reward: dict[str, float], pairs: int) -> str:
    rows = [
        ("Held-out comparisons", f"{pairs:,}"),
        ("Accuracy", f"{reward['accuracy']:.3f}"),
        ("Log-loss, nats", f"{reward['log_loss']:.4f}"),
        ("Log-loss of the true preferences", f"{reward['bayes_log_loss']:.4f}"),
        ("Excess\u00a0↓", f"{reward['log_loss'] - reward['bayes_log_loss']:.4f}"),
        ("Expected calibration error\u00a0↓", f"{reward['ece']:.4f}"),
    ]
    return table([], rows)


def phases(seconds: dict[str, float], commands: dict[str, str]) -> str:
    rows = [
        (
            f"<b>{escape(name)}</b>" if name == "total" else escape(name),
            f"{value:,.1f}",
            f"<code>{escape(commands.get(name, ''))}</code>",
        )
        for name, value in seconds.items()
    ]
    return table(["Phase", "Seconds", "Command"], rows, kind="phases")


def machine(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    return f"{escape(versions)}; {report['cores']} CPU cores; seed {report['seed']}"


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Preference matching: the quickstart's report</title>
<style>$style</style>
</head>
<body><main>
<h1>Does an aligned policy answer as people prefer?</h1>
<p class="lead">For every question of a synthetic population, the bars show how often each answer
is preferred by the population and by the reward model that was trained on its choices, and how
often it is given by the SFT model, by KL-regularized RLHF and by conditional preference
matching.</p>
<p>Total variation to the reward model's preferences, on held-out phrasings of the questions
(0 is a perfect match, 1 the largest distance):</p>
<div class="tiles">$tiles</div>

<section>
<h2>Who gives which answer</h2>
<p class="muted">Means over each topic's held-out prompts, conditional on the answers shown. The
texts that SFT learned from were written by people whose preferences differ from the
population's.</p>
<div class="scroll"><div class="wide">$shares</div></div>
</section>

<section>
<h2>All runs, all metrics</h2>
<p class="muted">Means over held-out prompts with 95 % confidence intervals; ↓ means that lower is
better, the other columns only describe.</p>
$metrics
<dl>$meanings</dl>
</section>

<section>
<h2>The paper's Table 1, as measured</h2>
<p class="muted">$thresholds</p>
$table1
<h3>Two sampled responses of each run to the same prompts</h3>
<p class="muted">$pm_note</p>
$samples
</section>

<section>
<h2>The reward model</h2>
<p class="muted">Preference matching reproduces the reward model's probabilities, so they must be
right: a calibrated model is on the diagonal. The excess is its log-loss above that of the
population's true preferences, which no model beats on average.</p>
<div class="pair"><div>$reward</div><div>$reliability</div></div>
</section>

<section>
<h2>What theory predicts</h2>
<p class="muted">Two responses, drawn from the exact optima: a policy that matches preferences is on
the diagonal. Left, Figure 2 of the paper: KL inherits the bias of its reference. Right, Figure 9:
even an unbiased reference is distorted by a coefficient other than 1. Below, the counterpart of
Figure 2 for f-divergences.</p>
<div class="pair">$figure2 $figure9</div>
<div class="scroll"><div class="wide" style="margin-top:24px">$f_divergences</div></div>
</section>

<section>
<h2>How it was run</h2>
$phases
<p class="muted" style="margin-top:16px">$machine</p>
</section>
</main></body>
</html>
""")
