"""Direct optimization: align the policy with comparisons under a regularizer, without a reward.

    bash scripts/step3_direct.sh CONFIG.json [key.path=value ...]

Writes into output_dir: `actor/` (a Hugging Face directory, tokenizer included), `evaluation.json`,
`instances.jsonl`, `metrics.jsonl`, `config.json` and `reference_logps.safetensors`.
"""

import gc
import json
from pathlib import Path

from step3_rlhf.config import EvaluationConfig
from step3_rlhf.direct import reference
from step3_rlhf.direct.comparisons import Comparisons, without_ties
from step3_rlhf.direct.config import DirectConfig
from step3_rlhf.direct.dry_run import dry_run
from step3_rlhf.direct.task import DirectOptimization
from step3_rlhf.evaluation.card import policy_card
from step3_rlhf.evaluation.run import read_held_out
from step3_rlhf.evaluation.run import run as evaluate
from step3_rlhf.evaluation.settings import settings_of_run
from step3_rlhf.roles import roles_of
from training import fitting
from training.cli import prepare_output, run_stage
from training.models.export import InterimExports, export
from training.models.loading import load_policy
from training.models.options import LoadOptions
from training.runtime import ranks
from training.runtime.disk import recover
from training.runtime.engine import TrainedModule
from training.runtime.model_card import write_card
from training.runtime.signals import stop_requests
from training.runtime.tracking import say

ALGORITHM = "direct optimization of comparisons"


def main(config: DirectConfig) -> None:
    tested = train(config)
    gc.collect()  # engine and optimizer make room for the evaluation
    output = Path(config.output_dir)
    say(f"Evaluating; if this is stopped, `bash scripts/evaluate.sh {output}` resumes it")
    evaluate(settings_of_run(str(output)))
    figures = json.loads((output / "evaluation.json").read_text())
    write_card(output / "actor", policy_card(config, config.regularizer, ALGORITHM, figures))
    say(
        f"Direct optimization with {config.regularizer.name} is done: on the test comparisons, "
        f"loss {tested['test/loss']:.4f} nats, accuracy {tested['test/rewards/accuracies']:.3f}, "
        f"mass of the compared responses {tested['test/compared/mass']:.4f}\n"
        f"  actor:      {output / 'actor'}\n  evaluation: {output / 'evaluation.json'}\n"
        f"  metrics:    {output / 'metrics.jsonl'}"
    )


def train(config: DirectConfig) -> dict[str, float]:
    """Train, and export the weights with the best validation loss as `actor/`.

    Returns:
        Their test figures.
    """
    pretrained, data = fitting.prepare(config, "reward")
    evaluation = EvaluationConfig.of(config)
    read_held_out(evaluation, roles_of(evaluation))  # whatever is wrong with it is said now
    roles, tokenizer = roles_of(config), pretrained.tokenizer
    train_data = without_ties(data.train)
    comparisons = {"train": Comparisons(train_data)}
    comparisons |= {
        split: Comparisons(without_ties(content)) for split, content in data.held_out.items()
    }
    say(what_is_identified(config, comparisons["train"]))
    ref_logps = reference.reference_logps(config, roles, comparisons)
    policy = load_policy(pretrained, tokenizer, LoadOptions.trained(config))
    trained = TrainedModule(policy, config, config, fitting.total_steps(config, len(train_data)))
    task = DirectOptimization(
        trained, train_data, comparisons, ref_logps, config, tokenizer.pad_token_id
    )
    output = prepare_output(config)
    reference.keep(ref_logps, config, roles.reference, comparisons)
    if ranks.rank() == 0:
        recover(output / "actor")

    def write(place: Path) -> None:
        export(policy.model, tokenizer, place)

    def save_best() -> None:
        write(output / "actor")

    card = policy_card(config, config.regularizer, ALGORITHM)
    exports = InterimExports(config, {"actor": write}, card)

    stopping = fitting.EarlyStopping(config.early_stopping_patience)
    name = f"direct, {config.regularizer.name}"
    with stop_requests.deferred():
        return fitting.fit(config, trained, task, stopping, save_best, name, task.figures, exports)


def what_is_identified(config: DirectConfig, train: Comparisons) -> str:
    """What these comparisons determine about the policy, and what they leave free."""
    sets, divided = len(train.sets), train.divided_sets
    responses = sum(len(found.responses) for found in train.sets)
    apart = (
        f" For {divided} prompts these fall into parts that no comparison connects; the ratio "
        "between the parts is free."
        if divided
        else ""
    )
    mass = (
        f"The anchor (weight {config.anchor.weight:g}) draws mass from all other responses to the "
        "compared ones; how much each gets stays with the comparisons"
        if config.anchor
        else "The mass on all other responses is free, and training may move it anywhere: watch "
        'validation/compared/mass, and set "anchor": {"weight": …} to keep it up'
    )
    return (
        f"{len(train.rows):,} comparisons of {responses:,} responses to {sets:,} prompts determine "
        f"the ratios of π(y|x) among the compared responses of a prompt, and nothing else.{apart} "
        f"{mass}"
    )


if __name__ == "__main__":
    run_stage(DirectConfig, main, dry_run=dry_run)
