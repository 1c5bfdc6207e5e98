"""Networks with many masks of the same weights, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from nni_topo.errors import DataError
from nni_topo.maths.search.gene_layers import BoolArray, FloatArray


class MaskedScores:
    """A score per mask by masking, running ``score()`` and unmasking: what works for every network.

    ``biases``: of each weight, the bias that an output loses with its last weight; None where it has none.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], score: Callable[[], float]) -> None:
        self.weights, self.biases = list(weights), list(biases)
        self.score = score

    def __call__(self, population: Iterable[BoolArray]) -> FloatArray:
        """Return the scores, shape ``(individuals,)``; DataError if one isn't a finite number."""
        changed = [each for each in (*self.weights, *self.biases) if each is not None]
        before = [each.detach().clone() for each in changed]
        scores = []
        try:
            for genes in population:
                for each, value in zip(changed, before, strict=True):
                    each.data.copy_(value)
                for weight, bias, mask in zip(self.weights, self.biases, split_genes(genes, self.weights), strict=True):
                    weight.data.mul_(mask)
                    if bias is not None:
                        bias.data.mul_(mask.flatten(1).any(1))
                found = self.score()
                try:
                    score = float(found)
                except (TypeError, ValueError, RuntimeError):
                    score = np.nan
                if not np.isfinite(score):
                    raise DataError(f"an evaluation must return a finite number, got {found!r} (genetic search)")
                scores.append(score)
        finally:
            for each, value in zip(changed, before, strict=True):
                each.data.copy_(value)
        return np.array(scores)


def split_genes(genes: BoolArray, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return a boolean mask per weight tensor, on its device."""
    masks, start = [], 0
    for weight in weights:
        part = torch.from_numpy(genes[start : start + weight.numel()])
        masks.append(part.reshape(weight.shape).to(weight.device))
        start += weight.numel()
    return masks
