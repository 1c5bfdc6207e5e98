"""Lipschitz constants of layers, valid for all inputs, and the bound on a pruned network's error from them.

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
from torch.fx.node import map_arg
from torch.nn import functional
from torch.nn.modules import pooling
from torch.nn.modules.batchnorm import _BatchNorm

from nni_topo.errors import ConfigError
from nni_topo.network.graph.nodes import tensor_shape
from nni_topo.network.layers.derived import has_own_forward
from nni_topo.network.layers.kinds import CONVOLUTIONS, TRANSPOSED, norm_scale

# Upper bounds on slopes; negative_slope or alpha can make LeakyReLU and ELU steeper.
_SLOPES = {
    "relu": 1.0, "relu6": 1.0, "leakyrelu": 1.0, "elu": 1.0, "celu": 1.0, "tanh": 1.0, "hardtanh": 1.0, "softplus": 1.0,
    "softsign": 1.0, "logsigmoid": 1.0, "sigmoid": 0.25, "hardsigmoid": 1.0 / 6.0, "softmax": 1.0, "gelu": 1.13,
    "silu": 1.1, "mish": 1.09, "hardswish": 1.5, "abs": 1.0, "selu": 1.7581,
}  # fmt: skip
_MOVES = {
    "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "clone", "identity",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "unflatten", "chunk", "split", "getitem", "cat", "concat", "neg",
}  # fmt: skip
_SUMS = {"add", "iadd", "sub"}


def largest_changes(graph: GraphModule, pruned: GraphModule, inputs: Tensor) -> dict[str, float]:
    """Bound the Euclidean distance between two networks' outputs; return each changed module's term of the bound."""
    runner = _Changes(graph, pruned)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    # A parameter that the model uses outside of called modules would be missing in the bound.
    uncalled = sorted(runner._changed - called)
    if uncalled:
        raise ConfigError(
            "a global error bound needs parameters that belong to layers, got some that the model uses directly "
            f"({uncalled[0] or 'model'})"
        )
    with torch.no_grad():
        runner.run(inputs)
    return runner.bounds[next(node for node in graph.graph.nodes if node.op == "output")]


def norm(value: Any) -> float:
    """Return the Euclidean norm of a tensor over all its entries."""
    if not isinstance(value, Tensor):
        return 0.0
    return float(torch.linalg.vector_norm(value.double()))


def operator_constant(graph_module: GraphModule, node: Node) -> float:
    """Return a Lipschitz constant of a node in the Euclidean norm; ConfigError if none is known.

    The graph must hold shapes.
    """
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if module is not None and has_own_forward(module):
        raise ConfigError(f"a global error bound needs PyTorch's own layers, got {type(module).__name__} ({node})")
    if isinstance(module, nn.Linear):
        return float(torch.linalg.matrix_norm(module.weight.detach().double(), 2))
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return convolution_constant(module, _shape(node.all_input_nodes[0])[2:])
    if isinstance(module, _BatchNorm) and (scale := norm_scale(module)) is not None:
        return float(scale.abs().max())
    if isinstance(module, nn.PReLU):
        return max(1.0, float(module.weight.detach().abs().max()))
    pool = pooling_of(module, node)
    if pool is not None:
        return pooling_constant(pool, _shape(node.all_input_nodes[0])[2:], _shape(node)[2:])
    name = _operation_name(module, node)
    if name in _SLOPES:
        # LeakyReLU and ELU may be steeper on the negative side.
        knob = {"leakyrelu": "negative_slope", "elu": "alpha"}.get(name)
        if knob is None:
            return _SLOPES[name]
        slope: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get(knob, 0.0)
        if module is not None:
            slope = getattr(module, knob)
        return max(_SLOPES[name], abs(float(slope)))
    if name == "mean":
        # A mean of m entries has norm 1 / sqrt(m), and each entry belongs to one mean only.
        return math.sqrt(math.prod(_shape(node)) / math.prod(_shape(node.all_input_nodes[0])))
    repeats = False  # whether an index may read an entry more than once
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        repeats = not all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in index)
    # A sum has the constant 1 for each operand of the sum's shape; the caller accounts for broadcast operands.
    if name in _MOVES | _SUMS and not node.kwargs.get("alpha") and not repeats:
        return 1.0
    raise ConfigError(f"a global error bound needs an operation of a known Lipschitz constant, got {name!r} ({node})")


def convolution_constant(module: Any, sides: Sequence[int], most: int = 2 * 10**8) -> float:
    """Bound the operator norm of a zero-padded convolution on images of the given sides, in pixels.

    The bound is coarser if the convolution's spectrum has more than ``most`` values.
    """
    if module.padding_mode != "zeros":
        raise ConfigError(f"a global error bound needs convolutions padded by zeros, got {module.padding_mode!r}")
    kernels = module.weight.detach().double().unflatten(0, (module.groups, -1))
    reach = [(k - 1) * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    if isinstance(module, TRANSPOSED):
        # a transposed convolution first spreads its images by the stride
        sides = [(side - 1) * step + 1 for side, step in zip(sides, module.stride, strict=True)]
    # On a torus as large as image plus kernel nothing wraps around: the layer's output is a part of the convolution on
    # the torus, whose norm is the largest norm over its frequencies [1].
    torus = [side + more for side, more in zip(sides, reach, strict=True)]
    dims = tuple(range(3, kernels.dim()))
    if kernels.shape[:3].numel() * math.prod(torus) > most:
        # The spectrum takes too much memory: |A|_2 <= sqrt(|A|_1 |A|_inf), the largest absolute column and row sums.
        absolute = kernels.abs().sum(dims)
        return float((absolute.sum(2).amax(1) * absolute.sum(1).amax(1)).sqrt().max())
    spaced = kernels.new_zeros(*kernels.shape[:3], *(distance + 1 for distance in reach))
    every_other = (..., *(slice(None, None, d) for d in module.dilation))
    spaced[every_other] = kernels
    spectrum = torch.fft.fftn(spaced, s=torus, dim=dims).flatten(3)
    return float(torch.linalg.matrix_norm(spectrum.movedim(3, 1), 2).max())


def _operation_name(module: nn.Module | None, node: Node) -> str:
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
    """Runs the unpruned network and bounds the pruned network's difference at every node, by layer that causes it."""

    def __init__(self, graph: GraphModule, pruned: GraphModule) -> None:
        super().__init__(graph)
        self.other = pruned
        self.bounds: dict[Node, dict[str, float]] = {}
        values, pruned_values = graph.state_dict(), pruned.state_dict()
        changed = [name for name, value in values.items() if not torch.equal(value, pruned_values[name])]
        self._changed = {name.rpartition(".")[0] for name in changed}

    def run_node(self, n: Node) -> Any:
        """Run a node of the unpruned network and bound the pruned network's difference there."""
        value = super().run_node(n)
        if n.op in ("call_module", "call_function", "call_method"):
            # The node's bound, by the layer that causes the difference.
            terms: dict[str, float] = {}
            operands: list[Node] = []
            map_arg((n.args, n.kwargs), operands.append)  # a node that is an operand twice counts twice
            differing = [operand for operand in operands if self.bounds.get(operand)]
            constant = operator_constant(self.other, n) if differing else 0.0
            broadcasts = n.op != "call_module" and _operation_name(None, n) in _SUMS
            for operand in differing:
                # k copies of a difference have sqrt(k) times its norm
                copies = math.prod(_shape(n)) / math.prod(_shape(operand)) if broadcasts else 1.0
                for layer, difference in self.bounds[operand].items():
                    terms[layer] = terms.get(layer, 0.0) + constant * math.sqrt(copies) * difference
            if n.op == "call_module" and str(n.target) in self._changed:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                changed = self.other.get_submodule(str(n.target))(*args, **kwargs)
                terms[str(n.target)] = terms.get(str(n.target), 0.0) + norm(changed - value)
            self.bounds[n] = terms
        elif n.op == "output":
            self.bounds[n] = self.bounds.get(n.all_input_nodes[0], {})
        return value


_AVERAGES = (pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd)
_KNOBS = {
    "max_pool": ("MaxPool", ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")),
    "avg_pool": ("AvgPool", ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")),
    "adaptive_avg_pool": ("AdaptiveAvgPool", ("output_size",)),
}
_FUNCTIONS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    getattr(functional, f"{function}{sides}d"): (getattr(nn, f"{module}{sides}d"), knobs)
    for function, (module, knobs) in _KNOBS.items()
    for sides in (1, 2, 3)
}


def pooling_of(module: nn.Module | None, node: Node) -> nn.Module | None:
    """Return a node's pooling module, for a pooling function an equivalent module; None if it doesn't pool."""
    if module is None and node.op == "call_function" and node.target in _FUNCTIONS:
        kind, knobs = _FUNCTIONS[node.target]
        arguments: dict[str, Any] = dict(zip(knobs, node.args[1:], strict=False))
        module = kind(**arguments, **{knob: value for knob, value in node.kwargs.items() if knob != "input"})
    is_known = isinstance(module, (pooling._MaxPoolNd, *_AVERAGES)) and not getattr(module, "divisor_override", None)
    if not is_known:
        return None
    return module


def pooling_constant(pool: Any, entering: Sequence[int], leaving: Sequence[int]) -> float:
    """Return a pooling's Lipschitz constant in the Euclidean norm, from the image sides before and after it."""
    sides = []  # per side, the weight of each position in each window, (leaving, entering)
    for axis, (before, after) in enumerate(zip(entering, leaving, strict=True)):
        ones = torch.eye(before, dtype=torch.float64).unsqueeze(1)  # one image per position, 1 there and 0 elsewhere
        if isinstance(pool, pooling._AdaptiveAvgPoolNd):
            pooled = functional.adaptive_avg_pool1d(ones, after)
        else:
            names = ("kernel_size", "stride", "padding", "dilation")
            knobs = {name: getattr(pool, name) for name in names if getattr(pool, name, None) is not None}
            for name, value in knobs.items():
                if not isinstance(value, int):
                    knobs[name] = value[axis]
            knobs["ceil_mode"] = pool.ceil_mode
            if hasattr(pool, "count_include_pad"):
                pooled = functional.avg_pool1d(ones, **knobs, count_include_pad=pool.count_include_pad)
            else:  # 1 for each position in a window
                pooled = functional.max_pool1d(ones, **knobs)
        sides.append(pooled.squeeze(1).T)
    if isinstance(pool, _AVERAGES):
        # Average pooling is the Kronecker product of the averages along the sides, so the norms multiply.
        return math.prod(float(torch.linalg.matrix_norm(side, 2)) for side in sides)
    # A maximum changes by at most the norm of the changes in its window; an entry counts once per window.
    return math.sqrt(math.prod(float(side.sum(0).max()) for side in sides))
