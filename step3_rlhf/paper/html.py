"""What the report pages share: tables, pictures, sampled responses, one style."""

from collections.abc import Iterable
from html import escape
from typing import Any


def table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "figures") -> str:
    """An HTML table from HTML cells; the first cell of each row is its heading."""
    parts = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = [f"<thead><tr>{parts}</tr></thead>"] if parts else []
    for first, *others in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return f'<div class="scroll"><table class="{kind}">{"".join(body)}</table></div>'


def picture(uri: str, alt: str) -> str:
    return f'<img src="{uri}" alt="{escape(alt)}">'


def responses_cell(responses: Iterable[dict[str, Any]], characters: int) -> str:
    """Sampled responses of instances.jsonl, each abbreviated to so many characters."""
    cells = []
    for response in responses:
        cut = "" if response["ended"] else f" <small>cut at {response['length']} tokens</small>"
        cells.append(f"<p><q>{escape(printable(response['text'], characters))}</q>{cut}</p>")
    return "".join(cells)


def printable(text: str, characters: int) -> str:
    """One line, abbreviated, with a substitute for characters that cannot be shown."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    if len(line) > characters:
        line = line[: characters - 2] + " …"
    return line


STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --muted: #626973; --line: #dfe3e8;
  --page: #f6f7f9; --card: #ffffff; --yes: #0b7a5b; --no: #b3401a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --muted: #9aa3ad; --line: #343a42;
  --page: #14171b; --card: #1d2126; --yes: #4fc79f; --no: #f08a5d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 12px; }
h2 { font-size: 21px; margin: 0 0 10px; }
h3 { font-size: 16px; margin: 24px 0 8px; }
p { margin: 0 0 14px; max-width: 88ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 24px; margin-top: 24px; }
small, .muted { color: var(--muted); }
.lead { font-size: 18px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0 4px; }
.tile { background: var(--card); border: 1px solid var(--line); border-left: 8px solid;
  border-radius: 8px; padding: 8px 18px 8px 14px; }
.tile span { display: block; color: var(--muted); font-size: 14px; }
.tile b { font-size: 26px; margin-right: 8px; font-variant-numeric: tabular-nums; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.scroll { overflow-x: auto; } .wide { min-width: 860px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
thead th { font-weight: 600; color: var(--muted); vertical-align: bottom; line-height: 1.3; }
th:first-child { text-align: left; font-weight: 600; padding-left: 0; }
table small { display: block; font-weight: 400; font-size: 12px; white-space: nowrap; }
table.figures { min-width: 40%; }
th i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 8px; }
th small { padding-left: 19px; }
.yes { color: var(--yes); } .no { color: var(--no); } .yes, .no { white-space: nowrap; }
table.samples td, table.samples thead th, table.phases td:last-child,
  table.phases thead th:last-child { text-align: left; }
table.samples td { width: 30%; overflow-wrap: anywhere; }
table.samples td small { display: inline; }
table.samples td p { margin: 0 0 4px; }
code { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; font-size: 14px;
  margin: 16px 0 0; }
dt { font-weight: 600; } dd { margin: 0; color: var(--muted); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 24px; }
.pair img { max-width: 520px; }
"""
