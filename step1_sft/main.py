"""Stage 1: supervised fine-tuning (SFT) of a causal language model on responses.

    bash scripts/step1_sft.sh CONFIG.json [key.path=value ...]

Writes `model/` (AutoModelForCausalLM, tokenizer included), `metrics.jsonl` and `config.json`.
"""

import math
from pathlib import Path

import torch
from datasets import Dataset

from step1_sft.config import SFTConfig
from training import fitting
from training.cli import prepare_output, run_stage
from training.data import SequenceBatch, Split, collate_texts
from training.dry_run import DryRun, supervised_steps
from training.memory import activations, logits
from training.models.checks import check_positions
from training.models.export import InterimExports, export
from training.models.loading import load_policy
from training.models.options import LoadOptions, precision
from training.runtime import ranks
from training.runtime.engine import TrainedModule
from training.runtime.model_card import PAPER, Card, figures_of, supervised_training, write_card
from training.runtime.signals import stop_requests
from training.runtime.tracking import say


class ResponseModelling:
    """Learns responses by the cross-entropy of their tokens, EOS included, in nats per token."""

    def __init__(
        self,
        trained: TrainedModule,
        train: Dataset,
        held_out: dict[Split, Dataset],
        config: SFTConfig,
        pad_token_id: int,
    ) -> None:
        self.policy = trained
        self.train = train
        self.held_out = held_out
        self.eval_batch_size = config.per_device_eval_batch_size
        self.pad_token_id = pad_token_id

    def collate(self, rows: list[int]) -> SequenceBatch:
        return self._batch(self.train, rows)

    def _batch(self, data: Dataset, rows: list[int]) -> SequenceBatch:
        return collate_texts(data, rows, self.pad_token_id).to(ranks.device())

    def items(self, batch: SequenceBatch) -> int:
        return int(batch.response_mask.sum())

    def loss_sum(self, batch: SequenceBatch) -> torch.Tensor:
        logp, _ = self.policy(batch.input_ids, batch.attention_mask, batch.response_mask)
        return -logp.sum()

    @torch.no_grad()
    def evaluate(self, split: Split) -> dict[str, float]:
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device())
        data = self.held_out[split]
        for rows in fitting.evaluation_batches(len(data), self.eval_batch_size):
            batch = self._batch(data, rows)
            sums += torch.stack([self.loss_sum(batch).double(), batch.response_mask.sum()])
        loss = fitting.mean_over_ranks(sums)
        return {f"{split}/loss": loss, f"{split}/perplexity": math.exp(min(loss, 700.0))}


def main(config: SFTConfig) -> None:
    """Run the stage."""
    pretrained, data = fitting.prepare(config, "sft")
    tokenizer = pretrained.tokenizer
    policy = load_policy(pretrained, tokenizer, LoadOptions.trained(config, dropout=True))
    steps = fitting.total_steps(config, len(data.train))
    trained = TrainedModule(policy, config, config, steps)
    task = ResponseModelling(trained, data.train, data.held_out, config, tokenizer.pad_token_id)
    output = prepare_output(config)

    def write(place: Path) -> None:
        export(policy.model, tokenizer, place)

    exports = InterimExports(config, {"model": write}, card_of(config, {}))
    with stop_requests.deferred():
        tested = fitting.fit(
            config, trained, task, fitting.EarlyStopping(), description="SFT", exports=exports
        )
        write(output / "model")
        write_card(output / "model", card_of(config, tested))
    say(
        f"SFT is done: test loss {tested['test/loss']:.4f} nats per token, perplexity "
        f"{tested['test/perplexity']:.3f}\n  model:   {output / 'model'}\n"
        f"  metrics: {output / 'metrics.jsonl'}"
    )


def card_of(config: SFTConfig, tested: dict[str, float]) -> Card:
    """What the model's card says."""
    return Card(
        title=Path(config.output_dir).name,
        summary="A language model that learned responses by supervised fine-tuning (SFT), the "
        f"first stage of [preference-matching RLHF]({PAPER}).",
        task="text-generation",
        base_model=config.model_name_or_path,
        training=supervised_training(config),
        evaluated_on="On held-out texts by which nothing was chosen, in nats per token:",
        figures=figures_of(tested, ["test/loss", "test/perplexity"]),
    )


def dry_run(config: SFTConfig, run: DryRun) -> None:
    """Add what a run would do and need to `run`."""
    data = config.data
    policy = run.pretrained(config.model_name_or_path)
    check_positions(policy, data.lengths())
    shape = run.policy_shape(policy, lora=True)
    run.add_trained("policy", shape)
    supervised_steps(config, run, "sft", 1, policy.tokenizer)
    rows = config.per_device_train_batch_size
    tokens = rows * data.longest
    kept = activations(
        shape, tokens, precision(config), config.gradient_checkpointing, dropout=True
    )
    run.phases["training"] = {
        "activations": kept,
        "logits": logits(
            shape,
            rows * data.max_response_length,
            precision(config),
            kept=not config.gradient_checkpointing,
        ),
    }


if __name__ == "__main__":
    run_stage(SFTConfig, main, dry_run=dry_run)
