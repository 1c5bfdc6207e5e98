"""Sizes written into a model's attributes, which its forward splits, slices or views channels by.

``torch.split(images, self.width, 1)`` needs another ``width`` as soon as channels are gone. A tracer that meets such an
attribute sees a number that knows where it comes from, so that the graph says which channels it counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from nni_topo.network.labels import plain_name

Place = tuple[str, str, int | None]
"""A module, its attribute, and where in it the number is if that holds several."""


class Written(int):
    """A number that a model's attribute holds, or a whole part of one."""

    place: Place
    parts: int

    def __floordiv__(self, other: Any) -> Any:
        """Know the number still behind a division that leaves nothing over."""
        found = int(self) // other
        return written(found, self.place, self.parts * other) if found * other == self else found


def written(value: int, place: Place, parts: int = 1) -> Written:
    """Make a number that knows its place."""
    made = Written(value)
    made.place, made.parts = place, parts
    return made


def whole_numbers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """List a model's own modules and attributes that are an integer, or a tuple or list of them: with name and key."""
    for name, module in model.named_modules():
        for key, value in () if type(module).__module__.startswith("torch.nn.") else list(vars(module).items()):
            several = type(value) in (tuple, list) and bool(value) and all(type(each) is int for each in value)
            if type(value) is int or several:
                yield module, name, key, value


@contextmanager
def told_apart(model: nn.Module) -> Iterator[None]:
    """Let the numbers above 1 that a model's own modules hold know their places, for a while."""
    before = list(whole_numbers(model))
    try:
        for module, name, key, value in before:
            if isinstance(value, int):
                vars(module)[key] = written(value, (name, key, None)) if value > 1 else value
            else:
                made = (written(n, (name, key, at)) if n > 1 else n for at, n in enumerate(value))
                vars(module)[key] = type(value)(made)
        yield
    finally:
        for module, _, key, value in before:
            vars(module)[key] = value


def counted(graph: Graph, numbers: dict[str, Any]) -> dict[Place, list[tuple[int, np.ndarray]]]:
    """List what attributes count, given the numbers of channels by node: by place, parts of it and their channels.

    A place of which any use isn't understood isn't among them.
    """
    found: dict[Place, list[tuple[int, np.ndarray]]] = defaultdict(list)
    unclear = set[Place]()
    for node in graph.nodes:
        leaves = list[Written]()
        map_aggregate((node.args, node.kwargs), partial(_note, leaves))
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


def _note(seen: list[Written], leaf: Any) -> Any:
    if isinstance(leaf, Written):
        seen.append(leaf)
    return leaf


def _uses(node: Node, numbers: dict[str, Any]) -> list[tuple[Written, np.ndarray | None]]:
    """List the numbers in a node's arguments with the channels that each counts, None where it can't be told."""
    name, args = plain_name(node), (*node.args, *node.kwargs.values())
    if name in ("view", "reshape"):
        sizes = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
        return [(size, _along(numbers[node.name], d, size)) for d, size in enumerate(sizes) if _is(size)]
    entering = numbers.get(args[0].name) if args and isinstance(args[0], Node) else None
    if name in ("split", "split_with_sizes"):
        dim: Any = node.kwargs.get("dim", args[2] if len(args) > 2 else 0)
        row, sizes = _along(entering, dim), args[1]
        if row is None:
            return []
        if _is(sizes):
            return [(sizes, part) for part in np.split(row, range(sizes, len(row), sizes))]
        ends = np.cumsum(sizes).tolist()
        return [(size, row[end - size : end]) for size, end in zip(sizes, ends, strict=True) if _is(size)]
    if name == "getitem" and isinstance(args[1], tuple) and all(isinstance(each, slice) for each in args[1]):
        ends = [(d, end) for d, each in enumerate(args[1]) for end in (each.start, each.stop) if _is(end)]
        rows = [_along(entering, d) for d, _ in ends]
        return [(end, None if row is None else row[:end]) for (_, end), row in zip(ends, rows, strict=True)]
    return []


def _is(size: Any) -> bool:
    return isinstance(size, Written)


def _along(numbers: Any, dim: int, size: int | None = None) -> np.ndarray | None:
    """List the channels along a dimension, if it is the only one in which any differ."""
    if not isinstance(numbers, Tensor) or not numbers.shape[dim] == numbers.numel() == (size or numbers.numel()):
        return None
    found: np.ndarray = numbers.flatten().numpy()
    return found


def put_sizes(model: nn.Module, sizes: dict[Place, int]) -> None:
    """Write sizes into a model's attributes."""
    for (name, key, at), size in sizes.items():
        module = model.get_submodule(name)
        old = getattr(module, key)
        setattr(module, key, size if at is None else type(old)((*old[:at], size, *old[at + 1 :])))


def resized(given: Any, sizes: dict[Place, int]) -> Any:
    """Put sizes in place of those written into a node's arguments."""

    def new(leaf: Any) -> Any:
        return sizes.get(leaf.place, int(leaf) * leaf.parts) // leaf.parts if isinstance(leaf, Written) else leaf

    return map_aggregate(given, new)
