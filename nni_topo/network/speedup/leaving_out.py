"""A full-width network that computes the kept channels as the dense network does.

Layers read zeros in place of removed channels, even if an earlier operation turned these into other values. Norms over
channels and channel-wise convolutions run over the kept channels only. All other operations treat each channel
separately. So kept channels have the same values as in the dense network.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.layers.kinds import CONVOLUTIONS, TRANSPOSED, is_depthwise, is_normalizing, per_channel_names
from nni_topo.network.layers.norms import channel_dim, dims_together, gives_no_channels, is_over_channels, numbers_of
from nni_topo.network.layers.slicing import cut, keep


def leave_out(model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, *, of_norms_alone: bool = False) -> None:
    """Make modules compute without removed channels, in place; ``is_kept``: which channels are kept, by group id.

    The model must not share parameters with another network. ``of_norms_alone``: change only norms over channels and
    gates.
    """
    for name, module in model.named_modules():
        kept_inputs = torch.from_numpy(np.asarray(is_kept[flow.entering_group_ids(name)]))
        if not of_norms_alone:
            leave_out_of(module, kept_inputs, flow, name)
        elif is_over_channels(module) and not bool(kept_inputs.all()):
            run_over_kept(module, kept_inputs.nonzero().flatten())


def leave_out_of(module: nn.Module, kept_inputs: Tensor, flow: ChannelFlow, name: str) -> None:
    """Make one module compute without removed channels; ``kept_inputs``: which of its input channels are kept, bool."""
    if bool(kept_inputs.all()):
        return
    if is_normalizing(module) or is_depthwise(module):
        for target in ["bias"] if is_depthwise(module) else per_channel_names(module):
            parameter = getattr(module, target, None)
            if isinstance(parameter, Tensor):
                parameter_mask = kept_inputs.repeat_interleave(parameter.numel() // len(kept_inputs)).view(
                    parameter.shape
                )
                keep(module, target, parameter.detach() * parameter_mask.to(parameter.device))
    elif name in flow.layers:
        dim = -1
        if isinstance(module, CONVOLUTIONS + TRANSPOSED):
            dim = 1
        module.register_forward_pre_hook(_ReadZeros(kept_inputs, dim), with_kwargs=True)
    if is_over_channels(module) or name in flow.channel_wise:
        run_over_kept(module, kept_inputs.nonzero().flatten())


class _ReadZeros:
    """A hook that puts zeros in place of a layer's removed input channels."""

    undone_by_copying = True  # `unwrapped_copy` removes this hook, as it removes NNI's masks

    def __init__(self, kept_inputs: Tensor, dim: int) -> None:
        self.kept, self.dim = kept_inputs, dim

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments with removed channels zeroed; a recurrent layer's state is unchanged."""
        if isinstance(module, nn.RNNBase) and args:
            return (tree_map_only(Tensor, self._zeroed, args[0]), *args[1:]), kwargs
        return tree_map_only(Tensor, self._zeroed, (args, kwargs))

    def _zeroed(self, x: Tensor) -> Tensor:
        if x.is_nested:
            return torch.nested.as_nested_tensor([self._zeroed(tensor) for tensor in x.unbind()])
        if not x.is_floating_point() or x.dim() < 2 or x.shape[self.dim] != len(self.kept):
            return x
        view = [1] * x.dim()
        view[self.dim] = -1
        return x.masked_fill(~self.kept.to(x.device).view(view), 0)


class OverKept(nn.Module):
    """A full-width norm or channel-wise convolution that runs over the kept channels; the others are zero."""

    whole: type[nn.Module]  # the module's own class
    kept: Tensor  # int64, (kept channels,)
    kept_dim: int  # the dimension of the channels
    kept_dims: int  # number of last dimensions whose entries are kept or removed, 1 for channels
    gives_none: bool  # whether its output has no channels, such as a spatial gate's

    def __reduce__(self) -> Any:
        return _made, (self.whole,), dict(vars(self))  # made at run time, so pickle can't find the class by name

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Run on the kept channels of the argument, ``(batch, channels, ...)`` or ``(..., channels)``."""
        (x,) = (*args, *kwargs.values())
        small: Any = copy.copy(self)
        small.__class__ = self.whole
        del small.whole, small.kept, small.kept_dim, small.kept_dims, small.gives_none
        small._parameters = dict(self._parameters)
        kept_places, dim = self.kept.to(x.device), self.kept_dim
        if self.whole is not nn.Conv1d:
            cut("", small, kept_places, kept_places)
            # selected from the module's own parameters, so that these get the gradients
            for name, parameter in self._parameters.items():
                if parameter is not None:
                    small._parameters[name] = numbers_of(parameter, kept_places)
        entries = x.flatten(-self.kept_dims)
        entering = entries.index_select(dim, kept_places)
        if self.kept_dims > 1:
            entering = entering.unflatten(-1, small.normalized_shape)
        output: Tensor = small.forward(entering)
        if self.gives_none:
            return output
        output = output.flatten(-self.kept_dims)
        shape = [*output.shape[:dim], entries.shape[dim], *output.shape[dim % entries.dim() + 1 :]]
        filled = output.new_zeros(shape).index_copy(dim, kept_places, output)
        if self.kept_dims > 1:
            filled = filled.unflatten(-1, x.shape[-self.kept_dims :])
        return filled


def run_over_kept(module: Any, kept_places: Tensor) -> None:
    """Make a full-width module run over some channels only, in place; ``kept_places``: their indices, int64."""
    module_class = module.whole if isinstance(module, OverKept) else type(module)
    if not isinstance(module, OverKept):
        module.kept_dim = 2 if module_class is nn.Conv1d else channel_dim(module)
        module.kept_dims = dims_together(module)
        module.gives_none = module_class is not nn.Conv1d and gives_no_channels(module)
    module.__class__ = _over_kept(module_class)
    module.whole, module.kept = module_class, kept_places


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _over_kept(module_class: type[nn.Module]) -> type[nn.Module]:
    if module_class not in _CLASSES:
        _CLASSES[module_class] = type(f"{module_class.__name__}OverKept", (OverKept, module_class), {})
    return _CLASSES[module_class]


def _made(module_class: type[nn.Module]) -> nn.Module:
    kind = _over_kept(module_class)
    return kind.__new__(kind)
