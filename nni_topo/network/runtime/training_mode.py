"""Training and evaluation mode of a user's model, whose own ``train`` or ``eval`` may do more than set modes.

Such a method may freeze batch norms, forget cached values, or note the mode in an attribute of its own: it is called.
It may also change weights, as where adapters are merged for evaluation or averages of weights are swapped in: then all
that it has done is put back, and the modes alone are set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nni_topo.errors import raised
from nni_topo.network.runtime.memory import out_of_memory

_Change = tuple[dict[str, Any], str, Any, Any]  # a table, a name in it, its value before and after
_MISSING = object()
_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and every module of theirs back into its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    changes = [change for model in models for change in _put(model, False)]
    try:
        yield
    finally:
        for table, name, before, after in reversed(changes):
            if table.get(name, _MISSING) is not after:
                continue  # somebody else has changed it since
            if before is _MISSING:
                del table[name]
            else:
                table[name] = before
        for module, mode in modes:
            put_mode(module, mode)


def evaluating(model: Any) -> Any:
    """Put a model into evaluation mode and return it, also where an ``eval`` or ``train`` of its own returns nothing.

    A ``train`` that keeps batch norms frozen often forgets to return the model.
    """
    _put(model, False)
    return model


def training(model: Any) -> Any:
    """Put a model into training mode and return it."""
    _put(model, True)
    return model


def forget_evaluated(model: nn.Module) -> None:
    """Let modules forget what they compute once for evaluation mode, such as LeViT's biases by position.

    They forget it in training mode; a model that refuses that mode, as one for inference alone does, or changes weights
    in it, forgets nothing. Afterwards every module is in its own mode again.
    """
    if not has_own_modes(model):
        return
    modes = [(module, module.training) for module in model.modules()]
    _call(model, model.train)
    _put(model, False)
    for module, mode in modes:
        put_mode(module, mode)


def put_modes_of(given: nn.Module, evaluated: nn.Module, dense: nn.Module) -> None:
    """Put a smaller network, made from a model's evaluated copy, into the modes of the model, module by module.

    The network's own ``train`` and ``eval`` are called, as a user would call them; where one of these fails or changes
    weights, the modes alone are set. Numbers and texts in attributes that the copy's ``eval`` has changed and no method
    of the network puts back are those of the model again.
    """
    own = dict(dense.named_modules(remove_duplicate=False))
    given_modules = dict(given.named_modules())
    if has_own_modes(dense):
        # A module whose mode is another than that of the module that holds it comes after it.
        for name, module in given_modules.items():
            if name in own and own[name].training != module.training and has_own_modes(own[name]):
                _put(own[name], module.training)
                own = dict(dense.named_modules(remove_duplicate=False))  # the method may have replaced modules
        others = dict(evaluated.named_modules(remove_duplicate=False))
        for name, module in given_modules.items():
            if name in own and name in others:
                _put_back_values(module, others[name], own[name])
    for name, module in given_modules.items():
        if name in own:
            put_mode(own[name], module.training)


def _put_back_values(given: nn.Module, evaluated: nn.Module, dense: nn.Module) -> None:
    """Give a module of a smaller network the values that ``eval`` has changed in a copy of the given one."""
    before, after, now = (_plain_values(module) for module in (given, evaluated, dense))
    for name, value in after.items():
        changed = before.get(name, _MISSING) != value
        if not changed or now.get(name, _MISSING) != value:
            continue
        if name in before:
            vars(dense)[name] = before[name]
        elif not any(name in table for table in _tables(given)):  # nor is it another kind of attribute there
            del vars(dense)[name]


def _plain_values(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    return {name: value for name, value in vars(module).items() if type(value) in _PLAIN and name != "training"}


def put_mode(module: nn.Module, mode: bool) -> None:
    """Set the mode of one module."""
    if module.training != mode:
        module.training = mode


def has_own_modes(model: nn.Module) -> bool:
    """Say whether a module, or one within it, has a ``train`` or ``eval`` of its own."""
    return any(
        type(module).train is not nn.Module.train
        or type(module).eval is not nn.Module.eval
        or not {"train", "eval"}.isdisjoint(vars(module))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    )


def failures_in_own_modes(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[tuple[str, str]]:
    """Call a model's ``eval``, ``train`` and ``eval`` as a user does, run it before and after each; return the errors.

    Whatever the methods do to the model stays, so it should be a copy.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    run : callable
        Runs the model.

    Returns
    -------
    list of (str, str)
        For each of the four steps what was called, empty for none, and what failed: empty, or the error with where it
        was raised.
    """
    found = []
    for name in ("", "eval", "train", "eval"):
        failure, place = "", "it raises"
        try:
            if name:
                getattr(model, name)()
            place = "after it the forward raises"
            run(model)
        except Exception as error:  # a user's method or forward may raise anything
            # Whether there is enough memory says nothing about the model.
            failure = "" if out_of_memory(error) else f"{place} {raised(error)}"
        found.append((name, failure))
    return found


def _put(model: nn.Module, mode: bool) -> list[_Change]:
    """Put a model into a mode, unless all its modules are in it; return what else that changed of their attributes."""
    if all(module.training == mode for module in model.modules()):
        return []
    method = model.train if mode else model.eval
    if not has_own_modes(model):
        method()
        return []
    changes = _call(model, method)
    if changes is None:
        for module in model.modules():
            put_mode(module, mode)
    return changes or []


def _call(model: nn.Module, method: Callable[[], Any]) -> list[_Change] | None:
    """Call a model's ``train`` or ``eval``; return the attributes that it changed, besides modes.

    None if it raises an error or changes weights: then all is as it was before.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    tables = [table for module in modules for table in _tables(module)]
    before = [dict(table) for table in tables]
    weights = _weights(model)
    values = [tensor.detach().clone() for tensor in weights.values()]
    try:
        method()
        is_same = _are_same(weights, values, _weights(model))
    except Exception:  # a user's method may raise anything
        is_same = False
    if not is_same:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
        for tensor, value in zip(weights.values(), values, strict=True):
            if tensor.shape != value.shape:  # another tensor's values were put in place of these
                tensor.data = value
            elif not torch.equal(tensor.detach(), value):
                tensor.data.copy_(value)
        return None
    return [
        (table, name, entries.get(name, _MISSING), table.get(name, _MISSING))
        for table, entries in zip(tables, before, strict=True)
        for name in {**entries, **table}
        if name != "training" and entries.get(name, _MISSING) is not table.get(name, _MISSING)
    ]


def _tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    parameters: dict[str, Any] = module._parameters
    return vars(module), parameters, module._buffers, module._modules


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model learns and saves: its parameters, and its buffers but for those that hold cached values."""
    found = dict[str, Tensor](model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}"] = buffer
    return {name: tensor for name, tensor in found.items() if not is_lazy(tensor) and not tensor.is_meta}


def _are_same(weights: dict[str, Tensor], values: list[Tensor], now: dict[str, Tensor]) -> bool:
    """Say whether a model has the tensors that it had, with the values that they had."""
    if weights.keys() != now.keys() or any(now[name] is not tensor for name, tensor in weights.items()):
        return False
    return all(torch.equal(tensor.detach(), value) for tensor, value in zip(weights.values(), values, strict=True))
