"""Stage 2: train a reward model on comparisons or rankings.

    bash scripts/step2_reward.sh CONFIG.json [key.path=value ...]

Writes `model/` (AutoModelForSequenceClassification with one label, tokenizer included),
`metrics.jsonl`, `evaluation.json` (accuracy, log-loss, calibration) and `config.json`.
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import nn

from step2_reward.btl_fit import LackOfFit, count_wins, lack_of_fit
from step2_reward.calibration import calibration_figures, draw_reliability
from step2_reward.config import RewardConfig
from step2_reward.losses import davidson_luce_loss, plackett_luce_loss
from step2_reward.ties import WithTies, first_prevalences, require_decided
from training import fitting
from training.cli import prepare_output, run_stage
from training.data import GroupedBatch, Split, collate_groups, response_end
from training.dry_run import DryRun, supervised_steps
from training.memory import activations
from training.models.checks import check_positions
from training.models.export import InterimExports, export
from training.models.loading import load_scalar_model
from training.models.options import LoadOptions, precision
from training.models.pretrained import LINK, RESPONSE_END
from training.models.scalar import last_token
from training.preferences.links import LOG_LINKS, LinkName
from training.runtime import ranks
from training.runtime.disk import recover
from training.runtime.engine import TrainedModule
from training.runtime.json_text import json_text
from training.runtime.model_card import PAPER, Card, figures_of, supervised_training, write_card
from training.runtime.signals import stop_requests
from training.runtime.tracking import say
from training.statistics import numbered

FIGURES = ("accuracy", "accuracy_ci95", "log_loss", "log_loss_ci95", "ece")
"""The calibration figures that metrics.jsonl records too."""


class EvaluationSizes(Protocol):
    """The settings that an evaluation needs."""

    @property
    def per_device_eval_batch_size(self) -> int: ...

    @property
    def calibration_bins(self) -> int: ...

    @property
    def link(self) -> LinkName: ...


class PreferenceModelling:
    """Learns rewards by the negative log-likelihood of the choices, in nats per comparison."""

    def __init__(
        self,
        trained: TrainedModule | nn.Module,
        train: Dataset,
        held_out: dict[Split, Dataset],
        config: EvaluationSizes,
        pad_token_id: int,
    ) -> None:
        self.model = trained
        self.train = train
        self.held_out = held_out
        self.config = config
        self.pad_token_id = pad_token_id
        self.log_link = LOG_LINKS[config.link]
        self.calibration: dict[str, Any] = {}
        """The calibration figures of the last evaluation …"""
        self.pairs = torch.empty(0, 2)
        """… the rewards [pairs, 2] of the better and the worse response that they are of …"""
        self.clusters = torch.empty(0, dtype=torch.long)
        """… and the group of each."""

    def collate(self, rows: list[int]) -> GroupedBatch:
        return self._batch(self.train, rows)

    def _batch(self, data: Dataset, rows: list[int]) -> GroupedBatch:
        return collate_groups(data, rows, self.pad_token_id).to(ranks.device())

    def items(self, batch: GroupedBatch) -> int:
        return int(batch.group_mask.sum())

    def loss_sum(self, batch: GroupedBatch) -> torch.Tensor:
        return self._losses(self._ranked(batch)).sum()

    @torch.no_grad()
    def evaluate(self, split: Split) -> dict[str, float]:
        data = self.held_out[split]
        clusters = numbered(data["group"][:]).tolist()
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device())
        pairs: list[tuple[float, float, int]] = []
        batch_size = self.config.per_device_eval_batch_size
        for rows in fitting.evaluation_batches(len(data), batch_size):
            batch = self._batch(data, rows)
            ranked = self._ranked(batch)
            loss_sum = self._losses(ranked).sum()
            sums += torch.stack([loss_sum.double(), batch.group_mask.sum()])
            pairs += [
                (better, worse, clusters[rows[group]])
                for better, worse, group in implied_pairs(ranked)
            ]
        loss = fitting.mean_over_ranks(sums)
        better, worse, groups = zip(*ranks.gather_objects(pairs), strict=True)
        self.pairs = torch.tensor([better, worse], dtype=torch.float64).T
        self.clusters = torch.tensor(groups)
        self.calibration = {
            "split": split,
            "link": self.config.link,
            "tie_prevalence": ranked.log_ties.exp().tolist(),
        } | calibration_figures(
            log_odds(self.pairs, self.config.link), self.clusters, self.config.calibration_bins
        )
        figures = {
            name: self.calibration[name] for name in FIGURES if self.calibration[name] is not None
        }
        return {f"{split}/{name}": value for name, value in {"loss": loss, **figures}.items()}

    def _ranked(self, batch: GroupedBatch) -> "Ranked":
        """Rewards of the model, arranged by group."""
        sequences = batch.sequences
        found = self.model(sequences.input_ids, sequences.attention_mask)
        values, log_ties = found if isinstance(found, tuple) else (found, found.new_zeros(0))
        rewards, present = by_group(last_token(values, sequences.attention_mask), batch)
        unranked = batch.unranked.to(rewards.device, non_blocking=True)
        columns = torch.arange(rewards.shape[1], device=rewards.device)
        ranked = columns < (batch.group_sizes - unranked)[:, None]
        partial = bool(batch.unranked.any())
        return Ranked(rewards, present, batch.levels, ranked, partial, batch.largest_tie, log_ties)

    def _losses(self, of: "Ranked") -> torch.Tensor:
        """[groups] losses in nats; 0 for filler."""
        scores = self.log_link(of.rewards)
        if not of.partial and int(of.largest_tie.max()) == 1:
            losses = plackett_luce_loss(scores, of.present)
            # All ranks average the gradient of δ, also those whose batch cannot have ties.
            return losses + 0.0 * of.log_ties.sum() if len(of.log_ties) else losses
        # Held-out ties may be larger than any in training; those have δ_n = 1.
        unknown = int(of.largest_tie.max()) - 1 - len(of.log_ties)
        log_ties = torch.cat([of.log_ties, of.log_ties.new_zeros(max(unknown, 0))])
        order = of.largest_tie.to(scores.device, non_blocking=True)
        return davidson_luce_loss(scores, of.levels, of.ranked, of.present, log_ties, order)


@dataclass(frozen=True)
class Ranked:
    """The rewards of a batch: G groups of up to K responses, best first."""

    rewards: torch.Tensor  # [G, K]
    present: torch.Tensor  # [G, K] bool: where there is a response; nowhere in filler
    levels: torch.Tensor  # [G, K] long: the same number for tied responses
    ranked: torch.Tensor  # [G, K] bool: False for those behind the others in unknown order
    partial: bool  # whether there are any of unknown order
    largest_tie: torch.Tensor  # [G] long, on the host: the most responses that could be tied
    log_ties: torch.Tensor  # [D − 1] log δ_n of the Davidson–Luce model; empty without ties


def by_group(rewards: torch.Tensor, batch: GroupedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Arrange rewards [rows] as [groups, responses], and say where there are any.

    Entries of filler groups are not present.
    """
    sizes = batch.group_sizes
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(rewards), device=rewards.device) - starts[batch.group_index]
    grid = rewards.new_zeros(len(sizes), int(sizes.max()))
    grid = grid.index_put((batch.group_index, place), rewards)
    columns = torch.arange(grid.shape[1], device=rewards.device)
    return grid, (columns < sizes[:, None]) & batch.group_mask[:, None]


def implied_pairs(of: Ranked) -> list[tuple[float, float, int]]:
    """r(better), r(worse) and the group of every pair that the rankings decide."""
    parts = (of.rewards, of.levels, of.present & of.ranked, of.present)
    # One copy to the host: a GPU waits for each.
    rewards, levels, ranked, present = torch.stack([part.double() for part in parts]).cpu()
    better, worse = torch.triu_indices(present.shape[1], present.shape[1], offset=1)
    decided = (ranked[:, better] > 0) & (present[:, worse] > 0)
    decided &= levels[:, better] != levels[:, worse]
    pairs = (rewards[:, better][decided], rewards[:, worse][decided])
    columns = (*pairs, decided.nonzero()[:, 0])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def log_odds(pairs: torch.Tensor, link: LinkName) -> torch.Tensor:
    """[pairs] log g(r_w) − log g(r_l), the log-odds of choices (§3.4), of rewards [pairs, 2]."""
    chosen, rejected = LOG_LINKS[link](pairs).unbind(-1)
    return chosen - rejected


def fit_of_one_model(held_out: Iterable[Dataset], link: LinkName = "exponential") -> LackOfFit:
    """Whether one reward for each response can explain the held-out comparisons of two responses.

    This is a question to the data, which no model has to be trained for. Rankings take no part: the
    pairs that they imply are not independent. Nor do ties.
    """
    rows = [row for data in held_out for row in data]
    pairs = [
        (row["prompt"], *row["responses_ids"])
        for row in rows
        if len(row["responses_ids"]) == 2 and row["levels"][0] != row["levels"][1]
    ]
    return lack_of_fit(count_wins(pairs), link)


def main(config: RewardConfig) -> None:
    """Run the stage."""
    pretrained, data = fitting.prepare(config, "reward")
    require_decided(data.held_out)
    tokenizer = pretrained.tokenizer
    model = load_scalar_model(pretrained, tokenizer, LoadOptions.trained(config), new_head=True)
    steps = fitting.total_steps(config, len(data.train))
    start = first_prevalences(data.train)
    module = WithTies(model, start, config.learning_rate) if len(start) else model
    trained = TrainedModule(module, config, config, steps)
    task = PreferenceModelling(trained, data.train, data.held_out, config, tokenizer.pad_token_id)
    output = prepare_output(config)
    if ranks.rank() == 0:
        recover(output / "model")
    stopping = fitting.EarlyStopping(config.early_stopping_patience)

    # Stage 3 takes the rewards under the same link, and ends this model's responses with the same
    # token, whatever ended the policy's.
    end = response_end(tokenizer)
    name = "eos" if end == tokenizer.eos_token_id else tokenizer.convert_ids_to_tokens(end)
    model.model.config.update({RESPONSE_END: name, LINK: config.link})

    fit = fit_of_one_model(data.held_out.values(), config.link)
    say(fit.meaning)

    def save_best() -> None:
        write(output / "model")
        if ranks.rank() == 0:
            write_evaluation(task.calibration | {"btl_fit": report_of(fit)}, output)

    def write(place: Path) -> None:
        export(model.model, tokenizer, place)

    exports = InterimExports(config, {"model": write}, card_of(config, {}))
    with stop_requests.deferred():
        tested = fitting.fit(
            config, trained, task, stopping, save_best, "reward model", exports=exports
        )
        write_card(output / "model", card_of(config, tested))
    say(
        f"The reward model is done: on the test prompts, {summary(tested)}\n"
        f"  model:       {output / 'model'}\n"
        f"  calibration: {output / 'evaluation.json'}\n"
        f"  metrics:     {output / 'metrics.jsonl'}"
    )


def card_of(config: RewardConfig, tested: dict[str, float]) -> Card:
    """What the model's card says."""
    names = ["test/accuracy", "test/log_loss", "test/ece"]
    generalized = f", generalized by the link {config.link}"
    return Card(
        title=Path(config.output_dir).name,
        summary="A reward model that learned people's comparisons or rankings "
        "(Bradley–Terry–Luce, Plackett–Luce"
        f"{'' if config.link == 'exponential' else generalized}), the second stage of "
        f"[preference-matching RLHF]({PAPER}). Its single label is the reward of a dialogue's last "
        "response.",
        task="text-classification",
        base_model=config.model_name_or_path,
        training=supervised_training(config),
        evaluated_on="On held-out comparisons by which nothing was chosen; log-loss in nats:",
        figures=figures_of(tested, names),
    )


def summary(metrics: dict[str, float]) -> str:
    """The headline figures of an evaluation, with their 95 % confidence intervals, if known."""

    def figure(name: str, digits: int) -> str:
        value, interval = metrics[f"test/{name}"], metrics.get(f"test/{name}_ci95")
        either_side = "" if interval is None else f" ± {interval:.{digits}f}"
        return f"{value:.{digits}f}{either_side}"

    return (
        f"accuracy {figure('accuracy', 3)}, log-loss {figure('log_loss', 4)} nats, expected "
        f"calibration error {figure('ece', 3)}"
    )


def report_of(fit: LackOfFit) -> dict[str, Any]:
    """The part of `evaluation.json` on the fit of one reward model."""
    return {**asdict(fit), "meaning": fit.meaning}


def write_evaluation(calibration: dict[str, Any], output: Path) -> None:
    """Write `evaluation.json` and, if matplotlib is installed, `reliability.png`."""
    (output / "evaluation.json").write_text(json_text(calibration))
    if importlib.util.find_spec("matplotlib"):
        draw_reliability(calibration, output / "reliability.png")


def dry_run(config: RewardConfig, run: DryRun) -> None:
    """Add what a run would do and need to `run`, for comparisons of two responses."""
    data = config.data
    run.facts["link"] = config.link
    model = run.pretrained(config.model_name_or_path)
    check_positions(model, data.lengths())
    shape = run.scalar_shape(model, lora=True)
    run.add_trained("reward model", shape)
    supervised_steps(config, run, "reward", 2, model.tokenizer)
    tokens = 2 * config.per_device_train_batch_size * data.longest
    kept = activations(shape, tokens, precision(config), config.gradient_checkpointing)
    run.phases["training"] = {"activations": kept}


if __name__ == "__main__":
    run_stage(RewardConfig, main, dry_run=dry_run)
