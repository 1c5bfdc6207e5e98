"""Constraints on the channels of coupled layers that a dependency group can't state.

Layers may share some of their channels only: NNI's groups couple all, one to one. And blocks of channels, those of
grouped layers, group norms and shuffles, may have to lose the same number each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED


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
    """Return the channel ids of layers whose couplings no group of a config_list can state, or that keep some channels.

    Channels with equal ids are coupled; those with a negative one stay. ``with_staying``: also layers of which some
    channels stay and whose couplings a group can state.
    """
    selected, free = set(names), dict[str, set[int]]()
    for name in flow.layers:
        if name in selected:
            free[name] = set(flow.group_ids_of(name).tolist()) - {FIXED}
    found = dict[str, tuple[int, ...]]()
    for group in coupled_names(free):
        all_ids = [flow.group_ids_of(name) for name in group]
        has_staying = any((ids == FIXED).any() and (ids != FIXED).any() for ids in all_ids)
        if _is_stated(flow, group) and (flow.shuffles or not (with_staying and has_staying)):
            continue
        # Channels that stay aren't coupled with one another: each gets an id that no other has, but for those at the
        # same place of layers that are one unit.
        own = dict[bytes, np.ndarray]()
        for name, ids in zip(group, all_ids, strict=True):
            staying = own.setdefault(ids.tobytes(), -flow.channel_ids_of(name))
            found[name] = tuple(np.where(ids == FIXED, staying, ids).tolist())
    return found


def _is_stated(flow: ChannelFlow, names: list[str]) -> bool:
    """Tell whether layers are coupled unit by unit in the same order, and no unit to another of its own layer."""
    first = flow.group_ids(flow.unit_channel_ids(names[0]))
    for name in names[1:]:
        if not np.array_equal(flow.group_ids(flow.unit_channel_ids(name)), first):
            return False
    free = first[first != FIXED]
    return len(np.unique(free)) == len(free)


def blocks_of(flow: ChannelFlow) -> dict[str, int]:
    """Count, for each layer, the blocks that have to lose the same number of channels."""
    all_sides = [side for blocks in flow.blocks for side in blocks.sides]
    counts: dict[str, int] = {}
    for name in flow.layers:
        group_ids = flow.group_ids_of(name)
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
            # Layers that share blocks, joined or shuffled, keep these even if each has evenly many of every block.
            size = sizes[0]
            are_equal = (sizes == size).all() and (starts % size == 0).all() and len(group_ids) % size == 0
            if are_equal:
                counts[name] = math.lcm(counts.get(name, 1), len(group_ids) // size)
    return _with_equal_blocks(flow, counts) if flow.reorders else counts


def _with_equal_blocks(flow: ChannelFlow, counts: dict[str, int]) -> dict[str, int]:
    """Give layers whose channels are shuffled together the same blocks, so that they lose equally many channels."""
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
            # No channel of blocks of one could be pruned.
            if all(width % common == 0 and width > common for width in widths):
                counts |= dict.fromkeys(names, common)
    return counts
