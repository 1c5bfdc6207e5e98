"""A block as a network of its own: its inputs are the states that enter it, and what it gets beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.inputs import Call, batch_size, bind_arguments, on_device, real_positions, taken
from nni_topo.runs.streaming.skeleton import Skeleton, states_of

STATES, UNPRUNED, PADDING_MASK = "hidden_states", "unpruned_states", "attention_mask"
WANTED = "wanted_states"
"""Inputs of a block's network: states after the pruned blocks, and after the unpruned ones; which places count; and the
states that the block is to reach where blocks after it are removed."""
_EXTRA = "extra{}"
_MOST_EXTRAS = 6  # that `BlockNet.forward` takes


class BlockNet(nn.Module):
    """A block that gets what changes from batch to batch as inputs, and holds what doesn't.

    Parameters
    ----------
    block : torch.nn.Module
        The block.
    config : object
        The model's config, in which the pruned widths are noted.
    frame : Frame
        What the block gets beside the states.
    reads_unpruned : bool, default=False
        Whether the states are those after unpruned blocks.
    """

    def __init__(self, block: nn.Module, config: Any, frame: Frame, *, reads_unpruned: bool = False) -> None:
        super().__init__()
        self.block = block
        self.config = config
        self.frame = frame
        self.reads_unpruned = reads_unpruned

    def forward(
        self,
        hidden_states: Tensor,
        unpruned_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        wanted_states: Tensor | None = None,
        extra0: Tensor | None = None,
        extra1: Tensor | None = None,
        extra2: Tensor | None = None,
        extra3: Tensor | None = None,
        extra4: Tensor | None = None,
        extra5: Tensor | None = None,
    ) -> Tensor:
        """Return the states that leave the block, (samples, places, width)."""
        # Parameters by name, for a graph has no others.
        states = unpruned_states if self.reads_unpruned else hidden_states
        args, kwargs = self.frame.arguments(states, (extra0, extra1, extra2, extra3, extra4, extra5))
        return states_of(self.block(*args, **kwargs))


class WantedStates(nn.Module):
    """Puts out the states that a block is to reach, in the place of blocks that make them.

    Its inputs are copied to ``device``, as those of a model are to the device of its parameters.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.states = nn.Identity()

    def forward(
        self, hidden_states: Tensor, wanted_states: Tensor, attention_mask: Tensor | None = None, **others: Tensor
    ) -> Tensor:
        """Return the wanted states, (samples, places, width)."""
        states: Tensor = self.states(wanted_states)
        return states


class Frame:
    """How a block is called: which arguments are the same for all batches, and which come with each batch."""

    def __init__(self, spec: TreeSpec, constants: dict[int, Any], extras: list[int]) -> None:
        self._spec, self._constants, self._extras = spec, constants, extras

    def __deepcopy__(self, memo: dict[int, Any]) -> Frame:
        return self  # it never changes

    def arguments(self, states: Any, extras: Sequence[Any]) -> Call:
        """Return positional and keyword arguments of the block."""
        leaves: list[Any] = [None] * self._spec.num_leaves
        for place, value in self._constants.items():
            leaves[place] = value
        for place, value in zip(self._extras, extras, strict=False):
            leaves[place] = value
        args, kwargs = tree_unflatten(leaves, self._spec)
        named = {name: states if value is _STATES else value for name, value in kwargs.items()}
        return tuple(states if value is _STATES else value for value in args), named


class _States:
    """Stands in the place of the states."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _States:
        return self


_STATES = _States()


@dataclass(frozen=True)
class Entered:
    """What enters a block in all batches, apart from the states."""

    frame: Frame
    batches: list[dict[str, Any]]  # inputs of `BlockNet` without the states, on the CPU


def entering(skeleton: Skeleton, calls: Sequence[Call], index: int, *, adds_padding: bool = False) -> Entered:
    """Return what the model gives a block beside the states.

    What has an entry for each sample comes with each batch; anything else must be the same for all batches.
    ``adds_padding``: as if a batch had padding, also where none has.
    """
    found = None if adds_padding else _leaves(skeleton, calls, index, adds_padding=False)
    if found is None:
        # A batch without padding may get no mask. With one more sample that has padding, every batch gets one.
        found = _leaves(skeleton, calls, index, adds_padding=True)
    place_of_block = skeleton.name_of(index)
    if found is None:
        raise ConfigError(f"a block must get the same arguments in all batches, got others ({place_of_block})")
    spec, rows, by_sample, places = found
    constants: dict[int, Any] = {}
    extras: list[int] = []
    for place, value in enumerate(rows[0]):
        column = [row[place] for row in rows]
        if place in by_sample:
            extras.append(place)
        elif all(_is_same(value, other) for other in column):
            constants[place] = value
        elif all(isinstance(other, Tensor) and other.dim() > 0 and len(other) == 1 for other in column):
            # It is broadcast over the samples.
            for row, call in zip(rows, calls, strict=True):
                row[place] = row[place].cpu().expand(batch_size(call), *row[place].shape[1:])
            extras.append(place)
        else:
            raise ConfigError(
                "what a block gets beside the states must be the same for all batches or have an entry for each "
                f"sample, got something else; nni_topo.shrink takes such a model in memory ({place_of_block})"
            )
    if len(extras) > _MOST_EXTRAS:
        raise ConfigError(
            f"a block may get at most {_MOST_EXTRAS} tensors with an entry for each sample beside the states, got "
            f"{len(extras)} ({place_of_block})"
        )
    batches: list[dict[str, Any]] = []
    for row, call in zip(rows, calls, strict=True):
        batch: dict[str, Any] = {_EXTRA.format(number): row[place].cpu() for number, place in enumerate(extras)}
        mask = real_positions(bind_arguments(skeleton.model, call))
        if mask is not None and mask.shape[1] == places:
            batch[PADDING_MASK] = mask.long()
        batches.append(batch)
    return Entered(Frame(spec, constants, extras), batches)


def _leaves(
    skeleton: Skeleton, calls: Sequence[Call], index: int, *, adds_padding: bool
) -> tuple[TreeSpec, list[list[Any]], set[int], int] | None:
    """Return a block's arguments, flattened, batch by batch, which of them have samples, and the number of places.

    None if an argument is a tensor in some batches and None in others. ``adds_padding``: the model is called with one
    more sample, which has padding, and what it brings is dropped. The arguments of the first batch lie on the model's
    device, those of the others on the CPU.
    """
    if adds_padding:
        calls = [_with_padding(call) for call in calls]
    spec: TreeSpec | None = None
    rows: list[list[Any]] = []
    length: torch.Size | None = None
    for number, call in enumerate(calls):
        leaves, own, shape = _flat(skeleton, call, index)
        if length is not None and shape != length:
            raise DataError(
                f"samples of all batches must have one length, got {shape[0]} and {length[0]} places: pad or cut them "
                f"(batch {number})"
            )
        length = shape
        if spec is not None and (own != spec or any(_differ(*pair) for pair in zip(leaves, rows[0], strict=True))):
            return None
        spec = own
        # A mask of each batch may take more than a block: no more than one batch's are on the device.
        rows.append(on_device(leaves, torch.device("cpu")) if rows else leaves)
    assert spec is not None  # calibration data have a batch
    assert length is not None
    by_sample: set[int] = set()
    largest = max(range(len(calls)), key=lambda number: batch_size(calls[number]))
    size = batch_size(calls[largest])
    if size > 1:
        # What becomes shorter with fewer samples has an entry for each.
        fewer, _, _ = _flat(skeleton, taken(calls[largest], torch.arange(size - 1)), index)
        for place, (value, other) in enumerate(zip(rows[largest], fewer, strict=True)):
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size:
                is_shorter = isinstance(other, Tensor) and len(other) == size - 1
                if is_shorter or not isinstance(other, Tensor):
                    by_sample.add(place)
    if adds_padding:
        for row in rows:
            for place in by_sample:
                row[place] = row[place][:-1]
    return spec, rows, by_sample, length[0]


def _with_padding(call: Call) -> Call:
    """Return a call with its first sample once more, whose last place is padding; without a mask the call as it is."""
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


def _flat(skeleton: Skeleton, call: Call, index: int) -> tuple[list[Any], TreeSpec, torch.Size]:
    """Return a block's arguments in a call, flattened, and the shape of the states without the samples."""
    args, kwargs = skeleton.entering(call, index)
    states = args[0] if args else kwargs[STATES]
    leaves, spec = tree_flatten(with_states((args, kwargs), _STATES))
    return leaves, spec, states.shape[1:]


def with_states(call: Call, states: Any) -> Call:
    """Return a call of a block with other states."""
    args, kwargs = call
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, STATES: states})


def _differ(one: Any, other: Any) -> bool:
    """Say whether one of two arguments is a tensor and the other isn't."""
    return isinstance(one, Tensor) != isinstance(other, Tensor)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if _differ(one, other):
        return False
    return one is other or bool(one == other)
