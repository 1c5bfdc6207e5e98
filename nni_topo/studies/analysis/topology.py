"""The topology of each layer before and after pruning: persistence diagrams, death times, progress of the search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import RenderableType
from torch import nn

from nni_topo.maths import topology
from nni_topo.maths.search.subsets import Generation
from nni_topo.network.runtime.arguments import CONFIG_LIST, MODEL
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.dependency import dependency_groups
from nni_topo.pruners.budget import Budget
from nni_topo.pruners.hooks import Masks
from nni_topo.pruners.topological import TopologicalPruner
from nni_topo.rules import all_of, whole
from nni_topo.runs.choices import Target
from nni_topo.runs.run import pruner_knobs
from nni_topo.runs.widths import inner_layers
from nni_topo.studies.pictures import finish, panels, single
from nni_topo.studies.study import Findings, Tell, TrainedStudy
from nni_topo.studies.tables import table_of

FloatArray = NDArray[np.float64]
_MOST_PANELS = 12
_DEGREES = all_of(whole(0), Sequence, least=1)
_DEGREE_COLORS = ("C0", "C1", "C2", "C3")


@dataclass(frozen=True)
class LayerTopology:
    """Topology of one unit (a layer, or a dependency group as one joint cloud) before and after pruning."""

    name: str  # names of the unit's targets
    points: int  # number of blocks before pruning
    kept: int  # number of blocks after pruning
    share: float  # share of the blocks that are kept, in (0, 1]
    deaths: FloatArray  # (points,): H0 death times of the cloud with the origin, descending, in units of their mean
    # Half the longest death time of the removed blocks, in units of the mean; a `sparse_threshold` just above it keeps
    # as many blocks. 0 if no block is removed. A topological allocation gives all layers nearly the same tolerance.
    tolerance: float
    diagrams_before: dict[int, FloatArray]  # by degree, births and deaths of the finite bars, (bars, 2)
    diagrams_after: dict[int, FloatArray]
    bottleneck: dict[int, float]  # by degree, bottleneck distance between both diagrams, without infinite bars
    hausdorff: float  # largest distance from a point to the nearest kept point; the origin counts as kept
    trace: list[Generation]  # the genetic algorithm's progress; empty for the greedy solver


@dataclass(frozen=True)
class TopologyStudy(Findings):
    """The layers of a pruned network, in the network's order."""

    stem, unwritten = "topology", ("masks",)
    layers: list[LayerTopology]
    masks: Masks

    def figures(self) -> dict[str, Figure]:
        """Return the pictures ``deaths``, ``allocation``, ``diagrams``, ``barcodes`` and ``search``.

        ``deaths`` shows the death times of all layers, ``allocation`` how many blocks they keep. The others show the
        layers with the most points, at most twelve. ``search`` shows the progress of the genetic algorithm, if it ran.
        """
        most = sorted(self.layers, key=lambda layer: -layer.points)[:_MOST_PANELS]
        titled = [(f"{_short(row.name)}: {row.points} to {row.kept}", row) for row in self.layers if row in most]
        searched = [(title, layer) for title, layer in titled if layer.trace]
        size, columns = (3.2, 2.8), 4
        figures = {
            "deaths": _death_curves(self.layers),
            "allocation": _allocation(self.layers),
            "diagrams": panels(titled, _draw_diagram, size=size, columns=columns),
            "barcodes": panels(titled, _draw_barcode, size=size, columns=columns),
        }
        if searched:
            figures["search"] = panels(searched, _draw_trace, size=size, columns=columns)
        return figures


@dataclass(frozen=True, kw_only=True)
class AnalyzeTopology(TrainedStudy[TopologyStudy]):
    """Compare layers' point clouds before and after topological pruning: diagrams, death times, search."""

    ratio: float = 0.5  # sparse_ratio of every layer, in [0, 1)
    flops: float | None = None  # instead of ratio: share of the MACs to keep, in (0, 1], allocated by death times
    degrees: tuple[int, ...] = (0, 1)  # degrees of homology, each at least 0
    calibration: int = 0  # training images for the functional cloud; 0: the weight cloud

    def check(self) -> None:
        self._target()
        _DEGREES.check("degrees", self.degrees, self.place)

    def _target(self) -> Target:
        if self.flops is None:
            return Target("ratio", self.ratio)
        return Target("flops", self.flops)

    def find(self, tell: Tell) -> TopologyStudy:
        target, start = self._target(), self.start()
        knobs = pruner_knobs("topological", start.net, start, self.calibration)
        config: dict[str, Any] = {"op_names": inner_layers(start.net, start.example)}
        if target.kind == "flops":
            # the budget is shared among layers by death times
            knobs["budget"] = Budget(flops=target.value, allocation="topological")
        else:
            config["sparse_ratio"] = target.value
        config_list = dependency_groups(start.net, start.example, [config])
        return study_topology(start.net, config_list, degrees=self.degrees, **knobs)

    def show(self, findings: TopologyStudy) -> Iterator[RenderableType]:
        columns = {"layer": "{name}", "points": "{points}", "kept": "{kept}"}
        columns |= {f"bottleneck H{degree}": f"{{bottleneck[{degree}]:.4f}}" for degree in self.degrees}
        rows = [vars(layer) for layer in findings.layers]
        yield table_of(f"topology of {self.model}", rows, {**columns, "Hausdorff": "{hausdorff:.4f}"})


@public(model=MODEL, config_list=CONFIG_LIST, degrees=_DEGREES)
def study_topology(
    model: nn.Module, config_list: list[dict[str, Any]], *, degrees: tuple[int, ...] = (0, 1), **knobs: Any
) -> TopologyStudy:
    """Prune a copy of a model by :class:`~nni_topo.TopologicalPruner` and compare the layers' point clouds.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it isn't changed.
    config_list : list of dict
        NNI's config_list.
    degrees : tuple of int, default=(0, 1)
        Degrees of the diagrams, each at least 0.
    **knobs
        Arguments of :class:`~nni_topo.TopologicalPruner`.

    Returns
    -------
    TopologyStudy

    Raises
    ------
    ConfigError, DataError
        As in the pruner; also if ``degrees`` is empty or a degree is negative.
    """
    pruner = TopologicalPruner(detached_copy(model), config_list, **knobs)
    data = pruner.collect_data()
    masks = pruner.masks_from(pruner.score_blocks(data))
    layers = []
    for unit in pruner.context.units:
        points = np.concatenate([data[module][target].numpy() for module, target in unit.members], axis=1)
        module_name, target_name = unit.members[0]
        is_kept = masks[module_name][target_name].reshape(unit.blocks, -1)[:, 0].bool().numpy()
        count = int(is_kept.sum())
        distances = topology.pairwise_distances(topology.with_origin(points))
        stays = np.append(is_kept, True)
        kept_distances = distances[np.ix_(stays, stays)]
        before, after = dict[int, FloatArray](), dict[int, FloatArray]()
        for degree in degrees:
            before[degree] = topology.rips_diagram(distances=distances, dimension=degree, keep_infinite=False)
            after[degree] = topology.rips_diagram(distances=kept_distances, dimension=degree, keep_infinite=False)
        deaths = topology.h0_deaths(distances)
        if deaths.mean() > 0:
            deaths = deaths / deaths.mean()
        tolerance = 0.0
        if count < unit.blocks:
            tolerance = float(deaths[count] / 2.0)
        layer = LayerTopology(
            name=unit.name,
            points=unit.blocks,
            kept=count,
            share=count / unit.blocks,
            deaths=deaths,
            tolerance=tolerance,
            diagrams_before=before,
            diagrams_after=after,
            bottleneck={d: topology.bottleneck_distance(before[d], after[d]) for d in degrees},
            hausdorff=float(topology.hausdorff_to_subset(distances, stays[None])[0]),
            trace=pruner.trace.get(unit.name, []),
        )
        layers.append(layer)
    return TopologyStudy(layers, masks)


def _death_curves(layers: list[LayerTopology]) -> Figure:
    """Draw death times against the share of points, with a dot at the share that each layer keeps."""
    figure, axis = single(7.5, 4.5)
    for index, layer in enumerate(layers):
        color, share = f"C{index % 10}", np.arange(1, layer.points + 1) / layer.points
        axis.plot(share, layer.deaths, color=color, label=_short(layer.name))
        axis.plot(layer.share, layer.deaths[layer.kept - 1], "o", color=color)
    title = "death times of each layer (dots: share kept)"
    labels = "share of the points kept", "H0 death time / layer's mean"
    finish(axis, *labels, columns=1 + len(layers) // 12, title=title)
    return figure


def _allocation(layers: list[LayerTopology]) -> Figure:
    """Draw the blocks of every layer before and after, with the tolerance of its death times."""
    figure, axis = single(7.5, 1.2 + 0.28 * len(layers))
    places = np.arange(len(layers))
    axis.barh(places, [layer.points for layer in layers], color="C0", alpha=0.3, label="before")
    bars = axis.barh(places, [layer.kept for layer in layers], color="C0", label="after")
    notes = [f"{layer.share:.0%}, tolerance {layer.tolerance:.2f}" for layer in layers]
    axis.bar_label(bars, notes, fontsize="x-small", padding=3)
    axis.set_yticks(places, [_short(layer.name) for layer in layers], fontsize="x-small")
    axis.invert_yaxis()
    finish(axis, "blocks", title="blocks kept (tolerance: half the longest removed death time / mean)")
    return figure


def _draw_diagram(axis: Axes, layer: LayerTopology) -> None:
    for degree, before in layer.diagrams_before.items():
        color, after = _DEGREE_COLORS[degree % 4], layer.diagrams_after[degree]
        axis.plot(before[:, 0], before[:, 1], "o", color=color, markerfacecolor="none", label=f"H{degree} before")
        axis.plot(after[:, 0], after[:, 1], ".", color=color, label=f"H{degree} after")
    limit = max((bars[:, 1].max() for bars in layer.diagrams_before.values() if len(bars)), default=1.0)
    axis.plot([0, limit], [0, limit], "k-", linewidth=0.5)
    finish(axis, "birth", "death")


def _draw_barcode(axis: Axes, layer: LayerTopology) -> None:
    height = 0
    for side, diagrams in (("before", layer.diagrams_before), ("after", layer.diagrams_after)):
        for degree, bars in diagrams.items():
            ordered = bars[np.argsort(bars[:, 1])]
            heights = height + np.arange(len(ordered))
            alpha = 0.45 if side == "before" else 1.0
            axis.hlines(heights, ordered[:, 0], ordered[:, 1], color=_DEGREE_COLORS[degree % 4], alpha=alpha)
            height += len(ordered) + 1
        axis.axhline(height, color="black", linewidth=0.5)
    axis.set(xlabel="scale (pale: before, full: after)", yticks=[])


def _draw_trace(axis: Axes, layer: LayerTopology) -> None:
    axis.plot([generation.best for generation in layer.trace], label="best")
    axis.plot([generation.mean for generation in layer.trace], label="mean")
    finish(axis, "generation", "fitness")


def _short(name: str) -> str:
    """Return the first target's name of a unit, and the number of others."""
    first, *following = name.split("+")
    first = first.removesuffix(".weight")
    if not following:
        return first
    return f"{first} +{len(following)}"
