"""The report of weight reconstruction, layer by layer."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from nni_topo.context import in_context
from nni_topo.errors import listed

if TYPE_CHECKING:
    import pandas

P = ParamSpec("P")
_Made = TypeVar("_Made")

SMALL = 0.05
"""Held-out error below which no warning says that the samples are too few."""
LOST = 0.9
"""Held-out error above which a layer's output counts as almost lost: a constant has an error of 1."""


@dataclass(frozen=True)
class LayerReport:
    """Errors and settings of one solved layer.

    An error is the mean squared distance from the unpruned network's values, divided by their variance: 0 if they are
    equal, 1 if they are as far away as the values' mean is.
    """

    layer: str
    # The node of the graph at which errors are measured. It is the layer's output or the sum that the output goes into;
    # for "pair" the layer's input. "relu(...)" means that only what a ReLU lets through counts; errors are upper bounds
    # there.
    place: str
    unknowns: int  # numbers fitted for each output, the constant not counted
    samples: int  # images times positions
    ridge: float  # penalty over each input's variance; infinite if no change was best
    error_before: float  # over the calibration samples
    error_after: float
    # Over samples that this layer's solution wasn't fitted to; NaN if there were too few. The layers before it were
    # fitted to all samples, so the error on new samples is larger.
    error_held_out: float
    seconds: float  # wall time

    @property
    def is_lost(self) -> bool:
        """Whether the held-out error is above 0.9, so that the layer hardly does better than a constant."""
        return self.error_held_out > LOST

    @property
    def is_far(self) -> bool:
        """Whether the held-out error is at least 0.05 or NaN; a smaller one is good enough, however few the samples."""
        return not self.error_held_out < SMALL

    @property
    def is_underdetermined(self) -> bool:
        """Whether there were fewer samples than unknowns, so that only the ridge makes the solution unique."""
        return self.samples < self.unknowns


@dataclass(frozen=True, repr=False)
class CompensationReport:
    """The report of all layers; its ``repr`` is a table with warnings.

    Attributes
    ----------
    layers : tuple of LayerReport
        The equations that were solved, in order. A layer before an addition may come twice.
    left_alone : dict of str to str
        For each layer after removed channels that couldn't be reconstructed, the reason.
    images : int
        Number of calibration images on which the equations were solved.
    seconds : float
        Wall time.
    held_out : int
        Number of calibration images that are left out, so that distillation can judge on them.
    read_as : str
        What the model's outputs hold, in words; empty if they have no entry per sample.
    """

    layers: tuple[LayerReport, ...]
    left_alone: dict[str, str]
    images: int
    seconds: float
    held_out: int = 0
    read_as: str = ""

    def __repr__(self) -> str:
        columns = ["layer", "place", "unknowns", "samples", "error_before", "error_after", "error_held_out", "note"]
        table = self.to_frame()[columns].fillna({"place": ""})
        shown = table.to_string(index=False, max_colwidth=60, na_rep="", float_format=lambda value: f"{value:.4g}")
        lines = [shown] if len(table) else []
        held_out_note = f", {self.held_out} others left for distillation to judge on" if self.held_out else ""
        lines.append(f"{self.images} calibration inputs{held_out_note}, {self.seconds:.3g} s")
        lines += [self.read_as] if self.read_as else []
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to doubt the solutions, with advice."""
        sentences = []
        # A layer that is refined has a row for each step, with the same samples and unknowns.
        few = {layer.layer: layer for layer in self.layers if layer.is_underdetermined and layer.is_far}
        if few:
            scarcest = sorted(few.values(), key=lambda layer: layer.samples / layer.unknowns)
            named = listed([f"{layer.layer!r} ({layer.samples} of {layer.unknowns})" for layer in scarcest])
            # Samples grow with the images: each image has the same number of positions.
            most = max(math.ceil(self.images * layer.unknowns / max(layer.samples, 1)) for layer in few.values())
            sentences.append(
                f"calibration should have more samples than a layer has unknowns, got fewer for the layers {named}: "
                f"pass more inputs, here at least {most} instead of {self.images}"
            )
        lost = {layer.layer: layer for layer in self.layers if layer.is_lost}
        if lost:
            worst = sorted(lost.values(), key=lambda layer: -layer.error_held_out)
            named = listed([f"{layer.layer!r} ({layer.error_held_out:.3g})" for layer in worst])
            sentences.append(
                f"the outputs of these layers are almost lost: {named}. In parentheses is the squared distance from "
                f"the unpruned network on held-out samples, over the variance; above {LOST:g} an output is hardly "
                "better than a constant. Keep more of the channels that these layers read: prune the layers before "
                "them less, or leave those unpruned"
            )
        return tuple(sentences)

    def to_frame(self) -> pandas.DataFrame:
        """Return a table: a row for each equation, then a row for each layer that couldn't be reconstructed."""
        import pandas

        rows: list[dict[str, Any]] = []
        for layer in self.layers:
            notes = []
            if layer.is_lost:
                notes.append("output almost lost")
            if layer.is_underdetermined:
                notes.append("fewer samples than unknowns")
            rows.append({**dataclasses.asdict(layer), "note": ", ".join(notes)})
        rows += [{"layer": name, "note": f"not reconstructed: {reason}"} for name, reason in self.left_alone.items()]
        columns = [*(field.name for field in dataclasses.fields(LayerReport)), "note"]
        return pandas.DataFrame(rows, columns=columns)


def signed_like(template: Callable[P, Any]) -> Callable[[Callable[..., _Made]], Callable[P, _Made]]:
    """Give a function the signature of another one, to which it passes its arguments; errors name the function."""

    def sign(function: Any) -> Any:
        signature = inspect.signature(template).replace(return_annotation=inspect.signature(function).return_annotation)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            with in_context(called_as=(template.__name__, function.__name__)):
                return function(*args, **kwargs)

        run.__signature__ = signature  # type: ignore[attr-defined]
        return run

    return sign
