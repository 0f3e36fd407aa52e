"""Stage 1: fine-tune a causal language model on the responses of the data's first part.

    bash scripts/step1_sft.sh CONFIG.json [key.path=value ...]

Writes `model/` (AutoModelForCausalLM, tokenizer included), `metrics.jsonl` and `config.json`.
"""

import math

import torch
from datasets import Dataset

from step1_sft.config import SFTConfig
from training import fitting
from training.cli import prepare_output, run_stage
from training.data import SequenceBatch, collate_texts, read_records, tokenize
from training.dry_run import Plan, plan_steps
from training.memory import activations, logits
from training.models.export import export
from training.models.loading import load_policy
from training.models.pretrained import check_positions
from training.models.tokenizers import load_tokenizer
from training.runtime import engine, ranks
from training.runtime.checkpoint import check_resumable
from training.runtime.signals import requests
from training.runtime.tracking import say


class ResponseModelling:
    """Cross-entropy of the response's tokens, EOS included, in nats per token."""

    def __init__(
        self,
        trained: engine.TrainedModule,
        train: Dataset,
        held_out: Dataset,
        config: SFTConfig,
        pad_token_id: int,
    ) -> None:
        self.policy = trained
        self.train = train
        self.held_out = held_out
        self.eval_batch_size = config.per_device_eval_batch_size
        self.pad_token_id = pad_token_id

    def collate(self, rows: list[int], training: bool) -> SequenceBatch:
        data = self.train if training else self.held_out
        return collate_texts(data, rows, self.pad_token_id).to(ranks.device())

    def items(self, batch: SequenceBatch) -> int:
        return int(batch.response_mask.sum())

    def loss_sum(self, batch: SequenceBatch) -> torch.Tensor:
        logp, _ = self.policy(batch.input_ids, batch.attention_mask, batch.response_mask)
        return -logp.sum()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        total, tokens = 0.0, 0
        for rows in fitting.evaluation_batches(len(self.held_out), self.eval_batch_size):
            batch = self.collate(rows, training=False)
            total += self.loss_sum(batch).item()
            tokens += self.items(batch)
        loss = fitting.mean_over_ranks(total, tokens)
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}


def main(config: SFTConfig) -> None:
    check_resumable(config)
    records = read_records(config.data, "sft")
    fitting.require_evaluation(records)
    say(str(records.report))
    tokenizer = load_tokenizer(config.model_name_or_path, config.trust_remote_code)
    check_positions(config.model_name_or_path, config.data.lengths(), config.trust_remote_code)
    with ranks.rank_zero_first():
        data = tokenize(records, tokenizer, config.data, "sft")
    say(str(data.report))

    policy = load_policy(
        config.model_name_or_path,
        tokenizer,
        engine.precision(config),
        dropout=True,
        gradient_checkpointing=config.gradient_checkpointing,
        packing=config.packing,
        lora=config.lora,
        trust_remote_code=config.trust_remote_code,
    )
    steps = fitting.total_steps(config, len(data.train))
    trained = engine.TrainedModule(policy, config, config, steps)
    task = ResponseModelling(trained, data.train, data.eval, config, tokenizer.pad_token_id)
    output = prepare_output(config)
    with requests.deferred():
        final = fitting.fit(
            config, trained, task, len(data.train), fitting.EarlyStopping(), description="SFT"
        )
        export(policy.model, tokenizer, output / "model")
    say(
        f"SFT is done: evaluation loss {final['eval/loss']:.4f} nats per token, perplexity "
        f"{final['eval/perplexity']:.3f}\n  model:   {output / 'model'}\n"
        f"  metrics: {output / 'metrics.jsonl'}"
    )


def plan(config: SFTConfig, planned: Plan) -> None:
    """What a run would do and need."""
    data = config.data
    check_positions(config.model_name_or_path, data.lengths(), config.trust_remote_code)
    shape = planned.shape(config.model_name_or_path, scalar=False, lora=True)
    planned.add_trained("policy", shape)
    plan_steps(config, planned, "sft", sequences=1)
    rows = config.per_device_train_batch_size
    tokens = rows * data.longest
    kept = activations(
        shape, tokens, engine.precision(config), config.gradient_checkpointing, dropout=True
    )
    planned.phases["training"] = {
        "activations": kept,
        "logits": logits(shape, rows * data.max_response_length),
    }


if __name__ == "__main__":
    run_stage(SFTConfig, main, plan=plan)
