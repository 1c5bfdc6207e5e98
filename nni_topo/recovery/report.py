"""What a compensation did, layer by layer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import pandas

P = ParamSpec("P")
Made = TypeVar("Made")

LOST = 0.9


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer; errors are mean squared distances from the unpruned network over its variance."""

    layer: str
    # node of the graph at which errors are measured: the layer's output, or the sum it goes into, for channel mixing
    # its input, for method "ahead" the unpruned values after later layers; in "relu(...)" only what a ReLU lets
    # through counts, and errors are upper bounds
    place: str
    unknowns: int  # inputs of each equation, the intercept not counted; for "ahead" all weights and constants
    samples: int  # that were solved for: images times positions, for "ahead" also times channels
    ridge: float  # penalty over each input's variance, for "ahead" damping; infinite if no change was best
    error_before: float  # over the calibration samples
    error_after: float
    error_held_out: float  # over samples that the solution wasn't fitted to; NaN if there were too few
    seconds: float  # wall time

    @property
    def is_lost(self) -> bool:
        """Whether almost nothing of the unpruned output is kept."""
        return self.error_held_out > LOST

    @property
    def is_underdetermined(self) -> bool:
        """Whether there were fewer samples than unknowns, so that the ridge alone decides."""
        return self.samples < self.unknowns


@dataclass(frozen=True)
class CompensationReport:
    """What happened to all layers.

    Attributes
    ----------
    layers : tuple of LayerReport
        The equations that were solved, in order. A layer in front of an addition may come twice.
    left_alone : dict of str to str
        Layers after pruned channels that couldn't be reconstructed, and why.
    images : int
        Calibration images.
    seconds : float
        Wall time.
    """

    layers: tuple[LayerReport, ...]
    left_alone: dict[str, str]
    images: int
    seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the solutions doubtful, with what to do about it."""
        found = []
        # A layer that is refined is there once a step.
        few = {layer.layer: layer for layer in self.layers if layer.is_underdetermined}
        if few:
            named = ", ".join(f"{name} ({layer.samples} of {layer.unknowns})" for name, layer in few.items())
            found.append(
                f"calibration should have more samples than a layer has unknowns, got fewer for: {named}; hand on more "
                "images, or take method='scalar', which has one unknown a channel"
            )
        if self.lost:
            found.append(f"layers whose output is almost lost: {', '.join(self.lost)}")
        return tuple(found)

    @property
    def lost(self) -> tuple[str, ...]:
        """Layers whose output is almost lost."""
        return tuple(dict.fromkeys(layer.layer for layer in self.layers if layer.is_lost))

    def to_frame(self) -> pandas.DataFrame:
        """Return a table, one row for each equation, then one for each layer that couldn't be reconstructed."""
        import pandas

        rows = [{**dataclasses.asdict(layer), "note": _note(layer)} for layer in self.layers]
        rows += [{"layer": name, "note": f"left alone: {reason}"} for name, reason in self.left_alone.items()]
        columns = [*(field.name for field in dataclasses.fields(LayerReport)), "note"]
        return pandas.DataFrame(rows, columns=columns)


def _note(layer: LayerReport) -> str:
    notes = ["lost"] * layer.is_lost + ["fewer samples than unknowns"] * layer.is_underdetermined
    return ", ".join(notes)


def signed_like(other: Callable[P, Any]) -> Callable[[Callable[..., Made]], Callable[P, Made]]:
    """Give a function the parameters of another, to which it hands them on."""

    def sign(function: Any) -> Any:
        own = inspect.signature(function)
        function.__signature__ = inspect.signature(other).replace(return_annotation=own.return_annotation)
        return function

    return sign
