"""NNI's threshold for global sparsity without its loop over tensor elements. Nobody gets it without asking."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from nni.compression.pruning.tools import sparse_gen
from torch import Tensor

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
    different sizes), and with NaN among the metrics on where they stand: then the same heap is filled in the same
    order, from plain numbers.
    """
    values = [metrics[module][target].detach().cpu().reshape(-1) for module, target, _ in group]
    grains = [
        space.target.numel() // len(metric) for (_, _, space), metric in zip(group, values, strict=True) if len(metric)
    ]
    values = [metric for metric in values if len(metric)]
    if len(set(grains)) == 1 and not any(bool(metric.isnan().any()) for metric in values):
        every = torch.cat(values)
        rank = min(sparse_number // grains[0] + 1, len(every))
        return float(every.kthvalue(rank).values)
    return _threshold_by_heap(values, grains, sparse_number)


def _threshold_by_heap(values: list[Tensor], grains: list[int], sparse_number: int) -> float:
    """Keep the smallest metrics in a heap that holds just more than ``sparse_number`` elements, as NNI does."""
    heap: list[tuple[float, int]] = []
    push, exchange = heapq.heappush, heapq.heappushpop
    size = 0
    for metric, grain in zip(values, grains, strict=True):
        for item in zip((-metric).tolist(), repeat(grain), strict=False):
            if size <= sparse_number:
                push(heap, item)
                size += grain
            else:
                size += grain - exchange(heap, item)[1]
    return -heap[0][0]
