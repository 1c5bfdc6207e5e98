"""A report as one self-contained HTML file, or in Markdown: a sentence, tables, notes and pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.figure import Figure

from nni_topo.disk import without_folders
from nni_topo.network.runtime.reports import markdown_table

LONG = 40  # tables with more rows are folded
NAMES = {
    "macs": "MACs",
    "flops": "MACs",
    "params": "parameters",
    "flops share": "share of the MACs",
    "latency share": "share of the time",
    "latency": "time",
    "latency ms": "ms",
    "latency before ms": "ms, unpruned",
    "latency batch": "samples in a batch",
    "lr": "learning rate",
    "asked": "channels asked for",
    "is kept": "kept",
    "is chosen": "chosen",
    "is met": "met",
}
"""Names of values for a reader, by their names in files without underscores."""


@dataclass(frozen=True)
class Part:
    """A part of a report: a table whose first ``text_columns`` columns hold text, notes, a picture as HTML, or text."""

    title: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text_columns: int = 1
    notes: Sequence[str] = ()  # a paragraph each
    picture: str = ""
    text: str = ""  # shown as it is, in letters of equal width
    folded: bool = False
    foot: str = ""  # below the table


def html_page(title: str, sentences: Sequence[str], parts: Iterable[Part]) -> str:
    """Return a report as an HTML page without links to other files; ``sentences`` stand below its title."""
    environment = Environment(autoescape=True)
    environment.filters["without_folders"] = without_folders  # other people may read a report
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return environment.from_string(template).render(title=title, sentences=sentences, parts=list(parts))


def markdown_page(title: str, sentences: Sequence[str], parts: Iterable[Part]) -> str:
    """Return a report in Markdown, without its pictures."""
    blocks = [f"# {title}", *sentences] if title else [*sentences]
    for part in parts:
        if part.picture:
            continue
        if part.title:
            blocks.append(f"## {part.title}")
        blocks += part.notes
        if part.rows:
            head = part.head or [""] * len(part.rows[0])
            blocks.append(markdown_table(head, part.rows, text_columns=part.text_columns))
        if part.text:
            blocks.append(f"```text\n{part.text}\n```")
        if part.foot:
            blocks.append(part.foot)
    return "\n\n".join(map(without_folders, blocks)) + "\n"


def picture_part(title: str, picture: bytes | Figure) -> Part:
    """Return a PNG file's content or a figure as a part."""
    if isinstance(picture, Figure):
        stream = io.BytesIO()
        picture.savefig(stream, format="png", dpi=130)
        picture = stream.getvalue()
    data = base64.b64encode(picture).decode()
    return Part(title, picture=f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')


def table_part(title: str, entries: Sequence[Mapping[str, Any]], *, folded: bool = False) -> Part:
    """Return entries as a table, with columns of text first and without columns of nested values."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    shown = [name for name in names if all(is_single(entry.get(name)) for entry in entries)]
    shown = [name for name in shown if any(entry.get(name) not in (None, "") for entry in entries)]
    words = [name for name in shown if any(isinstance(entry.get(name), str) for entry in entries)]
    shown.sort(key=lambda name: name not in words)
    rows = [[value_in_words(entry.get(name)) for name in shown] for entry in entries]
    return Part(title, [name_in_words(name) for name in shown], rows, len(words), folded=folded or len(rows) > LONG)


def name_in_words(name: str) -> str:
    """Return the name of a value as a reader knows it."""
    words = str(name).replace("_", " ")
    return NAMES.get(words, words)


def value_in_words(value: Any) -> str:
    """Return a number, a flag, a text or a short list as a cell shows it."""
    if isinstance(value, list):
        return ", ".join(map(value_in_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def is_single(value: Any) -> bool:
    """Whether a value fits into a cell: no mapping, and no long or nested list."""
    return not isinstance(value, (Mapping, list)) or (
        isinstance(value, list) and len(value) <= 8 and not any(isinstance(item, (Mapping, list)) for item in value)
    )
