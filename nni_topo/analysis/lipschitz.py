"""How much a layer can enlarge a difference of its inputs: Lipschitz constants that hold for all inputs.

References
----------
.. [1] H. Sedghi, V. Gupta, P. Long, "The singular values of convolutional layers", ICLR 2019.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.modules.batchnorm import _BatchNorm

from nni_topo.errors import ConfigError
from nni_topo.speedup.labels import tensor_shape
from nni_topo.speedup.layers import CONVOLUTIONS

_LARGEST = 2 * 10**8
_SLOPES = {
    "relu": 1.0, "relu6": 1.0, "leakyrelu": 1.0, "elu": 1.0, "celu": 1.0, "tanh": 1.0, "hardtanh": 1.0, "softplus": 1.0,
    "softsign": 1.0, "logsigmoid": 1.0, "sigmoid": 0.25, "hardsigmoid": 1.0 / 6.0, "softmax": 1.0, "gelu": 1.13,
    "silu": 1.1, "mish": 1.09, "hardswish": 1.5, "abs": 1.0,
}  # fmt: skip
_MOVES = {
    "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "clone", "identity",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "unflatten", "chunk", "split", "getitem", "cat", "concat", "add",
    "iadd", "sub", "neg",
}  # fmt: skip


def largest_changes(graph: GraphModule, other: GraphModule, inputs: Tensor) -> dict[str, float]:
    """Bound by how much the output of a network with other parameters can differ.

    Parameters
    ----------
    graph, other : torch.fx.GraphModule
        The same traced network with different parameters.
    inputs : torch.Tensor
        A batch.

    Returns
    -------
    dict of str to float
        By module what its change adds to the bound: the change of its output at the first network's activations,
        times the Lipschitz constants of the other network behind it.

    Raises
    ------
    ConfigError
        If an operation's Lipschitz constant isn't known, or parameters don't belong to modules.
    """
    runner = _Changes(graph, other)
    if "" in runner._moved:
        raise ConfigError("a global error bound needs parameters that belong to modules, got others (model)")
    with torch.no_grad():
        runner.run(inputs)
    return runner.known[next(node for node in graph.graph.nodes if node.op == "output")]


def norm(value: Any) -> float:
    """Return the Euclidean norm of a tensor over all its entries."""
    return float(torch.linalg.vector_norm(value.double())) if isinstance(value, Tensor) else 0.0


def operator_constant(graph_module: GraphModule, node: Node) -> float:
    """Return a Lipschitz constant, in the Euclidean norm, of what a node of a traced network does with its inputs.

    Parameters
    ----------
    graph_module : torch.fx.GraphModule
        A traced network with shapes, in evaluation mode.
    node : torch.fx.Node
        A node of it that reads values.

    Returns
    -------
    float
        At least 0. For an addition or concatenation: 1, for each of its inputs.

    Raises
    ------
    ConfigError
        If none is known for the operation.
    """
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.Linear):
        return float(torch.linalg.matrix_norm(module.weight.detach().double(), 2))
    if isinstance(module, CONVOLUTIONS):
        return convolution_constant(module, _shape(node.all_input_nodes[0])[2:])
    if isinstance(module, _BatchNorm) and module.running_var is not None:
        scale = (module.running_var.double() + module.eps).rsqrt()
        scale = scale if module.weight is None else scale * module.weight.detach().double()
        return float(scale.abs().max())
    name = _plain(module, node)
    if module is not None and "pool" in name:
        return _pooling_constant(module, name, node)
    if name in _SLOPES:
        return max(_SLOPES[name], _steepness(module, name, node))
    if name == "mean":
        return math.sqrt(math.prod(_shape(node)) / math.prod(_shape(node.all_input_nodes[0])))
    if name in _MOVES and not node.kwargs.get("alpha"):
        return 1.0
    raise ConfigError(f"a global error bound needs an operation of a known Lipschitz constant, got {name!r} ({node})")


def convolution_constant(module: Any, sides: Sequence[int]) -> float:
    """Return an upper bound of a convolution's operator norm.

    Parameters
    ----------
    module : torch.nn.Conv1d, Conv2d or Conv3d
        The convolution, padded with zeros or not at all.
    sides : sequence of int
        Sides of the images that enter.

    Returns
    -------
    float
        The norm of the convolution without a border, on a torus that is as large as the image and the kernel together,
        of which the layer computes a part [1]_. Where that takes too much memory, the geometric mean of the
        largest absolute row and column sums.

    Raises
    ------
    ConfigError
        If the padding isn't zeros.

    References
    ----------
    .. [1] H. Sedghi, V. Gupta, P. Long, "The singular values of convolutional layers", ICLR 2019.
    """
    if module.padding_mode != "zeros":
        raise ConfigError(f"a global error bound needs convolutions padded by zeros, got {module.padding_mode!r}")
    kernels = module.weight.detach().double().unflatten(0, (module.groups, -1))
    reach = [(k - 1) * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    torus = [side + more for side, more in zip(sides, reach, strict=True)]
    dims = tuple(range(3, kernels.dim()))
    if kernels.shape[:3].numel() * math.prod(torus) > _LARGEST:
        absolute = kernels.abs().sum(dims)
        return float((absolute.sum(2).amax(1) * absolute.sum(1).amax(1)).sqrt().max())
    spaced = kernels.new_zeros(*kernels.shape[:3], *(each + 1 for each in reach))
    every_other = (..., *(slice(None, None, d) for d in module.dilation))
    spaced[every_other] = kernels
    spectrum = torch.fft.fftn(spaced, s=torus, dim=dims).flatten(3)
    return float(torch.linalg.matrix_norm(spectrum.movedim(3, 1), 2).max())


def _pooling_constant(module: Any, name: str, node: Node) -> float:
    entering, leaving = _shape(node.all_input_nodes[0])[2:], _shape(node)[2:]
    if name.startswith("adaptive"):
        steps = list(zip(entering, leaving, strict=True))
        shares = [out / side if side % out == 0 else 2.0 / max(1, side // out) for side, out in steps]
        return math.sqrt(math.prod(shares)) if "avg" in name else math.sqrt(math.prod(min(2.0, 2 * s) for s in shares))
    kernel, stride = _sizes(module.kernel_size, len(entering)), _sizes(module.stride, len(entering))
    covers = math.prod(math.ceil(k / s) for k, s in zip(kernel, stride, strict=True))
    if getattr(module, "dilation", 1) not in (1, (1,) * len(entering)):
        covers = math.prod(kernel)
    unpadded = _sizes(module.padding, len(entering)) == [0] * len(entering) and not module.ceil_mode
    return math.sqrt(covers / math.prod(kernel)) if "avg" in name and unpadded else math.sqrt(covers)


def _sizes(value: int | Sequence[int], dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value)


def _steepness(module: Any, name: str, node: Node) -> float:
    """Slope of a leaky or exponential unit on its negative side."""
    knob = {"leakyrelu": "negative_slope", "elu": "alpha"}.get(name)
    if knob is None:
        return 0.0
    if module is not None:
        return abs(float(getattr(module, knob)))
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get(knob, 0.0)
    return abs(float(given))


def _plain(module: nn.Module | None, node: Node) -> str:
    if module is not None:
        return type(module).__name__.lower()
    if node.target is operator.getitem:
        return "getitem"
    return str(getattr(node.target, "__name__", node.target)).replace("_", "").lower()


def _shape(node: Node) -> tuple[int, ...]:
    shape = tensor_shape(node)
    if shape is None:
        raise ConfigError(f"a global error bound needs operations on single tensors, got another ({node})")
    return shape


class _Changes(Interpreter):
    """Runs the original and collects, at every node, by how much the pruned network can differ, layer by layer."""

    def __init__(self, graph: GraphModule, other: GraphModule) -> None:
        super().__init__(graph)
        self.other = other
        self.known: dict[Node, dict[str, float]] = {}
        mine, theirs = graph.state_dict(), other.state_dict()
        self._moved = {name.rpartition(".")[0] for name, value in mine.items() if not torch.equal(value, theirs[name])}

    def run_node(self, n: Node) -> Any:
        """Run a node of the original as usual."""
        value = super().run_node(n)
        if n.op in ("call_module", "call_function", "call_method"):
            found = _differences(self.other, n, self.known)
            if n.op == "call_module" and str(n.target) in self._moved:
                arguments = [self.env[parent] for parent in n.all_input_nodes]
                changed = self.other.get_submodule(str(n.target))(*arguments)
                found[str(n.target)] = found.get(str(n.target), 0.0) + norm(changed - value)
            self.known[n] = found
        elif n.op == "output":
            self.known[n] = self.known.get(n.all_input_nodes[0], {})
        return value


def _differences(graph_module: GraphModule, node: Node, known: dict[Node, dict[str, float]]) -> dict[str, float]:
    """Return what differences of a node's inputs can become at most, layer by layer.

    Parameters
    ----------
    graph_module : torch.fx.GraphModule
        The network with the weights that the differences run through.
    node : torch.fx.Node
        The node.
    known : dict of Node to dict of str to float
        By node the norms of differences, split by the layers that they come from.
    """
    total: dict[str, float] = {}
    parents = [known[parent] for parent in node.all_input_nodes if known.get(parent)]
    if not parents:
        return total
    constant = operator_constant(graph_module, node)
    for parent in parents:
        for layer, norm in parent.items():
            total[layer] = total.get(layer, 0.0) + constant * norm
    return total
