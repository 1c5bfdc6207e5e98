"""Sizes that attributes of a model's modules hold, which its forward splits, slices or views channels by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

Place = tuple[str, str, tuple[int | str, ...]]
"""A module, its attribute, and the keys that lead to a number in it where that is a list or a dict."""


_MANY = 1000  # numbers that an attribute may hold


_DEEP = 4  # lists and dicts within one another


_TABLES = frozenset(vars(nn.Module()))  # PyTorch's own


def numbers_in(value: Any) -> dict[tuple[int | str, ...], int] | None:
    """List the integers in a value by the keys that lead to them: itself, or a list, tuple or dict of plain values.

    None where it holds anything else, as tensors, no integer, or very many.
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
    """Put integers in place of those in a value, by the keys that lead to them; lists and dicts are new ones."""
    if type(value) in (list, tuple):
        return type(value)(with_numbers(each, numbers, (*path, at)) for at, each in enumerate(value))
    if type(value) is dict:
        return {key: with_numbers(each, numbers, (*path, key)) for key, each in value.items()}
    return numbers.get(path, value)


def whole_numbers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """List a model's own modules and attributes that hold integers, see `numbers_in`: with name and key."""
    for name, module in model.named_modules():
        for key, value in () if type(module).__module__.startswith("torch.nn.") else list(vars(module).items()):
            if key not in _TABLES and numbers_in(value) is not None:
                yield module, name, key, value


def sizes_of(model: nn.Module) -> dict[str, Any]:
    """List the numbers that attributes of a model's own modules hold, by full name: int or list of int.

    Of a dict, or of lists within lists, it is a dict of int by the keys that lead to each, joined by slashes.
    """
    sizes: dict[str, Any] = {}
    for _, name, key, value in whole_numbers(model):
        found = numbers_in(value) or {}
        is_flat = type(value) is int or (type(value) in (list, tuple) and len(found) == len(value))
        nested = {"/".join(map(str, path)): each for path, each in found.items()}
        sizes[f"{name}.{key}".lstrip(".")] = (value if type(value) is int else list(value)) if is_flat else nested
    return sizes


def places_of(model: nn.Module) -> dict[str, dict[str, Place]]:
    """List where the numbers of `sizes_of` are: by full name, by the keys that lead to each, joined by slashes."""
    return {
        f"{name}.{key}".lstrip("."): {"/".join(map(str, path)): (name, key, path) for path in numbers_in(value) or {}}
        for _, name, key, value in whole_numbers(model)
    }


def number_at(model: nn.Module, place: Place) -> int | None:
    """Return the number at a place of a model's attributes, None where there is none."""
    name, key, path = place
    return (numbers_in(getattr(model.get_submodule(name), key, None)) or {}).get(path)


def put_sizes(model: nn.Module, sizes: dict[Place, int]) -> None:
    """Write sizes into a model's attributes."""
    for (name, key, path), size in sizes.items():
        module = model.get_submodule(name)
        setattr(module, key, with_numbers(getattr(module, key), {path: size}))
