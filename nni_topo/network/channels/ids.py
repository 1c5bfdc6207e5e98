"""Channel ids: one for each channel of each layer, tied where channels go together, pinned where they stay.

In place of a tensor's values its ids travel through the graph: a tensor of the same shape, int64, that says of each
entry which channel it belongs to.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.fx
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils._pytree import tree_map

from nni_topo.network.channels.reasons import Reason

FIXED = 0  # the id of all channels that have to stay; the first layer's start at 1


@dataclasses.dataclass
class Layer:
    """A layer that makes channels."""

    name: str
    first: int  # id of its first output channel; the others follow
    channels: int
    depthwise: bool  # each output channel depends on one input channel alone, with which it stays or goes

    @property
    def ids(self) -> np.ndarray:
        """The ids of its output channels: int, (channels,)."""
        return np.arange(self.first, self.first + self.channels)


@dataclasses.dataclass
class FreeParameter:
    """A parameter or buffer that the forward uses outside of a layer (a layer scale, positions), with its ids."""

    first: int
    channels: int
    dim: int  # the dimension of its channels
    dims: list[int]  # all that may hold channels, the likeliest last

    @property
    def ids(self) -> np.ndarray:
        """The ids of its channels: int, (channels,)."""
        return np.arange(self.first, self.first + self.channels)

    def ids_of_places(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the ids of its places: int64, of its shape."""
        view = [-1 if d == self.dim else 1 for d in range(len(shape))]
        return torch.from_numpy(self.ids).view(view).expand(shape)


@dataclasses.dataclass
class Blocks:
    """Blocks of channels that have to keep equally many each: for each side, an array of channel ids a block."""

    sides: list[list[np.ndarray]]  # a grouped convolution's inputs and its outputs, a norm's channels, a chunk's pieces
    may_vanish: bool  # a block may lose all of its channels, on all sides at once
    moves: bool = False  # it only decides where channels go, as after a chunk: see `shuffles`
    is_uneven: bool = False  # of shuffled layers, whose pieces can't be of one size each
    is_filled: bool = False  # a shorter block is filled up with `FIXED`: it loses as many, and keeps some of its own
    place: str = ""  # what needs them so: an operation, a module or an attribute
    counted: bool = False  # an attribute holds how many blocks there are: fewer, where each goes as a whole

    @property
    def all(self) -> list[np.ndarray]:
        """The blocks of all sides."""
        return list(itertools.chain.from_iterable(self.sides))

    @property
    def ids(self) -> np.ndarray:
        """The ids of all channels in them: int, (channels,)."""
        return np.concatenate(self.all)


@dataclasses.dataclass
class TakenWidth:
    """A view or split whose size is the width of another tensor, or is computed from one."""

    owner: str  # the module in whose forward it stands
    dim: int  # which dimension holds the channels: the last (text) or the second (images)
    of: torch.Tensor  # the ids of the tensor
    viewed: torch.Tensor  # the ids of what gets it


class ForeignWidth(NamedTuple):
    """A module that reshapes channels by the width of other channels, which needn't be as many."""

    dim: int  # the dimension of the tensor whose width is taken
    by_kept: bool  # whether channels get it that stay in any case, so that the others would have to
    times: int  # in how many views and splits


class ChannelIds:
    """The ids of a network's channels, and their constraints: coupled, kept, or lost in equal numbers."""

    def __init__(self) -> None:
        self.count = FIXED + 1
        self.reason: Reason  # why channels stay that are tied to FIXED from now on; set before any are
        self.node: torch.fx.Node  # the operation that ties channels from now on; set before any are
        self.layers: dict[str, Layer] = {}  # in the order they are called
        # By name. Their channels are pruned with the channels that they are tied to, and keep none.
        self.free_parameters: dict[str, FreeParameter] = {}
        self.one_valued: dict[str, FreeParameter] = {}  # by node, tensors of one value whose width an attribute holds
        self.dims: Mapping[str, int] = {}  # by name of either, the dimension of its channels, if not the last possible
        self.blocks: list[Blocks] = []  # one for each grouped convolution, group norm and chunk
        self.reorders = False  # whether the dense model may put channels into another order: see `DenseOrder`
        self.chunks = False  # whether channels are cut into equal pieces
        self.summed = set[str]()  # nodes that add up over channels: what is removed has to arrive as zeros
        self.guessed = set[str]()  # nodes without a rule that are taken to work place by place
        self.widths: list[TakenWidth] = []
        self.by_node: dict[str, Any] = {}  # what each node puts out: int64, of length 1 where nothing differs
        self.picks: dict[str, torch.Tensor] = {}  # by node, the places that a constant of the forward's picks
        self._pairs = [np.zeros((0, 2), dtype=np.int64)]
        self._tied_at: list[torch.fx.Node] = []  # the operation of each of these arrays but the first
        self._as_widths = set[int]()  # which of these arrays tie channels to others as their width is taken
        self._pins: list[tuple[np.ndarray, Reason]] = []
        self._columns: list[tuple[np.ndarray, Reason]] = []
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []

    def new(self, count: int) -> int:
        """Give out a number of new ids, and return the first."""
        self.count += count
        return self.count - count

    def filled(self, name: str, dims: list[int], shape: tuple[int, ...]) -> torch.Tensor:
        """Give ids to the entries of a constant tensor along one of the dimensions whose size an attribute holds."""
        dim = self.dims.get(name, dims[-1])
        self.one_valued[name] = made = FreeParameter(self.new(shape[dim]), shape[dim], dim, dims)
        return made.ids_of_places(shape)

    def pin(self, ids: np.ndarray, reason: Reason) -> None:
        """Keep channels, and all that are coupled with them."""
        self._pins.append((ids, reason))

    def pin_unless_tied(self, columns: np.ndarray, reason: Reason) -> None:
        """Keep the channels in each column of ids, (ids, columns), unless all of the column turn out to be coupled."""
        self._columns.append((columns, reason))

    def tie(self, ones: np.ndarray | int, others: np.ndarray | int, *, as_width: bool = False) -> None:
        """Couple channels with others, one by one; channels coupled with ``FIXED`` can't be pruned.

        ``as_width``: for no other reason than that a view gives them the width of the others.
        """
        pairs = np.stack(np.broadcast_arrays(ones, others), -1).reshape(-1, 2)
        stay = (pairs == FIXED).any(1)
        if (pairs[stay] != FIXED).any():
            self.pin(pairs[stay].max(1), self.reason)
        if as_width:
            self._as_widths.add(len(self._pairs))
        self._pairs.append(pairs[~stay])
        self._tied_at.append(self.node)

    def tie_whole_rows(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Couple each id with its row, (ids, columns), if the whole row turns out to be coupled, as of a head."""
        free = (ids != FIXED) & (rows != FIXED).all(1)
        self._rows.append((ids[free], rows[free]))

    def ties(self) -> list[tuple[torch.fx.Node, np.ndarray]]:
        """List the operations that couple channels, in network order, each with the pairs of ids: int, (pairs, 2)."""
        return list(zip(self._tied_at, self._pairs[1:], strict=True))

    def couple(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Couple the ids of tensors that are combined entry by entry; both are broadcast."""
        one, other = torch.broadcast_tensors(one, other)
        # Along a dimension in which neither differs (batch, pixels) one place says all, and few pairs are left to sort.
        for d in range(one.dim()):
            if not (one.shape[d] == 0 or varies(one, d) or varies(other, d)):
                one, other = one.narrow(d, 0, 1), other.narrow(d, 0, 1)
        self.tie(*np.divmod(np.unique((one * self.count + other).numpy()), self.count))

    def per_channel(self, ids: torch.Tensor, dim: int) -> np.ndarray:
        """Reduce ids to one a channel; those that share a channel are tied."""
        rows = ids.transpose(0, dim)
        # The usual case, all places of a channel alike, is one comparison; ties are looked for only where it fails.
        first = rows[(slice(None),) + (slice(0, 1),) * (rows.dim() - 1)]
        if not torch.equal(first.expand(rows.shape), rows):
            self.couple(first, rows)
        return first.reshape(-1).numpy()

    def settled(self) -> tuple[np.ndarray, np.ndarray, dict[int, Reason]]:
        """Return group ids, the smallest id of each group, without and with kept channels; and reasons by group id."""
        before, reasons = self._tied(self._pairs), dict[int, Reason]()
        apart = [(rows[:, (before[rows] != before[rows[:1]]).any(0)], reason) for rows, reason in self._columns]
        for ids, reason in self._pins + apart:
            for group_id in np.unique(before[ids]).tolist():
                reasons.setdefault(group_id, reason)
        return before, np.where(np.isin(before, list(reasons)), FIXED, before), reasons

    def _tied(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Return the smallest id of the group of each channel: int, (count,), by arrays of tied pairs."""
        pairs = np.concatenate(arrays)
        while True:
            graph = coo_matrix((np.ones(len(pairs), dtype=bool), pairs.T), shape=(self.count, self.count))
            _, firsts, parts = np.unique(
                connected_components(graph, directed=False)[1], return_index=True, return_inverse=True
            )
            found: np.ndarray = firsts[parts]
            more = list[np.ndarray]()
            for ids, rows in self._rows:
                first = rows[:, 0]
                is_new = (found[rows] == found[first][:, None]).all(1) & (found[ids] != found[first])
                more.append(np.stack([ids[is_new], first[is_new]], -1))
            if not sum(map(len, more)):
                return found
            pairs = np.concatenate([pairs, *more])

    def foreign_widths(self) -> dict[str, ForeignWidth]:
        """Return the modules that give channels the width of others that needn't be as many, by name."""
        if not self.widths:
            return {}
        groups = self._tied([each for at, each in enumerate(self._pairs) if at not in self._as_widths])
        staying = np.concatenate([[FIXED], *(groups[ids] for ids, _ in self._pins)])
        found = dict[str, ForeignWidth]()
        for each in self.widths:
            own, viewed = (np.setdiff1d(groups[ids.numpy()], FIXED) for ids in (each.of, each.viewed))
            if len(own) + len(viewed) and not np.isin(viewed, own).any():
                known = found.get(each.owner, ForeignWidth(each.dim, False, 0))
                is_kept = bool(np.isin(viewed, staying).all())
                found[each.owner] = ForeignWidth(known.dim, known.by_kept or is_kept, known.times + 1)
        return found


def fixed(leaf: Any) -> Any:
    """Give a tensor from outside the id ``FIXED``: its channels can't be pruned; any other leaf comes back as it is."""
    # On the CPU, as all ids are, wherever the model lies.
    return staying(tuple(leaf.shape)) if isinstance(leaf, torch.Tensor) else leaf


def staying(shape: tuple[int, ...]) -> torch.Tensor:
    """Return ids for a tensor whose channels all stay: ``FIXED`` everywhere."""
    return torch.tensor(FIXED).expand(shape)


def compressed(leaf: Any) -> Any:
    """Keep one entry of every dimension along which ids don't differ; any other leaf comes back as it is."""
    if isinstance(leaf, torch.Tensor):
        for d in range(leaf.dim()):
            leaf = leaf if leaf.shape[d] == 0 or varies(leaf, d) else leaf.narrow(d, 0, 1)
        return leaf.clone()
    return leaf


def given_shapes(node: torch.fx.Node) -> Any:
    """Return ids ``FIXED`` for all outputs of a node, in the same containers; None for what is no tensor."""
    metas = node.meta.get("tensor_meta")
    return tree_map(
        lambda meta: staying(tuple(meta.shape)) if isinstance(meta, TensorMetadata) else None,
        metas,
        is_leaf=lambda meta: isinstance(meta, TensorMetadata),
    )


def varies(ids: torch.Tensor, dim: int) -> bool:
    """Tell whether ids differ along a dimension."""
    # A stride of 0 is one entry seen many times: nothing to compare.
    some = ids.shape[dim] > 1 and ids.stride(dim) != 0
    return some and not torch.equal(ids.narrow(dim, 0, 1).expand(ids.shape), ids)


def carry(ids: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Expand ids (batch, channels, ...) to an output's shape, channels at the same place; None if that isn't clear."""
    # What keeps its shape (an activation, a norm) works place by place, as far as shapes can tell.
    if tuple(ids.shape) == shape:
        return ids
    alike = min(ids.dim(), len(shape)) > 1 and tuple(ids.shape[:2]) == shape[:2]
    # Where the places of a channel have different ids, a place of the output could have any of them.
    if not alike or any(varies(ids, d) for d in range(2, ids.dim())):
        return None
    # Any place will do, all being alike; expanded again, so that strides of 0 still say that nothing differs.
    channels = ids[(slice(None), slice(None)) + (0,) * (ids.dim() - 2)]
    return channels.view(shape[:2] + (1,) * (len(shape) - 2)).expand(shape)


def carry_reduced(ids: torch.Tensor, shape: tuple[int, ...], dims: Iterable[int]) -> torch.Tensor | None:
    """Return the ids after a reduction over dimensions, counted from 0; None if that isn't clear."""
    pruned = set(dims)
    places = [d for d in range(ids.dim()) if varies(ids, d)]
    if set(places) <= pruned:
        return staying(shape)
    if pruned & set(places):
        return None
    for d in pruned:
        ids = ids.narrow(d, 0, 1)
    rest = ids if len(shape) == ids.dim() else ids.squeeze(tuple(pruned))
    return rest.expand(shape) if rest.dim() == len(shape) else None


def meet_alike(ids: list[torch.Tensor], shape: tuple[int, ...]) -> bool:
    """Tell whether tensors broadcast to a shape."""
    try:
        return tuple(torch.broadcast_shapes(*(each.shape for each in ids))) == shape
    except RuntimeError:
        return False
