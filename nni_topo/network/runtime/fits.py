"""Running a model over inputs, with errors that say on which it doesn't run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.copies import evaluation_mode, left_alone
from nni_topo.network.runtime.hooks import called, padding_known, watched
from nni_topo.network.runtime.inputs import (
    Call,
    arguments_of,
    batch_size,
    calls,
    copied_for,
    described,
    first_of_samples,
    fitting,
    name_of,
    on_device,
    taken,
)
from nni_topo.network.runtime.memory import out_of_memory
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.progress import bar

_FEW = 16  # samples on which it is looked which dimension layers take for time
LISTS = (nn.ModuleList, nn.ModuleDict)
"""Modules without a forward, of whose modules a forward may choose some by values."""
# How many dimensions an input has that such a layer takes for a single sample.
_UNBATCHED: tuple[tuple[type[nn.Module], int], ...] = (
    (nn.Conv1d, 2),
    (nn.Conv2d, 3),
    (nn.Conv3d, 4),
    (nn.ConvTranspose1d, 2),
    (nn.ConvTranspose2d, 3),
    (nn.ConvTranspose3d, 4),
    (nn.Linear, 1),
    (nn.RNNBase, 2),
    (nn.MultiheadAttention, 2),
)


def run(model: nn.Module, calibration: Iterable[Any]) -> None:
    """Run a model over calibration batches, in evaluation mode and without gradients; DataError if they don't fit."""
    with left_alone(model), evaluation_mode(model), torch.no_grad(), padding_known(model):
        for index, (args, kwargs) in enumerate(bar("calibration", None, calls(model, calibration))):
            try:
                with fitting(index, name_of(calibration), (args, kwargs)):
                    model(*args, **kwargs)
            except DataError:
                if index == 0:
                    first_call(model, calibration)  # an error that says what to change
                raise


def first_call(model: nn.Module, calibration: Iterable[Any]) -> Call:
    """Return the call of the model for the first batch; DataError if the model can't be run on it."""
    call = next(calls(model, calibration))
    check_fits(model, call, name_of(calibration))
    return call


def structure_call(model: nn.Module, calibration: Iterable[Any]) -> Call:
    """Return a call to trace a model with: samples of the first batch; DataError if the model can't run on it."""
    call = next(calls(model, calibration))
    return structure_of(model, call, name_of(calibration))


def structure_of(model: nn.Module, call: Call, name: str = "calibration") -> Call:
    """Return a call's first two samples if the model runs on them, else the call; DataError if it runs on neither.

    The call is also returned if more layers run on it, as experts do to which a router gives other samples.
    """
    # Tracing takes time and memory for each sample.
    few: Call = taken(call, torch.arange(min(2, batch_size(call))))
    try:
        reached = check_fits(model, few, name)
    except DataError:
        # The model may need exactly this number of samples, or more than two.
        check_fits(model, call, name)
        return call
    if batch_size(call) > 2 and _is_partly_run(model, reached) and check_fits(model, call, name) > reached:
        return call
    return few


def _is_partly_run(model: nn.Module, ran: set[str]) -> bool:
    """Say whether some modules of a list are among those that ran, and others aren't."""
    by_list: dict[str, set[bool]] = {}
    for name in _listed_modules(model):
        by_list.setdefault(name.rpartition(".")[0], set()).add(name in ran)
    return any(len(each) > 1 for each in by_list.values())


def _listed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with parameters in lists and dictionaries that take hooks, by name."""
    return {
        f"{name}.{key}".lstrip("."): entry
        for name, module in model.named_modules()
        if isinstance(module, LISTS)
        for key, entry in module.named_children()
        if next(entry.parameters(), None) is not None and not isinstance(entry, torch.jit.ScriptModule)
    }


def call_arguments(example_inputs: Any, model: nn.Module) -> Call:
    """Split inputs, batch first, into positional and keyword arguments, and copy them as :func:`copied_for` does.

    Where the model doesn't run on the entries, the first of them may hold the arguments, as in a batch with targets.
    """
    call = copied_for(model, arguments_of(example_inputs, model))
    first = example_inputs[0] if isinstance(example_inputs, (tuple, list)) else None
    if isinstance(first, (tuple, list, Mapping)) and failure_on(model, call) is not None:
        try:
            inputs = copied_for(model, arguments_of(first, model))
        except ConfigError:  # it holds no tensor
            return call
        if failure_on(model, inputs) is None:
            return inputs
    return call


def failure_on(model: nn.Module, call: Call) -> Exception | None:
    """Return the error with which a model doesn't run on a call in evaluation mode; None where it runs."""
    args, kwargs = on_device(call, device_of(model))
    try:
        with left_alone(model), evaluation_mode(model), torch.no_grad():
            model(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        if out_of_memory(error):
            raise
        return error
    return None


def check_fits(model: nn.Module, call: Call, name: str = "calibration") -> set[str]:
    """Run a model on a call in evaluation mode; DataError if that fails, or if a layer takes it for a single sample.

    Returned are the names of the modules in lists that ran.
    """
    with fitting(0, name, call):
        unbatched, ran = _run(model, call)
    if unbatched:
        raise DataError(
            f"{name} must have samples along the first dimension, got {described(call)}, which {unbatched} takes for a "
            "single sample: pass image.unsqueeze(0) of one, or the batches of a DataLoader (batch 0)"
        )
    return ran


@contextmanager
def fitting_call(model: nn.Module, call: Call, name: str) -> Iterator[None]:
    """Turn an error of a model within the block into a DataError, as :func:`check_fits` words it for the whole call."""
    try:
        with fitting(0, name, call):
            yield
    except DataError:
        check_fits(model, call, name)
        raise


def _run(model: nn.Module, call: Call) -> tuple[str, set[str]]:
    """Run a model on a call; return the layer that takes the input for a single sample, and which listed modules ran.

    The layer is empty if none does.
    """
    found, ran = list[str](), set[str]()
    shape = first_of_samples(call).shape

    def look(name: str, dimensions: int) -> Callable[[Tensor], None]:
        def see(entering: Tensor) -> None:
            # Another shape is one that the model has made: it may well go through its samples one by one.
            if isinstance(entering, Tensor) and entering.dim() == dimensions and entering.shape == shape:
                found.append(name)

        return see

    def note(name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
        return lambda args, kwargs: ran.add(name)

    entering = []
    for name, module in model.named_modules():
        for kind, dimensions in _UNBATCHED:
            if isinstance(module, kind):
                entering.append((module, look(f"{type(module).__name__} {name!r}", dimensions)))
    with ExitStack() as stack:
        stack.enter_context(left_alone(model))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(watched(entering=entering))
        for name, module in _listed_modules(model).items():
            stack.enter_context(called(module, note(name)))
        model(*call[0], **call[1])
    return found[0] if found else "", ran


def check_samples_first(model: nn.Module, calibration: Iterable[Any]) -> None:
    """Raise DataError if a layer takes the first dimension of the inputs for time, as PyTorch's do by default.

    The layer sees the inputs' first dimension if both sizes change together: inside, a model may have samples second.
    """
    call, name = next(calls(model, calibration)), name_of(calibration)
    layers = {each: module for each, module in model.named_modules() if getattr(module, "batch_first", None) is False}
    count = min(_FEW, batch_size(call))
    if not layers or count < 2:
        return
    lengths: list[dict[str, int]] = []
    for some in (count, count - 1):
        seen: dict[str, int] = {}

        def look(layer: str, seen: dict[str, int]) -> Callable[[Any], None]:
            def see(first: Any) -> None:
                if isinstance(first, Tensor) and first.dim() > 1:
                    seen[layer] = len(first)

            return see

        args, kwargs = taken(call, torch.arange(some))
        entering = [(module, look(each, seen)) for each, module in layers.items()]
        try:
            with left_alone(model), evaluation_mode(model), torch.no_grad(), watched(entering=entering):
                model(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            if out_of_memory(error):
                raise
            return  # it needs a number of samples, which other checks say
        lengths.append(seen)
    for each, length in lengths[0].items():
        if length == count and lengths[1].get(each) == count - 1:
            raise DataError(
                f"{name} must have samples along the first dimension, got {described(call)}, whose first dimension "
                f"{type(layers[each]).__name__} {each!r} takes for time, as batch_first=False says: pass "
                "x.transpose(0, 1) to a module around the model whose forward returns "
                "self.model(x.transpose(0, 1)).transpose(0, 1), or set batch_first=True if the first dimension is that "
                "of the samples (batch 0)"
            )
