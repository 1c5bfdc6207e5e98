"""Text in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """Return a table in Markdown: the first ``text_columns`` columns hold text, the others numbers."""
    rule = "|" + "---|" * text_columns + "---:|" * (len(head) - text_columns)
    return "\n".join((f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)))


def as_code(name: str) -> str:
    """Return a name as code, which may stand in a table: a bar doesn't end its cell."""
    return f"`{name}`".replace("|", r"\|")


def as_sentence(text: str) -> str:
    """Return a text with a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
