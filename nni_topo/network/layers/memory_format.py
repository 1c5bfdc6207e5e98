"""Train with the memory format ``channels_last``, in which CPUs convolve faster, except in layers where it isn't safe.

For strided 1x1 convolutions with few channels in ``channels_last``, oneDNN writes the weights' gradient past its
workspace: it is wrong, or the process dies [1]_. Pruning makes such layers of a ResNet's shortcuts.

References
----------
.. [1] https://github.com/uxlfoundation/oneDNN/issues/6035
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nni_topo.errors import out_of_memory
from nni_topo.network.layers.derived import has_own_forward
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.network.runtime.hooks import watched

_FEW = 16  # channels that a vector register holds, at most


def lay_out(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """Give a model's weights the format ``channels_last``, in place, except where that isn't safe; return the model.

    If the model then doesn't run, as with a ``view`` of a feature map, all weights stay contiguous.
    """
    _put(model, torch.channels_last)
    for layer in _fragile(model):
        # A 1x1 kernel has the same order in both formats, so only a copy gets the contiguous strides.
        layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
    try:
        with evaluation_mode(model), inputs_laid_out(model), torch.no_grad():
            model(*args, **kwargs)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        lay_back(model)
    return model


def lay_back(model: nn.Module) -> None:
    """Give a model's weights the contiguous format again, in place."""
    _put(model, torch.contiguous_format)


def _put(model: nn.Module, layout: torch.memory_format) -> None:
    # Only tensors with four dimensions have this format.
    model._apply(lambda tensor: tensor.to(memory_format=layout) if tensor.dim() == 4 else tensor)


@contextmanager
def inputs_laid_out(model: nn.Module) -> Iterator[None]:
    """Within the context, layers for which ``channels_last`` isn't safe get contiguous inputs."""
    with watched(entering=[(layer, lambda values: values.contiguous()) for layer in _fragile(model)]):
        yield


def _fragile(model: nn.Module) -> list[nn.Conv2d]:
    layers = list[nn.Conv2d]()
    for layer in model.modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        # An overridden forward may use another stride than the attribute.
        skips = max(layer.stride) > 1 or has_own_forward(layer)
        if max(layer.kernel_size) == 1 and skips and layer.in_channels // layer.groups < _FEW:
            layers.append(layer)
    return layers
