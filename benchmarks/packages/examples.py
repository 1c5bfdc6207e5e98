"""What the lists of classes share: an example, inputs of a shape, and a class's own documented example."""

from __future__ import annotations

import doctest
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

Inputs = dict[str, Any] | tuple[Any, ...] | Tensor
"""Keyword arguments, positional ones, or the only one."""
Build = Callable[[], tuple[nn.Module, Inputs]]


@dataclass(frozen=True)
class Listed:
    """A class of a package, and what builds it with its example inputs."""

    package: str
    name: str
    build: Build


def images(channels: int = 3, size: int = 32, batch: int = 2, dims: int = 2) -> Tensor:
    """Return random images, ``(batch, channels, size, ...)``, with ``dims`` sizes."""
    return torch.randn(batch, channels, *[size] * dims)


def tokens(vocabulary: int = 50, length: int = 12, batch: int = 2) -> Tensor:
    """Return random token numbers, ``(batch, length)``."""
    return torch.randint(5, vocabulary, (batch, length))


def documented(module: str, name: str) -> tuple[nn.Module, Inputs]:
    """Run the example in a class's docstring, and return the object that it calls last with the arguments.

    A call within the class's own construction doesn't count: SpeechBrain's containers call themselves with zeros to
    find their widths.
    """
    kind = getattr(importlib.import_module(module), name)
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    in_construction = 0
    init, forward = kind.__init__, kind.forward

    @functools.wraps(init)
    def initialising(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        nonlocal in_construction
        in_construction += 1
        try:
            init(self, *args, **kwargs)
        finally:
            in_construction -= 1

    def recording(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not in_construction:
            calls.append((self, args, kwargs))
        return forward(self, *args, **kwargs)

    # As doctest does it; PyTorch's own docstrings presume its names.
    names: dict[str, Any] = {"torch": torch, "nn": nn, **vars(importlib.import_module(module))}
    with patch.object(kind, "__init__", initialising), patch.object(kind, "forward", recording):
        for example in doctest.DocTestParser().get_examples(inspect.getdoc(kind) or ""):
            exec(example.source, names)
            if calls:
                break
    if not calls:
        raise LookupError(f"the docstring's example of {module}.{name} doesn't call it")
    model, args, kwargs = calls[-1]
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return model, dict(bound.arguments)
