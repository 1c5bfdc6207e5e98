"""Constraints on the channels of coupled layers that NNI's dependency groups can't express.

NNI's groups couple all channels of their layers, one to one, but layers may share only some channels. And the blocks
of grouped layers, group norms and shuffles may have to lose the same number of channels each.

The dense model splits and shuffles the kept channels anew (`DenseOrder`). Where it sends the first, second and third
channel of a layer depends only on how many channels the layer keeps. In the unpruned model the channels of one segment
go to the same pieces. `shares` says how many channels of each segment may stay so that the dense model sends as many to
each piece. `ids` defines these terms.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED, carry, compress, given_shapes, varies
from nni_topo.network.channels.rules import FAILURES, module_rule, rule_of
from nni_topo.network.graph.traced_int import attribute_sizes_in, resized
from nni_topo.network.runtime.inputs import tensors_of


def coupled_names(owned: Mapping[str, set[int]]) -> list[list[str]]:
    """Group names that share an id, directly or through others; groups and names in the mapping's order."""
    from scipy.cluster.hierarchy import DisjointSet  # takes 30 ms to import

    sets = DisjointSet(owned)
    first_owner: dict[int, str] = {}
    for name, ids in owned.items():
        # One merge per owner, not per id: layers share thousands of channels with a few others.
        for owner in {first_owner.setdefault(one_id, name) for one_id in ids}:
            sets.merge(owner, name)
    groups: dict[str, list[str]] = {}
    for name in owned:
        groups.setdefault(sets[name], []).append(name)
    return list(groups.values())


def partial_couplings(
    flow: ChannelFlow, names: Iterable[str], *, with_staying: bool = True
) -> dict[str, tuple[int, ...]]:
    """Return ids for the channels of layers whose couplings a group of a config_list can't express.

    Channels with equal ids are coupled; channels with negative ids are kept. ``with_staying``: include layers that keep
    some channels, although a group can express their couplings.
    """
    free = {name: set(flow.class_ids_of(name).tolist()) - {FIXED} for name in names}
    ids_by_layer = dict[str, tuple[int, ...]]()
    for group in coupled_names(free):
        all_ids = [flow.class_ids_of(name) for name in group]
        has_staying = any((ids == FIXED).any() and (ids != FIXED).any() for ids in all_ids)
        if _is_stated(flow, group) and (flow.shuffles or not (with_staying and has_staying)):
            continue
        # Kept channels aren't coupled with one another, so each gets an id of its own. Only layers with equal class
        # ids share these ids.
        kept_ids = dict[bytes, np.ndarray]()
        for name, ids in zip(group, all_ids, strict=True):
            # No layer made the channels of the network's input.
            staying = kept_ids.setdefault(ids.tobytes(), -np.maximum(flow.masked_channel_ids(name), 1))
            ids_by_layer[name] = tuple(np.where(ids == FIXED, staying, ids).tolist())
    return ids_by_layer


def _is_stated(flow: ChannelFlow, names: list[str]) -> bool:
    """Tell whether layers are coupled unit by unit in the same order, and no two units of a layer are coupled."""
    if 0 < sum(name in flow.layers for name in names) < len(names):
        return False  # no group has layers and norms
    first, *later_ids = [flow.class_ids_of(name)[flow.units(name)[:, 0]] for name in names]
    if not all(np.array_equal(class_ids, first) for class_ids in later_ids):
        return False
    free = first[first != FIXED]
    return len(np.unique(free)) == len(free)


def blocks_of(flow: ChannelFlow, norms: Iterable[str] = ()) -> dict[str, int]:
    """Return, by layer and masked norm, the number of blocks that have to lose the same number of channels."""
    all_sides = [side for blocks in flow.blocks for side in blocks.sides]
    counts: dict[str, int] = {}
    for name in [*flow.layers, *norms]:
        group_ids = flow.masked_group_ids(name)
        for side in all_sides:
            block_of = np.full(flow.size, -1)
            for rank, block in enumerate(side):
                block_of[flow.group_ids(block[block != FIXED])] = rank
            ranks = block_of[group_ids]
            # Runs of neighbouring channels of one block.
            starts = np.flatnonzero(np.diff(ranks, prepend=-2) != 0)
            sizes = np.diff([*starts, len(ranks)])[ranks[starts] >= 0]
            if not len(sizes):
                continue
            # Blocks of several layers, concatenated or shuffled, stay equal if each layer has equal parts in them.
            size = sizes[0]
            are_equal = (sizes == size).all() and (starts % size == 0).all() and len(group_ids) % size == 0
            if are_equal:
                counts[name] = math.lcm(counts.get(name, 1), len(group_ids) // size)
        class_ids = flow.class_ids_of(name)
        pattern = len(np.unique(class_ids))
        repeats = len(class_ids) // pattern
        if not np.array_equal(class_ids, group_ids) and np.array_equal(
            class_ids, np.tile(class_ids[:pattern], repeats)
        ):
            counts[name] = math.lcm(counts.get(name, 1), repeats)
    if flow.reorders:
        return _with_equal_blocks(flow, counts)
    return counts


def _with_equal_blocks(flow: ChannelFlow, counts: dict[str, int]) -> dict[str, int]:
    """Give layers whose channels are shuffled together equally many blocks, so that they lose equally many channels."""
    shuffled_together = list[set[str]]()
    for blocks in flow.blocks:
        group_ids = flow.group_ids(blocks.ids)
        together = set[str]()
        for name, layer in flow.layers.items():
            # Depth-wise convolutions follow the layer before them.
            if not layer.depthwise and np.isin(flow.group_ids_of(name), group_ids).any():
                together.add(name)
        shuffled_together.append(together)
    before: dict[str, int] = {}
    while before != counts:
        before = dict(counts)
        for names in shuffled_together:
            common = math.lcm(*(counts.get(name, 1) for name in names))
            widths = [flow.layers[name].channels for name in names]
            # From blocks of one channel nothing could be pruned.
            if all(width % common == 0 and width > common for width in widths):
                counts |= dict.fromkeys(names, common)
    return counts


class DenseOrder(torch.fx.Interpreter):
    """Follow channel ids through the dense model; ``is_kept``: which channels stay, bool, by group id.

    ``before``: the order with other channels kept. Where these channels don't arrive, its ids are taken over, because
    a search asks for many orders, and a network may have thousands of nodes.
    """

    # A channel shuffle of two groups puts the first channel of the second group after the first channel of the first.
    # In the dense model these are the first kept channels, so its order differs from the masked model's if the groups
    # lose different channels.
    def __init__(self, flow: ChannelFlow, is_kept: np.ndarray, before: DenseOrder | None = None) -> None:
        super().__init__(flow.traced)
        self.flow, self.is_kept = flow, is_kept.copy()
        self._sizes = flow.sizes_kept(is_kept)
        self._before, self._changed = before, np.zeros(flow.size, dtype=np.bool_)
        # By node, the group ids of its outputs.
        self._groups: dict[str, np.ndarray] = {} if before is None else before._groups
        if before is not None:
            self._changed = is_kept != before.is_kept
        self.ids: dict[str, Any] = {}  # by node, as in the flow, but with the dense model's shapes
        self.entering: dict[str, np.ndarray] = {}  # by module, the channel ids that enter it
        self.failed = set[str]()  # the nodes that can't be run on the ids of kept channels
        self.reordered = set[str]()  # the nodes whose outputs have channels in another order than in the unpruned model
        with torch.no_grad():
            self.run()
        self._before = None  # else every order would hold all orders before it

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        """Look up a node's arguments, with the dense model's sizes."""
        return resized(super().fetch_args_kwargs_from_env(n), self._sizes)

    def run_node(self, n: Node) -> Any:
        """Follow the ids through one node."""
        before = self._before
        if before is not None and self._is_as_before(n, before):
            self.ids[n.name] = before.ids[n.name]
            self.failed |= {n.name} & before.failed
            self.reordered |= {n.name} & before.reordered
            if n.op == "call_module" and n.target in before.entering:
                self.entering[n.target] = before.entering[n.target]
            return self.ids[n.name]
        ids = self._followed(n)
        if before is not None and _same_ids(ids, before.ids[n.name]):
            self.ids[n.name] = before.ids[n.name]
        return self.ids[n.name]

    def _is_as_before(self, node: Node, before: DenseOrder) -> bool:
        """Tell whether no channel that is now kept or pruned instead enters or leaves a node."""
        if any(self.ids[parent.name] is not before.ids[parent.name] for parent in node.all_input_nodes):
            return False
        if self._sizes != before._sizes and attribute_sizes_in((node.args, node.kwargs)):
            return False
        if node.name not in self._groups:
            leaves = [self.flow.group_ids(ids.numpy()).ravel() for ids in tensors_of(self.flow.ids[node.name])]
            self._groups[node.name] = np.concatenate([np.zeros(0, dtype=np.int64), *leaves])
        return not self._changed[self._groups[node.name]].any()

    def _followed(self, n: Node) -> Any:
        ascending = self._ascending(n)
        self.ids[n.name] = ids = self._renamed(self._in_dense_order(n, ascending), ascending)
        for arrived, expected in zip(tensors_of(ids), tensors_of(ascending), strict=False):
            if arrived is not expected and not torch.equal(compress(arrived), compress(expected)):
                self.reordered.add(n.name)
        return ids

    def _renamed(self, ids: Any, ascending: Any) -> Any:
        """Return the flow's ids of a node if other ids of the same groups arrive, such as those of a layer scale."""
        if not (isinstance(ids, Tensor) and isinstance(ascending, Tensor)) or ids.shape != ascending.shape:
            return ids
        arrived, expected = compress(ids), compress(ascending)
        if torch.equal(arrived.flatten().unique(), expected.flatten().unique()):
            return ids
        if not bool((arrived != FIXED).any()):
            return ascending  # a constant that is repeated over channels, which only the rule gave their ids
        groups_arrived, groups_expected = self.flow.group_ids(arrived.numpy()), self.flow.group_ids(expected.numpy())
        # After a concatenation along another dimension (a class token and patches), each part has ids of its own.
        fits = all(
            expected_size in (1, arrived_size)
            for expected_size, arrived_size in zip(expected.shape, arrived.shape, strict=True)
        )
        same = fits and np.array_equal(groups_arrived, np.broadcast_to(groups_expected, arrived.shape))
        if same:
            return ascending
        return ids

    def _ascending(self, node: Node) -> Any:
        """Return the ids of a node's outputs without those of pruned channels, in the unpruned model's order."""
        leaves, spec = tree_flatten(self.flow.ids[node.name])
        shapes = tree_flatten(given_shapes(node))[0]
        if len(leaves) != len(shapes):
            return self.flow.ids[node.name]
        return tree_unflatten([self._cut(ids, full) for ids, full in zip(leaves, shapes, strict=True)], spec)

    def _cut(self, ids: Any, full: Any) -> Any:
        if not isinstance(ids, Tensor) or not isinstance(full, Tensor):
            return ids
        stays, shape = torch.from_numpy(np.asarray(self.is_kept[self.flow.group_ids(ids.numpy())])), list(full.shape)
        for d, size in enumerate(ids.shape):
            if size == full.shape[d] and stays.numel():  # without elements no channel is removed
                rows = stays.movedim(d, 0).reshape(size, -1).any(1)
                ids = ids.index_select(d, rows.nonzero().flatten())
                shape[d] = ids.shape[d]
        return ids.expand(shape)

    def _in_dense_order(self, node: Node, ascending: Any) -> Any:
        """Return the ids of a node's outputs in the dense model's order; ``ascending``: in the unpruned one's."""
        if node.op in ("placeholder", "get_attr", "output"):
            return ascending
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        entering = tensors_of((args, kwargs))
        if not tensors_of(given_shapes(node)):
            return self._tried(node, args, kwargs, ascending)
        if node.op == "call_module":
            return self._through(node, entering[0], ascending) if entering else ascending
        rule = rule_of(node)
        if rule is not None and rule.moves and not (rule.by_index and tensors_of((args[1:], kwargs))):
            if isinstance(args[0], Tensor):
                args = (args[0].contiguous(), *args[1:])
            return self._tried(node, args, kwargs, ascending)
        return _in_order_of(entering, ascending)

    def _through(self, node: Node, ids: Tensor, ascending: Any) -> Any:
        """Return the ids of a module's output, given the ids that enter it."""
        name = str(node.target)
        layer, entering = self.flow.layers.get(name), self.flow.entering_channel_ids(name)
        if len(entering):
            dim = next((d for d in range(1, ids.dim()) if varies(ids, d)), 1)
            self.entering[name] = ids.transpose(0, dim).flatten(1)[:, 0].numpy()
        rule = module_rule(self.fetch_attr(name))
        if rule is not None and rule.moves:
            return self._tried(node, (ids.contiguous(),), {}, ascending)
        if layer is None:
            return _in_order_of([ids], ascending)
        if layer.depthwise and name in self.entering:
            # Its output channels come in the order of its inputs.
            outs = self.flow.channel_ids_of(name).reshape(len(entering), -1)[self.places(name)].ravel()
            view = [1, -1, *[1] * (ascending.dim() - 2)]
            return torch.from_numpy(outs).view(view).expand(ascending.shape)
        return ascending

    def _tried(self, node: Node, args: Any, kwargs: Any, ascending: Any) -> Any:
        """Run a node on ids; if that fails, note it. The dry run finds out whether the dense model fails, too."""
        try:
            return getattr(self, node.op)(node.target, args, kwargs)
        except FAILURES:
            self.failed.add(node.name)
            return ascending

    def places(self, name: str) -> np.ndarray:
        """Return the unpruned model's indices of the kept channels that enter a module: int, (kept channels,)."""
        entering = self.flow.entering_channel_ids(name)
        kept_places = np.flatnonzero(self.is_kept[self.flow.group_ids(entering)])
        arriving = self.entering.get(name, entering[:0])
        place = dict(zip(entering[kept_places].tolist(), kept_places.tolist(), strict=True))
        arriving_places = np.array([place.get(channel_id, -1) for channel_id in arriving.tolist()], dtype=np.int64)
        if np.array_equal(np.sort(arriving_places), kept_places):
            return arriving_places
        return kept_places

    def select(self, node: Node, value: Any) -> Any:
        """Remove pruned channels from a node's output tensors, and put the others into the dense model's order."""
        leaves, spec = tree_flatten(value)
        full_ids, dense_ids = tree_flatten(self.flow.ids[node.name])[0], tree_flatten(self.ids[node.name])[0]
        if not len(leaves) == len(full_ids) == len(dense_ids):
            return value
        return tree_unflatten(list(map(_gathered, leaves, full_ids, dense_ids)), spec)


def _same_ids(first: Any, second: Any) -> bool:
    """Tell whether two outputs of a node have the same ids."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)) and len(first) == len(second):
        return all(map(_same_ids, first, second))
    return type(first) is int and type(second) is int and first == second


def _in_order_of(entering: list[Tensor], ascending: Any) -> Any:
    """Return the output's ids in the order of the first operand that has the same channels; else ``ascending``."""
    if not isinstance(ascending, Tensor):
        return ascending
    channel_dims = [d for d in range(1, ascending.dim()) if varies(ascending, d)]
    for ids in entering:
        expanded = carry(ids, tuple(ascending.shape))
        # An operand with channels in other dimensions has other channels, such as attention scores.
        if (
            expanded is not None
            and channel_dims
            and channel_dims == [d for d in range(1, expanded.dim()) if varies(expanded, d)]
        ):
            return expanded
    return ascending


def _gathered(value: Any, full_ids: Any, dense_ids: Any) -> Any:
    """Return a tensor's values for ``dense_ids``. Each of them occurs once in ``full_ids``, the tensor's own ids."""
    if not (isinstance(value, Tensor) and isinstance(full_ids, Tensor) and isinstance(dense_ids, Tensor)):
        return value
    dims = [d for d in range(full_ids.dim()) if full_ids.shape[d] > 1]
    if not dims:
        return value.clone()
    other_dims = [d for d in range(value.dim()) if d not in dims]
    target_ids = dense_ids
    for d in range(dense_ids.dim()):
        if d not in dims:
            target_ids = target_ids.narrow(d, 0, min(target_ids.shape[d], 1))
    # A sorted copy turns the lookup of thousands of ids into one binary search.
    flat_ids = full_ids.flatten().numpy()
    order = np.argsort(flat_ids, kind="stable")
    places = order[np.searchsorted(flat_ids[order], target_ids.flatten().numpy()).clip(max=len(order) - 1)]
    flat = value.permute(*other_dims, *dims).flatten(len(other_dims))
    picked = flat[..., torch.from_numpy(places).to(value.device)].unflatten(-1, [dense_ids.shape[d] for d in dims])
    return picked.permute(*np.argsort([*other_dims, *dims]).tolist()).contiguous()


class Share(NamedTuple):
    """How many channels of each segment of a layer stay if the layer should keep ``asked`` channels."""

    asked: int
    segments: tuple[int, ...]  # the segment that each channel belongs to
    counts: tuple[int, ...]  # how many channels of each segment stay: `asked` in total, or more if that isn't possible


Shares = dict[str, Share]
Parts = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""By layer, the segment of each channel, and how many channels of each segment stay."""
Routes = Mapping[int, tuple[tuple[str, int], ...]]
"""By group id, the pieces that a channel goes to: name of the node that splits, index of its output."""
_MORE = 16  # channels that a layer keeps at most beyond those asked for


def stays_in_place(
    flow: ChannelFlow, is_kept: np.ndarray, names: Collection[str] | None = None, before: DenseOrder | None = None
) -> bool:
    """Tell whether pieces of the dense model hold the unpruned model's kept channels (of layers ``names``).

    ``before``: the order with other channels kept, if it is known.
    """
    order = DenseOrder(flow, is_kept, before)
    looked_at = np.ones(flow.size, dtype=np.bool_)
    if names is not None:
        looked_at[:] = False
        looked_at[np.concatenate([flow.group_ids_of(name) for name in names])] = True
    for node in order.failed:
        for ids in tensors_of(flow.ids[node]):
            if looked_at[flow.group_ids(ids.numpy())].any():
                return False
    for name in order.entering:
        group_ids = flow.entering_group_ids(name)
        kept_ids = flow.entering_channel_ids(name)[is_kept[group_ids]]
        if looked_at[group_ids].any() and not np.array_equal(np.sort(order.entering[name]), np.sort(kept_ids)):
            return False
    dense_pieces = {(node, piece): group_ids for node, piece, group_ids in _pieces(flow, order.ids)}
    for node, piece, full in _pieces(flow, flow.ids):
        if looked_at[full].any() and not np.array_equal(full[is_kept[full]], dense_pieces.get((node, piece), full[:0])):
            return False
    return True


def shares(flow: ChannelFlow, target_counts: Mapping[str, int]) -> Shares:
    """Return how many channels of each segment may stay, for shuffled layers; ``wanted``: by layer, how many should."""
    if not flow.shuffles:
        return {}
    # The group ids of the channels that each chunk, shuffle or view into rows moves.
    moves = [set(flow.group_ids(blocks.ids).tolist()) for blocks in flow.blocks if blocks.moves]
    counts = dict[str, int]()
    moves_of = dict[str, set[int]]()  # by layer, which of these move its channels
    for name in target_counts:
        group_ids = flow.group_ids_of(name).tolist()
        is_coupled_with_itself = len(set(group_ids)) < len(group_ids)
        if flow.layers[name].depthwise or FIXED in group_ids or is_coupled_with_itself:
            continue
        places = {place for place, moved_ids in enumerate(moves) if not moved_ids.isdisjoint(group_ids)}
        if places:
            counts[name], moves_of[name] = target_counts[name], places
    # Layers whose channels are moved together are searched together, from their wanted counts upwards.
    routes, share_of = _routes(flow, flow.ids), Shares()
    order: DenseOrder | None = None
    for names in coupled_names(moves_of):
        # With some counts the dense model would send a layer's channels to a piece that gets none in the unpruned one.
        for more in range(_MORE):
            trial_counts = {name: min(counts[name] + more, flow.layers[name].channels) for name in names}
            parts, order = _shared_out(flow, routes, counts | trial_counts, names, order)
            if parts:
                for name in names:
                    share_of[name] = Share(counts[name], *parts[name])
                counts |= trial_counts
                break
        else:
            counts |= {name: flow.layers[name].channels for name in names}
    return share_of


def _shared_out(
    flow: ChannelFlow, routes: Routes, counts: Mapping[str, int], names: list[str], before: DenseOrder | None
) -> tuple[Parts, DenseOrder]:
    """Return how many channels of each segment stay if layers keep ``counts``; nothing if that isn't possible.

    ``before``: the order with other counts, if it is known. The second result is the order with these.
    """
    is_kept = np.ones(flow.size, dtype=np.bool_)
    for name, count in counts.items():
        is_kept[flow.group_ids_of(name)[count:]] = False
    # Which channels stay isn't decided yet, and doesn't matter: the dense model routes them by count and rank alone.
    order = DenseOrder(flow, is_kept, before)
    dense_routes, parts = _routes(flow, order.ids), Parts()
    for name in names:
        group_ids = flow.group_ids_of(name).tolist()
        segments = [routes[group_id] for group_id in group_ids]
        target_routes = [dense_routes[group_id] for group_id in group_ids[: counts[name]]]
        sizes, target_sizes = Counter(segments), Counter(target_routes)
        if any(count > sizes[segment] for segment, count in target_sizes.items()):
            return Parts(), order
        rank = {segment: at for at, segment in enumerate(sizes)}
        parts[name] = tuple(rank[segment] for segment in segments), tuple(target_sizes[segment] for segment in rank)
        is_kept[group_ids] = chosen_of(*parts[name], np.arange(len(group_ids))[::-1])
    if stays_in_place(flow, is_kept, names, order):
        return parts, order
    return Parts(), order


def chosen_of(segments: Sequence[int], counts: Sequence[int], order: np.ndarray) -> np.ndarray:
    """Tell which channels stay if each segment keeps its last ``counts`` channels in ``order``: bool, (channels,)."""
    placed, chosen = np.asarray(segments)[order], np.zeros(len(segments), dtype=np.bool_)
    for segment, count in enumerate(counts):
        members = order[placed == segment]
        chosen[members[len(members) - count :]] = True
    return chosen


def asked_of(flow: ChannelFlow, entries: Iterable[Mapping[str, Any]], ties: Collection[str]) -> dict[str, int]:
    """Return how many channels each layer should keep: all, unless its entry has a sparse_ratio and no coupling."""
    counts = {name: layer.channels for name, layer in flow.layers.items()}
    for entry in entries:
        ratio: Any = entry.get("sparse_ratio")
        (name,) = entry["op_names"]
        is_plain = isinstance(ratio, (int, float)) and not isinstance(entry.get("granularity"), list)
        if name in counts and is_plain and name not in ties and "global_group_id" not in entry:
            counts[name] = max(counts[name] - int(counts[name] * ratio), 1)
    return counts


def _routes(flow: ChannelFlow, ids: Mapping[str, Any]) -> Routes:
    """List, by group id, the pieces that a channel goes to."""
    routes: dict[int, tuple[tuple[str, int], ...]] = defaultdict(tuple)
    for node, piece, group_ids in _pieces(flow, ids):
        for group_id in group_ids.tolist():
            routes[group_id] = (*routes[group_id], (node, piece))
    return routes


def _pieces(flow: ChannelFlow, ids: Mapping[str, Any]) -> list[tuple[str, int, np.ndarray]]:
    """List the pieces: name of the node that splits, index of its output, and the group ids in it, ascending."""
    pieces = []
    for node in flow.traced.graph.nodes:
        if isinstance(ids[node.name], (tuple, list)):
            for place, piece in enumerate(tensors_of(ids[node.name])):
                pieces.append((node.name, place, np.unique(flow.group_ids(compress(piece).numpy()))))
    return pieces
