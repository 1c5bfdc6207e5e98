"""Blocks of channels that have to lose the same number each: those of grouped layers, group norms and shuffles."""

from __future__ import annotations

import math

import numpy as np

from nni_topo.network.channels.flow import ChannelFlow


def blocks_of(flow: ChannelFlow) -> dict[str, int]:
    """Count, for each layer, the blocks that have to lose the same number of channels."""
    counts: dict[str, int] = {}
    for name in flow.layers:
        roots = flow.layer_roots(name)
        for side in (side for blocks in flow.blocks for side in blocks.sides):
            owner = {root: rank for rank, block in enumerate(side) for root in flow.roots(block).tolist()}
            ranks = np.array([owner.get(root, -1) for root in roots.tolist()])
            starts = np.flatnonzero(np.diff(ranks, prepend=-2) != 0)
            sizes = np.diff([*starts, len(ranks)])[ranks[starts] >= 0]
            # Layers that share blocks, joined or shuffled, keep these even if each has evenly many of every block.
            if (
                len(sizes)
                and (sizes == sizes[0]).all()
                and (starts % sizes[0] == 0).all()
                and len(roots) % sizes[0] == 0
            ):
                counts[name] = math.lcm(counts.get(name, 1), len(roots) // sizes[0])
    return _leveled(flow, counts) if flow.reorders else counts


def _leveled(flow: ChannelFlow, counts: dict[str, int]) -> dict[str, int]:
    """Give layers whose channels are shuffled together the same blocks: of others they'd lose another number."""
    arriving = [flow.roots(np.concatenate([each for side in blocks.sides for each in side])) for blocks in flow.blocks]
    made = [name for name, layer in flow.layers.items() if not layer.depthwise]  # the others follow
    met = [{name for name in made if np.isin(flow.layer_roots(name), roots).any()} for roots in arriving]
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
