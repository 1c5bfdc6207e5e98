"""Blocks of a list that are taken out: the others renumbered, and a note of which are left, for files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_NOTE = "kept_blocks"


def take_out(model: nn.Module, parent: str, first: int, count: int) -> None:
    """Take so many blocks out of an ``nn.ModuleList`` or ``nn.Sequential``, from a number on, in place."""
    container: Any = model.get_submodule(parent)
    kept = list(getattr(container, _NOTE, range(len(container))))
    del container[first : first + count]
    del kept[first : first + count]
    setattr(container, _NOTE, tuple(kept))
    # By their numbers the layers of Transformers find what they cached.
    for block in list(container)[first:]:
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx -= count


def kept_blocks(model: nn.Module) -> dict[str, list[int]]:
    """Return which of a model's first blocks are left, by the names of the lists that lost any."""
    return {name: list(getattr(module, _NOTE)) for name, module in model.named_modules() if hasattr(module, _NOTE)}


def take_out_others(model: nn.Module, kept: Mapping[str, list[int]]) -> None:
    """Take all blocks but some out of a whole model, in place."""
    before = {parent: len(model.get_submodule(parent)._modules) for parent in kept}
    for parent, numbers in kept.items():
        for number in sorted(set(range(before[parent])) - set(numbers), reverse=True):
            take_out(model, parent, number, 1)
    tell_depth(model, {parent: (before[parent], numbers) for parent, numbers in kept.items()})


def tell_depth(model: Any, kept: Mapping[str, tuple[int, list[int]]]) -> None:
    """Let the ``config`` of a model of Transformers say how many blocks are left, where it counts those of one list.

    ``kept``: by list how many there were, and the numbers of those that are left.
    """
    config: Any = getattr(model, "config", None)
    count, numbers = next(iter(kept.values()), (0, []))
    if len(kept) != 1 or getattr(config, "num_hidden_layers", None) != count or config.is_encoder_decoder:
        return
    config.num_hidden_layers = len(numbers)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == count:
        config.layer_types = [kinds[number] for number in numbers]
