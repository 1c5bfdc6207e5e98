"""Products of tensors of activations, as attention computes: how many there are if channels are pruned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.fx
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.channels.rules import einsum_letters, operation_name
from nni_topo.network.graph.nodes import tensor_shape

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class _Entries:
    """The entries of a tensor, or of an intermediate result, that stay."""

    kept: BoolArray  # of length 1 where channels don't differ
    shape: tuple[int, ...]  # of the unpruned network
    of_samples: bool

    def size(self, dim: int) -> int:
        """Return the size of a dimension."""
        if self.kept.shape[dim] == 1:
            return self.shape[dim]
        others = tuple(d for d in range(self.kept.ndim) if d != dim)
        return int(np.count_nonzero(self.kept.any(axis=others)))

    def multiplied(self, other: _Entries) -> _Entries:
        """Return the entries of all products with those of another tensor."""
        shape = tuple(max(sizes) for sizes in zip(self.shape, other.shape, strict=True))
        return _Entries(self.kept & other.kept, shape, self.of_samples or other.of_samples)

    def summed(self, dims: list[int]) -> _Entries:
        """Return the entries of a sum over dimensions, which then have length 1."""
        if not dims:
            return self
        kept: BoolArray = np.any(self.kept, axis=tuple(dims), keepdims=True)
        shape = tuple(1 if d in dims else size for d, size in enumerate(self.shape))
        return _Entries(kept, shape, self.of_samples)

    def count(self, times: int) -> int:
        """Count the entries of one of ``times`` samples."""
        # Along a dimension in which no factor holds channels one place stands for all.
        alone = math.prod(size for size, length in zip(self.shape, self.kept.shape, strict=True) if length == 1)
        # Where the number of products isn't a multiple of the samples', they don't depend on the samples.
        of_one, rest = divmod(alone, times)
        return int(np.count_nonzero(self.kept)) * (of_one if self.of_samples and not rest else alone)


@dataclass(frozen=True)
class _Factor:
    """A tensor whose dimensions stand where those of the other factors stand that they run along with."""

    ids: Tensor  # of length 1 where ids don't differ
    shape: tuple[int, ...]
    of_samples: bool  # False if it is computed of parameters and buffers alone

    def at(self, *dims: int | None) -> _Factor:
        """Put dimensions, from the first on, in a new order; None stands for one of length 1."""
        order = [d for d in dims if d is not None]
        ids, shape = self.ids.permute(order), iter(self.shape[d] for d in order)
        for place, d in enumerate(dims):
            ids = ids.unsqueeze(place) if d is None else ids
        return _Factor(ids, tuple(1 if d is None else next(shape) for d in dims), self.of_samples)

    def padded(self, count: int) -> _Factor:
        """Put dimensions of length 1 before the first, up to a number of dimensions."""
        missing = count - len(self.shape)
        return _Factor(self.ids[(None,) * missing], (1,) * missing + self.shape, self.of_samples)


class MatrixProduct:
    """The products of two factors, as matrices or batches of matrices.

    ``factors``: their dimensions broadcast to one shape, each place of which is a product. A product is computed as
    long as none of its factors is pruned. ``times``: as of `products_of`.
    """

    def __init__(self, factors: list[_Factor], flow: ChannelFlow, times: int) -> None:
        longest = max(len(each.shape) for each in factors)
        self.times, self.factors = times, [each.padded(longest) for each in factors]
        self._group_ids = [flow.group_ids(each.ids.numpy()) for each in self.factors]
        self.depends = any(each.any() for each in self._group_ids)  # on channels that can be pruned

    def entries(self, pruned: BoolArray) -> list[_Entries]:
        """Return the entries of the factors that stay; ``pruned``: bool, by group id."""
        return [
            _Entries(~pruned[group_ids], each.shape, each.of_samples)
            for group_ids, each in zip(self._group_ids, self.factors, strict=True)
        ]

    def count(self, pruned: BoolArray) -> int:
        """Count the products that stay; ``pruned``: bool, by group id."""
        one, other = self.entries(pruned)
        return one.multiplied(other).count(self.times)


class EinsteinSum(MatrixProduct):
    """The products of an Einstein sum of two or more factors, which PyTorch computes pair by pair.

    ``operands``: a letter for each dimension of each factor. ``output``: the letters of the result. ``equation``: as
    the forward has it.
    """

    def __init__(
        self, factors: list[_Factor], flow: ChannelFlow, times: int, operands: list[str], output: str, equation: str
    ) -> None:
        letters = list(dict.fromkeys("".join(operands)))
        placed = []
        for each, own in zip(factors, operands, strict=True):
            placed.append(each.at(*(own.index(letter) if letter in own else None for letter in letters)))
        super().__init__(placed, flow, times)
        self._summed = [d for d, letter in enumerate(letters) if letter not in output]
        self._equation, self._dims = equation, [[letters.index(letter) for letter in own] for own in operands]
        # The dimension of the samples, as far as can be told: the first that is a multiple of them.
        self._of_samples = None
        for each, dims in zip(self.factors, self._dims, strict=True):
            if each.of_samples and self._of_samples is None:
                self._of_samples = next((d for d in dims if each.shape[d] % times == 0), None)

    def count(self, pruned: BoolArray) -> int:
        """Count the products that stay; ``pruned``: bool, by group id."""
        # As `torch.einsum` does it. A dimension is summed over as soon as one tensor alone has it; if two tensors are
        # the last that have it, by their matrix product. Where no dimension is summed over by both, PyTorch multiplies
        # them place by place, which `count_macs` doesn't count. A dimension of size 1 is one that a tensor hasn't.
        tensors, total = self.entries(pruned), 0
        having = {d: sum(each.size(d) != 1 for each in tensors) for d in self._summed}
        for first, second in self._path(tensors):
            other, one = tensors.pop(max(first, second)), tensors.pop(min(first, second))
            of_one, of_other, of_both = list[int](), list[int](), list[int]()
            for d in self._summed:
                has_one, has_other = one.size(d) != 1, other.size(d) != 1
                if has_one and has_other:
                    having[d] -= 1
                    if having[d] == 1:
                        of_both.append(d)
                elif having[d] == 1 and (has_one or has_other):
                    (of_one if has_one else of_other).append(d)
            product = one.summed(of_one).multiplied(other.summed(of_other))
            total += product.count(self.times) if of_both else 0
            tensors.append(product.summed(of_both))
        return total

    def _path(self, tensors: list[_Entries]) -> list[tuple[int, int]]:
        """Return the places of each pair among the tensors that are left; the product of a pair becomes the last."""
        backend = torch.backends.opt_einsum
        if len(tensors) > 2 and backend.is_available() and backend.enabled:
            shapes = []
            for each, dims in zip(tensors, self._dims, strict=True):
                sizes = [each.size(d) // (self.times if d == self._of_samples else 1) for d in dims]
                shapes.append(tuple(max(size, 1) for size in sizes))
            return _shortest_path(self._equation, tuple(shapes), backend.strategy)
        # From left to right.
        return [(0, 1), *((0, left - 1) for left in range(len(tensors) - 1, 1, -1))]


@lru_cache(maxsize=4096)
def _shortest_path(equation: str, shapes: tuple[tuple[int, ...], ...], strategy: Any) -> list[tuple[int, int]]:
    """Return the pairs that opt_einsum chooses, which PyTorch asks where it is installed."""
    path: list[tuple[int, int]]
    path, _ = torch.backends.opt_einsum.get_opt_einsum().contract_path(
        equation, *shapes, shapes=True, optimize=strategy
    )
    return path


def products_of(graph: torch.fx.Graph, flow: ChannelFlow, times: int) -> list[MatrixProduct]:
    """List the products of tensors that a graph computes itself, without those that stay in any case.

    ``times``: the call that the graph was recorded with has so many times the samples whose products are counted.
    """
    found, of_samples = list[MatrixProduct](), set[Node]()
    for node in graph.nodes:
        if node.op == "placeholder" or any(each in of_samples for each in node.all_input_nodes):
            of_samples.add(node)
        reader = _READERS.get(operation_name(node)) if node.op in ("call_function", "call_method") else None
        if reader is not None:
            products = reader(_ProductCall(node, flow, times, of_samples))
            found.extend(each for each in products if each.depends)
    return found


class _ProductCall:
    """The call of an operation, with tensors as factors. ``of_samples``: the nodes that the model's inputs reach."""

    def __init__(self, node: Node, flow: ChannelFlow, times: int, of_samples: set[Node]) -> None:
        self.node, self._flow, self._times, self._of_samples = node, flow, times, of_samples

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

    def matrices(self, one: _Factor | None, other: _Factor | None) -> list[MatrixProduct]:
        """Multiply two matrices, or batches of them: (..., rows, summed, columns)."""
        if one is None or other is None or min(len(one.shape), len(other.shape)) < 2:
            return []
        factors = [one.at(*range(len(one.shape)), None), other.at(*range(len(other.shape) - 2), None, -2, -1)]
        return [MatrixProduct(factors, self._flow, self._times)]

    def einstein_sum(self, factors: list[_Factor], operands: list[str], output: str) -> list[MatrixProduct]:
        """Multiply and sum up by the letters of dimensions."""
        equation = str(self.node.args[0])
        return [EinsteinSum(factors, self._flow, self._times, operands, output, equation)]

    def _as_factor(self, given: Any) -> _Factor | None:
        if not isinstance(given, Node):
            return None
        ids, shape = self._flow.ids.get(given.name), tensor_shape(given)
        if shape is None or not isinstance(ids, Tensor) or ids.dim() != len(shape):
            return None
        return _Factor(ids, shape, given in self._of_samples)


def _product(call: _ProductCall) -> list[MatrixProduct]:
    """Read ``matmul``, ``bmm`` and ``mm``."""
    return call.matrices(call.factor(0, "input"), call.factor(1, "other", "mat2", "tensor2"))


def _product_from_right(call: _ProductCall) -> list[MatrixProduct]:
    """Read ``__rmatmul__``, whose first argument is the second factor."""
    return call.matrices(call.factor(1), call.factor(0))


def _product_added(call: _ProductCall) -> list[MatrixProduct]:
    """Read ``baddbmm`` and ``addmm``, whose first argument is added."""
    return call.matrices(call.factor(1, "batch1", "mat1"), call.factor(2, "batch2", "mat2"))


def _linear(call: _ProductCall) -> list[MatrixProduct]:
    """Read a product with a weight, (outputs, inputs), that no layer holds."""
    states, weight = call.factor(0, "input"), call.factor(1, "weight")
    if states is None or weight is None or len(weight.shape) != 2:
        return []
    return call.matrices(states, weight.at(1, 0))


def _attention(call: _ProductCall) -> list[MatrixProduct]:
    """Read attention of PyTorch's: each query is multiplied with each key, and each weight with each value."""
    query, key, value = (call.factor(at, name) for at, name in enumerate(("query", "key", "value")))
    if query is None or key is None or value is None:
        return []
    shape = (*query.shape[:-1], key.shape[-2])
    weights = _Factor(torch.full((1,) * len(query.shape), FIXED), shape, query.of_samples)
    keys = key.at(*range(len(key.shape) - 2), -1, -2)
    return [*call.matrices(query, keys), *call.matrices(weights, value)]


def _einstein_sum(call: _ProductCall) -> list[MatrixProduct]:
    """Read an Einstein sum; of one tensor it has no products."""
    operands = call.operands()
    factors = [each for each in operands if each is not None]
    if len(factors) < max(2, len(operands)):
        return []
    read = einsum_letters(call.node.args[0], [each.shape for each in factors])
    return [] if read is None else call.einstein_sum(factors, *read)


_READERS: dict[str, Callable[[_ProductCall], list[MatrixProduct]]] = {
    **dict.fromkeys(("matmul", "imatmul", "bmm", "mm"), _product),
    "rmatmul": _product_from_right,
    **dict.fromkeys(("baddbmm", "addmm"), _product_added),
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "einsum": _einstein_sum,
}
