"""The weights of a model's layers, and the graphs in which they connect inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.maths.topology.layer_graphs import LayerGraph, linear_graph
from nni_topo.network.layers.derived import graph_of_convolution
from nni_topo.network.layers.kinds import CONVOLUTIONS

_RECURRENT: dict[type[nn.Module], tuple[str, ...]] = {
    nn.LSTM: ("input", "forget", "cell", "output"),
    nn.LSTMCell: ("input", "forget", "cell", "output"),
    nn.GRU: ("reset", "update", "new"),
    nn.GRUCell: ("reset", "update", "new"),
    nn.RNN: ("hidden",),
    nn.RNNCell: ("hidden",),
}
_SUPPORTED: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *_RECURRENT)


@dataclass(frozen=True, eq=False)
class WeightLayer:
    """One weight matrix or kernel of a model, which connects inputs to outputs."""

    name: str  # the module's name; for a recurrent layer also parameter and gate, e.g. "lstm.weight_hh_l0[forget]"
    kind: str  # dense, recurrent or conv
    weight: NDArray[np.float64]  # (out, in) or (out, in / groups, *kernel), zero where NNI masks it
    module: nn.Module

    @property
    def groups(self) -> int:
        """Number of groups of a convolution, else 1."""
        return int(getattr(self.module, "groups", 1))

    @property
    def channel_tree(self) -> int:
        """Number of weights in the channel tree, see :func:`nni_topo.topology.channel_tree`."""
        outputs, inputs = self.weight.shape[:2]
        return int(self.groups * (outputs // self.groups + inputs - 1))

    def graph(self, input_size: tuple[int, ...] | None) -> LayerGraph:
        """Return the layer's graph; a convolution needs the input's size in pixels, without padding."""
        if self.kind != "conv" or input_size is None:
            return linear_graph(*self.weight.shape[:2])
        return graph_of_convolution(self.module, input_size)


def weight_layers(model: nn.Module) -> tuple[list[WeightLayer], dict[str, str]]:
    """Return a model's weights in order, and unsupported modules with weights, as a mapping of name to type."""
    layers: list[WeightLayer] = []
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        # NNI's wrapper is a child of the wrapped module, which is listed itself
        if name.rpartition(".")[2] == "_nni_wrapper":
            continue
        gates = next((names for kind, names in _RECURRENT.items() if isinstance(module, kind)), None)
        if gates is not None:
            for parameter, _ in module.named_parameters(recurse=False):
                if parameter.startswith("weight"):
                    names = ("projection",) if parameter.startswith("weight_hr") else gates
                    matrices = np.split(_values(module, parameter), len(names))
                    for gate, matrix in zip(names, matrices, strict=True):
                        layers.append(WeightLayer(f"{name}.{parameter}[{gate}]", "recurrent", matrix, module))
        elif isinstance(module, _SUPPORTED):
            kind = "dense" if isinstance(module, nn.Linear) else "conv"
            layers.append(WeightLayer(name, kind, _values(module, "weight"), module))
        elif any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)):
            skipped[name] = type(module).__name__
    if not layers:
        types = ", ".join(sorted(set(skipped.values()))) or "none"
        supported = ", ".join(kind.__name__ for kind in _SUPPORTED)
        raise ConfigError(
            f"a model must have a layer of type {supported}, got other weights of type: {types} "
            f"({type(model).__name__})"
        )
    return layers, skipped


def _values(module: nn.Module, parameter: str) -> NDArray[np.float64]:
    """Return a weight as the forward uses it: if NNI has wrapped the module, the wrapper's values times its mask."""
    wrapper = getattr(module, "_nni_wrapper", None)
    owner = wrapper if wrapper is not None and hasattr(wrapper, parameter) else module
    values: Tensor = getattr(owner, parameter).detach().to("cpu", torch.float64)
    mask = getattr(owner, f"{parameter}_mask", None) if owner is wrapper else None
    if mask is not None:
        values = values * mask.to("cpu", torch.float64)
    array: NDArray[np.float64] = values.numpy()
    return array
