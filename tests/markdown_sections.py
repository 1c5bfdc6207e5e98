"""Markdown pages by headings, as GitHub and MkDocs link to them."""

from __future__ import annotations

import re
from pathlib import Path

HEADING = re.compile(r"^(#+) (.*)$", re.M)


def anchor(heading: str) -> str:
    """Return what a link to a heading has after its #."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def sections(page: Path) -> dict[str, str]:
    """Each section's text by its anchor, subsections included; the whole page by an empty one."""
    return sections_of(page.read_text(encoding="utf-8"))


def sections_of(page: str) -> dict[str, str]:
    """The sections of a page's text."""
    text = re.sub(r"```.*?```", lambda found: found[0].replace("#", " "), page, flags=re.S)
    headings = list(HEADING.finditer(text))
    found = {"": text}
    for number, heading in enumerate(headings):
        level = len(heading[1])
        after = [other.start() for other in headings[number + 1 :] if len(other[1]) <= level]
        found.setdefault(anchor(heading[2]), text[heading.start() : min(after, default=len(text))])
    return found
