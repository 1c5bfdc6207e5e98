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
    found: dict[tuple[int | str, ...], int] = {}

    def is_plain(each: Any, path: tuple[int | str, ...]) -> bool:
        if type(each) is int:
            found[path] = each
        elif type(each) in (list, tuple, dict):
            inside = each.items() if type(each) is dict else enumerate(each)
            fits = len(path) < _DEEP and len(each) <= _MANY
            return fits and all(type(key) in (int, str) and is_plain(one, (*path, key)) for key, one in inside)
        return isinstance(each, (int, str, float, type(None)))

    return found if is_plain(value, ()) and 0 < len(found) <= _MANY else None


def with_numbers(value: Any, numbers: Mapping[tuple[int | str, ...], int], path: tuple[int | str, ...] = ()) -> Any:
    """Replace integers in a value, by their keys; lists and dicts are copied."""
    if type(value) in (list, tuple):
        return type(value)(with_numbers(each, numbers, (*path, at)) for at, each in enumerate(value))
    if type(value) is dict:
        return {key: with_numbers(each, numbers, (*path, key)) for key, each in value.items()}
    return numbers.get(path, value)


def numbers_read(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """Yield the attributes of modules outside torch.nn that hold integers, see `numbers_in`: module, name, key, value.

    This includes lists in the ``config`` of modules, as in Transformers. The key of such a list has a dot:
    ``config.hidden_sizes``. A config that several modules hold is listed once, with the module that contains the
    others. It is left out if none does, or if another config holds it: then a forward may read numbers that `put_sizes`
    wouldn't reach.
    """
    for name, module in model.named_modules():
        for key, value in () if is_of_torch(module) else list(vars(module).items()):
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
        for each in vars(waiting.pop()).values():
            if callable(getattr(each, "to_dict", None)) and hasattr(each, "__dict__") and id(each) not in inner:
                inner.add(id(each))
                waiting.append(each)
    for key_of_config, config in configs.items():
        first, *others = holders[key_of_config]
        if key_of_config in inner or not all(not first or each.startswith(f"{first}.") for each in others):
            continue
        for key, value in list(vars(config).items()):
            if type(value) in (list, tuple) and numbers_in(value) is not None:
                yield model.get_submodule(first), first, f"config.{key}", value


LAYER_WIDTHS = ("in_channels", "out_channels", "in_features", "out_features", "num_features", "embedding_dim")
"""Attributes of PyTorch's layers and norms that change when these are cut."""


def layer_widths(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, int]]:
    """Yield the widths that layers of torch.nn hold, as a forward may read them: module, name, key, value."""
    for name, module in model.named_modules():
        for key in LAYER_WIDTHS if is_of_torch(module) else ():
            if type(vars(module).get(key)) is int:
                yield module, name, key, vars(module)[key]


def is_of_torch(module: nn.Module) -> bool:
    """Tell whether a module's class is one of torch.nn."""
    return type(module).__module__.startswith("torch.nn.")


def numbers_of(model: nn.Module) -> dict[Place, int]:
    """Return the integers in attributes of modules outside torch.nn, by place.

    This includes timm's descriptions of features, with the key ``feature_info.info``.
    """
    held = [(name, key, value) for _, name, key, value in numbers_read(model)]
    for name, module in model.named_modules():
        described = vars(module).get("feature_info")
        if hasattr(described, "out_indices"):
            held.append((name, "feature_info.info", getattr(described, "info", None)))
    numbers = dict[Place, int]()
    for name, key, value in held:
        for path, number in (numbers_in(value) or {}).items():
            numbers[name, key, path] = number
    return numbers


def put_sizes(model: nn.Module, sizes: dict[Place, int]) -> None:
    """Write sizes into a model's attributes."""
    for (name, key, path), size in sizes.items():
        module = model.get_submodule(name)
        owner, _, listed = key.partition(".")
        if listed:
            held = getattr(module, owner)
            described = copy.copy(held)  # other models may hold the same object
            setattr(described, listed, with_numbers(getattr(described, listed), {path: size}))
            for each in module.modules():  # submodules may hold it too
                if vars(each).get(owner) is held:
                    put_attribute(each, owner, described)
        else:
            put_attribute(module, key, with_numbers(getattr(module, key), {path: size}))
