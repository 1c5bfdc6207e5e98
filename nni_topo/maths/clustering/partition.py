"""Clusters of points: one function for five algorithms of scikit-learn.

Source: S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
Technology, 2019, chapter 4.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import linkage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import pdist, squareform

from nni_topo.errors import ConfigError
from nni_topo.maths.ties import leveled
from nni_topo.maths.topology.checks import as_points
from nni_topo.rules import checked, one_of, whole

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
Algorithm = Literal["kmeans", "spectral", "ward", "dbscan", "gmm", "gmm_full"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
NeighbourGraph = Literal["epsilon", "knn"]
GRAPHS: tuple[str, ...] = get_args(NeighbourGraph)

_LEAST_VARIANCE = 1e-6
_SAME = 1e-9
_AXES = 16
_STARTS = 3  # of k-means and mixtures
_CORE = 3  # DBSCAN's min_samples


def check_used(algorithm: str, graph: str, place: str) -> None:
    """Raise ConfigError for a non-default graph if the algorithm doesn't use one."""
    if graph != "epsilon" and algorithm != "spectral":
        raise ConfigError(
            f"graph must be given with algorithm='spectral' only, got {graph!r} with {algorithm!r} ({place})"
        )


@checked(
    count=whole(1),
    algorithm=one_of(ALGORITHMS),
    graph=one_of(GRAPHS),
)
def partition(
    points: FloatArray,
    count: int,
    algorithm: str = "kmeans",
    *,
    seed: int = 0,
    graph: str = "epsilon",
) -> IntArray:
    """Cut a cloud of points into clusters.

    Parameters
    ----------
    points : ndarray of float64, shape (n, d)
        The points, finite.
    count : int
        Number of clusters, in [1, n].
    algorithm : {"kmeans", "spectral", "ward", "dbscan", "gmm", "gmm_full"}, default="kmeans"
        Lloyd's k-means; spectral clustering on a ``graph``, in which equal points count once and stay together;
        agglomeration by Ward's criterion; DBSCAN with ``min_samples=3``; expectation maximisation of a mixture of
        spherical Gaussians, which unlike diagonal ones don't depend on rotations of the cloud, or of Gaussians
        with full covariances on the first 16 principal components.
    seed : int, default=0
        For k-means, spectral clustering and mixtures; the best of three starts counts.
    graph : {"epsilon", "knn"}, default="epsilon"
        For spectral clustering: joins points no farther apart than the smallest radius at which the graph is connected,
        or each point with its ``1 + ceil(ln(n))`` nearest.

    Returns
    -------
    ndarray of int, shape (n,)
        Cluster of each point, numbered from 0 in the order of the clusters' first points. The clusters are
        fewer than ``count`` if fewer points are distinct, if a mixture's component gets no point, and for DBSCAN. Its
        reach (``eps``) is the smallest with at most ``count`` clusters; noise points are clusters of their own.

    Notes
    -----
    Cost: k-means grows as ``n * count * d``, the others need all ``n^2`` distances.

    Examples
    --------
    >>> partition(np.array([[0.0], [5.0], [0.1], [5.1]]), 2).tolist()
    [0, 1, 0, 1]
    """
    points = as_points(points)
    if count > len(points):
        raise ConfigError(f"the number of clusters must be in [1, {len(points)}], the number of points, got {count!r}")
    check_used(algorithm, graph, "partition")
    if count == len(points):
        return np.arange(count, dtype=np.intp)
    if count == 1:
        return np.zeros(len(points), dtype=np.intp)
    # Imported here and below, because scikit-learn takes longer to import than all of this package.
    from sklearn import cluster, decomposition, mixture
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Fewer distinct points than clusters, and mixtures that don't settle, still give a partition.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message="Graph is not fully connected", category=UserWarning)
        if algorithm == "kmeans":
            labels = cluster.KMeans(count, n_init=_STARTS, random_state=seed).fit(points.astype(np.float32)).labels_
        elif algorithm == "ward":
            labels = cluster.AgglomerativeClustering(count, linkage="ward").fit(points).labels_
        elif algorithm == "spectral":
            labels = _spectral_labels(points, count, seed, graph)
        elif algorithm == "dbscan":
            labels = _density_labels(points, count)
        elif (points == points[0]).all():  # their variance is zero but for rounding, and is divided by below
            labels = np.zeros(len(points), dtype=np.intp)
        else:
            scaled = points / np.sqrt(points.var(0).sum() / points.shape[1])
            kind = "spherical"
            if algorithm == "gmm_full":
                kind, axes = "full", min(_AXES, *points.shape)
                scaled = decomposition.PCA(axes, svd_solver="full").fit_transform(scaled)
            model = mixture.GaussianMixture(
                count, covariance_type=kind, n_init=_STARTS, random_state=seed, reg_covar=_LEAST_VARIANCE
            )
            labels = model.fit_predict(scaled)
    return renumbered(labels)


def renumbered(labels: IntArray) -> IntArray:
    """Number clusters from 0 in the order of their first points; those labelled -1 become clusters of their own."""
    labels = np.array(labels, dtype=np.intp)
    noise = labels < 0
    labels[noise] = labels.max(initial=-1) + 1 + np.arange(noise.sum())
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.intp)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def similarity_graph(distances: FloatArray, graph: str = "epsilon") -> FloatArray:
    """Return the weights (n, n) of a graph on at least two points, from their distances as pdist orders them.

    ``"epsilon"`` joins, with weight 1, pairs no farther apart than the smallest radius at which the graph is
    connected. ``"knn"`` joins pairs of which one point is among the ``1 + ceil(ln(n))`` nearest of the other; of points
    equally far away either all or none are. The thesis (4.2.2) describes both graphs, but neither the radius
    nor the number; U. von Luxburg, "A tutorial on spectral clustering", Statistics and Computing 17, 2007, recommends
    these (8.2).
    """
    distances = leveled(distances)
    if graph == "epsilon":
        # single linkage merges along the edges of the minimum spanning tree
        radius = linkage(distances, "single")[-1, 2]
        joined: FloatArray = squareform((distances <= radius).astype(np.float64))
        return joined
    square = squareform(distances)
    count = len(square)
    nearest = min(1 + math.ceil(math.log(count)), count - 1)
    # place 0 of a sorted row is the point itself
    reach = np.partition(square, nearest, axis=1)[:, nearest]
    near = square <= reach[:, None]
    np.fill_diagonal(near, False)
    either: FloatArray = (near | near.T).astype(np.float64)
    return either


def _spectral_labels(points: FloatArray, count: int, seed: int, graph: str) -> IntArray:
    """Cluster the distinct points, because rounding in the eigenvectors may separate equal points."""
    from sklearn.cluster import SpectralClustering

    distances = pdist(points)
    same = squareform(distances <= _SAME * np.abs(points).max())
    number, place = connected_components(same, directed=False)
    if number <= count:
        return np.asarray(place, dtype=np.intp)
    if number < len(points):
        _, first = np.unique(place, return_index=True)
        distances = pdist(points[first])
    affinities = similarity_graph(distances, graph)
    model = SpectralClustering(count, affinity="precomputed", random_state=seed, n_init=_STARTS)
    return np.asarray(model.fit(affinities).labels_[place], dtype=np.intp)


def _density_labels(points: FloatArray, count: int) -> IntArray:
    """Find the smallest reach of DBSCAN with at most ``count`` clusters; noise is labelled -1."""
    from sklearn.cluster import DBSCAN

    distances = squareform(leveled(pdist(points)))
    reaches = np.unique(distances)
    # scikit-learn needs a positive reach: half the least distance joins only equal points.
    reaches = np.append(reaches[1] / 2.0, reaches[1:]) if len(reaches) > 1 else np.ones(1)
    least = min(_CORE, len(points))

    def labels(reach: float) -> IntArray:
        model = DBSCAN(eps=float(reach), min_samples=least, metric="precomputed")
        return np.asarray(model.fit(distances).labels_, dtype=np.intp)

    # The number of clusters and noise points never rises with the reach, and is 1 at the largest.
    few = bisect_left(
        reaches, True, hi=len(reaches) - 1, key=lambda reach: bool(renumbered(labels(reach)).max() < count)
    )
    return labels(reaches[few])
