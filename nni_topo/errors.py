"""Exceptions that the package raises on purpose.

Every message states the rule, then the value that broke it, then where the value was found.
"""

from __future__ import annotations

import difflib
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class NniTopoError(Exception):
    """Base class of the package's errors; ``page`` is the documentation page about the error, if it has one."""

    page = ""


class ConfigError(NniTopoError, ValueError):
    """A config_list, an argument or a name that can't be used."""


class LayerError(ConfigError):
    """Layers that a pruner can't prune; ``layers`` holds their names."""

    def __init__(self, message: str, layers: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.layers = tuple(layers)


class GradientError(ConfigError):
    """A network that can't be trained, because its outputs have no gradients."""


class DataError(NniTopoError, ValueError):
    """Tensors, files or data sets that can't be used, such as NaN weights, missing files or wrong shapes."""


class SpeedupError(NniTopoError, RuntimeError):
    """Masks from which no dense model with the same outputs can be made."""

    page = "docs/compatibility.md"


class ExportError(NniTopoError, RuntimeError):
    """A network whose exported file wouldn't compute the same outputs."""

    page = "docs/export.md"


class CompatibilityError(NniTopoError, RuntimeError):
    """An installed NNI or PyTorch that the package doesn't work with."""

    page = "docs/compatibility.md"


_MOST_NAMES = 30  # that a message lists; more make it unreadable


def unknown_name(kind: str, name: str, known: Iterable[str], place: str) -> ConfigError:
    """Return the error for an unknown name of some ``kind``, with the most similar known names.

    ``place``: the function, file or setting that got the name.
    """
    return ConfigError(f"{kind} must be a known name, got {name!r}; {hint_of(name, known)} ({place})")


def hint_of(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the most similar known names, or all known names."""
    names = sorted({each for each in known if each})
    near = _nearest(name, names)
    if near:
        return f"did you mean {', '.join(near)}?"
    return f"known: {listed(names, _MOST_NAMES)}" if names else "no name is known"


def _nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return at most three known names that are similar to an unknown one, the most similar first."""
    folded = {each.casefold(): each for each in sorted(filter(None, known))}  # capitals are a frequent mistake ("L1")
    wanted = name.casefold()
    if wanted in folded:
        return [folded[wanted]]
    # Very similar names first (typing errors), then known names that begin the unknown one ("l1" of "l1norm").
    begun = sorted((each for each in folded if len(each) > 1 and wanted.startswith(each)), key=len, reverse=True)
    mistyped, similar = (difflib.get_close_matches(wanted, folded, n=3, cutoff=cutoff) for cutoff in (0.8, 0.5))
    near = list(dict.fromkeys([*mistyped, *begun, *similar]))
    if not near and len(name) > 2:
        near = [each for each in folded if wanted in each]
    return [folded[each] for each in near[:3]]


def shown(value: Any) -> str:
    """Return a value's repr for a message: in one line, at most 100 characters."""
    return _cut(" ".join(repr(value).split()), 100)


def _cut(words: str, most: int = 200) -> str:
    return words if len(words) <= most else f"{words[: most - 3]}..."


# Files that aren't the user's code: Python's standard library, this package and generated code.
_NOT_USERS = (sysconfig.get_path("stdlib"), str(Path(__file__).parent), "<eval_with_key>", "<frozen ", "<string>")


def raised(error: BaseException) -> str:
    """Describe an error that a user's code has raised, with the last line of the user's own files that led to it.

    Of a message with several lines, the first is shown; all lines if the first ends with a colon; the last if the
    message holds a traceback, as errors of DataLoader's workers and TorchScript do.
    """
    lines = [" ".join(line.split()) for line in words_of(error).splitlines() if line.strip()]
    if any("Traceback" in line for line in lines):
        lines = lines[-1:]
    elif lines and not lines[0].endswith(":"):
        lines = lines[:1]
    kind = type(error).__name__
    told = _cut(" ".join(lines).removeprefix(f"{kind}: ").rstrip(".,:; "))
    told = f"{kind}{told and ': '}{told}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        is_installed = not {"site-packages", "dist-packages"}.isdisjoint(Path(frame.filename).parts)
        if not is_installed and not frame.filename.startswith(_NOT_USERS):
            return f"{told}, at `{_cut(frame.line or frame.name)}` in {frame.filename}:{frame.lineno}"
    return told


def words_of(error: BaseException) -> str:
    """Return an error's message without unprintable characters; empty if its ``__str__`` fails."""
    try:
        words = str(error)
    except Exception:
        return ""
    return "".join(each if each.isprintable() or each.isspace() else " " for each in words)


def out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out; on a CPU only the text of PyTorch's error says so."""
    is_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_of_memory or "can't allocate memory" in words_of(error)


def listed(names: Iterable[str], most: int = 4) -> str:
    """List the first ``most`` names and count the others, so that a message stays short."""
    found = list(names)
    # A single further name is as short as "and 1 more".
    if len(found) <= most + 1:
        return ", ".join(found)
    return f"{', '.join(found[:most])} and {len(found) - most} more"
