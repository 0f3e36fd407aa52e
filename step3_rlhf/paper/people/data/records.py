"""A question as the project's ordinary records: texts, rankings, prompts, response sets.

All draws depend on the seed and the question alone, not on other questions or their order.
"""

import random
from collections.abc import Sequence
from typing import Any, Literal

from step3_rlhf.paper.people.data.questions import Question

Prior = Literal["people", "uniform"]
"""What SFT learns: answers in people's proportions, or each answer once."""

Form = Literal["listed", "open"]
"""How questions are asked: with the board's answers in a random order, or by themselves."""

Record = dict[str, Any]


def source_of(question: Question, seed: int, purpose: str) -> random.Random:
    """The question's own random draws."""
    return random.Random(f"{seed} {purpose} {question.id}")


def asked(question: Question, text: str, form: Form, seed: int, number: int = 0) -> str:
    """The prompt.

    Args:
        text: the question's own words, or others. Other words list the answers in another order.
        number: of the order, for a question that is asked several times.
    """
    if form == "open":
        return text
    answers = list(question.answers)
    source_of(question, seed, f"order {text}" + f" {number}" * bool(number)).shuffle(answers)
    return f"{text}\nAnswers: {'; '.join(answers)}"


def texts(question: Question, words: str, prior: Prior, draws: int, seed: int) -> list[Record]:
    """Texts for SFT.

    In people's proportions by systematic sampling: of m draws, an answer with share p has
    ⌊m·p⌋ or ⌈m·p⌉, and m·p in expectation over the seed.
    """
    if prior == "uniform":
        chosen = list(question.answers)
    else:
        offset = source_of(question, seed, "texts").random()
        chosen = systematic(question.answers, question.shares, draws, offset)
    return [prompt(question, words) | {"response": answer} for answer in chosen]


def systematic(
    answers: Sequence[str], shares: Sequence[float], draws: int, offset: float
) -> list[str]:
    """The answers at the points (offset + i)/draws, i < draws, of the cumulative shares.

    Args:
        offset: in [0, 1).
    """
    found, passed, number = [], 0.0, 0
    for answer, share in zip(answers, shares, strict=True):
        passed += share
        while number < draws and (offset + number) / draws < passed:
            found.append(answer)
            number += 1
    return found + [answers[-1]] * (draws - number)  # rounding leaves the sum just below 1


def ranking(
    question: Question, words: str, others: Sequence[str], seed: int, number: int = 0
) -> Record:
    """People's answers in an order that Plackett–Luce's model gives, then those of other questions.

    One person after another is drawn whose answer is not ranked yet: the first place is a
    respondent's answer, the second that of one who said something else, and so on. The likelihood
    of such orders is largest at softmax(r) = the shares.
    """
    drawn = source_of(question, seed, f"ranking {number}")
    left = dict(zip(question.answers, question.counts, strict=True))
    order = []
    while left:
        (answer,) = drawn.choices(list(left), list(left.values()))
        order.append(answer)
        del left[answer]
    responses = [*question.answers, *others]
    ranks = [responses.index(answer) for answer in (*order, *others)]
    return prompt(question, words) | {"responses": responses, "ranking": ranks}


def answers_elsewhere(
    question: Question, all_questions: Sequence[Question], count: int, seed: int, number: int = 0
) -> list[str]:
    """Answers of other questions, each another one and none an answer to this one."""
    drawn = source_of(question, seed, f"elsewhere {number}")
    own = {string for strings in (question.answers, *question.strings) for string in strings}
    found: list[str] = []
    while len(found) < count:
        other = drawn.choice(all_questions)
        answer = drawn.choice(other.answers)
        if answer not in own and answer not in found:
            found.append(answer)
    return found


def response_sets(question: Question, words: str, label: str) -> list[Record]:
    """The board as a response set with people's shares.

    Where more strings than the board's count as answers, also a set of all of them: what lies
    outside the one and inside the other is said by people, too.

    Args:
        words: how the question is asked.
        label: which group of questions it belongs to; with the id it is the set's topic.
    """
    board = {
        "prompt": words,
        "topic": f"{label}/{question.id}",
        "responses": list(question.answers),
        "population": list(question.shares),
    }
    strings = list(dict.fromkeys(string for group in question.strings for string in group))
    if len(strings) <= len(question.answers):
        return [board]
    every = {"prompt": words, "topic": f"{label}-strings/{question.id}", "responses": strings}
    return [board, every]


def prompt(question: Question, words: str) -> Record:
    """A prompt for stage 3, and the beginning of every record."""
    return {"prompt": words, "group": question.id}
