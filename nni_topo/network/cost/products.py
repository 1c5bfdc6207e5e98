"""Products of tensors of activations, as attention computes: how many there are if channels are pruned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Graph, Node

from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.channels.rules import einsum_letters, operation_name
from nni_topo.network.graph.nodes import tensor_shape

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


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


class Product:
    """The products of two factors. Their dimensions broadcast to one shape, and each entry of it is a product.

    A product is computed as long as none of its factors is pruned. ``times``: as of `products_of`.
    """

    def __init__(self, factors: Iterable[_Factor], flow: ChannelFlow, times: int) -> None:
        one, other = factors
        longest = max(len(one.shape), len(other.shape))
        self._group_ids, shapes = list[IntArray](), list[tuple[int, ...]]()
        for each in (one, other):
            missing = longest - len(each.shape)
            shapes.append((1,) * missing + each.shape)
            self._group_ids.append(flow.group_ids(each.ids[(None,) * missing].numpy()))
        self._shape, self._times = tuple(map(max, *shapes)), times
        self.depends = any(each.any() for each in self._group_ids)  # on channels that can be pruned

    def count(self, pruned: BoolArray) -> int:
        """Count the products that stay; ``pruned``: bool, by group id."""
        one, other = self._group_ids
        both: BoolArray = ~pruned[one] & ~pruned[other]
        # A dimension of length 1 in `both` holds no channels: its one entry stands for all.
        places: int = math.prod(size for size, length in zip(self._shape, both.shape, strict=True) if length == 1)
        return int(np.count_nonzero(both)) * places // self._times


# The places and the names of the two factors, by operation.
_FIRST, _SECOND = (0, ("input",)), (1, ("other", "mat2", "tensor2"))
_FACTORS: dict[str, tuple[tuple[int, tuple[str, ...]], tuple[int, tuple[str, ...]]]] = {
    **dict.fromkeys(("matmul", "imatmul", "bmm", "mm"), (_FIRST, _SECOND)),
    "rmatmul": ((1, ()), (0, ())),
    **dict.fromkeys(("baddbmm", "addmm"), ((1, ("batch1", "mat1")), (2, ("batch2", "mat2")))),
    "linear": (_FIRST, (1, ("weight",))),  # with a weight, (outputs, inputs), that no layer holds
}


def products_of(graph: Graph, flow: ChannelFlow, times: int) -> list[Product]:
    """List the products of two tensors that a graph computes itself, without those that stay in any case.

    ``times``: the call that the graph was recorded with has so many times the samples whose products are counted.
    """
    found = list[Product]()

    def factor(given: Any) -> _Factor | None:
        """Return a tensor of the graph as a factor; None if its ids aren't known."""
        ids, shape = (flow.ids.get(given.name), tensor_shape(given)) if isinstance(given, Node) else (None, None)
        if shape is None or not isinstance(ids, Tensor) or ids.dim() != len(shape):
            return None
        return _Factor(ids, shape)

    def argument(node: Node, at: int, names: Iterable[str]) -> _Factor | None:
        """Look up a factor by one of its names, else by its position."""
        named = [node.kwargs[name] for name in names if name in node.kwargs]
        return factor(named[0] if named else node.args[at] if len(node.args) > at else None)

    def multiply(one: _Factor | None, other: _Factor | None) -> None:
        """Note the product of two matrices, or of batches of them: (..., rows, summed, columns)."""
        if one is not None and other is not None and min(len(one.shape), len(other.shape)) >= 2:
            rows, columns = one.at(*range(len(one.shape)), None), len(other.shape) - 2
            found.append(Product((rows, other.at(*range(columns), None, -2, -1)), flow, times))

    for node in graph.nodes:
        name = operation_name(node) if node.op in ("call_function", "call_method") else ""
        if name in _FACTORS:
            one, other = (argument(node, at, names) for at, names in _FACTORS[name])
            if name == "linear" and other is not None:
                other = other.at(1, 0) if len(other.shape) == 2 else None
            multiply(one, other)
        elif name == "scaled_dot_product_attention":
            query, key, value = (argument(node, at, (each,)) for at, each in enumerate(("query", "key", "value")))
            if query is not None and key is not None and value is not None:
                multiply(query, key.at(*range(len(key.shape) - 2), -1, -2))
                shape = (*query.shape[:-1], key.shape[-2])
                multiply(_Factor(torch.full((1,) * len(shape), FIXED), shape), value)
        elif name == "einsum":
            operands = node.args[1:]
            if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
                operands = operands[0]
            factors = [each for each in map(factor, operands) if each is not None]
            read = einsum_letters(node.args[0], [each.shape for each in factors]) if len(factors) == 2 else None
            # The products of three factors or more are taken to stay.
            if read is not None and len(operands) == 2:
                letters = list(dict.fromkeys("".join(read[0])))
                placed = []
                for each, own in zip(factors, read[0], strict=True):
                    placed.append(each.at(*(own.index(letter) if letter in own else None for letter in letters)))
                found.append(Product(placed, flow, times))
    return [each for each in found if each.depends]
