"""Class shares under a reference, by the model's own logits, and by its draws."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.normalizers import Lowercase
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from step3_rlhf.classes import shares as module
from step3_rlhf.classes.labels import labels_of
from step3_rlhf.classes.shares import ClassShares, check_classes, class_shares, over_ranks
from step3_rlhf.config import PPOConfig
from step3_rlhf.regularizers import parse_regularizer
from step3_rlhf.regularizers.classes import ClassSettings
from step3_rlhf.rollout import Rollout, assemble, encode_prompt_texts, sample
from training.config import check_config
from training.data import encode_responses, response_end
from training.errors import UserError
from training.models.loading import load_policy
from training.models.policy import Policy
from training.models.pretrained import Pretrained

PROMPTS = ("Please suggest a drink.", "What is a good pet?")
TEA, COFFEE = ["Tea", "A tea"], ["I would suggest coffee with a little milk."]


@pytest.fixture
def reference(tiny_world: Path, world_tokenizer: PreTrainedTokenizerBase) -> Policy:
    loaded = load_policy(Pretrained(str(tiny_world / "base")), world_tokenizer).eval()
    torch.manual_seed(3)
    torch.nn.init.normal_(loaded.model.lm_head.weight, std=0.03)
    return loaded.requires_grad_(False)


@pytest.fixture
def shares(
    stage_settings: Any, reference: Policy, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Any:
    (tmp_path / "key.jsonl").write_text(
        json.dumps({"prompt": PROMPTS[0], "classes": {"tea": TEA, "coffee": COFFEE}}) + "\n"
    )

    def build(**classes: Any) -> ClassShares:
        classes = classes or {"answer_key": str(tmp_path / "key.jsonl")}
        regularizer = {"name": "conditional_pm", "level": "class", "classes": classes}
        settings = stage_settings("ppo") | {
            "reward": {"function": "operator:add"},
            "regularizer": regularizer,
            "response_length": 16,
        }
        config = check_config(PPOConfig, settings, "config:")
        found = class_shares(config.regularizer, reference, world_tokenizer, config)
        assert found is not None
        return found

    return build


def rollout_of(
    tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, str]], cut: bool = False
) -> Rollout:
    responses = encode_responses([response for _, response in rows], tokenizer)
    return assemble(
        encode_prompt_texts([prompt for prompt, _ in rows], tokenizer),
        [ids[:-1] for ids in responses] if cut else responses,
        [prompt for prompt, _ in rows],
        tokenizer,
        torch.device("cpu"),
        (response_end(tokenizer),),
    )


def own_logp(policy: Policy, tokenizer: Any, prompt: str, response: str) -> Tensor:
    """[] log π_ref(y|x), EOS included, from the Hugging Face model's logits without padding."""
    (start,) = encode_prompt_texts([prompt], tokenizer)
    (rest,) = encode_responses([response], tokenizer)
    logits = policy.model(input_ids=torch.tensor([start + rest])).logits[0].double()
    steps = logits[len(start) - 1 : -1].log_softmax(-1)
    return steps.gather(1, torch.tensor(rest)[:, None]).sum()


# Answer keys


def test_a_keys_shares_are_sums_over_its_responses(
    shares: Any, reference: Policy, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [(PROMPTS[0], y) for y in [*TEA, *COFFEE, "Water"]] + [(PROMPTS[1], TEA[0])]
    found = shares()(rollout_of(world_tokenizer, rows))
    tea, coffee = (
        torch.stack([own_logp(reference, world_tokenizer, PROMPTS[0], y) for y in known])
        for known in (TEA, COFFEE)
    )
    assert found.dtype == torch.float64
    expected = [tea.logsumexp(0).item()] * 2 + [coffee.item()]
    assert found[:3].tolist() == pytest.approx(expected, abs=1e-4)
    assert tea.logsumexp(0) > tea[0]  # the class is more than one response
    # What the key does not have, and what it has for another prompt, is outside every class.
    assert found[3:].tolist() == [-math.inf, -math.inf]


def test_a_response_that_was_cut_has_no_class(
    shares: Any, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    rollout = rollout_of(world_tokenizer, [(PROMPTS[0], TEA[0])], cut=True)
    assert rollout.responses == (TEA[0],)
    assert shares()(rollout).tolist() == [-math.inf]


def test_a_prompt_is_measured_once(
    shares: Any, world_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = shares()
    rollout = rollout_of(world_tokenizer, [(PROMPTS[0], TEA[0]), (PROMPTS[0], TEA[1])])
    first = known(rollout)
    monkeypatch.setattr(known, "reference", None)  # would fail if it were asked again
    assert torch.equal(known(rollout), first)


def test_an_answer_that_is_never_drawn_whole_is_refused(
    shares: Any, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    regularizer = shares().config.regularizer
    check_classes(regularizer, world_tokenizer, 16)
    with pytest.raises(UserError, match=r"a little milk\.' has \d+ tokens, more than resp"):
        check_classes(regularizer, world_tokenizer, 3)
    check_classes(None, world_tokenizer, 3)
    check_classes(parse_regularizer({"name": "pm"}), world_tokenizer, 3)
    assert class_shares(parse_regularizer({"name": "pm"}), None, None, None) is None  # type: ignore[arg-type]


def test_classes_that_the_tokenizer_does_not_tell_apart_are_refused(
    shares: Any, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    line = {"prompt": "Drink?", "classes": {"drink": ["Tea"], "letter": ["tea"]}}
    (tmp_path / "key.jsonl").write_text(json.dumps(line))
    settings = {"answer_key": str(tmp_path / "key.jsonl")}
    regularizer = parse_regularizer(
        {"name": "conditional_pm", "level": "class", "classes": settings}
    )
    check_classes(regularizer, world_tokenizer, 16)
    uncased = copy.deepcopy(world_tokenizer)
    uncased.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(UserError, match="writes 'tea' as 'tea', which is in both 'drink' and"):
        check_classes(regularizer, uncased, 16)


# Classes that are drawn


@pytest.mark.usefixtures("own_functions")
def test_drawn_shares_are_those_of_the_references_own_draws(
    shares: Any, reference: Policy, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Classes by the first letter, counted in 40 draws to each of two prompts."""
    known = shares(function="own_classes:by_letter", draws=40)
    ids = encode_prompt_texts(PROMPTS, world_tokenizer)
    for row, prompt in enumerate(PROMPTS):
        drawn = sample(
            reference,
            world_tokenizer,
            [ids[row]] * 40,
            [prompt] * 40,
            [(known.config.seed, 3, draw, *ids[row]) for draw in range(40)],
            known.config.sampling,
        )
        letters = [text[:1] for text in drawn.responses]
        numbers = [letters.count(letter) for letter in letters]
        assert len(set(letters)) > 5  # there is something to count
        found = known(drawn).tolist()
        wanted = [-sum(1 / k for k in range(number + 1, 41)) for number in numbers]  # H_n − H_40
        assert found == pytest.approx(wanted, abs=1e-12)
        # Another run finds the same; the draws do not depend on what it saw before.
        again = shares(function="own_classes:by_letter", draws=40)
        assert again(drawn).tolist() == found


def test_classes_by_length(world_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["Tea", "Tea with milk", "I would suggest tea with a little milk."]
    rollout = rollout_of(world_tokenizer, [(PROMPTS[0], text) for text in texts])
    first, second, third = rollout.lengths.tolist()
    assert first < second < third
    by_length = labels_of(ClassSettings(lengths=(first, second)))
    assert by_length(rollout) == ["0", "1", "2"]
    assert labels_of(ClassSettings(lengths=(second,)))(rollout) == ["0", "0", "1"]


@pytest.fixture
def own_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_classes.py").write_text(
        "number = 3\n"
        "def by_letter(prompts, responses):\n    return [y[:1] for y in responses]\n"
        "def by_word(prompts, responses):\n"
        "    return ['water' if 'ater' in y else None for y in responses]\n"
        "def short(prompts, responses):\n    return ['a']\n"
        "def wrong(prompts, responses):\n    return [1 for _ in responses]\n"
        "def broken(prompts, responses):\n    raise KeyError('no')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own_functions")
def test_a_function_gives_classes(shares: Any, world_tokenizer: PreTrainedTokenizerBase) -> None:
    known = shares(function="own_classes:by_word", draws=8)
    rows = [(PROMPTS[0], "Water"), (PROMPTS[0], "Tea")]
    found = known(rollout_of(world_tokenizer, rows)).tolist()
    never_drawn = -sum(1 / k for k in range(1, 9))
    assert found == [pytest.approx(never_drawn, abs=1e-12), -math.inf]


@pytest.mark.usefixtures("own_functions")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "own_classes:short returned 1 classes for 2 responses"),
        ("wrong", "own_classes:wrong returned a class that is neither a text nor null"),
        ("broken", r"own_classes:broken raised KeyError\('no'\)"),
        ("number", "own_classes:number is not callable"),
        ("by_world", "did you mean 'by_word'"),
    ],
)
def test_faults_of_a_function_are_named(
    shares: Any, world_tokenizer: PreTrainedTokenizerBase, name: str, message: str
) -> None:
    rows = [(PROMPTS[0], "Water"), (PROMPTS[0], "Tea")]
    with pytest.raises(UserError, match=message):
        shares(function=f"own_classes:{name}", draws=2)(rollout_of(world_tokenizer, rows))


# Ranks


@pytest.mark.parametrize(("count", "processes"), [(7, 1), (7, 3), (6, 3), (1, 4), (0, 2)])
def test_every_rank_makes_as_many_calls_and_nothing_is_lost(
    count: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank in turn, with what it would hand to the others."""
    calls: list[list[int]] = []
    parts: list[int] = []
    items = list(range(count))

    def measure(part: Any) -> list[int]:
        calls[-1].append(len(part))
        return [10 * item for item in part]

    monkeypatch.setattr(module.ranks, "world_size", lambda: processes)
    monkeypatch.setattr(module.ranks, "gather_objects", lambda own: parts.extend(own) or parts)
    for rank in range(processes):
        monkeypatch.setattr(module.ranks, "rank", lambda rank=rank: rank)
        calls.append([])
        last = over_ranks(items, 2, measure)
    assert last == [10 * item for item in items]
    assert all(own == calls[0] for own in calls)
