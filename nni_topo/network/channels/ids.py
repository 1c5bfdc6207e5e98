"""Channel ids, and which of them are coupled or kept.

A tensor of channel ids goes through the graph in place of a tensor of values. It is int64, has the same shape, and
says which channel each entry belongs to. Terms of this package:

- channel id: an integer that stands for one output channel of one layer, or one channel of a free parameter. `FIXED`
  (0) stands for all channels that can't be pruned.
- group id: the smallest channel id among coupled channels, which can only be removed together; `FIXED` if they are
  kept.
- block: channels that an operation reads as a unit, such as a group of a convolution or norm. All blocks of an
  operation have to keep the same number of channels.
- class id: the smallest group id among channels that pruners remove together. It is the group id, except where an
  operation reads blocks of several layers' channels: these layers lose the same channels of every block.
- piece: one output of an operation that splits a tensor, such as chunk.
- segment: the channels of one layer that go to the same pieces.
- place: a position in a tensor or along one of its dimensions, such as a pixel or a token. The place of a node is the
  module that calls it; a `Place` is an attribute that holds a number.
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

from nni_topo.network.channels.averages import Average
from nni_topo.network.channels.reasons import Reason

FIXED = 0  # the id of all channels that can't be pruned; other ids start at 1


@dataclasses.dataclass
class Layer:
    """The output channels of a layer."""

    name: str
    first: int  # id of its first output channel; the others follow
    channels: int
    depthwise: bool  # each output channel is computed from one input channel, and is pruned with it

    @property
    def ids(self) -> np.ndarray:
        """The ids of its output channels: int, (channels,)."""
        return np.arange(self.first, self.first + self.channels)


@dataclasses.dataclass
class FreeParameter:
    """A parameter or buffer that the forward uses outside of a layer, such as a layer scale or position embeddings."""

    first: int
    channels: int
    dim: int  # the dimension of its channels
    dims: list[int]  # the dimensions that may hold channels, the likeliest last

    @property
    def ids(self) -> np.ndarray:
        """The ids of its channels: int, (channels,)."""
        return np.arange(self.first, self.first + self.channels)

    def ids_of_places(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the channel id of each entry: int64, of the parameter's shape."""
        view = [1] * len(shape)
        view[self.dim] = -1
        return torch.from_numpy(self.ids).view(view).expand(shape)


@dataclasses.dataclass
class Blocks:
    """Blocks of channels that must all keep the same number of channels.

    A side is a list of blocks, as channel ids. A grouped convolution has two: its inputs and its outputs.
    """

    sides: list[list[np.ndarray]]
    may_vanish: bool  # a block may lose all of its channels, on all sides at once
    moves: bool = False  # the operation only moves channels, such as chunk: see `ChannelFlow.shuffles`
    is_uneven: bool = False  # the pieces hold different numbers of a shuffled layer's channels
    is_filled: bool = False  # the shorter last block is filled up with `FIXED`; it may not lose all of its own channels
    place: str = ""  # the operation, module or attribute that requires the blocks
    counted: bool = False  # an attribute holds the number of blocks, so whole blocks (heads) may be removed

    @property
    def all(self) -> list[np.ndarray]:
        """The blocks of all sides."""
        return list(itertools.chain.from_iterable(self.sides))

    @property
    def ids(self) -> np.ndarray:
        """The ids of all channels in the blocks: int, (channels,)."""
        return np.concatenate(self.all)


@dataclasses.dataclass
class TakenWidth:
    """A view or split whose size is the width of another tensor, or is computed from one."""

    owner: str  # the module whose forward calls the view or split
    dim: int  # which dimension holds the channels: the last (text) or the second (images)
    of: torch.Tensor  # the channel ids of the other tensor
    viewed: torch.Tensor  # the channel ids of the tensor that gets the size


class ForeignWidth(NamedTuple):
    """A module that reshapes channels to the width of other channels, although the two aren't coupled."""

    dim: int  # the dimension whose size is taken: see `TakenWidth`
    by_kept: bool  # whether the reshaped channels are kept anyway, so that the others would have to be kept, too
    times: int  # the number of such views and splits


class ChannelIds:
    """The channel ids of a network, and which channels are coupled, are kept, or form blocks."""

    def __init__(self) -> None:
        self.count = FIXED + 1
        self.reason: Reason  # the reason for keeping channels that the current node couples with `FIXED`
        self.node: torch.fx.Node  # the current node, whose operation couples channels
        self.layers: dict[str, Layer] = {}  # in the order they are called
        # By name. Their channels are pruned with the channels they are coupled with, and never keep these.
        self.free_parameters: dict[str, FreeParameter] = {}
        self.one_valued: dict[str, FreeParameter] = {}  # by node, tensors of one value whose width an attribute holds
        self.dims: Mapping[str, int] = {}  # by name of either, the dimension of its channels, if not the likeliest
        self.blocks: list[Blocks] = []  # one for each grouped convolution, group norm and chunk
        self.reorders = False  # whether the dense model may put channels into another order: see `DenseOrder`
        self.chunks = False  # whether a chunk splits channels
        self.summed = set[str]()  # nodes that sum over channels: removed channels must arrive as zeros
        self.averages: dict[str, Average] = {}  # by node, means over channels whose readers' weights make up for them
        self.guessed = set[str]()  # nodes that are only assumed to treat each channel by itself
        self.widths: list[TakenWidth] = []
        self.by_node: dict[str, Any] = {}  # ids of each node's output: int64, of length 1 where none differ
        self.picks: dict[str, torch.Tensor] = {}  # by node, the values of index and mask tensors that are constants
        self._pairs = [np.zeros((0, 2), dtype=np.int64)]
        self._tied_at: list[torch.fx.Node] = []  # the operation that couples each array of pairs but the first
        self._as_widths = set[int]()  # indices of the arrays that couple channels only because a width is taken
        self._pins: list[tuple[np.ndarray, Reason]] = []
        self._columns: list[tuple[np.ndarray, Reason]] = []
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []
        self._by_head: list[tuple[str, np.ndarray]] = []

    def new(self, count: int) -> int:
        """Reserve ``count`` new ids, and return the first."""
        self.count += count
        return self.count - count

    def filled(self, name: str, dims: list[int], shape: tuple[int, ...]) -> torch.Tensor:
        """Return new ids for a constant tensor, along one of the dimensions whose size an attribute holds."""
        dim = self.dims.get(name, dims[-1])
        self.one_valued[name] = parameter = FreeParameter(self.new(shape[dim]), shape[dim], dim, dims)
        return parameter.ids_of_places(shape)

    def pin(self, ids: np.ndarray, reason: Reason) -> None:
        """Keep channels, and all channels coupled with them."""
        self._pins.append((ids, reason))

    def pin_unless_tied(self, columns: np.ndarray, reason: Reason) -> None:
        """Keep the channels in each column of ids, (ids, columns), unless the column's channels are all coupled."""
        self._columns.append((columns, reason))

    def tie(self, first_ids: np.ndarray | int, second_ids: np.ndarray | int, *, as_width: bool = False) -> None:
        """Couple channels pairwise; channels coupled with ``FIXED`` can't be pruned.

        ``as_width``: whether the only reason is that ``second_ids`` are reshaped to the width of ``first_ids``.
        """
        pairs = np.stack(np.broadcast_arrays(first_ids, second_ids), -1).reshape(-1, 2)
        stay = (pairs == FIXED).any(1)
        if (pairs[stay] != FIXED).any():
            self.pin(pairs[stay].max(1), self.reason)
        if as_width:
            self._as_widths.add(len(self._pairs))
        self._pairs.append(pairs[~stay])
        self._tied_at.append(self.node)

    def tie_whole_rows(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Couple each id with its row, (ids, columns), if the row's channels (of a head, say) are all coupled."""
        free = (ids != FIXED) & (rows != FIXED).all(1)
        self._rows.append((ids[free], rows[free]))

    def tie_columns(self, name: str, rows: np.ndarray) -> None:
        """Couple the channels in each column of ids, (rows, columns), unless each row is a head, which goes as a whole.

        ``name``: the module that reads the rows, such as a norm of queries, with a number for each column.
        """
        self._by_head.append((name, rows))

    def heads_only(self, group_ids: np.ndarray) -> set[str]:
        """Return the modules that read nothing but heads which go as a whole, and so keep their size."""
        apart = {name for name, rows in self._by_head if (group_ids[rows] != group_ids[rows[:, :1]]).any()}
        return {name for name, _ in self._by_head} - apart

    def ties(self) -> list[tuple[torch.fx.Node, np.ndarray]]:
        """List the operations that couple channels, in network order, each with the pairs of ids: int, (pairs, 2)."""
        return list(zip(self._tied_at, self._pairs[1:], strict=True))

    def couple(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Couple the ids of two tensors that are combined elementwise; both are broadcast."""
        first, second = torch.broadcast_tensors(first, second)
        # Along a dimension in which neither differs (batch, pixels) one entry is enough, so fewer pairs are sorted.
        for d in range(first.dim()):
            if not (first.shape[d] == 0 or varies(first, d) or varies(second, d)):
                first, second = first.narrow(d, 0, 1), second.narrow(d, 0, 1)
        self.tie(*np.divmod(np.unique((first * self.count + second).numpy()), self.count))

    def per_channel(self, ids: torch.Tensor, dim: int) -> np.ndarray:
        """Return one id for each index of a dimension: int, (channels,); couple the ids that share an index."""
        rows = ids.transpose(0, dim)
        # Usually ids that share an index are equal, which one comparison shows.
        first = rows[(slice(None),) + (slice(0, 1),) * (rows.dim() - 1)]
        if not torch.equal(first.expand(rows.shape), rows):
            self.couple(first, rows)
        return first.reshape(-1).numpy()

    def settle(self) -> tuple[np.ndarray, np.ndarray, dict[int, Reason]]:
        """Return group ids before and after keeping channels, int, (count,) each, and by group id the reasons."""
        before, reasons = self._tied(self._pairs), dict[int, Reason]()
        apart = [(rows[:, (before[rows] != before[rows[:1]]).any(0)], reason) for rows, reason in self._columns]
        for ids, reason in self._pins + apart:
            for group_id in np.unique(before[ids]).tolist():
                reasons.setdefault(group_id, reason)
        return before, np.where(np.isin(before, list(reasons)), FIXED, before), reasons

    def _tied(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Return the group id of each channel, int, (count,), given arrays of coupled pairs."""
        pairs = np.concatenate(arrays)
        while True:
            group_ids = smallest_of_connected(pairs, self.count)
            more = list[np.ndarray]()
            for ids, rows in self._rows:
                first = rows[:, 0]
                is_new = (group_ids[rows] == group_ids[first][:, None]).all(1) & (group_ids[ids] != group_ids[first])
                more.append(np.stack([ids[is_new], first[is_new]], -1))
            if not sum(map(len, more)):
                for _, rows in self._by_head:
                    if (group_ids[rows] != group_ids[rows[:, :1]]).any():
                        columns = np.stack(np.broadcast_arrays(rows[:1], rows), -1).reshape(-1, 2)
                        more.append(columns[group_ids[columns[:, 0]] != group_ids[columns[:, 1]]])
            if not sum(map(len, more)):
                return group_ids
            pairs = np.concatenate([pairs, *more])

    def foreign_widths(self) -> dict[str, ForeignWidth]:
        """Return, by name, the modules that reshape channels to the width of channels not coupled with them."""
        if not self.widths:
            return {}
        groups = self._tied([pairs for at, pairs in enumerate(self._pairs) if at not in self._as_widths])
        staying = np.concatenate([[FIXED], *(groups[ids] for ids, _ in self._pins)])
        widths = dict[str, ForeignWidth]()
        for width in self.widths:
            source, viewed = (np.setdiff1d(groups[ids.numpy()], FIXED) for ids in (width.of, width.viewed))
            if len(source) + len(viewed) and not np.isin(viewed, source).any():
                earlier = widths.get(width.owner, ForeignWidth(width.dim, False, 0))
                is_kept = bool(np.isin(viewed, staying).all())
                widths[width.owner] = ForeignWidth(earlier.dim, earlier.by_kept or is_kept, earlier.times + 1)
        return widths


def smallest_of_connected(pairs: np.ndarray, count: int) -> np.ndarray:
    """Return for each id below ``count`` the smallest id that pairs, (pairs, 2), connect with it: int, (count,)."""
    graph = coo_matrix((np.ones(len(pairs), dtype=bool), pairs.T), shape=(count, count))
    _, firsts, parts = np.unique(connected_components(graph, directed=False)[1], return_index=True, return_inverse=True)
    smallest: np.ndarray = firsts[parts]
    return smallest


def fixed(leaf: Any) -> Any:
    """Return ids ``FIXED`` for a tensor, so that its channels can't be pruned; return other leaves unchanged."""
    # All ids are on the CPU, whatever the model's device.
    if isinstance(leaf, torch.Tensor):
        return staying(tuple(leaf.shape))
    return leaf


def staying(shape: tuple[int, ...]) -> torch.Tensor:
    """Return ids for a tensor whose channels are all kept: ``FIXED`` everywhere."""
    return torch.tensor(FIXED).expand(shape)


def compress(leaf: Any) -> Any:
    """Shorten each dimension along which ids don't differ to length 1; return leaves that aren't tensors unchanged."""
    if isinstance(leaf, torch.Tensor):
        for d in range(leaf.dim()):
            if not (leaf.shape[d] == 0 or varies(leaf, d)):
                leaf = leaf.narrow(d, 0, 1)
        return leaf.clone()
    return leaf


def given_shapes(node: torch.fx.Node) -> Any:
    """Return ids ``FIXED`` for all outputs of a node, in the same containers; None if an output is no tensor."""
    metas = node.meta.get("tensor_meta")
    return tree_map(
        lambda meta: staying(tuple(meta.shape)) if isinstance(meta, TensorMetadata) else None,
        metas,
        is_leaf=lambda meta: isinstance(meta, TensorMetadata),
    )


def varies(ids: torch.Tensor, dim: int) -> bool:
    """Tell whether ids differ along a dimension."""
    # With stride 0 all entries are the same one.
    some = ids.shape[dim] > 1 and ids.stride(dim) != 0
    return some and not torch.equal(ids.narrow(dim, 0, 1).expand(ids.shape), ids)


def carry(ids: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Expand ids (batch, channels, ...) to an output's shape, channels in the same dimension; None if that fails."""
    # An operation that keeps the shape (an activation, a norm) is assumed to keep each channel where it is.
    if tuple(ids.shape) == shape:
        return ids
    alike = min(ids.dim(), len(shape)) > 1 and tuple(ids.shape[:2]) == shape[:2]
    # If ids differ within a channel, an entry of the output could have any of them.
    if not alike or any(varies(ids, d) for d in range(2, ids.dim())):
        return None
    # Within a channel all ids are the same. Expanding again keeps the strides of 0 that `varies` looks at.
    channels = ids[(slice(None), slice(None)) + (0,) * (ids.dim() - 2)]
    return channels.view(shape[:2] + (1,) * (len(shape) - 2)).expand(shape)


def carry_reduced(ids: torch.Tensor, shape: tuple[int, ...], dims: Iterable[int]) -> torch.Tensor | None:
    """Return the ids after a reduction over dimensions, counted from 0.

    None if some channels are in these and some in other dimensions, or if the output's shape doesn't fit.
    """
    pruned = set(dims)
    places = [d for d in range(ids.dim()) if varies(ids, d)]
    if set(places) <= pruned:
        return staying(shape)
    if pruned & set(places):
        return None
    for d in pruned:
        ids = ids.narrow(d, 0, 1)
    reduced = ids if len(shape) == ids.dim() else ids.squeeze(tuple(pruned))
    if reduced.dim() == len(shape):
        return reduced.expand(shape)
    return None


def meet_alike(ids: list[torch.Tensor], shape: tuple[int, ...]) -> bool:
    """Tell whether tensors broadcast to a shape."""
    try:
        return tuple(torch.broadcast_shapes(*(tensor.shape for tensor in ids))) == shape
    except RuntimeError:
        return False
