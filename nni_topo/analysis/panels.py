"""Pictures of several panels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_Item = TypeVar("_Item")


def panels(
    items: Iterable[tuple[str, _Item]],
    draw: Callable[[Axes, _Item], None],
    *,
    size: tuple[float, float] = (4.2, 3.4),
    columns: int = 3,
) -> Figure:
    """Draw each item in a panel of a size in inches, its name above it, so many beside each other."""
    named = list(items)
    across = min(columns, len(named))
    down = -(-len(named) // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis, (name, item) in zip(axes, named, strict=False):
        draw(axis, item)
        axis.set_title(name, fontsize="small")
    for axis in axes[len(named) :]:
        axis.remove()
    return figure
