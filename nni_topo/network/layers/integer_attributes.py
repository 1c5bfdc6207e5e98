"""Integers in a model's attributes: where they are, and how to replace them.

This module doesn't know what a number counts: `network.graph.traced_int` finds it out if a forward reads the number,
and the table in `network.speedup.width_attributes` says it for other attributes.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from nni_topo.network.runtime.modules import put_attribute

Place = tuple[str, str, tuple[int | str, ...]]
"""A module, its attribute, and the keys that lead to a number in it if it is a list or a dict."""

_MANY = 1000  # at most so many numbers in an attribute
_DEEP = 4  # at most so many nested lists and dicts
# PyTorch's own attributes, and the line numbers of torch.fx's modules.
_TABLES = {*vars(nn.Module()), "_lineno_map", "_prologue_start"}


def numbers_in(value: Any) -> dict[tuple[int | str, ...], int] | None:
    """List the integers in a value by their keys: the value itself, or those in a list, tuple or dict of plain values.

    None if it holds anything else, such as tensors, no integer, or more than 1000.
    """
    numbers: dict[tuple[int | str, ...], int] = {}

    def is_plain(content: Any, path: tuple[int | str, ...]) -> bool:
        if type(content) is int:
            numbers[path] = content
        elif type(content) in (list, tuple, dict):
            inside = content.items() if type(content) is dict else enumerate(content)
            fits = len(path) < _DEEP and len(content) <= _MANY
            return fits and all(type(key) in (int, str) and is_plain(inner, (*path, key)) for key, inner in inside)
        return isinstance(content, (int, str, float, type(None)))

    if is_plain(value, ()) and 0 < len(numbers) <= _MANY:
        return numbers
    return None


def with_numbers(value: Any, numbers: Mapping[tuple[int | str, ...], int], path: tuple[int | str, ...] = ()) -> Any:
    """Replace integers in a value, by their keys; lists and dicts are copied."""
    if type(value) in (list, tuple):
        return type(value)(with_numbers(part, numbers, (*path, at)) for at, part in enumerate(value))
    if type(value) is dict:
        return {key: with_numbers(part, numbers, (*path, key)) for key, part in value.items()}
    return numbers.get(path, value)


def numbers_read(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """Yield the attributes of modules outside torch.nn that hold integers, see `numbers_in`: module, name, key, value.

    This includes lists in the ``config`` of modules, as in Transformers. The key of such a list has a dot:
    ``config.hidden_sizes``. A config that several modules hold is listed once, with the module that contains the
    others. It is left out if none does, or if another config holds it: then a forward may read numbers that `put_sizes`
    wouldn't reach.
    """
    for name, module in model.named_modules():
        if not is_of_torch(module):
            for key, value in list(vars(module).items()):
                if key not in _TABLES and numbers_in(value) is not None:
                    yield module, name, key, value
    holders: dict[int, list[str]] = defaultdict(list)
    configs = dict[int, Any]()
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if callable(getattr(config, "to_dict", None)) and not isinstance(config, type):
            configs[id(config)] = config
            holders[id(config)].append(name)
    inner, waiting = set[int](), list(configs.values())
    while waiting:
        for attribute in vars(waiting.pop()).values():
            if (
                callable(getattr(attribute, "to_dict", None))
                and hasattr(attribute, "__dict__")
                and id(attribute) not in inner
            ):
                inner.add(id(attribute))
                waiting.append(attribute)
    for key_of_config, config in configs.items():
        first, *other_names = holders[key_of_config]
        if key_of_config in inner or not all(
            not first or holder_name.startswith(f"{first}.") for holder_name in other_names
        ):
            continue
        for key, value in list(vars(config).items()):
            if type(value) in (list, tuple) and numbers_in(value) is not None:
                yield model.get_submodule(first), first, f"config.{key}", value


LAYER_WIDTHS = ("in_channels", "out_channels", "in_features", "out_features", "num_features", "embedding_dim")
"""Attributes of PyTorch's layers and norms that change when these are cut."""


def layer_widths(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, int]]:
    """Yield the widths that layers of torch.nn hold, as a forward may read them: module, name, key, value."""
    for name, module in model.named_modules():
        if is_of_torch(module):
            for key in LAYER_WIDTHS:
                if type(vars(module).get(key)) is int:
                    yield module, name, key, vars(module)[key]


def is_of_torch(module: nn.Module) -> bool:
    """Tell whether a module's class is one of torch.nn."""
    return type(module).__module__.startswith("torch.nn.")


def numbers_of(model: nn.Module) -> dict[Place, int]:
    """Return the integers in attributes of modules outside torch.nn, by place.

    This includes timm's descriptions of features, with the key ``feature_info.info``.
    """
    attributes = [(name, key, value) for _, name, key, value in numbers_read(model)]
    for name, module in model.named_modules():
        described = vars(module).get("feature_info")
        if hasattr(described, "out_indices"):
            attributes.append((name, "feature_info.info", getattr(described, "info", None)))
    numbers = dict[Place, int]()
    for name, key, value in attributes:
        for path, number in (numbers_in(value) or {}).items():
            numbers[name, key, path] = number
    return numbers


def put_sizes(model: nn.Module, sizes: dict[Place, int]) -> None:
    """Write sizes into a model's attributes."""
    for (name, key, path), size in sizes.items():
        module = model.get_submodule(name)
        owner, _, listed = key.partition(".")
        if listed:
            original = getattr(module, owner)
            described = copy.copy(original)  # other models may hold the same object
            setattr(described, listed, with_numbers(getattr(described, listed), {path: size}))
            for submodule in module.modules():  # submodules may hold it too
                if vars(submodule).get(owner) is original:
                    put_attribute(submodule, owner, described)
        else:
            put_attribute(module, key, with_numbers(getattr(module, key), {path: size}))
