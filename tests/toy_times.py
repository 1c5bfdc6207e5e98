"""Tables of times that are stated, not measured: what a busy machine takes for layers this small says nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nni_topo.network import LatencyTable, LayerLatency

LAYERS = ("stem", "inner", "hidden")
_SIZES = {"stem": (3, 8), "inner": (8, 8), "hidden": (8, 16), "head": (16, 4)}


def proportional(each: Mapping[str, float], widths: Iterable[str] = LAYERS) -> LatencyTable:
    """A table of the toy model in which a layer's seconds are its products of widths, times a factor."""
    layers = {}
    for name in (*widths, "head"):
        entering, leaving = ((1, size) for size in _SIZES[name])
        seconds = tuple(tuple(each.get(name, 0.0) * i * o for o in leaving) for i in entering)
        layers[name] = LayerLatency(entering, leaving, seconds, activation=float(leaving[-1]))
    return LatencyTable(layers)
