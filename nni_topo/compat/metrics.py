"""Faster versions of NNI's pruning metrics, with the same values. Nobody gets them without asking."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from nni.compression.pruning import basic_pruner, tools
from nni.compression.pruning.tools import calculate_metrics, sparse_gen
from numpy.typing import NDArray
from torch import Tensor

from nni_topo.errors import ConfigError

_FEW = 64  # so many blocks are let in faster one by one
_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
NNI_THRESHOLD = sparse_gen._global_threshold_generate
NNI_FPGM = calculate_metrics.fpgm_metrics


def use_fast_metrics(fast: bool) -> None:
    """Let NNI compute FPGM's metric by `fpgm_metrics` and global thresholds by `global_threshold`, or by its loops."""
    sparse_gen._global_threshold_generate = global_threshold if fast else NNI_THRESHOLD
    for module in (basic_pruner, tools, calculate_metrics):
        module.fpgm_metrics = fpgm_metrics if fast else NNI_FPGM


def global_threshold(
    metrics: Mapping[str, Mapping[str, Tensor]], group: Sequence[tuple[str, str, Any]], sparse_number: int
) -> float:
    """Find the metric below which the blocks of a global group are pruned: the value of NNI's function, exactly.

    Place: ``nni/compression/pruning/tools/sparse_gen.py``, ``_global_threshold_generate``; on every version. Cause: it
    takes tensors apart element by element.
    """
    layers = [(metrics[module][target], space.target.numel()) for module, target, space in group]
    layers = [(metric, size) for metric, size in layers if metric.numel()]
    blocks = torch.cat([metric.detach().cpu().reshape(-1) for metric, _ in layers])
    every = (blocks.float() if blocks.dtype in _SINGLE else blocks.double()).numpy()
    if np.isnan(every).any():
        return float(NNI_THRESHOLD(metrics, group, sparse_number))
    counts = [metric.numel() for metric, _ in layers]
    grains = [size // count for count, (_, size) in zip(counts, layers, strict=True)]
    # All blocks hold the same number of elements: NNI's answer is one of the smallest values, found by selection, O(n).
    if len(set(grains)) == 1:
        rank = min(sparse_number // grains[0], len(every) - 1)
        return float(np.partition(every, rank)[rank])
    # Elsewhere it depends on the order of the targets: NNI drops the largest block for each that comes once
    # sparse_number elements are held, and a large one dropped for a small one makes room for the next. Blocks are
    # sorted once, O(n log n), and come in at a time per layer as long as layers with larger blocks follow; only the
    # others are let in one by one.
    order = _sorted_blocks(every, counts, grains)
    return float(every[order[_last_of_held(order, counts, grains, sparse_number)]])


def _sorted_blocks(metrics: NDArray[Any], counts: list[int], grains: list[int]) -> NDArray[np.int64]:
    """Sort blocks by metric and, where metrics are equal, from large blocks to small ones, as NNI's heap does."""
    places = {grain: place for place, grain in enumerate(sorted(set(grains), reverse=True))}
    keys = _as_integers(metrics) * len(places)
    keys += np.repeat([places[grain] for grain in grains], counts)
    order: NDArray[np.int64] = keys.argsort()
    return order


def _as_integers(values: NDArray[Any]) -> NDArray[np.int64]:
    """Give integers of the same order."""
    if values.dtype != np.float32:
        return np.unique(values, return_inverse=True)[1].astype(np.int64)
    # adding zero takes the sign off -0.0
    bits = (values + np.float32(0.0)).view(np.int32).astype(np.int64)
    ordered: NDArray[np.int64] = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered


def _last_of_held(order: NDArray[np.int64], counts: list[int], grains: list[int], sparse_number: int) -> int:
    """Find the rank of the block that would be dropped next after all have come in."""
    sizes = np.repeat(grains, counts)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    filled = np.cumsum(sizes)
    first = min(int(np.searchsorted(filled, sparse_number, side="right")) + 1, len(ranks))
    held = _Held(sizes[order], sparse_number, ranks[:first], int(filled[first - 1]))
    largest, end = 0, 0
    for count, grain in zip(counts, grains, strict=True):
        start, end = max(first, end), end + count
        largest = max(largest, grain)
        held.exchange(ranks[start:end], grain, at_once=grain == largest)
    return held.last


class _Held:
    """The blocks that are held at a time, by rank: one byte per block."""

    def __init__(self, sizes: NDArray[np.int64], number: int, ranks: NDArray[np.int64], size: int) -> None:
        self.sizes, self.number, self.size = sizes.tolist(), number, size
        self.flags = bytearray(len(sizes))
        self.view = np.frombuffer(self.flags, dtype=np.uint8)
        self.view[ranks] = 1
        self.last = int(ranks.max())

    def exchange(self, ranks: NDArray[np.int64], grain: int, *, at_once: bool) -> None:
        """Let in blocks of one size, ``at_once`` if none that is held is larger: from some point on none is missing."""
        if not at_once or len(ranks) < _FEW:
            self._exchange_singly(ranks.tolist(), grain)
            return
        missing = max(0, (self.number - self.size) // grain + 1)
        self._exchange_singly(ranks[:missing].tolist(), grain)
        self._keep_lowest(ranks[missing:], grain)

    def _keep_lowest(self, ranks: NDArray[np.int64], grain: int) -> None:
        """Let in as many blocks as are dropped: the size doesn't fall, so the lowest ranks stay."""
        ranks = ranks[ranks < self.last]
        if not len(ranks):
            return
        self.view[ranks] = 1
        held = np.flatnonzero(self.view[: self.last + 1])
        for rank in held[-len(ranks) :].tolist():
            self.flags[rank] = 0
            self.size += grain - self.sizes[rank]
        self.last = int(held[-len(ranks) - 1])

    def _exchange_singly(self, ranks: list[int], grain: int) -> None:
        """Let in blocks one by one, each against the last of those held unless there's room."""
        flags, sizes, number, size, last = self.flags, self.sizes, self.number, self.size, self.last
        for rank in ranks:
            if size <= number:
                flags[rank] = 1
                size += grain
                if rank > last:  # a call of max() for each block would take a third of the time
                    last = rank
            elif rank < last:
                flags[rank], flags[last] = 1, 0
                size += grain - sizes[last]
                last = flags.rfind(1, 0, last)
        self.size, self.last = size, last


_CANCELS = 0.05  # from this share of the rows' squared lengths on, a float32 product gives five digits of a distance
_MANY = 5  # pairs a row; more are cheaper as a product in float64


def fpgm_metrics(
    p: float, data: Mapping[str, Mapping[str, Tensor]], target_spaces: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Tensor]]:
    """Compute the summed distance of every block of a target to all other blocks, in its mask's blocked shape.

    Place: ``nni/compression/pruning/tools/calculate_metrics.py``, ``fpgm_metrics``; on every version. Cause: a loop
    over the blocks that makes a tensor as large as the target for each. The values agree to 1e-5, relatively.

    From Y. He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration",
    CVPR 2019, https://arxiv.org/abs/1811.00250
    """
    # O(n² d) for n blocks of d values, as NNI's loop, but as one product of matrices, at a bounded memory; on a GPU it
    # is as precise as torch.set_float32_matmul_precision says.
    metrics: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for module_name, targets in data.items():
        for target_name, target in targets.items():
            scaler = target_spaces[module_name][target_name]._scaler
            if scaler is None:
                raise ConfigError(
                    f"FPGM needs a structured granularity, got single elements ({module_name}.{target_name})"
                )
            metrics[module_name][target_name] = scaler.shrink(
                target, lambda blocks: summed_distances(blocks, p), keepdim=True
            )
    return metrics


def summed_distances(blocks: Tensor, p: float = 2.0, most: int = 2**22) -> Tensor:
    """Sum the p-norm distances of every block to all: blocks (..., d), sums (...) in their type; so many at a time."""
    rows = blocks.reshape(-1, blocks.shape[-1])
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    if p == 2:
        # distances don't change, but their products lose less: a row's sum is now at least n times its length
        rows = rows - rows.mean(dim=0)
    size = max(1, most // max(1, len(rows)))
    parts = (slice(start, start + size) for start in range(0, len(rows), size))
    find = _distances if p == 2 else partial(_distances_by_cdist, p=p)
    sums = [find(rows, part).sum(dim=1) for part in parts]
    return torch.cat(sums).type_as(blocks).reshape(blocks.shape[:-1])


def _distances_by_cdist(rows: Tensor, part: slice, p: float) -> Tensor:
    return torch.cdist(rows[part], rows, p=p)


def _distances(rows: Tensor, part: slice) -> Tensor:
    """Find the Euclidean distances of a part of the rows to all, by products, but of close rows by differences."""
    own, lengths = rows[part], torch.linalg.vecdot(rows, rows)
    scale = lengths[part, None] + lengths
    squares = torch.addmm(scale, own, rows.T, alpha=-2)
    squares.diagonal(part.start).zero_()
    if rows.dtype == torch.float32:
        close = squares <= scale.mul_(_CANCELS)
        number = int(close.count_nonzero())
        if number > _MANY * len(own):
            return _distances(rows.double(), part).float()
        if number > len(own):  # every row is close to itself
            first, second = close.nonzero(as_tuple=True)
            squares[close] = (own[first] - rows[second]).square().sum(dim=1)
    return squares.clamp_(min=0.0).sqrt_()
