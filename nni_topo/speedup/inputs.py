"""Example inputs and model outputs, whatever container they come in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from nni_topo.errors import ConfigError
from nni_topo.modes import device_of

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call_arguments(example_inputs: Any, model: torch.nn.Module | None = None) -> Call:
    """Split example inputs into the positional and keyword arguments of ``model.forward``.

    Parameters
    ----------
    example_inputs : Tensor, tuple, list or mapping of str to Any
        One tensor, the positional arguments, or the keyword arguments. The first dimension of each
        tensor is the batch.
    model : torch.nn.Module, optional
        If given, tensors are moved to its device.

    Returns
    -------
    args : tuple
        Positional arguments.
    kwargs : dict
        Keyword arguments.

    Raises
    ------
    ConfigError
        If there is no tensor to be found in them.
    """
    if isinstance(example_inputs, Mapping):
        call: Call = ((), dict(example_inputs))
    elif isinstance(example_inputs, (tuple, list)):
        call = (tuple(example_inputs), {})
    else:
        call = ((example_inputs,), {})
    if not tensors_of(call):
        raise ConfigError(
            "example_inputs must be a tensor, a tuple of arguments or a dict of keyword arguments "
            f"with a tensor in it, got {type(example_inputs).__name__}"
        )
    return call if model is None else on_device(call, device_of(model))


def on_device(tree: Any, device: torch.device) -> Any:
    """Move the tensors of nested containers to a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, tree)


def bind_arguments(model: torch.nn.Module, call: Call) -> dict[str, Any]:
    """Name the arguments of a call as ``model.forward`` does, in the order of its signature.

    Parameters
    ----------
    model : torch.nn.Module
        The model to be called.
    call : tuple of (tuple, dict)
        Positional and keyword arguments.

    Returns
    -------
    dict of str to Any
        The arguments that are given, without the defaults.

    Raises
    ------
    ConfigError
        If ``model.forward`` doesn't take these arguments.
    """
    try:
        bound = inspect.signature(model.forward).bind(*call[0], **call[1])
    except TypeError as error:
        raise ConfigError(f"example_inputs must fit {type(model).__name__}.forward: {error}") from error
    return dict(bound.arguments)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """List the tensors of nested containers in a fixed order.

    Parameters
    ----------
    tree : Any
        Nested tuples, lists and dicts.

    Returns
    -------
    list of Tensor
        The tensors, any shapes.
    """
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def random_like(call: Call, generator: torch.Generator, *, positive: bool = False) -> Call:
    """Draw a call whose tensors have the shapes and types of another's.

    Parameters
    ----------
    call : tuple of (tuple, dict)
        The call to imitate.
    generator : torch.Generator
        A generator on the CPU.
    positive : bool, default=False
        Draw uniformly from [0.5, 1.5] instead of from a standard normal distribution.

    Returns
    -------
    tuple of (tuple, dict)
        Floating tensors are drawn; integers and booleans stay as they are, since they may be indices.
    """

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if not leaf.is_floating_point():
            return leaf.clone()
        if positive:
            values = torch.rand(leaf.shape, generator=generator) + 0.5
        else:
            values = torch.randn(leaf.shape, generator=generator)
        return values.to(dtype=leaf.dtype, device=leaf.device)

    drawn: Call = tree_map(draw, call)
    return drawn


def cast_floats(call: Call, dtype: torch.dtype) -> Call:
    """Cast the floating tensors of a call.

    Parameters
    ----------
    call : tuple of (tuple, dict)
        Positional and keyword arguments.
    dtype : torch.dtype
        The floating type wanted.

    Returns
    -------
    tuple of (tuple, dict)
        The same call with floating tensors of this type.
    """

    def cast(leaf: Any) -> Any:
        is_float = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if is_float else leaf

    casted: Call = tree_map(cast, call)
    return casted
