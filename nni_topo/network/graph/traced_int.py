"""Integers that know where they come from, while a model is recorded.

A size that a forward reads from a tensor becomes a node of the graph, and so does a number computed from such sizes:
the graph also works with other sizes. A size that an attribute of a module holds, such as ``self.width``, must change
if channels are removed: the graph holds its `Place`, so that the dense model's attribute can be changed, see
`attribute_channels`.
"""

from __future__ import annotations

import operator
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partialmethod
from types import CodeType, FrameType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from nni_topo.network.graph.nodes import leaves_of, plain_name, tensor_shape
from nni_topo.network.layers.integer_attributes import Place, layer_widths, numbers_in, numbers_read, with_numbers


class Hashed(BaseException):
    """A traced integer was hashed near cached functions; no forward's ``except Exception`` catches it."""


class Notes:
    """What is noted of traced integers while a model is recorded.

    ``replace_caches`` replaces cached functions that code in a frame may call, and tells whether there were any.
    ``settled``: code whose cached functions are replaced.
    """

    def __init__(self, replace_caches: Callable[[FrameType], bool], settled: set[CodeType]) -> None:
        self.numbers = list[TracedInt]()  # all that were made
        self.hashes = 0
        self.is_running = False  # whether the model runs
        self.spaces = list[dict[str, Any]]()  # global names of the code that hashed numbers
        self._replace_caches, self._settled = replace_caches, settled
        self._is_stale = False  # whether the run used a cached function that is replaced now

    @contextmanager
    def running(self) -> Iterator[None]:
        """Note what is hashed within the block; `Hashed` if it was by a cached function that is replaced now."""
        self.is_running = True
        try:
            yield
        finally:
            self.is_running = False
            if self._is_stale:  # even if the forward has caught the exception
                raise Hashed

    def note_hash(self, frame: FrameType) -> None:
        """Note that code in a frame hashes a number; `Hashed` if a cached function was replaced for that."""
        self.hashes += 1
        while frame.f_code.co_name == "__hash__" and frame.f_back is not None:  # of an object that holds the number
            frame = frame.f_back
        if frame.f_code in self._settled:
            return
        self._settled.add(frame.f_code)
        self.spaces.append(frame.f_globals)
        if self._replace_caches(frame):
            self._is_stale = True
            raise Hashed

    def sizes(self) -> list[TracedInt]:
        """Return the numbers that belong to no attribute, and note them no longer."""
        sizes = [number for number in self.numbers if number.place is None and not number.factors]
        self.numbers = [number for number in self.numbers if number.place is not None or number.factors]
        return sizes


NOTES: ContextVar[Notes | None] = ContextVar("notes", default=None)
Check = tuple[Callable[..., int], Any, Any]
"""A comparison or a remainder, and its two operands."""


class UnclearPlaces(set[Place]):
    """Places of attributes from which the forward computes something that the graph doesn't show.

    ``computed``: numbers that were computed from attributes alone. ``divided``: pairs of places from whose quotient
    something is computed that the graph doesn't show. ``write_check``: adds a check to the graph that is recorded;
    returns False if the graph can't hold it.
    """

    def __init__(self, places: Iterable[Place] = ()) -> None:
        super().__init__(places)
        self.computed: list[TracedInt] = []
        self.divided = set[tuple[Place, ...]]()
        self.write_check: Callable[[Check], bool] | None = None

    def note_unwritten(self) -> None:
        """Note the places of computed numbers that the graph doesn't hold, because their use isn't known."""
        for number in self.computed:
            if not number.written:
                number.note_other_use()
        self.computed.clear()

    def note_divided(self, graph: Graph) -> None:
        """Note both places of a quotient if the graph doesn't show its use, or if one of them is noted already."""
        shown = set[tuple[Place, ...]]()
        for node in graph.nodes:
            sizes = [] if node.target in CHECKS else attribute_sizes_in((node.args, node.kwargs))
            shown.update(tuple(size.places) for size in sizes if size.per is not None)
        before = -1
        while before != len(self):
            before = len(self)
            for pair in shown | self.divided:
                if pair not in shown or not self.isdisjoint(pair):
                    self.update(pair)
        self.divided.clear()


class UnshownSizes(list["TracedInt"]):
    """Sizes of tensors from which the forward computed numbers that the graph doesn't show.

    ``compared``: checks that compare a size, not the number of samples, with a number by ``<`` or ``>``. With inputs of
    another size the forward may take another branch. ``of_samples``: checks that compare the number of samples, or what
    is computed from it, with a number. ``write_check``: as in `UnclearPlaces`. ``parameter_ids``: ids of the
    model's parameters and buffers, whose first dimension holds no samples.
    """

    def __init__(self, write_check: Callable[[Check], bool], parameter_ids: Collection[int]) -> None:
        super().__init__()
        self.compared: list[Check] = []
        self.of_samples: list[Check] = []
        self.write_check, self.parameter_ids = write_check, parameter_ids


class TracedInt(int):
    """An integer that knows where it comes from: an attribute of a module, or sizes of tensors."""

    # For a number that an attribute holds, or an equal part of it:
    place: Place | None = None
    parts: int = 1
    per: TracedInt | None = None  # the number of the parts, if another attribute holds it
    unclear: UnclearPlaces  # collects places with uses that the graph doesn't show
    # For sizes of tensors: a tensor and a dimension, or a function and its arguments.
    source: tuple[Any, ...] | None = None
    unshown: UnshownSizes | None = None  # collects sizes with uses that the graph doesn't show
    # For a number computed from numbers that attributes hold, and from no sizes of tensors: these numbers.
    factors: tuple[TracedInt, ...] = ()
    written: bool = False  # whether a graph holds or computes it
    __array_priority__ = 1.0  # a numpy integer leaves a sum or product with this number to this class

    def __new__(cls, value: int) -> TracedInt:
        """Make a traced integer, which the recording notes."""
        number = super().__new__(cls, value)
        notes = NOTES.get()
        if notes is not None:
            notes.numbers.append(number)
        return number

    @classmethod
    def of_tensor(cls, size: int, tensor: Tensor, dim: int, unshown: UnshownSizes | None = None) -> TracedInt:
        """Return the size of a tensor along a dimension; ``unshown`` notes it if a plain number is made of it."""
        number = cls(size)
        number.source, number.unshown = (tensor, dim), unshown
        return number

    @classmethod
    def of_attribute(
        cls, value: int, place: Place, parts: int, unclear: UnclearPlaces, per: TracedInt | None = None
    ) -> TracedInt:
        """Return ``value``, an attribute's number over ``parts``; ``per``: ``parts``, if an attribute holds it."""
        number = cls(value)
        number.place, number.parts, number.unclear, number.per = place, parts, unclear, per
        return number

    @property
    def places(self) -> list[Place]:
        """The place of the number, then the place of the number of parts, as far as attributes hold them."""
        places = [] if self.place is None else [self.place]
        if self.per is None:
            return places
        return places + self.per.places

    def copied(self) -> TracedInt:
        """Return the same number of an attribute for a graph; the recording doesn't note it."""
        number = super().__new__(TracedInt, plain(self))
        vars(number).update(vars(self))
        if self.per is not None:
            number.per = self.per.copied()
        return number

    def within(self, name: str) -> TracedInt:
        """Return the same number for a model that contains this one under a name."""
        if self.place is None:
            return self
        inner, key, path = self.place
        per = None if self.per is None else self.per.within(name)
        place = f"{name}.{inner}".strip("."), key, path
        return TracedInt.of_attribute(plain(self), place, self.parts, self.unclear, per)

    def note_other_use(self) -> None:
        """Note that the forward computes something from an attribute's number that the graph doesn't show."""
        if self.per is not None:
            self.unclear.divided.add(tuple(self.places))
        elif self.place is not None:
            self.unclear.add(self.place)
        for factor in self.factors:
            factor.note_other_use()

    def note_number(self) -> None:
        """Note that a number computed from a size, such as the root of a width, is a constant of the graph."""
        self.note_other_use()
        if self.unshown is not None:
            self.unshown.append(self)

    def __int__(self) -> int:
        """Return a plain integer, which doesn't know where it comes from."""
        if self.unshown is not None:
            self.unshown.append(self)
        return plain(self)

    def __float__(self) -> float:
        """Return a float, as `math.sqrt` needs it, which doesn't know where it comes from."""
        self.note_number()
        return float(plain(self))

    def __hash__(self) -> int:
        """Return the hash of the plain integer, as keys of dicts need it."""
        notes = NOTES.get()
        if notes is not None and notes.is_running:
            notes.note_hash(sys._getframe(1))
        return int.__hash__(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy without tensors: the size of a tensor becomes a plain integer."""
        if self.place is None:
            return int, (plain(self),)
        return TracedInt.of_attribute, (plain(self), self.place, self.parts, self.unclear, self.per)


def plain(number: int) -> int:
    """Return a plain integer, without the note that `int` would make."""
    return int.__add__(number, 0)


def _note_other_uses(operands: Iterable[Any]) -> None:
    for operand in operands:
        if isinstance(operand, TracedInt):
            operand.note_other_use()


def _arithmetic(function: Callable[..., int], first: Any, second: Any) -> Any:
    """Compute with two numbers; at least one is traced."""
    if isinstance(first, np.integer):
        first = first.item()
    if isinstance(second, np.integer):
        second = second.item()
    traced = [operand for operand in (first, second) if isinstance(operand, TracedInt)]
    if not (isinstance(first, int) and isinstance(second, int)):
        for operand in traced:
            operand.note_number()
        return NotImplemented
    value = function(plain(first), plain(second))
    if function is operator.mul and len(traced) == 1 and plain(traced[0]) == value != 0:
        return traced[0]  # one times a number, as a product starts, computes nothing
    if function is operator.floordiv and isinstance(first, TracedInt) and first.place is not None:
        # An equal part of an attribute's number still belongs to the attribute.
        is_known = type(second) is int or (isinstance(second, TracedInt) and second.source is None)
        if is_known and plain(second) > 0 and value * plain(second) == plain(first):
            # Another attribute holds the number of parts: channels per head, as in ``self.width // self.heads``.
            if isinstance(second, TracedInt) and second.place is not None and first.parts == second.parts == 1:
                quotient = TracedInt.of_attribute(value, first.place, plain(second), first.unclear, second)
                first.unclear.computed.append(quotient)
                return quotient
            _note_other_uses((second, first.per))
            return TracedInt.of_attribute(value, first.place, first.parts * plain(second), first.unclear)
    # The graph computes it again, from the current sizes of tensors and values of attributes.
    number = TracedInt(value)
    number.source = function, (first, second)
    if all(operand.place is not None or operand.factors for operand in traced):
        # For example heads times channels per head, which is their width, or three times that width.
        for operand in traced:
            number.factors += operand.factors or (operand,)
        number.factors[0].unclear.computed.append(number)
    for operand in traced:
        if operand.unshown is not None:
            number.unshown = operand.unshown
    return number


def _compute_noting(name: str, *operands: Any) -> Any:
    """Compute an operation that the graph doesn't show, such as a comparison that decides on a branch, and note it."""
    value = getattr(int, name)(*operands)
    if not _is_checked(name, operands):
        _note_other_uses(operands)
    for operand in operands:
        if not isinstance(operand, TracedInt):
            continue
        if name in _TO_FLOATS:
            operand.note_number()
    size, *further_operands = operands
    if size.unshown is not None:
        for number in further_operands:
            if not isinstance(number, int) or (isinstance(number, TracedInt) and number.place is None):
                continue
            if name in _ORDERS and _is_behind_the_samples(size):
                size.unshown.compared.append((_CHECKING[name], plain(size), plain(number)))
            elif name in _CHECKING and name != "__rmod__" and _is_of_samples(size, size.unshown.parameter_ids):
                size.unshown.of_samples.append((_CHECKING[name], plain(size), plain(number)))
    return value


def _is_checked(name: str, operands: tuple[Any, ...]) -> bool:
    """Tell whether the recorded graph holds an operation as a check, which must give the same for fewer channels.

    It does if an operand is a size of a tensor, or if both belong to attributes.
    """
    function = _CHECKING.get(name)
    if function is None or not isinstance(operands[1], (int, float)):
        return False
    first, second = reversed(operands) if name == "__rmod__" else operands
    traced = [number for number in operands if isinstance(number, TracedInt)]
    for number in traced:
        if number.unshown is not None:
            return number.unshown.write_check((function, first, second))
    if len(traced) < 2:
        return False
    for number in traced:
        for factor in number.factors or (number,):
            if factor.place is not None and factor.unclear.write_check is not None:
                return factor.unclear.write_check((function, first, second))
    return False


def _is_behind_the_samples(size: TracedInt) -> bool:
    """Tell whether a size is the size of a tensor's dimension after the first, or computed from such a size."""
    origin, dim_or_operands = size.source or (None, ())
    if isinstance(origin, Tensor):
        return bool(dim_or_operands % max(origin.dim(), 1))
    return any(isinstance(operand, TracedInt) and _is_behind_the_samples(operand) for operand in dim_or_operands)


def _is_of_samples(size: TracedInt, parameter_ids: Collection[int]) -> bool:
    """Tell whether a size is the number of samples, or computed from that and from numbers that don't change."""
    origin, dim_or_operands = size.source or (None, ())
    if isinstance(origin, Tensor):
        return not dim_or_operands % max(origin.dim(), 1) and id(origin) not in parameter_ids
    sizes = [operand for operand in dim_or_operands if isinstance(operand, TracedInt) and operand.unshown is not None]
    return bool(sizes) and all(_is_of_samples(operand, parameter_ids) for operand in sizes)


ON_NUMBERS = (operator.mul, operator.add, operator.sub, operator.floordiv)
_ORDERS = ("__lt__", "__le__", "__gt__", "__ge__")
_TO_FLOATS = ("__truediv__", "__rtruediv__", "__pow__", "__rpow__")
_NOTED = (*_ORDERS, *_TO_FLOATS, "__eq__", "__ne__", "__neg__", "__mod__", "__rmod__", "__divmod__", "__rdivmod__")
_CHECKING: dict[str, Callable[..., int]] = {
    **{name: getattr(operator, name) for name in (*_ORDERS, "__eq__", "__ne__", "__mod__")}, "__rmod__": operator.mod
}  # fmt: skip
CHECKS = frozenset(_CHECKING.values())
for _function in ON_NUMBERS:
    _name = _function.__name__
    setattr(
        TracedInt, f"__{_name}__", partialmethod(lambda first, second, of: _arithmetic(of, first, second), of=_function)
    )
    setattr(
        TracedInt,
        f"__r{_name}__",
        partialmethod(lambda first, second, of: _arithmetic(of, second, first), of=_function),
    )
for _name in _NOTED:
    setattr(TracedInt, _name, lambda *operands, of=_name: _compute_noting(of, *operands))


@contextmanager
def attributes_traced(model: nn.Module) -> Iterator[UnclearPlaces]:
    """Turn integers in attributes into `TracedInt` within the block; yield the places with uses that no graph shows."""
    before, unclear = [], UnclearPlaces()
    for module, name, key, value in (*numbers_read(model), *layer_widths(model)):
        if _copies_by_own_rule(module):
            continue  # a copy would get its old numbers back
        owner, _, last = key.rpartition(".")
        holder = getattr(module, owner) if owner else module
        before.append((holder, last, module, name, key, value))
    try:
        for holder, last, _, name, key, value in before:
            traced = {}
            for path, number in (numbers_in(value) or {}).items():
                if number > 1:
                    traced[path] = TracedInt.of_attribute(number, (name, key, path), 1, unclear)
            vars(holder)[last] = with_numbers(value, traced)
        yield unclear
    finally:
        for holder, last, _, _, _, value in before:
            vars(holder)[last] = value


def _copies_by_own_rule(module: nn.Module) -> bool:
    """Tell whether copies and files of a module are made from other values than its attributes, as einops' layers."""
    return any("__getstate__" in vars(kind) for kind in type(module).__mro__ if kind not in (object, nn.Module))


def is_computed_of_attributes(size: Any) -> bool:
    """Tell whether a node computes a number from attributes alone, without sizes of tensors."""
    if not isinstance(size, Node) or size.target not in ON_NUMBERS:
        return False
    return all(isinstance(operand, int) or is_computed_of_attributes(operand) for operand in size.args)


def fold_numbers(graph: Graph, following: Collection[Place]) -> None:
    """Replace nodes that compute a constant by its value; numbers from places in ``following`` aren't constant."""
    for node in list(graph.nodes):
        operands: Any = node.args
        if node.target not in ON_NUMBERS or not all(isinstance(operand, int) for operand in operands):
            continue
        if any(isinstance(operand, TracedInt) and operand.place in following for operand in operands):
            continue
        number = node.target(*map(plain, operands))

        def folded(leaf: Any, node: Node = node, number: int = number) -> Any:
            if leaf is node:
                return number
            return leaf

        for user in list(node.users):
            user.args = map_aggregate(user.args, folded)
            user.kwargs = map_aggregate(user.kwargs, folded)
        graph.erase_node(node)


def forget_places(graph: Graph, places: set[Place]) -> None:
    """Replace integers from some places by plain integers in a graph."""
    place_set = set(places)  # comparing traced integers may add to ``places``

    def leaf_of(leaf: Any) -> Any:
        if isinstance(leaf, TracedInt) and place_set & set(leaf.places):
            return plain(leaf)
        return leaf

    for node in graph.nodes:
        if attribute_sizes_in((node.args, node.kwargs)):
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), leaf_of)


def attribute_sizes_in(arguments: Any) -> list[TracedInt]:
    """List the numbers in a node's arguments that attributes hold."""
    return [leaf for leaf in leaves_of(arguments) if isinstance(leaf, TracedInt)]


def attribute_channels(
    graph: Graph, ids: dict[str, Any], groups: np.ndarray
) -> dict[Place, list[tuple[int, np.ndarray]]]:
    """Return which channels attributes count: by place, for each use, the number of parts and the channels' ids.

    Attributes with a use that isn't understood are left out. ``ids``: by node; ``groups``: group ids, by channel id.
    """
    uses_by_place: dict[Place, list[tuple[int, np.ndarray]]] = defaultdict(list)
    unclear, quotients = set[Place](), dict[tuple[Place, Place], int]()
    equal = list[tuple[Place, Place]]()
    for node in graph.nodes:
        if node.target in CHECKS and not isinstance(ids.get(node.name), Tensor):
            for place, parts, row in _found_equal(node, ids):
                uses_by_place[place].append((parts, row))
            first, second = node.args
            are_held = all(
                isinstance(number, TracedInt) and number.place and number.parts == 1 for number in (first, second)
            )
            if are_held and node.target in (operator.eq, operator.ne) and plain(first) == plain(second):
                equal.append((first.place, second.place))
            continue  # the dry run compares its result
        if node.target in ON_NUMBERS and not isinstance(ids.get(node.name), Tensor):
            continue  # numbers computed from sizes are checked where they are used
        if plain_name(node) not in _SIZED:
            for parent in node.all_input_nodes:
                for size in _computed_of(parent):
                    unclear.update(size.places)
        sizes = attribute_sizes_in((node.args, node.kwargs))
        if not sizes:
            continue
        uses = list(_uses(node, ids, groups))
        # Each number has to be understood by itself.
        understood = {id(size) for size, channels in uses if channels is not None}
        for size in sizes:
            if id(size) not in understood:
                unclear.update(size.places)
        for size, channels in uses:
            if channels is None or size.place is None:
                continue
            if size.per is not None and size.per.place is not None and not len(channels):
                quotients[size.place, size.per.place] = plain(size)
            elif len(channels):
                uses_by_place[size.place].append((size.parts, channels))
                if size.per is not None:
                    unclear.update(size.per.places)
    even = {}
    for place, uses_of_place in uses_by_place.items():
        widths = {(parts, len(channels)) for parts, channels in uses_of_place}
        if len(widths) == 1 and place not in unclear:
            even[place] = uses_of_place
    for pair in equal * len(equal):  # each equals the others of a chain
        if unclear.isdisjoint(pair):
            common = [use for place in pair for use in even.get(place, ())]
            if len({(parts, len(row)) for parts, row in common}) == 1:
                even |= dict.fromkeys(pair, common)
    return _with_quotients(even, unclear, quotients, groups)


def _found_equal(node: Node, ids: dict[str, Any]) -> Iterator[tuple[Place, int, np.ndarray]]:
    """Yield attributes that a forward found equal to a number of channels: place, parts, and the channels' ids."""
    if node.target in (operator.eq, operator.ne):
        for size, number in (node.args, node.args[::-1]):
            if isinstance(number, TracedInt) and number.place is not None and number.per is None:
                channels = counted_by(size, ids)
                if channels is not None and len(channels) == plain(number):
                    yield number.place, number.parts, channels


def counted_by(size: Any, ids: dict[str, Any]) -> np.ndarray | None:
    """Return the ids of the channels that a size of a tensor counts; None if a number in the graph is anything else."""
    if not isinstance(size, Node) or size.target != "size" or len(size.args) != 2:
        return None
    tensor, dim = size.args
    channels = _ids_in(ids.get(tensor.name), dim) if isinstance(tensor, Node) else None
    if channels is not None and len(channels) > 1:
        return channels
    return None


def _with_quotients(
    even: dict[Place, list[tuple[int, np.ndarray]]],
    unclear: set[Place],
    quotients: dict[tuple[Place, Place], int],
    groups: np.ndarray,
) -> dict[Place, list[tuple[int, np.ndarray]]]:
    """Let widths change with the numbers of heads that divide them, or keep both.

    ``quotients``: by the places of a width and of a number of heads, the number of channels of a head.
    """
    before = -1
    while before != len(even):
        before = len(even)
        for (width, heads), size in quotients.items():
            of_heads = [(parts * size, channels) for parts, channels in even.get(heads, ())]
            fits = bool(of_heads) and width not in unclear
            for parts, channels in even.get(width, ()):
                for times, head_channels in of_heads:
                    fits &= np.array_equal(
                        np.sort(groups[channels]), np.sort(np.repeat(groups[head_channels], times // parts))
                    )
            if fits:
                even.setdefault(width, of_heads)
                continue
            unclear |= {width, heads}
            even.pop(width, None)
            even.pop(heads, None)
    return even


_MAKING = ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
_REPEATING = ("repeat", "tile")
# Operations that use numbers only as sizes, repetitions and indices.
_SIZED = (
    *_MAKING, *_REPEATING, "repeat_interleave", "view", "reshape", "unflatten", "expand", "broadcast_to", "split",
    "split_with_sizes", "getitem", "narrow",
)  # fmt: skip


def _computed_of(node: Node) -> list[TracedInt]:
    """List the attributes' numbers from which a node computes a number; empty if it needs anything else."""
    if not is_computed_of_attributes(node):
        return []
    numbers = attribute_sizes_in(node.args)
    for parent in node.all_input_nodes:
        numbers += _computed_of(parent)
    return numbers


def _uses(node: Node, ids: dict[str, Any], groups: np.ndarray) -> Iterator[tuple[TracedInt, np.ndarray | None]]:
    """Yield the numbers in a node's arguments, each with the ids of the channels that it counts; None if unknown."""
    name, args, leaving = plain_name(node), node.args, ids.get(node.name)
    nothing = np.zeros(0, dtype=np.int64)
    if name == "repeat_interleave":
        # A number of repetitions counts no channels, unless the neighbours made of one entry are some, such as heads.
        dim: Any = node.kwargs.get("dim", args[2] if len(args) > 2 else None)
        rows = _first_along(leaving, dim)
        for size in attribute_sizes_in((args, node.kwargs)):
            repeated = rows[: plain(size)]
            if len(np.unique(repeated)) == plain(size) > 1:
                yield size, repeated
            else:
                yield size, nothing
    elif name in ("view", "reshape", "unflatten", "expand", "broadcast_to", *_MAKING, *_REPEATING):
        is_made = name in _MAKING
        sizes: Any = args if is_made and not name.startswith("new_") else args[1:]
        if sizes and isinstance(sizes[0], (tuple, list)):
            sizes = sizes[0]
        if name == "unflatten":
            dim = node.kwargs.get("dim", args[1] if len(args) > 1 else 0)
            shape = tensor_shape(node.all_input_nodes[0])
            parts: Any = node.kwargs.get("sizes", args[-1])
            sizes = (1,) * (dim % len(shape or (1,)))
            if isinstance(parts, (tuple, list)):
                sizes += tuple(parts)
        if name in _REPEATING and isinstance(leaving, Tensor):
            sizes = (1,) * (leaving.dim() - len(sizes)) + tuple(sizes)
        for d, size in enumerate(sizes):
            if isinstance(size, TracedInt):
                row = _ids_in(leaving, d) if is_made else _channels_along(leaving, d, size, groups)
                # A number of repetitions counts no channels, except of a tensor with one value for all of them.
                is_repeated = isinstance(leaving, Tensor) and leaving.shape[d] == 1
                is_repeated = name in _REPEATING or (name in ("expand", "broadcast_to") and is_repeated)
                if row is None and (is_made or is_repeated):
                    row = nothing
                yield size, row
    elif name in ("conv1d", "conv2d", "conv3d"):
        by_channel: Any = node.kwargs.get("groups", args[6] if len(args) > 6 else None)
        if isinstance(by_channel, TracedInt):
            yield by_channel, _ids_in(leaving, 1)
    elif name in ("split", "split_with_sizes", "getitem") and len(args) > 1 and isinstance(args[0], Node):
        shape, sizes = tensor_shape(args[0]), args[1]
        entering = ids.get(args[0].name)
        if name == "getitem":
            cuts = sizes if isinstance(sizes, tuple) and all(isinstance(index, slice) for index in sizes) else ()
            for d, cut in enumerate(cuts):
                for end in (cut.start, cut.stop):
                    if isinstance(end, TracedInt):
                        row = _ids_in(entering, d)
                        # Where no channel can go, such as along the words of a text, ids are stored as one.
                        is_along = row is not None and shape is not None and len(row) == shape[d]
                        if row is not None and is_along:
                            yield end, row[:end]
                        else:
                            yield end, None
            return
        dim = node.kwargs.get("dim", args[2] if len(args) > 2 else 0)
        row = _ids_in(entering, dim)
        # If all channels are kept, their ids are equal, and stored as one.
        if row is None or (shape is not None and len(row) != shape[dim]):
            return
        if isinstance(sizes, TracedInt):
            for part in np.split(row, range(plain(sizes), len(row), plain(sizes))):
                yield sizes, part
        elif isinstance(sizes, (tuple, list)) and not any(isinstance(size, Node) for size in sizes):
            for size, end in zip(sizes, np.cumsum(sizes).tolist(), strict=True):
                if isinstance(size, TracedInt):
                    yield size, row[end - size : end]


def _channels_along(ids: Any, dim: int, size: int, groups: np.ndarray) -> np.ndarray | None:
    """Return the ids of the channels or heads along a dimension, empty for channels of a head; None if unknown."""
    if not isinstance(ids, Tensor) or ids.dim() <= dim:
        return None
    only = _ids_in(ids, dim, size)
    if only is not None or ids.shape[dim] != size or ids.numel() == size:
        return only
    rows = groups[ids.movedim(dim, 0).flatten(1).numpy()]
    if (rows == rows[:, :1]).all():
        return ids.movedim(dim, 0).flatten(1)[:, 0].numpy()
    if (rows == rows[:1]).all():
        return np.zeros(0, dtype=np.int64)
    return None


def _first_along(ids: Any, dim: Any) -> np.ndarray:
    """Return the ids along a dimension at the first place of the others; none if that isn't known."""
    if not isinstance(ids, Tensor) or not isinstance(dim, int) or not ids.numel():
        return np.zeros(0, dtype=np.int64)
    first: np.ndarray = ids.movedim(dim, -1).reshape(-1, ids.shape[dim])[0].numpy()
    return first


def _ids_in(ids: Any, dim: Any, size: int | None = None) -> np.ndarray | None:
    """Return the channel ids in a dimension; None if another dimension has more than one entry, too."""
    if not isinstance(ids, Tensor) or not isinstance(dim, int):
        return None
    if not ids.shape[dim] == ids.numel() == (size or ids.numel()):
        return None
    channel_ids: np.ndarray = ids.flatten().numpy()
    return channel_ids


def resized(arguments: Any, sizes: dict[Place, int]) -> Any:
    """Replace sizes that come from attributes by new ones, in a node's arguments."""
    if not attribute_sizes_in(arguments):
        return arguments  # `map_aggregate` would turn a tensor's shape into a plain tuple

    def new(leaf: Any) -> Any:
        if not isinstance(leaf, TracedInt) or leaf.place is None:
            return leaf
        parts = leaf.parts if leaf.per is None or leaf.per.place is None else sizes.get(leaf.per.place, leaf.parts)
        return sizes.get(leaf.place, plain(leaf) * leaf.parts) // parts

    return map_aggregate(arguments, new)
