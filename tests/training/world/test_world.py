"""The bundled world: its shares are what it says, and a seed gives the same bytes."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.config import check_config
from training.data import STAGES, DataSettings, decode_responses, encode_responses, read_records
from training.world.__main__ import main
from training.world.base_model import build_tokenizer
from training.world.files import WorldSizes, write_world
from training.world.population import (
    group_shares,
    kl_bias,
    population_shares,
    preference,
    preference_probability,
    true_log_loss,
    utilities,
    writers_shares,
)
from training.world.prompts import held_out, prompts
from training.world.topics import OPENERS, PHRASINGS, TOPICS

FILES = ("texts", "comparisons", "texts_eval", "comparisons_eval", "response_sets")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    write_world(directory, seed=7)
    return directory


@pytest.fixture(scope="module")
def lines(world):
    return {
        name: [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]
        for name in FILES
    }


TOPIC_OF = {
    prompt: topic
    for index, topic in enumerate(TOPICS)
    for evaluation in (False, True)
    for prompt in prompts(index, evaluation)
}


def softmax(values):
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def test_topics():
    assert len(TOPICS) >= 12
    assert len({topic.name for topic in TOPICS}) == len(TOPICS)
    words = [len(answer.text.split()) for topic in TOPICS for answer in topic.answers]
    assert (min(words), max(words)) == (1, 10)
    for topic in TOPICS:
        texts = [answer.text for answer in topic.answers]
        assert 3 <= len(texts) == len(set(texts)) <= 6
        assert population_shares(topic).sum() == pytest.approx(1, abs=1e-12)
        assert writers_shares(topic).sum() == pytest.approx(1, abs=1e-12)
        assert population_shares(topic).min() >= 0.04
        assert writers_shares(topic).min() >= 0.08
        assert softmax(utilities(topic)) == pytest.approx(population_shares(topic), abs=1e-12)


def test_named_topics():
    def by_opinion(name):
        (topic,) = (topic for topic in TOPICS if topic.name == name)
        shares = defaultdict(lambda: [0.0, 0.0])
        for answer in topic.answers:
            shares[answer.opinion][0] += answer.population
            shares[answer.opinion][1] += answer.writers
        return dict(shares)

    assert by_opinion("drink") == {"coffee": [51, 8], "tea": [49, 92]}
    assert by_opinion("pet") == {"dog": [70, 10], "cat": [30, 90]}
    assert by_opinion("season") == {"summer": [60, 10], "winter": [40, 90]}


def test_the_bias_that_kl_inherits_is_large():
    """TV(softmax(log writers + r*), softmax(r*)), recomputed here."""
    biases = []
    for topic in TOPICS:
        population = population_shares(topic)
        tilted = softmax(np.log(writers_shares(topic)) + utilities(topic))
        biases.append(0.5 * np.abs(tilted - population).sum())
        assert kl_bias(topic) == pytest.approx(biases[-1], abs=1e-12)
    assert np.mean(biases) >= 0.31


def test_phrasings_rotate():
    assert len(PHRASINGS) == 16
    assert len(OPENERS) == 4
    held = [held_out(index) for index in range(len(TOPICS))]
    assert {len(indices) for indices in held} == {4}
    for phrasing in range(len(PHRASINGS)):
        unseen = sum(phrasing in indices for indices in held)
        assert 0 < unseen < len(TOPICS)
    for index in range(len(TOPICS)):
        train, evaluation = prompts(index, False), prompts(index, True)
        assert (len(train), len(evaluation)) == (48, 16)
        assert len(set(train + evaluation)) == 64


def test_prompts_are_english():
    assert "Please suggest a drink." in TOPIC_OF
    assert "Quick question: Which drink would you pick?" in TOPIC_OF
    assert "Please suggest an evening activity." in TOPIC_OF
    for topic in TOPICS:
        assert topic.article == ("an" if topic.noun[0] in "aeiou" else "a")
    for prompt in TOPIC_OF:
        assert prompt[-1] in ".?"
        assert prompt == " ".join(prompt.split())


def test_sizes(lines):
    sizes, n = WorldSizes(), len(TOPICS)
    counts = {name: len(content) for name, content in lines.items()}
    assert counts == {
        "texts": 48 * n * sizes.texts_per_prompt,
        "comparisons": 48 * n * sizes.comparisons_per_prompt,
        "texts_eval": 4 * n * sizes.eval_openers * sizes.eval_texts_per_prompt,
        "comparisons_eval": 4 * n * sizes.eval_openers * sizes.eval_comparisons_per_prompt,
        "response_sets": 4 * n * sizes.eval_openers,
    }


def test_held_out_phrasings_are_for_evaluation_only(lines):
    train = {line["prompt"] for name in ("texts", "comparisons") for line in lines[name]}
    evaluation = {
        line["prompt"]
        for name in ("texts_eval", "comparisons_eval", "response_sets")
        for line in lines[name]
    }
    assert len(train) == 48 * len(TOPICS)
    assert not train & evaluation
    assert evaluation == {line["prompt"] for line in lines["response_sets"]}


def test_texts_have_the_writers_shares(lines):
    """Pearson's chi-squared over all topics, within five standard deviations."""
    counts = Counter((TOPIC_OF[line["prompt"]].name, line["response"]) for line in lines["texts"])
    statistic, freedom = 0.0, 0
    for topic in TOPICS:
        observed = np.array([counts[topic.name, answer.text] for answer in topic.answers])
        expected = writers_shares(topic) * observed.sum()
        statistic += ((observed - expected) ** 2 / expected).sum()
        freedom += len(observed) - 1
    assert sum(counts.values()) == len(lines["texts"])
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_comparisons_are_btl_on_uniform_pairs(lines):
    wins = Counter()
    for line in lines["comparisons"]:
        assert line.keys() == {"prompt", "chosen", "rejected", "group"}
        wins[TOPIC_OF[line["prompt"]].name, line["chosen"], line["rejected"]] += 1
    outcome, pairs, n_outcome, n_pairs = 0.0, 0.0, 0, 0
    for topic in TOPICS:
        texts = [answer.text for answer in topic.answers]
        both = {
            (i, j): (wins[topic.name, texts[i], texts[j]], wins[topic.name, texts[j], texts[i]])
            for i in range(len(texts))
            for j in range(i)
        }
        totals = np.array([sum(pair) for pair in both.values()])
        pairs += ((totals - totals.mean()) ** 2 / totals.mean()).sum()
        n_pairs += len(totals) - 1
        for (i, j), (won, lost) in both.items():
            p = population_shares(topic)[i] / population_shares(topic)[[i, j]].sum()
            assert preference_probability(topic, i, j) == pytest.approx(p, abs=1e-12)
            outcome += (won - p * (won + lost)) ** 2 / (p * (1 - p) * (won + lost))
            n_outcome += 1
    assert abs(pairs - n_pairs) < 5 * np.sqrt(2 * n_pairs)
    assert abs(outcome - n_outcome) < 5 * np.sqrt(2 * n_outcome)


def test_true_log_loss(lines):
    assert true_log_loss([{"bayes_probability": 0.5}] * 2) == pytest.approx(np.log(2))
    comparisons = lines["comparisons_eval"]
    # What the population's own probabilities lose in expectation: their entropy.
    p = np.array([line["bayes_probability"] for line in comparisons])
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    spread = np.abs(np.log(p / (1 - p))) * np.sqrt(p * (1 - p))
    bound = 5 * np.sqrt((spread**2).sum()) / len(p)
    assert abs(true_log_loss(comparisons) - entropy.mean()) < bound


def test_response_sets_state_what_is_known(lines):
    for line in lines["response_sets"]:
        topic = TOPIC_OF[line["prompt"]]
        assert line["topic"] == topic.name
        assert line["responses"] == [answer.text for answer in topic.answers]
        assert line["population"] == population_shares(topic).tolist()
        assert line["writers"] == writers_shares(topic).tolist()
        assert softmax(np.array(line["utilities"])) == pytest.approx(line["population"])


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    sizes = WorldSizes(1, 1, 1, 1)
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        write_world(tmp_path / name, seed, sizes)
    write_world(tmp_path / "two", 1, sizes)  # over an earlier one
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) >= 10
    changed = set()
    for file in files:
        one = (tmp_path / "one" / file).read_bytes()
        assert one == (tmp_path / "two" / file).read_bytes(), file
        if one != (tmp_path / "three" / file).read_bytes():
            changed.add(file.name)
    assert {"texts.jsonl", "comparisons.jsonl", "model.safetensors"} <= changed


def test_the_base_model_is_an_ordinary_directory(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(tokenizer).__name__.startswith("LlamaTokenizer")
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    assert len(tokenizer) == model.config.vocab_size == WorldSizes.vocab_size
    special = [getattr(tokenizer, f"{name}_token_id") for name in ("unk", "bos", "eos", "pad")]
    assert special == [0, 1, 2, 3]
    assert [getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")] == [
        1,
        2,
        3,
    ]
    assert tokenizer("Tea").input_ids[0] == tokenizer.bos_token_id
    assert {p.suffix for p in (world / "base").iterdir()} == {".json", ".model", ".safetensors"}


def test_the_tokenizer_is_a_sentencepiece_model(world):
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(world / "base/tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    for text in [*list(TOPIC_OF)[:200], "Zürich 🏞️", "Tea"]:
        assert tokenizer(text, add_special_tokens=False).input_ids == reference.encode(text)


def test_answers_and_prompts_survive_the_tokenizer(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    answers = [answer.text for topic in TOPICS for answer in topic.answers]
    encoded = encode_responses(answers, tokenizer)
    assert decode_responses(encoded, tokenizer) == answers
    assert max(map(len, encoded)) <= 16
    for prompt in TOPIC_OF:
        assert tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True) == prompt
    assert build_tokenizer()("Tea").input_ids == tokenizer("Tea").input_ids


def test_no_answer_is_another_ones_beginning_with_its_eos(world):
    """The ids of a topic's answers, EOS included, are a prefix code: shares are well-defined."""
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    for topic in TOPICS:
        encoded = encode_responses([answer.text for answer in topic.answers], tokenizer)
        for one in encoded:
            assert sum(other[: len(one)] == one for other in encoded) == 1


def test_the_files_go_through_the_ordinary_loaders(world):
    for stage, name in (("sft", "texts"), ("reward", "comparisons"), ("ppo", "comparisons")):
        data = {
            "sources": [str(world / f"{name}.jsonl")],
            "eval_sources": [str(world / f"{name}_eval.jsonl")],
        }
        found = read_records(check_config(DataSettings, data, "bad:"), stage)
        assert stage in STAGES
        # Each stage meets each topic.
        topics = {TOPIC_OF[record.prompt_text].name for record in found.train}
        assert len(topics) == len(TOPICS)
        assert found.tally.count("kept for evaluation only") == 0


def test_command_line(tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path), "--seed", "3", "--texts_per_prompt", "2"]
    main([*arguments, "--comparisons_per_prompt", "1", "--vocab_size", "700"])
    assert "16 topics written to" in capsys.readouterr().out
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 2 * 48 * len(TOPICS)
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--eval_openers", "9"])
    assert caught.value.code == 2


# Two groups


@pytest.fixture(scope="module")
def two_groups(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_groups")
    write_world(directory, seed=7, sizes=WorldSizes(groups=2))
    return directory


def test_two_groups_have_opposite_tastes():
    for topic in TOPICS:
        first, second = group_shares(topic, 2)
        assert first.tolist() == second[::-1].tolist()
        assert first.sum() == pytest.approx(1, abs=1e-12)
        assert first[0] / first[-1] == pytest.approx(90)
        assert group_shares(topic, 1)[0].tolist() == population_shares(topic).tolist()
    # Shares (.90, .09, .01): σ(log 9.5) of the first group and of the second its mirror.
    pet = next(topic for topic in TOPICS if topic.name == "pet")
    root = np.sqrt(90)
    assert group_shares(pet, 2)[0] == pytest.approx(np.array([90, root, 1]) / (91 + root))
    assert preference([group_shares(pet, 2)[0]], 0, 1) == pytest.approx(root / (root + 1))
    assert preference(group_shares(pet, 2), 0, 1) == pytest.approx(0.5)


def test_files_of_two_groups(world, two_groups):
    """The groups' own comparisons and sets with their mixture; the texts are those of one group."""

    def lines(name):
        return [
            json.loads(line) for line in (two_groups / f"{name}.jsonl").read_text().splitlines()
        ]

    assert (two_groups / "texts.jsonl").read_bytes() == (world / "texts.jsonl").read_bytes()
    assert not (world / "comparisons_group1.jsonl").exists()
    for entry in lines("response_sets"):
        assert np.mean(entry["groups"], axis=0).tolist() == pytest.approx(entry["population"])
        assert "utilities" not in entry
    assert len(lines("comparisons_group1")) == len(lines("comparisons")) > 0
    train = {line["prompt"] for line in lines("comparisons_group2")}
    assert not train & {line["prompt"] for line in lines("comparisons_group2_eval")}
    # Each group's choices agree with its own shares, and the pooled ones with neither's.
    for name, groups in {"comparisons_group1": [0], "comparisons_group2": [1],
                         "comparisons": [0, 1]}.items():  # fmt: skip
        bayes, won = defaultdict(float), Counter()
        for line in lines(name + "_eval"):
            topic = TOPIC_OF[line["prompt"]]
            order = [answer.text for answer in topic.answers]
            first, second = order.index(line["chosen"]), order.index(line["rejected"])
            shares = [group_shares(topic, 2)[group] for group in groups]
            assert line["bayes_probability"] == pytest.approx(preference(shares, first, second))
            bayes[topic.name] += preference(shares, min(first, second), max(first, second))
            won[topic.name] += first < second
        for name_of_topic, expected in bayes.items():
            assert abs(won[name_of_topic] - expected) < 5 * np.sqrt(expected) + 5


def test_the_number_of_groups(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--output_dir", str(tmp_path), "--groups", "3"])
    assert "groups: 1 or 2" in capsys.readouterr().err
