"""Sizes written into a model's attributes, which its forward splits, slices or views channels by.

``torch.split(images, self.width, 1)`` needs another ``width`` as soon as channels are gone. A tracer that meets such an
attribute sees a number that knows where it comes from, so that the graph says which channels it counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from nni_topo.network.graph.nodes import plain_name
from nni_topo.network.layers import Place, numbers_in, whole_numbers, with_numbers


class Written(int):
    """A number that a model's attribute holds, or a whole part of one; it notes whether anything else is made of it."""

    place: Place
    parts: int
    others: set[Place]  # of which something else is made

    def __floordiv__(self, other: Any) -> Any:
        """Know the number still behind a division that leaves nothing over."""
        if isinstance(other, Written):
            other.others.add(other.place)
            other = int(other)
        if type(other) is int and other > 0 and int(self) % other == 0:
            return _written(int(self) // other, self.place, self.parts * other, self.others)
        self.others.add(self.place)
        return int.__floordiv__(self, other)

    __hash__ = int.__hash__


def _noting(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def operate(self: Written, *operands: Any) -> Any:
        self.others.add(self.place)
        return plain(self, *operands)

    return operate


# A branch, say, that a number decides upon: with another number the model might do another thing than its graph.
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow"):
    for _side in ("", "r") if _name != "floordiv" else ("r",):
        setattr(Written, f"__{_side}{_name}__", _noting(f"__{_side}{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "neg"):
    setattr(Written, f"__{_name}__", _noting(f"__{_name}__"))


def _written(value: int, place: Place, parts: int, others: set[Place]) -> Written:
    """Make a number that knows its place."""
    made = Written(value)
    made.place, made.parts, made.others = place, parts, others
    return made


def trace_written(model: nn.Module, trace: Callable[[], Graph]) -> Graph:
    """Trace a model whose own modules hold numbers that know their places, until it is traced."""
    before, others = list(whole_numbers(model)), set[Place]()
    try:
        for module, name, key, value in before:
            found = numbers_in(value) or {}
            made = {path: _written(each, (name, key, path), 1, others) for path, each in found.items() if each > 1}
            vars(module)[key] = with_numbers(value, made)
        with _Noting(others):
            graph = trace()
    finally:
        for module, _, key, value in before:
            vars(module)[key] = value
    known = set(others)
    for node in graph.nodes:
        if any(isinstance(leaf, Written) for leaf in _leaves(node)):
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), partial(_plain, known))
    return graph


class _Noting(TorchFunctionMode):
    """Note numbers that constants are made of, which no node of a graph shows."""

    def __init__(self, others: set[Place]) -> None:
        super().__init__()
        self._others = others

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves: list[Any] = []
        map_aggregate((args, kwargs or {}), leaves.append)
        if not any(isinstance(each, Proxy) for each in leaves):
            self._others.update(each.place for each in leaves if isinstance(each, Written))
        return func(*args, **(kwargs or {}))


def _plain(places: set[Place], leaf: Any) -> Any:
    return int(leaf) if isinstance(leaf, Written) and leaf.place in places else leaf


def _leaves(node: Node) -> list[Any]:
    leaves: list[Any] = []
    map_aggregate((node.args, node.kwargs), leaves.append)
    return leaves


def counted(graph: Graph, numbers: dict[str, Any]) -> dict[Place, list[tuple[int, np.ndarray]]]:
    """List what attributes count, given the numbers of channels by node: by place, parts of it and their channels.

    A place of which any use isn't understood isn't among them.
    """
    found: dict[Place, list[tuple[int, np.ndarray]]] = defaultdict(list)
    unclear = set[Place]()
    for node in graph.nodes:
        leaves = [each for each in _leaves(node) if isinstance(each, Written)]
        uses = _uses(node, numbers) if leaves else []
        if any(channels is None for _, channels in uses) or not {id(each) for each in leaves} <= {
            id(each) for each, _ in uses
        }:
            unclear.update(each.place for each in leaves)
        for leaf, channels in uses:
            if channels is not None:
                found[leaf.place].append((leaf.parts, channels))
    even = {place for place, uses in found.items() if len({(parts, len(each)) for parts, each in uses}) == 1}
    return {place: found[place] for place in found if place in even - unclear}


def _uses(node: Node, numbers: dict[str, Any]) -> list[tuple[Written, np.ndarray | None]]:
    """List the numbers in a node's arguments with the channels that each counts, None where it can't be told."""
    name, args = plain_name(node), node.args
    if name in ("view", "reshape"):
        sizes: Any = args[1] if len(args) > 1 and isinstance(args[1], (tuple, list)) else args[1:]
        return [(size, _along(numbers[node.name], d, size)) for d, size in enumerate(sizes) if _is(size)]
    entering = numbers.get(args[0].name) if args and isinstance(args[0], Node) else None
    if name in ("split", "split_with_sizes") and len(args) > 1:
        sizes = args[1]
        row = _along(entering, node.kwargs.get("dim", args[2] if len(args) > 2 else 0))
        if row is not None and _is(sizes):
            return [(sizes, part) for part in np.split(row, range(sizes, len(row), sizes))]
        if row is None or isinstance(sizes, (int, Node)) or any(isinstance(size, Node) for size in sizes):
            return []
        ends = np.cumsum(sizes).tolist()
        return [(size, row[end - size : end]) for size, end in zip(sizes, ends, strict=True) if _is(size)]
    cuts: Any = args[1] if name == "getitem" else None
    if isinstance(cuts, tuple) and all(isinstance(each, slice) for each in cuts):
        ends = [(d, end) for d, each in enumerate(cuts) for end in (each.start, each.stop) if _is(end)]
        rows = [_along(entering, d) for d, _ in ends]
        return [(end, None if row is None else row[:end]) for (_, end), row in zip(ends, rows, strict=True)]
    return []


def _is(size: Any) -> bool:
    return isinstance(size, Written)


def _along(numbers: Any, dim: Any, size: int | None = None) -> np.ndarray | None:
    """List the channels along a dimension, if it is the only one in which any differ."""
    if not isinstance(numbers, Tensor) or not isinstance(dim, int):
        return None
    if not numbers.shape[dim] == numbers.numel() == (size or numbers.numel()):
        return None
    found: np.ndarray = numbers.flatten().numpy()
    return found


def resized(given: Any, sizes: dict[Place, int]) -> Any:
    """Put sizes in place of those written into a node's arguments."""
    leaves: list[Any] = []
    map_aggregate(given, leaves.append)
    if not any(isinstance(leaf, Written) for leaf in leaves):
        return given  # as it is: of a tensor's shape a plain tuple would be made

    def new(leaf: Any) -> Any:
        return sizes.get(leaf.place, int(leaf) * leaf.parts) // leaf.parts if isinstance(leaf, Written) else leaf

    return map_aggregate(given, new)
