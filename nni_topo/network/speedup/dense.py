"""From masks to a smaller dense model that computes the same."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from nni.compression.speedup.replacer import Replacer

from nni_topo.errors import ConfigError, checked
from nni_topo.network.attention import tell_config
from nni_topo.network.channels import ChannelFlow, Reasons, reasons
from nni_topo.network.graph import Steps
from nni_topo.network.layers import number_at, put_sizes, sizes_shown, stale_numbers
from nni_topo.network.runtime import (
    INPUTS,
    MASKS,
    MODEL,
    ROUND_TO,
    Call,
    call_arguments,
    check_model,
    detached_copy,
    fast_paths_off,
    leaves_models_alone,
    left_alone,
    random_state_kept,
)
from nni_topo.network.speedup.constant_channels import (
    Brought,
    absorb,
    brought,
    carry,
    constants_read,
    dropped,
    is_bordered,
    norms_of_constants,
)
from nni_topo.network.speedup.equivalence import apply_masks, check_equal
from nni_topo.network.speedup.explain import way_forward
from nni_topo.network.speedup.network import Network
from nni_topo.network.speedup.reconcile import FullMasks, Masks, Resolved, check_masks, resolve, warn_of_kept
from nni_topo.network.speedup.replace import DenseSpeedup, kept_outputs, narrowed
from nni_topo.network.speedup.report import DenseReport, dense_report
from nni_topo.sharing import find_ties, tie_again, untie

_logger = logging.getLogger(__name__)


@checked(model=MODEL, example_inputs=INPUTS, masks=MASKS, round_to=ROUND_TO)
@leaves_models_alone
@fast_paths_off()
def to_dense(
    model: torch.nn.Module,
    example_inputs: Any,
    masks: Masks,
    *,
    round_to: int | Literal["auto"] | None = None,
    constants: Literal["zero", "keep"] = "zero",
    check: bool = True,
    rtol: float = 1e-4,
    customized_replacers: Sequence[Replacer] = (),
) -> torch.nn.Module:
    """Build the dense model that computes what the masked model does.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model after ``pruner.unwrap_model()``. It isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model: one tensor, positional or keyword arguments; the first dimension is the batch.
    masks : mapping of str to mapping of str to Tensor or None
        NNI's masks, ``{module: {parameter: mask}}``, of any pruner. They aren't changed.
    round_to : int or "auto", optional
        If given, every pruned layer keeps a multiple of this many channels, or all of them. ``"auto"`` is what the
        model's device computes at once: 8 channels on a GPU; 16, 8 or 4 on a CPU, by its vector registers. Those with
        the largest weights (L1 norm over all tied layers) come back.
    constants : {"zero", "keep"}, default="zero"
        What becomes of the shift that a batch norm adds to a removed channel. ``"zero"``: it goes with the channel, as
        in `masked_model`. ``"keep"``: it stays, as in the model that NNI's pruner has wrapped; the layer that reads it
        adds what it makes of it to its bias, or takes it off the running mean of the batch norm behind.
    check : bool, default=True
        Compare the dense model with the masked one, in evaluation mode, on random inputs: as they are, times 0.01 and
        100 and shifted by 3 both ways where they are floats. ``report.checked`` says on which; images are compared
        smaller where the model takes them so.
    rtol : float, default=1e-4
        The largest difference allowed, relative to the largest absolute value of the masked model's output.
    customized_replacers : sequence of nni.compression.speedup.Replacer, default=()
        As of NNI's ``ModelSpeedup``: run before the modules are cut, each on the speedup, whose ``bound_model`` they
        change; ``speedup.kept(name)`` gives the channels that enter and leave a module and stay.

    Returns
    -------
    torch.nn.Module
        A new model of the same class with fewer channels, in the mode of ``model``, module by module. Attributes that
        only count channels, as the size of a split, count those that are left where the forward reads them so, or the
        constructors give a layer the same number; others that hold what was a layer's number of channels stay, and are
        named in ``report.stale`` and a warning. Layers that
        share a weight or buffer still do where the same of it is kept. Its ``report`` is a `DenseReport` of the
        channels of every layer before and after, and why some stay although they are masked; a model with a
        ``report`` of its own keeps that.

    Raises
    ------
    ConfigError
        If masks, inputs, ``round_to`` or ``constants`` can't be used.
    DataError
        If the model holds NaN or infinite values.
    SpeedupError
        If the model is still wrapped, a layer would be emptied, the output's shape would change, or
        the dense model doesn't compute what the masked one does.

    See Also
    --------
    dependency_groups : Makes pruners choose the same channels where layers meet.
    masked_model : The masked model of the comparison.

    Notes
    -----
    A channel goes as a whole: with its bias, its batch norm and the depth-wise convolution after it. This
    is why the result may differ from NNI's wrapped model, in which the batch norm's bias survives.

    Where masks of layers that share channels differ, all channels that any of them keeps are kept, with the
    weights of ``model``; a layer without a mask keeps all. So do modules that can't be cut, what enters them or
    attention that isn't followed, and the units of recurrent layers of several levels or directions. Of attention whole
    heads go, of other recurrent layers units with all of their gates: one of which a mask keeps any row stays. One
    warning names the layers that keep channels, and why.

    Single masked weights in channels that are kept stay as zeros.

    Behind an activation that isn't zero at zero (sigmoid, softplus) a removed channel is a constant, which goes into
    the bias of the layer that reads it, or the batch norm behind that. Where it is no constant to that layer, as at a
    border padded with zeros, or there is neither, one of the removed channels stays, without weights, and brings the
    layer what all of them did; ``report`` says so. Where a convolution of several groups reads such channels, and where
    what they bring depends on what comes in (a softmax over channels), the two models can't be equal. The error says
    which layers to leave out; ``check=False`` gives the dense model all the same, to be fine-tuned.

    With ``constants="keep"`` a layer that pads with zeros takes a constant for one that goes on beyond the border, so
    that values next to it differ from those of NNI's wrapped model, and those of other layers don't. A parameter that
    the model adds (``x + self.w``) is kept like a norm's shift. A constant that a transposed convolution reads, or a
    layer that has neither bias nor batch norm, is dropped, and so is what differs by place, as a table of positions
    does; ``report.notes`` names the layers that lack it. Constants behind a batch norm are those of evaluation mode,
    where the norm's statistics are fixed: trained on, the dense model and the masked one go apart, and the notes name
    the norms. After `compensate`, which
    solves for removed channels that are zero, ``"zero"`` is right. Neither loses less accuracy on every network.

    Cost: two to four forward passes to trace the model, unless `dependency_groups` did, one on small images to look for
    constants, and three to compare.
    """
    check_model(model)
    if constants not in ("zero", "keep"):
        raise ConfigError(f'constants must be "zero" or "keep", got {constants!r}')
    call = call_arguments(example_inputs, model)
    full = check_masks(model, masks)
    with random_state_kept(), torch.inference_mode(False):
        torch.manual_seed(0)
        network = Network(model, call)
        dense, reference, kept, resolved, notes = _build(
            network, full, round_to, tuple(customized_replacers), keep=constants == "keep"
        )
        checked = ""
        if check:
            advise = partial(way_forward, network, reference, kept)
            with left_alone(dense):
                checked = check_equal(reference, dense, call, kept, rtol, advise=advise)
        flow = network.flow
    _report(model, dense, full, resolved, checked, notes, flow)
    return dense


def _report(
    model: torch.nn.Module,
    dense: torch.nn.Module,
    masks: FullMasks,
    resolved: Resolved,
    checked: str,
    notes: tuple[str, ...],
    flow: ChannelFlow,
) -> None:
    """Give a dense model its report, and warn of channels that it keeps for another reason than rounding."""
    trained: dict[str, Reasons] = {name: (reasons.training_only(name),) for name in flow.in_training}
    report = dense_report(model, dense, masks, resolved.reasons | trained, stale_numbers(model, dense))
    report = dataclasses.replace(report, checked=checked, notes=notes)
    if report.stale:
        named = ", ".join(f"{name} {number}" for name, number in report.stale.items())
        _logger.warning(
            "attributes that hold what was a layer's number of channels stay as they are, for nothing shows what they "
            "count: %s", named,
        )  # fmt: skip
    if flow.missed:
        _logger.warning("%s", flow.missed)
    others = {row.name: f"{row.kept} of {row.before} ({row.reason})" for row in report.kept}
    # What is kept for rounding alone, or without its weights, is no reason to warn.
    silent = resolved.reasons.keys() - resolved.kept.keys()
    warn_of_kept({name: resolved.kept.get(name, text) for name, text in others.items() if name not in silent})
    if isinstance(getattr(dense, "report", report), DenseReport):
        dense.report = report  # type: ignore[assignment]


def _count_anew(original: torch.nn.Module, dense: torch.nn.Module) -> None:
    """Let attributes that nobody reads while the model runs count the channels that are left, where it is known how."""
    known = {place: size for place, size in sizes_shown(original, dense).items() if size != number_at(original, place)}
    put_sizes(
        dense, {place: size for place, size in known.items() if number_at(dense, place) == number_at(original, place)}
    )


def _build(
    network: Network,
    masks: FullMasks,
    round_to: int | Literal["auto"] | None,
    replacers: Sequence[Replacer],
    *,
    keep: bool,
) -> tuple[torch.nn.Module, torch.nn.Module, dict[str, list[torch.Tensor]], Resolved, tuple[str, ...]]:
    """Make the dense model, its reference, the list of what is kept of each module's output, masks used and notes."""
    original = detached_copy(network.model, light=True).eval()
    flow = network.flow
    resolved = rounded = resolve(original, flow, masks, round_to)
    if round_to is not None and not keep:
        # Carriers count for the multiple, so that they are chosen among all that may go.
        resolved = resolve(original, flow, masks)
    ties = find_ties(original)

    is_read_in_training = any(not resolved.left[flow.entering_roots(name)].all() for name in flow.in_training)

    def whole(model: torch.nn.Module) -> tuple[torch.nn.Module, Call]:
        """Return what runs all layers of a model, those of training alone too, and what to call it on."""
        if not is_read_in_training:
            return model, network.call
        graph_module, args = network.graph(model, in_training=True)
        return Steps(graph_module), (args, {})

    # As in NNI's masked model, in which norms make something of the zeros that arrive.
    with left_alone(original):
        runs, call = whole(original)
        kept = constants_read(runs, flow, resolved.left, call) if keep else {}
        lacking = dropped(runs, flow, resolved.left, call) if keep else []
    reference = apply_masks(original, network.call, resolved.masks)
    with left_alone(reference):
        runs, call = whole(reference)
        others = Brought({}, {}) if keep else brought(runs, flow, resolved.left, call)
    if others.carried:
        # What is gone now was gone when it was measured: none that stayed then may go because a carrier counts too.
        carriers = others.carriers(flow)
        resolved = resolve(original, flow, masks, round_to, carriers=carriers, also=resolved.left)
        reference = apply_masks(original, network.call, resolved.masks)
    elif not keep and round_to is not None:
        resolved = rounded
        reference = apply_masks(original, network.call, resolved.masks)
    notes = [flow.missed] if flow.missed else []
    if lacking:
        notes.append(
            f"what removed channels bring is no constant that can be kept, and is dropped: {', '.join(lacking)}"
        )
    bordered = [name for name in kept if is_bordered(original, flow, name)]
    if bordered:
        notes.append(f"kept constants go on beyond the border that these layers pad with zeros: {', '.join(bordered)}")
    if kept or others.constants or others.carried:
        runs, call = whole(original if keep else reference)
        norms = norms_of_constants(runs, flow, resolved.left, call)
        if norms:
            notes.append(
                "constants behind batch norms are those of evaluation mode; in training mode the masked model computes "
                f"others: {', '.join(norms)}"
            )
    # Each layer is cut for itself, so each needs tensors of its own.
    if keep:
        untie(reference, find_ties(reference))
        absorb(reference, flow, resolved.left, kept, exactly=False)
    # What is cut, or takes constants over, gets new tensors; the others the reference, which goes, may share with it.
    dense = detached_copy(reference, light=not replacers)
    untie(dense, find_ties(dense))
    if not keep:
        absorb(dense, flow, resolved.left, others.constants, exactly=True)
        carry(dense, flow, resolved.left, others.carried)
    DenseSpeedup(dense, flow, resolved.left, replacers).speedup_model()
    put_sizes(dense, flow.sizes_left(resolved.left))
    dense = narrowed(dense, flow, resolved.masks, resolved.left, network.call)
    _count_anew(original, dense)
    tie_again(dense, ties)
    tell_config(dense, original)
    for name, module in network.model.named_modules():
        dense.get_submodule(name).training = module.training
    return dense, reference, kept_outputs(flow, resolved.left), resolved, tuple(notes)
