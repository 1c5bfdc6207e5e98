"""What goes through a model's layers, call by call: the one place where forward hooks are set and taken off again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.calibration import Calibration, bar
from nni_topo.network.runtime.copying import detached_copy
from nni_topo.network.runtime.inputs import bind_arguments, calls, fitting, name_of, real_positions_of
from nni_topo.network.runtime.untouched import evaluation_mode, left_alone

Entering = Callable[[Tensor], Any]
"""Sees the tensor that enters a layer; what it returns, unless None, enters instead."""
Leaving = Callable[[Tensor, Any], Any]
"""Sees what entered a layer and what leaves it; what it returns, unless None, leaves instead."""

_REAL: ContextVar[Tensor | None] = ContextVar("real", default=None)


@contextmanager
def watched(
    entering: Iterable[tuple[nn.Module, Entering]] = (), leaving: Iterable[tuple[nn.Module, Leaving]] = ()
) -> Iterator[None]:
    """Show functions every call of layers within the block; a layer may be named more than once."""
    with ExitStack() as handles:
        for module, look in entering:
            handles.enter_context(module.register_forward_pre_hook(_before(look), with_kwargs=True))
        for module, seen in leaving:
            handles.enter_context(module.register_forward_hook(_behind(seen), with_kwargs=True))
        yield


@contextmanager
def called(model: nn.Module, look: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Show a function the arguments of every call of a model within the block, before it runs."""
    with model.register_forward_pre_hook(lambda _, args, kwargs: look(args, kwargs), with_kwargs=True):
        yield


@contextmanager
def padding_known(model: nn.Module) -> Iterator[None]:
    """Let `by_channel` leave out, within the block, what the arguments of a model's latest call say is padding."""

    def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _REAL.set(real_positions_of(model, (args, kwargs)))

    with counting(None), called(model, look):
        yield


@contextmanager
def counting(real: Tensor | None) -> Iterator[None]:
    """Let `by_channel` look, within the block, at these positions alone, bool ``(samples, places)``; None: at all."""
    before = _REAL.set(real)
    try:
        yield
    finally:
        _REAL.reset(before)


def inputs_seen(model: nn.Module, work: Callable[[], Any]) -> list[Any]:
    """Return, as calibration batches, what a model is called on while something works; DataError if it isn't."""
    seen: list[Any] = []

    def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = bind_arguments(model, (args, kwargs)) if kwargs else args
        # A batch's first entry is what the model takes: several arguments mustn't look like inputs and targets.
        seen.append((tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), inputs),))

    with called(model, record):
        work()
    if not seen:
        raise DataError("an evaluator must call the model where there is no calibration, got no call (evaluator)")
    return seen


def batches_of(calibration: Iterable[Any] | Evaluator, model: nn.Module, knob: str = "calibration") -> Calibration:
    """Return batches that are read once and kept; of an evaluator, those it evaluates the model on."""
    if calibration is None:
        raise ConfigError(
            f"{knob} must be an iterable of batches, got None: without data, nni_topo.synthetic_images(model, "
            f"example_inputs) makes some from the model alone ({knob})"
        )
    if not isinstance(calibration, Evaluator):
        return Calibration.of(calibration, knob)
    if getattr(calibration, "model", None) is not None:
        raise ConfigError(f"an evaluator that serves as {knob} must be free, got one at work ({knob})")
    # A copy of either: an evaluator that no pruner had yet must stay one that the next pruner can take.
    evaluator, evaluated = copy.copy(calibration), detached_copy(model)
    if not evaluator._initialization_complete:
        evaluator._init_optimizer_helpers(model)
    evaluator.bind_model(evaluated)
    try:
        with evaluation_mode(evaluated), torch.no_grad():
            return Calibration(inputs_seen(evaluated, evaluator.evaluate), name=knob)
    finally:
        evaluator.unbind_model()


def pruner_batches(calibration: Iterable[Any] | Evaluator | None, model: nn.Module) -> Calibration | None:
    """Return the calibration data that a pruner was given, if any; of an evaluator, what it evaluates the model on."""
    return None if calibration is None else batches_of(calibration, model)


def run(model: nn.Module, calibration: Iterable[Any]) -> None:
    """Run a model over calibration batches, in evaluation mode and without gradients."""
    with left_alone(model), evaluation_mode(model), torch.no_grad(), padding_known(model):
        for index, (args, kwargs) in enumerate(bar("calibration", None, calls(model, calibration))):
            with fitting(index, name_of(calibration)):
                model(*args, **kwargs)


def counted_places(shape: tuple[int, ...]) -> Tensor | None:
    """Return which positions ``(samples, places)`` aren't padding, bool; None: all, or it isn't known for the shape."""
    real = _REAL.get()
    return None if real is None or real.shape != shape else real


def _before(look: Entering) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = look(_first(args, kwargs))
        if found is None:
            return None
        return ((found, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): found})

    return hook


def _behind(look: Leaving) -> Callable[..., Any]:
    return lambda module, args, kwargs, output: look(_first(args, kwargs), output)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # A layer may be given its input by name.
    return next(iter((*args, *kwargs.values())), None)
