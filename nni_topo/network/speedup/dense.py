"""Turn a masked model into a smaller dense one that computes the same, with a report of pruned and kept channels."""

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
from nni_topo.network.runtime.copies import (
    detached_copy,
    evaluating,
    forget_evaluated,
    left_alone,
    put_modes_of,
    unwrapped_copy,
)
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.network.runtime.reports import tell_compensated
from nni_topo.network.runtime.switches import as_written, random_state_kept, seed_torch
from nni_topo.network.speedup.analysis import Analysis, Facts, unused_tensors
from nni_topo.network.speedup.constants import TOLERANCE, absorb, constants_read, fit_norms
from nni_topo.network.speedup.dense_report import DenseReport, dense_report, remember_report
from nni_topo.network.speedup.equivalence import apply_masks, check_equal, check_training_mode
from nni_topo.network.speedup.leaving_out import leave_out
from nni_topo.network.speedup.reconcile import MasksLike, Resolved, check_masks, resolve, warn_of_kept
from nni_topo.network.speedup.replace import Cutter, kept_outputs
from nni_topo.network.speedup.width_attributes import count_anew
from nni_topo.sharing import find_ties, named_tensors, tie_again, untie

_logger = logging.getLogger(__name__)


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
    """Do the work of :func:`nni_topo.to_dense`; ``facts``: known facts of the model, or of one with other weights."""
    user_model, model = model, with_known_layers(model)
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
        checked = ""
        if check:
            checked = _compare(analysis, reference, dense, resolved.is_kept)
        if constants == "keep":
            wrapped = apply_masks(original, resolved.masks, light=True)
            if unfitted := fit_norms(wrapped, dense, flow, resolved.is_kept, call):
                notes.append(
                    f"these norms over channels couldn't be fitted to the kept channels: {', '.join(unfitted)}"
                )
        stale = count_anew(original, dense, call)
        report = dense_report(model, dense, full, resolved.reasons, stale)
        parameters, parted = dict(dense.named_parameters(remove_duplicate=False)), list[str]()
        for names in find_ties(original):
            if len({id(parameters[name]) for name in names if name in parameters}) > 1:
                parted += names
        if parted:
            notes.append(f"no longer shared, because their values differ now: {', '.join(parted)}")
        if unread := _unread(flow, original, dense, report):
            note = (
                "no run of the model has read these, so they keep the width of layers that lost channels: "
                f"{listed(unread)}. If a call with other arguments reads them, as one with labels or masks does, pass "
                "batches with these arguments"
            )
            notes.append(note)
            _logger.warning("%s", note)
        elif check and (not analysis.trace.reads_mode or check_training_mode(reference, dense, call)):
            checked += "; the shapes of the outputs in training mode"
        report = dataclasses.replace(report, checked=checked, notes=tuple(notes))
        _warn(report, resolved)
        remember_report(dense, report)
        # Last, because the comparisons before need evaluation mode.
        put_modes_of(model, dense)
    give_back_classes(user_model, dense)
    tell_compensated(dense, False)
    return dense


def _absorb_constants(
    analysis: Analysis, original: torch.nn.Module, reference: torch.nn.Module, is_kept: np.ndarray
) -> list[str]:
    """Fold the constant values of pruned channels in NNI's wrapped model into biases of the masked model, in place.

    Returns notes on lost contributions.
    """
    flow = analysis.flow
    # As in NNI's masked model, whose batch norms turn zeros into other values.
    masked = detached_copy(original, light=True)
    leave_out(masked, flow, is_kept, of_norms_alone=True)
    with left_alone(masked):
        constants, lacking = constants_read(masked, flow, is_kept, analysis.call)
        second, variants = analysis.second, list[Analysis]()
        if constants and second is not None:
            variants.append(second)
        if constants:
            variants += analysis.by_samples
        for variant in variants:
            variant_constants, _ = constants_read(masked, flow, is_kept, variant.call)
            for name, values in constants.items():
                is_same = (values - variant_constants.get(name, 0 * values)).abs() <= TOLERANCE * values.abs()
                if not bool(is_same.all()):
                    constants[name] = values * is_same
                    lacking = list(dict.fromkeys([*lacking, name]))
    # Each layer is cut separately, so each needs tensors of its own.
    untie(reference, find_ties(reference))
    absorb(reference, flow, is_kept, constants)
    text = "contributions of pruned channels were dropped because they can't be kept as constants"
    if lacking:
        return [f"{text}: {', '.join(lacking)}"]
    return []


def _cut(
    analysis: Analysis, original: torch.nn.Module, reference: torch.nn.Module, resolved: Resolved
) -> torch.nn.Module:
    """Cut a copy of the masked model: layers, heads, and attributes that hold sizes. Return it in evaluation mode."""
    flow, is_kept = analysis.flow, resolved.is_kept
    # Layers that are cut, or that constants are folded into, get new tensors; others may share the reference's.
    dense: torch.nn.Module = detached_copy(reference, light=True)
    # Each layer is cut separately, so each needs tensors of its own.
    untie(dense, find_ties(dense))
    cutter = Cutter(dense, flow, is_kept)
    cutter.cut()
    ties = find_ties(original)
    cutter.cut_unused(ties)
    put_sizes(dense, flow.sizes_kept(is_kept))
    for name, dim in flow.own_widths.items():
        # Rewrite a forward that reshapes a layer's output to the width of its input, if the layer was cut.
        before, after = ([tensor.shape for tensor in net.get_submodule(name).parameters()] for net in (original, dense))
        if before != after:
            take_own_width(dense.get_submodule(name), dim)
    tie_again(dense, ties)
    tell_config(dense, original, analysis.call)
    forget_evaluated(dense)
    # Uncut layers still share the original's memory.
    shapes = {name: tensor.shape for name, tensor in original.named_parameters(remove_duplicate=False)}
    for name, parameter in dense.named_parameters():
        if parameter.shape == shapes.get(name):
            parameter.data = parameter.data.clone()
    return dense


def _compare(analysis: Analysis, reference: torch.nn.Module, dense: torch.nn.Module, is_kept: np.ndarray) -> str:
    """Raise a SpeedupError unless the dense and the masked model agree; return a description of the compared inputs."""
    kept_indices = kept_outputs(analysis.flow, is_kept)

    def why_unequal() -> str:
        flow, unprunable, why = analysis.flow, analysis.unprunable, dict[str, Reasons]()
        for name, layer in flow.layers.items():
            if name in kept_indices:
                removed = np.ones(layer.channels, dtype=np.bool_)
                removed[kept_indices[name][feature_dimension(flow.fetch_attr(name))].cpu().numpy()] = False
                removed_ids = flow.group_ids_of(name)[removed].tolist()
                if causes := dict.fromkeys(unprunable[group_id] for group_id in removed_ids if group_id in unprunable):
                    why[name] = tuple(causes)
        return reasons.unequal(why)

    with left_alone(dense):
        is_by_samples = bool(analysis.by_samples)
        checked = check_equal(
            reference, dense, analysis.call, kept_indices, advise=why_unequal, one_by_one=is_by_samples
        )
        for variant in analysis.variants:
            description = check_equal(
                reference, dense, variant.call, kept_indices, advise=why_unequal, one_by_one=is_by_samples
            )
            checked += f"; {description}"
        if analysis.depends_on_size and analysis.second is None:
            checked += "; the model runs on no other size that was tried, so only this size was checked"
    return checked


def _unread(flow: ChannelFlow, original: torch.nn.Module, dense: torch.nn.Module, report: DenseReport) -> list[str]:
    """Name the tensors that no run has read and that still have the old width of a pruned layer."""
    lost = {row.before for row in report.rows if row.after < row.before}
    before, after, unread = named_tensors(original), named_tensors(dense), list[str]()
    for name in unused_tensors(original, flow.traced.graph):
        is_whole = name in after and after[name].shape == before[name].shape
        owner: Any = type(original.get_submodule(name.rpartition(".")[0]))
        if is_whole and not lost.isdisjoint(before[name].shape) and not owner.__module__.startswith("torch.nn."):
            unread.append(name)
    return unread


def _warn(report: DenseReport, resolved: Resolved) -> None:
    """Warn of stale attributes, and of masked channels that are kept for other reasons than rounding."""
    if report.stale:
        _logger.warning(
            "attributes keep the number of the unpruned network, because the tensor whose channels they count by "
            "register_width_attribute has another number of channels or wasn't computed: %s (all are in "
            "dense.report.stale)",
            listed(f"{name} {number}" for name, number in report.stale.items()),
        )
    kept_texts = {row.name: f"{row.kept} of {row.before} ({row.reason})" for row in report.kept}
    # Don't warn of channels that are kept only for rounding.
    silent = resolved.reasons.keys() - resolved.kept.keys()
    warn_of_kept({name: resolved.kept.get(name, text) for name, text in kept_texts.items() if name not in silent})
