"""Products of two tensors of activations, as attention computes: how many there are if channels are pruned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.fx
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from nni_topo.network.channels import FIXED, ChannelFlow, einsum_letters, operation_name
from nni_topo.network.graph import IN_TRAINING, tensor_shape

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class MatrixProduct:
    """The products of one operation.

    Attributes
    ----------
    factors : tuple of numpy.ndarray
        Group ids of the entries of each factor, int. They broadcast to one shape, each place of which is a product, or
        ``times`` equal ones. A product is computed as long as none of its factors is pruned.
    times : int
    """

    factors: tuple[IntArray, ...]
    times: int

    def count(self, pruned: BoolArray) -> int:
        """Count the products that stay; ``pruned``: bool, by group id."""
        kept = reduce(np.logical_and, [~pruned[group_ids] for group_ids in self.factors])
        return self.times * int(np.count_nonzero(kept))


@dataclass(frozen=True)
class _Factor:
    """A tensor whose dimensions stand where those of the other factor stand that they run along with."""

    ids: Tensor  # of length 1 where ids don't differ
    shape: tuple[int, ...]

    def at(self, *dims: int | None) -> _Factor:
        """Put dimensions, from the first on, in a new order; None stands for one of length 1."""
        order = [d for d in dims if d is not None]
        ids, shape = self.ids.permute(order), iter(self.shape[d] for d in order)
        for place, d in enumerate(dims):
            ids = ids.unsqueeze(place) if d is None else ids
        return _Factor(ids, tuple(1 if d is None else next(shape) for d in dims))


def products_of(graph: torch.fx.Graph, flow: ChannelFlow, times: int) -> list[MatrixProduct]:
    """List the products of two tensors that a graph computes itself, without those that stay in any case.

    ``times``: the call that the graph was recorded with has so many times the samples whose products are counted.
    """
    found = []
    for node in graph.nodes:
        reader = _READERS.get(operation_name(node)) if node.op in ("call_function", "call_method") else None
        if reader is None or IN_TRAINING in node.meta:
            continue
        for factors in reader(_ProductCall(node, flow)):
            products = _products(flow, factors, times)
            if products is not None:
                found.append(products)
    return found


def _products(flow: ChannelFlow, factors: list[_Factor], times: int) -> MatrixProduct | None:
    """Put the factors of products together; None if no channel that they hold can be pruned."""
    longest = max(len(each.shape) for each in factors)
    shapes = [(1,) * (longest - len(each.shape)) + each.shape for each in factors]
    sizes = [max(column) for column in zip(*shapes, strict=True)]
    own = [flow.group_ids(each.ids.numpy()) for each in factors]
    held = tuple(each for each in own if each.any())
    if not held:
        return None
    # Along a dimension in which no factor holds channels one place stands for all.
    lengths = [(1,) * (longest - each.ndim) + each.shape for each in held]
    alone = [size for size, column in zip(sizes, zip(*lengths, strict=True), strict=True) if max(column) == 1]
    # Where the number of products isn't a multiple of the samples', they don't depend on the samples.
    of_one, rest = divmod(math.prod(alone), times)
    return MatrixProduct(held, math.prod(alone) if rest else of_one)


class _ProductCall:
    """The call of an operation, with tensors as factors."""

    def __init__(self, node: Node, flow: ChannelFlow) -> None:
        self.node, self._flow = node, flow

    def factor(self, at: int, *names: str) -> _Factor | None:
        """Look up a tensor by one of its names, else by its position; None if its ids aren't known."""
        given: Any = next((self.node.kwargs[name] for name in names if name in self.node.kwargs), None)
        if given is None and len(self.node.args) > at:
            given = self.node.args[at]
        return self._as_factor(given)

    def operands(self) -> list[_Factor | None]:
        """Return the tensors of an Einstein sum, which may come in a list."""
        given: Any = self.node.args[1:]
        if len(given) == 1 and isinstance(given[0], (list, tuple)):
            given = given[0]
        return [self._as_factor(each) for each in given]

    def _as_factor(self, given: Any) -> _Factor | None:
        if not isinstance(given, Node):
            return None
        ids, shape = self._flow.ids.get(given.name), tensor_shape(given)
        return None if shape is None or not isinstance(ids, Tensor) or ids.dim() != len(shape) else _Factor(ids, shape)


def _matrices(one: _Factor | None, other: _Factor | None) -> list[list[_Factor]]:
    """Read a product of two matrices, or of batches of them: (..., rows, summed, columns)."""
    if one is None or other is None or min(len(one.shape), len(other.shape)) < 2:
        return []
    return [[one.at(*range(len(one.shape)), None), other.at(*range(len(other.shape) - 2), None, -2, -1)]]


def _product(call: _ProductCall) -> list[list[_Factor]]:
    """Read ``matmul``, ``bmm`` and ``mm``."""
    return _matrices(call.factor(0, "input"), call.factor(1, "other", "mat2", "tensor2"))


def _product_from_right(call: _ProductCall) -> list[list[_Factor]]:
    """Read ``__rmatmul__``, whose first argument is the second factor."""
    return _matrices(call.factor(1), call.factor(0))


def _product_added(call: _ProductCall) -> list[list[_Factor]]:
    """Read ``baddbmm`` and ``addmm``, whose first argument is added."""
    return _matrices(call.factor(1, "batch1", "mat1"), call.factor(2, "batch2", "mat2"))


def _linear(call: _ProductCall) -> list[list[_Factor]]:
    """Read a product with a weight, (outputs, inputs), that no layer holds."""
    states, weight = call.factor(0, "input"), call.factor(1, "weight")
    if states is None or weight is None or len(weight.shape) != 2:
        return []
    return [[states.at(*range(len(states.shape)), None), weight.at(1, 0)]]


def _attention(call: _ProductCall) -> list[list[_Factor]]:
    """Read attention of PyTorch's: each query is multiplied with each key, and each weight with each value."""
    query, key, value = (call.factor(at, name) for at, name in enumerate(("query", "key", "value")))
    if query is None or key is None or value is None:
        return []
    weights = _Factor(torch.full((1,) * len(query.shape), FIXED), (*query.shape[:-1], key.shape[-2]))
    keys = key.at(*range(len(key.shape) - 2), -1, -2)
    return [*_matrices(query, keys), *_matrices(weights, value)]


def _einstein_sum(call: _ProductCall) -> list[list[_Factor]]:
    """Read an Einstein sum of two tensors."""
    factors = call.operands()
    if len(factors) != 2 or any(each is None for each in factors):
        return []
    shapes = [each.shape for each in factors if each is not None]
    read = einsum_letters(call.node.args[0], shapes)
    if read is None:
        return []
    letters = list(dict.fromkeys("".join(read[0])))
    placed = [
        each.at(*(own.index(letter) if letter in own else None for letter in letters))
        for each, own in zip(factors, read[0], strict=True)
        if each is not None
    ]
    return [placed]


_READERS: dict[str, Callable[[_ProductCall], list[list[_Factor]]]] = {
    **dict.fromkeys(("matmul", "imatmul", "bmm", "mm"), _product),
    "rmatmul": _product_from_right,
    **dict.fromkeys(("baddbmm", "addmm"), _product_added),
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "einsum": _einstein_sum,
}
