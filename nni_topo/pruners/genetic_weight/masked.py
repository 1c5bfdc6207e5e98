"""Layers and networks with many masks of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_topo.errors import DataError
from nni_topo.maths.search.gene_layers import BoolArray, FloatArray

_CONVOLVE = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}


class MaskedScores:
    """A score per mask by masking, running ``score()`` and unmasking: what works for every network."""

    def __init__(self, weights: Sequence[Tensor], score: Callable[[], float]) -> None:
        self.weights = list(weights)
        self.score = score

    def __call__(self, population: Iterable[BoolArray]) -> FloatArray:
        """Return the scores, shape ``(individuals,)``; DataError if one isn't a finite number."""
        whole = [weight.detach().clone() for weight in self.weights]
        try:
            return np.array([self._masked_score(genes, whole) for genes in population])
        finally:
            for weight, value in zip(self.weights, whole, strict=True):
                weight.data.copy_(value)

    def _masked_score(self, genes: BoolArray, whole: list[Tensor]) -> float:
        for weight, value, mask in zip(self.weights, whole, split_genes(genes, whole), strict=True):
            weight.data.copy_(value * mask)
        score = float(self.score())
        if not np.isfinite(score):
            raise DataError(f"an evaluation must return a finite number, got {score} (genetic search)")
        return score


def split_genes(genes: BoolArray, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return a boolean mask per weight tensor, on its device."""
    masks, start = [], 0
    for weight in weights:
        part = torch.from_numpy(genes[start : start + weight.numel()])
        masks.append(part.reshape(weight.shape).to(weight.device))
        start += weight.numel()
    return masks


def multiply_many(layer: nn.Linear, inputs: Tensor, weights: Tensor, folded: bool) -> Tensor:
    """Return a linear layer's outputs ``(individuals, samples, ..., out)`` for as many weights, without the bias."""
    del layer
    # Each individual has inputs of its own, ``(individuals * samples, ..., in)``; else one product serves all of them.
    if folded:
        parts = inputs.unflatten(0, (len(weights), -1))
        product: Tensor = torch.matmul(parts.flatten(1, -2), weights.mT).unflatten(1, parts.shape[1:-1])
        return product
    joint: Tensor = torch.matmul(inputs, weights.flatten(0, 1).T).unflatten(-1, (len(weights), -1))
    return joint.movedim(-2, 0)


def convolve_many(layer: Any, inputs: Tensor, weights: Tensor, folded: bool) -> Tensor:
    """Return the same of a convolution, ``(individuals, samples, out, ...)``, by one convolution with more channels."""
    count = len(weights)
    if folded or layer.groups > 1 or layer.padding_mode != "zeros":
        if not folded:
            inputs = inputs.expand(count, *inputs.shape).flatten(0, 1)
        joint = inputs.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)
        groups = count * layer.groups
    else:
        joint, groups = inputs, 1
    padding = layer.padding
    if layer.padding_mode != "zeros":
        joint = functional.pad(joint, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    convolve = next(function for kind, function in _CONVOLVE.items() if isinstance(layer, kind))
    outputs: Tensor = convolve(joint, weights.flatten(0, 1), None, layer.stride, padding, layer.dilation, groups)
    parted: Tensor = outputs.unflatten(1, (count, -1)).transpose(0, 1)
    return parted
