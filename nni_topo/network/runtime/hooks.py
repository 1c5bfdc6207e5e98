"""Forward hooks on the inputs and outputs of layers. No other file of the package sets and removes hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_topo.context import context, in_context, tell
from nni_topo.errors import ConfigError, DataError, NniTopoError, out_of_memory, raised
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import detached_copy, evaluation_mode
from nni_topo.network.runtime.inputs import bind_arguments, inputs_of, real_positions_of, required_arguments

Entering = Callable[[Tensor], Any]
"""Gets the input of a layer. A result other than None replaces the input."""
Leaving = Callable[[Tensor, Any], Any]
"""Gets the input and the output of a layer. A result other than None replaces the output."""


@contextmanager
def watched(
    entering: Iterable[tuple[nn.Module, Entering]] = (), leaving: Iterable[tuple[nn.Module, Leaving]] = ()
) -> Iterator[None]:
    """Call functions at every call of their layers within the block; a layer may be listed more than once."""

    def enter(look: Entering, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        replacement = look(first_argument(args, kwargs))
        if replacement is None:
            return None
        if args:
            return (replacement, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): replacement}

    def leave(look: Leaving, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return look(first_argument(args, kwargs), output)

    def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return next(iter((*args, *kwargs.values())), None)

    with ExitStack() as handles:
        for module, look in entering:
            handles.enter_context(module.register_forward_pre_hook(partial(enter, look), with_kwargs=True))
        for module, look_after in leaving:
            handles.enter_context(module.register_forward_hook(partial(leave, look_after), with_kwargs=True))
        yield


@contextmanager
def called(model: nn.Module, look: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Call a function with the arguments of every call of a model within the block, before the model runs."""
    with model.register_forward_pre_hook(lambda _, args, kwargs: look(args, kwargs), with_kwargs=True):
        yield


@contextmanager
def padding_known(model: nn.Module) -> Iterator[None]:
    """Let `by_channel` skip padding within the block: the positions that the model's latest call masks as padding."""

    def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tell(real=real_positions_of(model, (args, kwargs)))

    with in_context(real=None), called(model, look):
        yield


def inputs_seen(model: nn.Module, work: Callable[[], Any], most: int | None = None) -> list[Any]:
    """Return the inputs with which ``work`` calls a model; ``work`` is stopped after ``most`` calls."""
    seen: list[Any] = []

    def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = bind_arguments(model, (args, kwargs)) if kwargs else args
        seen.append(tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), inputs))
        if len(seen) == most:
            raise _Enough

    with called(model, record), suppress(_Enough):
        work()
    return seen


class _Enough(BaseException):
    """Ends an evaluation. Not an Exception, which the user's function may catch."""


def batches_of(calibration: Iterable[Any] | Evaluator, model: nn.Module, knob: str = "calibration") -> Calibration:
    """Return batches, or the batches on which an evaluator evaluates the model, as calibration data."""
    if not isinstance(calibration, Evaluator):
        return Calibration.of(calibration, knob).with_arguments(required_arguments(model))
    if getattr(calibration, "model", None) is not None:
        raise ConfigError(f"an evaluator that serves as {knob} must not be in use, got one that has a model ({knob})")
    with _bound_copy(calibration, model, knob) as (evaluator, evaluated):
        seen = inputs_seen(evaluated, evaluator.evaluate)
    if not seen:
        raise DataError(
            "an evaluator that serves as calibration data must call the model, got no call (evaluator): give it an "
            "evaluating function, or pass batches (calibration); its dummy_input isn't used as data"
        )
    # Each in a tuple, so that several arguments don't count as an input with targets.
    return Calibration.of([(inputs,) for inputs in seen], knob)


def example_inputs_of(
    example_inputs: Any, model: nn.Module, *, calibration: Iterable[Any] | None = None, evaluator: Evaluator | None
) -> Any:
    """Return the inputs on which a pruner analyses its model, which isn't wrapped yet; None if none are known.

    They are the pruner's own argument, else the first batch of its calibration data, else its evaluator's
    ``dummy_input``, else the first batch on which the evaluator evaluates a copy of the model. The evaluation stops
    there. An evaluator that is in use isn't run.
    """
    if example_inputs is not None:
        return example_inputs
    if calibration is not None:
        return next((inputs_of(batch) for batch in calibration), None)
    if evaluator is None:
        return None
    # LightningEvaluator's `get_dummy_input` would take a batch of the training data
    dummy_input = getattr(evaluator, "dummy_input", getattr(evaluator, "_dummy_input", None))
    if dummy_input is not None:
        return dummy_input
    if getattr(evaluator, "model", None) is not None:
        return None
    with _bound_copy(evaluator, model, "example inputs") as (copied, evaluated):
        return next(iter(inputs_seen(evaluated, copied.evaluate, 1)), None)


@contextmanager
def _bound_copy(evaluator: Evaluator, model: nn.Module, knob: str) -> Iterator[tuple[Evaluator, nn.Module]]:
    """Bind a copy of an evaluator to a copy of a model; its errors, such as NNI's assertions, become ConfigErrors."""
    copied, evaluated = copy.copy(evaluator), detached_copy(model)
    try:
        if not copied._initialization_complete:
            copied._init_optimizer_helpers(model)
        copied.bind_model(evaluated)
        try:
            with evaluation_mode(evaluated), torch.no_grad():
                yield copied, evaluated
        finally:
            copied.unbind_model()
    except NniTopoError:
        raise
    except Exception as error:  # of the user's functions, of NNI or of Lightning
        if out_of_memory(error):
            raise
        raise ConfigError(
            f"an evaluator that serves as {knob} must evaluate the model, got {raised(error)} "
            f"({type(evaluator).__name__}, {knob})"
        ) from error


def pruner_batches(calibration: Iterable[Any] | Evaluator | None, model: nn.Module) -> Calibration | None:
    """Return a pruner's calibration data, from batches or an evaluator as in `batches_of`; None if it has none."""
    if calibration is None:
        return None
    return batches_of(calibration, model)


def counted_places(shape: tuple[int, ...]) -> Tensor | None:
    """Return which positions (samples, places) aren't padding; None if all count or padding is unknown."""
    real: Tensor | None = context().real
    if real is None or real.shape != shape:
        return None
    return real
