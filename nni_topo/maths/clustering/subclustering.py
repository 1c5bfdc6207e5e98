"""Sub-clustering: clusters are split in two while the nodes in them vary more than a threshold.

The threshold comes from a histogram of histograms (HoH): for each initial cluster, a histogram of the covariances
between its nodes gives the value below which a share ``energy`` of them lies; a second histogram, over the clusters,
gives the most common of these values. The source doesn't give the width of the bins, which decides how much is pruned:
it follows Scott's rule.

Source: S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
Technology, 2019, sections 5.2 and 5.3, algorithms 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nni_topo.errors import DataError
from nni_topo.maths.clustering.partition import FloatArray, IntArray, partition
from nni_topo.maths.ties import RELATIVE, first_largest, within
from nni_topo.rules import NONE, Rule, all_of, check_fields, checked, number, one_of, whole

_SAME = 1e-6
_ROUNDING = 1e-9
STATISTICS = ("dispersion", "trace", "max", "mean")
SCOTT = "scott"
_BINS = whole(1) | one_of((SCOTT,))
ENERGY, _SHARE = number(0, 1, "neither"), number(0, 1, "right")


@dataclass(frozen=True)
class Growth:
    """Settings of sub-clustering: initial clusters, threshold, and the statistic compared with the threshold.

    Attributes
    ----------
    statistic : {"dispersion", "trace", "max", "mean"}, default="dispersion"
        Statistic of a cluster that is compared with the threshold. ``"dispersion"``: the mean of the covariances of its
        nodes about their mean node (sample by sample); ``"trace"``: the sum of their variances about it. ``"max"`` and
        ``"mean"``: of the covariances without centring; they split similar nodes of large variance, and merge different
        nodes of small variance.
    initial_ratio : float, mapping of str to float, or None, default=None
        Number of initial clusters as a share of a layer's nodes, rounded up, in (0, 1]; a mapping gives it by module
        name. None, and for layers without an entry: 0.35 for convolutions, 0.05 for linear layers.
    bins : {"scott"} or int, default="scott"
        Equal-width bins of both histograms: by Scott's rule, see :func:`hoh_threshold`, or their number, at least 1.
        More bins give a lower threshold and more clusters.
    absolute : bool, default=True
        Whether covariances count by their absolute values.
    diagonal : bool, default=True
        Whether variances are among the covariances. A single node always counts with its variance.
    recursive : bool, default=True
        Whether the halves of a split may be split again. False: algorithm 2 as printed, each initial cluster is split
        at most once.
    """

    statistic: Literal["dispersion", "trace", "max", "mean"] = "dispersion"
    initial_ratio: float | Mapping[str, float] | None = None
    bins: int | Literal["scott"] = "scott"
    absolute: bool = True
    diagonal: bool = True
    recursive: bool = True

    def __post_init__(self) -> None:
        check_fields(
            self,
            initial_ratio=_SHARE | all_of(_SHARE, Mapping) | NONE,
            bins=_BINS,
        )

    def values(self, covariance: FloatArray, members: IntArray) -> FloatArray:
        """Return the covariances between a cluster's nodes, each pair once, shape (values,)."""
        block = self._block(covariance, members)
        offset = 0 if self.diagonal or len(members) == 1 else 1
        values: FloatArray = block[np.triu_indices(len(members), offset)]
        if self.absolute:
            values = np.abs(values)
        return values

    def variance(self, covariance: FloatArray, members: IntArray) -> float:
        """Return the statistic of a cluster that is compared with the threshold."""
        if self.statistic == "trace":
            return float(np.trace(self._block(covariance, members)))
        values = self.values(covariance, members)
        return float(values.max() if self.statistic == "max" else values.mean())

    def threshold(self, covariance: FloatArray, clusters: Sequence[IntArray], energy: float) -> float:
        """Return the HoH threshold of initial clusters."""
        if self.statistic in ("dispersion", "trace"):
            # a single node doesn't scatter about itself: it says nothing of how tight a cluster should be
            clusters = [members for members in clusters if len(members) > 1] or clusters
        return hoh_threshold([self.values(covariance, members) for members in clusters], energy, bins=self.bins)

    def _block(self, covariance: FloatArray, members: IntArray) -> FloatArray:
        block: FloatArray = covariance[np.ix_(members, members)]
        if self.statistic in ("max", "mean"):
            return block
        # covariances after the mean node is subtracted from each node
        about: FloatArray = block - block.mean(0) - block.mean(1, keepdims=True) + block.mean()
        return about


@dataclass(frozen=True)
class Cluster:
    """A node of a tree of splits."""

    members: tuple[int, ...]  # the nodes of the layer in it, ascending
    variance: float  # the statistic that is compared with the threshold
    parent: int | None = None  # number of the cluster it was split from; None for an initial one
    children: tuple[int, ...] = ()  # numbers of the two it was split into; empty for a leaf


@dataclass(frozen=True)
class SplitTree:
    """How a layer's clusters grew."""

    clusters: tuple[Cluster, ...]  # initial ones first, then as they were split off; a cluster's number is its place
    threshold: float  # in the unit of the covariances

    @property
    def initial(self) -> tuple[int, ...]:
        """Numbers of the initial clusters."""
        return tuple(n for n, cluster in enumerate(self.clusters) if cluster.parent is None)

    @property
    def leaves(self) -> tuple[int, ...]:
        """Numbers of the clusters that weren't split: one node of each is kept."""
        return tuple(n for n, cluster in enumerate(self.clusters) if not cluster.children)

    @property
    def depth(self) -> int:
        """Most splits from an initial cluster to a leaf."""
        depths: list[int] = []
        for cluster in self.clusters:
            depths.append(0 if cluster.parent is None else depths[cluster.parent] + 1)
        return max(depths)

    def labels(self, nodes: int) -> IntArray:
        """Return the rank of each node's leaf, shape (nodes,); -1 for nodes that were never clustered."""
        labels = np.full(nodes, -1, dtype=np.intp)
        for rank, leaf in enumerate(self.leaves):
            labels[list(self.clusters[leaf].members)] = rank
        return labels

    def renamed(self, names: IntArray) -> SplitTree:
        """Return the tree with ``names[i]`` in the place of node ``i``; ``names`` must ascend."""
        clusters = (replace(c, members=tuple(names[list(c.members)].tolist())) for c in self.clusters)
        return replace(self, clusters=tuple(clusters))


@checked(share=_SHARE, nodes=whole(1))
def initial_clusters(share: float, nodes: int) -> int:
    """Return the number of initial clusters, the share of the nodes rounded up, at least 1."""
    return min(nodes, max(1, math.ceil(round(share * nodes, 9))))


@checked(energy=ENERGY, bins=_BINS)
def hoh_threshold(
    values: Sequence[NDArray[np.float64]], energy: float, *, bins: int | Literal["scott"] = "scott"
) -> float:
    """Return the variance threshold of algorithm 3, the histogram of histograms.

    Parameters
    ----------
    values : sequence of ndarray of float64, each of shape (m,)
        Covariances within each initial cluster, m at least 1.
    energy : float
        The text's p, in (0, 1).
    bins : {"scott"} or int, default="scott"
        Equal-width bins, between the least and the largest value, of both histograms. ``"scott"``: the fewest that are
        no wider than ``(24 sqrt(pi) / m)^(1/3)``, about ``3.49 / m^(1/3)``, standard deviations of the m values [1]_. A
        number: that many, at least 1.

    Returns
    -------
    float
        Each cluster gives the first bin edge below which a share ``energy`` of its values lies. The threshold is the
        upper edge of the fullest bin of these edges, of the lowest one if several are fullest.

    Notes
    -----
    The source gives neither the bins nor which of their edges counts. With ten bins deep networks keep most of their
    neurons where the source keeps a fifth. Of the standard rules that were compared over five networks, Scott's rule
    with upper edges keeps shares of neurons nearest to its tables (``benchmarks/results/clustering.md``). Equation
    (5.6) literally means the largest edge below which *less* than a share ``energy`` lies; it gives lower edges and
    prunes less.

    References
    ----------
    .. [1] D. W. Scott, "On optimal and data-based histograms", Biometrika 66, 1979.

    Examples
    --------
    >>> round(hoh_threshold([np.array([0.0, 1.0, 2.0, 10.0])], 0.5, bins=10), 6)
    2.0
    """
    if not len(values) or any(not len(v) for v in values):
        raise DataError("a threshold needs at least one value of each of at least one cluster, got none (HoH)")
    if not all(np.isfinite(v).all() for v in values):
        raise DataError("covariances must be finite, got NaN or infinity (HoH)")
    edges = np.empty(len(values))
    for place, covariances in enumerate(values):
        inner = np.asarray(covariances, dtype=np.float64)
        edges[place] = inner.max()
        if _spreads(inner.min(), inner.max()):
            counts, borders = _histogram(inner, bins)
            reached = np.cumsum(counts) >= energy * len(inner)
            edges[place] = borders[1 + int(reached.argmax())]
    low, high = edges.min(), edges.max()
    if not _spreads(low, high):
        return float(high)
    counts, borders = _histogram(edges, bins)
    return float(borders[int(counts.argmax()) + 1])


@checked(threshold=number() | NONE | Rule("infinity", lambda value: isinstance(value, float) and value == math.inf))
def grow(
    points: FloatArray,
    covariance: FloatArray,
    initial: int,
    growth: Growth,
    *,
    energy: float = 0.5,
    threshold: float | None = None,
    at_least: int = 1,
    at_most: int | None = None,
    seed: int = 0,
) -> SplitTree:
    """Cluster nodes and split the clusters that vary too much (algorithm 2 without the selection of nodes).

    Parameters
    ----------
    points : ndarray of float64, shape (n, d)
        A point per node.
    covariance : ndarray of float64, shape (n, n)
        Covariances between nodes.
    initial : int
        Number of initial clusters, in [1, n].
    growth : Growth
        Threshold and statistic; ``initial_ratio`` isn't used.
    energy : float, default=0.5
        The text's p, in (0, 1): the share of a cluster's covariances that lie below its threshold. More energy gives
        a higher threshold and fewer splits.
    threshold : float or None, default=None
        Replaces the HoH threshold.
    at_least : int, default=1
        Least number of clusters: clusters below the threshold are split, too, until it is reached.
    at_most : int or None, default=None
        Largest number of clusters, also of initial ones.
    seed : int, default=0
        For k-means.

    Returns
    -------
    SplitTree

    Notes
    -----
    The cluster with the largest statistic, of equal ones the oldest, is split first, so that ``at_least`` and
    ``at_most`` only affect the splits that matter least. Nodes with equal points aren't split, however much they vary:
    one of them is enough.
    """
    points, covariance = np.asarray(points, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
    if points.ndim != 2 or covariance.shape != (len(points), len(points)):
        raise DataError(
            f"points and covariance must have the same nodes, got {points.shape} and {covariance.shape} (grow)"
        )
    most = len(points) if at_most is None else at_most
    # More clusters than points are an error of partition.
    if initial <= len(points):
        initial = min(initial, most)
    labels = partition(points, initial, seed=seed)
    first_clusters = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    if threshold is None:
        threshold = growth.threshold(covariance, first_clusters, energy)
    clusters: list[Cluster] = []

    def add(members: IntArray, parent: int | None) -> None:
        clusters.append(Cluster(tuple(members.tolist()), growth.variance(covariance, members), parent))
        waiting.append(len(clusters) - 1)

    waiting: list[int] = []  # numbers of the clusters that may be split
    for members in first_clusters:
        add(members, None)
    leaves = len(clusters)
    while leaves < most:
        # Without recursion, halves are split only while there are fewer than `at_least` clusters.
        again = growth.recursive or leaves < at_least
        open_ones = [number for number in waiting if again or clusters[number].parent is None]
        if not open_ones:
            break
        largest = open_ones[first_largest([clusters[number].variance for number in open_ones])]
        varies = clusters[largest].variance
        if leaves >= at_least and (varies <= threshold or within(varies, threshold)):
            break
        waiting.remove(largest)
        members = np.array(clusters[largest].members)
        cloud = points[members]
        if len(members) == 1 or np.abs(cloud - cloud[0]).max() <= _SAME * np.abs(cloud).max():
            continue  # all points are alike
        halves = partition(cloud, 2, seed=seed)
        if halves.any():
            children = len(clusters), len(clusters) + 1
            clusters[largest] = replace(clusters[largest], children=children)
            add(members[halves == 0], largest)
            add(members[halves == 1], largest)
            leaves += 1
    return SplitTree(tuple(clusters), threshold)


def _histogram(values: FloatArray, bins: int | Literal["scott"]) -> tuple[IntArray, FloatArray]:
    """Count values in bins of equal width; a value on a border, up to rounding, belongs to the bin above."""
    low, high = values.min(), values.max()
    if bins == SCOTT:
        # the fewest that are no wider than Scott's rule says; `_ROUNDING` prevents another bin if the range is a
        # multiple of this width up to rounding
        width = float(np.std(values)) * math.pow(24.0 * math.sqrt(math.pi) / len(values), 1.0 / 3.0)
        number = max(1, math.ceil((high - low) / width - _ROUNDING))
    else:
        number = int(bins)
    places = np.floor((values - low) / (high - low) * number + RELATIVE).astype(np.intp)
    return np.bincount(np.minimum(places, number - 1), minlength=number), np.linspace(low, high, number + 1)


def _spreads(low: float, high: float) -> bool:
    """Tell whether two values are far enough apart for a histogram between them."""
    return high - low > _ROUNDING * max(abs(low), abs(high))
