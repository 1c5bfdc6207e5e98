"""Attention heads as blocks, for all pruners, where one layer makes queries, keys and values.

If these are separate layers, NNI's granularity and a dependency group are enough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nni.compression.base.setting import PruningSetting
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.utils.scaling import Scaling
from torch import Tensor

from nni_topo.compat.wrapping import calling, scaling, target_settings
from nni_topo.network.attention.heads import IntArray, find_heads
from nni_topo.network.attention.unfused.multihead import is_fused_attention, set_unfused
from nni_topo.network.layers.kinds import is_recurrent, row_names, weight_name
from nni_topo.pruners.transposed import OutputScaling, scale_by_outputs
from nni_topo.pruners.units import TargetSpaces, holds_columns

_WEIGHT = PruningSetting.default_setting["weight"]
_BIAS = {"align": {"module_name": None, "target_name": "in_proj_weight", "dims": [0]}, "apply_method": "mul"}
_GATE = {"align": {"module_name": None, "target_name": "weight_ih_l0", "dims": [0]}, "apply_method": "mul"}


class HeadScaling(Scaling):
    """Each block is the rows of one head, which lie in several segments: ``rows`` is ``(heads, rows)``.

    ``free_rows``: the number of rows that all heads share and that are in no block; they are never masked.
    """

    def __init__(self, rows: IntArray, free_rows: int = 0) -> None:
        super().__init__([rows.shape[1], -1], kernel_padding_mode="back", kernel_padding_val=-1)
        self.rows, self._free_rows = rows, free_rows
        self._order = torch.from_numpy(rows.ravel())
        self._back = torch.from_numpy(np.argsort(rows.ravel()))

    def shrink(
        self, target: Tensor, reduce_func: Callable[[Tensor], Tensor] | None = None, keepdim: bool = False
    ) -> Tensor:
        """Reduce each head of ``(rows, ...)`` to one value, by default the mean."""
        values: Tensor = super().shrink(target[self._order.to(target.device)], reduce_func, keepdim)
        return values

    def expand(self, target: Tensor, expand_size: list[int], keepdim: bool = False, full_expand: bool = True) -> Tensor:
        """Give each row the value of its head."""
        of_heads = [self.rows.size, *expand_size[1:]]
        by_row: Tensor = super().expand(target, of_heads, keepdim, full_expand)
        if not self._free_rows:
            return by_row[self._back.to(by_row.device)]
        values = by_row.new_ones(len(by_row) + self._free_rows, *by_row.shape[1:])
        values[self._order.to(by_row.device)] = by_row
        return values


class ColumnScaling(Scaling):
    """Blocks of columns. Scores are (blocks, 1), like scores of rows, because NNI adds up the scores of a group."""

    def shrink(
        self, target: Tensor, reduce_func: Callable[[Tensor], Tensor] | None = None, keepdim: bool = False
    ) -> Tensor:
        """Reduce each block to one value, by default the mean."""
        values: Tensor = super().shrink(target, reduce_func, keepdim)
        # A function that reduces nothing keeps each block's values in a trailing dimension.
        if keepdim:
            return values.reshape(-1, 1, *values.shape[target.dim() :])
        return values

    def expand(self, target: Tensor, expand_size: list[int], keepdim: bool = False, full_expand: bool = True) -> Tensor:
        """Give each element the value of its block."""
        if keepdim:
            target = target.reshape([1 if size == -1 else -1 for size in self.kernel_size])
        values: Tensor = super().expand(target, expand_size, keepdim, full_expand)
        return values


def scale_by_heads(model: Any, target_spaces: TargetSpaces) -> None:
    """Make each head one block in targets that hold queries, keys and values together and are pruned by heads."""
    for attention in find_heads(model).values():
        layer, rows = next(iter(attention.channels.items()))
        by_head, module = attention.granularity(layer), model.get_submodule(layer)
        weights = [weight_name(module)]
        if attention.recurrent:
            weights += [name for name in row_names(module) if name.startswith("weight")]
        for target in weights:
            space = target_spaces.get(layer, {}).get(target)
            # Single rows of nn.MultiheadAttention or a recurrent layer can't be pruned alone.
            granularities = (by_head, "out_channel") if layer == attention.name else (by_head,)
            if attention.is_fused and space is not None and space.granularity in granularities:
                space.granularity = by_head
                shared_rows = sum(segment.size for segment in attention.shared.get(layer, ()))
                space._scaler = HeadScaling(rows, shared_rows)
                if attention.recurrent and space.dependency_group_id is None:
                    space.dependency_group_id = f"units of {layer}"
    groups: dict[Any, list[PruningTargetSpace]] = defaultdict(list)
    for targets in target_spaces.values():
        for space in targets.values():
            if space.target is not None:
                groups[space.dependency_group_id].append(space)
    for group, spaces in groups.items():
        is_mixed = group is not None and len({space.target.dim() for space in spaces}) > 1
        for space in spaces:
            sizes = space.granularity
            # Blocks of several output channels become a column, too.
            has_blocks_of_rows = isinstance(sizes, list) and isinstance(sizes[0], int) and sizes[0] > 0
            if holds_columns(space) or (is_mixed and has_blocks_of_rows and set(sizes[1:]) <= {-1}):
                space._scaler = ColumnScaling(space.granularity)
            elif is_mixed and isinstance(space._scaler, OutputScaling):
                space._scaler = space._scaler.as_column()
            elif is_mixed and space.granularity == "out_channel":
                space._scaler = ColumnScaling([1, *[-1] * (space.target.dim() - 1)])


def _gates_of(module: Any) -> dict[str, Any] | None:
    """Return NNI's settings for the parameters of all levels of a recurrent layer; None for other layers."""
    if not is_recurrent(module):
        return None
    settings = {}
    for name in (weight_name(module), *row_names(module)):
        settings[name] = _WEIGHT if name.startswith("weight") else _GATE
    return settings


def show_heads_to_nni() -> None:
    """Register attention, its output projection, recurrent layers and norms with NNI; let all pruners prune heads."""
    PruningSetting.register("MultiheadAttention", {"in_proj_weight": _WEIGHT, "in_proj_bias": _BIAS})
    # The output projection of ``nn.MultiheadAttention``, a linear layer with another name.
    PruningSetting.register("NonDynamicallyQuantizableLinear", PruningSetting.registry["Linear"])
    for kind in ("LSTM", "GRU", "RNN"):
        gates = {"weight_ih_l0": _WEIGHT, "weight_hh_l0": _WEIGHT, "bias_ih_l0": _GATE, "bias_hh_l0": _GATE}
        PruningSetting.register(kind, gates)
    # NNI knows batch norms. RMS norms have no bias.
    for kind in ("GroupNorm", "LayerNorm", "SyncBatchNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"):
        PruningSetting.register(kind, PruningSetting.registry["BatchNorm2d"])
    PruningSetting.register("RMSNorm", PruningSetting.embedding_setting)
    if scale_by_heads not in scaling:
        target_settings.append(_gates_of)
        scaling.extend((scale_by_outputs, scale_by_heads))
        calling.append((is_fused_attention, set_unfused))
