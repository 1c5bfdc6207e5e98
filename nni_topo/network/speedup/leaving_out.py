"""Removed channels taken out where they are read, in a network of full width.

A layer that reads a removed channel reads a zero in its place, whatever an operation before it has made of it. A norm
over channels, or a convolution along them, runs over those that are left. All else treats each channel by itself. So
the channels that are left have the values that they have in the dense network.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.layers.kinds import CONVOLUTIONS, TRANSPOSED, is_depthwise, is_normalizing, per_channel_names
from nni_topo.network.layers.norms import is_over_channels
from nni_topo.network.layers.over_kept import run_over_kept
from nni_topo.network.layers.slicing import keep


def leave_out(model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, *, of_norms_alone: bool = False) -> None:
    """Take removed channels out of what modules read, in place.

    Parameters
    ----------
    model : torch.nn.Module
        A network with modules of the names that ``flow`` knows. No other network may share its parameters.
    flow : ChannelFlow
        How channels go through it.
    is_kept : ndarray of bool
        Which channels stay, by group id.
    of_norms_alone : bool, default=False
        Only norms over channels, and gates, leave them out.
    """
    for name, module in model.named_modules():
        kept = torch.from_numpy(np.asarray(is_kept[flow.entering_group_ids(name)]))
        if not of_norms_alone:
            leave_out_of(module, kept, flow, name)
        elif is_over_channels(module) and not bool(kept.all()):
            run_over_kept(module, kept.nonzero().flatten())


def leave_out_of(module: nn.Module, kept: Tensor, flow: ChannelFlow, name: str) -> None:
    """Take removed channels out of what one module reads; ``kept``: which channels that enter it stay, bool."""
    if bool(kept.all()):
        return
    if is_normalizing(module) or is_depthwise(module):
        for target in ["bias"] if is_depthwise(module) else per_channel_names(module):
            parameter = getattr(module, target, None)
            if isinstance(parameter, Tensor):
                own = kept.repeat_interleave(parameter.numel() // len(kept)).view(parameter.shape)
                keep(module, target, parameter.detach() * own.to(parameter.device))
    elif name in flow.layers:
        dim = 1 if isinstance(module, CONVOLUTIONS + TRANSPOSED) else -1
        module.register_forward_pre_hook(_ReadZeros(kept, dim), with_kwargs=True)
    if is_over_channels(module) or name in flow.channel_wise:
        run_over_kept(module, kept.nonzero().flatten())


class _ReadZeros:
    """A hook by which a layer reads zeros in place of removed channels."""

    undone_by_copying = True  # `unwrapped_copy` takes it off, as it does NNI's masks

    def __init__(self, kept: Tensor, dim: int) -> None:
        self.kept, self.dim = kept, dim

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments with zeros; a recurrent layer's state isn't what it reads."""
        if isinstance(module, nn.RNNBase) and args:
            return (tree_map_only(Tensor, self._zeroed, args[0]), *args[1:]), kwargs
        return tree_map_only(Tensor, self._zeroed, (args, kwargs))

    def _zeroed(self, x: Tensor) -> Tensor:
        if x.is_nested:
            return torch.nested.as_nested_tensor([self._zeroed(each) for each in x.unbind()])
        if not x.is_floating_point() or x.dim() < 2 or x.shape[self.dim] != len(self.kept):
            return x
        view = [1] * x.dim()
        view[self.dim] = -1
        return x.masked_fill(~self.kept.to(x.device).view(view), 0)
