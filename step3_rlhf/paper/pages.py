"""What the pages for people share: the templates, sampled responses, and images as data URIs."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Sample:
    """A sampled response, ready to be shown."""

    text: str
    cut_at: int | None
    """The number of tokens after which it was cut; None where it ended by itself."""


def samples_of(responses: Iterable[dict[str, Any]], characters: int) -> list[Sample]:
    """Responses of instances.jsonl, each abbreviated to at most so many characters."""
    return [
        Sample(printable(r["text"], characters), None if r["ended"] else r["length"])
        for r in responses
    ]


def printable(text: str, characters: int) -> str:
    """`text` on one line, abbreviated, with U+FFFD for characters that cannot be shown."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return line if len(line) <= characters else line[: characters - 2] + " …"


def svg_uri(figure: "Figure") -> str:
    """A figure as a data URI, the same bytes every time."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _data_uri("image/svg+xml", buffer.getvalue())


def png_uri(path: Path) -> str:
    """A PNG file as a data URI."""
    return _data_uri("image/png", path.read_bytes())


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
