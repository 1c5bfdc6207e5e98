"""Layers that share some of their channels, which no dependency group can state: NNI's groups tie all, one to one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.rules import FIXED


def meeting(owned: Mapping[str, set[int]]) -> list[list[str]]:
    """Group names that share a number, directly or through others; groups and names in the mapping's order."""
    from scipy.cluster.hierarchy import DisjointSet  # takes 30 ms to import

    sets = DisjointSet(owned)
    first_owner: dict[int, str] = {}
    for name, numbers in owned.items():
        # One merge per owner, not per number: layers share thousands of channels with a few others.
        for owner in {first_owner.setdefault(number, name) for number in numbers}:
            sets.merge(owner, name)
    groups: dict[str, list[str]] = {}
    for name in owned:
        groups.setdefault(sets[name], []).append(name)
    return list(groups.values())


def partial_ties(flow: ChannelFlow, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Number the channels of layers, (channels,) each, of which a group can't say all: equal numbers go together."""
    chosen = [name for name in flow.layers if name in set(names)]
    free = {name: set(flow.layer_roots(name).tolist()) - {FIXED} for name in chosen}
    return {name: _numbers(flow, name) for group in meeting(free) if not _is_stated(flow, group) for name in group}


def _is_stated(flow: ChannelFlow, names: list[str]) -> bool:
    """Tell whether layers are tied bundle i to bundle i, and no bundle to another of its own layer."""
    roots = [flow.roots(flow.bundle_numbers(name)).tolist() for name in names]
    free = [root for root in roots[0] if root != FIXED]
    return all(each == roots[0] for each in roots) and len(set(free)) == len(free)


def _numbers(flow: ChannelFlow, name: str) -> tuple[int, ...]:
    roots = flow.layer_roots(name)
    # Channels that stay aren't tied to one another, so each gets a number that no other has.
    return tuple(np.where(roots == FIXED, -flow.layer_numbers(name), roots).tolist())
