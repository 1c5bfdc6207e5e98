"""Running a model over inputs, and what to change about these where it doesn't run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_topo.errors import ConfigError, DataError, NniTopoError, listed
from nni_topo.network.runtime.copies import evaluation_mode, left_alone
from nni_topo.network.runtime.hooks import called, padding_known, watched
from nni_topo.network.runtime.inputs import (
    Call,
    arguments_of,
    batch_size,
    bind_arguments,
    calls,
    copied_for,
    first_of_samples,
    fitting,
    map_tensors,
    name_of,
    on_device,
    taken,
    tensors_of,
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
                with fitting(index, name_of(calibration)):
                    model(*args, **kwargs)
            except DataError:
                if index == 0:
                    first_call(model, calibration)  # an error that says what to change
                raise


def first_call(model: nn.Module, calibration: Iterable[Any]) -> Call:
    """Return the call of the model for the first batch; DataError if the model can't be run on it."""
    call = next(calls(model, calibration))
    check_fits(model, call, name_of(calibration), _first_batch(calibration))
    return call


def structure_call(model: nn.Module, calibration: Iterable[Any]) -> Call:
    """Return a call to trace a model with: samples of the first batch; DataError if the model can't run on it."""
    call = next(calls(model, calibration))
    return structure_of(model, call, name_of(calibration), _first_batch(calibration))


def _first_batch(calibration: Iterable[Any]) -> Any:
    return calibration[0] if isinstance(calibration, Sequence) else None


def structure_of(model: nn.Module, call: Call, name: str = "calibration", batch: Any = None) -> Call:
    """Return a call's first two samples if the model runs on them, else the call; DataError if it runs on neither.

    The call is also returned if more layers run on it, as experts do to which a router gives other samples.
    """
    # Tracing takes time and memory for each sample.
    few: Call = taken(call, torch.arange(min(2, batch_size(call))))
    try:
        reached = check_fits(model, few, name, batch)
    except DataError:
        # The model may need exactly this number of samples, or more than two.
        check_fits(model, call, name, batch)
        return call
    if batch_size(call) > 2 and _is_partly_run(model, reached) and check_fits(model, call, name, batch) > reached:
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


def samples_second(model: nn.Module, call: Call) -> str:
    """Say which inputs have the samples second, where a model runs on fewer once these are cut there; else nothing."""
    count = batch_size(call)

    def is_second(tensor: Tensor) -> bool:
        return tensor.dim() > 1 and len(tensor) != count and tensor.shape[1] == count

    def fewer(tensor: Tensor) -> Tensor:
        if is_second(tensor):
            return tensor[:, : count - 1]
        return tensor[: count - 1] if tensor.dim() and len(tensor) == count else tensor

    second = [name for name, value in bind_arguments(model, call).items() if any(map(is_second, tensors_of(value)))]
    if count < 2 or not second or failure_on(model, map_tensors(fewer, call)) is not None:
        return ""
    return (
        f"; the samples are the second dimension of {listed(second)}, as in the states of recurrent layers: pass them "
        "first, by .transpose(0, 1), to a module around the model whose forward turns them, and what it returns, back"
    )


def check_fits(model: nn.Module, call: Call, name: str = "calibration", batch: Any = None) -> set[str]:
    """Run a model on a call in evaluation mode; DataError if that fails, or if a layer takes it for a single sample.

    Returned are the names of the modules in lists that ran. The error says what to change where the model runs on the
    same inputs in another form. ``batch`` is what the call was made of.
    """
    try:
        with fitting(0, name):
            unbatched, ran = _run(model, call)
    except DataError:
        if found := form_that_fits(model, call, batch):
            raise DataError(f"{name} must fit the model, got {found} (batch 0)") from None
        raise
    if unbatched:
        raise DataError(
            f"{name} must have samples along the first dimension, got {_told(call)}, which {unbatched} takes for a "
            f"single sample: pass {_BATCHED} (batch 0)"
        )
    return ran


@contextmanager
def fitting_call(model: nn.Module, call: Call, name: str) -> Iterator[None]:
    """Turn an error of a model within the block into a DataError, as :func:`check_fits` words it for the whole call."""
    try:
        with fitting(0, name):
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
                f"{name} must have samples along the first dimension, got {_told(call)}, whose first dimension "
                f"{type(layers[each]).__name__} {each!r} takes for time, as batch_first=False says: pass "
                "x.transpose(0, 1) to a module around the model whose forward returns "
                "self.model(x.transpose(0, 1)).transpose(0, 1), or set batch_first=True if the first dimension is that "
                "of the samples (batch 0)"
            )


def _runs(model: nn.Module, call: Call) -> bool:
    """Say whether a model runs on a call whose first dimension counts samples."""
    try:
        return not _run(model, call)[0]
    except NniTopoError:
        return False
    except Exception as error:  # a user's model may raise anything
        if out_of_memory(error):
            raise
        return False


_BATCHED = "image.unsqueeze(0) of one, or the batches of a DataLoader"


def _floats(tensor: Tensor) -> Tensor:
    is_integer = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    return tensor.float() if is_integer and tensor.dim() > 1 else tensor


def _channels_first(tensor: Tensor) -> Tensor:
    return tensor.movedim(-1, 1) if tensor.dim() > 2 else tensor


# Forms in which inputs may be meant, each with what it is called and how it is made.
_FORMS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("as floats, prepared as in training, e.g. images.float() / 255", _floats),
    (f"with a batch dimension: {_BATCHED}", lambda tensor: tensor[None]),
    ("with channels first: images.movedim(-1, 1)", _channels_first),
)


def form_that_fits(model: nn.Module, call: Call, batch: Any = None) -> str:
    """Say what a call is and in which other form of the same inputs a model runs on them; empty if none is known."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1 and tensors_of(batch[1]):
        other = copied_for(model, arguments_of(batch[1], model))
        if isinstance(batch[0], Tensor) and _runs(model, other):
            return (
                f"{_told(call)} as the first entry of a batch, which is the input; it runs on the second: pass "
                "[(images, labels) for labels, images in batches]"
            )
    if len(call[0]) == 1 and isinstance(call[0][0], Mapping):
        for key, entry in call[0][0].items():
            if isinstance(entry, Tensor) and _runs(model, ((entry,), {})):
                return f"a mapping; it runs on the entry {key!r}: pass [batch[{key!r}] for batch in batches]"
    for count in range(1, len(_FORMS) + 1):
        for forms in itertools.combinations(_FORMS, count):
            changed: Call = call
            for _, change in forms:
                changed = tree_map_only(Tensor, change, changed)
            changed = copied_for(model, changed)
            if _runs(model, changed):
                return f"{_told(call)}; it runs on them {'; '.join(words for words, _ in forms)}"
    return ""


def _told(call: Call) -> str:
    """Describe the tensors of a call."""
    told = [f"{str(each.dtype).removeprefix('torch.')} of shape {tuple(each.shape)}" for each in tensors_of(call)]
    return ", ".join(told)
