"""The table of operators: what each operator does with channels.

The rule of an operator, or of several that behave alike, is one function. It says where the channel ids of the inputs
go, which of them the operator couples and which it keeps. The decorator `rule` enters the function under the names of
the operators, or under the classes of modules without parameters. A name has one rule, so the order of the functions
has no meaning. Other facts about an operator (it only moves entries, it picks entries of a dimension) are properties
in the same entry, `OperatorRule`.

A dry run checks the rules for every operation of a model. An operator without a rule is assumed to be elementwise.

A channel of zeros doesn't change a sum or a norm, but it does change a mean, maximum, softmax or sort: if such an
operation works along channels within a forward, all of them are kept, except for a mean that a convolution reads and a
maximum over what is never negative (`averages.py`). In a module of its own that treats all channels alike, as norms do,
it works along the remaining channels (`layers/norms.py`). Rules depend on what an operation does, never on the values
that it gets.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator as operator_module
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.overrides import get_testing_overrides, handle_torch_function, has_torch_function, resolve_name
from torch.utils._pytree import tree_map_only

from nni_topo.errors import ConfigError, hint_of, raised, shown
from nni_topo.network.attention.unfused.own_width import FIRST, LAST
from nni_topo.network.channels import reasons
from nni_topo.network.channels.averages import average_of, is_not_negative
from nni_topo.network.channels.ids import (
    FIXED,
    Blocks,
    ChannelIds,
    FreeParameter,
    Layer,
    TakenWidth,
    carry,
    carry_reduced,
    compress,
    given_shapes,
    meet_alike,
    staying,
    varies,
)
from nni_topo.network.graph.nodes import described, owner_of, plain_name, tensor_shape
from nni_topo.network.graph.recording import put
from nni_topo.network.graph.traced_int import ON_NUMBERS, TracedInt, is_computed_of_attributes, plain
from nni_topo.network.runtime.inputs import tensors_of
from nni_topo.rules import Rule, checked

Modules = Callable[[str], Any]
"""Looks up a module of a traced model by name."""
# Raised by operations that can't be run on channel ids, or lack an argument.
FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError)


class Operation:
    """One call of an operator, as its rule gets it: with tensors of channel ids in place of its tensors.

    Attributes
    ----------
    node : torch.fx.Node
        The call in the graph.
    args, kwargs : tuple, dict
        Its arguments, with each tensor replaced by a tensor of channel ids: int64, of the same shape.
    ids : list of torch.Tensor
        The tensors of channel ids among the arguments, in their order.
    shape : tuple of int or None
        Shape of its output; None if the output isn't one tensor.
    module : torch.nn.Module or None
        The module that it calls; None if it calls a function or method.
    channels : ChannelIds
        All channel ids of the model, which can be coupled or kept.
    values : dict of torch.fx.Node to Any
        Outputs of the nodes before it: channel ids, or plain values.
    """

    def __init__(self, node: Node, values: dict[Node, Any], channels: ChannelIds, modules: Modules) -> None:
        self.node, self.channels, self.values = node, channels, values
        self.args: tuple[Any, ...]
        self.kwargs: dict[str, Any]
        self.args, self.kwargs = map_arg((node.args, _input_first(node.kwargs)), values.__getitem__)
        self.ids: list[Tensor] = tensors_of((self.args, self.kwargs))
        self.shape = tensor_shape(node)
        self.modules = modules
        self.module: Any = modules(str(node.target)) if node.op == "call_module" else None
        self.rule = rule_of(node) if self.module is None else module_rule(self.module)

    def argument(self, at: int, *names: str, default: Any = None) -> Any:
        """Look up an argument by one of its names, else by its position, which is 0 for the first tensor."""
        return _argument(self.args, self.kwargs, at, names, default)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator itself."""
        if self.module is not None:
            return self.module(*args, **kwargs)
        if self.node.op == "call_method":
            return getattr(args[0], str(self.node.target))(*args[1:], **kwargs)
        return self.node.target(*args, **kwargs)  # type: ignore[operator]

    def couple(self, one: Tensor, other: Tensor) -> None:
        """Couple channels elementwise, so that they are pruned together. The two tensors of ids are broadcast."""
        self.channels.couple(one, other)

    def keep(self, ids: Tensor, reason: reasons.Reason | None = None) -> None:
        """Keep channels. By default the reason is that no rule covers the call, or a registered rule keeps them."""
        default = reasons.no_rule
        if self.rule is not None:
            default = reasons.rule_keeps if self.rule.is_registered else reasons.call_not_covered
        self.channels.pin(np.unique(compress(ids)), reason or default(self.node))

    # The methods below return the ids of the output.

    def all_kept(self, ids: list[Tensor] | None = None, reason: reasons.Reason | None = None) -> Any:
        """Keep all channels that enter, or those of ``ids``; return ids ``FIXED`` for the outputs."""
        outputs = given_shapes(self.node)
        # An operation that returns no tensor (a size, an assertion) needs no channels, unless it writes into a tensor.
        if tensors_of(outputs) or plain_name(self.node) == "setitem":
            entering = self.ids if ids is None else ids
            for tensor in entering:
                self.keep(tensor, reason)
        return outputs

    def run_on_ids(self) -> Any:
        """Run an operator that moves entries, or returns a size, on the ids."""
        return self.run(self.args, self.kwargs)

    def run_on_contiguous_ids(self) -> Any:
        """Run a method that views a tensor on a contiguous copy of the ids; expanded tensors can't be viewed."""
        return self.run((self.args[0].contiguous(), *self.args[1:]), self.kwargs)

    def expand_to_outputs(
        self,
        ids: list[Tensor],
        carry: Callable[[Tensor, tuple[int, ...]], Tensor | None],
        reason: reasons.Reason | None = None,
    ) -> Any:
        """Expand the ids of one tensor to each output's shape by ``carry``; if it returns None, keep all channels."""
        outputs = given_shapes(self.node)
        leaves: list[Tensor] = []
        for output in tensors_of(outputs):
            leaf = None
            if len(ids) == 1:
                leaf = carry(ids[0], tuple(output.shape))
            if leaf is None:
                return self.all_kept(ids, reason)
            leaves.append(leaf)
        expanded = iter(leaves)
        return tree_map_only(Tensor, lambda _: next(expanded), outputs)

    def pass_through(self, ids: list[Tensor] | None = None) -> Any:
        """Leave channels where they are, as most operators do; keep them if the shapes don't fit."""
        return self.expand_to_outputs(self.ids if ids is None else ids, carry)

    def couple_elementwise(self, ids: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Couple operands that are combined elementwise; one that is broadcast along the channels isn't coupled."""
        full = [operand.view((1,) * (len(shape) - operand.dim()) + tuple(operand.shape)) for operand in ids]
        # The dimension of the channels isn't known, but it is one along which ids differ.
        varying = set[int]()
        for operand in full:
            varying.update(_varying(operand))
        coupled = [operand for operand in full if all(operand.shape[d] == shape[d] for d in varying)]
        for operand in coupled[1:]:
            self.couple(coupled[0], operand)
        output_ids = full[0]
        if coupled:
            output_ids = coupled[0]
        for operand in full:
            channel_dims = _varying(operand)
            if not channel_dims or any(operand is member for member in coupled):
                continue
            # If two are broadcast along each other's channels, the output has the first one's; the other's are kept.
            if any(not varies(output_ids, d) for d in channel_dims):
                self.keep(operand)
            if coupled and all(operand.shape[d] == (shape[d] if d in channel_dims else 1) for d in varying):
                # For example one entry per head: it is removed with the head, if that is removed as a whole.
                sizes = [shape[d] if d in channel_dims else -1 for d in range(len(shape))]
                ordered = [compress(tensor).expand(sizes) for tensor in (operand, output_ids)]
                entries, rows = (tensor.movedim(channel_dims, list(range(len(channel_dims)))) for tensor in ordered)
                rows = rows.flatten(0, len(channel_dims) - 1).flatten(1)
                self.channels.tie_whole_rows(entries.flatten().numpy(), rows.numpy())
        return output_ids.expand(shape)

    def by_place(self, ids: list[Tensor] | None = None, *, is_elementwise: bool, meets: bool = False) -> Any:
        """Treat the operator as elementwise.

        ``is_elementwise``: whether it certainly is; otherwise the dry run checks more. ``meets``: whether it certainly
        combines several tensors elementwise. Otherwise this is assumed if their shapes fit and none is a parameter, as
        in a functional layer.
        """
        if ids is None:
            ids = self.ids
        if self.shape is None or not is_elementwise:
            self.channels.guessed.add(self.node.name)
        may_meet = meets or not any(node.op == "get_attr" for node in self.node.all_input_nodes)
        if self.shape is not None and len(ids) > 1 and may_meet and meet_alike(ids, self.shape):
            return self.couple_elementwise(ids, self.shape)
        return self.pass_through(ids)

    def along(self, dims: tuple[int, ...], *, adds: bool = False, reduces: bool = False) -> Any:
        """Follow an operator that works along dimensions, counted from 0, and needs all entries unless it ``adds``.

        ``reduces``: whether the output lacks these dimensions, or has them with length 1.
        """
        channel_dims = [d for d in dims if varies(self.ids[0], d)]
        if channel_dims and adds and (not reduces or channel_dims == _varying(self.ids[0])):
            self.channels.summed.add(self.node.name)
        elif channel_dims:
            rows = self.whole_rows(self.ids[0], channel_dims)
            if reduces or self.shape != tuple(self.ids[0].shape):
                self.ids[0] = rows
        if len(self.ids) > 1 and self.shape is not None and meet_alike(self.ids, self.shape):
            return self.couple_elementwise(self.ids, self.shape)
        if len(self.ids) > 1:
            return self.pass_through()
        if not reduces:
            # If it returns fewer entries than it reads (topk), the operation is the reason, not the way it is called.
            reason = reasons.result_depends(self.node) if channel_dims and not adds else None
            return self.expand_to_outputs(self.ids, carry, reason)
        return self.expand_to_outputs(self.ids, lambda ids, shape: carry_reduced(ids, shape, dims))

    def whole_rows(self, ids: Tensor, dims: list[int]) -> Tensor:
        """Remove entries along dimensions together, or keep them; return ids that don't differ along these.

        Such entries are the pixels of a channel that a view made of a linear layer's outputs, or the channels of a
        head. They are coupled if channels, or heads, come before them. Otherwise they are kept unless they are coupled
        anyway.
        """
        first = ids
        for d in dims:
            first = first.narrow(d, 0, 1)
        outer = [d for d in _varying(ids) if d not in dims]
        if outer and outer[0] < dims[0]:
            self.couple(first, ids)
        else:
            entries = compress(ids).movedim(dims, list(range(len(dims))))
            rows = entries.flatten(0, len(dims) - 1).flatten(1) if outer else entries.reshape(-1, 1)
            self.channels.pin_unless_tied(rows.numpy(), reasons.result_depends(self.node))
        if outer:
            return first.expand(ids.shape)
        return ids


def _argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int, names: Sequence[str], default: Any = None
) -> Any:
    for name in names:
        for key in (name, *_ALIASES.get(name, ())):
            if key in kwargs:
                return kwargs[key]
    if len(args) > at:
        return args[at]
    return default


# NumPy's names of arguments, which PyTorch's functions take as well as their own.
_ALIASES = {"input": ("x", "a", "x1", "tensors"), "other": ("x2",), "dim": ("axis",), "keepdim": ("keepdims",)}


def first_argument(node: Node) -> Any:
    """Return the first argument of a call, given by position or by name."""
    return _argument(node.args, node.kwargs, 0, ("input",))


def _input_first(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Put the argument that is usually given by position before the other arguments by name."""
    firsts = ("input", *_ALIASES["input"])
    return dict(sorted(kwargs.items(), key=lambda pair: pair[0] not in firsts))


@dataclasses.dataclass(frozen=True)
class FixedPlaces:
    """A call on a tensor whose channels are in one dimension; a rule's ``held`` lists the channels that it fixes."""

    node: Node
    dim: int
    shape: tuple[int, ...]  # of the tensor
    is_fixed: Callable[[Any], bool]  # whether a number is the same in the dense model
    picks: dict[str, Tensor]  # by node, constant tensors that the forward makes
    leaving: Any  # the channel ids of the call's output

    @property
    def size(self) -> int:
        """The number of channels."""
        return self.shape[self.dim]

    def argument(self, at: int, *names: str) -> Any:
        """Look up an argument of the call by name, else by its position."""
        return _argument(self.node.args, self.node.kwargs, at, names)

    def is_along(self, at: int) -> bool:
        """Tell whether the call works along the channels. ``at``: the position of its argument ``dim``."""
        dim: Any = self.argument(at, "dim")
        return bool((dim or 0) % len(self.shape) == self.dim)


@dataclasses.dataclass(frozen=True)
class Dims:
    """The dimensions along which an operator works, and what it does there."""

    at: int | None  # position of the argument ``dim``, the tensor's being 0; None: by name only
    # Without the argument; None: all dimensions.
    default: int | tuple[int, ...] | Callable[[int], int | tuple[int, ...]] | None
    adds: bool = False  # zeros don't change the result
    reduces: bool = False  # the output lacks the dimensions, or has them with length 1


@dataclasses.dataclass(frozen=True)
class OperatorRule:
    """The rule of an operator, and its properties."""

    apply: Callable[[Operation], Any]  # returns the channel ids of the output
    moves: bool = False  # the output's entries are entries of its inputs, so that it can be run on ids
    joins: bool = False  # it may flatten dimensions, or unflatten one
    by_index: bool = False  # an argument may be an index tensor, which ids can't replace
    meets: bool = False  # it combines several tensors elementwise
    picks: bool = False  # it picks some entries of a dimension
    picks_one: bool = False  # it may pick a single entry
    writes: bool = False  # it writes into a tensor
    reads_sizes: bool = False  # it reads only the shape and the type of a tensor
    one_value: bool = False  # it makes a tensor filled with one value, of the shape that its arguments give
    is_like: bool = False  # its first argument is a tensor that gives the new tensor its type
    is_unset: bool = False  # its output is uninitialized
    dims: Dims | None = None  # the dimensions along which it works, if any
    is_registered: bool = False  # a user has registered it
    held: Callable[[FixedPlaces], list[slice]] | None = None  # returns the channels that fixed numbers keep
    why_held: Callable[[Node], reasons.Reason] = reasons.fixed_channels


_TABLE: dict[Any, OperatorRule] = {}  # by name, by class of a module, or by a registered function


def rule(
    *operators: str | type[nn.Module], **properties: Any
) -> Callable[[Callable[[Operation], Any]], Callable[[Operation], Any]]:
    """Enter a function as the rule of operators: names as `operation_name` returns, or classes of modules."""

    def enter(apply: Callable[[Operation], Any]) -> Callable[[Operation], Any]:
        for operator in operators:
            if operator in _TABLE:
                raise ValueError(f"an operator has one rule, got a second one ({operator})")
            _TABLE[operator] = OperatorRule(apply, **properties)
        return apply

    return enter


def operation_name(node: Node) -> str:
    """Return the name of a function or method in the table."""
    return plain_name(node).removeprefix("special_")


def rule_of(node: Node) -> OperatorRule | None:
    """Look up the rule of a function or method that a node calls; None without one."""
    if node.op not in ("call_function", "call_method"):
        return None
    target = node.target
    if isinstance(node.target, torch._ops.OpOverload):
        target = node.target.overloadpacket
    if target in _TABLE:
        return _TABLE[target]
    return _TABLE.get(operation_name(node))


def moves_entries(name: str) -> bool:
    """Tell whether the function or method of this name only moves entries of tensors."""
    operator_rule = _TABLE.get(name)
    return operator_rule is not None and operator_rule.moves


def module_rule(module: nn.Module) -> OperatorRule | None:
    """Look up the rule of a module's class, or of the nearest class that it is derived from; None without one."""
    for kind in type(module).__mro__:
        if kind in _TABLE:
            return _TABLE[kind]
    return None


def has_property(node: Node, name: str) -> bool:
    """Tell whether the rule of the function or method that a node calls has a property of `OperatorRule`."""
    operator_rule = rule_of(node)
    return operator_rule is not None and bool(getattr(operator_rule, name))


# Operators that move entries.


@rule(
    "column_stack", "dstack", "hstack", "vstack", "row_stack", "reshape_as", "swapaxes", "t", "moveaxis", "flip",
    "detach", "getattr", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "contiguous", "clone",
    "pixel_shuffle", "pixel_unshuffle", nn.PixelShuffle, nn.PixelUnshuffle, moves=True,
)  # fmt: skip
@rule("flatten", nn.Flatten, nn.Unflatten, moves=True, joins=True)
def _moves(op: Operation) -> Any:
    return op.run_on_ids()


@rule("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave", moves=True)
def _repeated(op: Operation) -> Any:
    """Follow an operator that repeats entries.

    A tensor with one value for all channels, such as an index or a mask, gets the ids of the channels along which it is
    repeated: of each removed channel its value isn't read.
    """
    moved_ids, source, name = op.run_on_ids(), op.ids[0], operation_name(op.node)
    if _varying(source) and not _is_own(source, op.channels):
        return moved_ids
    sizes: dict[int, Any] = {}  # by dimension, counted from the last, as -1: what gives its size
    if name == "expand_as":
        template: Any = op.node.args[1] if len(op.node.args) > 1 else op.node.kwargs["other"]
        sizes = {d - moved_ids.dim(): (template, d) for d in range(moved_ids.dim())}
    elif name == "repeat_interleave":
        dim, times = op.argument(2, "dim"), _argument(op.node.args, op.node.kwargs, 1, ("repeats",))
        if isinstance(dim, int) and isinstance(times, TracedInt) and times.place is not None and not _varying(source):
            # The neighbours made of one entry, such as the heads of a sample, count the channels of an attribute.
            dim %= moved_ids.dim()
            shape = (*moved_ids.shape[:dim], plain(times), *moved_ids.shape[dim + 1 :])
            made_of_one = op.channels.filled(op.node.name, [dim], shape)
            repeats = [1] * moved_ids.dim()
            repeats[dim] = source.shape[dim]
            return made_of_one.repeat(repeats)
        if isinstance(dim, int) and isinstance(times, Node):
            sizes[dim % moved_ids.dim() - moved_ids.dim()] = times
    else:
        listed = _sizes_of(op.node)
        sizes = {d - len(listed): size for d, size in enumerate(listed)}
    repeated = {}
    for d, size in sizes.items():
        has_one_entry = -d > source.dim() or source.shape[d] == 1
        if has_one_entry and moved_ids.shape[d] > 1:
            repeated[d + moved_ids.dim()] = size
    ids = _ids_of_sizes(op.node, repeated, tuple(moved_ids.shape), op.channels)
    if ids is None:
        return moved_ids
    if _varying(source):
        op.keep(source)  # a parameter without channels, such as the kernel of a blur
    return ids


@rule("broadcast_tensors")
def _broadcast(op: Operation) -> Any:
    """Follow tensors that are expanded to one shape, as elementwise operations do."""
    return [op.couple_elementwise(op.ids, tuple(torch.broadcast_shapes(*(ids.shape for ids in op.ids))))] * len(op.ids)


@rule("channel_shuffle", nn.ChannelShuffle, moves=True)
def _shuffled(op: Operation) -> Any:
    """Follow a channel shuffle: each of its groups has to keep the same number of channels."""
    module = op.module
    rows = op.argument(1, "groups") if module is None else module.groups
    if _varying(op.ids[0]) == [1]:
        blocks = list(op.ids[0].movedim(1, 0).flatten(1)[:, 0].view(rows, -1).numpy())
        op.channels.blocks.append(Blocks([blocks], may_vanish=False, moves=True, place=described(op.node)))
        op.channels.reorders = True
    return op.run_on_ids()


@rule("cat", "concat", "concatenate", "stack", moves=True)
def _concatenation(op: Operation) -> Any:
    """Follow a concatenation, which couples its parts unless it is along the channels."""
    moved_ids, dim = op.run_on_ids(), op.argument(1, "dim", default=0)
    parts = op.ids
    if operation_name(op.node) == "stack":
        parts = [ids.unsqueeze(dim) for ids in op.ids]
    slices = []
    for part in parts:
        if part.shape[dim]:  # a part may have no channels left
            # If ids differ within one slice, channels are in another dimension: all parts must keep the same ones.
            first = part.narrow(dim, 0, 1)
            if not any(varies(first, d) for d in range(1, first.dim())):
                return moved_ids
            slices.append(first)
    if slices and all(varies(part, dim) for part in parts):
        # Heads of several channels span both dimensions. Nothing is coupled if each head is removed as a whole.
        group_ids = torch.from_numpy(op.channels.settle()[0])
        if not any(_varying(group_ids[ids]) for ids in slices):
            return moved_ids
    for ids in slices[1:]:
        op.couple(slices[0], ids)
    # Coupled channels get one id, so that after this operation ids differ along the channels only.
    if slices and not any(varies(part, dim) for part in parts):
        return slices[0].expand(moved_ids.shape)
    return torch.from_numpy(op.channels.settle()[1])[moved_ids]


@rule(
    "pad", nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd, nn.modules.padding._CircularPadNd,
)  # fmt: skip
def _padded(op: Operation) -> Any:
    """Follow padding: entries added along channels are kept; entries added along other dimensions get their ids."""
    ids = op.ids[0]
    if op.module is None:
        ends, mode = op.argument(1, "pad"), op.argument(2, "mode", default="constant")
    else:
        ends, mode = op.module.padding, "constant" if hasattr(op.module, "value") else "reflect"
    places = [d for d in _varying(ids) if any(ends[2 * (ids.dim() - 1 - d) :][:2])]
    if places and places != _varying(ids):
        ids = op.whole_rows(ids, places)
    spare = list(ends)
    for d in range(ids.dim()):
        at = 2 * (ids.dim() - 1 - d)
        if at < len(spare) and not varies(ids, d):
            ids = ids.narrow(d, 0, 1)
            spare[at : at + 2] = [0, 0]
    if any(spare) and (mode != "constant" or min(spare) < 0):
        return op.all_kept()
    padded = torch.nn.functional.pad(ids, spare, value=FIXED)  # whatever the values are, the added channels are kept
    return padded.expand(op.shape or ())


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _keep_all(op: Operation) -> Any:
    return op.all_kept()


@rule("view_as_complex")
def _as_complex(op: Operation) -> Any:
    """Couple real and imaginary parts, the two entries of the last dimension."""
    op.couple(op.ids[0][..., 0], op.ids[0][..., 1])
    return op.ids[0][..., 0]


@rule("view_as_real")
def _as_real(op: Operation) -> Any:
    return op.ids[0].unsqueeze(-1).expand(op.shape or ())


rule("view_as", moves=True)(Operation.run_on_contiguous_ids)


def _held_by_view(call: FixedPlaces) -> list[slice]:
    # Only if all channels end up in one dimension: of heads and channels per head, either number may be fixed.
    for d, size in enumerate(_sizes_of(call.node)):
        ids = call.leaving
        if ids.shape[d] == ids.numel() == call.size and size != -1 and call.is_fixed(size):
            return [slice(None)]
    return []


@rule("view", "reshape", moves=True, joins=True, held=_held_by_view, why_held=reasons.fixed_sizes)
def _viewed(op: Operation) -> Any:
    moved_ids = op.run_on_contiguous_ids() if op.node.op == "call_method" else op.run_on_ids()
    return _taken_apart(op, moved_ids, _sizes_of(op.node))


@rule("unflatten", moves=True, joins=True)
def _unflattened(op: Operation) -> Any:
    moved_ids = op.run_on_ids()
    size_argument: Any = op.node.kwargs.get("sizes", op.node.args[-1])
    # Sizes given as a slice of a shape are one node; they change with that shape.
    parts = size_argument if isinstance(size_argument, (tuple, list)) else [size_argument] * moved_ids.dim()
    sizes = (*[None] * (_varying(moved_ids) or [0])[0], *parts)
    return _taken_apart(op, moved_ids, sizes)


def _sizes_of(node: Node) -> Any:
    """Return a view's sizes as they are in the graph: numbers, or nodes if they come from a shape."""
    names = ("shape", "size", "repeats", "dims")
    sizes: Any = node.args[1:] or _argument((), node.kwargs, 0, names, ())
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        return sizes[0]
    return sizes


def _varying(ids: Tensor) -> list[int]:
    """List the dimensions along which ids differ."""
    return [d for d in range(ids.dim()) if varies(ids, d)]


def _taken_apart(op: Operation, moved_ids: Tensor, sizes: Any) -> Tensor:
    """Constrain channels that a view splits into a fixed number of rows, or into rows of a fixed length."""
    for d, size in enumerate(sizes):
        if d in _varying(moved_ids) or not _varying(moved_ids):
            _note_taken_width(op, size, moved_ids)
        counted = _counted_ids(size, op.channels)
        if counted is not None and _varying(moved_ids) == [d] and moved_ids.shape[d] == len(counted):
            _count_alike(op, counted, moved_ids, as_width=True)
    if len(op.ids) != 1 or len(_varying(op.ids[0])) != 1:
        return moved_ids
    places = _varying(moved_ids)
    if len(places) < 2 or len(sizes) <= places[-1]:
        return moved_ids
    # Numbers, and numbers computed from attributes, are fixed.
    fixed_sizes = [
        (isinstance(sizes[d], int) or is_computed_of_attributes(sizes[d])) and sizes[d] != -1 for d in places
    ]
    first_is_fixed, *later_are_fixed = fixed_sizes
    is_counted = isinstance(sizes[places[0]], TracedInt)
    rows = moved_ids.movedim(places, list(range(len(places)))).flatten(len(places))[..., 0].flatten(1).numpy()
    if first_is_fixed and len(later_are_fixed) == 1 and not later_are_fixed[0]:
        where = described(op.node)
        op.channels.blocks.append(Blocks([list(rows)], may_vanish=False, moves=True, place=where, counted=is_counted))
        op.channels.reorders = True
    elif all(later_are_fixed) and (
        not first_is_fixed or (is_counted and not any(isinstance(sizes[d], TracedInt) for d in places[1:]))
    ):
        op.channels.tie(rows[:, :1], rows)
    return moved_ids


def _ids_of_node(node: Any, channels: ChannelIds) -> Any:
    """Return the channel ids of a node's output; None for what is no node, or has none yet."""
    if not isinstance(node, Node):
        return None
    return channels.by_node.get(node.name)


def _note_taken_width(op: Operation, size: Any, moved_ids: Tensor) -> None:
    """Note a size that is computed from a tensor's width, in case another tensor's channels are reshaped to it."""
    waiting = [size]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, Node):
            continue
        if plain_name(node) != "size" or len(node.args) != 2:
            if node.target in ON_NUMBERS:
                waiting += node.args
            continue
        tensor, dim = node.args
        ids = _ids_of_node(tensor, op.channels)
        if not isinstance(ids, Tensor) or not isinstance(dim, int):
            continue
        last = ids.dim() - 1
        # Kept channels may be reshaped to it, too, if that dimension holds channels.
        if dim % ids.dim() in (1, last) and (_varying(moved_ids) or ids.shape[dim] > 1):
            of_last = dim % ids.dim() == last
            width_dim = LAST if of_last else FIRST
            op.channels.widths.append(TakenWidth(owner_of(op.node), width_dim, ids, compress(moved_ids)))


# Operators that pick some entries of a dimension. Channels that a fixed number counts are kept: see `FixedPlaces`.


_SPLIT_SIZES = ("split_size_or_sections", "split_size", "split_sizes")


def _held_by_split(call: FixedPlaces) -> list[slice]:
    if not call.is_along(2):
        return []
    sizes = call.argument(1, *_SPLIT_SIZES)
    if call.is_fixed(sizes):
        # All pieces but the last one keep their size, and the last one doesn't vanish.
        size = max(int(sizes), 1)
        return [slice((call.size - 1) // size * size + 1)]
    if not isinstance(sizes, Sequence):
        return []
    metas: Any = call.node.meta.get("tensor_meta")
    slices, start = [], 0
    for piece_size, piece in zip(sizes, metas, strict=True):
        length = piece.shape[call.dim]
        # A size that is computed counts the channels of another tensor: see `_split`.
        if call.is_fixed(piece_size) or not isinstance(piece_size, (int, Node)):
            slices.append(slice(start, start + length))
        start += length
    return slices


@rule("split", "split_with_sizes", moves=True, held=_held_by_split)
def _split(op: Operation) -> Any:
    pieces = op.run_on_ids()
    sizes: Any = _argument(op.node.args, op.node.kwargs, 1, _SPLIT_SIZES)
    listed: Sequence[Any] = ()
    if isinstance(sizes, Sequence):
        listed = sizes
    if op.ids and varies(op.ids[0], op.argument(2, "dim", default=0)):
        for size in listed or (sizes,):
            _note_taken_width(op, size, op.ids[0])
    for size, piece in zip(listed, pieces, strict=False):
        if not isinstance(size, Node) or len(_varying(piece)) != 1:
            continue
        counted = _counted_ids(size, op.channels)
        if counted is None or len(counted) != piece.shape[_varying(piece)[0]]:
            op.keep(piece)  # a computed size that counts no channels
        else:
            _count_alike(op, counted, piece)
    return pieces


def _count_alike(op: Operation, counted: Tensor, ids: Tensor, *, as_width: bool = False) -> None:
    """Couple the channels of ``other`` with ``counted``, whose number they take; ``as_width``: see `ChannelIds.tie`."""
    channels = op.channels.per_channel(ids, _varying(ids)[0])
    if not np.isin(channels, counted.numpy()).any():
        op.channels.tie(counted.numpy(), channels, as_width=as_width)


@rule("chunk", moves=True)
def _chunked(op: Operation) -> Any:
    pieces = op.run_on_ids()
    channels, ids, dim = op.channels, op.ids[0], op.argument(2, "dim", default=0)
    n_chunks = op.argument(1, "chunks")
    short = pieces[0].shape[dim] - pieces[-1].shape[dim]
    if (short or n_chunks != len(pieces)) and varies(ids, dim):
        if n_chunks != len(pieces) or channels.reorders or _varying(ids) != [dim % ids.dim()]:
            op.keep(ids, reasons.fixed_channels(op.node))  # the dense model would make other pieces
            return pieces
        # The last piece is shorter, as in EdgeNeXt. If all pieces lose equally many channels, the dense model's chunk
        # makes the same pieces.
        rows = [channels.per_channel(piece, dim % ids.dim()) for piece in pieces]
        rows[-1] = np.concatenate([rows[-1], np.full(short, FIXED)])
        channels.chunks = True
        where = described(op.node)
        channels.blocks.append(Blocks([rows], may_vanish=False, moves=True, is_filled=True, place=where))
        return pieces
    # In the dense model chunk makes equal pieces too, so all pieces have to lose equally many channels.
    if pieces[0].dim() > 1 and not short:
        channel_dims = [d for d in range(1, pieces[0].dim()) if any(varies(piece, d) for piece in pieces)]
        channel_dim = channel_dims[0] if len(channel_dims) == 1 else 1
        rows = [channels.per_channel(piece, channel_dim) for piece in pieces]
        sides, channels.chunks = _by_layer(rows, channels), True
        # After a shuffle, one piece may have more channels of a layer than another.
        uneven = any(len({len(block) for block in side}) > 1 for side in sides)
        if uneven:
            sides = [rows]
        channels.blocks.append(Blocks(sides, may_vanish=False, moves=True, is_uneven=uneven, place=described(op.node)))
    return pieces


@rule("glu", nn.GLU)
def _gated(op: Operation) -> Any:
    # One half times the sigmoid of the other half, so the product couples the halves.
    dim = op.argument(1, "dim", default=-1) if op.module is None else op.module.dim
    first, second = op.ids[0].chunk(2, dim)
    op.couple(first, second)
    return torch.from_numpy(op.channels.settle()[1])[first]


def _by_layer(pieces: list[np.ndarray], channels: ChannelIds) -> list[list[np.ndarray]]:
    """Split pieces by the layer that makes the channels, if layers were shuffled: for each layer, a list of pieces."""
    if not channels.reorders:
        return [pieces]
    # After a shuffle a piece holds channels of every layer: each layer has to lose equally many in each piece.
    makers: list[Layer | FreeParameter] = [
        *channels.layers.values(), *channels.free_parameters.values(), *channels.one_valued.values()
    ]  # fmt: skip
    firsts = np.array(sorted([FIXED, *(maker.first for maker in makers)]))
    owners = [np.searchsorted(firsts, piece, side="right") for piece in pieces]
    sides: list[list[np.ndarray]] = []
    for layer in np.unique(np.concatenate(owners)):
        side = []
        for piece, owner in zip(pieces, owners, strict=True):
            side.append(piece[owner == layer])
        sides.append(side)
    return sides


def _held_by_ends(call: FixedPlaces, *ends: Any) -> list[slice]:
    # A bound beyond all channels, or before them, stays at the same end if channels are removed.
    fixed = [end for end in ends if call.is_fixed(end) and 0 < abs(end) < call.size]
    return [slice(end) if end > 0 else slice(end, None) for end in fixed]


def _held_by_place(call: FixedPlaces, place: Any) -> list[slice]:
    # The first or last channel needn't be kept if only its shape or type is read.
    if not call.is_fixed(place) or (place in (0, -1) and reads_shape_only(call.node)):
        return []
    return [slice(place + 1) if place >= 0 else slice(place, None)]


def _held_by_narrow(call: FixedPlaces) -> list[slice]:
    if not call.is_along(1):
        return []
    start, length = call.argument(2, "start"), call.argument(3, "length")
    if not call.is_fixed(length):
        return _held_by_ends(call, start)
    return [slice(start + length) if call.is_fixed(start) and start >= 0 else slice(None)]


def _held_by_roll(call: FixedPlaces) -> list[slice]:
    shifts, dims = call.argument(1, "shifts"), call.argument(2, "dims")
    if dims is None or dims == ():
        return [slice(None)]  # it rolls the flattened tensor
    pairs = zip(
        *(argument if isinstance(argument, Sequence) else [argument] for argument in (shifts, dims)), strict=True
    )
    fixed = [shift for shift, dim in pairs if dim % len(call.shape) == call.dim and call.is_fixed(shift) and shift]
    # The channels that move from the end to the start, or from the start to the end.
    return [slice(-shift, None) if shift > 0 else slice(-shift) for shift in fixed]


@rule("unbind", moves=True, held=lambda call: [slice(None)] if call.is_along(1) else [])
@rule("tensor_split", moves=True, held=lambda call: [slice(None)] if call.is_along(2) else [])
@rule("narrow", moves=True, picks=True, held=_held_by_narrow)
@rule(
    "select", moves=True, picks=True, picks_one=True,
    held=lambda call: _held_by_place(call, call.argument(2, "index")) if call.is_along(1) else [],
)  # fmt: skip
@rule("roll", moves=True, held=_held_by_roll)
def _pieces_taken(op: Operation) -> Any:
    return op.run_on_ids()


def _held_by_index(call: FixedPlaces) -> list[slice]:
    index: Any = call.node.args[1]
    parts = _index_parts(index)
    counts = [_dimensions(part) for part in parts]
    missing = len(call.shape) - sum(counts)
    channel_index: Any = slice(None)
    first = 0
    for part, dims in zip(parts, counts, strict=True):
        if first <= call.dim < first + dims:
            channel_index = part
        first += missing if part is Ellipsis else dims
    if isinstance(channel_index, slice):
        if channel_index.step not in (None, 1):
            return [slice(None)]
        return _held_by_ends(call, channel_index.start, channel_index.stop)
    if isinstance(channel_index, (list, tuple)) or (
        isinstance(channel_index, Node) and channel_index.name in call.picks
    ):
        return [slice(None)]
    return _held_by_place(call, channel_index)


def reads_shape_only(node: Node) -> bool:
    """Tell whether only the shape, device or type of a picked channel is read."""
    for user in node.users:
        of_sizes = plain_name(user) == "getattr" and user.args[1] in ("shape", "device", "dtype")
        # An embedding looks up integers, so of floating-point features it can only read the sizes, as BART's class of
        # position embeddings does.
        owner, dtype = user.graph.owning_module, getattr(node.meta.get("tensor_meta"), "dtype", None)
        is_embedding = False
        if owner is not None and user.op == "call_module" and dtype is not None and dtype.is_floating_point:
            is_embedding = isinstance(owner.get_submodule(str(user.target)), nn.Embedding)
        if not (of_sizes or has_property(user, "reads_sizes") or is_embedding):
            return False
    return True


def _index_parts(index: Any) -> list[Any]:
    """List the parts of an index: the items of a tuple, or the one number, slice or tensor."""
    if isinstance(index, tuple):
        return list(index)
    return [index]


def _dimensions(part: Any) -> int:
    """Return how many dimensions of a tensor one part of an index takes."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    if isinstance(part, Node):
        meta: Any = part.meta.get("tensor_meta")
        if getattr(meta, "dtype", None) == torch.bool:
            return len(meta.shape)
        return 1
    first, depth = part, 0
    while isinstance(first, (list, tuple)) and first:
        first, depth = first[0], depth + 1
    if isinstance(first, bool):
        return depth
    return 1


@rule("getitem", moves=True, by_index=True, picks=True, picks_one=True, held=_held_by_index)
def _indexed(op: Operation) -> Any:
    if _index_is_known(op):
        return _picked(op)
    if not tensors_of(given_shapes(op.node)):
        return op.run_on_ids()
    # A computed index or mask. Along dimensions without channels ids don't differ, so picking the first entry will do.
    states, index = op.ids[0], op.node.args[1]
    parts = _index_parts(index)
    if any(_varying(ids) for ids in op.ids[1:]):
        return op.by_place(is_elementwise=False)
    missing = states.dim() - sum(map(_dimensions, parts))
    places, first = list[Any](), 0
    for part in parts:
        count = missing if part is Ellipsis else _dimensions(part)
        meta: Any = part.meta.get("tensor_meta") if isinstance(part, Node) else None
        if meta is not None:
            if meta.dtype == torch.uint8 or any(varies(states, d) for d in range(first, first + count)):
                return op.by_place(is_elementwise=False)
            rank = len(meta.shape)
            if meta.dtype == torch.bool:
                rank = 1
            places += [torch.zeros([1] * rank, dtype=torch.int64)] * count
        elif part is None or part is Ellipsis or isinstance(part, (int, slice)):
            places.append(part)
        else:
            return op.by_place(is_elementwise=False)
        first += count
    try:
        return states[tuple(places)].expand(op.shape or ())
    except FAILURES:
        return op.by_place(is_elementwise=False)


def _held_by_index_select(call: FixedPlaces) -> list[slice]:
    index = call.argument(2, "index", "indices")
    if call.is_along(1) and isinstance(index, Node) and index.name in call.picks:
        return [slice(None)]
    return []


@rule("index_select", moves=True, by_index=True, held=_held_by_index_select)
def _index_selected(op: Operation) -> Any:
    if _index_is_known(op):
        return _picked(op)
    states, dim = op.ids[0], op.argument(1, "dim")
    if op.shape and isinstance(dim, int) and not varies(states, dim) and not varies(op.ids[-1], 0):
        # Ids don't differ between rows, so the first row stands for those that the index picks.
        return states.narrow(dim, 0, 1).expand(op.shape)
    return op.all_kept()


@rule("gather", by_index=True, held=_held_by_index_select, dims=Dims(1, None))
def _gathered(op: Operation) -> Any:
    if _index_is_known(op):
        return _picked(op)
    return _by_row(op, op.argument(1, "dim"), [op.argument(0, "input"), op.argument(2, "index")])


def _held_by_take(call: FixedPlaces) -> list[slice]:
    index = call.argument(1, "indices")
    if call.is_along(2) and isinstance(index, Node) and index.name in call.picks:
        return [slice(None)]
    return []


@rule("take_along_dim", by_index=True, held=_held_by_take, dims=Dims(2, None))
def _taken_along(op: Operation) -> Any:
    if _index_is_known(op):
        return _picked(op)
    return _by_row(op, op.argument(2, "dim"), [op.argument(0, "input"), op.argument(1, "indices")], may_expand=True)


def _by_row(op: Operation, dim: Any, tensors: list[Tensor], *, may_expand: bool = False) -> Any:
    """Follow an operator that takes or puts entries along a dimension, and leaves them where they are along others.

    ``tensors``: the tensors with an entry for each of these places; ``may_expand``: whether they are broadcast.
    """
    shape, rank = op.shape, tensors[0].dim()
    if shape is None or not isinstance(dim, int) or any(tensor.dim() != rank for tensor in tensors):
        return op.all_kept()
    dim %= rank
    if any(varies(tensor, dim) for tensor in tensors):
        if varies(tensors[0], dim):
            return _works_along(op)
        return op.all_kept()
    # Ids don't differ between rows, so the first row of each stands for all.
    first = [tensor.narrow(dim, 0, 1) for tensor in tensors]
    for d in range(rank):
        if d == dim:
            continue
        if any(varies(row, d) for row in first):
            if any(row.shape[d] != shape[d] and not (may_expand and row.shape[d] == 1) for row in first):
                return op.all_kept(reason=reasons.fixed_channels(op.node))
        else:
            first = [row.narrow(d, 0, 1) for row in first]
    sizes = torch.broadcast_shapes(*(row.shape for row in first))
    return op.couple_elementwise(first, tuple(sizes)).expand(shape)


def _index_is_known(op: Operation) -> bool:
    """Tell whether all indices of an operator are numbers or constant tensors of the forward."""
    indices = op.node.all_input_nodes[1:]
    if indices and all(node.name in op.channels.picks for node in indices):
        return True
    return not tensors_of((op.args[1:], op.kwargs))


def _picked(op: Operation) -> Any:
    """Apply a known index to the ids."""
    # Constant index tensors are used with their values, not with their ids.
    values = {node: op.channels.picks.get(node.name, ids) for node, ids in op.values.items()}
    values[op.node.all_input_nodes[0]] = op.values[op.node.all_input_nodes[0]]
    args, kwargs = map_arg((op.node.args, op.node.kwargs), values.__getitem__)
    return op.run(args, kwargs)


@rule("put", "setitem", writes=True)
def _written(op: Operation) -> Any:
    # Afterwards the tensor holds channels of two tensors. They are coupled if every write covers all channels, as in a
    # loop over tokens; otherwise they can't be followed.
    if op.node.target is not put:
        return op.all_kept(reason=reasons.overwritten(op.node))
    target, place, value = op.args
    if not isinstance(value, Tensor) or value.dim() == 0:
        return _number_written(op, target, op.node.args[1])
    # If the index contains tensors, their nodes say how many dimensions each takes.
    index: Any = op.node.args[1] if len(op.ids) > 2 else place
    parts = _index_parts(index)
    if len(op.ids) > 2:
        # The tensors select rows to overwrite. All channels must be in the last dimension of both.
        takes_all = sum(map(_dimensions, parts)) < target.dim() or parts[-1] == slice(None)
        is_alike = value.numel() > 0 and target.shape[-1] == value.shape[-1]
        in_last = all(set(_varying(tensor)) <= {tensor.dim() - 1} for tensor in (target, value))
        if takes_all and is_alike and in_last and not any(_varying(ids) for ids in op.ids[1:-1]):
            op.couple(target[(0,) * (target.dim() - 1)], value[(0,) * (value.dim() - 1)])
            return target
    elif all((isinstance(part, (int, slice)) or part is Ellipsis) and not isinstance(part, bool) for part in parts):
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts[at : at + 1] = [slice(None)] * (target.dim() - len(parts) + 1)
        varying = _varying(target)
        partial = [d for d in varying if d < len(parts) and parts[d] != slice(None)]
        if partial and varying[0] < partial[0]:
            target = op.whole_rows(target, partial)  # some channels of each head, as in rotary positions
            partial = []
        if not partial:
            op.couple(target[place], value)
            return target
    return op.all_kept(reason=reasons.overwritten(op.node))


def _number_written(op: Operation, target: Tensor, index: Any) -> Any:
    """Follow a number that is written into a tensor: into places of all channels, or where a mask of them holds."""
    parts = _index_parts(index)
    counts = [_dimensions(part) for part in parts]
    if isinstance(index, Node) and counts == [target.dim()]:
        return op.couple_elementwise([target, op.values[index]], tuple(target.shape))
    indices = [op.values[part] for part in parts if isinstance(part, Node)]
    full_dims, first = list[int](), 0  # dimensions of which the number fills all entries
    for part, count in zip(parts, counts, strict=True):
        if part is Ellipsis:
            count = target.dim() - sum(counts)
        if part is Ellipsis or part == slice(None):
            full_dims += range(first, first + count)
        first += count
    full_dims += range(first, target.dim())
    if set(_varying(target)) <= set(full_dims) and not any(_varying(ids) for ids in tensors_of(indices)):
        return target
    return op.all_kept(reason=reasons.overwritten(op.node))


# Elementwise operators on several tensors, whose channels they couple.


@rule("add", "iadd", "mul", "imul", "maximum", "minimum", meets=True)
@rule(
    "radd", "sub", "isub", "subtract", "multiply", "div", "truediv", "itruediv", "divide", "true_divide", "floordiv",
    "floor_divide", "pow", "fmax", "fmin", "lerp", "addcmul", "addcdiv", "and", "or", "xor", "logical_and",
    "logical_or", "logical_xor", "eq", "ne", "lt", "le", "gt", "ge", "mod", "remainder", "fmod", "masked_fill",
    meets=True,
)  # fmt: skip
def _meet(op: Operation) -> Any:
    return op.by_place(is_elementwise=True, meets=True)


@rule("where", meets=True)
def _chosen(op: Operation) -> Any:
    # With only a condition it lists the indices where that holds.
    if op.argument(1, "input") is not None:
        return op.by_place(is_elementwise=True, meets=True)
    return _places_listed(op)


@rule("nonzero", "argwhere")
def _places_listed(op: Operation) -> Any:
    return op.all_kept(reason=reasons.picked_by_value(op.node))


@rule("max", "min", meets=True, dims=Dims(1, None, reduces=True))
def _largest(op: Operation) -> Any:
    # With two tensors it is elementwise.
    if len(op.ids) > 1:
        return op.by_place(is_elementwise=True, meets=True)
    return _works_along(op)


@rule("prelu", "batch_norm", "instance_norm", meets=True)
def _scaled_by_channel(op: Operation) -> Any:
    """Follow an operator that holds one number for each channel, in vectors: the channels are in dimension 1."""
    states = op.argument(0, "input")
    vectors = [ids.view(-1, *[1] * (states.dim() - 2)) for ids in op.ids if ids is not states]
    return op.by_place([states, *vectors], is_elementwise=True, meets=True)


# Elementwise operators on one tensor.


@rule("empty_like", reads_sizes=True, is_unset=True)
@rule("full_like", "ones_like", "zeros_like", reads_sizes=True)
@rule(
    "abs", "exp", "hardsigmoid", "relu", "relu6", "sigmoid", "softplus", "sqrt", "square", "dropout", "absolute", "neg",
    "negative", "positive", "pos", "sign", "sgn", "rsqrt", "reciprocal", "exp2", "expm1", "log", "log1p", "log2",
    "log10", "sin", "cos", "tan", "tanh", "sinh", "cosh", "asin", "acos", "atan", "atan2", "arctan", "erf", "erfc",
    "expit", "logit", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardtanh", "hardswish",
    "hardshrink", "softshrink", "tanhshrink", "softsign", "logsigmoid", "threshold", "rrelu", "clamp", "clamp_min",
    "clamp_max", "clip", "ceil", "floor", "round", "trunc", "frac", "nan_to_num", "float", "half", "double", "bfloat16",
    "long", "int", "bool", "type", "cpu", "cuda", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_alpha_dropout", "invert", "bitwise_not", "logical_not", "isnan", "isinf", "isfinite", "requires_grad",
    "zero", "fill", "rand_like", "randn_like", "conj", "real", "imag", "stochastic_depth", nn.Identity,
    nn.modules.dropout._DropoutNd, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LeakyReLU, nn.ELU,
    nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
    nn.Softsign, nn.LogSigmoid, nn.Threshold, nn.RReLU, nn.Tanh,
)  # fmt: skip
def _pointwise(op: Operation) -> Any:
    return op.by_place(is_elementwise=True)


@rule("to", "type_as")
def _typed(op: Operation) -> Any:
    # Only the type or device of the other tensor is read.
    return op.by_place(op.ids[:1], is_elementwise=True)


# Operators that make tensors, or read their sizes.


rule("size", "dim", reads_sizes=True)(Operation.run_on_ids)


@rule("zeros", "ones", "full", one_value=True)
@rule("empty", one_value=True, is_unset=True)
@rule("new_zeros", "new_ones", "new_full", one_value=True, is_like=True, reads_sizes=True)
@rule("new_empty", one_value=True, is_like=True, reads_sizes=True, is_unset=True)
def _made_of_one_value(op: Operation) -> Any:
    return op.by_place(is_elementwise=False)  # called only if the value is a traced tensor; `made` is for all others


def ids_of_new_tensor(node: Node, shape: tuple[int, ...], channels: ChannelIds) -> Tensor:
    """Return the ids of a tensor that is made from no traced tensor.

    As a constant, it keeps the channels that it is combined with. But a tensor filled with one value gets the ids of a
    traced tensor's channels if it takes its size from them, and new ids if an attribute holds its size.
    """
    args = node.args[has_property(node, "is_like") :]
    # Sizes are single arguments, ``torch.zeros(2, 3)``, or one tuple, ``torch.full((2, 3), value)``.
    sizes: Any = args[0] if args and isinstance(args[0], (tuple, list)) else args
    ids = None
    if has_property(node, "one_value") and len(sizes) >= len(shape):
        ids = _ids_of_sizes(node, dict(enumerate(sizes)), shape, channels)
    if ids is None:
        return staying(shape)
    return ids


def _ids_of_sizes(node: Node, sizes: Mapping[int, Any], shape: tuple[int, ...], channels: ChannelIds) -> Tensor | None:
    """Return the ids of a tensor with one value along some dimensions; None if no size of these counts channels.

    ``sizes``: by such a dimension, its size in the graph: a number, a node, or a tensor's node and its dimension.
    """
    measured: dict[Node, dict[int, int]] = {}  # by tensor whose sizes these are: its dimensions, by that of ``shape``
    for d, size in sizes.items():
        tensor, at = size if isinstance(size, tuple) else (None, None)
        if isinstance(size, Node) and plain_name(size) == "size" and len(size.args) == 2:
            tensor, at = size.args
        ids = _ids_of_node(tensor, channels)
        if isinstance(tensor, Node) and isinstance(ids, Tensor) and isinstance(at, int):
            measured.setdefault(tensor, {})[d] = at % ids.dim()
    for tensor, dims in measured.items():
        entries: Tensor = channels.by_node[tensor.name]
        along = [at for at in range(entries.dim()) if entries.shape[at] > 1]
        places = {at: d for d, at in dims.items() if at in along}
        within = [at for at in along if at not in places]
        if places and within and min(within) > max(places):
            # A size that counts heads: the first channel stands for each, as heads go as a whole.
            for at in within:
                entries = entries.narrow(at, 0, 1)
            along = sorted(places)
        if along and sorted(places) == along:  # all dimensions along which the tensor's channels differ
            ordered = sorted(along, key=places.__getitem__)
            view = [1] * len(shape)
            for at in along:
                view[places[at]] = entries.shape[at]
            other_dims = [at for at in range(entries.dim()) if at not in along]
            return entries.permute([*other_dims, *ordered]).reshape(view).expand(shape)
    attribute_dims = [d for d, size in sizes.items() if isinstance(size, TracedInt) and size.place is not None]
    if attribute_dims:
        return channels.filled(node.name, attribute_dims, shape)
    return None


def _counted_ids(size: Any, channels: ChannelIds) -> Tensor | None:
    """Return the ids of the channels that a size in a graph counts, ``(channels,)``; None if it counts none."""
    if not isinstance(size, Node) or plain_name(size) != "size" or len(size.args) != 2:
        return None
    tensor, at = size.args
    ids = _ids_of_node(tensor, channels)
    if isinstance(ids, Tensor) and isinstance(at, int) and ids.numel() == ids.shape[at] > 1:
        return ids.flatten()
    return None


# Operators that work along dimensions.


def _places_of_images(rank: int) -> tuple[int, ...]:
    """List the dimensions after the channels."""
    return tuple(range(2, rank))


# Zeros don't change their results.
@rule("sum", "nansum", "any", "count_nonzero", dims=Dims(1, None, adds=True, reduces=True))
@rule("norm", "linalg_vector_norm", "linalg_norm", dims=Dims(2, None, adds=True, reduces=True))
@rule("linalg_matrix_norm", dims=Dims(2, (-2, -1), adds=True, reduces=True))
@rule("normalize", dims=Dims(2, 1, adds=True))
@rule("cumsum", dims=Dims(1, None, adds=True))
# Zeros change their results: they count values, select among them, or depend on their order.
@rule(
    "mean", "amin", "amax", "nanmean", "std", "var", "std_mean", "var_mean", "prod", "all", "aminmax", "median",
    "nanmedian", "logsumexp", "argmax", "argmin", dims=Dims(1, None, reduces=True),
)  # fmt: skip
@rule("sort", "argsort", "cumprod", "cummax", "cummin", "logcumsumexp", dims=Dims(1, -1))
@rule(
    "softmax",
    "log_softmax",
    "softmin",
    nn.Softmax,
    nn.LogSoftmax,
    nn.Softmin,
    dims=Dims(1, lambda rank: 0 if rank in (1, 3) else 1),
)
@rule("topk", dims=Dims(2, -1))
@rule("local_response_norm", nn.LocalResponseNorm, nn.CrossMapLRN2d, dims=Dims(None, 1))
@rule(nn.Softmax2d, dims=Dims(None, -3))
@rule("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft", dims=Dims(2, -1))
@rule("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_hfft2", "fft_ihfft2", dims=Dims(2, (-2, -1)))
@rule("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "fft_hfftn", "fft_ihfftn", dims=Dims(2, None))
@rule("fft_fftshift", "fft_ifftshift", dims=Dims(1, None))
# Windows slide along the last dimensions.
@rule(
    "max_pool1d", "avg_pool1d", "adaptive_max_pool1d", "adaptive_avg_pool1d", "lp_pool1d", nn.MaxPool1d, nn.AvgPool1d,
    nn.LPPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d, dims=Dims(None, -1),
)  # fmt: skip
@rule(
    "max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d", "lp_pool2d", nn.MaxPool2d, nn.AvgPool2d,
    nn.LPPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, dims=Dims(None, (-2, -1)),
)  # fmt: skip
@rule(
    "max_pool3d", "avg_pool3d", "adaptive_max_pool3d", "adaptive_avg_pool3d", "lp_pool3d", nn.MaxPool3d, nn.AvgPool3d,
    nn.LPPool3d, nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool3d, dims=Dims(None, (-3, -2, -1)),
)  # fmt: skip
@rule(
    "interpolate", "upsample", "upsample_nearest", "upsample_bilinear", nn.Upsample, dims=Dims(None, _places_of_images)
)
def _works_along(op: Operation) -> Any:
    """Follow an operator whose rule needs no more than the dimensions along which it works."""
    where: Dims = op.rule.dims  # type: ignore[assignment, union-attr]
    rank = op.ids[0].dim()
    at = len(op.args) if where.at is None else where.at
    dim_argument: Any = getattr(op.module, "dim", op.argument(at, "dim"))
    if dim_argument is None or isinstance(dim_argument, bool):  # ``x.std(True)`` gives no dimension
        dim_argument = where.default
        if callable(where.default):
            dim_argument = where.default(rank)
    listed: list[Any] = list(dim_argument) if isinstance(dim_argument, Iterable) else [dim_argument]
    if dim_argument is None or not listed or rank == 0:
        dims = tuple(range(rank))
    elif all(isinstance(d, int) for d in listed):
        dims = tuple(d % rank for d in listed)
    else:
        return op.by_place(is_elementwise=False)
    adds = where.adds
    if adds and "norm" in operation_name(op.node):
        # Zeros don't change a norm of such an order.
        order = op.argument(1, "p", "ord")
        adds = order is None or order in ("fro", "nuc") or (isinstance(order, (int, float)) and order >= 0)
    channel_dims = [d for d in dims if varies(op.ids[0], d)]
    if channel_dims and channel_dims == _varying(op.ids[0]) and len(op.ids) == 1:
        adds = adds or _makes_up(op, channel_dims)
    return op.along(dims, adds=adds, reduces=where.reduces)


def _makes_up(op: Operation, channel_dims: list[int]) -> bool:
    """Tell whether removed channels of zeros don't change what a maximum or mean over channels leads to."""
    name, node = operation_name(op.node), op.node
    if name == "max":
        # The place of the largest channel would be another one.
        values = [plain_name(user) == "getitem" and user.args[1] == 0 for user in node.users]
        return all(values) and is_not_negative(node.all_input_nodes[0], op.modules)
    if name == "amax":
        return is_not_negative(node.all_input_nodes[0], op.modules)
    if name != "mean" or len(channel_dims) != 1:
        return False
    average = average_of(node, channel_dims[0], op.channels.per_channel(op.ids[0], channel_dims[0]), op.modules)
    if average is None:
        return False
    op.channels.averages[node.name] = average
    return True


@rule("scatter", "scatter_add", "scatter_reduce", dims=Dims(1, None))
def _scattered(op: Operation) -> Any:
    tensors = [op.argument(0, "input"), op.argument(2, "index"), op.argument(3, "src", "value")]
    return _by_row(op, op.argument(1, "dim"), [tensor for tensor in tensors if isinstance(tensor, Tensor)])


@rule("index_add", "index_copy", "index_reduce", "index_fill", dims=Dims(1, None))
def _put_by_row(op: Operation) -> Any:
    # The index is a list of rows; what fills them may be a single number.
    target, source = op.argument(0, "input"), op.argument(3, "source", "value")
    is_row = isinstance(source, Tensor) and source.dim() > 0
    return _by_row(op, op.argument(1, "dim"), [target, source] if is_row else [target])


@rule("group_norm")
def _group_norm(op: Operation) -> Any:
    return op.along(tuple(range(1, op.ids[0].dim())))


@rule("layer_norm", "rms_norm")
def _layer_norm(op: Operation) -> Any:
    shape, rank = op.argument(1, "normalized_shape"), op.ids[0].dim()
    if not isinstance(shape, Iterable):
        return op.by_place(is_elementwise=False)
    return op.along(tuple(range(rank - len(list(shape)), rank)))


# Products.


@rule("matmul", "mm", "bmm", "rmatmul", "imatmul")
def _product(op: Operation) -> Any:
    """Couple the channels over which a matrix product sums; channels of other rows or columns stay where they are."""
    if op.shape is None or len(op.ids) != 2:
        return op.by_place(is_elementwise=False)
    first_factor, second_factor = op.ids
    return _multiplied(
        op, first_factor, second_factor, op.shape, [_is_attribute(op, 0, "input"), _is_attribute(op, 1, *_SECOND)]
    )


_SECOND = ("other", "mat2", "tensor2")


def _is_attribute(op: Operation, at: int, *names: str) -> bool:
    """Tell whether an argument is a parameter or constant of the model."""
    node = _argument(op.node.args, op.node.kwargs, at, names)
    return isinstance(node, Node) and node.op == "get_attr"


@rule("addmm", "baddbmm")
def _product_added(op: Operation) -> Any:
    """Follow a matrix product that is added to a tensor."""
    if op.shape is None or len(op.ids) != 3:
        return op.all_kept()
    names = ("mat1", "batch1"), ("mat2", "batch2")
    first_factor, second_factor = (op.argument(at, *names[at - 1]) for at in (1, 2))
    is_own = [_is_attribute(op, at, *names[at - 1]) for at in (1, 2)]
    product, added = _multiplied(op, first_factor, second_factor, op.shape, is_own), op.argument(0, "input")
    sizes = (1,) * (product.dim() - added.dim()) + tuple(added.shape)
    if all(sizes[d] == 1 for d in _varying(product)) and not _varying(added):
        return product  # the same is added to all channels
    return op.couple_elementwise([added, product], op.shape)


def _multiplied(
    op: Operation, first_factor: Tensor, second_factor: Tensor, shape: tuple[int, ...], is_own: list[bool]
) -> Any:
    """Return the ids of a product of two matrices; ``is_own``: whether each is a parameter or constant of the model."""
    if min(first_factor.dim(), second_factor.dim()) < 2:
        return op.all_kept()
    factors = first_factor, second_factor
    if any(varies(factor, d) for factor in factors for d in range(factor.dim() - 2)):
        return _product_by_head(op, first_factor, second_factor)
    # The dimensions of each factor that hold channels, counted from the end.
    rows, columns = ([d for d in (-2, -1) if varies(factor, d)] for factor in factors)
    if rows in ([], [-1]) and columns in ([], [-2]):
        op.couple(
            first_factor[..., :1, :].flatten(0, -2)[0], second_factor[..., :, :1].transpose(-1, -2).flatten(0, -2)[0]
        )
        return staying(shape)
    # Channels in the rows of the first factor, or the columns of the second, are rows or columns of the product.
    is_simple = (rows, columns) in (([-2], []), ([], [-1]))
    is_read_by_row = is_own == [True, False] and (rows, columns) == ([-2], [-2])
    if not (is_simple or is_read_by_row) and is_own.count(True) == 1:
        # A parameter keeps its size, so that the channels of the other factor can be removed.
        if is_own[0]:
            op.keep(first_factor)
            rows = []
        else:
            op.keep(second_factor)
            columns = []
    if -2 in rows:
        # All rows are multiplied with the same factor, such as keys and values that heads share, or the inputs of a
        # weight: it is kept. Rows that are heads of several channels are removed as a whole.
        op.keep(second_factor)
        op.couple(first_factor[..., :1], first_factor)
        return first_factor[..., :1].expand(shape)
    if -1 in columns:
        op.keep(first_factor)
        op.couple(second_factor[..., :1, :], second_factor)
        return second_factor[..., :1, :].expand(shape)
    return op.all_kept()


@rule("linear")
def _own_linear(op: Operation) -> Any:
    """Follow functional.linear with a free parameter as weight, (outputs, inputs), with channels in rows or columns."""
    states, weight, *bias = op.ids
    node = None
    if op.module is None:
        node = op.argument(1, "weight")
    if node is None or op.shape is None or weight.dim() != 2:
        return op.all_kept()
    if varies(weight, 0):
        op.keep(states)
        for bias_ids in bias:
            op.couple(weight[:, 0], bias_ids)
        return weight[:, 0].expand(op.shape)
    if any(varies(states, d) for d in range(states.dim() - 1)):
        return op.all_kept()
    for bias_ids in bias:
        op.keep(bias_ids)
    op.channels.couple(states.flatten(0, -2)[0], weight[0])
    op.channels.summed.add(op.node.name)
    return staying(op.shape)


@rule("pack_padded_sequence", "pad_packed_sequence")
def _packed(op: Operation) -> Any:
    """Follow packing or padding of sequences: the channels are in the last dimension before and after."""
    rows, outputs = op.ids[0], given_shapes(op.node)
    is_padded = operation_name(op.node) == "pad_packed_sequence"
    padding = op.argument(3, "padding_value", default=0) if is_padded else 0
    if padding != 0 or any(varies(rows, d) for d in range(rows.dim() - 1)):
        return op.all_kept()
    return rows.flatten(0, -2)[0].expand(outputs[0].shape), *outputs[1:]


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent_on_packed(op: Operation) -> Any:
    """Follow a recurrent layer that reads packed sequences: it may lose input channels, and keeps its units."""
    rows, weights = op.ids[0], op.argument(3, "params")
    if not isinstance(weights, list) or varies(rows, 0):
        return op.all_kept()  # not packed, so no call of PyTorch's own modules
    names = [str(node.target) for node in op.node.args[3]]  # type: ignore[union-attr]
    lowest = [weight for name, weight in zip(names, weights, strict=True) if "weight_ih_l0" in name]
    for ids in op.ids[1:]:
        if not any(ids is weight for weight in lowest):
            op.keep(ids)
    for weight in lowest:
        op.couple(rows[0], weight[0])
    return given_shapes(op.node)


@rule("conv1d", "conv2d", "conv3d")
def _own_convolution(op: Operation) -> Any:
    """Follow a functional depth-wise convolution with a free parameter as weight, (channels, 1, ...)."""
    states, weight, *bias = op.ids
    groups, node = op.argument(6, "groups", default=1), op.node
    groups_argument: Any = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    is_computed = isinstance(groups_argument, (Node, TracedInt))  # it changes with the channels
    if op.shape is None or groups != len(weight) or weight.shape[1] != 1:
        return op.all_kept()
    if not is_computed:
        return op.all_kept(reason=reasons.fixed_channels(node))
    if states.dim() != weight.dim() or _varying(states) != [1] or _varying(weight) != [0]:
        return op.all_kept()
    row = weight.flatten(1)[:, 0]
    if op.shape[1] != len(row) or states.shape[1] != len(row):
        return op.all_kept()
    op.couple(states.transpose(1, -1).flatten(0, -2)[0], row)
    for bias_ids in bias:
        op.couple(bias_ids, row)
    return row.view(-1, *[1] * (len(op.shape) - 2)).expand(op.shape)


def _product_by_head(op: Operation, first_factor: Tensor, second_factor: Tensor) -> Any:
    """Follow matrix products, one for each head: each head is removed as a whole."""
    heads_at = set[int]()
    for factor in (first_factor, second_factor):
        heads_at |= {d - factor.dim() for d in range(factor.dim() - 2) if varies(factor, d)}
    at = heads_at.pop()
    # A factor without channels there is the same for all heads, or belongs to heads that all stay.
    by_head = list[Tensor]()
    if min(first_factor.dim(), second_factor.dim()) >= -at:
        by_head = [factor for factor in (first_factor, second_factor) if varies(factor, at)]
    other_factors = [
        factor for factor in (first_factor, second_factor) if factor.dim() >= -at and not varies(factor, at)
    ]
    if heads_at or not by_head or any(factor.shape[at] > 1 for factor in other_factors):
        return op.all_kept(reason=None if heads_at or not by_head else reasons.heads_stay(op.node))
    firsts = []
    for factor in by_head:
        channels = compress(factor).movedim(at, 0).flatten(1)
        op.couple(channels[:, :1], channels)
        firsts.append(channels[:, 0])
    for first in firsts[1:]:
        op.couple(firsts[0], first)
    if len(by_head) == 1 and varies(first_factor, -2) and varies(second_factor, -1):
        return op.all_kept()
    # If channels are multiplied with channels (attention over channels), the whole product belongs to the head.
    if varies(second_factor, -1) and not varies(first_factor, -2):
        return second_factor[..., :1, :].expand(op.shape or ())
    if varies(first_factor, -2) and not varies(second_factor, -1):
        return first_factor[..., :1].expand(op.shape or ())
    return firsts[0].view(-1, *[1] * (-at - 1)).expand(op.shape or ())


@rule("scaled_dot_product_attention")
def _attention(op: Operation) -> Any:
    """Follow PyTorch's attention function: heads are removed as a whole, with their queries, keys and values."""
    query, key, value = (op.argument(at, name) for at, name in enumerate(("query", "key", "value")))
    mask = op.argument(3, "attn_mask")
    if all(_varying(operand) in ([], [operand.dim() - 1]) for operand in (query, key, value)):
        return op.all_kept(reason=reasons.one_head(op.node))  # with fewer channels it would scale by another number
    heads = []
    if isinstance(mask, Tensor) and mask.dim() > 2 and mask.shape[-3] > 1:
        # A bias per head loses heads with the queries, if its heads can be removed.
        if _varying(mask) != [mask.dim() - 3]:
            return op.all_kept()
        heads.append(compress(mask).movedim(-3, 0).flatten(1))
    weighs_channels = False
    for operand in (query, key, value):
        channel_dims = [d - operand.dim() for d in range(operand.dim() - 1) if varies(operand, d)]
        if channel_dims not in ([-3], [-3, -2]):
            return op.all_kept()
        weighs_channels |= channel_dims == [-3, -2]
        heads.append(compress(operand).movedim(-3, 0).flatten(1))
    # One row for each head of keys: with `enable_gqa` several neighbouring heads of queries share it.
    shared_by = query.shape[-3] // key.shape[-3]
    sets = [ids.reshape(key.shape[-3], -1) for ids in heads]
    for channels in sets:
        op.couple(channels[:, :1], channels)
        op.couple(sets[0][:, 0], channels[:, 0])
    if weighs_channels:
        return heads[0][:, 0].view(-1, 1, 1).expand(op.shape or ())
    return value[..., :1, :].repeat_interleave(shared_by, -3).expand(op.shape or ())


@rule("einsum", "tensordot", "inner", "outer")
def _einstein_sum(op: Operation) -> Any:
    """Follow channels by the letters of their dimensions, as in ``"bqc,bkc->bqk"``; heads are removed as a whole.

    Channels of one letter are coupled, and go to the output's dimension of that letter, or are summed over. A free
    parameter that mixes places, such as a graph's adjacency matrix in ``"nm,bmc->bnc"``, keeps its size.
    """
    read = letters_of(op.node, [tuple(ids.shape) for ids in op.ids])
    if read is None or op.shape is None or len(read[1]) != len(op.shape):
        return op.all_kept()
    operands, output = read
    entering_ids = list(op.ids)

    def letters_of_channels(at: int) -> set[str]:
        return {letter for d, letter in enumerate(operands[at]) if varies(entering_ids[at], d)}

    def keep_operand(at: int) -> None:
        op.keep(entering_ids[at])
        entering_ids[at] = staying(tuple(entering_ids[at].shape))

    # Channels in two dimensions, one in the output and one summed over, belong to heads: couple those of each head.
    summed = set[str]()
    for at, letters in enumerate(operands):
        inner = letters_of_channels(at) - set(output)
        if inner and inner < letters_of_channels(at):
            first = entering_ids[at]
            for letter in inner:
                first = first.narrow(letters.index(letter), 0, 1)
            op.couple(first, entering_ids[at])
            entering_ids[at] = first.expand(entering_ids[at].shape)
            summed |= inner
    # An operand with channels only in a summed dimension of heads, such as relative positions, is kept: heads share it.
    for at in range(len(operands)):
        if letters_of_channels(at) & summed:
            keep_operand(at)
    # So is a free parameter that mixes places: none of its letters is a letter of another operand's channels.
    is_own = [_is_own(ids, op.channels) for ids in entering_ids]
    of_channels = set[str]().union(
        *(letters_of_channels(at) for at, is_parameter in enumerate(is_own) if not is_parameter)
    )
    for at, letters in enumerate(operands):
        if is_own[at] and of_channels and not of_channels & set(letters):
            keep_operand(at)
    # An operand with one channel per head (attention weights) is coupled with an operand that holds the head's channels
    # (values), as in "bhij,bhjd->bhid", and needs no more checks: the head is removed as a whole.
    remaining_operands = list[int]()
    for at, letters in enumerate(operands):
        head_letters = letters_of_channels(at)
        wider = [wide for wide in range(len(operands)) if head_letters < letters_of_channels(wide) <= set(output)]
        if len(head_letters) != 1 or not wider:
            remaining_operands.append(at)
            continue
        (letter,) = head_letters
        shares = compress(entering_ids[at]).movedim(letters.index(letter), 0).flatten(1)
        for wide in wider:
            channels = compress(entering_ids[wide]).movedim(operands[wide].index(letter), 0).flatten(1)
            op.couple(channels[:, :1], channels)
            op.couple(shares[:, 0], channels[:, 0])
    operands, entering_ids = (
        [operands[at] for at in remaining_operands],
        [entering_ids[at] for at in remaining_operands],
    )
    # Operands' ids, by the letters of their channel dimensions: in the output's order, summed letters last.
    coupled: dict[str, list[Tensor]] = {}
    holding: list[str] = []
    for letters, ids in zip(operands, entering_ids, strict=True):
        channel_letters = [letter for d, letter in enumerate(letters) if varies(ids, d)]
        ordered_letters = "".join(
            sorted(channel_letters, key=lambda letter: (output.find(letter) % (len(output) + 1), letter))
        )
        holding.append(ordered_letters)
        if ordered_letters:
            # Along the other dimensions ids don't differ.
            entries = ids[tuple(slice(None) if letter in ordered_letters else 0 for letter in letters)]
            coupled.setdefault(ordered_letters, []).append(
                entries.permute([channel_letters.index(letter) for letter in ordered_letters])
            )
    output_ids = staying(op.shape)
    is_placed = False
    for ordered_letters, entering in coupled.items():
        for letters, ids, operand_letters in zip(operands, entering_ids, holding, strict=True):
            has_letter = any(letter in ordered_letters and ids.shape[d] > 1 for d, letter in enumerate(letters))
            if has_letter and operand_letters != ordered_letters:
                return op.all_kept()  # another operand has this dimension without channels, so it can't become smaller
        in_output = [letter for letter in ordered_letters if letter in output]
        if in_output and (is_placed or len(in_output) < len(ordered_letters)):
            return op.all_kept()
        if in_output:
            is_placed = True
            sizes = dict(zip(ordered_letters, entering[0].shape, strict=True))
            output_ids = entering[0].reshape([sizes.get(letter, 1) for letter in output]).expand(op.shape)
        elif len(entering) == 1:
            # The other operands keep their entries for removed channels, so removed channels must arrive as zeros.
            op.channels.summed.add(op.node.name)
    for entering in coupled.values():
        for later_ids in entering[1:]:
            op.couple(entering[0], later_ids)
    return output_ids


def _is_own(ids: Tensor, channels: ChannelIds) -> bool:
    """Tell whether all channels of a tensor belong to free parameters."""
    channel_ids = np.unique(compress(ids))
    channel_ids = channel_ids[channel_ids != FIXED]
    parameters = channels.free_parameters.values()
    is_of_parameter = [np.isin(channel_ids, parameter.ids) for parameter in parameters]
    return bool(channel_ids.size and is_of_parameter and np.any(is_of_parameter, axis=0).all())


def letters_of(node: Node, shapes: list[tuple[int, ...]]) -> tuple[list[str], str] | None:
    """Return a letter for each dimension of each operand of a product, and of its output; None if it isn't supported.

    ``shapes``: of the operands.
    """
    if operation_name(node) == "einsum":
        equation = node.args[0] if node.args else None
        if isinstance(equation, str):
            return _letters_of_equation(equation, shapes)
        return None
    if len(shapes) != 2:
        return None
    first_letters, second_letters = (
        string.ascii_letters[26 * at : 26 * at + len(shape)] for at, shape in enumerate(shapes)
    )
    summed: Any = {"inner": ([-1], [-1]), "outer": ([], [])}.get(operation_name(node))
    if summed is None:
        summed = _argument(node.args, node.kwargs, 2, ("dims",), 2)
    if isinstance(summed, int):  # the last dimensions of one with the first of the other
        summed = [*range(-summed, 0)], [*range(summed)]
    if not isinstance(summed, (tuple, list)):
        return None
    for first, second in zip(*summed, strict=True):
        second_letters = second_letters.replace(second_letters[second], first_letters[first])
    return [first_letters, second_letters], "".join(
        letter for letter in first_letters + second_letters if (first_letters + second_letters).count(letter) == 1
    )


def _letters_of_equation(equation: str, shapes: list[tuple[int, ...]]) -> tuple[list[str], str] | None:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if len(operands) != len(shapes):
        return None
    # Dots stand for the dimensions without a letter, aligned at the last. Here each of them gets a digit.
    digits, longest = "0123456789", ""
    for at, (letters, shape) in enumerate(zip(operands, shapes, strict=True)):
        missing = len(shape) - len(letters.replace("...", ""))
        dots = digits[len(digits) - missing :] if 0 < missing <= len(digits) else ""
        operands[at] = letters.replace("...", dots)
        if len(set(operands[at])) != len(operands[at]) or len(operands[at]) != len(shape):
            return None
        longest = max(longest, dots, key=len)
    if not arrow:
        # Without an arrow PyTorch's output has the dimensions of the dots, then the letters that appear once, sorted.
        once = [letter for letter in sorted(set(inputs) - set(".,")) if inputs.count(letter) == 1]
        output = "..." * ("..." in inputs) + "".join(once)
    return operands, output.replace("...", longest)


# Windows.


@rule("unfold", nn.Unfold)
def _unfolded(op: Operation) -> Any:
    """Follow unfold: each channel becomes one row for each place in a window."""
    ids = op.ids[0]
    if op.node.op == "call_method" or op.node.target is Tensor.unfold:
        # The method cuts one dimension into windows, and puts their entries into a new last dimension.
        along = op.argument(1, "dimension")
        if not isinstance(along, int) or varies(ids, along % ids.dim()):
            return op.all_kept()
        return op.run_on_ids()
    at = ids.dim() - 3
    if op.shape is None or any(varies(ids, d) for d in range(ids.dim()) if d != at):
        return op.all_kept()
    row = ids.select(-1, 0).select(-1, 0).reshape(-1, ids.shape[at])[0]
    return row.repeat_interleave(op.shape[-2] // len(row)).unsqueeze(-1).expand(op.shape)


@rule("fold", nn.Fold)
def _folded(op: Operation) -> Any:
    """Follow fold, which adds windows up to images: the rows of one channel, one for each place, are coupled."""
    ids = op.ids[0]
    at = ids.dim() - 2
    if op.shape is None or any(varies(ids, d) for d in range(ids.dim()) if d != at):
        return op.all_kept()
    rows = ids.select(-1, 0).reshape(-1, ids.shape[at])[0].view(op.shape[-3], -1)
    op.couple(rows[:, :1], rows)
    return rows[:, 0].view(-1, 1, 1).expand(op.shape)


@rule("grid_sample")
def _sampled(op: Operation) -> Any:
    """Follow sampling at the points of a grid: the grid is kept, and each channel of the images is sampled alike.

    If the first dimension of both holds heads, as in deformable attention, each head is removed as a whole.
    """
    images, grid = op.ids[0], op.ids[1] if len(op.ids) > 1 else None
    if grid is None or op.shape is None or any(varies(images, d) for d in range(2, images.dim())):
        return op.all_kept()
    firsts = images.flatten(2)[:, :, :1]
    if not varies(grid, 0):
        op.keep(grid)
        return firsts.view(*firsts.shape[:2], *[1] * (len(op.shape) - 2)).expand(op.shape)
    if not varies(images, 0):
        return op.all_kept()  # all heads read the same images
    heads = firsts.flatten(1)[:, :1]
    op.couple(heads, firsts.flatten(1))
    op.couple(heads, grid.flatten(1))
    return heads.view(-1, *[1] * (len(op.shape) - 1)).expand(op.shape)


# Operators that users register.

_USER_RULES = ("follow", "couple", "keep")
_DIM = Rule("an integer from -8 to 7", lambda value: type(value) is int and -8 <= value < 8)
_WRAPPED: set[Any] = set()  # registered functions, and the wrappers that forwards call instead


@checked(
    operator=Rule("a function or its name", lambda value: callable(value) or (isinstance(value, str) and bool(value))),
    rule=Rule(
        f"one of {', '.join(map(repr, _USER_RULES))} or a function",
        lambda value: callable(value) or (isinstance(value, str) and value in _USER_RULES),
    ),
    dim=_DIM,
)
def register_operator(
    operator: Callable[..., Any] | str,
    rule: str | Callable[[Operation], Tensor] = "follow",
    *,
    dim: int = 1,
) -> Any:
    """Say what an operator does with channels, if the package has no rule for it.

    Parameters
    ----------
    operator : callable or str
        A function of PyTorch's or its name, an operator of ``torch.library``, a Python function of your own, or the
        ``apply`` of a ``torch.autograd.Function``.
    rule : {"follow", "couple", "keep"} or callable, default="follow"
        What the operator does with channels:

        - "follow": channel i of the output is computed from channel i of the first tensor. The channels of all other
          tensors are kept.
        - "couple": channel i of the output is computed from the channels i of all tensors, which are pruned together.
        - "keep": all channels that enter are kept.
        - A function gets the call, a `nni_topo.network.Operation`, in which tensors of channel ids replace the values.
          It returns the channel ids of the output: an int64 tensor of the output's shape.
    dim : int, default=1
        The dimension that holds the channels, from -8 to 7; -1 is the last. For "follow" and "couple" only.

    Returns
    -------
    callable or str
        What the forward has to call: for a Python function of your own a wrapper, which is followed as one operation
        (tracing would enter the original function); otherwise ``operator`` itself.

    Raises
    ------
    ConfigError
        If the operator has a rule already, is a class, or is a name that PyTorch doesn't have; if ``dim`` is out of
        range, or is given with a rule that doesn't use it; if a rule that is a function doesn't take one argument.
        Later, when a model is traced: if that function raises, or returns anything but channel ids of the output's
        shape.

    See Also
    --------
    register_module : The same for a module with parameters that lose channels.

    Notes
    -----
    `dependency_groups` checks a rule by removing random channels. Channels for which the rule is wrong are kept, and
    ``skipped`` says why.

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
    _check_operator(operator, rule, dim)
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
            output_ids = rule(op)
        except Exception as error:  # a user's function may raise anything
            raise ConfigError(
                f"rule must return channel ids for every call of its operator, got {raised(error)} ({name})"
            ) from error
        are_ids = (
            isinstance(output_ids, Tensor) and output_ids.dtype == torch.int64 and tuple(output_ids.shape) == op.shape
        )
        if op.shape is not None and not are_ids:
            description = (
                f"{output_ids.dtype} of shape {tuple(output_ids.shape)}"
                if isinstance(output_ids, Tensor)
                else shown(output_ids)
            )
            raise ConfigError(
                f"rule must return channel ids, int64, of the output's shape {op.shape}, got {description} ({name})"
            )
        return output_ids

    _TABLE[key] = OperatorRule(apply, is_registered=True)
    if seen is not operator:
        _WRAPPED.update((operator, seen))
    return seen


def _check_operator(operator: Callable[..., Any] | str, rule: str | Callable[[Operation], Tensor], dim: int) -> None:
    """Raise ConfigError for arguments that can't work with any model."""
    if isinstance(operator, type):
        raise ConfigError(
            "operator must be the function that a forward calls (of a torch.autograd.Function its apply; modules are "
            f"registered by register_module), got the class {operator.__name__} (register_operator)"
        )
    if isinstance(operator, str):
        names = {function.__name__.strip("_") for function in get_testing_overrides() if hasattr(function, "__name__")}
        for space in (torch, Tensor, torch.nn.functional, operator_module):
            names.update(name.strip("_") for name in dir(space))
        if operator.strip("_") not in names:
            raise ConfigError(
                "operator must be a function, or the name of a function or method of PyTorch's, "
                f"got {operator!r} (register_operator); {hint_of(operator, names)}"
            )
    if dim != 1 and (rule == "keep" or callable(rule)):
        kind = "a function" if callable(rule) else "'keep'"
        raise ConfigError(
            f"dim must be given with the rule 'follow' or 'couple' only, got {dim} with {kind} (register_operator)"
        )
    if callable(rule):
        try:
            inspect.signature(rule).bind(None)
        except TypeError as error:
            raise ConfigError(
                "a rule that is a function must take one argument, the call of the operator, "
                f"got {shown(rule)} (register_operator)"
            ) from error
        except ValueError:  # a function whose parameters aren't known
            pass


def _key_of(operator: Callable[..., Any] | str) -> tuple[Any, Any]:
    """Return the key of an operator in the table, and the function that a forward has to call for it to be followed."""
    if isinstance(operator, str):
        return operator.strip("_"), operator
    library = getattr(operator, "_opoverload", operator)  # here `torch.library.custom_op` keeps its operator
    if isinstance(library, torch._ops.OpOverload):
        return library.overloadpacket, operator
    if isinstance(library, torch._ops.OpOverloadPacket):
        return library, operator
    if resolve_name(operator) is not None:
        # PyTorch's functions and methods have one key, their name, however they are called.
        return operator.__name__.strip("_").removeprefix("special_"), operator

    @functools.wraps(operator)
    def seen(*args: Any, **kwargs: Any) -> Any:
        arguments = (*args, *kwargs.values())
        if has_torch_function(arguments):
            return handle_torch_function(seen, arguments, *args, **kwargs)
        return operator(*args, **kwargs)

    # A graph calls a function by its module and name, which the apply of a torch.autograd.Function lacks.
    owner = getattr(operator, "__self__", None)
    seen.__module__ = operator.__module__ or getattr(owner, "__module__", None) or __name__
    if isinstance(owner, type):
        seen.__name__ = seen.__qualname__ = f"{owner.__name__}_{operator.__name__}"
    return seen, seen


def _followed(op: Operation, dim: int, *, is_coupled: bool) -> Any:
    """Leave the first tensor's channels of a dimension where they are; couple or keep the other tensors' channels."""
    op.channels.guessed.add(op.node.name)  # the dry run checks whether a result depends on other channels
    outputs, misfit = given_shapes(op.node), reasons.rule_misfits(op.node)

    def count(ids: Tensor) -> int:
        if -ids.dim() <= dim < ids.dim():
            return ids.shape[dim]
        return 0

    channels = count(op.ids[0])
    if channels == 0 or any(count(leaf) != channels for leaf in tensors_of(outputs)):
        return op.all_kept(reason=misfit)
    followed = []
    for ids in op.ids:
        if ids is not op.ids[0] and not (is_coupled and count(ids) == channels):
            op.keep(ids)
            continue
        if any(varies(ids, d) for d in range(ids.dim()) if d != dim % ids.dim()):
            return op.all_kept(reason=misfit)
        # One id per channel: along the other dimensions they don't differ.
        followed.append(ids.movedim(dim, 0).reshape(channels, -1)[:, 0])
    for ids in followed[1:]:
        op.couple(followed[0], ids)

    def placed(leaf: Tensor) -> Tensor:
        view = [1] * leaf.dim()
        view[dim] = channels
        return followed[0].view(view).expand(leaf.shape)

    return tree_map_only(Tensor, placed, outputs)
