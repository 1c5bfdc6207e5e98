"""Cut channels out of a module in place, so that it keeps its type, mode, hooks and precision."""

from __future__ import annotations

from typing import Any

import torch

from nni_topo.errors import SpeedupError
from nni_topo.network.layers.derived import fold
from nni_topo.network.layers.kinds import CONVOLUTIONS, RULES, TRANSPOSED, is_recurrent, row_names, weight_name
from nni_topo.network.layers.norms import channel_dim, cut_norm
from nni_topo.network.runtime.modules import put_attribute

_BATCH_NORMS = torch.nn.modules.batchnorm._NormBase  # instance norms too


def cut(name: str, module: Any, ins: torch.Tensor, outs: torch.Tensor) -> None:
    """Keep some input and output channels, ascending indices, in place; an embedding has no input channels."""
    if not len(outs) or not (len(ins) or isinstance(module, torch.nn.Embedding)):
        raise SpeedupError(f"a layer must keep at least one channel, got none left ({name})")
    fold(module)  # a computed weight depends on all inputs
    if isinstance(module, CONVOLUTIONS + TRANSPOSED):
        _cut_convolution(name, module, ins, outs)
    elif isinstance(module, torch.nn.Linear):
        keep(module, "weight", _part(module.weight, outs, ins))
        keep(module, "bias", _rows(module.bias, outs))
        module.in_features, module.out_features = len(ins), len(outs)
    elif isinstance(module, torch.nn.MultiheadAttention):
        keep(module, "in_proj_weight", _part(module.in_proj_weight, outs, ins))
        keep(module, "in_proj_bias", _rows(module.in_proj_bias, outs))
    elif isinstance(module, torch.nn.Embedding):
        keep(module, "weight", module.weight[:, outs])
        module.embedding_dim = len(outs)
    elif isinstance(module, torch.nn.RNNBase):
        for name in ("weight_ih_l0", "weight_ih_l0_reverse"):
            keep(module, name, None if not hasattr(module, name) else getattr(module, name)[:, ins])
        module.input_size = len(ins)
        if is_recurrent(module):
            _cut_units(module, outs)
    elif type(module) in RULES:
        RULES[type(module)].cut(module, outs)
    elif isinstance(module, _BATCH_NORMS):
        _cut_vectors(module, outs)
        # An instance norm without parameters may be called on more channels than ``num_features``.
        module.num_features = min(module.num_features, len(outs))
    elif isinstance(module, torch.nn.GroupNorm):
        _cut_group_norm(name, module, outs)
    elif isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
        cut_norm(module, outs)
    elif isinstance(module, torch.nn.PReLU) and module.num_parameters > 1:
        _cut_vectors(module, outs)
        module.num_parameters = len(outs)
    elif channel_dim(module) is not None:
        cut_norm(module, outs)


def _cut_units(module: Any, rows: torch.Tensor) -> None:
    """Keep some units of a recurrent layer in all stacked layers and directions, given the rows of their gates."""
    units = rows[rows < module.hidden_size]
    from_below = units
    if module.bidirectional:
        from_below = torch.cat([units, units + module.hidden_size])
    for name in (weight_name(module), *row_names(module)):
        parameter = getattr(module, name)[rows]
        if name.startswith("weight_hh"):
            parameter = parameter[:, units]
        elif name.startswith("weight_ih") and not name.startswith("weight_ih_l0"):
            parameter = parameter[:, from_below]
        keep(module, name, parameter)
    module.hidden_size = len(units)


def _part(weight: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
    """Select entries, in any order, along the first dimensions of a weight; return a new tensor."""
    part = weight
    for d, indices in enumerate(places):
        # Faster than brackets, which look up the entries of a second dimension one by one.
        if len(indices) < weight.shape[d] or bool((indices[1:] < indices[:-1]).any()):
            part = part.index_select(d, indices)
    if part is weight:
        return part.clone()
    return part


def _rows(tensor: torch.Tensor | None, indices: torch.Tensor) -> torch.Tensor | None:
    if tensor is None:
        return None
    return tensor[indices]


def keep(module: torch.nn.Module, name: str, value: torch.Tensor | None) -> None:
    """Replace a parameter or buffer by a new one of the same kind, which no other module shares."""
    old = getattr(module, name, None)
    if value is None or old is None:
        return
    if isinstance(old, torch.nn.Parameter):
        value = torch.nn.Parameter(value.detach(), requires_grad=old.requires_grad)
    put_attribute(module, name, value)


def _brief(counts: torch.Tensor) -> str:
    """Format the first few counts for a message."""
    return ", ".join(map(str, counts[:8].tolist())) + (", ..." if len(counts) > 8 else "")


def _cut_vectors(module: torch.nn.Module, indices: torch.Tensor) -> None:
    """Cut the parameters and buffers that have one entry a channel."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        keep(module, name, _rows(getattr(module, name, None), indices))


def _cut_group_norm(name: str, module: torch.nn.GroupNorm, indices: torch.Tensor) -> None:
    sizes = torch.bincount(indices // (module.num_channels // module.num_groups), minlength=module.num_groups)
    sizes = sizes[sizes > 0]
    if bool((sizes != sizes[0]).any()):
        raise SpeedupError(f"groups of a norm must keep equally many channels, got {_brief(sizes)} ({name})")
    _cut_vectors(module, indices)
    module.num_groups, module.num_channels = len(sizes), len(indices)


def _cut_convolution(name: str, module: Any, ins: torch.Tensor, outs: torch.Tensor) -> None:
    """Cut a convolution group by group; groups whose channels are all pruned are removed."""
    in_step, out_step = module.in_channels // module.groups, module.out_channels // module.groups
    in_groups, out_groups = ins // in_step, outs // out_step
    kept_groups = torch.unique(torch.cat([in_groups, out_groups]))
    ins_by_group = torch.bincount(in_groups, minlength=module.groups)[kept_groups]
    outs_by_group = torch.bincount(out_groups, minlength=module.groups)[kept_groups]
    counts = torch.stack([ins_by_group, outs_by_group])
    if not bool((counts == counts[:, :1]).all()) or not bool(counts.all()):
        raise SpeedupError(
            "groups of a convolution must keep equally many channels, got "
            f"{_brief(counts[0])} in and {_brief(counts[1])} out ({name})"
        )
    # The weight's shape is (out, in / groups, ...), or transposed (in, out / groups, ...).
    rows, columns = (ins, outs % out_step) if isinstance(module, TRANSPOSED) else (outs, ins % in_step)
    if module.groups == 1:
        keep(module, "weight", _part(module.weight, rows, columns))
    else:
        per_row = columns.view(len(kept_groups), -1).repeat_interleave(len(rows) // len(kept_groups), dim=0)
        weight = module.weight[rows]
        index = per_row.view(per_row.shape + (1,) * (weight.dim() - 2)).expand(-1, -1, *weight.shape[2:])
        keep(module, "weight", weight.gather(1, index.to(weight.device)))
    keep(module, "bias", _rows(module.bias, outs))
    module.in_channels, module.out_channels, module.groups = len(ins), len(outs), len(kept_groups)
