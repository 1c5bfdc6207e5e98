"""Run a model over inputs, with errors that name the inputs on which it fails."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_topo.errors import ConfigError, DataError, out_of_memory, raised
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import evaluation_mode, left_alone
from nni_topo.network.runtime.hooks import Entering, padding_known, watched
from nni_topo.network.runtime.inputs import (
    MODEL_ERRORS,
    Call,
    arguments_of,
    batch_size,
    calls,
    check_inputs_last,
    copied_for,
    described,
    first_of_samples,
    fitting,
    name_of,
    on_device,
    take_samples,
    tensors_of,
)
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.progress import bar

_FEW = 16  # samples to find out which dimension layers take for time
_CUT = 16  # most batches of which a part is tried
_logger = logging.getLogger(__name__)
LISTS = (nn.ModuleList, nn.ModuleDict)
"""Containers without a forward, from which a model's forward may choose modules by values."""
# Number of dimensions of an input that such a layer takes for a single sample.
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
            with fitting(index, calibration, (args, kwargs)):
                model(*args, **kwargs)


def first_call(model: nn.Module, calibration: Iterable[Any]) -> Call:
    """Return the call of the model for the first batch; DataError if the model can't be run on it."""
    call = next(calls(model, calibration))
    check_fits(model, call, name_of(calibration))
    return call


def structure_call(model: nn.Module, calibration: Iterable[Any]) -> Call:
    """Return a call to trace a model with: samples of the first batch; DataError if the model can't run on it."""
    return structure_of(model, next(calls(model, calibration)), name_of(calibration))


def structure_of(model: nn.Module, call: Call, name: str = "calibration") -> Call:
    """Return a call's first two samples; the whole call if the model needs it, or runs more layers on it."""
    # Tracing takes time and memory for each sample.
    few: Call = take_samples(call, torch.arange(min(2, batch_size(call))))
    try:
        reached = check_fits(model, few, name)
    except DataError:
        # The model may need exactly this number of samples, or more than two.
        check_fits(model, call, name)
        return call
    ran_by_list: dict[str, set[bool]] = {}
    for module_name in _listed_modules(model):
        ran_by_list.setdefault(module_name.rpartition(".")[0], set()).add(module_name in reached)
    is_partly_run = any(len(ran) > 1 for ran in ran_by_list.values())
    if batch_size(call) > 2 and is_partly_run and check_fits(model, call, name) > reached:
        return call
    return few


def _listed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules in `LISTS` that have parameters and accept hooks, by name."""
    children = dict[str, nn.Module]()
    for name, module in model.named_modules():
        if not isinstance(module, LISTS):
            continue
        for key, child in module.named_children():
            has_parameters = next(child.parameters(), None) is not None
            if has_parameters and not isinstance(child, torch.jit.ScriptModule):
                children[f"{name}.{key}".lstrip(".")] = child
    return children


def call_arguments(example_inputs: Any, model: nn.Module) -> Call:
    """Split inputs, batch first, into positional and keyword arguments, and copy them as :func:`copied_for` does.

    If the model doesn't run on the entries, the first entry may hold the arguments, as in a batch with targets.
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
    """Run a model on a call in evaluation mode and return its error; None if it runs."""
    args, kwargs = tree_map_only(Tensor, Tensor.clone, on_device(call, device_of(model)))
    try:
        with left_alone(model), evaluation_mode(model), torch.no_grad():
            model(*args, **kwargs)
            check_inputs_last((args, kwargs), model)
    except MODEL_ERRORS as error:
        if out_of_memory(error):
            raise
        return error
    return None


def with_whole_batches(model: nn.Module, calibration: Calibration, pattern: Sequence[int] | None = None) -> Calibration:
    """Return calibration data whose batches stay whole if the model runs on them, but not on parts of them.

    ``pattern``: the parts, as for :meth:`Calibration.in_parts`; None: those of :meth:`Calibration.split`.
    """
    if calibration.is_whole:
        return calibration
    split = calibration.in_parts(pattern) if pattern else calibration.split()
    parts = [part for part in split if part is not None]
    first = next(calls(model, calibration))
    # With several inputs the values may decide, such as the lengths of sequences. The smallest parts take least time.
    most = _CUT if len(tensors_of(first)) > 1 else 1
    smallest = min(parts, key=lambda part: part.samples)
    places = torch.linspace(0, len(smallest) - 1, min(most, len(smallest))).long().tolist()
    for tried in ([smallest[place] for place in places], *(part[:1] for part in parts if part is not smallest)):
        for call in calls(model, tried):
            error = failure_on(model, call)
            if error is None:
                continue
            if failure_on(model, first) is not None:  # the whole batch is at fault, and gets an error of its own
                return calibration
            why = f"of {max(calibration.sizes)} samples it got {batch_size(call)} and raised {raised(error)}"
            _logger.info("the model runs on whole batches only, so whole batches are held out: %s", why)
            return calibration.as_whole_batches(why)
    return calibration


def check_fits(model: nn.Module, call: Call, name: str = "calibration") -> set[str]:
    """Run a model on a call, return the `LISTS` modules that ran; DataError if a layer takes it for one sample."""
    unbatched, ran = list[str](), set[str]()
    shape = first_of_samples(call).shape

    def look(layer: str, dimensions: int, entering: Tensor) -> None:
        # Any other shape was made by the model, which may process its samples one by one.
        if isinstance(entering, Tensor) and entering.dim() == dimensions and entering.shape == shape:
            unbatched.append(layer)

    def note(module: str, _: Tensor) -> None:
        ran.add(module)

    entering: list[tuple[nn.Module, Entering]] = []
    for layer, module in model.named_modules():
        for kind, dimensions in _UNBATCHED:
            if isinstance(module, kind):
                entering.append((module, partial(look, f"{type(module).__name__} {layer!r}", dimensions)))
    entering += [(module, partial(note, module_name)) for module_name, module in _listed_modules(model).items()]
    with fitting(0, name, call), left_alone(model), evaluation_mode(model), torch.no_grad(), watched(entering):
        args, kwargs = tree_map_only(Tensor, Tensor.clone, call)
        model(*args, **kwargs)
        check_inputs_last((args, kwargs), model)
    if unbatched:
        raise DataError(
            f"{name} must have samples along the first dimension, got {described(call)}, which {unbatched[0]} takes "
            "for a single sample: pass image.unsqueeze(0) of one, or the batches of a DataLoader (batch 0)"
        )
    return ran


def check_samples_first(model: nn.Module, calibration: Iterable[Any]) -> None:
    """Raise DataError if a layer takes the first dimension of the inputs for time, as PyTorch's do by default.

    A layer does so if its input's first size changes with the number of samples: a model may transpose its inputs.
    """
    call, name = next(calls(model, calibration)), name_of(calibration)
    layers = {
        layer_name: module
        for layer_name, module in model.named_modules()
        if getattr(module, "batch_first", None) is False
    }
    count = min(_FEW, batch_size(call))
    if not layers or count < 2:
        return

    def look(seen: dict[str, int], layer: str, first: Any) -> None:
        if isinstance(first, Tensor) and first.dim() > 1:
            seen[layer] = len(first)

    lengths: list[dict[str, int]] = []
    for some in (count, count - 1):
        seen: dict[str, int] = {}
        args, kwargs = take_samples(call, torch.arange(some))
        entering = [(module, partial(look, seen, layer_name)) for layer_name, module in layers.items()]
        try:
            with left_alone(model), evaluation_mode(model), torch.no_grad(), watched(entering=entering):
                model(*args, **kwargs)
        except MODEL_ERRORS as error:
            if out_of_memory(error):
                raise
            return  # it needs a fixed number of samples; other checks report that
        lengths.append(seen)
    for layer_name, length in lengths[0].items():
        if length == count and lengths[1].get(layer_name) == count - 1:
            raise DataError(
                f"{name} must have samples along the first dimension, got {described(call)}, whose first dimension "
                f"{type(layers[layer_name]).__name__} {layer_name!r} takes for time, as batch_first=False says; "
                "set batch_first=True, or put the model into a module that passes it x.transpose(0, 1) (batch 0)"
            )
