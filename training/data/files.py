"""Sources -> raw records, each with its origin."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.settings import Source
from training.data.tally import CountUp
from training.errors import UnreachableError, UserError

BAD_UNICODE = "with invalid Unicode, replaced by U+FFFD"

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class RawRecord:
    """A JSON object and where it came from, or the fault found there."""

    origin: str
    value: dict[str, Any]
    fault: str = ""


def raw_records(source: Source, count: CountUp) -> Iterator[RawRecord]:
    """Yield every record of a source; a malformed one carries a fault instead of a value.

    Args:
        count: counts the records that had to be changed.

    Raises:
        UserError: the source as a whole cannot be read.
    """
    try:
        if Path(source.path).is_file():
            yield from _from_file(source.path, count)
        else:
            yield from _from_datasets(source)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source.path}: unreadable: {_one_line(error)}") from None


def _from_file(path: str, count: CountUp) -> Iterator[RawRecord]:
    lower = path.lower()
    if lower.endswith(".parquet"):
        yield from _from_parquet(path)
        return
    opener: Any = gzip.open if lower.endswith(".gz") else open
    with opener(path, "rb") as file:
        if lower.removesuffix(".gz").endswith(".json"):
            content = file.read()
            if content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                yield from _from_array(path, content, count)
                return
            file = content.split(b"\n")
        yield from _from_lines(path, file, count)


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
        yield RawRecord(f"{path}:{line}", {}, f"malformed JSON: {_json_message(error)}")
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
        pairs = {key: _without_lone_surrogates(part) for key, part in value.items()}
        return {key: part for key, (part, _) in pairs.items()}, any(c for _, c in pairs.values())
    return value, False


def _json_message(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
