"""Remove masked channels, and say how many of the network's answers stay."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, Literal

import torch

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.arguments import INPUTS, MASKS, MODEL, ROUND_TO, check_model
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.network.runtime.inputs import batch_size, bind_arguments
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.reports import is_compensated
from nni_topo.network.runtime.switches import as_written
from nni_topo.network.speedup.dense import dense_of
from nni_topo.network.speedup.dense_report import dense_report_of, remember_report
from nni_topo.network.speedup.dependency import DependencyGroups
from nni_topo.network.speedup.equivalence import apply_masks
from nni_topo.network.speedup.reconcile import MasksLike, check_masks
from nni_topo.recovery.likeness import Answers, Likeness

_ENOUGH = 32
"""Number of samples from which shares of answers are told."""
_ROUNDING = 1e-6
"""Distance, over the variance, up to which outputs that are numbers count as equal."""
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
        The result of `dependency_groups` for this model and inputs of this size. It saves tracing the model again,
        which takes most of the time for a detector. Only weights may have changed since.
    round_to : int, optional
        If given, every pruned layer keeps a multiple of this many channels, or all of them. Channels with the largest
        weights (L1 norm over all coupled layers) are restored.
    constants : {"zero", "keep"}, default="zero"
        What removed channels contribute. ``"zero"``: nothing, as in `masked_model`. ``"keep"``: the same as in NNI's
        wrapped model, for networks that were trained in it. A layer that reads a constant, such as the shift of a batch
        norm, adds its response to its bias, or subtracts it from the running mean of the batch norm after it. Norms
        over channels get the factor and shift that best replace the zeros of removed channels, measured on
        ``example_inputs``, which should be a batch of real ones.
    check : bool, default=True
        Compare the outputs of the dense and the masked model, in evaluation mode, on random inputs; floats also times
        0.01 and 100, and shifted by 3 both ways. They may differ by 1e-4 of the largest output. If the channels may
        depend on the input size (views that join channels with positions, branches), the two are compared at a second
        size too. If the model runs in training mode on ``example_inputs``, the structure and shapes of what it returns
        in that mode are compared, without dropout and with batch norms in evaluation mode. ``report.checked`` describes
        the comparisons. With at least 32 samples in ``example_inputs``, which then should be real ones, the outputs on
        them are compared, too, with those of the model without its masks, and with those of the model in NNI's wrapper,
        with them: ``report.answers`` has both shares of equal answers (for numbers the error). A warning tells them and
        what can be done if an answer has changed.

    Returns
    -------
    torch.nn.Module
        A new model of the same class with fewer channels. Each module is in the same mode as in ``model``, set by the
        model's own ``train`` and ``eval`` if it has such methods. Attributes that hold a number of channels, such as
        the size of a split, are updated if the forward reads them as such, or if a table says what they count, as for
        timm's ``feature_info`` (`register_width_attribute`). All other attributes are unchanged. Modules that share a
        weight lose the same channels and still share it. ``report`` is a `DenseReport` of the channels of every layer
        before and after, and why masked channels are kept; a model with its own ``report`` keeps that.

    Raises
    ------
    ConfigError
        If masks, inputs, ``groups``, ``round_to`` or ``constants`` can't be used.
    DataError
        If a parameter is NaN or infinite, or a buffer is NaN.
    SpeedupError
        If the model is still wrapped, a layer would be empty, the output's shape would change, or the outputs of the
        dense and the masked model differ.

    See Also
    --------
    dependency_groups : Makes pruners choose the same channels of coupled layers.
    masked_model : The masked model of the comparison.

    Notes
    -----
    A channel is removed with its bias, its batch norm and the depth-wise convolution after it. Norms over channels run
    over the kept channels, and a removed channel contributes nothing to the layers that read it, even after an
    activation that isn't zero at zero (sigmoid, softplus). So the result may differ from NNI's wrapped model.
    `compensate` adds the average contribution of removed channels to the bias. Masked weights within kept channels are
    zeros.

    If the masks of coupled layers differ, every channel that any of them keeps is kept, with the weights of ``model``:
    the dense model is compared with ``masked_model(..., reconcile=True)``. A layer without a mask keeps all channels,
    but for those that only norms read whose masks remove them: a mask of a norm removes channels of the layers before
    it. Where another norm or layer needs such a channel, it stays, and so do the zeros in the masked norm.
    So do modules that can't be cut, layers before them or before attention that couldn't be traced, and recurrent
    layers with a projection. Attention loses whole heads; other recurrent layers lose units with all of their gates,
    the same in all stacked layers and directions. A head or unit is kept if a mask keeps one of its rows. One warning
    names a few layers that keep masked channels, and why; the report lists all.

    With ``constants="keep"``, a constant is also added where a layer's zero padding replaces it in NNI's wrapped model:
    values next to the border differ. A constant is dropped if a transposed convolution reads it, if its reader has
    neither a bias nor a batch norm after it, or if it differs by position; ``report.notes`` names these layers. After
    `compensate`, which assumes that removed channels contribute nothing, use ``"zero"``.

    Cost: four to six forward passes to trace the model and five to compare; a second trace if the model returns
    something else in training mode; another trace and comparison if the channels may depend on the input size; two more
    passes if the network has attributes of the table, as timm's and torchvision's do.
    """
    check_model(model)
    dense = dense_of(
        model,
        example_inputs,
        masks,
        round_to,
        constants=constants,
        check=check,
        facts=None if groups is None else groups.facts_for(model),
    )
    if check:
        answers, remedies = _answers_kept(model, dense, example_inputs, masks, constants)
        if answers:
            remember_report(dense, dataclasses.replace(dense_report_of(dense), answers=answers))
        if remedies:
            _logger.warning("%s. %s", answers, remedies)
    return dense


def _answers_kept(
    model: torch.nn.Module, dense: torch.nn.Module, example_inputs: Any, masks: MasksLike, constants: str
) -> tuple[str, str]:
    """Return a sentence on how many answers of a model its dense form gives, and one on what to do if not all.

    Both are empty with fewer than 32 samples, or if the outputs can't be compared by sample.
    """
    call = call_arguments(example_inputs, model)
    count = batch_size(call)
    if count < _ENOUGH:
        return "", ""
    batch = bind_arguments(model, call) if call[1] else (call[0],)
    samples = Calibration([batch], hold_out=False)
    try:
        likeness_with = _likeness(apply_masks(model, check_masks(model, masks), light=True), dense, samples)
        likeness_without = None if is_compensated(model) else _likeness(model, dense, samples)
    except (ConfigError, DataError):  # such as outputs without an entry for each sample
        return "", ""
    remedies = []
    if likeness_without is None:
        answers = f"{_in_words(likeness_with)} the model with its masks"
    else:
        answers = f"{_in_words(likeness_without)} the model without its masks, {_in_words(likeness_with)} the model "
        answers += "with them"
        if _has_changed(likeness_without):
            remedies.append(
                "Not trained under the masks: nni_topo.compensate(model, masks, batches) before it reconstructs weights"
            )
        if _has_changed(likeness_with) and constants == "zero":
            remedies.append('Trained under the masks: constants="keep" keeps what removed channels contribute')
    return f"on {count} samples of the inputs the dense network has {answers}", ". ".join(remedies)


def _likeness(reference: torch.nn.Module, dense: torch.nn.Module, samples: Calibration) -> Likeness:
    """Compare a dense network with a reference on some samples."""
    (likeness,) = Answers(reference, samples).likenesses(dense)
    return likeness


def _in_words(likeness: Likeness) -> str:
    """Return the share of equal answers, or for numbers the error in standard deviations."""
    if not math.isnan(likeness.agreement.value):
        return f"{100.0 * likeness.agreement.value:.1f} % of the answers of"
    return f"an error of {math.sqrt(likeness.distance.value):.2g} standard deviations from"


def _has_changed(likeness: Likeness) -> bool:
    """Whether an answer differs, or numbers differ by more than rounding."""
    if not math.isnan(likeness.agreement.value):
        return likeness.agreement.value < 1.0
    return likeness.distance.value > _ROUNDING
