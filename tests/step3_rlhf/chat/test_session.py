"""Answers are those that stage 3 would draw; shares are those of the policy."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from step3_rlhf.chat.plain import answer_lines
from step3_rlhf.chat.session import ANSWER, Session
from step3_rlhf.chat.settings import ChatSettings
from step3_rlhf.chat.sources import sources_of
from step3_rlhf.chat.speakers import Speaker, load_speakers
from step3_rlhf.config import SamplingSettings
from step3_rlhf.rollout import encode_prompt_texts, sample
from training.errors import UserError

QUESTION = "Please suggest a drink."
BEGINNING = [{"role": "system", "content": "Be brief."}]
Speak = Callable[..., list[Speaker]]


@pytest.fixture(scope="module")
def base(tiny_world: Path) -> Speaker:
    settings = SamplingSettings(response_length=12)
    return load_speakers(sources_of([str(tiny_world / "base")]), settings)[0]


@pytest.mark.parametrize("decodes", [True, False])
def test_an_answer_is_what_a_rollout_draws(base: Speaker, decodes: bool) -> None:
    """By our decoder, and by transformers' `generate`; with the text growing in between."""
    prompt = ({"role": "user", "content": QUESTION},)
    ids = encode_prompt_texts([prompt], base.tokenizer)
    base.policy.decodes = decodes
    for number in range(3):
        seed = (7, ANSWER, number)
        drawn = sample(base.policy, base.tokenizer, ids, [prompt], [seed], base.settings)
        seen: list[str] = []
        answer = base.answer(prompt, seed, seen.append)
        assert (answer.text, answer.ended) == (drawn.responses[0], bool(drawn.ended[0]))
        assert len(seen) > 1
        assert answer.text.startswith(seen[0])
        assert [found.text for found in base.answers(prompt, [(1,), seed])][1] == answer.text
    base.policy.decodes = True


def test_a_session_asks_with_the_dialogue_so_far(base: Speaker) -> None:
    """The second answer is drawn given the first question and the first answer."""
    session = Session([base, base], BEGINNING, seed=3)
    first = session.ask(QUESTION)
    second = session.ask("And a pet?")
    assert first[0] == first[1]  # equal models draw equal answers
    assert second[0] == second[1]
    turns = [
        *BEGINNING,
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first[0].text},
        {"role": "user", "content": "And a pet?"},
    ]
    assert second[0] == base.answer(tuple(turns), (3, ANSWER, 1), lambda text: None)
    session.reset()
    assert session.ask("And a pet?")[0] != second[0]
    assert Session([base], BEGINNING, seed=3).ask(QUESTION)[0] == first[0]


def test_a_stopped_answer_is_not_remembered(base: Speaker) -> None:
    def stop(place: int, text: str) -> None:
        raise KeyboardInterrupt

    session, other = Session([base], (), seed=3), Session([base], (), seed=3)
    with pytest.raises(KeyboardInterrupt):
        session.ask(QUESTION, stop)
    other.ask(QUESTION)
    other.reset()
    assert session.ask("And a pet?") == other.ask("And a pet?")


def test_nothing_was_asked(base: Speaker) -> None:
    with pytest.raises(UserError, match="ask something first"):
        Session([base], (), seed=3).distributions(4, 4)


def test_a_question_that_is_not_utf8(base: Speaker) -> None:
    """Python reads the byte of é in Latin-1 as half of a character, which has no token."""
    lines = ["Drink?\n", "Caf\udce9?\n"]
    with pytest.raises(UserError, match="line 2: the question is not UTF-8; convert it"):
        answer_lines(Session([base], (), seed=3), ChatSettings(), lines)


def test_a_dialogue_beyond_the_positions(two_answers: Path) -> None:
    """64 positions: an answer is cut where they end, and a longer dialogue has no answer."""
    speakers = load_speakers(sources_of([str(two_answers)]), SamplingSettings(response_length=512))
    with pytest.raises(UserError, match=r"two_answers knows 64 positions, and the dialogue has \d"):
        Session(speakers, (), seed=1).ask("Please suggest a drink. " * 20)


def bounds(draws: int, share: float, beyond: float) -> tuple[int, int]:
    """Counts that a binomial variable leaves with at most `beyond` probability on either side."""
    chance = [
        math.comb(draws, count) * share**count * (1 - share) ** (draws - count)
        for count in range(draws + 1)
    ]
    low = max(count for count in range(draws + 1) if sum(chance[:count]) <= beyond)
    high = min(count for count in range(draws + 1) if sum(chance[count + 1 :]) <= beyond)
    return low, high


@pytest.mark.parametrize(("temperature", "within"), [(1.0, True), (0.5, False)])
def test_shares_are_the_policys(
    two_answers: Path, world_tokenizer: PreTrainedTokenizerBase, temperature: float, within: bool
) -> None:
    """0.7 and 0.3, within exact bounds; at temperature 0.5 it would be 0.84 and 0.16."""
    settings = SamplingSettings(response_length=4, temperature=temperature)
    session = Session(load_speakers(sources_of([str(two_answers)]), settings), (), seed=5)
    advanced: list[int] = []
    (found,) = session.distributions(400, 150, QUESTION, advanced.append)
    assert advanced == [150, 150, 100]
    assert found.distinct == 2
    (_, count), _ = found.counts.most_common()
    low, high = bounds(400, 0.7, beyond=1e-5)
    assert (low <= count <= high) == within
    # In other batches the same answers are drawn.
    assert session.distributions(400, 64)[0].counts == found.counts
