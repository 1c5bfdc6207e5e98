"""Modules of full width that work over the channels that are left, as in the network of a dense one's comparison."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from nni_topo.network.layers.norms import channel_dim, gives_no_channels, numbers_of
from nni_topo.network.layers.slicing import cut


class OverKept(nn.Module):
    """A module of full width that works on the channels that stay; the others are zero."""

    whole: type[nn.Module]  # the class of the module: a norm, or a convolution along channels
    kept: Tensor  # int64, (channels that are left,)
    kept_dim: int  # the dimension of the channels
    gives_none: bool  # whether no channels leave it

    def __reduce__(self) -> Any:
        return _made, (self.whole,), dict(vars(self))  # its class has no name by which pickle finds it

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Run on the channels of ``(batch, channels, ...)`` or ``(..., channels)`` that are left: of one argument."""
        (x,) = (*args, *kwargs.values())
        small: Any = copy.copy(self)
        small.__class__ = self.whole
        del small.whole, small.kept, small.kept_dim, small.gives_none
        small._parameters = dict(self._parameters)
        kept, dim = self.kept.to(x.device), self.kept_dim
        if self.whole is not nn.Conv1d:
            cut("", small, kept, kept)
            # views of the module's own parameters, so that these get the gradients
            for name, parameter in self._parameters.items():
                if parameter is not None:
                    small._parameters[name] = numbers_of(parameter, kept)
        found: Tensor = small.forward(x.index_select(dim, kept))
        if self.gives_none:
            return found
        shape = [*found.shape[:dim], x.shape[dim], *found.shape[dim % x.dim() + 1 :]]
        return found.new_zeros(shape).index_copy(dim, kept, found)


def run_over_kept(module: Any, kept: Tensor) -> None:
    """Let a module of full width work on some channels alone, in place; ``kept``: their indices, int64."""
    whole = module.whole if isinstance(module, OverKept) else type(module)
    if not isinstance(module, OverKept):
        module.kept_dim = 2 if whole is nn.Conv1d else channel_dim(module)
        module.gives_none = whole is not nn.Conv1d and gives_no_channels(module)
    module.__class__ = _over_kept(whole)
    module.whole, module.kept = whole, kept


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _over_kept(whole: type[nn.Module]) -> type[nn.Module]:
    if whole not in _CLASSES:
        _CLASSES[whole] = type(f"{whole.__name__}OverKept", (OverKept, whole), {})
    return _CLASSES[whole]


def _made(whole: type[nn.Module]) -> nn.Module:
    kind = _over_kept(whole)
    return kind.__new__(kind)
