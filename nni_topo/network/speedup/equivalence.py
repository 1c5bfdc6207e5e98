"""The masked model, and the check that a dense model equals it.

NNI's masked model multiplies weights by masks and no more: after a batch norm a removed channel is its
bias, no longer zero, and what follows sees it. In the dense model the channel isn't there. So
here everything that works on single channels is pruned with the channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from nni_topo.context import leaving_out
from nni_topo.errors import NniTopoError, SpeedupError, raised
from nni_topo.network.layers.derived import give_back_classes, with_known_layers
from nni_topo.network.layers.slicing import keep
from nni_topo.network.runtime.arguments import INPUTS, MASKS, MODEL, check_model
from nni_topo.network.runtime.comparison import difference
from nni_topo.network.runtime.copies import detached_copy, evaluating, training
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import (
    Call,
    Variation,
    call_in_precision,
    first_samples,
    random_like,
    returned_tensors,
    tensors_of,
    together,
    variations_of,
    varied,
)
from nni_topo.network.runtime.memory import out_of_memory
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.reports import hand_on_report
from nni_topo.network.runtime.switches import random_state_kept
from nni_topo.network.runtime.weights import in_double
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.leaving_out import leave_out
from nni_topo.network.speedup.reconcile import (
    FullMasks,
    KeptIndices,
    MasksLike,
    check_masks,
    mask_what_follows,
    resolve,
    union,
)
from nni_topo.rules import FLAG
from nni_topo.sharing import find_ties, tie_again, untie

_ROUGH = 1e-5  # from this tolerance on a tenth of it is above rounding in single precision
# Between these the largest value of a layer of the probe stays as it is: far from where gates round to zero.
_LEAST, _LARGEST = 0.01, 100.0
_Place = tuple[str | None, str]


def apply_masks(model: torch.nn.Module, masks: FullMasks, *, light: bool = False) -> torch.nn.Module:
    """Return a copy of a model in which weights and biases are multiplied by their masks.

    ``light``: parameters that no mask changes use the memory of the model's, which mustn't be written to then.
    """
    reference: torch.nn.Module = detached_copy(model, light=light)
    ties = find_ties(reference)
    untie(reference, ties)
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                module = reference.get_submodule(name)
                keep(module, target, getattr(module, target) * mask)
    tie_again(reference, ties)
    hand_on_report(model, reference, "masked (nni_topo.masked_model)")
    return reference


def check_equal(
    reference: torch.nn.Module,
    dense: torch.nn.Module,
    call: Call,
    kept: KeptIndices,
    rtol: float,
    *,
    advise: Callable[[str | None], str] | None = None,
) -> str:
    """Raise a SpeedupError unless two models agree, to ``rtol`` of the largest output, on random inputs.

    The floats among these come as they are, in other scales and shifted, as small numbers and large ones ask different
    things of an operation. Returns in words what was compared.
    """
    drawn = random_like(call, torch.Generator().manual_seed(1))
    pair, variations = (reference, dense), variations_of(drawn)
    # shifted both ways, as weights that were trained may tell these apart
    variations += tuple((factor, -shift) for factor, shift in variations if shift)
    is_rough = rtol >= _ROUGH and _is_single(reference)
    batch = together(drawn, variations) if variations else None
    # All at once, in double precision only where that is needed. Whatever is wrong is looked for below.
    tries = [] if batch is None else [(batch, True)]
    if batch is not None and is_rough:
        tries.insert(0, (batch, False))
    for given, double in tries:
        agreed = _agreed(pair, given, rtol if double else rtol / 10, 1 + len(variations), double=double)
        if agreed is not None:
            return _told(drawn, [variation for at, variation in enumerate(variations, 1) if at in agreed])
    _check_one(pair, drawn, kept, rtol, advise, is_rough=is_rough)
    agreed_variations = list[Variation]()
    for variation in variations:
        other = varied(drawn, variation)
        # A model needn't take all that is a number, nor make numbers of it.
        if _agreed((reference, reference), other, rtol, 1, double=True):
            _check_one(pair, other, kept, rtol, advise, is_rough=is_rough, variation=variation)
            agreed_variations.append(variation)
    return _told(drawn, agreed_variations)


@dataclass(frozen=True)
class TrainingRun:
    """One run of a dense model in training mode.

    Parameters
    ----------
    failure : str, default=""
        The error that it raises where the original runs; empty if it raises nothing, or both do.
    kept : mapping of str to (tensor, tensor), default={}
        Tensors that modules hold in plain attributes, and that the run replaces: as before it, and after.
    """

    failure: str = ""
    kept: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def run_in_training(original: torch.nn.Module, dense: torch.nn.Module, call: Call) -> TrainingRun:
    """Run copies of a dense model, and of the original if that fails, in training mode.

    A width that is used in training mode only isn't cut where nothing shows what it belongs to: that of weights which
    follow another layer's, of a layer in a plain list, or of noise that the forward draws.
    """
    # Where processes share a job, layers may wait in training mode for those of the other processes.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return TrainingRun()
    copied = detached_copy(dense)  # with weights of its own, into which a forward may write in training mode
    before = _plain_tensors(copied)
    failure = _raised_in_training(copied, call)
    if failure:
        return TrainingRun("" if _raised_in_training(detached_copy(original), call) else failure)
    after = _plain_tensors(copied)
    changed = {name: (each, after[name]) for name, each in before.items() if after.get(name, each) is not each}
    return TrainingRun(kept=changed)


def _raised_in_training(model: torch.nn.Module, call: Call) -> str:
    """Run a copy in training mode, which may change it; return the error that it raises, if any."""
    args, kwargs = tree_map_only(torch.Tensor, torch.clone, call)
    with random_state_kept(), torch.no_grad():
        try:
            training(model)(*args, **kwargs)
        except Exception as error:  # a user's forward may raise anything
            # Whether there is enough memory says nothing about the model.
            return "" if out_of_memory(error) else raised(error)
    return ""


def _plain_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors in modules' attributes that are neither parameters nor buffers, by name."""
    return {
        f"{name}.{key}".lstrip("."): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }


def _told(compared: Call, variations: list[Variation]) -> str:
    """Return a sentence on the inputs on which two models were compared."""
    shapes = " and ".join(str(tuple(each.shape[1:])) for each in tensors_of(compared))
    others = "".join(f", {_named(each)}" for each in variations)
    return f"random inputs of shape {shapes}{others}"


def _named(variation: Variation) -> str:
    factor, shift = variation
    return f"shifted by {shift:g}" if shift else f"times {factor:g}"


def _agreed(
    pair: tuple[torch.nn.Module, torch.nn.Module], call: Call, rtol: float, blocks: int, *, double: bool
) -> set[int] | None:
    """Return the inputs of one batch on which two models agree; None unless that is all that give finite numbers."""
    try:
        entering = call_in_precision(call, torch.float64) if double else call
        expected, actual, _ = _run(pair, entering, {}, rtol, double=double)
    except Exception as error:  # not every model takes a smaller image, another scale or as many samples
        # Where there is no memory for several inputs, or for double precision, there may be for less.
        if out_of_memory(error) and blocks == 1 and not double:
            raise
        return None
    if [each.shape for each in expected] != [each.shape for each in actual]:
        return None
    finite = set(range(blocks))
    for one, other in zip(expected, actual, strict=True):
        parts = blocks if one.dim() and len(one) % blocks == 0 else 1
        # A loss, say, has no dimension to be cut along.
        pairs = zip(one.chunk(parts), other.chunk(parts), strict=True) if parts > 1 else [(one, other)]
        for at, (wanted, given) in enumerate(pairs):
            if not bool(wanted.isfinite().all()):
                finite -= {at} if parts > 1 else finite
            elif difference(wanted, given) > rtol:
                return None
    return finite if 0 in finite else None


def _check_one(
    pair: tuple[torch.nn.Module, torch.nn.Module],
    drawn: Call,
    kept: KeptIndices,
    rtol: float,
    advise: Callable[[str | None], str] | None,
    *,
    is_rough: bool,
    variation: Variation | None = None,
) -> None:
    """Raise a SpeedupError unless two models agree on one input."""
    few = first_samples(drawn)
    # A rough comparison needs no double precision.
    tries = [(few, False), (drawn, False)] if is_rough else []
    for given, double in (*tries, (few, True)):
        if _agreed(pair, given, rtol if double else rtol / 10, 1, double=double):
            return
    try:
        # In double precision two models that are equal differ by 1e-12 and less however deep they are.
        expected, actual, place = _run(pair, call_in_precision(drawn, torch.float64), kept, rtol, double=True)
    except Exception:  # a user's forward may raise anything, such as for a type that it doesn't take
        try:
            expected, actual, place = _run(pair, drawn, kept, rtol, double=False)
        except Exception as error:
            if out_of_memory(error) or isinstance(error, NniTopoError):
                raise
            raise SpeedupError(
                "a dense model must run on inputs of the example's shape: a fixed size in its forward may not "
                f"fit the pruned channels, got {raised(error)}"
            ) from error
    shapes = " and ".join(str(tuple(each.shape)) for each in tensors_of(drawn))
    place = place[0], f"{place[1]}, inputs of shape {shapes}{'' if variation is None else f' {_named(variation)}'}"
    _compare(expected, actual, place, rtol, advise)


def _is_single(model: torch.nn.Module) -> bool:
    """Tell whether a model computes in single or double precision."""
    return all(parameter.dtype not in (torch.float16, torch.bfloat16) for parameter in model.parameters())


def _run(
    pair: tuple[torch.nn.Module, torch.nn.Module], call: Call, kept: KeptIndices, rtol: float, *, double: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], _Place]:
    """Run copies of both models; also name the first module whose outputs differ."""
    records: list[dict[str, torch.Tensor]] = [{}, {}]
    outputs = []
    with torch.no_grad():
        for model, record in zip(pair, records, strict=True):
            runner = evaluating(in_double(model) if double else detached_copy(model, light=True))
            looks = _looks(runner, kept, record)
            # Both draw the same numbers where a forward draws any.
            # What a forward does in place to its inputs mustn't reach the other model.
            args, kwargs = tree_map_only(torch.Tensor, torch.clone, call)
            with random_state_kept(), watched(leaving=looks):
                outputs.append(returned_tensors(runner(*args, **kwargs)))
            del runner, looks  # before the copy of the other model is made
    return outputs[0], outputs[1], _first_difference(records[0], records[1], kept, rtol)


def _looks(
    model: torch.nn.Module, names: Iterable[str], record: dict[str, torch.Tensor]
) -> list[tuple[torch.nn.Module, Callable[[Any, Any], None]]]:
    """List modules with what records their outputs; scripted modules take no hooks and are left out."""
    looks = list[tuple[torch.nn.Module, Callable[[Any, Any], None]]]()
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, torch.jit.ScriptModule):
            looks.append((module, partial(_record, name, record)))
    return looks


def _record(name: str, record: dict[str, torch.Tensor], entered: Any, output: Any) -> None:
    """Record the output of a module's first call."""
    if isinstance(output, torch.Tensor) and name not in record:
        record[name] = output.clone()


def _first_difference(
    expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor], kept: KeptIndices, rtol: float
) -> _Place:
    for name, full in expected.items():
        small = actual.get(name)
        for d, indices in enumerate(kept[name][1:], start=1):
            # The inputs may have more places than the example, which all stay.
            if small is not None and small.dim() == full.dim() and len(indices) == small.shape[d] < full.shape[d]:
                full = full.index_select(d, indices.to(full.device))
        if small is None or small.shape != full.shape:
            return name, f"from {name} on, whose output has another shape than expected"
        if difference(full, small) > rtol:
            return name, f"from {name} on"
    return None, "after the last layer"


def _compare(
    expected: list[torch.Tensor],
    actual: list[torch.Tensor],
    place: _Place,
    rtol: float,
    advise: Callable[[str | None], str] | None,
) -> None:
    name, where = place
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise SpeedupError(
            f"the shape of the model's output must not change: {leaving_out('the layer that gives it')}, "
            f"got {shapes[1]} instead of {shapes[0]} ({where})"
        )
    worst = max((difference(*each) for each in zip(expected, actual, strict=True)), default=0.0)
    if not worst <= rtol:
        raise SpeedupError(
            f"a dense model must compute what the masked one does to {rtol:g} of its largest output, "
            f"got a difference of {worst:.3g} ({where})" + (f"; {advise(name)}" if advise else "")
        )


@public(model=MODEL, example_inputs=INPUTS, masks=MASKS, reconcile=FLAG)
def masked_model(
    model: torch.nn.Module, example_inputs: Any, masks: MasksLike, *, reconcile: bool = False
) -> torch.nn.Module:
    """Copy a model with its masked channels at zero, through batch norms too.

    Parameters
    ----------
    model : torch.nn.Module
        The model, not wrapped by a pruner. It isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model: one tensor, positional or keyword arguments.
    masks : mapping of str to mapping of str to Tensor or None
        NNI's masks, ``{module: {parameter: mask}}``.
    reconcile : bool, default=False
        Make the masks of coupled layers agree first, as `to_dense` does: where they differ, every channel that one of
        them keeps is kept, with its weights. Without it each layer is masked as its own mask says. Masks of this
        package's pruners with the list of `dependency_groups` agree already, unless channels are shuffled.

    Returns
    -------
    torch.nn.Module
        A copy in which weights and biases are multiplied by their masks; the bias of a channel without weights is zero;
        and so are the places of a parameter that the model uses by itself, a position embedding say, that meet removed
        channels. Where a removed channel is read it isn't there: a layer reads a zero in its place, weight and bias of
        a batch norm are zero for it, and a norm over channels runs over those that are left. Nothing else differs. What
        layers share, they share in the copy too unless their masks differ.

    Raises
    ------
    ConfigError
        If masks don't fit the model.
    SpeedupError
        If the model is still wrapped, a layer would be empty, or it can't be traced.
    DataError
        If the model holds NaN or infinite values.

    Notes
    -----
    A channel is removed if no layer that shares it keeps it. NNI's masked model differs: there a group or layer norm
    takes its statistics over removed channels too, as zeros, and a constant that an operation makes of a zero, as a
    sigmoid does, is read.
    """
    check_model(model)
    given, model = model, with_known_layers(model)
    call = call_arguments(example_inputs, model)
    full = check_masks(model, masks)
    flow = Analysis(model, call).flow
    if reconcile:
        resolved = resolve(model, flow, full)
        full, is_kept = resolved.masks, resolved.is_kept
    else:
        is_kept = union(model, flow, full)
        full = mask_what_follows(model, flow, full, is_kept)
    masked = apply_masks(model, full)
    leave_out(masked, flow, is_kept)
    give_back_classes(given, masked)
    return masked
