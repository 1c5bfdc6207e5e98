"""A block as a separate network, whose inputs are the states and the block's other arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.inputs import Call, batch_size, bind_arguments, on_device, real_positions, take_samples
from nni_topo.runs.streaming.skeleton import Skeleton, states_in, states_of

UNPRUNED, PADDING_MASK = "unpruned_states", "attention_mask"
"""Inputs of a block's network besides `STATES`, the states after the pruned blocks: the states after the unpruned
blocks, and the padding mask."""
_EXTRA = "extra{}"
_MOST_EXTRAS = 6  # number of extra tensors that `BlockNet.forward` takes


class BlockNet(nn.Module):
    """A block whose inputs are the arguments that differ between batches; it holds the others."""

    def __init__(self, block: nn.Module, frame: Frame, *, reads_unpruned: bool = False) -> None:
        super().__init__()
        self.block = block
        self.frame = frame  # the block's other arguments
        self.reads_unpruned = reads_unpruned  # whether it takes the states after the unpruned blocks

    def forward(
        self,
        hidden_states: Tensor,
        unpruned_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        extra0: Tensor | None = None,
        extra1: Tensor | None = None,
        extra2: Tensor | None = None,
        extra3: Tensor | None = None,
        extra4: Tensor | None = None,
        extra5: Tensor | None = None,
    ) -> Tensor:
        """Return the states after the block, (samples, places, width)."""
        # Named parameters, because a traced graph has no variadic ones.
        states = unpruned_states if self.reads_unpruned else hidden_states
        args, kwargs = self.frame.arguments(states, (extra0, extra1, extra2, extra3, extra4, extra5))
        return states_of(self.block(*args, **kwargs))


@dataclass(frozen=True)
class Frame:
    """The arguments of a block that are the same for all batches, and the indices of the others."""

    spec: TreeSpec  # structure of the positional and keyword arguments
    leaves: list[Any]  # the flattened arguments; None for those that differ between batches
    states: int  # index of the states among them
    extras: list[int]  # indices of tensors with an entry for each sample

    def __deepcopy__(self, memo: dict[int, Any]) -> Frame:
        return self  # it never changes

    def arguments(self, states: Any, extras: Sequence[Any]) -> Call:
        """Return positional and keyword arguments of the block."""
        leaves = list(self.leaves)
        leaves[self.states] = states
        for place, value in zip(self.extras, extras, strict=False):
            leaves[place] = value
        call: Call = tree_unflatten(leaves, self.spec)
        return call


def entering(
    skeleton: Skeleton, calls: Sequence[Call], index: int, *, adds_padding: bool = False
) -> tuple[Frame, list[dict[str, Any]]]:
    """Return a block's arguments besides the states: the frame, and for each batch inputs of `BlockNet` on the CPU.

    Only tensors with an entry for each sample may differ between batches.
    ``adds_padding``: call the model with one more sample, which has padding, and drop that sample afterwards: otherwise
    a batch without padding may get no mask, while others get one.
    """
    place_of_block = skeleton.name_of(index)
    given = [_with_padding(call) for call in calls] if adds_padding else calls
    rows: list[list[Any]] = []
    first: tuple[TreeSpec, int, torch.Size] | None = None
    for number, call in enumerate(given):
        leaves, spec, at, shape = _flat(skeleton, call, index)
        first = first or (spec, at, shape)
        if shape != first[2]:
            raise DataError(
                f"samples of all batches must have one length, got {shape[0]} and {first[2][0]} places: pad or cut "
                f"them (batch {number})"
            )
        if rows and (spec != first[0] or list(map(_is_tensor, leaves)) != list(map(_is_tensor, rows[0]))):
            raise ConfigError(f"a block must get the same arguments in all batches, got others ({place_of_block})")
        # Masks of all batches may be larger than a block, so only one batch's arguments are on the device.
        rows.append(on_device(leaves, torch.device("cpu")) if rows else leaves)
    assert first is not None  # calibration data have a batch
    spec, at, shape = first
    by_sample: set[int] = set()
    largest = max(range(len(given)), key=lambda number: batch_size(given[number]))
    size = batch_size(given[largest])
    if size > 1:
        # A tensor that is shorter or missing with one sample fewer has an entry for each sample.
        fewer, *_ = _flat(skeleton, take_samples(given[largest], torch.arange(size - 1)), index)
        for place, (value, other) in enumerate(zip(rows[largest], fewer, strict=True)):
            may_have = _is_tensor(value) and value.dim() > 0 and len(value) == size
            if may_have and (not _is_tensor(other) or len(other) == size - 1):
                by_sample.add(place)
    extras: list[int] = []
    for place, value in enumerate(rows[0]):
        column = [row[place] for row in rows]
        if place in by_sample:
            extras.append(place)
            for row in rows:
                row[place] = row[place][:-1] if adds_padding else row[place]
        elif all(_is_same(value, other) for other in column):
            continue
        elif all(_is_tensor(other) and other.dim() > 0 and len(other) == 1 for other in column):
            # A tensor of length 1 is broadcast over the samples.
            extras.append(place)
            for row, call in zip(rows, calls, strict=True):
                row[place] = row[place].expand(batch_size(call), *row[place].shape[1:])
        else:
            raise ConfigError(
                "a block's arguments besides the states must be the same for all batches or have an entry for each "
                f"sample, got something else; nni_topo.shrink takes such a model in memory ({place_of_block})"
            )
    if len(extras) > _MOST_EXTRAS:
        raise ConfigError(
            f"a block may get at most {_MOST_EXTRAS} tensors with an entry for each sample besides the states, got "
            f"{len(extras)} ({place_of_block})"
        )
    batches: list[dict[str, Any]] = []
    for row, call in zip(rows, calls, strict=True):
        batch: dict[str, Any] = {_EXTRA.format(number): row[place].cpu() for number, place in enumerate(extras)}
        mask = real_positions(bind_arguments(skeleton.model, call))
        if mask is not None and mask.shape[1] == shape[0]:
            batch[PADDING_MASK] = mask.long()
        batches.append(batch)
    leaves = [None if place in extras else value for place, value in enumerate(rows[0])]
    return Frame(spec, leaves, at, extras), batches


def _flat(skeleton: Skeleton, call: Call, index: int) -> tuple[list[Any], TreeSpec, int, torch.Size]:
    """Return a block's flattened arguments without the states, their structure, and the states' index and shape."""
    entered = skeleton.entering(call, index)
    states = states_in(entered)
    leaves, spec = tree_flatten(entered)
    at = next(place for place, leaf in enumerate(leaves) if leaf is states)
    leaves[at] = None
    return leaves, spec, at, states.shape[1:]


def _with_padding(call: Call) -> Call:
    """Append the first sample again with its last place as padding; a call without a mask is returned unchanged."""
    args, kwargs = call
    mask = kwargs.get(PADDING_MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return call
    count = batch_size(call)
    longer = {}
    for name, value in kwargs.items():
        has_samples = isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
        longer[name] = torch.cat([value, value[:1]]) if has_samples else value
    longer[PADDING_MASK] = longer[PADDING_MASK].clone()
    longer[PADDING_MASK][-1, -1] = 0
    return args, longer


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    return one is other or bool(one == other)
