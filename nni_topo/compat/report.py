"""What was found and mended when NNI met the installed PyTorch and Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["applied", "unneeded", "failed"]


class CompatibilityWarning(UserWarning):
    """The installed NNI isn't a known one, or a mend couldn't be put in place."""


@dataclass(frozen=True)
class MendResult:
    """The outcome of one mend.

    Parameters
    ----------
    name : str
        The mend's function name.
    outcome : {"applied", "unneeded", "failed"}
        ``"unneeded"`` where NNI or PyTorch is already right.
    reason : str, default ""
        Why the mend failed; empty otherwise.
    """

    name: str
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class CompatReport:
    """The outcome of all mends, in the order in which they ran.

    Parameters
    ----------
    nni, torch, python : str
        The versions found.
    results : tuple of MendResult
        One entry per mend.
    """

    nni: str
    torch: str
    python: str
    results: tuple[MendResult, ...]

    @property
    def applied(self) -> tuple[str, ...]:
        """Names of the mends that changed something."""
        return self._names("applied")

    @property
    def unneeded(self) -> tuple[str, ...]:
        """Names of the mends that found everything right."""
        return self._names("unneeded")

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the mends that couldn't be put in place."""
        return self._names("failed")

    def __str__(self) -> str:
        parts = [f"NNI {self.nni}, torch {self.torch}, Python {self.python}"]
        parts += [
            f"applied: {', '.join(self.applied) or 'none'}",
            f"not needed: {', '.join(self.unneeded) or 'none'}",
        ]
        parts += [f"failed: {result.name} ({result.reason})" for result in self.results if result.outcome == "failed"]
        return "; ".join(parts)

    def _names(self, outcome: Outcome) -> tuple[str, ...]:
        return tuple(result.name for result in self.results if result.outcome == outcome)
