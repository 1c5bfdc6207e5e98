"""The table of operators: what each does with channels.

One function says for an operator, or for a few alike, where the channel ids of its inputs go, which of them it couples
and which it keeps. `rule` enters it under the operators' names, or under the classes of modules without parameters. A
name has one rule, so the order of the functions here means nothing. What else the package has to know of an operator
(does it move entries, does it take fewer places than there are) stands in the same entry, as a property of
`OperatorRule`; nobody else decides by an operator's name.

Rules propose only: a dry run checks what they say of every operation of a model. An operator without a rule is taken
to work place by place.

A removed channel is zero in the masked network and missing in the dense one. A sum or a length is the same with and
without it. A mean counts it, a maximum may be it, a softmax gives it a share, a sort puts others in its place: where
such an operation goes along channels, all of them have to stay. What an operation does decides, not what came out for
some numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.overrides import handle_torch_function, has_torch_function, resolve_name
from torch.utils._pytree import tree_map_only

from nni_topo.errors import ConfigError, Rule, checked, shown
from nni_topo.network.channels import reasons
from nni_topo.network.channels.ids import (
    FIXED,
    Blocks,
    ChannelIds,
    FreeParameter,
    Layer,
    carry,
    carry_reduced,
    compressed,
    given_shapes,
    meet_alike,
    staying,
    varies,
)
from nni_topo.network.graph import plain_name, tensor_shape
from nni_topo.network.runtime import tensors_of

Modules = Callable[[str], Any]
"""Looks up a module of a traced model by name."""
# What an operation raises that can't be run on channel ids, or has no such argument.
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError)


class Operation:
    """One call of an operator, as its rule sees it: channel ids in place of tensors.

    Attributes
    ----------
    node : torch.fx.Node
        The call in the graph.
    args, kwargs : tuple, dict
        What it gets, with a tensor of channel ids, int64 and of the same shape, in place of each tensor.
    ids : list of torch.Tensor
        The tensors among these, in their order.
    shape : tuple of int or None
        Shape of its output; None if that isn't one tensor.
    module : torch.nn.Module or None
        The module that it calls, if it calls one.
    channels : ChannelIds
        All ids of the model, to couple them or to keep them.
    """

    def __init__(self, node: Node, values: dict[Node, Any], channels: ChannelIds, modules: Modules) -> None:
        self.node, self.channels, self.modules = node, channels, modules
        self._values = values
        self.args: tuple[Any, ...]
        self.kwargs: dict[str, Any]
        self.args, self.kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        self.ids: list[Tensor] = tensors_of((self.args, self.kwargs))
        self.shape = tensor_shape(node)
        self.module: Any = modules(str(node.target)) if node.op == "call_module" else None

    def argument(self, at: int, *names: str, default: Any = None) -> Any:
        """Look up an argument by one of its names, else by its place, the first tensor's being 0."""
        for name in names:
            if name in self.kwargs:
                return self.kwargs[name]
        return self.args[at] if len(self.args) > at else default

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator itself."""
        if self.module is not None:
            return self.module(*args, **kwargs)
        if self.node.op == "call_method":
            return getattr(args[0], str(self.node.target))(*args[1:], **kwargs)
        return self.node.target(*args, **kwargs)  # type: ignore[operator]

    def with_picks(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with known indices as they are: their values say places, and those are of ids too."""
        values = dict(self._values)
        for node in self.node.all_input_nodes[1:]:
            if node.name in self.channels.picks:
                values[node] = self.channels.picks[node.name]
        args, kwargs = map_arg((self.node.args, self.node.kwargs), values.__getitem__)
        return args, kwargs

    def couple(self, one: Tensor, other: Tensor) -> None:
        """Let channels go or stay together, entry by entry; both are broadcast."""
        self.channels.couple(one, other)

    def keep(self, ids: Tensor, reason: reasons.Reason | None = None) -> None:
        """Let channels stay."""
        self.channels.pin(np.unique(compressed(ids)), reason or reasons.no_rule(self.node))

    # What follows returns the ids of the output.

    def all_kept(self, ids: list[Tensor] | None = None, reason: reasons.Reason | None = None) -> Any:
        """Keep all channels that enter, and so all that leave."""
        found = given_shapes(self.node)
        # What gives no tensor (a size, an assertion) is no reader of channels, unless it writes into one.
        if tensors_of(found) or plain_name(self.node) == "setitem":
            for each in self.ids if ids is None else ids:
                self.keep(each, reason)
        return found

    def computed(self) -> Any:
        """Compute what isn't a tensor: a size, say."""
        return self.run_on_ids()

    def run_on_ids(self, args: tuple[Any, ...] | None = None) -> Any:
        """Run data movement on the ids themselves, which shows where each channel goes; None where that fails.

        ``args``: what to run it on instead.
        """
        try:
            return self.run(self.args if args is None else args, self.kwargs)
        except _FAILURES:
            return None

    def moved(self, args: tuple[Any, ...] | None = None, ids: list[Tensor] | None = None) -> Any:
        """Run data movement on the ids themselves; where that fails, all stay, or those of ``ids``."""
        moved = self.run_on_ids(args)
        return self.all_kept(ids) if moved is None else moved

    def carried(self, ids: list[Tensor], carry: Callable[[Tensor, tuple[int, ...]], Tensor | None]) -> Any:
        """Carry the ids of one tensor to each shape that is put out; where that can't be told, all stay."""
        found = given_shapes(self.node)
        leaves: list[Tensor] = []
        for each in tensors_of(found):
            leaf = carry(ids[0], tuple(each.shape)) if len(ids) == 1 else None
            if leaf is None:
                return self.all_kept(ids)
            leaves.append(leaf)
        rest = iter(leaves)
        return tree_map_only(Tensor, lambda _: next(rest), found)

    def passed(self, ids: list[Tensor] | None = None) -> Any:
        """Leave channels where they are, as far as shapes show that: the usual case."""
        return self.carried(self.ids if ids is None else ids, carry)

    def met(self, ids: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Couple what meets place by place; an operand that is broadcast along the channels is coupled with nothing."""
        full = [each.view((1,) * (len(shape) - each.dim()) + tuple(each.shape)) for each in ids]
        # Which dimension holds the channels isn't known; it is one along which ids differ.
        varying = {d for each in full for d in range(1, len(shape)) if varies(each, d)}
        coupled = [each for each in full if all(each.shape[d] == shape[d] for d in varying)]
        for other in coupled[1:]:
            self.couple(coupled[0], other)
        return (coupled or full)[0].expand(shape)

    def by_place(self, ids: list[Tensor] | None = None, *, known: bool, meets: bool = False) -> Any:
        """Take the operator to work place by place.

        ``known``: that it does, else the dry run looks closer. ``meets``: that several tensors meet, else those that
        could are taken to unless one is a parameter of the model's own, as a functional layer has that nobody cuts.
        """
        ids = self.ids if ids is None else ids
        if self.shape is None:
            self.channels.guessed.add(self.node.name)
            return self.passed(ids)
        if not known:
            self.channels.guessed.add(self.node.name)
        own = any(node.op == "get_attr" for node in self.node.all_input_nodes)
        if len(ids) > 1 and (meets or not own) and meet_alike(ids, self.shape):
            return self.met(ids, self.shape)
        return self.passed(ids)

    def along(self, dims: tuple[int, ...], *, adds: bool = False, reduces: bool = False) -> Any:
        """Let the operator work along dimensions, from 0: of those it needs all places, unless it only adds them up.

        ``adds``: zeros make no difference to what it gives at other places. ``reduces``: the output lacks
        these dimensions, or has them with length 1.
        """
        first = self.ids[0]
        held = [d for d in dims if varies(first, d)]
        if held and adds:
            self.channels.summed.add(self.node.name)
        elif held:
            entries = compressed(first).movedim(held, list(range(len(held))))
            rows = entries.flatten(0, len(held) - 1).flatten(1) if entries.dim() > len(held) else entries.reshape(-1, 1)
            # If all places of a dimension can only be removed together, none is kept for which their absence counts.
            self.channels.pin_unless_tied(rows.numpy(), reasons.result_depends(self.node))
        if len(self.ids) > 1:
            is_alike = self.shape is not None and meet_alike(self.ids, self.shape)
            return self.met(self.ids, self.shape or ()) if is_alike else self.passed()
        if not reduces:
            return self.passed()
        return self.carried(self.ids, lambda ids, shape: carry_reduced(ids, shape, dims))


@dataclasses.dataclass(frozen=True)
class FixedPlaces:
    """A call on a tensor whose channels lie along one dimension, asked for the places that its fixed numbers count."""

    node: Node
    dim: int
    shape: tuple[int, ...]  # of the tensor
    is_fixed: Callable[[Any], bool]  # whether a number stays as it is in the dense model
    picks: dict[str, Tensor]  # by node, constant tensors of the forward's

    @property
    def size(self) -> int:
        """How many channels there are."""
        return self.shape[self.dim]

    def argument(self, at: int, *names: str) -> Any:
        """Look up an argument of the call by name, else by its place."""
        for name in names:
            if name in self.node.kwargs:
                return self.node.kwargs[name]
        return self.node.args[at] if len(self.node.args) > at else None

    def is_along(self, at: int) -> bool:
        """Tell whether the dimension that the call works along, its argument at a place, is that of the channels."""
        dim: Any = self.argument(at, "dim")
        return bool((dim or 0) % len(self.shape) == self.dim)


@dataclasses.dataclass(frozen=True)
class Dims:
    """Where an operator finds the dimensions that it works along, and what it does there."""

    at: int | None  # the argument's place, the tensor's being 0; None: by name alone
    default: int | tuple[int, ...] | Callable[[int], int] | None  # where none are given; None: all
    adds: bool = False  # zeros make no difference
    largest: bool = False  # they make none where no value is negative
    reduces: bool = False  # the output lacks the dimensions, or has them with length 1


@dataclasses.dataclass(frozen=True)
class OperatorRule:
    """What the package knows of an operator."""

    apply: Callable[[Operation], Any]  # the channel ids of its output
    moves: bool = False  # its output's entries are entries of its inputs, so that it can be run on ids
    by_index: bool = False  # which ones may be said by a tensor, in whose place ids would pick at random
    meets: bool = False  # several tensors meet place by place
    picks: bool = False  # it takes some places of a dimension
    picks_one: bool = False  # it may take one place alone
    writes: bool = False  # it writes into a tensor
    reads_sizes: bool = False  # it takes no more than size and type of a tensor
    one_value: bool = False  # it makes a tensor of one value, given its sizes
    is_like: bool = False  # the first argument is a tensor, of which such a tensor has the type
    is_unset: bool = False  # it gives whatever lies in memory
    never_negative: bool = False  # whatever it gets
    keeps_sign: bool = False  # it gives nothing negative where it gets nothing negative
    dims: Dims | None = None  # of what works along dimensions
    held: Callable[[FixedPlaces], list[slice]] | None = None  # places that stay since fixed numbers count them


_TABLE: dict[Any, OperatorRule] = {}  # by name, by class of a module, or by function of somebody's own


def rule(
    *operators: str | type[nn.Module], **properties: Any
) -> Callable[[Callable[[Operation], Any]], Callable[[Operation], Any]]:
    """Enter a function as the rule of operators: names as of `operation_name`, or classes of modules."""

    def enter(apply: Callable[[Operation], Any]) -> Callable[[Operation], Any]:
        for each in operators:
            if each in _TABLE:
                raise ValueError(f"an operator has one rule, got a second one ({each})")
            _TABLE[each] = OperatorRule(apply, **properties)
        return apply

    return enter


def operation_name(node: Node) -> str:
    """Name a function or method as the table does."""
    return plain_name(node).removeprefix("special_")


def rule_of(node: Node) -> OperatorRule | None:
    """Look up the rule of a function or method that a node calls; None without one."""
    if node.op not in ("call_function", "call_method"):
        return None
    target = node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target
    return _TABLE[target] if target in _TABLE else _TABLE.get(operation_name(node))


def module_rule(module: nn.Module) -> OperatorRule | None:
    """Look up the rule of a module, that of the nearest class it is derived from; None without one."""
    for kind in type(module).__mro__:
        if kind in _TABLE:
            return _TABLE[kind]
    return None


def has_property(node: Node, what: str) -> bool:
    """Tell whether the rule of a function or method that a node calls has a property."""
    found = rule_of(node)
    return found is not None and bool(getattr(found, what))


# Data movement.


@rule(
    "column_stack", "dstack", "hstack", "vstack", "row_stack", "reshape_as", "swapaxes", "t", "moveaxis", "repeat",
    "repeat_interleave", "tile", "flip", "detach", "getattr", "pixel_shuffle", "pixel_unshuffle", nn.Unflatten,
    moves=True,
)  # fmt: skip
@rule(
    "flatten", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "expand", "expand_as", "contiguous", "clone",
    "channel_shuffle", nn.Flatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, moves=True, keeps_sign=True,
)  # fmt: skip
def _moves(op: Operation) -> Any:
    return op.moved()


@rule("cat", "concat", "concatenate", moves=True, keeps_sign=True)
def _concatenated(op: Operation) -> Any:
    return _joined(op, op.ids, op.argument(1, "dim", default=0))


@rule("stack", moves=True, keeps_sign=True)
def _stacked(op: Operation) -> Any:
    dim = op.argument(1, "dim", default=0)
    return _joined(op, [each.unsqueeze(dim) for each in op.ids], dim)


def _joined(op: Operation, parts: list[Tensor], dim: int) -> Any:
    """Couple what is joined along another dimension than that of the channels."""
    moved = op.run_on_ids()
    if moved is None:
        return op.all_kept()
    slices = []
    for part in parts:
        if part.shape[dim]:  # a part may have lost all channels
            # A slice in which ids still differ has its channels in another dimension, where they meet those of others.
            first = part.narrow(dim, 0, 1)
            if not any(varies(first, d) for d in range(1, first.dim())):
                return moved
            slices.append(first)
    for other in slices[1:]:
        op.couple(slices[0], other)
    # One id for what is coupled, so that only channels differ in what follows.
    return torch.from_numpy(op.channels.settled()[1])[moved]


@rule("view_as", moves=True)
def _viewed_as(op: Operation) -> Any:
    return op.moved((op.args[0].contiguous(), *op.args[1:]))


@rule("view", moves=True, keeps_sign=True)
def _viewed(op: Operation) -> Any:
    # Ids are expanded, and of such a tensor no view can be taken.
    moved = op.run_on_ids((op.args[0].contiguous(), *op.args[1:]))
    return op.all_kept() if moved is None else _taken_apart(op, moved, _given_sizes(op))


@rule("reshape", moves=True, keeps_sign=True)
def _reshaped(op: Operation) -> Any:
    moved = op.run_on_ids()
    return op.all_kept() if moved is None else _taken_apart(op, moved, _given_sizes(op))


@rule("unflatten", moves=True, keeps_sign=True)
def _unflattened(op: Operation) -> Any:
    moved = op.run_on_ids()
    if moved is None:
        return op.all_kept()
    given: Any = op.node.kwargs.get("sizes", op.node.args[-1])
    # A slice of a shape is a node of its own, whose sizes follow those of a tensor.
    parts = given if isinstance(given, (tuple, list)) else [given] * (moved.dim() - op.ids[0].dim() + 1)
    sizes = (*[None] * (_varying(moved) or [0])[0], *parts)
    return _taken_apart(op, moved, sizes)


def _given_sizes(op: Operation) -> Any:
    """Return the sizes that a view is asked for, as the graph has them: what follows a tensor's shape is a node."""
    sizes: Any = op.node.args[1:] or op.node.kwargs.get("shape", op.node.kwargs.get("size", ()))
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _varying(ids: Tensor) -> list[int]:
    """List the dimensions along which ids differ."""
    return [d for d in range(ids.dim()) if varies(ids, d)]


def _taken_apart(op: Operation, moved: Tensor, sizes: Any) -> Tensor:
    """Say what a view asks of channels that it takes apart into rows: so many rows, or rows of such a length."""
    if len(op.ids) != 1 or len(_varying(op.ids[0])) != 1:
        return moved
    places = _varying(moved)
    if len(places) != 2 or len(sizes) <= places[1]:
        return moved
    count_is_fixed, length_is_fixed = (isinstance(sizes[d], int) and sizes[d] != -1 for d in places)
    rows = moved.movedim(places, (0, 1)).flatten(2)[:, :, 0].numpy()
    if count_is_fixed and not length_is_fixed:
        op.channels.blocks.append(Blocks([list(rows)], may_vanish=False, moves=True))
        op.channels.reorders = True
    elif length_is_fixed and not count_is_fixed:
        op.channels.tie(rows[:, :1], rows)
    return moved


@rule("patch_merging_pad")
def _merged(op: Operation) -> Any:
    """Put the channels of four neighbours next to one another: a function of torchvision's that isn't traced into."""
    first = op.ids[0]
    if op.shape is None or any(varies(first, d) for d in (-3, -2)):
        return op.by_place(known=False)
    return torch.cat([first[..., :1, :1, :].expand(*op.shape[:-1], -1)] * 4, -1)


# What takes some places of a dimension. A fixed number keeps the channels that it counts: see `FixedPlaces`.


def _held_by_unbind(given: FixedPlaces) -> list[slice]:
    return [slice(None)] if given.is_along(1) else []


@rule("unbind", moves=True, held=_held_by_unbind)
def _unbound(op: Operation) -> Any:
    return op.moved()


def _held_by_split(given: FixedPlaces) -> list[slice]:
    if not given.is_along(2):
        return []
    sizes = given.argument(1, "split_size_or_sections", "split_size", "split_sizes")
    if given.is_fixed(sizes):
        # All pieces but the last are whole, and there are as many.
        return [slice((given.size - 1) // max(int(sizes), 1) * int(sizes) + 1)]
    held, start = [], 0
    for each in sizes if isinstance(sizes, Sequence) else ():
        if not isinstance(each, int):
            return [slice(None)]
        if given.is_fixed(each):
            held.append(slice(start, start + each))
        start += each
    return held


@rule("split", moves=True, keeps_sign=True, held=_held_by_split)
@rule("split_with_sizes", moves=True, held=_held_by_split)
def _split(op: Operation) -> Any:
    return op.moved()


def _held_by_parts(given: FixedPlaces) -> list[slice]:
    if not given.is_along(2):
        return []
    parts = given.argument(1, "chunks", "indices_or_sections", "indices", "sections")
    if isinstance(parts, Sequence):
        held = []
        for end in parts:
            if given.is_fixed(end):
                held += _boundary(end, given.size)
        return held
    # Of parts of one size `Blocks` says that they lose equally many.
    return [slice(None)] if given.is_fixed(parts) and given.size % max(int(parts), 1) else []


@rule("tensor_split", moves=True, held=_held_by_parts)
def _split_evenly(op: Operation) -> Any:
    return op.moved()


@rule("chunk", moves=True, keeps_sign=True, held=_held_by_parts)
def _chunked(op: Operation) -> Any:
    pieces = op.run_on_ids()
    if pieces is None:
        return op.all_kept()
    # In the dense model too chunk makes equal pieces of what it gets, so all of them have to lose equally many.
    if pieces[0].dim() > 1 and len({piece.shape for piece in pieces}) == 1:
        channels = op.channels
        held = [d for d in range(1, pieces[0].dim()) if any(varies(piece, d) for piece in pieces)]
        rows = [channels.per_channel(piece, held[0] if len(held) == 1 else 1) for piece in pieces]
        sides, channels.chunks = _by_layer(rows, channels), True
        uneven = channels.reorders and any(len({len(block) for block in side}) > 1 for side in sides)
        channels.blocks.append(Blocks([rows] if uneven else sides, may_vanish=False, moves=True, is_uneven=uneven))
    return pieces


def _by_layer(pieces: list[np.ndarray], channels: ChannelIds) -> list[list[np.ndarray]]:
    """Take what each layer gives to pieces for itself where layers were shuffled."""
    if not channels.reorders:
        return [pieces]
    # Behind a shuffle every layer's first channels come first, so that each has to lose equally many of each piece.
    made: list[Layer | FreeParameter] = [*channels.layers.values(), *channels.free_parameters.values()]
    firsts = np.array(sorted([FIXED, *(each.first for each in made)]))
    owners = [np.searchsorted(firsts, piece, side="right") for piece in pieces]
    of_layers = np.unique(np.concatenate(owners))
    return [[piece[each == layer] for piece, each in zip(pieces, owners, strict=True)] for layer in of_layers]


def _held_by_narrow(given: FixedPlaces) -> list[slice]:
    if not given.is_along(1):
        return []
    start, length = given.argument(2, "start"), given.argument(3, "length")
    if given.is_fixed(start) and given.is_fixed(length):
        # It asks for all of its channels, also where it ends at the last one.
        return [slice(start + length)] if start >= 0 else [slice(None)]
    return _boundary(start, given.size) if given.is_fixed(start) else []


@rule("narrow", moves=True, picks=True, held=_held_by_narrow)
def _narrowed(op: Operation) -> Any:
    return op.moved()


def _held_by_select(given: FixedPlaces) -> list[slice]:
    at = given.argument(2, "index")
    return _place_held(given.node, at) if given.is_along(1) and given.is_fixed(at) else []


@rule("select", moves=True, picks=True, picks_one=True, held=_held_by_select)
def _selected(op: Operation) -> Any:
    return op.moved()


def _held_by_roll(given: FixedPlaces) -> list[slice]:
    shifts, dims = given.argument(1, "shifts"), given.argument(2, "dims")
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return [slice(None)]  # of all entries, one after the other
    shifts, dims = (each if isinstance(each, Sequence) else [each] for each in (shifts, dims))
    held = []
    for shift, each in zip(shifts, dims, strict=False):
        if each % len(given.shape) == given.dim and given.is_fixed(shift) and shift:
            # The last ones come first, or the first ones last.
            held.append(slice(-shift, None) if shift > 0 else slice(-shift))
    return held


@rule("roll", moves=True, held=_held_by_roll)
def _rolled(op: Operation) -> Any:
    return op.moved()


def _held_by_index(given: FixedPlaces) -> list[slice]:
    index: Any = given.node.args[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    taken = [_dimensions(part) for part in parts]
    missing = len(given.shape) - sum(taken)
    found: Any = slice(None)
    first, size = 0, given.size
    for part, dims in zip(parts, taken, strict=True):
        if first <= given.dim < first + dims:
            found = part
        first += missing if part is Ellipsis else dims
    if isinstance(found, slice):
        if found.step not in (None, 1):
            return [slice(None)]
        held = []
        for end in (found.start, found.stop):
            if given.is_fixed(end):
                held += _boundary(end, size)
        return held
    if isinstance(found, Node) and found.name in given.picks:
        return _held_by_tensor(found, given.picks)
    if isinstance(found, (list, tuple)):
        places = np.array(found, dtype=object).ravel().tolist()
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in places):
            return [slice(None)]
        return [_up_to(each) for each in places]
    return _place_held(given.node, found) if given.is_fixed(found) else []


def _place_held(node: Node, at: int) -> list[slice]:
    """Hold a place that is picked, unless it is there of any channels and its values aren't read."""
    return [] if at in (0, -1) and is_looked_at(node) else [_up_to(at)]


def is_looked_at(node: Node) -> bool:
    """Tell whether a channel that is picked is looked at for its sizes alone."""
    for user in node.users:
        of_sizes = plain_name(user) == "getattr" and user.args[1] in ("shape", "device", "dtype")
        if not (of_sizes or has_property(user, "reads_sizes")):
            return False
    return True


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
    """Keep what lies before a boundary, or after one that is counted from the end."""
    if end >= size or end <= -size or end == 0:
        return []  # of fewer channels it takes as much
    return [slice(end)] if end > 0 else [slice(end, None)]


def _up_to(at: int) -> slice:
    """Keep a place and what lies before it, or after it if it is counted from the end."""
    return slice(at + 1) if at >= 0 else slice(at, None)


@rule("getitem", moves=True, by_index=True, picks=True, picks_one=True, keeps_sign=True, held=_held_by_index)
def _indexed(op: Operation) -> Any:
    if _index_is_known(op):
        return _picked(op)
    if not tensors_of(given_shapes(op.node)):
        return op.computed()
    picked = picked_along_others(op.node, op.ids, op.shape)
    return op.by_place(known=False) if picked is None else picked


def _held_by_index_select(given: FixedPlaces) -> list[slice]:
    return _held_by_tensor(given.argument(2, "index", "indices"), given.picks) if given.is_along(1) else []


@rule("index_select", moves=True, by_index=True, held=_held_by_index_select)
@rule("take", by_index=True)
def _index_selected(op: Operation) -> Any:
    return _picked(op) if _index_is_known(op) else op.by_place(known=False)


@rule("gather", by_index=True, held=_held_by_index_select, dims=Dims(1, None))
def _gathered(op: Operation) -> Any:
    return _picked(op) if _index_is_known(op) else _works_along(op)


def _held_by_take_along_dim(given: FixedPlaces) -> list[slice]:
    return _held_by_tensor(given.argument(1, "index", "indices"), given.picks) if given.is_along(2) else []


@rule("take_along_dim", by_index=True, held=_held_by_take_along_dim, dims=Dims(2, None))
def _taken_along(op: Operation) -> Any:
    return _picked(op) if _index_is_known(op) else _works_along(op)


def _index_is_known(op: Operation) -> bool:
    """Tell whether all places that an operator picks are numbers of the forward's, or constant tensors."""
    indices = op.node.all_input_nodes[1:]
    if indices and all(each.name in op.channels.picks for each in indices):
        return True
    return not tensors_of((op.args[1:], op.kwargs))


def _picked(op: Operation) -> Any:
    """Pick of the ids what is picked of the values: constant tensors say which, in place of their own ids."""
    args, kwargs = op.with_picks()
    try:
        return op.run(args, kwargs)
    except _FAILURES:
        return op.all_kept(op.ids[:1])


def picked_along_others(node: Node, ids: list[Tensor], shape: tuple[int, ...] | None) -> Tensor | None:
    """Carry channels in the last dimension to what a computed index or mask picks along others; None elsewhere.

    ``ids`` are those of the tensor and of indices and masks.
    """
    states, *indices = ids
    last = states.dim() - 1
    if not shape or not indices or not _leaves_last(node.args[1], states.dim()):
        return None
    if any(_varying(each) for each in indices):
        return None
    if any(varies(states, d) or not states.shape[d] for d in range(last)):
        return None
    return states[(slice(0, 1),) * last].reshape(-1).expand(shape)


def _leaves_last(index: Any, dims: int) -> bool:
    """Tell whether an index of a tensor with so many dimensions takes all of the last one."""
    parts = [part for part in (index if isinstance(index, (tuple, list)) else (index,)) if part is not None]
    if any(part is Ellipsis for part in parts):
        return parts[-1] is Ellipsis or parts[-1] == slice(None)
    taken = 0
    for part in parts:
        meta = part.meta.get("tensor_meta") if isinstance(part, Node) else None
        # A mask stands for as many dimensions as it has.
        taken += len(meta.shape) if meta is not None and meta.dtype == torch.bool else 1
    return taken < dims or (taken == dims and parts[-1] == slice(None))


@rule("put", "setitem", writes=True)
def _written(op: Operation) -> Any:
    # The channels of what is written would be unknown from here on.
    return op.all_kept(reason=reasons.overwritten(op.node))


# Place by place on several tensors: where channels meet, one that is missing on one side is missed on the other.


@rule("add", "iadd", "mul", "imul", "maximum", "minimum", meets=True, keeps_sign=True)
@rule(
    "radd", "sub", "isub", "subtract", "multiply", "div", "truediv", "itruediv", "divide", "true_divide", "floordiv",
    "floor_divide", "pow", "fmax", "fmin", "where", "lerp", "addcmul", "addcdiv", "and", "or", "xor", "logical_and",
    "logical_or", "logical_xor", "eq", "ne", "lt", "le", "gt", "ge", "mod", "remainder", "fmod", meets=True,
)  # fmt: skip
def _meet(op: Operation) -> Any:
    return op.by_place(known=True, meets=True)


@rule("max", meets=True, dims=Dims(1, None, largest=True, reduces=True))
@rule("min", meets=True, dims=Dims(1, None, reduces=True))
def _largest(op: Operation) -> Any:
    # Of two tensors it is place by place.
    return op.by_place(known=True, meets=True) if len(op.ids) > 1 else _works_along(op, known=True)


# Place by place on one tensor.


@rule("abs", "exp", "hardsigmoid", "relu", "relu6", "sigmoid", "softplus", "sqrt", "square", never_negative=True)
@rule("empty_like", reads_sizes=True, is_unset=True)
@rule("full_like", "ones_like", "zeros_like", reads_sizes=True)
@rule("dropout", keeps_sign=True)
@rule(
    "absolute", "neg", "negative", "positive", "pos", "sign", "sgn", "rsqrt", "reciprocal", "exp2", "expm1", "log",
    "log1p", "log2", "log10", "sin", "cos", "tan", "tanh", "sinh", "cosh", "asin", "acos", "atan", "atan2", "arctan",
    "erf", "erfc", "expit", "logit", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardtanh",
    "hardswish", "hardshrink", "softshrink", "tanhshrink", "softsign", "logsigmoid", "threshold", "rrelu", "clamp",
    "clamp_min", "clamp_max", "clip", "ceil", "floor", "round", "trunc", "frac", "nan_to_num", "float", "half",
    "double", "bfloat16", "long", "int", "bool", "type", "cpu", "cuda", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "feature_alpha_dropout", "invert", "bitwise_not", "logical_not", "isnan", "isinf", "isfinite",
    "requires_grad", "zero", "fill", "rand_like", "randn_like", "conj", "real", "imag", "masked_fill",
    "stochastic_depth",
)  # fmt: skip
def _pointwise(op: Operation) -> Any:
    return op.by_place(known=True)


@rule(nn.Identity, nn.modules.dropout._DropoutNd, keeps_sign=True)
@rule(nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, never_negative=True)
@rule(
    nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish, nn.Hardshrink,
    nn.Softshrink, nn.Tanhshrink, nn.Softsign, nn.LogSigmoid, nn.Threshold, nn.RReLU, nn.Tanh,
)  # fmt: skip
def _pointwise_module(op: Operation) -> Any:
    return op.passed()


@rule("to", "type_as")
def _typed(op: Operation) -> Any:
    # The other is looked at for its type or device.
    return op.by_place(op.ids[:1], known=True)


# What makes tensors, or looks at their sizes.


@rule("size", "dim", reads_sizes=True)
def _size(op: Operation) -> Any:
    return op.computed()


@rule("zeros", "ones", "full", one_value=True)
@rule("empty", one_value=True, is_unset=True)
@rule("new_zeros", "new_ones", "new_full", one_value=True, is_like=True, reads_sizes=True)
@rule("new_empty", one_value=True, is_like=True, reads_sizes=True, is_unset=True)
def _made_of_one_value(op: Operation) -> Any:
    return op.by_place(known=False)  # only where the value is a traced tensor; else see `made`


def made(node: Node, shape: tuple[int, ...], channels: ChannelIds) -> Tensor:
    """Return the ids of what is made of no traced tensor.

    It is a constant, of which all stays, and so do the channels that meet it; but of one value, as large as a tensor
    along a dimension, there is as much as that has left.
    """
    args = node.args[has_property(node, "is_like") :]
    # As ``torch.zeros(2, 3)`` and ``torch.full((2, 3), value)``.
    sizes: Any = args[0] if args and isinstance(args[0], (tuple, list)) else args
    for d, size in enumerate(sizes if has_property(node, "one_value") and len(sizes) >= len(shape) else ()):
        if isinstance(size, Node) and plain_name(size) == "size" and len(size.args) == 2:
            tensor, at = size.args
            ids = channels.by_node.get(tensor.name) if isinstance(tensor, Node) else None
            if isinstance(ids, Tensor) and isinstance(at, int) and ids.numel() == ids.shape[at] > 1:
                return ids.view([-1 if each == d else 1 for each in range(len(shape))]).expand(shape)
    return staying(shape)


# What works along dimensions.


def _softmax_default(rank: int) -> int:
    """Return along which dimension PyTorch's softmax goes if it isn't told."""
    return 0 if rank in (0, 1, 3) else 1


def _works_along(op: Operation, *, known: bool = False) -> Any:
    found = rule_of(op.node)
    where = None if found is None else found.dims
    if where is None:
        return op.by_place(known=known)
    rank = op.ids[0].dim()
    given = op.kwargs.get("dim", op.kwargs.get("axis"))
    if given is None and where.at is not None and len(op.args) > where.at:
        given = op.args[where.at]
    if given is None or isinstance(given, bool):  # ``x.std(True)`` asks for no dimension
        given = where.default(rank) if callable(where.default) else where.default
    dims = _from_zero(given, rank)
    if dims is None:
        return op.by_place(known=known)
    adds = where.adds and _order_adds(op)
    if where.largest:
        adds = _values_alone(op.node) and _is_never_negative(op.node.args[0], op.modules)
    return op.along(dims, adds=adds, reduces=where.reduces)


def _along(names: str, dims: Dims, **properties: Any) -> None:
    """Enter operators that work along dimensions and need no more said."""
    rule(*names.split(), dims=dims, **properties)(_works_along)


# What is the same with zeros.
_along("sum", Dims(1, None, adds=True, reduces=True), keeps_sign=True)
_along("nansum any count_nonzero", Dims(1, None, adds=True, reduces=True))
_along("norm linalg_vector_norm", Dims(2, None, adds=True, reduces=True), never_negative=True)
_along("linalg_norm", Dims(2, None, adds=True, reduces=True))
_along("linalg_matrix_norm", Dims(2, (-2, -1), adds=True, reduces=True))
_along("normalize", Dims(2, 1, adds=True))
_along("cumsum", Dims(1, -1, adds=True))
# What is the same with zeros where no value is negative.
_along("amax", Dims(1, None, largest=True, reduces=True), keeps_sign=True)
# What counts zeros, chooses among them, or says or depends on where a value is.
_along("mean amin", Dims(1, None, reduces=True), keeps_sign=True)
_along("nanmean std var std_mean var_mean prod all aminmax median nanmedian", Dims(1, None, reduces=True))
_along("logsumexp argmax argmin", Dims(1, None, reduces=True))
_along("mode", Dims(1, -1, reduces=True))
_along("sort argsort cumprod cummax cummin logcumsumexp", Dims(1, -1))
_along("softmax", Dims(1, _softmax_default), never_negative=True)
_along("log_softmax softmin", Dims(1, _softmax_default))
_along("scatter scatter_add scatter_reduce index_fill index_reduce", Dims(1, None))
_along("quantile nanquantile", Dims(2, None, reduces=True))
_along("kthvalue", Dims(2, -1, reduces=True))
_along("topk diff linalg_cross", Dims(2, -1))
_along("trapezoid trapz", Dims(None, -1, reduces=True))
_along("cumulative_trapezoid unique_consecutive", Dims(None, -1))
_along("gumbel_softmax", Dims(4, -1))
_along("unique", Dims(4, None))
_along("msort", Dims(None, 0))
_along("local_response_norm", Dims(None, 1))
_along("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft", Dims(2, -1))
_along("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2", Dims(2, (-2, -1)))
_along("fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn", Dims(2, None))
_along("fft_fftshift fft_ifftshift", Dims(1, None))
# Windows slide along the last dimensions.
_along("max_pool1d avg_pool1d adaptive_max_pool1d adaptive_avg_pool1d", Dims(None, -1), keeps_sign=True)
_along("max_pool2d avg_pool2d adaptive_max_pool2d adaptive_avg_pool2d", Dims(None, (-2, -1)), keeps_sign=True)
_along("max_pool3d avg_pool3d adaptive_max_pool3d adaptive_avg_pool3d", Dims(None, (-3, -2, -1)), keeps_sign=True)
_along("lp_pool1d", Dims(None, -1))
_along("lp_pool2d fractional_max_pool2d", Dims(None, (-2, -1)))
_along("lp_pool3d fractional_max_pool3d", Dims(None, (-3, -2, -1)))


@rule("index_add", "index_copy", dims=Dims(1, None))
def _put_by_row(op: Operation) -> Any:
    dim = op.args[1] if len(op.args) == 4 else None
    rows = [op.ids[0], op.ids[2]] if len(op.ids) == 3 else []
    if not rows or not isinstance(dim, int) or any(varies(each, dim) for each in rows):
        return _works_along(op)
    # Rows without channels of their own: what one of each shows holds for all.
    first = [each.narrow(dim, 0, 1) for each in rows]
    return op.met(first, tuple(first[0].shape)).expand(op.shape or ())


@rule("group_norm")
def _group_norm(op: Operation) -> Any:
    return op.along(tuple(range(1, op.ids[0].dim())))


@rule("layer_norm", "rms_norm")
def _layer_norm(op: Operation) -> Any:
    shape, rank = op.argument(1, "normalized_shape"), op.ids[0].dim()
    if not isinstance(shape, Iterable):
        return op.by_place(known=False)
    return op.along(tuple(range(rank - len(list(shape)), rank)))


@rule(nn.Softmax, never_negative=True)
@rule(nn.LogSoftmax, nn.Softmin)
def _softmax_module(op: Operation) -> Any:
    rank = op.ids[0].dim()
    return op.along(_from_zero(_softmax_default(rank) if op.module.dim is None else op.module.dim, rank) or ())


@rule(nn.Softmax2d, never_negative=True)
def _softmax_2d(op: Operation) -> Any:
    return _along_last(op, -3)


@rule(nn.LocalResponseNorm, nn.CrossMapLRN2d)
def _response_norm(op: Operation) -> Any:
    return _along_last(op, 1)


@rule(nn.MaxPool1d, nn.AvgPool1d, nn.LPPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d, keeps_sign=True)
def _pool_1d(op: Operation) -> Any:
    return _along_last(op, -1)


@rule(
    nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.FractionalMaxPool2d,
    keeps_sign=True,
)  # fmt: skip
def _pool_2d(op: Operation) -> Any:
    return _along_last(op, -2, -1)


@rule(
    nn.MaxPool3d, nn.AvgPool3d, nn.LPPool3d, nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool3d, nn.FractionalMaxPool3d,
    keeps_sign=True,
)  # fmt: skip
def _pool_3d(op: Operation) -> Any:
    return _along_last(op, -3, -2, -1)


def _along_last(op: Operation, *dims: int) -> Any:
    return op.along(tuple(d % op.ids[0].dim() for d in dims))


def _from_zero(given: Any, rank: int) -> tuple[int, ...] | None:
    """Count dimensions from 0: one, several, or all; None if they aren't known."""
    listed = list(given) if isinstance(given, Iterable) else [] if given is None else [given]
    if not all(isinstance(d, int) for d in listed):
        return None
    return tuple(d % rank for d in listed) if listed and rank else tuple(range(rank))


def _order_adds(op: Operation) -> bool:
    """Tell whether a norm is one that zeros add nothing to; what is no norm is asked for no order."""
    if "norm" not in operation_name(op.node):
        return True
    order = op.argument(1, "p", "ord")
    return order is None or order in ("fro", "nuc") or (isinstance(order, (int, float)) and order >= 0)


def _values_alone(node: Node) -> bool:
    """Tell whether of the values and places that a maximum gives the values alone are read."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] != 0 and user.users:
            return False
        if user.target is getattr and user.args[1] != "values":
            return False
    return True


def _is_never_negative(value: Any, modules: Modules) -> bool:
    """Tell whether what a node gives can't be negative."""
    known = set[Node]()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, Node) or current in known:
            if isinstance(current, (int, float)) and current < 0:
                return False
            continue
        known.add(current)
        module = modules(str(current.target)) if current.op == "call_module" else None
        found = rule_of(current) if module is None else module_rule(module)
        if found is not None and found.never_negative:
            continue
        name = operation_name(current)
        least = _least(current, name, module)
        if least is not None and least >= 0:
            continue
        if name == "pow" and len(current.args) > 1 and isinstance(current.args[1], int) and current.args[1] % 2 == 0:
            continue
        if found is None or not found.keeps_sign:
            return False
        # Of what only moves values the numbers among the arguments are places.
        numbers = current.args if name in ("add", "iadd", "mul", "imul") else current.all_input_nodes
        waiting += [each for each in numbers if isinstance(each, (Node, int, float))]
    return True


def _least(node: Node, name: str, module: nn.Module | None) -> float | None:
    """Return below which number a node that clamps gives nothing; None if there is none, or it isn't known."""
    least: Any = None
    if isinstance(module, nn.Hardtanh):
        least = module.min_val
    elif module is None and name in ("clamp", "clip", "clamp_min", "hardtanh"):
        least = node.kwargs.get("min", node.kwargs.get("min_val", node.args[1] if len(node.args) > 1 else None))
    return least if isinstance(least, (int, float)) else None


# Products.


@rule("matmul", "bmm", "rmatmul", "imatmul")
def _product(op: Operation) -> Any:
    """Couple the channels over which a matrix product sums; others go where their rows and columns do."""
    if op.shape is None or len(op.ids) != 2:
        return op.by_place(known=False)
    one, other = op.ids
    if min(one.dim(), other.dim()) < 2:
        return op.all_kept()
    # Counted from the end: along which dimensions of each are there channels?
    rows, columns = ([d - each.dim() for d in range(1, each.dim()) if varies(each, d)] for each in op.ids)
    if rows in ([], [-1]) and columns in ([], [-2]):
        op.couple(one[..., :1, :].flatten(0, -2)[0], other[..., :, :1].transpose(-1, -2).flatten(0, -2)[0])
        return staying(op.shape)
    # Rows of the first, or columns of the second, that hold channels are rows or columns of what comes out.
    if (rows, columns) == ([-2], []):
        return one[..., :1].expand(op.shape)
    if (rows, columns) == ([], [-1]):
        return other[..., :1, :].expand(op.shape)
    return op.all_kept()


@rule("einsum")
def _einstein_sum(op: Operation) -> Any:
    """Follow channels by the letters of their dimensions, as of ``"bqc,bkc->bqk"``.

    Operands that share a letter meet there, so their channels are coupled. Channels of a letter that the output has go
    where the output has it; what is summed over has none in the output.
    """
    read = _letters(op)
    if read is None:
        return op.all_kept()
    operands, output = read
    # By the letters that hold an operand's channels, its ids in the order of these letters.
    coupled: dict[str, list[Tensor]] = {}
    holding: list[str] = []
    for letters, ids in zip(operands, op.ids, strict=True):
        held = "".join(sorted(letter for d, letter in enumerate(letters) if varies(ids, d)))
        holding.append(held)
        if held:
            others = [letter for letter in letters if letter not in held]
            ordered = ids.permute([letters.index(letter) for letter in (*held, *others)])
            for _ in others:
                ordered = ordered.select(-1, 0)  # along the others nothing differs
            coupled.setdefault(held, []).append(ordered)
    found = staying(op.shape or ())
    is_placed = False
    for held, entering in coupled.items():
        for letters, ids, own in zip(operands, op.ids, holding, strict=True):
            has_letter = any(letter in held and ids.shape[d] > 1 for d, letter in enumerate(letters))
            if has_letter and own != held:
                return op.all_kept()  # it meets them in a dimension that keeps all of its places
        in_output = [letter for letter in held if letter in output]
        if in_output and (is_placed or len(in_output) < len(held)):
            return op.all_kept()
        if in_output:
            is_placed = True
            places = [output.index(letter) for letter in held]
            view = [1] * len(output)
            for place, size in zip(places, entering[0].shape, strict=True):
                view[place] = size
            ordered = entering[0].permute(np.argsort(places).tolist())
            found = ordered.reshape(view).expand(op.shape or ())
        elif len(entering) == 1:
            # Nothing that is removed too is multiplied with what is removed, which so has to arrive as zeros.
            op.channels.summed.add(op.node.name)
    for entering in coupled.values():
        for other in entering[1:]:
            op.couple(entering[0], other)
    return found


def _letters(op: Operation) -> tuple[list[str], str] | None:
    """Read the equation of an Einstein sum: one letter for each dimension of each operand, and of the output.

    None for what isn't followed: lists of numbers in place of letters, or the diagonal of an operand.
    """
    equation = op.args[0] if op.args else None
    if not isinstance(equation, str) or op.shape is None:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if len(operands) != len(op.ids):
        return None
    # Dots stand for as many dimensions as are left, counted from the last; here each is a digit.
    digits, longest = "0123456789", ""
    for at, (letters, ids) in enumerate(zip(operands, op.ids, strict=True)):
        missing = ids.dim() - len(letters.replace("...", ""))
        dots = digits[len(digits) - missing :] if 0 < missing <= len(digits) else ""
        operands[at] = letters.replace("...", dots)
        if len(set(operands[at])) != len(operands[at]) or len(operands[at]) != ids.dim():
            return None
        longest = max(longest, dots, key=len)
    if not arrow:
        # As PyTorch has it: what appears once, in the order of the alphabet, after the dimensions of the dots.
        once = [each for each in sorted(set(inputs) - set(".,")) if inputs.count(each) == 1]
        output = "..." * ("..." in inputs) + "".join(sorted(once, key=lambda each: (each.islower(), each)))
    output = output.replace("...", longest)
    return (operands, output) if len(output) == len(op.shape) else None


# Windows.


@rule("unfold", nn.Unfold)
def _unfolded(op: Operation) -> Any:
    """Give each channel as many neighbouring rows as a window has places: (N, C, H, W) -> (N, C * places, windows)."""
    ids = op.ids[0]
    if op.node.op == "call_method" or op.node.target is Tensor.unfold:
        # Windows along one dimension, in a new last one.
        along = op.argument(1, "dimension")
        return op.all_kept() if not isinstance(along, int) or varies(ids, along % ids.dim()) else op.moved()
    at = ids.dim() - 3
    if op.shape is None or any(varies(ids, d) for d in range(ids.dim()) if d != at):
        return op.all_kept()
    row = ids.select(-1, 0).select(-1, 0).reshape(-1, ids.shape[at])[0]
    return row.repeat_interleave(op.shape[-2] // len(row)).unsqueeze(-1).expand(op.shape)


@rule("fold", nn.Fold)
def _folded(op: Operation) -> Any:
    """Add up windows to images, the inverse of unfold: rows of one channel go together."""
    ids = op.ids[0]
    at = ids.dim() - 2
    if op.shape is None or any(varies(ids, d) for d in range(ids.dim()) if d != at):
        return op.all_kept()
    rows = ids.select(-1, 0).reshape(-1, ids.shape[at])[0]
    of_channels = rows.view(op.shape[-3], -1)
    op.couple(of_channels[:, :1], of_channels)
    return of_channels[:, 0].view(-1, 1, 1).expand(op.shape)


# Operators of somebody else's.

_USER_RULES = ("follow", "couple", "keep")
_registered = 0
_WRAPPED: set[Any] = set()  # functions that were registered, and what forwards call instead


def rules_registered() -> int:
    """Count the calls of `register_operator`: what was found out about a model before one may be different now."""
    return _registered


@checked(
    operator=Rule("a function or its name", lambda value: callable(value) or (isinstance(value, str) and bool(value))),
    rule=Rule(
        f"one of {', '.join(map(repr, _USER_RULES))} or a function",
        lambda value: callable(value) or (isinstance(value, str) and value in _USER_RULES),
    ),
)
def register_operator(
    operator: Callable[..., Any] | str,
    rule: str | Callable[[Operation], Tensor] = "follow",
    *,
    dim: int = 1,
) -> Any:
    """Say what an operator does with channels, where the package has no rule for it.

    Parameters
    ----------
    operator : callable or str
        A function of PyTorch's or its name, an operator of ``torch.library``, a Python function of your own, or the
        ``apply`` of a ``torch.autograd.Function``.
    rule : {"follow", "couple", "keep"} or callable, default="follow"
        What the operator does with channels:

        - "follow": channel i of the output is made of channel i of the first tensor. Channels of other tensors stay.
        - "couple": channel i of the output is made of the channels i of all tensors, which are pruned together.
        - "keep": all channels that enter stay.
        - A function gets the call, a `nni_topo.network.Operation`, in which channel ids stand in place of values, and
          returns the channel ids of the output: an int64 tensor of the output's shape.
    dim : int, default=1
        The dimension that holds the channels, -1 for the last; of "follow" and "couple".

    Returns
    -------
    callable or str
        What the forward has to call: ``operator`` itself, or of a Python function of your own a wrapped one, which
        is followed as one operation. Called by its old name it is looked into instead.

    Raises
    ------
    ConfigError
        If the operator has a rule already, or is a class. Later, from what traces a model: if a rule that is a function
        raises, or returns anything but channel ids of the output's shape.

    See Also
    --------
    register_module : The same of a module with parameters that lose channels.

    Notes
    -----
    `dependency_groups` checks what a rule says by pruning random channels: channels that a rule is wrong about stay,
    and ``skipped`` says why.

    Examples
    --------
    >>> import nni_topo
    >>> class Swish(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, images):
    ...         return images * images.sigmoid()
    >>> def swish(images):
    ...     return Swish.apply(images)
    >>> swish = nni_topo.register_operator(swish, "follow")

    A function that doubles the channels says where each goes:

    >>> def twice(images):
    ...     return Swish.apply(torch.cat([images, images], 1))
    >>> twice = nni_topo.register_operator(twice, lambda call: torch.cat([call.ids[0], call.ids[0]], 1))
    """
    global _registered
    if isinstance(operator, type):
        raise ConfigError(
            "operator must be the function that a forward calls (of a torch.autograd.Function its apply; modules are "
            f"registered by register_module), got the class {operator.__name__} (register_operator)"
        )
    key, seen = _key_of(operator)
    if key in _TABLE or (callable(operator) and operator in _WRAPPED):
        raise ConfigError(f"operator must be one without a rule, got {shown(operator)} (register_operator)")
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))

    def apply(op: Operation) -> Any:
        if rule == "keep":
            return op.all_kept(reason=reasons.rule_keeps(op.node))
        if not callable(rule):
            return _followed(op, dim, is_coupled=rule == "couple")
        try:
            found = rule(op)
        except Exception as error:  # a rule fails in as many ways as it is written
            raise ConfigError(
                f"rule must return channel ids for every call of its operator, got {type(error).__name__}: {error} "
                f"({name})"
            ) from error
        if op.shape is not None and not (
            isinstance(found, Tensor) and found.dtype == torch.int64 and tuple(found.shape) == op.shape
        ):
            what = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else shown(found)
            raise ConfigError(
                f"rule must return channel ids, int64, of the output's shape {op.shape}, got {what} ({name})"
            )
        return found

    _TABLE[key] = OperatorRule(apply)
    if seen is not operator:
        _WRAPPED.update((operator, seen))
    _registered += 1
    return seen


def _key_of(operator: Callable[..., Any] | str) -> tuple[Any, Any]:
    """Return under what the table holds an operator, and what a forward has to call so that tracers see it."""
    if isinstance(operator, str):
        return operator.strip("_"), operator
    library = getattr(operator, "_opoverload", operator)  # of what `torch.library.custom_op` makes
    if isinstance(library, torch._ops.OpOverload):
        return library.overloadpacket, operator
    if isinstance(library, torch._ops.OpOverloadPacket):
        return library, operator
    if resolve_name(operator) is not None:
        # PyTorch's functions and methods are known by name, however they are called.
        return operator.__name__.strip("_").removeprefix("special_"), operator

    @functools.wraps(operator)
    def seen(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return handle_torch_function(seen, given, *args, **kwargs)
        return operator(*args, **kwargs)

    # A graph calls it by its module and name, which the apply of a torch.autograd.Function lacks.
    owner = getattr(operator, "__self__", None)
    seen.__module__ = operator.__module__ or getattr(owner, "__module__", None) or __name__
    if isinstance(owner, type):
        seen.__name__ = seen.__qualname__ = f"{owner.__name__}_{operator.__name__}"
    return seen, seen


def _followed(op: Operation, dim: int, *, is_coupled: bool) -> Any:
    """Let channels along a dimension stay where they are: of the first tensor, or of all, which are coupled."""
    op.channels.guessed.add(op.node.name)  # the dry run looks whether other channels have a part in it
    first = op.ids[0]
    count = first.shape[dim] if -first.dim() <= dim < first.dim() else 0
    followed = []
    for ids in op.ids:
        is_followed = ids is first or (is_coupled and -ids.dim() <= dim < ids.dim() and ids.shape[dim] == count)
        if is_followed and any(varies(ids, d) for d in range(ids.dim()) if d != dim % ids.dim()):
            return op.all_kept(reason=reasons.rule_misfits(op.node))
        if is_followed:
            followed.append(ids.movedim(dim, 0).reshape(count, -1)[:, 0] if ids.numel() else ids.flatten())
        else:
            op.keep(ids, reasons.rule_keeps(op.node))
    given = given_shapes(op.node)
    if (
        any(not (-each.dim() <= dim < each.dim() and each.shape[dim] == count) for each in tensors_of(given))
        or not count
    ):
        return op.all_kept(reason=reasons.rule_misfits(op.node))
    for ids in followed[1:]:
        op.couple(followed[0], ids)

    def placed(leaf: Tensor) -> Tensor:
        view = [1] * leaf.dim()
        view[dim] = count
        return followed[0].view(view).expand(leaf.shape)

    return tree_map_only(Tensor, placed, given)
