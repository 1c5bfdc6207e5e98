"""The report of a model that was pruned block by block."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nni_topo.network.io.vocabulary import VocabularyReport
from nni_topo.pruners.budget import BudgetOutcome
from nni_topo.recovery.likeness import Estimate, Likeness

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class BlockRow:
    """The result of pruning one block."""

    block: str  # its name in the unpruned model
    params_before: int
    params: int
    # Mean squared distance between the states after the pruned and after the unpruned blocks up to this one, over the
    # variance of the unpruned states, on held-out samples.
    distance: float
    calibration_distance: float  # the same on the calibration data
    is_distilled: bool  # whether distilled weights were kept
    seconds: float  # wall time


@dataclass(frozen=True, repr=False)
class StreamingReport:
    """How a model was pruned block by block; its ``repr`` is a table with notes.

    Attributes
    ----------
    blocks : tuple of BlockRow
        The blocks in their order.
    params_before, params : int
        Parameters of the unpruned and of the pruned model.
    widths : dict of str to tuple of int
        For each layer of a block, the output channels before and after; all blocks have the same.
    budget : BudgetOutcome
        Whether the budget was met, and why not.
    likeness : Likeness
        On held-out samples, with 95 % intervals: ``distance``, the mean squared distance from the unpruned model's
        outputs over their variance, and ``agreement``, the share of places with the same largest output; NaN if outputs
        aren't scores of classes or tokens.
    samples : int
        Number of calibration samples.
    held_out : int
        Number of held-out samples, on which no weight was solved.
    pruner : str
        Name of the pruner.
    recovery : str
        Name of the recovery method; empty if no weights were reconstructed.
    warnings : tuple of str
        Reasons to doubt the figures.
    vocabulary : VocabularyReport or None
        Tokens and parameters before and after the vocabulary was trimmed, if it was.
    read_as : str
        What the model's outputs hold, in words, and what agreement means.
    """

    blocks: tuple[BlockRow, ...]
    params_before: int
    params: int
    widths: dict[str, tuple[int, int]]
    budget: BudgetOutcome
    likeness: Likeness
    samples: int
    held_out: int
    pruner: str
    recovery: str
    warnings: tuple[str, ...] = ()
    vocabulary: VocabularyReport | None = None
    read_as: str = ""

    def to_frame(self) -> pandas.DataFrame:
        """Return the blocks as a table, one row each."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.blocks])

    def _outputs(self) -> str:
        """Say how much the model's outputs change."""
        distance, agreement = self.likeness.distance, self.likeness.agreement
        told = f"distance of the outputs {distance.value:.4g} ({distance.low:.3g}-{distance.high:.3g})"
        if not math.isnan(agreement.value):
            told += f", agreement {agreement.value:.4g} ({agreement.low:.3g}-{agreement.high:.3g})"
        kind = "held-out" if self.held_out else "calibration"
        return f"{told}, on {self.held_out or self.samples} {kind} samples, with 95 % intervals"

    def __repr__(self) -> str:
        lines = [self.to_frame().to_string(index=False, float_format=lambda value: f"{value:.4g}")]
        lines.append(self._outputs())
        if self.read_as:
            lines.append(self.read_as)
        lines.append(f"parameters: {self.params_before:,} before, {self.params:,} after")
        if self.vocabulary is not None:
            lines.append(f"vocabulary: {self.vocabulary}")
        lines.append(str(self.budget))
        lines += [f"warning: {each}" for each in self.warnings]
        return "\n".join(lines)


def as_report(content: dict[str, Any]) -> StreamingReport:
    """Return a report from the content of its file."""
    return StreamingReport(
        **content
        | {
            "blocks": tuple(BlockRow(**row) for row in content["blocks"]),
            "widths": {name: (before, after) for name, (before, after) in content["widths"].items()},
            "budget": BudgetOutcome(**content["budget"]),
            "likeness": Likeness(**{name: Estimate(**each) for name, each in content["likeness"].items()}),
            "warnings": tuple(content["warnings"]),
            "vocabulary": VocabularyReport(**content["vocabulary"]) if content.get("vocabulary") else None,
        }
    )
