"""Pictures: one panel or several, and what all panels have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_Item = TypeVar("_Item")


def single(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of a size in inches with one panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def finish(axis: Axes, xlabel: str = "", ylabel: str = "", *, columns: int = 1, **settings: Any) -> None:
    """Label a panel, put a grid under it and, where lines have labels, a legend of so many columns on it."""
    axis.set(xlabel=xlabel, ylabel=ylabel, **settings)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="xx-small", ncols=columns)


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
