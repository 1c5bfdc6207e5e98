"""Faster versions of NNI's pruning metrics, with the same values. Nobody gets them without asking."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from nni.compression.pruning import basic_pruner, tools
from nni.compression.pruning.tools import calculate_metrics
from torch import Tensor

from nni_topo.compat.ranking import use_fast_ranking
from nni_topo.errors import ConfigError

_MAX_ELEMENTS = 2**22  # 16 MiB of distances at a time
_CANCELS = 0.05  # from this share of the rows' squared lengths on, a float32 product gives five digits of a distance
_MANY = 5  # pairs a row; more are cheaper as a product in float64
_NNI_FPGM = calculate_metrics.fpgm_metrics


def enable_fast_metrics() -> None:
    """Let NNI compute FPGM's metric by `fpgm_metrics`, and global thresholds by `ranking.global_threshold`.

    See Also
    --------
    disable_fast_metrics : put NNI's loops back.
    """
    _use(fpgm_metrics)
    use_fast_ranking(True)


def disable_fast_metrics() -> None:
    """Let NNI use its own loops again."""
    _use(_NNI_FPGM)
    use_fast_ranking(False)


def fpgm_metrics(
    p: float, data: Mapping[str, Mapping[str, Tensor]], target_spaces: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Tensor]]:
    """Compute the summed distance of every block of a target to all other blocks.

    Place: ``nni/compression/pruning/tools/calculate_metrics.py``, ``fpgm_metrics``; on every version. Cause: a loop
    over the blocks that makes a tensor as large as the target for each. The values agree to 1e-5, relatively.

    Parameters
    ----------
    p : float
        Order of the norm.
    data : mapping
        Tensors by module name and target name.
    target_spaces : mapping
        NNI's target spaces by module name and target name; each needs a scaler, i.e. a structured
        granularity.

    Returns
    -------
    dict
        Metrics by module name and target name, each in its mask's blocked shape, e.g. ``(O, 1, 1, 1)``.
        Larger is kept.

    Raises
    ------
    ConfigError
        If a target is to be pruned element by element.

    Notes
    -----
    O(n² d) for n blocks of d values, as NNI's loop, but as one product of matrices, at a bounded memory; on a GPU it
    is as precise as ``torch.set_float32_matmul_precision`` says.

    References
    ----------
    Y. He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration",
    CVPR 2019, https://arxiv.org/abs/1811.00250
    """
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


def summed_distances(blocks: Tensor, p: float = 2.0) -> Tensor:
    """Sum the distances of every block to all blocks.

    Parameters
    ----------
    blocks : Tensor of shape (..., d)
        Blocks of d values.
    p : float, default 2.0
        Order of the norm.

    Returns
    -------
    Tensor of shape (...)
        The sums, in the type of ``blocks``.
    """
    rows = blocks.reshape(-1, blocks.shape[-1])
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    if p == 2:
        # distances don't change, but the products behind them lose less: a row's sum is now at least n times its length
        rows = rows - rows.mean(dim=0)
    size = max(1, _MAX_ELEMENTS // max(1, len(rows)))
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


def _use(function: Any) -> None:
    for module in (basic_pruner, tools, calculate_metrics):
        module.fpgm_metrics = function
