"""What pruning the channels of coupled layers has to heed beyond a dependency group.

Layers may share some of their channels only, which no group can state: NNI's groups couple all, one to one. And blocks
of channels, those of grouped layers, group norms and shuffles, may have to lose the same number each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED


def coupled_names(owned: Mapping[str, set[int]]) -> list[list[str]]:
    """Group names that share a number, directly or through others; groups and names in the mapping's order."""
    from scipy.cluster.hierarchy import DisjointSet  # takes 30 ms to import

    sets = DisjointSet(owned)
    first_owner: dict[int, str] = {}
    for name, ids in owned.items():
        # One merge per owner, not per number: layers share thousands of channels with a few others.
        for owner in {first_owner.setdefault(number, name) for number in ids}:
            sets.merge(owner, name)
    groups: dict[str, list[str]] = {}
    for name in owned:
        groups.setdefault(sets[name], []).append(name)
    return list(groups.values())


def partial_couplings(flow: ChannelFlow, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Number the channels of layers, (channels,) each, of which a group can't say all: equal numbers go together."""
    chosen = [name for name in flow.layers if name in set(names)]
    free = {name: set(flow.group_ids_of(name).tolist()) - {FIXED} for name in chosen}
    return {
        name: _numbers(flow, name) for group in coupled_names(free) if not _is_stated(flow, group) for name in group
    }


def _is_stated(flow: ChannelFlow, names: list[str]) -> bool:
    """Tell whether layers are tied bundle i to bundle i, and no bundle to another of its own layer."""
    group_ids = [flow.group_ids(flow.unit_channel_ids(name)).tolist() for name in names]
    free = [group_id for group_id in group_ids[0] if group_id != FIXED]
    return all(each == group_ids[0] for each in group_ids) and len(set(free)) == len(free)


def _numbers(flow: ChannelFlow, name: str) -> tuple[int, ...]:
    group_ids = flow.group_ids_of(name)
    # Channels that stay aren't tied to one another, so each gets a number that no other has.
    return tuple(np.where(group_ids == FIXED, -flow.channel_ids_of(name), group_ids).tolist())


def blocks_of(flow: ChannelFlow) -> dict[str, int]:
    """Count, for each layer, the blocks that have to lose the same number of channels."""
    counts: dict[str, int] = {}
    for name in flow.layers:
        group_ids = flow.group_ids_of(name)
        for side in (side for blocks in flow.blocks for side in blocks.sides):
            owner = {group_id: rank for rank, block in enumerate(side) for group_id in flow.group_ids(block).tolist()}
            ranks = np.array([owner.get(group_id, -1) for group_id in group_ids.tolist()])
            starts = np.flatnonzero(np.diff(ranks, prepend=-2) != 0)
            sizes = np.diff([*starts, len(ranks)])[ranks[starts] >= 0]
            # Layers that share blocks, joined or shuffled, keep these even if each has evenly many of every block.
            if (
                len(sizes)
                and (sizes == sizes[0]).all()
                and (starts % sizes[0] == 0).all()
                and len(group_ids) % sizes[0] == 0
            ):
                counts[name] = math.lcm(counts.get(name, 1), len(group_ids) // sizes[0])
    return _leveled(flow, counts) if flow.reorders else counts


def _leveled(flow: ChannelFlow, counts: dict[str, int]) -> dict[str, int]:
    """Give layers whose channels are shuffled together the same blocks: of others they'd lose another number."""
    arriving = [
        flow.group_ids(np.concatenate([each for side in blocks.sides for each in side])) for blocks in flow.blocks
    ]
    made = [name for name, layer in flow.layers.items() if not layer.depthwise]  # the others follow
    met = [{name for name in made if np.isin(flow.group_ids_of(name), group_ids).any()} for group_ids in arriving]
    before: dict[str, int] = {}
    while before != counts:
        before = dict(counts)
        for names in met:
            common = math.lcm(*(counts.get(name, 1) for name in names))
            widths = [flow.layers[name].channels for name in names]
            # In blocks of one channel none could go.
            if all(width % common == 0 and width > common for width in widths):
                counts |= dict.fromkeys(names, common)
    return counts
