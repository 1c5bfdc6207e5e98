"""Sums over samples, batch by batch, from which a cloud is made, and points with given inner products."""

from __future__ import annotations

from typing import Any

import torch
from scipy.linalg import lapack
from torch import Tensor

from nni_topo.context import leaving_out
from nni_topo.errors import DataError
from nni_topo.network.runtime.memory import check_memory

_TURN = 2**24
_MATRICES = 6  # of inner products in memory at a time, at most, until points are made
# A pivot below this share of the largest variance is rounding; distances, its root, err by less than 1e-6.
_ROUNDING = 1e-13
_WIDE = 4096  # points: from here on eigenvectors, 27 times the work of pivoted Cholesky, take minutes


class ChannelMoments:
    """Running sums over samples: their number, the sum at each place of each row, the rows' inner products."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.samples = 0
        self._total: Any = 0.0
        self._products: Any = 0.0

    def add(self, rows: Tensor, scale: Tensor | None = None) -> None:
        """Add a batch of rows, ``(n, samples)`` or ``(n, places, samples)``, times a scale ``(n, places)``."""
        if rows.dim() == 2:
            rows = rows[:, None]
        if not self.samples:
            purpose = f"inner products of {len(rows)} channels"
            cure = f"{leaving_out()}, or choose by its weights (cloud='weight') or by their norms"
            check_memory(8 * _MATRICES * len(rows) ** 2, purpose, cure, self.name)
        self.samples += rows.shape[2]
        # Chunks of 128 MiB of float64, whatever the batch.
        for few in rows.split(max(1, _TURN // max(1, rows.shape[0] * rows.shape[1])), dim=2):
            part = few.double()
            if scale is not None:
                part = part * scale[..., None]
            flat = part.flatten(1)
            self._total = self._total + part.sum(2)
            self._products = self._products + flat @ flat.T

    def mean(self) -> Tensor:
        """Return the mean of each place of each row, ``(n, places)`` on the CPU."""
        mean: Tensor = (self._total / self.samples).cpu()
        return mean

    def gram(self) -> Tensor:
        """Return covariances, ``(n, n)`` on the CPU; DataError if no sample was added or one is not finite."""
        check_reached(self.samples, self.name)
        # The mean product minus the product of means.
        gram: Tensor = (self._products / self.samples).cpu() - self.mean() @ self.mean().T
        check_finite(gram, self.name)
        return gram


def check_reached(samples: int, name: str, subject: str = "activation") -> None:
    """Raise DataError for a layer that no sample reached."""
    if not samples:
        raise DataError(f"calibration must reach every pruned layer, got no {subject} ({name})")


def check_finite(values: Tensor, name: str) -> None:
    """Raise DataError if a value is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise DataError(f"activations must be finite, got NaN or infinity ({name})")


def points_of_gram(gram: Tensor) -> Tensor:
    """Return ``n`` points in at most ``n`` dimensions with these inner products ``(n, n)``, float64."""
    if len(gram) > _WIDE:
        return embedding(gram)
    values, vectors = torch.linalg.eigh(gram)
    points: Tensor = vectors * values.clamp(min=0.0).sqrt()
    return points


def embedding(covariance: Tensor) -> Tensor:
    """Return points ``(n, rank)`` with these inner products ``(n, n)``, float64, to 1e-6 of the largest norm."""
    largest = float(covariance.diagonal().max())
    # Pivoted Cholesky: n^3 / 3, far less than eigenvectors, and it stops where only rounding is left. LAPACK counts
    # pivots from 1 and leaves numbers of its own above the diagonal and beyond the rank.
    factor, pivots, rank, _ = lapack.dpstrf(covariance.numpy(), tol=_ROUNDING * largest, lower=1)
    points = torch.zeros(len(covariance), max(int(rank), 1), dtype=torch.float64)
    if rank:
        points[torch.from_numpy(pivots - 1).long()] = torch.from_numpy(factor).tril()[:, :rank]
    return points
