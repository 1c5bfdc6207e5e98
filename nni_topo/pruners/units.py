"""Pruning units: groups of config_list targets that have to lose the same blocks.

NNI hands a pruner one target space per parameter. A *unit* is one such target, or all targets that share a
``dependency_group_id``. It has ``blocks`` scores (one per filter or neuron at the default granularity). They form
``parts`` equal segments, which lose the same number each (NNI's ``internal_metric_block``, for grouped convolutions).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from numpy.typing import NDArray
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.network.channels.constraints import Share
from nni_topo.network.layers.kinds import channel_dimension, masked_channels, output_channels, spread, weight_of

TargetSpaces = dict[str, dict[str, PruningTargetSpace]]
"""NNI's ``{module name: {target name: target space}}``."""
KeptBlocks = dict[str, NDArray[np.bool_]]
"""By unit name, which blocks are kept, boolean ``(blocks,)``."""
ChannelCoupling = Mapping[str, Sequence[int]]
"""``{module name: group id of each output channel}``: channels with equal ids are kept or pruned together."""


@dataclass(frozen=True)
class PruningUnit:
    """Targets that keep and lose the same blocks."""

    name: str  # the targets, joined by "+", e.g. "layer1.conv2.weight+layer1.conv1.weight"
    # Module and target names: first members that lose rows, then members that lose columns, each in network order.
    members: tuple[tuple[str, str], ...]
    blocks: int  # scores that a member has, at least 1
    parts: int  # equal segments of blocks that lose the same count each, at least 1
    elements: int  # tensor elements pruned with one block, over all members
    sparse_ratio: float | None  # this or the threshold is given
    sparse_threshold: float | None
    min_sparse_ratio: float  # bounds of the share of blocks that may be pruned, in [0, 1]
    max_sparse_ratio: float
    global_group_id: int | str | None = None  # units of one id are ranked together
    channels: int = 1  # output channels per block, several for an attention head
    # Group id of each block, (blocks,): blocks with equal ids, in this or other units, are kept or pruned together.
    # Empty if no blocks are coupled.
    ties: tuple[int, ...] = ()
    # If the network shuffles channels and the unit has the ratio that these were made for: each block's segment,
    # (blocks,), and how many blocks of each segment are kept.
    segments: tuple[int, ...] = ()
    shares: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Number of blocks in one part; keeping or losing a row means one block of every part."""
        return self.blocks // self.parts

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the members' modules."""
        return tuple(module for module, _ in self.members)

    def part_name(self, part: int) -> str:
        """Return ``name``, or ``name[part]`` where there are several parts."""
        if self.parts == 1:
            return self.name
        return f"{self.name}[{part}]"

    @property
    def removable_rows(self) -> tuple[int, int]:
        """The fewest and the most rows to prune under the minimum and the maximum ratio; one is always kept."""
        most = min(int(self.rows * self.max_sparse_ratio), self.rows - 1)
        return min(int(self.rows * self.min_sparse_ratio), most), most

    @property
    def is_summed(self) -> bool:
        """Whether a block's score is computed from several elements, so that ties need a tolerance."""
        return self.elements > 1

    def kept_rows(self, removed: int) -> int:
        """Return how many rows are kept if ``removed`` are to be pruned, within the minimum and the maximum ratio."""
        fewest, most = self.removable_rows
        return self.rows - min(max(removed, fewest), most)


def is_active(space: PruningTargetSpace) -> bool:
    """Say whether the config_list asks to prune a target: it has a ratio or a threshold."""
    return space.sparse_ratio is not None or space.sparse_threshold is not None


def in_network_order(model: nn.Module, target_spaces: TargetSpaces) -> TargetSpaces:
    """Return target spaces in the order of the model's modules, because NNI's order depends on the hash seed."""
    names = (name for name, _ in model.named_modules(remove_duplicate=False))
    return {name: target_spaces[name] for name in names if name in target_spaces}


def block_shape(space: PruningTargetSpace) -> tuple[int, ...]:
    """Return the shape of a target's metric, e.g. ``(out_channels, 1, 1, 1)`` for a convolution."""
    target = space.target
    if target is None:
        raise ConfigError(f"a pruned target must be a parameter, got {space.type.value} {space._target_name!r}")
    if space._scaler is None:
        return tuple(target.shape)
    # Only the shape matters: each block is reduced to its first element.
    try:
        return tuple(space._scaler.shrink(target.detach(), lambda block: block[..., 0], keepdim=True).shape)
    except (AssertionError, ArithmeticError, IndexError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"granularity must divide the target's shape {tuple(target.shape)}, got {space.granularity} "
            f"({space._wrapper.name}.{space._target_name})"
        ) from error


def holds_columns(space: PruningTargetSpace) -> bool:
    """Say whether a target loses columns, together with the output channels that these columns read."""
    return isinstance(space.granularity, list) and space.granularity[0] == -1 and space.dependency_group_id is not None


def output_blocks(space: PruningTargetSpace, subject: str, *, takes_norms: bool = False) -> NDArray[np.int64]:
    """Return the output channels of each block of a target, ``(blocks, channels)``; ``takes_norms``: of norms, too."""
    module, blocks = space._wrapper.module, math.prod(block_shape(space))
    channels = (masked_channels(module) if takes_norms else output_channels(module)) or 0
    place = f"{space._wrapper.name}.{space._target_name}"
    if not channels:
        raise ConfigError(
            "a pruned layer must have channels of its own, as a convolution or a linear layer has, got a "
            f"{type(module).__name__} ({place})"
        )
    if weight_of(module).shape != space.target.shape:
        raise ConfigError(
            f"{subject} need the weight of a layer, got another target with a rule of its own ({place}); without one "
            "it loses what the weight loses"
        )
    if space.granularity == "out_channel" and blocks == channels and channel_dimension(module) == 0:
        return np.arange(channels)[:, None]
    if space._scaler is not None:
        owners = spread(module, torch.arange(channels), torch.int32)
        rows = space._scaler.shrink(owners, lambda block: block, keepdim=True).reshape(blocks, -1).sort(1)[0]
        # Some channels may be in no block, such as keys that all heads share.
        size, remainder = divmod(rows.shape[1] * channels, owners.numel())
        rows = rows.unflatten(1, (size, -1)) if size and not remainder else rows[:, None]
        if torch.equal(rows, rows[..., :1].expand_as(rows)) and len(rows[..., 0].unique()) == blocks * rows.shape[1]:
            channels_by_block: NDArray[np.int64] = rows[..., 0].long().cpu().numpy()
            return channels_by_block
    raise ConfigError(
        f"{subject} need layers pruned by output channel, got a {type(module).__name__} of {channels} channels in "
        f"{blocks} blocks of granularity {space.granularity!r} ({place})"
    )


def pruning_units(
    target_spaces: TargetSpaces, ties: ChannelCoupling | None = None, shares: Mapping[str, Share] | None = None
) -> list[PruningUnit]:
    """Group the active targets of a pruner into units, in the order of their first members.

    A group with at least one active member becomes one unit. ``ties`` and ``shares`` come from
    :class:`~nni_topo.DependencyGroups`; units that aren't pruned by output channel ignore them.
    """
    groups: dict[Any, list[tuple[str, str, PruningTargetSpace]]] = {}
    for module_name, spaces in target_spaces.items():
        for target_name, space in spaces.items():
            # NNI also makes a target space for a missing bias.
            if space.type is TargetType.PARAMETER and space.target is None:
                continue
            # Tuples of different lengths, so that no group's key equals a target's.
            grouped = space.dependency_group_id is not None
            key = (space.dependency_group_id,) if grouped else (module_name, target_name)
            groups.setdefault(key, []).append((module_name, target_name, space))
    active = (group for group in groups.values() if any(is_active(space) for _, _, space in group))
    return [_unit(group, ties or {}, shares or {}) for group in active]


def _unit(
    group: list[tuple[str, str, PruningTargetSpace]], ties: ChannelCoupling, shares: Mapping[str, Share]
) -> PruningUnit:
    # Members that make the channels come first, even if a module holds its output projection before them.
    group = sorted(group, key=lambda member: holds_columns(member[2]))
    name = "+".join(f"{module}.{target}" for module, target, _ in group)
    spaces = [space for _, _, space in group]
    rules = {
        key: _common(name, key, (getattr(space, key) for space in spaces))
        for key in ("sparse_ratio", "sparse_threshold", "global_group_id")
    }
    if rules["sparse_ratio"] is not None and rules["sparse_threshold"] is not None:
        raise ConfigError(f"a dependency group must have a ratio or a threshold, got both ({name})")
    blocks = _common(name, "number of blocks", (math.prod(block_shape(space)) for space in spaces))
    # All parts lose equally many blocks, so each member's own segments must consist of whole parts.
    parts = math.lcm(*(int(space.internal_metric_block or 1) for space in spaces))
    if blocks % parts:
        raise ConfigError(f"internal_metric_block must divide the {blocks} blocks, got {parts} ({name})")
    # One member's minimum and maximum ratios hold for all members.
    low = max(space.min_sparse_ratio or 0.0 for space in spaces)
    caps = [space.max_sparse_ratio for space in spaces if space.max_sparse_ratio is not None]
    high = min(caps, default=1.0)
    if low > high:
        raise ConfigError(f"min_sparse_ratio must not exceed max_sparse_ratio, got {low} > {high} ({name})")
    tied, share = _tie_ids(group, ties), next((shares[module] for module, _, _ in group if module in shares), None)
    ratio = min(max(rules["sparse_ratio"] or 0.0, low), high)
    if tied or rules["global_group_id"] is not None or share is None or share.asked != blocks - int(blocks * ratio):
        share = Share(0, (), ())
    return PruningUnit(
        name=name,
        members=tuple((module, target) for module, target, _ in group),
        blocks=blocks,
        parts=1 if share.counts else parts,
        elements=sum(space.target.numel() // blocks for space in spaces),
        channels=channels_of_block(spaces[0]._wrapper.module, blocks),
        min_sparse_ratio=low,
        max_sparse_ratio=high,
        ties=tied,
        segments=share.segments,
        shares=share.counts,
        **rules,
    )


def channels_of_block(module: nn.Module, blocks: int) -> int:
    """Return the number of output channels per block; 1 if the module isn't pruned by output channel."""
    return max((masked_channels(module) or 0) // blocks, 1)


def _tie_ids(group: list[tuple[str, str, PruningTargetSpace]], ties: ChannelCoupling) -> tuple[int, ...]:
    """Return the group id of each block of a unit; empty if it has none, or if its members disagree."""
    id_lists = set()
    for module, _, space in group:
        if module in ties:
            with suppress(ConfigError):  # blocks that aren't whole output channels
                numbers = np.asarray(ties[module])[output_blocks(space, "ties", takes_norms=True)]
                is_whole = bool((numbers == numbers[:, :1]).all())
                block_ids = tuple(numbers[:, 0].tolist()) if is_whole else ()
                id_lists.add(block_ids)
    if len(id_lists) != 1:
        return ()
    return id_lists.pop()


def _common(name: str, key: str, values: Iterable[Any]) -> Any:
    # A member without the key follows those that have it, as in NNI.
    distinct = {value for value in values if value is not None}
    if len(distinct) > 1:
        listing = ", ".join(sorted(map(str, distinct)))
        raise ConfigError(f"the members of a dependency group must share one {key}, got {listing} ({name})")
    if not distinct:
        return None
    return distinct.pop()
