"""Directions in which the first of few channels of a head do most: of two factors that are multiplied by channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nni_topo.network.runtime.processes import Processes

_LEAST = 1e-7  # of the largest singular value


@dataclass
class Moments:
    """Sums over samples of the channels of each head."""

    samples: int = 0
    sums: Tensor | None = None  # (heads, size)
    products: Tensor | None = None  # (heads, size, size)

    def add(self, values: Tensor) -> None:
        """Add channels ``(heads, size, samples)``."""
        values = values.double()
        self.samples += values.shape[2]
        sums, products = values.sum(2), values @ values.mT
        self.sums = sums if self.sums is None else self.sums + sums
        self.products = products if self.products is None else self.products + products

    def pool(self, processes: Processes, device: torch.device, place: str) -> None:
        """Take in the samples of all processes."""
        self.sums = processes.total(self.sums, device, place)
        self.products = processes.total(self.products, device, place)
        self.samples = sum(processes.gather(self.samples, place))

    def second(self, *, centred: bool) -> Tensor:
        """Return the mean products, of differences from the mean if so asked."""
        assert self.sums is not None
        assert self.products is not None
        means = self.sums / self.samples
        found = self.products / self.samples
        return found - means.unsqueeze(2) * means.unsqueeze(1) if centred else found


def directions(ones: Tensor, others: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return matrices ``A`` and ``B``, (heads, n, n), with ``A B' = 1``, of which the first columns alone come nearest.

    ``ones`` and ``others`` are the mean products of two factors' channels, ``x`` and ``y``, in each head: of all ``A``
    and ``B`` so many columns leave the least of the mean square of ``x' y - x' A B' y``.
    """
    of_ones, of_others = [], []
    for one, other in zip(ones, others, strict=True):
        left, right = _root(one), _root(other)
        u, values, v = torch.linalg.svd(left.mT @ right)
        count = min(kept, int((values > _LEAST * values[0]).sum()))
        scale = values[:count].rsqrt()
        a, b = (right @ v[:count].mT) * scale, (left @ u[:, :count]) * scale
        # The other columns do what these lack.
        u, values, v = torch.linalg.svd(torch.eye(len(left)).to(left) - a @ b.mT)
        more = values[: len(left) - count].sqrt()
        of_ones.append(torch.cat([a, u[:, : len(more)] * more], 1))
        of_others.append(torch.cat([b, v[: len(more)].mT * more], 1))
    return torch.stack(of_ones), torch.stack(of_others)


def _root(matrix: Tensor) -> Tensor:
    """Return ``L`` of ``L L'``, a symmetric positive semidefinite matrix (n, n)."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return root
