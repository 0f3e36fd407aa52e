"""Sources -> the records that a stage trains and evaluates on."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from training.data.fields import RecordFault, Unusable
from training.data.files import raw_records
from training.data.formats import (
    UNLEARNED_ANSWERS,
    Record,
    check_usable,
    group_of,
    parse_record,
    ranked_by_score,
)
from training.data.settings import DataSettings, Source, Stage
from training.data.split import chosen_at_random, normalized, stage_of
from training.data.tally import CountUp, Mistakes, Tally
from training.errors import UnreachableError, UserError

MAX_FAULTS = 20
"""Kinds of faults that are listed; the rest are only counted."""


@dataclass(frozen=True)
class StageRecords:
    """The records of a stage, and the counts of everything that was dropped or changed."""

    train: list[Record]
    eval: list[Record]
    tally: Tally


@dataclass
class Faults:
    """The faults in the data, and the sources that could not be reached."""

    found: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)

    def end(self) -> None:
        """Raise all faults together, if any: an UnreachableError if none is of another kind."""
        kind = UserError if self.found else UnreachableError
        if faults := self.found + self.unreachable:
            more = [f"... and {len(faults) - MAX_FAULTS} more"] if len(faults) > MAX_FAULTS else []
            raise kind(faults[:MAX_FAULTS] + more, "The data cannot be used:")


def read_records(settings: DataSettings, stage: Stage, held_out_only: bool = False) -> StageRecords:
    """Read the records of `stage`; training and evaluation share no prompt.

    Args:
        held_out_only: leave out the records to train on. Where evaluation has sources of its own,
            the others are not even read.

    Raises:
        UserError: files are unreadable, lines malformed or fields missing (each fault with file and
            line), or no records are left.
    """
    if held_out_only and settings.eval_sources:
        settings = settings.model_copy(update={"sources": []})
    tally = Tally()
    faults = Faults()
    counts = [tally.under(heading) for heading in headings(settings)]
    own = []
    for source, count in zip(settings.sources, counts, strict=False):
        usable = _usable(source, settings, stage, count, faults)
        own.append((source, count, _of_stage(usable, settings, stage, count)))
    evaluation = []
    for source, count in zip(settings.eval_sources, counts[len(own) :], strict=True):
        usable = _usable(source, settings, stage, count, faults)
        count("used for evaluation", len(usable))
        evaluation += usable
    faults.end()

    if not settings.eval_sources:
        records = [record for _, _, content in own for record in content]
        held_out = _held_out(records, settings)
        evaluation = [record for record in records if _key(record) in held_out]
    eval_keys = {_key(record) for record in evaluation}
    train: list[Record] = []
    seen: set[str] = set()
    for source, count, content in own:
        rest = [record for record in content if _key(record) not in eval_keys]
        count("kept for evaluation only", len(content) - len(rest))
        if stage == "ppo":
            rest = _distinct(rest, count, seen)
        rest = _weighted(rest, source, settings.split_seed)
        count(f"used by {stage}", len(rest))
        train += rest
    if stage == "ppo":
        evaluation = _distinct(evaluation, tally.under("evaluation"), set())
    train = _limited(train, settings.max_train_samples, settings, "training", tally)
    evaluation = _limited(evaluation, settings.max_eval_samples, settings, "evaluation", tally)
    if not held_out_only:
        _require(train, "training", stage, settings.sources, tally)
    if settings.eval_sources:
        _require(evaluation, "evaluation", stage, settings.eval_sources, tally)
    return StageRecords([] if held_out_only else train, evaluation, tally)


def headings(settings: DataSettings) -> list[str]:
    """Distinct names for the tally: those of the sources, then of the evaluation sources."""
    names = [source.label for source in settings.sources]
    names += [f"{source.label}, for evaluation" for source in settings.eval_sources]
    taken: Counter[str] = Counter()
    unique = []
    for name in names:
        taken[name] += 1
        unique.append(name if taken[name] == 1 else f"{name} (again, {taken[name]})")
    return unique


def _of_stage(
    records: list[Record], settings: DataSettings, stage: Stage, count: CountUp
) -> list[Record]:
    proportions, seed = settings.stage_proportions, settings.split_seed
    kept = [record for record in records if stage_of(_key(record), proportions, seed) == stage]
    count("belong to the other stages", len(records) - len(kept))
    return kept


def _key(record: Record) -> str:
    return normalized(record.prompt_text)


def _usable(
    source: Source, settings: DataSettings, stage: Stage, count: CountUp, faults: Faults
) -> list[Record]:
    parsed: list[Record] = []
    mistakes = Mistakes()
    try:
        for raw in raw_records(source, count):
            if raw.is_rest:
                faults.found.append(f"{raw.origin}: {raw.fault}")
                continue
            count("read")
            try:
                if raw.fault:
                    raise RecordFault(raw.fault)
                record = parse_record(
                    raw.value, raw.origin, stage, source.format, settings.train_on
                )
                if group := group_of(raw.value):
                    record = replace(record, group=group)
                parsed.append(record)
            except RecordFault as fault:
                mistakes.add(raw.origin, str(fault))
            except RecursionError:
                mistakes.add(raw.origin, "nested too deeply")
            except Unusable as reason:
                count(str(reason))
    except UnreachableError as error:
        faults.unreachable += error.faults
    except UserError as error:
        faults.found += error.faults
    if settings.on_bad_record == "stop":
        faults.found += mistakes.lines()
    else:
        for what, number in mistakes.left_out():
            count(what, number)
    records = []
    ranked = _with_rankings(parsed, count)
    largest = max((size for record in ranked for size in record.tie_sizes), default=1)
    for record in (replace(record, largest_tie=largest) for record in ranked):
        try:
            records.append(check_usable(record, stage))
        except Unusable as reason:
            count(str(reason))
        else:
            count(UNLEARNED_ANSWERS, record.unlearned if stage == "sft" else 0)
            tied = sum(size for size in record.tie_sizes if size > 1)
            count("responses tied with another one of their ranking", tied)
            count("responses behind the others of their ranking, in unknown order", record.unranked)
    return records


def _with_rankings(records: list[Record], count: CountUp) -> list[Record]:
    """The records, in which scored responses to one prompt have become one ranking."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.score is not None:
            groups.setdefault(_key(record), []).append(record)
    found = [record for record in records if record.score is None]
    for members in groups.values():
        first = members[0]
        scores = [member.score for member in members if member.score is not None]
        responses = [member.responses[0] for member in members]
        count("joined with others of their prompt into a ranking", len(members) - 1)
        ranking = ranked_by_score(first.prompt, responses, scores)
        found.append(replace(ranking, origin=first.origin, group=first.group))
    return found


def _held_out(records: list[Record], settings: DataSettings) -> set[str]:
    """The share `eval_fraction` of the distinct prompts: at least one, but never all."""
    keys = {_key(record) for record in records}
    if not settings.eval_fraction or len(keys) < 2:
        return set()
    count = min(max(1, round(settings.eval_fraction * len(keys))), len(keys) - 1)
    return chosen_at_random(keys, count, "eval", settings.split_seed)


def _distinct(records: list[Record], count: CountUp, seen: set[str]) -> list[Record]:
    kept = []
    for record in records:
        key = _key(record)
        if key not in seen:
            seen.add(key)
            kept.append(record)
    count("repeat a prompt, used once", len(records) - len(kept))
    return kept


def _weighted(records: list[Record], source: Source, seed: int) -> list[Record]:
    """Repeat every record floor(weight) times, and a random remaining fraction once more."""
    copies = int(source.weight)
    extra = round((source.weight - copies) * len(records))
    if copies == 1 and not extra:
        return records
    chosen = chosen_at_random(range(len(records)), extra, "weight", seed, source.path)
    return [
        record for index, record in enumerate(records) for _ in range(copies + (index in chosen))
    ]


def _limited(
    records: list[Record], limit: int | None, settings: DataSettings, name: str, tally: Tally
) -> list[Record]:
    if limit is None or limit >= len(records):
        return records
    option = "max_train_samples" if name == "training" else "max_eval_samples"
    tally.add(name, f"left out by {option}", len(records) - limit)
    chosen = chosen_at_random(range(len(records)), limit, "limit", settings.split_seed)
    return [record for index, record in enumerate(records) if index in chosen]


def _require(
    records: list[Record], what: str, stage: Stage, sources: Sequence[Source], tally: Tally
) -> None:
    if not records:
        paths = ", ".join(source.path for source in sources)
        lines = tally.lines() or ["no records"]
        raise UserError(lines, f"No {what} records are left for the stage {stage!r} in {paths}:")
