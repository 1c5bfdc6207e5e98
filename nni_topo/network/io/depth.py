"""Models without some of their blocks, or parts of blocks: how they are taken out, and how a file says which.

A block of an ``nn.ModuleList`` or ``nn.Sequential`` goes as a whole, and those after it get lower numbers. A part of a
block, such as its attention, is called by the block's forward: something that adds nothing takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.network.runtime import tensors_of

_NOTE = "kept_blocks"


def take_out(model: nn.Module, parent: str, first: int, count: int) -> None:
    """Take ``count`` blocks out of an ``nn.ModuleList`` or ``nn.Sequential``, from number ``first`` on, in place."""
    container: Any = model.get_submodule(parent)
    kept = list(getattr(container, _NOTE, range(len(container))))
    del container[first : first + count]
    del kept[first : first + count]
    setattr(container, _NOTE, tuple(kept))
    # Layers of Transformers look up their cached states by these numbers.
    for block in list(container)[first:]:
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx -= count


def kept_blocks(model: nn.Module) -> dict[str, list[int]]:
    """Return the numbers of the blocks that are kept, by the names of the lists that lost any."""
    return {name: list(getattr(module, _NOTE)) for name, module in model.named_modules() if hasattr(module, _NOTE)}


def take_out_others(model: nn.Module, kept: Mapping[str, list[int]]) -> None:
    """Take all blocks but the ``kept`` ones out of an unpruned model, in place."""
    before = {parent: len(model.get_submodule(parent)._modules) for parent in kept}
    for parent, numbers in kept.items():
        for number in sorted(set(range(before[parent])) - set(numbers), reverse=True):
            take_out(model, parent, number, 1)
    tell_depth(model, {parent: (before[parent], numbers) for parent, numbers in kept.items()})


def tell_depth(model: Any, kept: Mapping[str, tuple[int, list[int]]]) -> None:
    """Set the number of blocks in the ``config`` of a model of Transformers, if that describes one list of blocks.

    ``kept``: by list, how many blocks there were, and the numbers of those that are kept.
    """
    config: Any = getattr(model, "config", None)
    count, numbers = next(iter(kept.values()), (0, []))
    if len(kept) != 1 or getattr(config, "num_hidden_layers", None) != count or config.is_encoder_decoder:
        return
    config.num_hidden_layers = len(numbers)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == count:
        config.layer_types = [kinds[number] for number in numbers]


class RemovedPart(nn.Module):
    """Takes the place of a part of a block that was removed, and adds nothing to the stream.

    Parameters
    ----------
    outputs : int, default=0
        The length of the tuple that the part returned, whose first entry is zeros and all others None; 0: it returned a
        tensor.
    """

    def __init__(self, outputs: int = 0) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros of the shape of the first tensor."""
        zeros: Tensor = torch.zeros_like(tensors_of((args, kwargs))[0])
        return (zeros, *[None] * (self.outputs - 1)) if self.outputs else zeros


def take_out_part(model: nn.Module, name: str, outputs: int) -> None:
    """Take a part of a block out, in place; ``outputs`` as for `RemovedPart`."""
    parent, _, key = name.rpartition(".")
    removed = RemovedPart(outputs)
    removed.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), key, removed)


def removed_parts(model: nn.Module) -> dict[str, int]:
    """Return the parts that were taken out of blocks, with the lengths of the tuples that they returned."""
    return {name: module.outputs for name, module in model.named_modules() if isinstance(module, RemovedPart)}
