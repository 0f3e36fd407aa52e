"""A policy draws and scores only ids that the tokenizer has, and both as one distribution.

Seen elsewhere: verl #1398 and NeMo-RL #237 (Qwen2.5's embedding is padded beyond its tokenizer, and
training moves probability there), vLLM #13175 (a hard mask is needed, sampling settings do not do),
verl #7882 (masked in drawing, not in scoring).
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from step3_rlhf import main as ppo
from step3_rlhf.config import PPOConfig, SamplingSettings
from step3_rlhf.rollout import encode_prompt_texts, sample
from training.config import check_config
from training.models.export import export
from training.models.families.vocabulary import absent_ids, ids_needed
from training.models.loading import load_policy, load_reward_model, load_scalar_model
from training.models.options import LoadOptions
from training.models.policy import Policy
from training.models.pretrained import Pretrained

EXTRA = 128


def config(tokenizer: PreTrainedTokenizerBase, size: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )


def padded_policy(directory: Path, tokenizer: PreTrainedTokenizerBase, wanted: bool) -> str:
    """A model whose embedding is larger than the tokenizer.

    Args:
        wanted: almost all probability is on ids that do not exist.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(tokenizer, ids_needed(tokenizer) + EXTRA))
    if wanted:
        with torch.no_grad():
            model.lm_head.weight.mul_(20)  # some tokens are likelier than others
            model.lm_head.weight[ids_needed(tokenizer) :].mul_(3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def with_holes() -> PreTrainedTokenizerBase:
    """Ids 5, 7 and 8 are no token's; the largest is 10, of 8 tokens and a pad token."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "yes": 4, "no": 6, "maybe": 9, "so": 10}
    backend = Tokenizer(WordLevel(words, "<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def test_which_ids_exist(world_tokenizer: PreTrainedTokenizerBase) -> None:
    n = len(world_tokenizer)
    assert absent_ids(world_tokenizer, n) is None
    absent = absent_ids(world_tokenizer, n + EXTRA)
    assert absent is not None
    assert absent.nonzero().flatten().tolist() == list(range(n, n + EXTRA))
    holes = with_holes()
    assert (len(holes), ids_needed(holes)) == (8, 11)
    absent = absent_ids(holes, 12)
    assert absent is not None
    assert absent.nonzero().flatten().tolist() == [5, 7, 8, 11]


class Alike(PreTrainedTokenizerFast):
    """Several ids are spelt alike, as in tokenizers that show bytes: `get_vocab` knows one."""

    def get_vocab(self) -> dict[str, int]:
        return {word: i for word, i in super().get_vocab().items() if word != "no"}


def test_an_id_that_is_spelt_as_another_exists() -> None:
    tokenizer = with_holes()
    alike = Alike(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    absent = absent_ids(alike, 11)
    assert absent is not None
    assert absent.nonzero().flatten().tolist() == [5, 7, 8]


@torch.no_grad()
def test_scores_are_over_existing_ids(
    world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = padded_policy(tmp_path, world_tokenizer, wanted=True)
    policy = load_policy(Pretrained(path), world_tokenizer).eval()
    n = len(world_tokenizer)
    assert f"{EXTRA} of its {n + EXTRA} token ids have no token" in capsys.readouterr().out
    ids = torch.tensor([[1, 20, 30, 40, 50, 2]])
    scored = torch.tensor([[False, True, True, True, True, True]])
    logp, entropy = policy(ids, torch.ones_like(ids), scored, with_entropy=True)
    raw = AutoModelForCausalLM.from_pretrained(path)(input_ids=ids).logits[0, :-1].double()
    own = raw[:, :n].log_softmax(-1)
    expected = own.gather(1, ids[0, 1:, None]).squeeze(1)
    torch.testing.assert_close(logp[0, 1:].double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        entropy[0, 1:].double(), -(own.exp() * own).sum(-1), rtol=0, atol=1e-5
    )
    over_all = raw.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    assert (over_all - expected).abs().min() > 0.5  # what would be wrong


def test_gradients_of_absent_ids_are_zero(
    world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = padded_policy(tmp_path, world_tokenizer, wanted=True)
    policy = load_policy(Pretrained(path), world_tokenizer).train()
    ids = torch.tensor([[1, 20, 30, 2]])
    scored = torch.tensor([[False, True, True, True]])
    logp, entropy = policy(ids, torch.ones_like(ids), scored, with_entropy=True)
    (logp.sum() + entropy.sum()).backward()
    gradient = policy.model.lm_head.weight.grad
    assert gradient.isfinite().all()
    assert gradient[: len(world_tokenizer)].abs().max() > 0
    assert (gradient[len(world_tokenizer) :] == 0).all()


@pytest.mark.parametrize("holes", [False, True])
def test_draws_are_from_what_is_scored(
    world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, holes: bool
) -> None:
    """First tokens of many draws, in proportion to the policy's own probabilities."""
    tokenizer = with_holes() if holes else world_tokenizer
    path = padded_policy(tmp_path, tokenizer, wanted=True)
    policy = load_policy(Pretrained(path), tokenizer).eval()
    n, prompt = 3000, [1, 4, 6]
    rollout = sample(
        policy, tokenizer, [prompt] * n, [""] * n, [(3, k) for k in range(n)],
        SamplingSettings(response_length=1, rollout_batch_size=n),
    )  # fmt: skip
    drawn = rollout.input_ids[:, -1]
    known = set(tokenizer.get_vocab().values())
    assert set(drawn.tolist()) <= known
    every = torch.tensor(sorted(known))
    rows = torch.cat([torch.tensor([prompt]).expand(len(every), -1), every[:, None]], dim=1)
    scored = torch.zeros_like(rows, dtype=torch.bool)
    scored[:, -1] = True
    with torch.no_grad():
        logp, _ = policy(rows, torch.ones_like(rows), scored)
    probabilities = logp[:, -1].double().exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    counts = drawn.bincount(minlength=int(every.max()) + 1)[every].double()
    expected = n * probabilities
    often = expected >= 5
    cells = ((counts - expected) ** 2 / expected)[often]
    rest = ((counts[~often].sum() - expected[~often].sum()) ** 2).item()
    statistic = cells.sum().item() + rest / max(1.0, expected[~often].sum().item())
    assert statistic / int(often.sum()) < 2.0  # mean 1 per degree of freedom


def test_narrow_sampling_settings_keep_to_existing_ids(
    world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Filters see the masked scores: the most likely token is the most likely one that exists."""
    policy = load_policy(
        Pretrained(padded_policy(tmp_path, world_tokenizer, wanted=True)), world_tokenizer
    ).eval()
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        rollout = sample(
            policy, world_tokenizer, [[1, 20]], [""], [(0,)],
            SamplingSettings(response_length=4, **narrow),
        )  # fmt: skip
        assert int(rollout.input_ids.max()) < len(world_tokenizer)


def test_nothing_changes_where_every_id_exists(tiny_world: Path, world_tokenizer) -> None:
    policy = load_policy(Pretrained(str(tiny_world / "base")), world_tokenizer).eval()
    assert policy.absent is None
    assert policy.state_dict().keys() == Policy(policy.model).state_dict().keys()


def test_ids_that_do_not_exist_travel_with_the_policy_but_not_into_its_weights(
    world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = padded_policy(tmp_path / "m", world_tokenizer, wanted=False)
    policy = load_policy(Pretrained(path), world_tokenizer)
    assert "absent" not in policy.state_dict()
    assert copy.deepcopy(policy).absent is not None
    export(policy.model, world_tokenizer, tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert again.config.vocab_size == len(world_tokenizer) + EXTRA


@pytest.mark.parametrize("padded", ["policy", "reference"])
def test_a_reference_of_another_size_knows_every_id(tmp_path: Path, padded: str) -> None:
    """Of two models with one tokenizer that leaves ids out, either may have rows to spare."""
    tokenizer = with_holes()
    paths = {}
    for role in ("policy", "reference"):
        size = ids_needed(tokenizer) + EXTRA if role == padded else len(tokenizer)
        torch.manual_seed(1)
        LlamaForCausalLM(config(tokenizer, size)).save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
        paths[role] = str(tmp_path / role)
    ids = torch.tensor([[1, 10, 9, 10, 2]])
    scored = torch.tensor([[False, True, True, True, True]])
    for role in paths:
        policy = load_policy(Pretrained(paths[role]), tokenizer).eval()
        assert policy.model.get_input_embeddings().num_embeddings >= ids_needed(tokenizer) == 11
        with torch.no_grad():
            logp, _ = policy(ids, torch.ones_like(ids), scored)
        assert (logp[scored] > -20).all()


@torch.no_grad()
def test_reward_model_and_critic_have_a_row_for_every_id(tmp_path: Path) -> None:
    """A tokenizer that leaves ids out has larger ids than it has tokens."""
    tokenizer = with_holes()
    torch.manual_seed(1)
    small = config(tokenizer, len(tokenizer), num_labels=1)
    LlamaForSequenceClassification(small).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 10, 9, 2]])
    reward = load_reward_model(Pretrained(str(tmp_path)), LoadOptions())
    critic = load_scalar_model(Pretrained(str(tmp_path)), tokenizer)
    assert torch.equal(reward(ids, torch.ones_like(ids)), critic(ids, torch.ones_like(ids)))


def test_a_run_whose_policy_is_padded_beyond_its_tokenizer(
    process_group: None, stage_settings, tiny_world: Path, world_tokenizer, tmp_path: Path
) -> None:
    """Seen as an IndexError of the reward model in the first iteration, under `pm`."""
    policy = padded_policy(tmp_path / "policy", world_tokenizer, wanted=True)
    torch.manual_seed(0)
    reward = LlamaForSequenceClassification(
        config(world_tokenizer, len(world_tokenizer), num_labels=1)
    )
    reward.save_pretrained(tmp_path / "rm")
    world_tokenizer.save_pretrained(tmp_path / "rm")
    settings = stage_settings("ppo") | {
        "model_name_or_path": policy,
        "reward": {"model_name_or_path": str(tmp_path / "rm")},
    }
    ppo.main(check_config(PPOConfig, settings, "config:"))
    output = Path(settings["output_dir"])
    assert (output / "evaluation.json").is_file()
    actor = AutoModelForCausalLM.from_pretrained(output / "actor")
    assert actor.config.vocab_size == len(world_tokenizer) + EXTRA


def test_prompts_of_a_padded_policy(world_tokenizer, tmp_path: Path) -> None:
    """What is encoded exists."""
    (ids,) = encode_prompt_texts(["Please suggest a drink."], world_tokenizer)
    assert max(ids) < ids_needed(world_tokenizer)
