"""NNI's threshold for global sparsity without its loop over tensor elements. Nobody gets it without asking."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from nni.compression.pruning.tools import sparse_gen
from torch import Tensor

_PART = 1024
_FEW = 64  # so many items are pushed faster than the heap is built anew
_NNI_THRESHOLD = sparse_gen._global_threshold_generate


def use_fast_ranking(fast: bool) -> None:
    """Let NNI's ``generate_sparsity`` find global thresholds by `global_threshold`, or by its own loop again."""
    sparse_gen._global_threshold_generate = global_threshold if fast else _NNI_THRESHOLD


def global_threshold(
    metrics: Mapping[str, Mapping[str, Tensor]], group: Sequence[tuple[str, str, Any]], sparse_number: int
) -> float:
    """Find the metric below which the blocks of a global group are pruned: the value of NNI's function, exactly.

    Place: ``nni/compression/pruning/tools/sparse_gen.py``, ``_global_threshold_generate``; on every version. Cause:
    it takes tensors apart element by element.

    Parameters
    ----------
    metrics : mapping
        Metrics by module and target name.
    group : sequence of (str, str, target space)
        The targets that are ranked together.
    sparse_number : int
        Number of elements to prune, at least 0.

    Returns
    -------
    float
        Metrics below it are pruned.

    Notes
    -----
    Where all blocks hold the same number of elements, NNI's answer is one of the smallest values and is found by
    selection, O(n). Elsewhere it depends on the order of the targets (NNI keeps adding and dropping blocks of
    different sizes): the same heap is filled in the same order, from plain numbers, without what can't enter it.
    With NaN among the metrics NNI's own loop runs.
    """
    layers = [
        (metric, space.target.numel() // len(metric))
        for metric, space in ((metrics[m][t].detach().cpu().reshape(-1), space) for m, t, space in group)
        if len(metric)
    ]
    if any(bool(metric.isnan().any()) for metric, _ in layers):
        return float(_NNI_THRESHOLD(metrics, group, sparse_number))
    if len({grain for _, grain in layers}) == 1:
        every = torch.cat([metric for metric, _ in layers])
        rank = min(sparse_number // layers[0][1] + 1, len(every))
        return float(every.kthvalue(rank).values)
    return _threshold_by_heap(layers, sparse_number)


def _threshold_by_heap(layers: list[tuple[Tensor, int]], sparse_number: int) -> float:
    """Keep the smallest metrics in a heap that holds just more than ``sparse_number`` elements, as NNI does."""
    heap: list[tuple[float, int]] = []
    size = largest = 0
    for metric, grain in layers:
        largest = max(largest, grain)
        for part in metric.split(_PART):
            if size > sparse_number and grain == largest:
                # no exchange makes the heap too small here: what exceeds its largest metric never enters
                part = part[part <= -heap[0][0]]
            items = list(zip((-part).tolist(), repeat(grain), strict=False))
            missing = (sparse_number - size) // grain + 1 if size <= sparse_number else 0
            if missing > _FEW:
                heap += items[:missing]
                heapq.heapify(heap)
                size += grain * len(items[:missing])
                items = items[missing:]
            size = _exchange(heap, items, size, sparse_number)
    return -heap[0][0]


def _exchange(heap: list[tuple[float, int]], items: list[tuple[float, int]], size: int, sparse_number: int) -> int:
    """Let items into the heap, each against the largest metric in it unless there's room; return its new size."""
    push, exchange = heapq.heappush, heapq.heappushpop
    for item in items:
        if size <= sparse_number:
            push(heap, item)
            size += item[1]
        else:
            size += item[1] - exchange(heap, item)[1]
    return size
