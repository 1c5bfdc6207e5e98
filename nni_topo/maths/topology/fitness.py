"""The fitness of subsets of a point cloud: how much of its topology they lose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from nni_topo.maths.topology.checks import (
    DEGREE,
    BoolArray,
    FloatArray,
    as_distances,
    as_index,
    as_subsets,
)
from nni_topo.maths.topology.comparison import bottleneck_distance, wasserstein_distance
from nni_topo.maths.topology.covering import covers
from nni_topo.maths.topology.diagrams import diagrams_of, ripser_bars
from nni_topo.maths.topology.matching import closed_bottleneck, closed_wasserstein
from nni_topo.maths.topology.spanning import subset_deaths
from nni_topo.rules import all_of, checked, one_of

CRITERIA = ("hausdorff", "cover", "bottleneck", "bottleneck_sum", "wasserstein")
"""Distances between a subset and the whole cloud."""


class SubsetFitness:
    """Score many subsets of one point cloud, smaller is better; no subset is scored twice.

    Parameters
    ----------
    distances : array_like, shape (n, n)
        Distances of the cloud, as from `pairwise_distances`.
    criterion : {"hausdorff", "cover", "bottleneck", "bottleneck_sum", "wasserstein"}, default "hausdorff"
        ``"hausdorff"`` is the largest and ``"cover"`` the mean distance from a point of the cloud to the nearest point
        of the subset. The others compare the persistence diagrams of the subset and of the cloud: for several
        homology dimensions ``"bottleneck"`` takes the largest distance, and ``"bottleneck_sum"`` and ``"wasserstein"``
        (order 2) take the sum.
    homology_dimensions : sequence of int, default (0,)
        Degrees of the diagrams, each >= 0. The covering criteria don't use them.
    base : int, optional
        Index of a point that every subset keeps, whatever its mask says: the origin of `with_origin`.

    Notes
    -----
    With a fixed number m of kept points, the H0 bottleneck distance is at least half the m-th longest
    death time of the cloud, since the subset has only m - 1 finite bars; for most subsets it is exactly that,
    so it hardly tells them apart. The other criteria do.

    Examples
    --------
    >>> line = abs(np.subtract.outer([0.0, 1.0, 5.0], [0.0, 1.0, 5.0]))
    >>> fitness = SubsetFitness(line, "hausdorff")
    >>> fitness([[True, False, True], [True, True, False]])
    array([1., 4.])
    """

    @checked(criterion=one_of(CRITERIA), homology_dimensions=all_of(DEGREE, Sequence, least=1))
    def __init__(
        self,
        distances: ArrayLike,
        criterion: str = "hausdorff",
        *,
        homology_dimensions: Sequence[int] = (0,),
        base: int | None = None,
    ) -> None:
        self.criterion = criterion
        self.homology_dimensions = tuple(map(int, homology_dimensions))
        self._distances = as_distances(distances)
        self.base = base if base is None else as_index(base, len(self._distances), "base")
        self._cache: dict[bytes, float] = {}
        self._is_cover = criterion in ("hausdorff", "cover")
        if not self._is_cover:
            diagrams = diagrams_of(self._distances, self.homology_dimensions)
            self._whole = dict(zip(self.homology_dimensions, diagrams, strict=True))

    def __call__(self, population: ArrayLike) -> FloatArray:
        """Score a population.

        Parameters
        ----------
        population : array_like of bool, shape (p, n)
            One subset a row, none of them empty; their sizes may differ.

        Returns
        -------
        ndarray of float64, shape (p,)
            The fitness of each subset, in the unit of the distances, >= 0.
        """
        subsets = as_subsets(population, len(self._distances), self.base)
        # Packed bits, an eighth of the mask; the base is always set, so masks that only differ there are one subset.
        keys = [row.tobytes() for row in np.packbits(subsets, axis=1)]
        # A dict, so that a subset that occurs twice in the population is scored once.
        unknown = {key: row for row, key in enumerate(keys) if key not in self._cache}
        if unknown:
            fresh = subsets[list(unknown.values())]
            self._cache.update(zip(unknown, self._score(fresh).tolist(), strict=True))
        return np.array([self._cache[key] for key in keys])

    def _score(self, subsets: BoolArray) -> FloatArray:
        if self._is_cover:
            largest, mean = covers(self._distances, subsets)
            if self.criterion == "hausdorff":
                return largest
            return mean
        losses = list[FloatArray]()
        higher = [degree for degree in self.homology_dimensions if degree > 0]
        if higher:
            # One subset after the other, by the diagrams of its distance submatrix.
            distance = wasserstein_distance if self.criterion == "wasserstein" else bottleneck_distance
            matrices = (self._distances[np.ix_(subset, subset)] for subset in subsets)
            by_degree = np.empty((len(higher), len(subsets)))
            for column, bars in enumerate(ripser_bars(matrices, higher)):
                for row, degree in enumerate(higher):
                    by_degree[row, column] = distance(bars[row], self._whole[degree])
            losses += list(by_degree)
        if 0 in self.homology_dimensions:
            # By the closed forms, all subsets of a size together. The infinite bar, which comes first, is left out:
            # every subset has the same one.
            cloud_deaths = self._whole[0][1:, 1]
            sizes, by_deaths = subsets.sum(axis=1), np.empty(len(subsets))
            for size in np.unique(sizes):
                deaths = subset_deaths(self._distances, subsets[sizes == size])
                if self.criterion == "wasserstein":
                    by_deaths[sizes == size] = closed_wasserstein(deaths, cloud_deaths, 2.0)
                else:
                    by_deaths[sizes == size] = closed_bottleneck(deaths, cloud_deaths)
            losses.append(by_deaths)
        # The larger of the bottleneck distances of H0 and H1 is mostly that of H0, which hardly differs between subsets
        # of one size; a sum depends on every degree.
        combine = np.max if self.criterion == "bottleneck" else np.sum
        return np.asarray(combine(losses, axis=0))
