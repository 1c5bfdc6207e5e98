"""How many channels of each layer stay where a network shuffles and splits them, and none goes astray.

The dense model splits and shuffles those that are left in its own way. What it makes of the first, second, third
channel of each layer depends on their number alone; so the pieces that these go to say how many may stay of those that
go to the same pieces in the whole model.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_flatten

from nni_topo.network.channels.constraints import coupled_names
from nni_topo.network.channels.dense_order import DenseOrder
from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED, compressed
from nni_topo.network.layers import is_depthwise


class Share(NamedTuple):
    """How many of which of a layer's channels stay if it is asked to keep so many."""

    asked: int
    stretches: tuple[int, ...]  # the stretch that each channel belongs to
    counts: tuple[int, ...]  # how many of each stretch stay: `asked` together, or more where that can't be


Shares = dict[str, Share]
Parts = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
Routes = Mapping[int, tuple[tuple[str, int], ...]]
_KNOWN: WeakKeyDictionary[ChannelFlow, dict[tuple[tuple[str, int], ...], Shares]] = WeakKeyDictionary()
_MORE = 16  # channels that a layer keeps at most beyond those asked for


def stays_in_place(flow: ChannelFlow, left: np.ndarray, names: Collection[str] | None = None) -> bool:
    """Tell whether in the dense model every piece holds the channels of the whole model that are left, in any order.

    ``names``: only pieces with channels of these layers count.
    """
    order = DenseOrder(flow, left)
    looked_at = np.ones(flow.size, dtype=np.bool_)
    if names is not None:
        looked_at[:] = False
        looked_at[np.concatenate([flow.group_ids_of(name) for name in names])] = True
    unfit = [leaf for node in order.unfit for leaf in tree_flatten(flow.numbers[node])[0] if isinstance(leaf, Tensor)]
    if any(bool(looked_at[flow.group_ids(leaf.numpy())].any()) for leaf in unfit):
        return False
    for name in order.entering:
        module: Any = flow.fetch_attr(name)
        groups = getattr(module, "groups", 1)
        arriving = order.entering[name]
        if not looked_at[flow.entering_group_ids(name)].any():
            continue
        kept = np.flatnonzero(left[flow.entering_group_ids(name)])
        places = order.places(name)
        if not np.array_equal(np.sort(arriving), np.sort(flow.entering_channel_ids(name)[kept])):
            return False
        of_group = places // max(len(flow.entering_channel_ids(name)) // groups, 1)
        if groups > 1 and not is_depthwise(module) and bool((np.diff(of_group) < 0).any()):
            return False
    pieces = zip(_pieces(flow, flow.numbers), _pieces(flow, order.numbers), strict=True)
    return all(
        np.array_equal(whole[left[whole]], dense) for (_, _, whole), (_, _, dense) in pieces if looked_at[whole].any()
    )


def shares(flow: ChannelFlow, wanted: Mapping[str, int]) -> Shares:
    """Say which channels of layers may stay, given how many of each should; only of layers that are shuffled."""
    if not flow.shuffles:
        return {}
    counts = dict[str, int]()
    moved = np.concatenate([[FIXED], *(flow.group_ids(each) for blocks in _moving(flow) for each in blocks)])
    for name in wanted:
        group_ids = flow.group_ids_of(name)
        is_free = (
            len(np.unique(group_ids)) == len(group_ids) and FIXED not in group_ids and not flow.layers[name].depthwise
        )
        if is_free and np.isin(group_ids, moved).any():
            counts[name] = wanted[name]
    known = _KNOWN.setdefault(flow, {})
    if (key := tuple(counts.items())) not in known:
        known[key] = _shares(flow, counts)
    return known[key]


def _shares(flow: ChannelFlow, counts: dict[str, int]) -> Shares:
    whole, found = _routes(flow, flow.numbers), Shares()
    rows = [set(flow.group_ids(np.concatenate(blocks)).tolist()) for blocks in _moving(flow)]
    met = {
        name: {place for place, row in enumerate(rows) if not row.isdisjoint(flow.group_ids_of(name).tolist())}
        for name in counts
    }
    for names in coupled_names(met):
        # A number may be one with which a channel would go where none of its layer does in the whole model.
        for more in range(_MORE):
            asked = {name: min(counts[name] + more, flow.layers[name].channels) for name in names}
            if each := _shared_out(flow, whole, counts | asked, names):
                found |= {name: Share(counts[name], *each[name]) for name in names}
                counts |= asked
                break
        else:
            counts |= {name: flow.layers[name].channels for name in names}
    return found


def _shared_out(flow: ChannelFlow, whole: Routes, counts: Mapping[str, int], names: list[str]) -> Parts:
    """Say how many channels of each stretch stay if each layer keeps so many; nothing where that can't be."""
    left = np.ones(flow.size, dtype=np.bool_)
    for name, count in counts.items():
        left[flow.group_ids_of(name)[count:]] = False
    dense, found = _routes(flow, DenseOrder(flow, left).numbers), Parts()
    for name in names:
        group_ids = flow.group_ids_of(name).tolist()
        stretches = [whole[root] for root in group_ids]
        room, taken = Counter(stretches), Counter(dense[root] for root in group_ids[: counts[name]])
        if any(count > room[stretch] for stretch, count in taken.items()):
            return {}
        ranks = {stretch: rank for rank, stretch in enumerate(room)}
        found[name] = tuple(ranks[stretch] for stretch in stretches), tuple(taken[stretch] for stretch in ranks)
        left[group_ids] = chosen_of(*found[name], np.arange(len(group_ids))[::-1])
    return found if stays_in_place(flow, left, names) else {}


def chosen_of(stretches: Sequence[int], counts: Sequence[int], order: np.ndarray) -> np.ndarray:
    """Tell which channels stay if of each stretch the last ones in an order do: bool, (channels,)."""
    placed, left = np.asarray(stretches)[order], np.zeros(len(stretches), dtype=np.bool_)
    for stretch, count in enumerate(counts):
        own = order[placed == stretch]
        left[own[len(own) - count :]] = True
    return left


def asked_of(flow: ChannelFlow, entries: Iterable[Mapping[str, Any]], ties: Collection[str]) -> dict[str, int]:
    """Count the channels that should stay of each layer: all, but for those with a ratio and nothing else."""
    asked = {name: layer.channels for name, layer in flow.layers.items()}
    for entry in entries:
        ratio: Any = entry.get("sparse_ratio")
        (name,) = entry["op_names"]
        is_plain = isinstance(ratio, (int, float)) and not isinstance(entry.get("granularity"), list)
        if name in asked and is_plain and name not in ties and "global_group_id" not in entry:
            asked[name] = max(asked[name] - int(asked[name] * ratio), 1)
    return asked


def _moving(flow: ChannelFlow) -> list[list[np.ndarray]]:
    """List what each chunk takes apart, and each view into rows."""
    return [[block for side in each.sides for block in side] for each in flow.blocks if each.moves]


def _routes(flow: ChannelFlow, numbers: Mapping[str, Any]) -> Routes:
    """List, by representative, the pieces that a channel goes to."""
    found: dict[int, tuple[tuple[str, int], ...]] = defaultdict(tuple)
    for node, piece, group_ids in _pieces(flow, numbers):
        for root in group_ids.tolist():
            found[root] = (*found[root], (node, piece))
    return found


def _pieces(flow: ChannelFlow, numbers: Mapping[str, Any]) -> list[tuple[str, int, np.ndarray]]:
    """List the pieces that splits make, by node and place, with the representatives in them, ascending."""
    found = []
    for node in flow.traced.graph.nodes:
        if isinstance(numbers[node.name], (tuple, list)):
            leaves = [leaf for leaf in tree_flatten(numbers[node.name])[0] if isinstance(leaf, Tensor)]
            each = [np.unique(flow.group_ids(compressed(leaf).numpy().ravel())) for leaf in leaves]
            found += [(node.name, place, group_ids) for place, group_ids in enumerate(each)]
    return found
