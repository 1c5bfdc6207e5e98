"""Faster versions of NNI's pruning metrics, with the same values. Nobody gets them without asking."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from nni.compression.pruning import basic_pruner, tools
from nni.compression.pruning.tools import calculate_metrics
from torch import Tensor

from nni_topo.compat.ranking import use_fast_ranking
from nni_topo.errors import ConfigError

_MAX_ELEMENTS = 2**22  # 16 MiB of distances at a time
_CANCELS = 0.2  # at this share of the rows' lengths a float32 product still gives six digits
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
    O(n² d) for n blocks of d values, as NNI's loop, at a bounded memory.

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
    # distances don't change, but the products behind them lose less
    rows = rows - rows.mean(dim=0)
    sums, close = _sums_and_close_pairs(rows, p)
    if close and rows.dtype == torch.float32:
        sums, _ = _sums_and_close_pairs(rows.cpu().double(), p)
    return sums.type_as(blocks).reshape(blocks.shape[:-1])


def _sums_and_close_pairs(rows: Tensor, p: float) -> tuple[Tensor, bool]:
    """Sum the rows' distances, and tell whether a pair is so close that the product behind it cancels."""
    lengths = rows.norm(dim=1)
    size = max(1, _MAX_ELEMENTS // max(1, len(rows)))
    sums, close = [], 0
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        distances = torch.cdist(rows[part], rows, p=p, compute_mode="use_mm_for_euclid_dist")
        distances.diagonal(start).zero_()
        close += int((distances < _CANCELS * (lengths[part, None] + lengths)).sum())
        sums.append(distances.sum(dim=1))
    return torch.cat(sums), p == 2 and close > len(rows)


def _use(function: Any) -> None:
    for module in (basic_pruner, tools, calculate_metrics):
        module.fpgm_metrics = function
