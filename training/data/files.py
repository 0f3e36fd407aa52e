"""Sources -> raw records, each with its origin."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.data.settings import Source
from training.data.tally import CountUp
from training.errors import UnreachableError, UserError, did_you_mean

BAD_UNICODE = "with invalid Unicode, replaced by U+FFFD"

STRUCTURED = (
    *"messages conversations conversation responses ranking scores completions history".split(),
    *"summaries info choice label kto_tag score helpfulness".split(),
)
"""Fields that are never texts; in a table they are written as JSON."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class RawRecord:
    """A JSON object and where it came from, or the fault found there."""

    origin: str
    value: dict[str, Any]
    fault: str = ""
    is_rest: bool = False
    """The fault hides what follows it: it cannot be left out as one record."""
    is_table_row: bool = False
    """All values are texts, whatever they stand for."""


def raw_records(source: Source, count: CountUp) -> Iterator[RawRecord]:
    """Yield every record of a source; a malformed one carries a fault instead of a value.

    Args:
        count: counts the records that had to be changed.

    Raises:
        UserError: the source as a whole cannot be read.
    """
    try:
        records = _from_source(source, count)
        if source.files and source.split != "train":
            records = _part(list(records), source)
        yield from (_renamed(record, source) for record in records)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source.path}: unreadable: {_one_line(error)}") from None


def _from_source(source: Source, count: CountUp) -> Iterator[RawRecord]:
    folder = Path(source.path)
    if files := source.files:
        for file in files:
            yield from _from_file(file, count)
    elif any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        yield from _from_saved(source)
    else:
        yield from _from_datasets(source)


def _part(records: list[RawRecord], source: Source) -> Iterator[RawRecord]:
    """The part of a file's records that `split` names, as `datasets` counts it."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute({"train": len(records)})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{source.label}: {_one_line(error)}") from None
    for part in parts:
        yield from records[part.from_ : part.to]


def _renamed(record: RawRecord, source: Source) -> RawRecord:
    """The record under the formats' names of its fields; cells of tables get their types."""
    value = record.value
    if source.field_map and not record.fault:
        for ours, theirs in source.field_map.items():
            if theirs not in value:
                near = did_you_mean(theirs, value) if value else ""
                fault = f"no {theirs!r}, which field_map names for {ours!r}{near}"
                return RawRecord(record.origin, {}, fault)
        named = {ours: value[theirs] for ours, theirs in source.field_map.items()}
        others = set(source.field_map.values())
        value = {key: part for key, part in value.items() if key not in others} | named
    if record.is_table_row:
        value = {key: _typed(key, cell) for key, cell in value.items()}
    return record if value is record.value else replace(record, value=value)


def _typed(name: str, cell: str) -> Any:
    """The value that a cell of a CSV table stands for, which itself is always text."""
    if name in STRUCTURED or (name in ("prompt", "chosen", "rejected") and cell[:2] == "[{"):
        try:
            return json.loads(cell.lower() if cell in ("True", "False") else cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _from_file(path: str, count: CountUp) -> Iterator[RawRecord]:
    lower = path.lower()
    if lower.endswith(".parquet"):
        yield from _from_parquet(path)
        return
    opener: Any = gzip.open if lower.endswith(".gz") else open
    with opener(path, "rb") as file:
        plain = lower.removesuffix(".gz")
        if plain.endswith((".csv", ".tsv")):
            yield from _from_table(
                path, file.read(), "\t" if plain.endswith(".tsv") else ",", count
            )
            return
        if plain.endswith(".json"):
            content = file.read()
            if content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                yield from _from_array(path, content, count)
                return
            file = content.split(b"\n")
        yield from _from_lines(path, file, count)


def _from_table(path: str, content: bytes, delimiter: str, count: CountUp) -> Iterator[RawRecord]:
    """Rows under a line with the names of the columns; each knows the line that it begins in."""
    text, replaced = _decoded(content)
    if replaced:
        count(BAD_UNICODE)
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        columns = next(rows, [])
        while True:
            line = rows.line_num + 1
            row = next(rows, None)
            if row is None:
                return
            origin = f"{path}:{line}"
            if len(row) > len(columns):
                fault = f"{len(row)} cells under {len(columns)} names of columns"
                yield RawRecord(origin, {}, fault)
            elif row:
                value = dict(zip(columns, row, strict=False))
                yield RawRecord(origin, value, is_table_row=True)
    except csv.Error as error:
        yield RawRecord(f"{path}:{line}", {}, f"malformed CSV: {_one_line(error)}", is_rest=True)


def _from_lines(path: str, lines: Iterable[bytes], count: CountUp) -> Iterator[RawRecord]:
    for number, line in enumerate(lines, start=1):
        origin = f"{path}:{number}"
        text, replaced = _decoded(line)
        if not text.strip():
            continue
        try:
            value = json.loads(text.rstrip())
        except (ValueError, RecursionError) as error:
            yield RawRecord(origin, {}, f"malformed JSON: {_json_message(error)}")
            continue
        yield _checked(origin, value, text, replaced, count)


def _from_array(path: str, content: bytes, count: CountUp) -> Iterator[RawRecord]:
    """Yield the elements of one JSON array, decoded one by one to know the line of each."""
    text, replaced = _decoded(content)
    if replaced:
        count(BAD_UNICODE)
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        fault = f"malformed JSON: {_json_message(error)}"
        yield RawRecord(f"{path}:{line}", {}, fault, is_rest=True)
        return
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    position = text.index("[") + 1
    line = 1 + text.count("\n", 0, position)
    while True:
        start = between.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", position, start)
        if text[start] == "]":
            return
        value, position = decoder.raw_decode(text, start)
        element = text[start:position]
        yield _checked(f"{path}:{line}", value, element, False, count)
        line += element.count("\n")


def _from_parquet(path: str) -> Iterator[RawRecord]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield RawRecord(f"{path}:{number}", value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: unreadable: {_one_line(error)}") from None


def _from_saved(source: Source) -> Iterator[RawRecord]:
    """A folder that `save_to_disk` wrote: a data set, or several splits."""
    import datasets

    try:
        loaded = datasets.load_from_disk(source.path)
        splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
        lengths = {str(name): len(rows) for name, rows in splits.items()}
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(lengths)
    except (ValueError, AssertionError, OSError, LookupError, TypeError) as error:
        raise UserError(f"{source.label}: cannot be loaded: {_one_line(error)}") from None
    for part in parts:
        rows = splits[part.splitname].select(range(part.from_, part.to))
        for number, value in enumerate(rows, start=part.from_ + 1):
            yield RawRecord(f"{source.label}:{number}", value)


def _from_datasets(source: Source) -> Iterator[RawRecord]:
    import datasets

    try:
        loaded = datasets.load_dataset(
            source.path, name=source.name, data_dir=source.data_dir, split=source.split
        )
    # The Hub, the network and dataset builders raise many exceptions; all are for the user to fix.
    except Exception as error:
        kind = UnreachableError if isinstance(error, ConnectionError) else UserError
        raise kind(f"{source.path}: cannot be loaded: {_one_line(error)}") from None
    for number, value in enumerate(loaded, start=1):
        yield RawRecord(f"{source.label}:{number}", value)


def _decoded(content: bytes) -> tuple[str, bool]:
    """The text, and whether bytes that are not UTF-8 had to be replaced."""
    try:
        return content.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return content.decode("utf-8-sig", errors="replace"), True


def _checked(origin: str, value: Any, text: str, replaced: bool, count: CountUp) -> RawRecord:
    if not isinstance(value, dict):
        return RawRecord(origin, {}, f"an object was expected, not {type(value).__name__}")
    if _ESCAPED_SURROGATE.search(text):
        value, has_lone = _without_lone_surrogates(value)
        replaced = replaced or has_lone
    if replaced:
        count(BAD_UNICODE)
    return RawRecord(origin, value)


def _without_lone_surrogates(value: Any) -> tuple[Any, bool]:
    """Replace lone surrogates (half of an escaped pair), which no tokenizer can encode."""
    if isinstance(value, str):
        sound = _SURROGATE.sub("\ufffd", value)
        return sound, sound != value
    if isinstance(value, list):
        parts = [_without_lone_surrogates(part) for part in value]
        return [part for part, _ in parts], any(changed for _, changed in parts)
    if isinstance(value, dict):
        pairs = _without_lone_surrogates([[key, part] for key, part in value.items()])
        return dict(pairs[0]), pairs[1]
    return value, False


def _json_message(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
