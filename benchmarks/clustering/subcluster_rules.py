"""How sub-clustering's histograms are read: rules for the bins beside the nodes that the source's tables have.

The splits of a cluster don't depend on the threshold, so each layer is split down to single nodes once, and every rule
cuts the same tree where it says: nothing is trained or pruned again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nni_topo.maths.clustering.subclustering import Growth, SplitTree, grow

FloatArray = NDArray[np.float64]

# Tables 5.2 and 5.4 to 5.7, and section 5.5.2 for LeNet-5-like: nodes before and after.
SOURCE: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "lenet300": ((300, 100), (76, 25)),
    "lenet5": ((6, 16, 84), (4, 5, 19)),
    "lenet5_like": ((32, 64, 1024), (17, 19, 98)),
    "cnn12": ((64, 128, 256, 512, 128, 256, 512), (50, 45, 66, 135, 88, 86, 128)),
    "vgg16_modified": (
        (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512),
        (38, 26, 53, 46, 86, 81, 73, 80, 78, 85, 93, 95, 132, 107),
    ),
}
# Freedman and Diaconis' bins are as narrow as the quartiles lie close together; no cluster has so many values.
_MOST_BINS = 100_000


@dataclass(frozen=True)
class Reading:
    """One reading of algorithm 3; the fields' defaults are the package's."""

    bins: int | str = "scott"  # number of bins, or a rule of numpy.histogram_bin_edges
    edge: str = "upper"  # of the bin that reaches the energy
    second: str = "upper"  # of the fullest bin over the clusters
    from_zero: bool = False  # whether bins begin at 0 or at the least value
    matrix: bool = False  # whether each pair counts twice, as in the whole matrix
    growth: Growth = field(default_factory=Growth)


TODAY = Reading()
BINS: tuple[int | str, ...] = ("scott", "fd", "sturges", "doane", "rice", "sqrt", "auto", 3, 5, 10, 20)
READINGS: dict[str, Reading] = {str(bins): replace(TODAY, bins=bins) for bins in BINS}
READINGS |= {f"{bins}, second: centre": replace(TODAY, bins=bins, second="centre") for bins in ("scott", 3, 10)}
READINGS |= {f"{bins}, second: median of the clusters": replace(TODAY, bins=bins, second="median") for bins in BINS[:2]}
READINGS |= {
    "scott, first: lower edge, as (5.6) reads": replace(TODAY, edge="lower"),
    "scott, bins from 0": replace(TODAY, from_zero=True),
    "scott, whole matrix": replace(TODAY, matrix=True),
    "scott, signed": replace(TODAY, growth=Growth(absolute=False)),
    "scott, mean of the covariances, not centred": replace(TODAY, growth=Growth("mean")),
    "scott, largest covariance, not centred": replace(TODAY, growth=Growth("max")),
    "scott, sum of the variances": replace(TODAY, growth=Growth("trace")),
}


class GrownLayer:
    """A layer's covariances and its clusters, split down to single nodes."""

    def __init__(self, points: FloatArray, covariance: FloatArray, initial: int, energy: float, seed: int) -> None:
        self.covariance, self.energy = covariance, energy
        self.tree: SplitTree = grow(points, covariance, initial, Growth(), threshold=-1.0, seed=seed)
        self._members = [np.array(cluster.members) for cluster in self.tree.clusters]
        self._variances: dict[tuple[str, bool], list[float]] = {}

    def kept(self, reading: Reading) -> tuple[int, int]:
        """Return the kept nodes and the most splits in a row."""
        return self._cut(self._statistics(reading.growth), self._threshold(reading))

    def unsplit(self) -> tuple[int, int]:
        """Return the initial clusters, and no split."""
        return len(self.tree.initial), 0

    def split_once(self) -> tuple[int, int]:
        """Return the nodes if each initial cluster is split once."""
        return sum(len(self.tree.clusters[number].children) or 1 for number in self.tree.initial), 1

    def _threshold(self, reading: Reading) -> float:
        clusters = [self._members[number] for number in self.tree.initial]
        if reading.growth.statistic in ("dispersion", "trace"):
            clusters = [members for members in clusters if len(members) > 1] or clusters
        edges = []
        for members in clusters:
            values = reading.growth.values(self.covariance, members)
            if reading.matrix:
                diagonal = np.cumsum([0, *range(len(members), 1, -1)])
                values = np.concatenate([values, np.delete(values, diagonal)])
            edges.append(_energy_edge(values, self.energy, reading))
        if reading.second == "median":
            return float(np.median(edges))
        return _fullest(np.array(edges), reading)

    def _statistics(self, growth: Growth) -> list[float]:
        key = (growth.statistic, growth.absolute)
        if key not in self._variances:
            self._variances[key] = [growth.variance(self.covariance, members) for members in self._members]
        return self._variances[key]

    def _cut(self, variances: list[float], threshold: float) -> tuple[int, int]:
        leaves = deepest = 0
        waiting = [(number, 0) for number in self.tree.initial]
        while waiting:
            number, depth = waiting.pop()
            children = self.tree.clusters[number].children
            if children and variances[number] > threshold * (1.0 + 1e-9):
                waiting += [(child, depth + 1) for child in children]
            else:
                leaves += 1
                deepest = max(deepest, depth)
        return leaves, deepest


def kept_by_rule(layers: Iterable[GrownLayer]) -> dict[str, dict[str, Any]]:
    """Return kept nodes by layer and the most splits in a row, by rule."""
    layers = list(layers)
    rules: dict[str, Callable[[GrownLayer], tuple[int, int]]] = {}
    rules["no cluster split"] = GrownLayer.unsplit
    rules["each initial cluster split once"] = GrownLayer.split_once
    for label, reading in READINGS.items():
        rules[label] = lambda layer, reading=reading: layer.kept(reading)
    found = {}
    for label, rule in rules.items():
        counts = [rule(layer) for layer in layers]
        found[label] = {"kept": [nodes for nodes, _ in counts], "splits": max(depth for _, depth in counts)}
    return found


def tables(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a row per rule: how far the shares of kept nodes lie from the source's, by net, and a first run's nodes."""
    nets = [net for net in SOURCE if any(record["net"] == net for record in records)]
    runs = {net: [record for record in records if record["net"] == net] for net in nets}
    labels = list(runs[nets[0]][0]["rules"])
    yield f"| rule | mean | factor | {' | '.join(nets)} | most splits in a row | nodes of the first lenet300, lenet5 |"
    yield "|---|---:|---:|" + "---:|" * len(nets) + "---:|---|"
    rows = []
    for label in labels:
        away, ratios, splits = [], [], 0
        for net in nets:
            before, after = map(np.array, SOURCE[net])
            wanted = after / before
            shares = [np.array(run["rules"][label]["kept"]) / run["widths"] for run in runs[net]]
            away.append(float(np.mean([np.abs(share - wanted).mean() for share in shares])))
            ratios.append(float(np.mean([np.abs(np.log(share / wanted)).mean() for share in shares])))
            splits = max(splits, *(run["rules"][label]["splits"] for run in runs[net]))
        nodes = ", ".join("-".join(map(str, runs[net][0]["rules"][label]["kept"])) for net in nets[:2])
        rows.append((float(np.mean(away)), math.exp(float(np.mean(ratios))), label, away, splits, nodes))
    for mean, factor, label, away, splits, nodes in sorted(rows):
        cells = [label, f"{mean:.3f}", f"{factor:.2f}", *(f"{value:.3f}" for value in away), str(splits), nodes]
        yield f"| {' | '.join(cells)} |"


def removed_by_source(net: str, model: nn.Module, layers: Sequence[str]) -> float:
    """Return the share of parameters that a network loses at the source's nodes; ``layers``: those it prunes."""
    nodes = dict(zip(layers, SOURCE[net][1], strict=True))
    before = after = 0
    old, new = 0, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            outputs, inputs = module.weight.shape[:2]
            kept_inputs = inputs if not old else inputs // old * new  # positions times channels, after flattening
            old, new = outputs, nodes.get(name, outputs)
            after += new * (kept_inputs * module.weight[0, 0].numel() + (module.bias is not None))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            after += 2 * new
        before += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    return 1.0 - after / before


def _energy_edge(values: FloatArray, energy: float, reading: Reading) -> float:
    low, high = _range(values, reading)
    if _alike(low, high):
        return high
    counts, borders = np.histogram(values, _number(values, low, high, reading.bins), (low, high))
    reached = int((np.cumsum(counts) >= energy * len(values)).argmax())
    return float(borders[reached + (reading.edge == "upper")])


def _fullest(edges: FloatArray, reading: Reading) -> float:
    low, high = float(edges.min()), float(edges.max())
    if _alike(low, high):
        return high
    counts, borders = np.histogram(edges, _number(edges, low, high, reading.bins), (low, high))
    fullest = int(counts.argmax())
    return float(borders[fullest + 1] if reading.second == "upper" else borders[fullest : fullest + 2].mean())


def _range(values: FloatArray, reading: Reading) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (min(0.0, low), high) if reading.from_zero else (low, high)


def _alike(low: float, high: float) -> bool:
    return high - low <= 1e-9 * max(abs(low), abs(high))


def _number(values: FloatArray, low: float, high: float, bins: int | str) -> int:
    if not isinstance(bins, str):
        return bins
    if _alike(float(values.min()), float(values.max())):
        return 1
    quartiles = np.subtract(*np.percentile(values, [75, 25]))
    narrowest = 2.0 * quartiles / len(values) ** (1.0 / 3.0)
    if bins in ("fd", "auto") and 0.0 < narrowest < (high - low) / _MOST_BINS:
        return _MOST_BINS
    return len(np.histogram_bin_edges(values, bins, range=(low, high))) - 1
