"""From masks to a smaller dense model that computes the same, and a report of what was pruned and what was kept."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Literal

import numpy as np
import torch

from nni_topo.errors import listed
from nni_topo.network.attention.config import tell_config
from nni_topo.network.attention.unfused.own_width import take_own_width
from nni_topo.network.channels import reasons
from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.reasons import Reasons
from nni_topo.network.layers.derived import give_back_classes, with_known_layers
from nni_topo.network.layers.integer_attributes import put_sizes
from nni_topo.network.layers.kinds import feature_dimension
from nni_topo.network.runtime.arguments import INPUTS, MASKS, MODEL, ROUND_TO, check_model
from nni_topo.network.runtime.copies import (
    detached_copy,
    evaluating,
    forget_evaluated,
    left_alone,
    put_modes_of,
    unwrapped_copy,
)
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.switches import as_written, random_state_kept, seed_torch
from nni_topo.network.speedup.analysis import Analysis, Facts, unused_tensors
from nni_topo.network.speedup.constants import TOLERANCE, absorb, constants_read, fit_norms
from nni_topo.network.speedup.dense_report import DenseReport, dense_report, remember_report
from nni_topo.network.speedup.dependency import DependencyGroups
from nni_topo.network.speedup.equivalence import apply_masks, check_equal
from nni_topo.network.speedup.leaving_out import leave_out
from nni_topo.network.speedup.reconcile import MasksLike, Resolved, check_masks, resolve, warn_of_kept
from nni_topo.network.speedup.replace import Cutter, kept_outputs
from nni_topo.network.speedup.width_attributes import count_anew
from nni_topo.sharing import find_ties, named_tensors, tie_again, untie

_logger = logging.getLogger(__name__)


@public(model=MODEL, example_inputs=INPUTS, masks=MASKS, round_to=ROUND_TO)
@as_written()
def to_dense(
    model: torch.nn.Module,
    example_inputs: Any,
    masks: MasksLike,
    *,
    groups: DependencyGroups | None = None,
    round_to: int | None = None,
    constants: Literal["zero", "keep"] = "zero",
    check: bool = True,
) -> torch.nn.Module:
    """Remove masked channels: return a smaller dense model without masks.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model after ``pruner.unwrap_model()``. It isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model: one tensor, positional or keyword arguments; the first dimension is the batch.
    masks : mapping of str to mapping of str to Tensor or None
        NNI's masks, ``{module: {parameter: mask}}``, of any pruner. They aren't changed.
    groups : DependencyGroups, optional
        What `dependency_groups` returned for this model and inputs of this size. Then the model isn't traced again,
        which takes most of the time for a detector. Only weights may have changed since.
    round_to : int, optional
        If given, every pruned layer keeps a multiple of this many channels, or all of them. Those with the largest
        weights (L1 norm over all coupled layers) come back.
    constants : {"zero", "keep"}, default="zero"
        What removed channels contribute. ``"zero"``: nothing, as in `masked_model`. ``"keep"``: what they do in the
        model that NNI's pruner has wrapped, for networks that were trained so. The layer that reads a constant, as the
        shift of a batch norm, adds what it makes of it to its bias, or takes it off the running mean of the batch norm
        after it. Norms over channels get the factor and shift that undo most of what removed channels did as zeros
        among the others, measured on ``example_inputs``, which should be a batch of real ones.
    check : bool, default=True
        Compare the dense model with the masked one, in evaluation mode, on random inputs: as they are, times 0.01 and
        100 and shifted by 3 both ways where they are floats. They may differ by 1e-4 of the largest output. Where the
        size of the inputs may decide something (views that join channels with places, branches), the two are compared
        at a second size too. ``report.checked`` says on what.

    Returns
    -------
    torch.nn.Module
        A new model of the same class with fewer channels, in the mode of ``model``, module by module, put there by its
        own ``train`` and ``eval`` where it has such methods. Attributes that hold a number of channels, as the size of
        a split, get the new number where the forward reads them so, or where a table says what they count, such as
        timm's ``feature_info`` (`register_width_attribute`). All other attributes stay. Modules that share a weight
        lose the same channels and share it still. Its ``report`` is a `DenseReport` of the channels of every layer
        before and after, and why some stay although they are masked; a model with a ``report`` of its own keeps that.

    Raises
    ------
    ConfigError
        If masks, inputs, ``groups``, ``round_to`` or ``constants`` can't be used.
    DataError
        If the model holds NaN or infinite values.
    SpeedupError
        If the model is still wrapped, a layer would be emptied, the output's shape would change, or
        the dense model doesn't compute what the masked one does.

    See Also
    --------
    dependency_groups : Makes pruners choose the same channels of coupled layers.
    masked_model : The masked model of the comparison.

    Notes
    -----
    A channel is removed with its bias, its batch norm and the depth-wise convolution after it. It isn't there: a norm
    over channels runs over those that are left, and a layer that reads a removed channel reads nothing, also after an
    activation that isn't zero at zero (sigmoid, softplus). So the result may differ from NNI's wrapped model.
    `compensate` puts what removed channels contributed on average into the bias. Masked weights within kept channels
    are zeros.

    Where the masks of coupled layers differ, every channel that one of them keeps is kept, with the weights of
    ``model``: the masked model of the comparison is that of ``masked_model(..., reconcile=True)``. A layer without a
    mask keeps all channels. So do modules that can't be cut, layers before them or before attention that couldn't be
    traced, and recurrent layers with a projection. Attention loses whole heads; other recurrent layers lose units with
    all of their gates, the same in all levels and directions. A head or unit is kept if a mask keeps one of its rows.
    One warning names a few of the layers that keep channels, and why; the report has all.

    With ``constants="keep"``, a layer that pads with zeros treats a constant as if it went on beyond the border: values
    next to the border differ from those of NNI's wrapped model. A constant is dropped where a transposed convolution
    reads it, where the layer that reads it has neither bias nor batch norm, and where it differs by position;
    ``report.notes`` names these layers. After `compensate`, which solves for removed channels that aren't there,
    ``"zero"`` is right.

    Cost: two to four forward passes to trace the model and three to compare; where the size may decide something,
    another trace and comparison; two more where a network holds attributes as timm's and torchvision's do.
    """
    check_model(model)
    return dense_of(
        model,
        example_inputs,
        masks,
        round_to,
        constants=constants,
        check=check,
        facts=None if groups is None else groups.facts_for(model),
    )


@as_written()
def dense_of(
    model: torch.nn.Module,
    example_inputs: Any,
    masks: MasksLike,
    round_to: int | None = None,
    *,
    constants: Literal["zero", "keep"] = "zero",
    check: bool = True,
    facts: Facts | None = None,
) -> torch.nn.Module:
    """Return what :func:`to_dense` does; ``facts``: what is known of the model, or of one with other weights."""
    given, model = model, with_known_layers(model)
    call = call_arguments(example_inputs, model)
    full = check_masks(model, masks)
    with random_state_kept(), torch.inference_mode(False):
        seed_torch(0)
        analysis = Analysis(model, call, facts)
        flow = analysis.flow
        original = evaluating(unwrapped_copy(model, light=True))
        resolved = resolve(original, flow, full, round_to)
        reference = apply_masks(original, resolved.masks, light=True)
        notes = list[str]()
        if constants == "keep":
            notes += _absorb_constants(analysis, original, reference, resolved.is_kept)
        dense = _cut(analysis, original, reference, resolved)
        leave_out(reference, flow, resolved.is_kept)
        checked = _compare(analysis, reference, dense, resolved.is_kept) if check else ""
        if constants == "keep":
            wrapped = apply_masks(original, resolved.masks, light=True)
            if left := fit_norms(wrapped, dense, flow, resolved.is_kept, call):
                notes.append(f"these norms over channels run as they are over those that are left: {', '.join(left)}")
        stale = count_anew(original, dense, call)
        report = dense_report(model, dense, full, resolved.reasons, stale)
        parameters, parted = dict(dense.named_parameters(remove_duplicate=False)), list[str]()
        for names in find_ties(original):
            if len({id(parameters[name]) for name in names if name in parameters}) > 1:
                parted += names
        if parted:
            notes.append(f"modules that shared these have one each now, as they differ: {', '.join(parted)}")
        if unread := _unread(flow, original, dense, report):
            told = (
                "no run of the model has read these, so they keep the width of layers that lost channels: "
                f"{listed(unread)}. If a call with other arguments reads them, as one with labels or masks does, pass "
                "batches with these arguments"
            )
            notes.append(told)
            _logger.warning("%s", told)
        report = dataclasses.replace(report, checked=checked, notes=tuple(notes))
        _warn(report, resolved)
        remember_report(dense, report)
        # Last, for all before compares it with the model's evaluated copy.
        put_modes_of(model, dense)
    give_back_classes(given, dense)
    return dense


def _absorb_constants(
    analysis: Analysis, original: torch.nn.Module, reference: torch.nn.Module, is_kept: np.ndarray
) -> list[str]:
    """Fold the constants that pruned channels are under NNI's masks into biases of the masked model, in place.

    Returns notes on what is lost.
    """
    flow = analysis.flow
    # As in NNI's masked model, in which batch norms turn the zeros that arrive into other values.
    masked = detached_copy(original, light=True)
    leave_out(masked, flow, is_kept, of_norms_alone=True)
    with left_alone(masked):
        kept, lacking = constants_read(masked, flow, is_kept, analysis.call)
        if kept and analysis.second is not None:
            others, _ = constants_read(masked, flow, is_kept, analysis.second.call)
            for name, values in kept.items():
                is_same = (values - others.get(name, 0 * values)).abs() <= TOLERANCE * values.abs()
                if not bool(is_same.all()):
                    kept[name] = values * is_same
                    lacking = list(dict.fromkeys([*lacking, name]))
    # Each layer is cut for itself, so each needs tensors of its own.
    untie(reference, find_ties(reference))
    absorb(reference, flow, is_kept, kept)
    told = "what pruned channels contribute is no constant that can be kept, and is dropped"
    return [f"{told}: {', '.join(lacking)}"] if lacking else []


def _cut(
    analysis: Analysis, original: torch.nn.Module, reference: torch.nn.Module, resolved: Resolved
) -> torch.nn.Module:
    """Cut a copy of the masked model: layers, heads, attributes that hold sizes. It is in evaluation mode."""
    flow, is_kept = analysis.flow, resolved.is_kept
    # Layers that are cut, or that constants are folded into, get new tensors; others may share the reference's.
    dense: torch.nn.Module = detached_copy(reference, light=True)
    # Each layer is cut for itself, so each needs tensors of its own.
    untie(dense, find_ties(dense))
    cutter = Cutter(dense, flow, is_kept)
    cutter.cut()
    ties = find_ties(original)
    cutter.cut_unused(ties)
    put_sizes(dense, flow.sizes_kept(is_kept))
    for name, dim in flow.own_widths.items():
        # Forwards that reshape a layer's output to the width of their input are rewritten where the layer was cut.
        before, after = ([each.shape for each in net.get_submodule(name).parameters()] for net in (original, dense))
        if before != after:
            take_own_width(dense.get_submodule(name), dim)
    tie_again(dense, ties)
    tell_config(dense, original, analysis.call)
    forget_evaluated(dense)
    # Layers that weren't cut have the original's memory still.
    shapes = {name: each.shape for name, each in original.named_parameters(remove_duplicate=False)}
    for name, parameter in dense.named_parameters():
        if parameter.shape == shapes.get(name):
            parameter.data = parameter.data.clone()
    return dense


def _compare(analysis: Analysis, reference: torch.nn.Module, dense: torch.nn.Module, is_kept: np.ndarray) -> str:
    """Raise a SpeedupError unless the dense model gives the masked one's outputs; return on what they were compared."""
    kept = kept_outputs(analysis.flow, is_kept)

    def why_unequal() -> str:
        flow, held, why = analysis.flow, analysis.unprunable, dict[str, Reasons]()
        for name, layer in flow.layers.items():
            if name in kept:
                removed = np.ones(layer.channels, dtype=np.bool_)
                removed[kept[name][feature_dimension(flow.fetch_attr(name))].cpu().numpy()] = False
                removed_ids = flow.group_ids_of(name)[removed].tolist()
                if found := dict.fromkeys(held[group_id] for group_id in removed_ids if group_id in held):
                    why[name] = tuple(found)
        return reasons.unequal(why)

    with left_alone(dense):
        checked = check_equal(reference, dense, analysis.call, kept, advise=why_unequal)
        if not analysis.depends_on_size:
            return checked
        if analysis.second is None:
            return f"{checked}; no other size was found that the model takes, so it is right at this size alone"
        other = check_equal(reference, dense, analysis.second.call, kept, advise=why_unequal)
    return f"{checked}; {other}"


def _unread(flow: ChannelFlow, original: torch.nn.Module, dense: torch.nn.Module, report: DenseReport) -> list[str]:
    """Name the tensors that no run has read, and that have the old width of a pruned layer."""
    lost = {row.before for row in report.rows if row.after < row.before}
    before, after, found = named_tensors(original), named_tensors(dense), list[str]()
    for name in unused_tensors(original, flow.traced.graph):
        is_whole = name in after and after[name].shape == before[name].shape
        owner: Any = type(original.get_submodule(name.rpartition(".")[0]))
        if is_whole and not lost.isdisjoint(before[name].shape) and not owner.__module__.startswith("torch.nn."):
            found.append(name)
    return found


def _warn(report: DenseReport, resolved: Resolved) -> None:
    """Warn of stale attributes, and of masked channels that stay for another reason than rounding."""
    if report.stale:
        _logger.warning(
            "attributes keep the number of the unpruned network, because the tensor whose channels they count by "
            "register_width_attribute has another number of channels or wasn't computed: %s (all are in "
            "dense.report.stale)",
            listed(f"{name} {number}" for name, number in report.stale.items()),
        )
    others = {row.name: f"{row.kept} of {row.before} ({row.reason})" for row in report.kept}
    # What is kept for rounding alone, or without its weights, is no reason to warn.
    silent = resolved.reasons.keys() - resolved.kept.keys()
    warn_of_kept({name: resolved.kept.get(name, text) for name, text in others.items() if name not in silent})
