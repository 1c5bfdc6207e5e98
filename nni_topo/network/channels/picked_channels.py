"""Channels that a forward picks or counts by fixed numbers, as ``z[:, 1:4]``, ``z[:, [0, 2, 7]]`` or ``z.split(3, 1)``.

The numbers stay as they are in the dense model, so the channels that they count have to stay too: in front of
``z[:, 4]`` there must be four channels, whichever these are; what comes behind may go. A number that the forward takes
from a shape, or from an attribute that counts channels (see `written`), follows the channels and holds none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, Node

from nni_topo.network.channels import reasons
from nni_topo.network.graph import TracedInt, plain_name, tensor_shape
from nni_topo.network.layers import Place

_IsFixed = Callable[[Any], bool]

# What takes no more than size and type of a tensor.
_SIZES = frozenset((
    "size", "dim", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty",
    "new_full",
))  # fmt: skip


def counted_off(
    graph: Graph, numbers: dict[str, Any], following: Collection[Place], picks: dict[str, Tensor]
) -> Iterator[tuple[np.ndarray, reasons.Reason]]:
    """Yield numbers of channels that fixed numbers hold, with the reason.

    ``numbers``: those of channels, by node. ``following``: attributes that are made smaller with the channels.
    ``picks``: constant tensors of the forward, by node.
    """

    def is_fixed(value: Any) -> bool:
        return isinstance(value, int) and not (isinstance(value, TracedInt) and value.place in following)

    for node in graph.nodes:
        parent = node.args[0] if node.args else node.kwargs.get("input")
        if node.op not in ("call_function", "call_method") or not isinstance(parent, Node):
            continue
        entering, shape = numbers.get(parent.name), tensor_shape(parent)
        if not isinstance(entering, Tensor) or shape is None:
            continue
        for dim, size in enumerate(shape):
            # Where channels are spread over several dimensions, as heads are, no place in one is that of a channel.
            if not entering.shape[dim] == entering.numel() == size > 1:
                continue
            held = np.zeros(size, dtype=np.bool_)
            for part in _held(node, dim, shape, is_fixed, picks):
                held[part] = True
            if held.any():
                row = entering.flatten().numpy()
                yield row[held], reasons.fixed_channels(node)


def _held(node: Node, dim: int, shape: tuple[int, ...], is_fixed: _IsFixed, picks: dict[str, Tensor]) -> list[slice]:
    """List which channels, that lie along a dimension, an operation holds."""
    name, size = plain_name(node), shape[dim]
    if name == "getitem":
        return _held_by_index(node, dim, shape, is_fixed, picks)
    if name == "roll":
        return _held_by_roll(node, dim, len(shape), is_fixed)
    at_dim = {
        "select": 1, "narrow": 1, "unbind": 1, "index_select": 1, "gather": 1, "split": 2, "split_with_sizes": 2,
        "tensor_split": 2, "chunk": 2, "take_along_dim": 2,
    }  # fmt: skip
    along = _given(node, at_dim[name], "dim") if name in at_dim else None
    if name not in at_dim or (along or 0) % len(shape) != dim:
        return []
    if name == "unbind":
        return [slice(None)]
    if name in ("index_select", "gather", "take_along_dim"):
        index = _given(node, 1 if name == "take_along_dim" else 2, "index", "indices")
        return _held_by_tensor(index, picks)
    if name == "select":
        at = _given(node, 2, "index")
        return _place(node, at) if is_fixed(at) else []
    if name == "narrow":
        start, length = _given(node, 2, "start"), _given(node, 3, "length")
        if is_fixed(start) and is_fixed(length):
            # It asks for all of its channels, also where it ends at the last one.
            return [slice(start + length)] if start >= 0 else [slice(None)]
        return _boundary(start, size) if is_fixed(start) else []
    if name in ("split", "split_with_sizes"):
        return _held_by_split(_given(node, 1, "split_size_or_sections", "split_size", "split_sizes"), size, is_fixed)
    parts = _given(node, 1, "chunks", "indices_or_sections", "indices", "sections")
    if isinstance(parts, Sequence):
        return [part for end in parts if is_fixed(end) for part in _boundary(end, size)]
    # Of parts of one size `Blocks` says that they lose equally many.
    return [slice(None)] if is_fixed(parts) and size % max(int(parts), 1) else []


def _held_by_split(sizes: Any, size: int, is_fixed: _IsFixed) -> list[slice]:
    if is_fixed(sizes):
        # All pieces but the last are whole, and there are as many.
        return [slice((size - 1) // max(int(sizes), 1) * int(sizes) + 1)]
    held, start = [], 0
    for each in sizes if isinstance(sizes, Sequence) else ():
        if not isinstance(each, int):
            return [slice(None)]
        held += [slice(start, start + each)] if is_fixed(each) else []
        start += each
    return held


def _held_by_roll(node: Node, dim: int, count: int, is_fixed: _IsFixed) -> list[slice]:
    shifts, dims = _given(node, 1, "shifts"), _given(node, 2, "dims")
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return [slice(None)]  # of all entries, one after the other
    shifts, dims = (each if isinstance(each, Sequence) else [each] for each in (shifts, dims))
    held = []
    for shift, each in zip(shifts, dims, strict=False):
        if each % count == dim and is_fixed(shift) and shift:
            # The last ones come in front, or the first ones behind.
            held.append(slice(-shift, None) if shift > 0 else slice(-shift))
    return held


def _held_by_index(
    node: Node, dim: int, shape: tuple[int, ...], is_fixed: _IsFixed, picks: dict[str, Tensor]
) -> list[slice]:
    index: Any = node.args[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    taken = [_dimensions(part) for part in parts]
    missing = len(shape) - sum(taken)
    found: Any = slice(None)
    first, size = 0, shape[dim]
    for part, dims in zip(parts, taken, strict=True):
        if first <= dim < first + dims:
            found = part
        first += missing if part is Ellipsis else dims
    if isinstance(found, slice):
        if found.step not in (None, 1):
            return [slice(None)]
        return [part for end in (found.start, found.stop) if is_fixed(end) for part in _boundary(end, size)]
    if isinstance(found, Node) and found.name in picks:
        return _held_by_tensor(found, picks)
    if isinstance(found, (list, tuple)):
        places = np.array(found, dtype=object).ravel().tolist()
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in places):
            return [slice(None)]
        return [_up_to(each) for each in places]
    return _place(node, found) if is_fixed(found) else []


def _place(node: Node, at: int) -> list[slice]:
    """Hold a place that is picked, unless it is there of any channels and its values aren't read."""
    return [] if at in (0, -1) and is_looked_at(node) else [_up_to(at)]


def _held_by_tensor(index: Any, picks: dict[str, Tensor]) -> list[slice]:
    """Hold what a constant tensor picks; a computed one picks of channels that stay for that."""
    values = picks.get(index.name) if isinstance(index, Node) else None
    if values is None or not values.numel():
        return []
    if values.dtype == torch.bool:
        return [slice(None)]
    return [_up_to(int(end)) for end in (values.min(), values.max())]


def _dimensions(part: Any) -> int:
    """Count the dimensions of a tensor that a part of an index stands for."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    if isinstance(part, Node):
        meta: Any = part.meta.get("tensor_meta")
        return len(meta.shape) if getattr(meta, "dtype", None) == torch.bool else 1
    first, depth = part, 0
    while isinstance(first, (list, tuple)) and first:
        first, depth = first[0], depth + 1
    return depth if isinstance(first, bool) else 1


def _boundary(end: int, size: int) -> list[slice]:
    """Hold what lies in front of a boundary, or behind one that is counted from the end."""
    if end >= size or end <= -size or end == 0:
        return []  # of fewer channels it takes as much
    return [slice(end)] if end > 0 else [slice(end, None)]


def _up_to(at: int) -> slice:
    """Hold a place and what lies in front of it, or behind if it is counted from the end."""
    return slice(at + 1) if at >= 0 else slice(at, None)


def is_looked_at(node: Node) -> bool:
    """Tell whether a channel that is picked is looked at for its sizes alone."""
    return all(
        plain_name(user) in _SIZES or (plain_name(user) == "getattr" and user.args[1] in ("shape", "device", "dtype"))
        for user in node.users
    )


def _given(node: Node, at: int, *names: str) -> Any:
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    return node.args[at] if len(node.args) > at else None
