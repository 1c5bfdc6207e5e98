"""Tensors that several modules of a model share (tied weights): find them, untie them and tie them again.

A tied weight is one object in two modules: masking, cutting or loading it in one module would change the other too. So
work on single layers begins with a copy of the model in which each module has its own tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

SharedNames = list[list[str]]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, persistent or not; a shared tensor appears under each of its names."""
    buffers = model.named_buffers(remove_duplicate=False)
    return dict(model.named_parameters(remove_duplicate=False)) | dict(buffers)


def find_ties(model: nn.Module) -> SharedNames:
    """List the parameters and buffers that two or more modules share: the full names of each, in order of modules."""
    places: dict[int, list[str]] = {}
    # named_modules lists a module with several names once, under its first name.
    for name, module in model.named_modules():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                places.setdefault(id(tensor), []).append(f"{name}.{own}" if name else own)
    return [names for names in places.values() if len(names) > 1]


def first_names(model: nn.Module) -> dict[str, str]:
    """Map all names of each shared tensor to the first of them, whether NNI has wrapped the modules or not."""
    plain = [[name.replace("._nni_wrapper.", ".") for name in names] for names in find_ties(model)]
    return {name: names[0] for names in plain for name in names}


def parameter_holders(model: nn.Module) -> Counter[int]:
    """Count the modules that hold each parameter, by its ``id``."""
    tables = (module._parameters for module in model.modules())
    return Counter(id(parameter) for table in tables for parameter in table.values() if parameter is not None)


def untie(model: nn.Module, ties: Iterable[Iterable[str]]) -> None:
    """Replace shared tensors, as listed by `find_ties`, by copies under every name but the first."""
    for _, *others in ties:
        for name in others:
            table, own = _place(model, name)
            table[own] = _copied(table[own])


def tie_again(model: nn.Module, ties: Iterable[Iterable[str]]) -> None:
    """Share one tensor again among names whose tensors are still equal; no value changes."""
    for names in ties:
        leaders: list[Tensor] = []
        for name in names:
            table, own = _place(model, name)
            tensor = table.get(own)
            if tensor is None:  # a pruned layer may have lost the tensor
                continue
            leader = next((each for each in leaders if _alike(each, tensor)), tensor)
            table[own] = leader
            leaders += [tensor] if leader is tensor else []


def _alike(one: Tensor, other: Tensor) -> bool:
    kinds = [(type(each), each.dtype, each.device, each.shape, each.requires_grad) for each in (one, other)]
    return kinds[0] == kinds[1] and torch.equal(one, other)


def _copied(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the module's dict that holds a tensor (parameters or buffers), and the tensor's key in it."""
    module_name, _, own = name.rpartition(".")
    module = model.get_submodule(module_name)
    return module._parameters if own in module._parameters else module._buffers, own


def find_aliases(model: nn.Module) -> SharedNames:
    """List all names of each module that has several names."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return [aliases for aliases in names.values() if len(aliases) > 1]


def share_modules(model: nn.Module, aliases: Iterable[Iterable[str]]) -> None:
    """Register the module with the first of some names under the other names too."""
    for first, *others in aliases:
        for name in others:
            model.set_submodule(name, model.get_submodule(first))
