r"""Raw records in any of the formats of preference data -> one typed Record.

    preference        {"prompt", "chosen", "rejected"}, Dahoas/full-hh-rlhf and UltraFeedback's
                      pairs among them; or Alpaca's "instruction" and "input" as the prompt;
                      with "tie": true neither is better
    transcript        {"chosen", "rejected"}: two whole dialogues that differ in their last turn,
                      as \n\nHuman: / \n\nAssistant: texts (Anthropic) or lists of messages
    ranking           {"prompt", "responses"} with "ranking", which lists every index of
                      `responses` once, best first (tied ones as a list of their own, those of
                      unknown order in "unranked"), or with "scores"
    completions       {"instruction", "completions": [{"response", "overall_score"}, ...]}
                      (openbmb/UltraFeedback)
    scored            {"prompt", "response", "helpfulness" or "score"}: the records of one prompt
                      make a ranking (HelpSteer)
    completion        {"prompt", "response" or "completion"}: SFT only
    kto               {"prompt", "completion", "label"}: SFT learns those labelled true
    instruction       {"instruction", "input", "output"} (Alpaca): SFT only
    messages          {"messages": [{"role", "content"}, ...]}: SFT only
    conversations     {"conversations": [{"from", "value"}, ...]} (ShareGPT): SFT only
    tldr_comparison   {"info", "summaries", "choice"} (openai/summarize_from_feedback)
    tldr_post         {"subreddit", "title", "post", "summary"}: SFT only

A prompt is a text, a `\n\nHuman:` dialogue, or a list of messages. PPO needs prompts only, so its
records need no other field.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise

from training.data.fields import (
    FIELDS,
    LABELS,
    RESPONSES,
    SCORES,
    SHAREGPT,
    Raw,
    RecordFault,
    Unusable,
    first_of,
    has,
    number,
    optional_text,
    required,
    truth,
)
from training.data.fields import text as text_of
from training.data.fields import texts as texts_of
from training.data.messages import (
    Dialogue,
    dialogue_text,
    has_turns,
    is_learnable,
    is_transcript,
    message_list,
    prompt_messages,
    transcript_turns,
)
from training.data.settings import SourceFormat, Stage, TrainOn
from training.errors import did_you_mean

DIFFERENT_PROMPTS = "dropped: the prompts of chosen and rejected differ"
EMPTY_RESPONSE = "dropped: an empty response"
UNLEARNED_ANSWERS = "answers not learned: weight 0, tool calls, thoughts, or no question before"
NO_COMPARISON = "skipped: a text for SFT only, nothing to compare"


@dataclass(frozen=True)
class Record:
    """A prompt and its responses.

    prompt: messages; the last one is the user's, or a tool's.
    responses: best first; two for a comparison, one for an SFT text, none for a bare prompt.
    origin: "file:line".
    score: of a single response that makes a ranking together with the others of its prompt.
    all_turns: SFT learns the assistant's turns within the prompt as well.
    levels: [responses] the same number for responses that are tied; empty if none are.
    unranked: how many of the last responses come after the others in unknown order.
    largest_tie: the most responses of one tie among the records of the source; 1 if it has none.
    unlearned: the assistant's turns after the response, which cannot be learned.
    group: what the record shares with others that are not independent of it; empty is its prompt.
    """

    prompt: Dialogue
    responses: tuple[str, ...]
    origin: str
    score: float | None = None
    all_turns: bool = False
    levels: tuple[int, ...] = ()
    unranked: int = 0
    largest_tie: int = 1
    unlearned: int = 0
    group: str = ""

    @property
    def tie_sizes(self) -> list[int]:
        """How many responses each level has, without those of unknown order."""
        ranked = self.levels[: len(self.responses) - self.unranked]
        return list(Counter(ranked).values())

    @property
    def prompt_text(self) -> str:
        """The text of a single turn, or the transcript of a dialogue (a system message first)."""
        return dialogue_text(self.prompt)


def parse_record(
    raw: Raw,
    origin: str,
    stage: Stage,
    source_format: SourceFormat = "auto",
    train_on: TrainOn = "all",
) -> Record:
    """Parse a raw record.

    Raises:
        RecordFault: a required field is missing, or a field has the wrong type.
        Unusable: the record is well-formed, but the stage cannot learn from it.
    """
    if raw.get("tools") not in (None, [], "", "[]"):
        raise RecordFault(
            "'tools' describes functions, which are not read; write them into the system turn"
        )
    found = _format_of(raw, stage) if source_format == "auto" else source_format
    record = READERS[found](raw, stage)
    whole_dialogue = found in ("messages", "conversations") and train_on == "all"
    return replace(record, origin=origin, all_turns=whole_dialogue and stage == "sft")


def group_of(raw: Raw) -> str:
    """The optional field `group` of a record in any format; empty if it has none.

    Raises:
        RecordFault: it is not a text.
    """
    return optional_text(raw, "group")


def check_usable(record: Record, stage: Stage) -> Record:
    """Reduce a record to what `stage` uses: SFT keeps the best response, PPO none.

    Raises:
        Unusable: the stage cannot learn from the record; the message is the reason.
    """
    if not all(turn["content"].strip() for turn in record.prompt if turn["role"] == "user"):
        raise Unusable("dropped: an empty prompt")
    if not any(turn["role"] == "user" for turn in record.prompt):
        raise Unusable("dropped: an empty prompt")
    if record.prompt[-1]["role"] not in ("user", "tool"):
        raise Unusable("dropped: the prompt does not end with the user's turn")
    if stage != "reward":
        record = replace(record, levels=(), unranked=0, largest_tie=1)
    if stage == "ppo":
        empty = not record.responses and record.score is None
        return record if empty else replace(record, responses=(), score=None)
    if stage == "sft":
        if not record.responses[0]:
            raise Unusable(EMPTY_RESPONSE)
        return replace(record, responses=record.responses[:1], score=None)
    if len(record.responses) == 1:
        raise Unusable(NO_COMPARISON)
    if not all(record.responses):
        raise Unusable(EMPTY_RESPONSE)
    if len(set(record.responses)) < len(record.responses):
        raise Unusable("dropped: identical responses")
    return record


def ranked_by_score(prompt: Dialogue, responses: Sequence[str], scores: Sequence[float]) -> Record:
    """The responses, best first; those with one score are tied."""
    once = dict.fromkeys(zip(responses, scores, strict=True))  # not the same one twice in a tie
    ranked = sorted(once, key=lambda pair: -pair[1])
    levels = levels_of([score for _, score in ranked])
    return Record(prompt, tuple(response for response, _ in ranked), "", levels=levels)


def levels_of(marks: Sequence[float]) -> tuple[int, ...]:
    """Number the levels of responses that are in order; () if no neighbours have one mark."""
    changes = [later != before for before, later in pairwise(marks)]
    return () if all(changes) else (0, *accumulate(map(int, changes)))


def _format_of(raw: Raw, stage: Stage) -> SourceFormat:
    def given(*names: str) -> bool:
        return has(raw, *names)

    if given("summaries", "choice") and not given("prompt"):
        return "tldr_comparison"
    if given("responses", "ranking", "scores"):
        return "ranking"
    if isinstance(raw.get("completions"), list):
        return "completions"
    if given("chosen", "rejected"):
        plain = _is_plain_text(raw.get("chosen") or raw.get("rejected"))
        if given("prompt", "instruction", *SHAREGPT) or plain:
            return "preference"
        return "transcript"
    if given("prompt", "instruction") and given(*RESPONSES):
        if given(*LABELS):
            return "kto"
        if given("prompt") or not given("output"):
            return "scored" if given(*SCORES) else "completion"
    if given("messages"):
        return "messages"
    if given(*SHAREGPT):
        return "conversations"
    if given("instruction") or (given("input") and given("output")):
        return "instruction"
    if given("response", "completion"):
        return "completion"
    if given("summary") and not given("prompt"):
        return "tldr_post"
    if given("prompt") and stage == "ppo":
        return "completion"
    raise RecordFault(_unrecognized(raw))


def _unrecognized(raw: Raw) -> str:
    """Why no format fits, with the nearest name of a field."""
    if nulls := [name for name in raw if raw[name] is None and name in FIELDS]:
        null = f" ({', '.join(map(repr, nulls))} {'is' if len(nulls) == 1 else 'are'} null)"
    else:
        null = ""
    if not has(raw, "prompt"):
        return f"no 'prompt'{null or (did_you_mean('prompt', raw) if raw else '')}"
    known = ("chosen", "rejected", "response", "responses", "ranking")
    near = [hint for key in raw if (hint := did_you_mean(key, known)).startswith("; did")]
    return "a prompt without 'chosen' and 'rejected', 'responses' and 'ranking', or 'response'" + (
        null or (near[0] if near else "")
    )


def _is_plain_text(value: object) -> bool:
    return isinstance(value, str) and not has_turns(value)


def _prompt(raw: Raw) -> Dialogue:
    """The prompt: `prompt`, or Alpaca's `instruction` and `input`, after a `system` turn if any."""
    if not has(raw, "prompt") and has(raw, "instruction"):
        return _with_system(raw, _instruction(raw))
    value = required(raw, "prompt")
    if isinstance(value, list | dict):
        turns = message_list(value, "prompt")
    else:
        turns = prompt_messages(text_of(raw, "prompt"))
    return _with_system(raw, turns)


def _with_system(raw: Raw, turns: Dialogue) -> Dialogue:
    """The turns after the record's own `system` text, unless they begin with a system turn."""
    value = raw.get("system")
    if not value or turns[0]["role"] == "system":
        return turns
    if isinstance(value, list | dict):  # a list with the one message
        value = "\n\n".join(turn["content"] for turn in message_list(value, "system"))
    if not isinstance(value, str):
        raise RecordFault(f"'system' is {type(value).__name__}, a text was expected")
    return ({"role": "system", "content": value.strip()}, *turns) if value.strip() else turns


def _instruction(raw: Raw) -> Dialogue:
    """Alpaca's prompt: `history` of [question, answer], then `instruction` and `input`."""
    history = raw.get("history") or []
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        for pair in history
    )
    if not pairs:
        raise RecordFault("'history' is not a list of [question, answer]")
    turns = [
        {"role": role, "content": part.strip()}
        for pair in history
        for role, part in zip(("user", "assistant"), pair, strict=True)
    ]
    more = first_of(raw, ("input", "context"), "input")
    parts = [text_of(raw, "instruction"), optional_text(raw, more)]
    return (*turns, {"role": "user", "content": "\n".join(part for part in parts if part)})


def _response(raw: Raw, name: str) -> object:
    """A response as it stands, which may not be empty."""
    value = required(raw, name)
    if value == "" or value == []:
        raise Unusable(EMPTY_RESPONSE)
    return value


def _answer(raw: Raw, name: str, prompt: Dialogue) -> tuple[Dialogue, str]:
    """The turns before a response and the response, given as text or as messages.

    Messages may repeat the prompt. They may also begin with a system turn that the prompt, given as
    text, does not have; then theirs is the prompt.
    """
    value = _response(raw, name)
    if not isinstance(value, list | dict):
        return prompt, _without_prompt(raw, text_of(raw, name))
    turns = message_list(value, name)
    before, answer = _split_last(turns)
    repeats = not before or before == prompt
    if not repeats and before[0]["role"] == "system" and before[1:] == prompt:
        return before, answer
    # UltraFeedback's `prompt` is the text of the first turn.
    if not repeats and isinstance(raw.get("prompt"), str) and before[-1] == prompt[-1]:
        return before, answer
    if not repeats:
        raise Unusable(DIFFERENT_PROMPTS)
    return prompt, answer


def _without_prompt(raw: Raw, response: str) -> str:
    """The response alone, where its text repeats the transcript before it."""
    given = raw.get("prompt")
    start = given.strip() if isinstance(given, str) else ""
    if not is_transcript(start) or not response.startswith(start):
        return response
    return response[len(start) :].strip().removeprefix("Assistant:").strip()


def _split_last(turns: Dialogue) -> tuple[Dialogue, str]:
    if not turns or turns[-1]["role"] != "assistant":
        raise Unusable("dropped: the dialogue does not end with the assistant's turn")
    if "tool_calls" in turns[-1] or "reasoning_content" in turns[-1] or "thinking" in turns[-1]:
        raise Unusable("dropped: a response with tool calls or thoughts, which are no text")
    answer: str = turns[-1]["content"]
    return turns[:-1], answer


def _preference(raw: Raw, stage: Stage) -> Record:
    if has(raw, "prompt", "instruction") or not has(raw, *SHAREGPT):
        prompt = _prompt(raw)
    else:
        field = first_of(raw, SHAREGPT, "conversations")
        prompt = _with_system(raw, message_list(raw[field], field))
    if stage == "ppo":
        return Record(_prompt_of_messages(raw, prompt), (), "")
    (before, chosen), (other, rejected) = (_answer(raw, n, prompt) for n in ("chosen", "rejected"))
    if before != other:
        raise Unusable(DIFFERENT_PROMPTS)
    tied = has(raw, "tie") and truth(raw, "tie")
    return Record(before, (chosen, rejected), "", levels=(0, 0) if tied else ())


def _prompt_of_messages(raw: Raw, prompt: Dialogue) -> Dialogue:
    """The prompt as stage 2 reads it from the same record, so that both split it alike."""
    if not isinstance(raw.get("chosen"), list):
        return prompt
    try:
        return _answer(raw, "chosen", prompt)[0]
    except (RecordFault, Unusable):  # stage 2 does not use the record
        return prompt


def _dialogue(raw: Raw, name: str) -> tuple[Dialogue, str]:
    """The turns before the last answer, and the answer."""
    value = _response(raw, name)
    listed = isinstance(value, list)
    turns = message_list(value, name) if listed else transcript_turns(text_of(raw, name))
    before, answer = _split_last(turns)
    if not before:
        raise Unusable("dropped: an empty prompt")
    return _with_system(raw, before), answer


def _transcript(raw: Raw, stage: Stage) -> Record:
    (prompt, chosen), (other, rejected) = (_dialogue(raw, name) for name in ("chosen", "rejected"))
    if prompt != other:
        raise Unusable(DIFFERENT_PROMPTS)
    tied = has(raw, "tie") and truth(raw, "tie")
    return Record(prompt, (chosen, rejected), "", levels=(0, 0) if tied else ())


def _ranking(raw: Raw, stage: Stage) -> Record:
    prompt = _prompt(raw)
    if stage == "ppo":
        return Record(prompt, (), "")
    if not has(raw, "ranking") and has(raw, "scores"):
        responses, given = texts_of(raw, "responses"), required(raw, "scores")
        if not isinstance(given, list) or len(given) != len(responses):
            raise RecordFault("'scores' is not a list of one number per response")
        scores = [number({"scores": score}, "scores") for score in given]
        return ranked_by_score(prompt, responses, scores)
    required(raw, "responses")
    ranking = required(raw, "ranking")
    responses = texts_of(raw, "responses")
    unranked = raw.get("unranked") or []
    if not isinstance(ranking, list) or not isinstance(unranked, list):
        raise RecordFault("'ranking' and 'unranked' are not lists of indices")
    ties = [tie if isinstance(tie, list) else [tie] for tie in ranking]
    order = [*chain.from_iterable(ties), *unranked]
    if any(type(index) is not int for index in order):
        raise RecordFault("'ranking' is not a list of indices, or of lists of tied ones")
    if sorted(order) != list(range(len(responses))) or not ties or not all(ties):
        raise RecordFault(
            f"'ranking' {ranking} does not list the indices 0 to {len(responses) - 1}, "
            "best first, each once; those of unknown order belong in 'unranked'"
        )
    if len(unranked) == 1:  # alone behind the others, its place is known
        ties, unranked = [*ties, unranked], []
    marks = [float(place) for place, tie in enumerate([*ties, unranked]) for _ in tie or ()]
    levels = levels_of(marks) if any(len(tie) > 1 for tie in ties) else ()
    ranked = tuple(responses[index] for index in order)
    return Record(prompt, ranked, "", levels=levels, unranked=len(unranked))


def _completions(raw: Raw, stage: Stage) -> Record:
    prompt, completions = _prompt(raw), required(raw, "completions")
    if stage == "ppo":
        return Record(prompt, (), "")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise RecordFault("'completions' is not a list of objects")
    if not completions:
        raise Unusable(EMPTY_RESPONSE)
    responses = [text_of(entry, "response") for entry in completions]
    scores = [
        number(entry, first_of(entry, ("overall_score", "score"), "overall_score"))
        for entry in completions
    ]
    return ranked_by_score(prompt, responses, scores)


def _completion(raw: Raw, stage: Stage) -> Record:
    prompt = _prompt(raw)
    if stage == "ppo":
        return Record(prompt, (), "")
    before, answer = _answer(raw, first_of(raw, RESPONSES, "response"), prompt)
    return Record(before, (answer,), "")


def _scored(raw: Raw, stage: Stage) -> Record:
    record = _completion(raw, stage)
    if stage == "ppo":
        return record
    return replace(record, score=number(raw, first_of(raw, SCORES, "score")))


def _kto(raw: Raw, stage: Stage) -> Record:
    record = _completion(raw, stage)
    if stage != "ppo":
        _require_desirable(truth(raw, first_of(raw, LABELS, "label")), stage)
    return record


def _require_desirable(desirable: bool, stage: Stage) -> None:
    if stage == "reward":
        raise Unusable("skipped: a response labelled by itself (KTO), nothing to compare")
    if not desirable:
        raise Unusable("skipped: labelled false, an undesirable response (KTO)")


def _alpaca(raw: Raw, stage: Stage) -> Record:
    if not has(raw, "instruction"):
        raw = {**raw, "instruction": raw.get("input"), "input": None}
    return _completion(raw, stage)


def _messages(raw: Raw, stage: Stage) -> Record:
    return _whole_dialogue(raw, "messages", stage)


def _conversations(raw: Raw, stage: Stage) -> Record:
    return _whole_dialogue(raw, first_of(raw, SHAREGPT, "conversations"), stage)


def _whole_dialogue(raw: Raw, field: str, stage: Stage) -> Record:
    """A dialogue up to its last answer, and the answer; PPO may have one that asks for it."""
    turns = _with_system(raw, message_list(required(raw, field), field))
    if stage == "ppo" and turns[-1]["role"] in ("user", "tool"):
        return Record(turns, (), "")
    for label in LABELS:
        if isinstance(raw.get(label), bool) and stage != "ppo":
            _require_desirable(raw[label], stage)
    answers = [
        place
        for place, turn in enumerate(turns)
        if turn["role"] == "assistant" and place and turns[place - 1]["role"] in ("user", "tool")
    ]
    learned = [n for n in answers if stage == "ppo" or is_learnable(turns[n])]
    if not learned:
        if not any(turn["role"] == "user" for turn in turns):
            raise Unusable("dropped: an empty prompt")
        raise Unusable("dropped: a dialogue without an answer to learn")
    last = learned[-1]
    later = sum(turn["role"] == "assistant" for turn in turns[last + 1 :])
    return Record(turns[:last], (turns[last]["content"],), "", unlearned=later)


def _tldr_comparison(raw: Raw, stage: Stage) -> Record:
    info, summaries, choice = (required(raw, name) for name in ("info", "summaries", "choice"))
    if not isinstance(info, dict):
        raise RecordFault("'info' is not an object")
    if (
        not isinstance(summaries, list)
        or len(summaries) != 2
        or not all(isinstance(summary, dict) for summary in summaries)
    ):
        raise RecordFault("'summaries' is not a list of two objects")
    if type(choice) is not int or choice not in (0, 1):
        raise RecordFault(f"'choice' is {choice!r}, not 0 or 1")
    texts = [text_of(summary, "text") for summary in summaries]
    return Record(_tldr_prompt(info), (texts[choice], texts[1 - choice]), "")


def _tldr_post(raw: Raw, stage: Stage) -> Record:
    return Record(_tldr_prompt(raw), (text_of(raw, "summary"),), "")


def _tldr_prompt(info: Raw) -> Dialogue:
    """The prompt in the format of trl-lib/tldr, so that the data sets share their prompts."""
    if info.get("post") is None and info.get("article") is not None:
        return ({"role": "user", "content": f"ARTICLE: {text_of(info, 'article')}\n\nTL;DR:"},)
    subreddit, title, post = (text_of(info, name) for name in ("subreddit", "title", "post"))
    if not post:
        raise Unusable("dropped: an empty prompt")
    subreddit = subreddit.removeprefix("r/")
    content = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    return ({"role": "user", "content": content},)


READERS: dict[str, Callable[[Raw, Stage], Record]] = {
    "preference": _preference,
    "transcript": _transcript,
    "ranking": _ranking,
    "completions": _completions,
    "scored": _scored,
    "completion": _completion,
    "kto": _kto,
    "instruction": _alpaca,
    "messages": _messages,
    "conversations": _conversations,
    "tldr_comparison": _tldr_comparison,
    "tldr_post": _tldr_post,
}
