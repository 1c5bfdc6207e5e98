"""Which patches NNI needed with the installed PyTorch and Python, and what came of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["applied", "unneeded", "failed"]


class CompatibilityWarning(UserWarning):
    """The installed NNI isn't a known one, or a patch couldn't be put in place."""


@dataclass(frozen=True)
class PatchResult:
    """The outcome of one patch.

    Parameters
    ----------
    name : str
        The patch's function name.
    outcome : {"applied", "unneeded", "failed"}
        ``"unneeded"`` where NNI or PyTorch is already right.
    reason : str, default ""
        Why the patch failed; empty otherwise.
    """

    name: str
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class CompatReport:
    """The outcome of all patches, in the order in which they ran.

    Parameters
    ----------
    nni, torch, python : str
        The versions found.
    results : tuple of PatchResult
        One entry per patch.
    """

    nni: str
    torch: str
    python: str
    results: tuple[PatchResult, ...]

    @property
    def applied(self) -> tuple[str, ...]:
        """Names of the patches that changed something."""
        return self._names("applied")

    @property
    def unneeded(self) -> tuple[str, ...]:
        """Names of the patches that found everything right."""
        return self._names("unneeded")

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the patches that couldn't be put in place."""
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
