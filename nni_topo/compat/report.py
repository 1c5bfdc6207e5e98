"""Which patches NNI needed with the installed PyTorch and Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


class CompatibilityWarning(UserWarning):
    """The installed NNI isn't a known one, or a patch couldn't be put in place."""


@dataclass(frozen=True)
class CompatReport:
    """The outcome of all patches, by the names of their functions, in the order in which they ran.

    Parameters
    ----------
    nni, torch, python : str
        The versions found.
    applied : tuple of str
        Patches that changed something.
    unneeded : tuple of str
        Patches that found NNI or PyTorch right.
    failed : mapping of str to str
        Patches that couldn't be put in place, with the error.
    """

    nni: str
    torch: str
    python: str
    applied: tuple[str, ...]
    unneeded: tuple[str, ...]
    failed: Mapping[str, str]

    def __str__(self) -> str:
        parts = [
            f"NNI {self.nni}, torch {self.torch}, Python {self.python}",
            f"applied: {', '.join(self.applied) or 'none'}",
            f"not needed: {', '.join(self.unneeded) or 'none'}",
        ]
        return "; ".join([*parts, *(f"failed: {name} ({reason})" for name, reason in self.failed.items())])
