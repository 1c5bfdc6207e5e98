"""Which pairs of channels go from queries and keys under rotary positions: those whose logits are missed least."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nni_topo.maths.ties import FloatArray, first_smallest
from nni_topo.network.attention.heads import IntArray
from nni_topo.network.runtime.hooks import counted_places

_QUERIES = 16  # most queries of a sequence whose logits are used, evenly spaced
_NOTHING = 1e-12  # smallest variance of logits that counts, relative to the largest


class PairLogits:
    """Products of the contributions of pairs of channels to a head's logits, summed over causal queries and keys.

    The mean over a query's keys has no effect on attention and is removed. Padding doesn't count.
    """

    def __init__(self, frequencies: Tensor) -> None:
        self._frequencies = frequencies
        self._queries: Tensor | None = None
        self.products: Tensor | None = None  # (heads, pairs, pairs)

    def see_queries(self, rows: IntArray, _: Tensor, output: Tensor) -> None:
        """Store a call's queries, (samples, places, channels); ``rows``: the channels of each head (heads, size)."""
        self._queries = self._turned(output, rows)

    def see_keys(self, rows: IntArray, _: Tensor, output: Tensor) -> None:
        """Add the products for the keys of the same call, which several heads may share."""
        assert self._queries is not None
        queries, keys = self._queries, self._turned(output, rows)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        real = counted_places(output.shape[:-1])
        for sample, (asking, asked) in enumerate(zip(queries, keys, strict=True)):
            here = torch.arange(asked.shape[1], device=output.device)
            here = here if real is None else here[real[sample].to(here.device)]
            count = len(here)
            if not count:
                continue
            chosen = torch.linspace(0, count - 1, min(_QUERIES, count)).round().long().to(here.device)
            # (heads, queries, keys, pairs)
            logits = (asking[:, here[chosen]].unsqueeze(2) * asked[:, here].conj_physical().unsqueeze(1)).real
            reached = (torch.arange(count, device=here.device) <= chosen.unsqueeze(1)).unsqueeze(2).to(logits)
            means = (logits * reached).sum(2, keepdim=True) / reached.sum(1, keepdim=True)
            varying = ((logits - means) * reached).flatten(1, 2)
            products = varying.mT @ varying
            self.products = products if self.products is None else self.products + products
        self._queries = None

    def shares(self) -> FloatArray:
        """Return the products as shares of the variance of a head's logits, averaged over heads, (pairs, pairs)."""
        assert self.products is not None
        variances = self.products.sum((1, 2))
        alive = variances > _NOTHING * variances.max()
        found: FloatArray = (self.products / variances[:, None, None])[alive].mean(0).cpu().numpy()
        return found if alive.any() else np.zeros_like(found)

    def _turned(self, values: Tensor, rows: IntArray) -> Tensor:
        """Return pairs as complex numbers, rotated by their positions: (samples, heads, places, pairs)."""
        values = values.detach() if values.dim() == 3 else values.detach().unsqueeze(0)
        heads = values[..., torch.from_numpy(rows).to(values.device)].double()
        one, other = heads.unflatten(3, (2, -1)).unbind(3)
        places = torch.arange(values.shape[1], device=values.device)
        angles = torch.outer(places.double(), self._frequencies.to(places.device, torch.double))
        return (torch.complex(one, other) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)).transpose(1, 2)


def pairs_that_stay(shares: FloatArray, kept: int) -> np.ndarray:
    """Return which ``kept`` pairs are kept, bool (pairs,).

    Pairs are removed one by one, each time the pair whose removal changes the logits least; of equal ones the first.
    ``shares``: as `PairLogits.shares` returns them.
    """
    stays = np.ones(len(shares), dtype=bool)
    lost, scale = np.zeros(len(shares)), float(np.trace(shares))
    for _ in range(len(shares) - kept):
        errors = np.diag(shares) + 2.0 * lost
        found = np.flatnonzero(stays)[first_smallest(errors[stays], scale)]
        stays[found] = False
        lost += shares[found]
    return stays
