"""The masked model, and the check that a dense model equals it.

NNI's masked model only multiplies weights by masks: after a batch norm, a removed channel is a constant other than
zero, which later layers read. The dense model has no such channel. So here the per-channel parameters of later
operations are masked too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map, tree_map_only

from nni_topo.context import leaving_out
from nni_topo.errors import NniTopoError, SpeedupError, out_of_memory, raised
from nni_topo.network.layers.derived import give_back_classes, with_known_layers
from nni_topo.network.layers.slicing import keep
from nni_topo.network.runtime.arguments import INPUTS, MASKS, MODEL, check_model
from nni_topo.network.runtime.choices import ChoicesNoted, ChoicesRepeated
from nni_topo.network.runtime.comparison import agree, difference
from nni_topo.network.runtime.copies import detached_copy, evaluating, in_double
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import (
    Call,
    batch_size,
    call_in_precision,
    first_samples,
    random_like,
    returned_tensors,
    take_samples,
    tensors_of,
)
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.reports import hand_on_report
from nni_topo.network.runtime.results import in_training, results_in_training, run_for_results
from nni_topo.network.runtime.switches import DrawnInOrder, random_state_kept
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

_RTOL = 1e-4  # relative to the largest output; a tenth of it is above rounding in single precision
_Variation = tuple[float, float]
"""A factor and a shift: inputs become ``(input + shift) * factor``."""
# Shifted both ways, because trained weights may respond to only one.
_VARIATIONS: tuple[_Variation, ...] = ((0.01, 0.0), (100.0, 0.0), (1.0, 3.0), (1.0, -3.0))


def apply_masks(model: torch.nn.Module, masks: FullMasks, *, light: bool = False) -> torch.nn.Module:
    """Return a copy of a model in which weights and biases are multiplied by their masks.

    ``light``: unmasked parameters share the model's memory, so they must not be changed in place.
    """
    reference: torch.nn.Module = detached_copy(model, light=light)
    ties = find_ties(reference)
    untie(reference, ties)
    with torch.no_grad():
        for name, targets in masks.items():
            module = reference.get_submodule(name)
            for target, mask in targets.items():
                keep(module, target, getattr(module, target) * mask)
    tie_again(reference, ties)
    hand_on_report(model, reference, "masked (nni_topo.masked_model)")
    return reference


def check_equal(
    reference: torch.nn.Module,
    dense: torch.nn.Module,
    call: Call,
    kept_indices: KeptIndices,
    *,
    advise: Callable[[], str] | None = None,
    one_by_one: bool = False,
) -> str:
    """Raise a SpeedupError unless two models agree, to 1e-4 of the largest output, on random inputs.

    Floats are also scaled and shifted, because operations may treat small and large numbers differently.
    ``one_by_one``: never in one batch, because the models may do something else with another number of samples. Returns
    a description of the compared inputs.
    """
    drawn = random_like(call, torch.Generator().manual_seed(1))
    pair, has_floats = (reference, dense), any(tensor.is_floating_point() for tensor in tensors_of(drawn))
    variations = _VARIATIONS if has_floats else ()
    # Usually one run on a batch of all inputs is enough, in double precision only if needed.
    batch = _together(drawn, variations) if variations else first_samples(drawn)
    is_half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in reference.parameters())
    precisions: tuple[bool, ...] = (False, True)
    if one_by_one:
        precisions = ()
    elif is_half:
        precisions = (True,)
    for double in precisions:
        agreed = None if batch is None else _agreed(pair, batch, 1 + len(variations), double=double)
        if agreed is not None:
            return _describe_inputs(drawn, [variation for at, variation in enumerate(variations, 1) if at in agreed])
    # Otherwise compare each input separately.
    compared, kind = list[_Variation](), "random inputs"
    try:
        _check_one(pair, drawn, kept_indices, advise)
    except SpeedupError:
        if _runs(reference, drawn):
            raise
        # Numbers such as lengths can't be drawn.
        drawn, kind = call, "the example inputs"
        _check_one(pair, drawn, kept_indices, advise)
    for variation in variations:
        varied = _varied(drawn, variation)
        try:
            outputs = _outputs(reference, varied, double=True)
        except Exception:  # a model may reject some numbers
            continue
        if all(bool(output.isfinite().all()) for output in outputs):
            _check_one(pair, varied, kept_indices, advise, variation)
            compared.append(variation)
    return _describe_inputs(drawn, compared, kind)


def _runs(model: torch.nn.Module, call: Call) -> bool:
    """Tell whether a model runs on a call at all."""
    try:
        _outputs(model, call)
    except Exception as error:  # a user's forward may raise anything
        if out_of_memory(error):
            raise
        return False
    return True


def check_training_mode(reference: torch.nn.Module, dense: torch.nn.Module, call: Call) -> bool:
    """Raise a SpeedupError unless a dense model returns in training mode what the masked one does, by name and shape.

    Returns False if the masked model can't be run in training mode, which may need targets.
    """
    expected = results_in_training(reference, call)
    if expected is None:
        return False
    advice = leaving_out("the layers that give them")
    rule = f"a dense model must return the unpruned shapes in training mode, too: {advice}"
    try:
        actual = run_for_results(in_training(dense), call)
    except Exception as error:  # a user's forward may raise anything
        if out_of_memory(error):
            raise
        raise SpeedupError(f"{rule}, got {raised(error)}") from error
    shapes = [{name: tuple(tensor.shape) for name, tensor in returned} for returned, _ in (expected, actual)]
    for name in {**shapes[0], **shapes[1]}:
        expected_shape, actual_shape = (shapes_by_name.get(name, "nothing") for shapes_by_name in shapes)
        if expected_shape != actual_shape:
            raise SpeedupError(f"{rule}, got {actual_shape} instead of {expected_shape} ({name})")
    return True


def _varied(call: Call, variation: _Variation) -> Call:
    """Return a call with shifted and scaled floats."""
    factor, shift = variation

    def vary(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return (tensor + shift) * factor
        return tensor

    new: Call = tree_map_only(torch.Tensor, vary, call)
    return new


def _together(call: Call, variations: tuple[_Variation, ...]) -> Call | None:
    """Return a batch of a call's first sample and its variations; None if a float tensor isn't a batch."""
    size = batch_size(call)
    for tensor in tensors_of(call):
        if tensor.is_floating_point() and (tensor.dim() == 0 or len(tensor) != size):
            return None
    sample = take_samples(call, torch.arange(1))

    def join(*same: Any) -> Any:
        has_samples = isinstance(same[0], torch.Tensor) and same[0].dim() > 0 and len(same[0]) == 1
        if has_samples:
            return torch.cat(same)
        return same[0]

    batch: Call = tree_map(join, sample, *(_varied(sample, variation) for variation in variations))
    return batch


def _describe_inputs(compared: Call, variations: list[_Variation], kind: str = "random inputs") -> str:
    """Describe the inputs on which two models were compared."""
    shapes = " and ".join(str(tuple(tensor.shape[1:])) for tensor in tensors_of(compared))
    variation_texts = "".join(f", {_named(variation)}" for variation in variations)
    return f"{kind} of shape {shapes}{variation_texts}"


def _named(variation: _Variation) -> str:
    factor, shift = variation
    if shift:
        return f"shifted by {shift:g}"
    return f"times {factor:g}"


def _agreed(
    pair: tuple[torch.nn.Module, torch.nn.Module], batch: Call, blocks: int, *, double: bool
) -> set[int] | None:
    """Return the indices of a batch's inputs with finite outputs; None unless two models agree on all of these."""
    try:
        expected, actual = (_outputs(model, batch, double=double) for model in pair)
    except Exception:  # a model may reject another scale or batch size, or run out of memory
        return None
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        return None
    finite = set(range(blocks))
    tolerance = _RTOL if double else _RTOL / 10
    for expected_output, actual_output in zip(expected, actual, strict=True):
        # A loss, for example, has no batch dimension to split.
        parts = blocks if expected_output.dim() and len(expected_output) % blocks == 0 else 1
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]] = [(expected_output, actual_output)]
        if parts > 1:
            pairs = zip(expected_output.chunk(parts), actual_output.chunk(parts), strict=True)
        for at, (expected_part, actual_part) in enumerate(pairs):
            if not bool(expected_part.isfinite().all()):
                finite = finite - {at} if parts > 1 else set()
            elif difference(expected_part, actual_part) > tolerance:
                return None
    if 0 in finite:
        return finite
    return None


def _check_one(
    pair: tuple[torch.nn.Module, torch.nn.Module],
    drawn: Call,
    kept_indices: KeptIndices,
    advise: Callable[[], str] | None,
    variation: _Variation | None = None,
) -> None:
    """Raise a SpeedupError unless two models agree on one input."""
    # In double precision, equal models differ by at most 1e-12, however deep they are.
    for double in (True, False):
        records: list[dict[str, torch.Tensor]] = [{}, {}]
        try:
            expected, actual = (
                _outputs(model, drawn, kept_indices, record, double=double)
                for model, record in zip(pair, records, strict=True)
            )
            if not agree(expected, actual, _RTOL):
                # Among values that are equal but for rounding, they may have chosen different ones.
                records, noted = [{}, {}], ChoicesNoted()
                with noted:
                    expected = _outputs(pair[0], drawn, kept_indices, records[0], double=double)
                with ChoicesRepeated(noted.choices):
                    actual = _outputs(pair[1], drawn, kept_indices, records[1], double=double)
            break
        except Exception as error:  # a user's forward may raise anything, for example for an unsupported dtype
            if double:
                continue
            if out_of_memory(error) or isinstance(error, NniTopoError):
                raise
            raise SpeedupError(
                "a dense model must run on inputs of the example's shape: a fixed size in its forward may not "
                f"fit the pruned channels, got {raised(error)}"
            ) from error
    where = _first_difference(records[0], records[1], kept_indices)
    shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors_of(drawn))
    where += f", inputs of shape {shapes}"
    if variation is not None:
        where += f" {_named(variation)}"
    output_shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, actual)]
    if output_shapes[0] != output_shapes[1]:
        raise SpeedupError(
            f"the shape of the model's output must not change: {leaving_out('the layer that gives it')}, "
            f"got {output_shapes[1]} instead of {output_shapes[0]} ({where})"
        )
    worst = max((difference(*outputs) for outputs in zip(expected, actual, strict=True)), default=0.0)
    if not worst <= _RTOL:
        raise SpeedupError(
            f"a dense model must compute what the masked one does to {_RTOL:g} of its largest output, "
            f"got a difference of {worst:.3g} ({where})" + (f"; {advise()}" if advise else "")
        )


def _outputs(
    model: torch.nn.Module,
    call: Call,
    looked_at: Iterable[str] = (),
    record: dict[str, torch.Tensor] | None = None,
    *,
    double: bool = False,
) -> list[torch.Tensor]:
    """Run a copy of a model; ``record`` gets the output of each ``looked_at`` module's first call."""
    runner = evaluating(in_double(model) if double else detached_copy(model, light=True))

    def look(name: str, _: Any, output: Any) -> None:
        if record is not None and isinstance(output, torch.Tensor) and name not in record:
            record[name] = output.clone()

    looks = list[tuple[torch.nn.Module, Callable[[Any, Any], None]]]()
    for name in looked_at:
        module = runner.get_submodule(name)
        if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
            looks.append((module, partial(look, name)))
    # Clones, because a forward may change its inputs in place. Both models draw the same random numbers.
    if double:
        call = call_in_precision(call, torch.float64)
    args, kwargs = tree_map_only(torch.Tensor, torch.clone, call)
    with torch.no_grad(), random_state_kept(), DrawnInOrder(), watched(leaving=looks):
        return returned_tensors(runner(*args, **kwargs))


def _first_difference(
    expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor], kept_indices: KeptIndices
) -> str:
    """Describe which module is the first whose output differs."""
    for name, full in expected.items():
        small = actual.get(name)
        for d, indices in enumerate(kept_indices[name][1:], start=1):
            # The inputs may have more positions than the example; all are kept.
            if small is not None and small.dim() == full.dim() and len(indices) == small.shape[d] < full.shape[d]:
                full = full.index_select(d, indices.to(full.device))
        if small is None or small.shape != full.shape:
            return f"from {name} on, whose output has another shape than expected"
        if difference(full, small) > _RTOL:
            return f"from {name} on"
    return "after the last layer"


@public(model=MODEL, example_inputs=INPUTS, masks=MASKS, reconcile=FLAG)
def masked_model(
    model: torch.nn.Module, example_inputs: Any, masks: MasksLike, *, reconcile: bool = False
) -> torch.nn.Module:
    """Copy a model with its masked channels set to zero, also after batch norms.

    Parameters
    ----------
    model : torch.nn.Module
        The model, not wrapped by a pruner. It isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model: one tensor, positional or keyword arguments.
    masks : mapping of str to mapping of str to Tensor or None
        NNI's masks, ``{module: {parameter: mask}}``.
    reconcile : bool, default=False
        First make the masks of coupled layers agree, as `to_dense` does: a channel that any of these layers keeps is
        kept in all, with its weights. If False, each layer gets its own mask. Masks of this package's pruners on a list
        from `dependency_groups` agree already, unless channels are shuffled.

    Returns
    -------
    torch.nn.Module
        A copy with weights and biases multiplied by their masks. A channel is removed if no layer that shares it keeps
        it. Then its bias is zero, and so are its entries in free parameters, such as a position embedding, and in the
        weight and bias of a batch norm. Layers read zeros in its place, and norms over channels run over the kept
        channels. Shared parameters are shared in the copy too unless their masks differ.

    Raises
    ------
    ConfigError
        If masks don't fit the model.
    SpeedupError
        If the model is still wrapped or can't be traced, or a layer would be empty.
    DataError
        If a parameter is NaN or infinite, or a buffer is NaN.

    Notes
    -----
    NNI's masked model differs: its group and layer norms count removed channels as zeros in their statistics, and its
    layers read the constants that operations such as a sigmoid make of zeros.
    """
    check_model(model)
    user_model, model = model, with_known_layers(model)
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
    give_back_classes(user_model, masked)
    return masked
