"""Contributions of removed channels in NNI's wrapped model: constants, and zeros in norms.

After a batch norm or a sigmoid, a removed channel is a constant. A layer that reads constants adds one number to each
of its output channels, which its bias can add instead. Norms over channels count removed channels as zeros.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nni_topo.network.channels.flow import ChannelFlow, only_norm_after
from nni_topo.network.layers.derived import inner_of, is_followed, kind_of
from nni_topo.network.layers.kinds import CONVOLUTIONS, WEIGHTED, by_channel, is_depthwise
from nni_topo.network.layers.norms import channel_dim, dims_together, entries_last, is_over_channels
from nni_topo.network.layers.slicing import keep
from nni_topo.network.runtime.copies import left_alone
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import Call, fitting, random_like, run_few

TOLERANCE = 1e-5  # of a channel's largest value; rounding is below


def constants_read(
    model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, call: Call
) -> tuple[dict[str, Tensor], list[str]]:
    """Run a model on two random inputs, and measure the constant values of pruned channels that layers read.

    Returns these by layer, (input channels,), zero for other channels, and the layers that lose a part of what pruned
    channels contribute.
    """
    # By layer and call, the smallest and largest value of each pruned input channel: (2, pruned).
    ends: dict[str, list[Tensor]] = {}
    removed: dict[str, Tensor] = {}

    def look(name: str, entered: Tensor) -> None:
        rows, pruned = by_channel(model.get_submodule(name), entered), removed[name]
        if len(rows) == len(pruned):
            pruned_rows = rows[pruned.to(rows.device)]
        else:  # a call with another number of channels: unknown
            pruned_rows = rows.new_full((int(pruned.sum()), 1), torch.nan)
        ends.setdefault(name, []).append(torch.stack([pruned_rows.amin(1), pruned_rows.amax(1)]).cpu().double())

    def zero(stays: Tensor, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        view = [-1] if isinstance(layer, nn.Linear) else [-1, *[1] * (output.dim() - 2)]
        return output * stays.to(output).view(view)

    entering, leaving = list[Any](), list[Any]()
    for name in flow.layers:
        module = model.get_submodule(name)
        pruned, kept_outputs = (torch.from_numpy(np.asarray(array)) for array in _pruned_and_kept(flow, is_kept, name))
        if isinstance(module, WEIGHTED) and bool(pruned.any()):
            removed[name] = pruned
            entering.append((module, partial(look, name)))
        # In a layer with operations after its convolution, a pruned channel may be other than zero.
        if isinstance(module, WEIGHTED) and not bool(kept_outputs.all()) and not is_followed(module):
            leaving.append((module, partial(zero, kept_outputs, module)))
    # Two inputs, because on one of them a channel with a single position looks constant.
    for seed in range(2):
        with fitting(0, "example_inputs"), torch.no_grad(), watched(entering, leaving):
            run_few(model, random_like(call, torch.Generator().manual_seed(seed)))
        if not any(bool(call_ends.any()) for layer_ends in ends.values() for call_ends in layer_ends):
            break
    constants, lacking = dict[str, Tensor](), list[str]()
    for name in removed:
        seen = torch.stack(ends.get(name) or [torch.zeros(2, 1)])
        if not bool(seen.any()):
            continue
        lowest, highest = seen[:, 0].amin(0), seen[:, 1].amax(0)
        largest = torch.maximum(lowest.abs(), highest.abs())
        values = torch.where(highest - lowest <= TOLERANCE * largest, highest, 0.0)
        is_lost = seen.ne(0).flatten(0, 1).any(0) & (values == 0)
        if bool(is_lost.any()) or not _can_absorb(model.get_submodule(name), only_norm_after(model, flow, name)):
            lacking.append(name)
        if bool(values.any()):
            pruned = removed[name]
            constants[name] = torch.zeros(len(pruned), dtype=torch.float64).masked_scatter(pruned, values)
    return constants, lacking


@torch.no_grad()
def absorb(model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, constants: dict[str, Tensor]) -> None:
    """Fold constants into the biases of the layers that read them.

    The layers' weights for these channels become zero. If a layer has no bias, the constant is subtracted from the
    running mean of the batch norm after it. Parameters are replaced; buffers are changed in place, so they must not be
    shared.
    """
    for name, values in constants.items():
        module: Any = model.get_submodule(name)
        norm = only_norm_after(model, flow, name)
        if not _can_absorb(module, norm):
            continue
        weight = module.weight
        pruned, kept_outputs = (torch.from_numpy(np.asarray(array)) for array in _pruned_and_kept(flow, is_kept, name))
        values = values * pruned  # some may be kept again since they were measured
        rows = values.to(weight.device).view(getattr(module, "groups", 1), -1)
        rows = rows.repeat_interleave(len(weight) // len(rows), 0)
        sums = weight.double()
        if weight.dim() > 2:
            sums = sums.flatten(2).sum(2)
        contribution = sums.mul(rows).sum(1)
        contribution = (contribution * kept_outputs.to(contribution)).to(weight)
        keep(module, "weight", weight * (rows == 0).view(*rows.shape, *[1] * (weight.dim() - 2)))
        if module.bias is not None:
            keep(module, "bias", module.bias + contribution)
        else:
            norm.running_mean.sub_(contribution)  # type: ignore[union-attr,operator]


def _can_absorb(module: nn.Module, norm: nn.Module | None) -> bool:
    """Tell whether the bias of a layer, or the batch norm after it, can add the layer's response to constants."""
    if not isinstance(module, (*CONVOLUTIONS, nn.Linear)) or is_depthwise(module):
        return False
    # The layer must apply its own weight to its input, and add its own bias.
    inner = inner_of(module)
    is_plain = type(module) is kind_of(module) or (inner is not None and inner.is_own)
    return is_plain and (isinstance(module.bias, Tensor) or norm is not None)


def _pruned_and_kept(flow: ChannelFlow, is_kept: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return which input channels of a layer are pruned, and which of its output channels are kept."""
    return ~is_kept[flow.entering_group_ids(name)], is_kept[flow.group_ids_of(name)]


@torch.no_grad()
def fit_norms(wrapped: nn.Module, dense: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, call: Call) -> list[str]:
    """Fit norms over the kept channels to norms over all channels, in place, on a call.

    Without the zeros of removed channels, a norm has another mean and deviation. For each norm, or each group of a
    group norm, weight and bias get the factor and the shift that undo most of the difference (least squares).

    ``wrapped``: the full-width network with masked weights, whose norms read removed channels as zeros; ``is_kept``:
    which channels are kept, by group id. Returns the norms that can't be fitted because their result isn't their weight
    times a value.
    """
    outputs, unfitted = dict[str, Tensor](), list[str]()
    noting, fitting_them = list[Any](), list[Any]()

    def note(name: str, kept_places: Tensor, _: Any, output: Tensor) -> None:
        entries = entries_last(wrapped.get_submodule(name), output)
        outputs.setdefault(name, entries.index_select(-1, kept_places.to(output.device)))

    def fit(name: str, entered: Tensor, output: Tensor) -> Tensor:
        norm: Any = dense.get_submodule(name)
        target = outputs.pop(name, None)
        if target is None:  # a later call
            return output
        weight, bias = norm.weight.view(-1), getattr(norm, "bias", None)
        bias = None if bias is None else bias.view(-1)
        shift = torch.zeros_like(weight) if bias is None else bias
        scaled = entries_last(norm, output) - shift
        groups = getattr(norm, "num_groups", 1)
        for rows in torch.arange(len(weight), device=weight.device).chunk(groups):
            x, y = scaled[..., rows].double(), (target[..., rows] - shift[rows]).double()
            weight_column = weight[rows].double().expand(x.shape)
            columns = [x.flatten(), weight_column.flatten()]
            if bias is None:
                columns = [x.flatten()]
            solution = torch.linalg.lstsq(torch.stack(columns, 1), y.reshape(-1, 1)).solution.flatten()
            if bias is not None:
                bias[rows] += (solution[1] * weight[rows].double()).to(bias)
            weight[rows] *= solution[0].to(weight)
        again: Tensor = norm.forward(entered)
        return again

    for name, module in wrapped.named_modules():
        kept_inputs = torch.from_numpy(np.asarray(is_kept[flow.entering_group_ids(name)]))
        if bool(kept_inputs.all()) or not is_over_channels(module):
            continue
        if _is_scaled_by_weight(dense.get_submodule(name)):
            noting.append((module, partial(note, name, kept_inputs.nonzero().flatten())))
            fitting_them.append((dense.get_submodule(name), partial(fit, name)))
        else:
            unfitted.append(name)
    args, kwargs = call
    with left_alone(wrapped, dense):
        with watched(leaving=noting):
            wrapped(*args, **kwargs)
        with watched(leaving=fitting_them):
            dense(*args, **kwargs)
    return unfitted


def _is_scaled_by_weight(norm: Any) -> bool:
    """Tell whether a norm's result is its weight times a value, plus its bias."""
    if set(norm._parameters) - {"weight", "bias"} or not isinstance(norm._parameters.get("weight"), Tensor):
        return False
    doubled = copy.deepcopy(norm)
    for parameter in doubled.parameters():
        parameter.mul_(2)
    x = torch.linspace(-1, 2, 8 * norm.weight.numel(), device=norm.weight.device, dtype=norm.weight.dtype)
    if dims_together(norm) > 1:
        x = x.view(2, 2, 2, *norm.weight.shape)
    else:
        x = x.view(2, 2, 2, -1).movedim(-1, channel_dim(norm) or 1)
    return torch.allclose(2 * norm.forward(x), doubled.forward(x), rtol=1e-2, atol=1e-2)
