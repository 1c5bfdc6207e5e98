"""The sizes at which a model's layers run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.network.attention import mixing_called
from nni_topo.network.layers import (
    CONVOLUTIONS,
    WEIGHTED,
    LayerSizes,
    call_of,
    check_covers_kernel,
    has_own_forward,
    inner_of,
)
from nni_topo.network.runtime import Call, evaluation_mode, left_alone, tensors_of, watched


def layer_sizes(model: nn.Module, call: Call) -> LayerSizes:
    """Note the shapes at which convolutions and linear layers run; ConfigError if the call doesn't fit the model."""
    sizes: LayerSizes = {}

    def note(name: str, entered: Any, left: Any) -> None:
        if not isinstance(entered, Tensor):
            return  # rows of several lengths, packed
        module: Any = model.get_submodule(name)
        attends, recurs = (isinstance(module, kind) for kind in (nn.MultiheadAttention, nn.RNNBase))
        leaving = (*entered.shape[:-1], 3 * entered.shape[-1]) if attends else tensors_of(left)[0].shape
        if inner_of(module) is not None:
            # What it goes on with behind its convolution has sizes of its own.
            call = call_of(module, entered)
            if isinstance(module, nn.Linear):
                leaving = (*entered.shape[:-1], module.out_features)
            else:
                leaving = (len(entered), module.out_channels, *call.output_size)
        pair = tuple(entered.shape), tuple(leaving)
        if recurs and not module.batch_first and entered.dim() == 3:
            pair = (pair[0][1::-1] + pair[0][2:], pair[1][1::-1] + pair[1][2:])
        sizes.setdefault(name, []).append(pair)

    def check(name: str, module: nn.Module, entered: Tensor) -> None:
        check_covers_kernel(name, call_of(module, entered))

    # Of attention: what makes queries, keys and values in one.
    kinds = (*WEIGHTED, nn.MultiheadAttention, nn.RNNBase)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    hooks = watched(
        # What another class does to its input before it convolves is its own affair, and so is what it needs.
        [
            (module, partial(check, name, module))
            for name, module in layers
            if isinstance(module, CONVOLUTIONS) and not has_own_forward(module)
        ],
        [(module, partial(note, name)) for name, module in layers],
    )
    with left_alone(model), hooks, evaluation_mode(model), mixing_called(model), torch.no_grad():
        try:
            model(*call[0], **call[1])
        except (RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
            raise ConfigError(f"example_inputs must be ones that the model runs on, got: {error} (forward)") from error
    return sizes
