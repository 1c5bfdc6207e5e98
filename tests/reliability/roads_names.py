"""Layers of classes of one's own that have the name of one of PyTorch's, by which NNI selects and masks them."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from reliability.oracle import WrongError
from reliability.roads import Road
from reliability.serving import UnsaidError, WholeError
from torch import Tensor, nn
from torch.nn import functional

import nni_topo


class OwnLinear(nn.Module):
    """As of PyTorch Geometric and of minGPT's descendants: a weight, a bias, and one product."""

    def __init__(self, width: int, out: int, bias: bool = True) -> None:
        super().__init__()
        self.in_channels, self.out_channels = width, out
        self.weight = nn.Parameter(torch.randn(out, width) / math.sqrt(width))
        self.bias = nn.Parameter(0.1 * torch.randn(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class EqualizedLinear(OwnLinear):
    """Scales weight and bias at run time, as progressive GANs and StyleGAN do."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * 0.7, self.bias * 1.3)


class LowRankLinear(OwnLinear):
    """Adds a product of two small matrices to its weight, as LoRA does."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, width)), nn.Parameter(0.1 * torch.randn(out, 2))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight + self.lora_B @ self.lora_A, self.bias)


class ActivatedLinear(OwnLinear):
    """Goes on with an activation, as StyleGAN's fully connected layers do: more than a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.leaky_relu(super().forward(x), 0.2) * math.sqrt(2)


class OwnConv2d(nn.Module):
    """A convolution with a weight of its own."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width, 3, 3) / math.sqrt(9 * width))
        self.bias = nn.Parameter(0.1 * torch.randn(out))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, self.bias, self.stride, 1)


class StandardizedConv2d(OwnConv2d):
    """Weight standardization (Qiao et al., 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = centred / (centred.std((1, 2, 3), keepdim=True) + 1e-5)
        return functional.conv2d(x, weight, self.bias, self.stride, 1)


class ReflectedConv2d(OwnConv2d):
    """Pads with the image's own border, as CycleGAN's generators do."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="reflect"), self.weight, self.bias, self.stride)


def named(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """Return a class of one of PyTorch's names that computes what ``kind`` does."""
    return type(name, (kind,), {})


class Perceptron(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        linear: Any = named(kind, "Linear")
        self.a, self.b, self.head = linear(12, 24), linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu())


class Convolutions(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        conv: Any = named(kind, "Conv2d")
        self.a, self.b, self.head = conv(3, 16), conv(16, 16, 2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))


class Graph(nn.Module):
    """A network of PyTorch Geometric: its convolutions hold layers of its own class ``Linear``."""

    def __init__(self, convolution: str) -> None:
        super().__init__()
        from torch_geometric import nn as layers

        kind = getattr(layers, convolution)
        self.a, self.b = kind(8, 24), kind(24, 24)
        self.lin, self.head = layers.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.head(self.lin(self.b(self.a(x, edges).relu(), edges).relu()).relu())


def graph(nodes: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(nodes)
    return torch.randn(nodes, 8, generator=drawn), torch.randint(0, nodes, (2, 3 * nodes), generator=drawn)


def masked_by_hand(model: nn.Module, masks: Any, inputs: tuple[Any, ...]) -> Tensor:
    """Run the model with zeros in place of what the masked rows of each layer put out."""
    tried = copy.deepcopy(model)
    for name, targets in masks.items():
        kept = targets["weight"].flatten(1).any(1)

        def silence(module: nn.Module, entered: Any, out: Tensor, kept: Tensor = kept) -> Tensor:
            return out * (kept if module.weight.dim() == 2 else kept[:, None, None])

        tried.get_submodule(name).register_forward_hook(silence)
    with torch.no_grad():
        return tried(*inputs)


def prune(build: Callable[[], nn.Module], inputs: list[tuple[Any, ...]], cut: set[str]) -> None:
    """Halve the layers that NNI selects by name, and compare the dense network on all inputs.

    ``cut``: layers that have to lose channels.
    """
    torch.manual_seed(0)
    model = build().eval()
    example = inputs[0]
    config = [{"op_types": ["Linear", "Conv2d"], "sparse_ratio": 0.5, "exclude_op_names": ["head"]}]
    selected = {name for name, each in model.named_modules() if type(each).__name__ in config[0]["op_types"]} - {"head"}
    groups = nni_topo.dependency_groups(model, example, config)
    in_groups = {name for entry in groups for name in entry["op_names"]}
    if silent := selected - in_groups - groups.skipped.keys():
        raise UnsaidError(f"neither in a group nor skipped: {sorted(silent)}")
    if not groups:
        raise WholeError("; ".join(groups.skipped.values()))
    pruner = nni_topo.create_pruner("l1", model, groups)
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    dense = nni_topo.to_dense(model, example, masks)
    rows = {row.name: row for row in dense.report.rows}
    for name in masks:
        row = rows.get(name)
        if row is None or (row.after > row.asked and not row.reason):
            raise UnsaidError(f"masked, and not in the report: {name}")
    if whole := {name for name in cut if rows[name].after == rows[name].before}:
        raise WrongError(f"these layers should have lost channels: {sorted(whole)}")
    for each in inputs:
        expected = masked_by_hand(model, masks, each)
        with torch.no_grad():
            found = dense(*each)
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
            raise WrongError(f"off by {float((found - expected).abs().max()):.3g} on {[tuple(t.shape) for t in each]}")


ROWS = [(torch.randn(4, 12),), (torch.randn(7, 12),), (torch.randn(2, 3, 12),)]
IMAGES = [(torch.randn(2, 3, 16, 16),), (torch.randn(3, 3, 21, 18),)]


def _road(name: str, build: Callable[[], nn.Module], inputs: list[tuple[Any, ...]], *cut: str) -> Road:
    return Road("names", name, lambda: prune(build, inputs, set(cut)))


ROADS = [
    _road("linear", lambda: Perceptron(OwnLinear), ROWS, "a", "b"),
    _road("equalized-learning-rate", lambda: Perceptron(EqualizedLinear), ROWS, "a", "b"),
    _road("low-rank-update", lambda: Perceptron(LowRankLinear), ROWS, "a", "b"),
    _road("linear-with-activation", lambda: Perceptron(ActivatedLinear), ROWS),
    _road("weight-standardization", lambda: Convolutions(StandardizedConv2d), IMAGES, "a", "b"),
    _road("reflected-border", lambda: Convolutions(ReflectedConv2d), IMAGES),
]
if importlib.util.find_spec("torch_geometric"):
    GRAPHS = [graph(20), graph(33)]
    ROADS += [
        _road("pyg-sage", lambda: Graph("SAGEConv"), GRAPHS, "b.lin_l", "b.lin_r", "lin"),
        _road("pyg-gcn", lambda: Graph("GCNConv"), GRAPHS, "lin"),
    ]
