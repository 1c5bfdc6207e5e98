"""From masks to a smaller dense model that computes the same, and a report of what was pruned and what was kept."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from nni.compression.speedup.replacer import Replacer

from nni_topo.errors import ConfigError, listed
from nni_topo.network.attention.config import tell_config
from nni_topo.network.attention.unfused.own_width import take_own_width
from nni_topo.network.channels import reasons
from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.reasons import Reasons
from nni_topo.network.layers.derived import give_back_classes, with_known_layers
from nni_topo.network.layers.integer_attributes import put_sizes
from nni_topo.network.layers.kinds import (
    PER_CHANNEL,
    follows_channels,
    kept_channels,
    output_channels,
)
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
from nni_topo.network.runtime.reports import (
    ModelReport,
    as_code,
    as_sentence,
    give_report,
    markdown_table,
    told_of_changes,
)
from nni_topo.network.runtime.switches import as_written, random_state_kept, seed_torch
from nni_topo.network.speedup.analysis import Analysis, Facts
from nni_topo.network.speedup.constants import (
    TOLERANCE,
    absorb,
    constants_read,
    dropped,
    fit_norms,
    is_bordered,
    norms_of_constants,
)
from nni_topo.network.speedup.dependency import DependencyGroups, why_not_followed
from nni_topo.network.speedup.equivalence import (
    TrainingRun,
    apply_masks,
    check_equal,
    run_in_training,
)
from nni_topo.network.speedup.explain import way_forward
from nni_topo.network.speedup.leaving_out import leave_out, normalize_left
from nni_topo.network.speedup.reconcile import FullMasks, MasksLike, Resolved, check_masks, resolve, warn_of_kept
from nni_topo.network.speedup.replace import DenseSpeedup, kept_outputs, narrowed
from nni_topo.network.speedup.training_only import unused_tensors
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
    round_to: int | Literal["auto"] | None = None,
    constants: Literal["zero", "keep"] = "zero",
    check: bool = True,
    rtol: float = 1e-4,
    customized_replacers: Sequence[Replacer] = (),
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
        which takes most of the time for a detector. Only weights may have changed since: where the forward has come to
        compute something else, by a flag or a weight that it reads, the comparison with the masked model shows it.
    round_to : int or "auto", optional
        If given, every pruned layer keeps a multiple of this many channels, or all of them. ``"auto"`` is what the
        model's device computes at once: 8 channels on a GPU; 16, 8 or 4 on a CPU, by its vector registers. Those with
        the largest weights (L1 norm over all coupled layers) come back.
    constants : {"zero", "keep"}, default="zero"
        What removed channels contribute. ``"zero"``: nothing, as in `masked_model`. ``"keep"``: what they do in the
        model that NNI's pruner has wrapped, for networks that were trained so. The layer that reads a constant, as the
        shift of a batch norm, adds what it makes of it to its bias, or takes it off the running mean of the batch norm
        after it. Norms over channels, which had removed channels as zeros among the others, get the factor and shift
        that undo most of the difference; these are measured on ``example_inputs``, which should be a batch of real
        ones.
    check : bool, default=True
        Compare the dense model with the masked one, in evaluation mode, on random inputs: as they are, times 0.01 and
        100 and shifted by 3 both ways where they are floats. ``report.checked`` says on which. Where the size of the
        inputs may decide something (constants of removed channels, views that join channels with places, branches), the
        two are compared at a second size too, or ``report.checked`` says that the model takes no other. Then run the
        dense model once in training mode: if it raises an error where the model runs, a warning and ``report.notes``
        say so; likewise where a ``train`` or ``eval`` of the model's own raises one, or the forward after it. In a job
        of several processes it isn't run so.
    rtol : float, default=1e-4
        The largest difference allowed, relative to the largest absolute value of the masked model's output.
    customized_replacers : sequence of nni.compression.speedup.Replacer, default=()
        As of NNI's ``ModelSpeedup``: run before the modules are cut, each on the speedup, whose ``bound_model`` they
        change; ``speedup.kept(name)`` gives the channels that enter and leave a module and stay.

    Returns
    -------
    torch.nn.Module
        A new model of the same class with fewer channels, in the mode of ``model``, module by module, put there by its
        own ``train`` and ``eval`` where it has such methods. Attributes that hold a number of channels, as the size of
        a split, get the new number where the forward reads them so, or where a table says what they count, such as
        timm's ``feature_info`` (`register_width_attribute`); ``report.stale`` and a warning name those of the table
        that couldn't be counted. All other attributes stay. Modules that share a weight lose the same channels and
        share it still; what they shared and can't any more, as a bias to which only one of them adds a constant,
        ``report.notes`` names. Its ``report`` is a `DenseReport` of the channels of every layer before and after, and
        why some stay although they are masked; a model with a ``report`` of its own keeps that.

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
    A channel is removed with its bias, its batch norm and the depth-wise convolution after it. The result may
    therefore differ from NNI's wrapped model, in which the batch norm's bias survives.

    Where the masks of coupled layers differ, every channel that one of them keeps is kept, with the weights of
    ``model``: the masked model of the comparison is that of ``masked_model(..., reconcile=True)``. A layer without a
    mask keeps all channels. So do modules that can't be cut, layers before them or before attention that couldn't be
    traced, and recurrent layers with a projection. Attention loses whole heads; other recurrent layers lose units with
    all of their gates, the same in all levels and directions. A head or unit is kept if a mask keeps one of its rows.
    One warning names a few of the layers that keep channels, and why; the report has all.

    Masked weights within kept channels are zeros in the dense model.

    A removed channel isn't there. A norm over channels has its own class and runs over the channels that are left. A
    layer that reads a removed channel reads nothing, also after an activation that isn't zero at zero (sigmoid,
    softplus); `compensate` puts what that contributed on average into the bias.

    With ``constants="keep"``, a layer that pads with zeros treats a constant as if it went on beyond the border: values
    next to the border differ from those of NNI's wrapped model, all others are equal. A parameter that the model adds
    (``x + self.w``) is kept like a norm's shift. A constant is dropped where a transposed convolution reads it, where
    the layer that reads it has neither bias nor batch norm, and where it differs by position, as a table of positions
    does; ``report.notes`` names these layers. Constants after a batch norm are those of evaluation mode, in which the
    norm's statistics are fixed: when trained further, the dense and the masked model diverge, and the notes name
    the norms. After `compensate`, which solves for removed channels that aren't there, ``"zero"`` is right. Neither
    setting loses less accuracy on every network.

    Cost: two to four forward passes to trace the model, three to compare and one in training mode; where the size may
    decide something, another trace and comparison; two more, and what ``forward_features`` takes, where a network holds
    attributes as timm's and torchvision's do.
    """
    check_model(model)
    if constants not in ("zero", "keep"):
        raise ConfigError(f'constants must be "zero" or "keep", got {constants!r}')
    return dense_of(
        model,
        example_inputs,
        masks,
        round_to,
        constants=constants,
        check=check,
        rtol=rtol,
        customized_replacers=customized_replacers,
        facts=None if groups is None else groups.facts_for(model),
    )


@as_written()
def dense_of(
    model: torch.nn.Module,
    example_inputs: Any,
    masks: MasksLike,
    round_to: int | Literal["auto"] | None = None,
    *,
    constants: Literal["zero", "keep"] = "zero",
    check: bool = True,
    rtol: float = 1e-4,
    customized_replacers: Sequence[Replacer] = (),
    facts: Facts | None = None,
) -> torch.nn.Module:
    """Return what :func:`to_dense` does; ``facts``: what is known of the model, or of one with other weights."""
    given, model = model, with_known_layers(model)
    call = call_arguments(example_inputs, model)
    full = check_masks(model, masks)
    with random_state_kept(), torch.inference_mode(False):
        seed_torch(0)
        task = _prepare(Analysis(model, call, facts), full, round_to)
        if constants == "keep":
            masked = _masked_with_constants(task)
        else:
            masked = _Masked(task.apply(task.rounded), task.rounded, ())
        dense = _cut(task, masked, tuple(customized_replacers))
        leave_out(masked.reference, task.flow, masked.is_kept)
        checked = _compare(task, masked, dense, rtol) if check else ""
        if constants == "keep":
            wrapped = task.apply(task.rounded)
            if left := fit_norms(wrapped, dense, task.flow, masked.is_kept, task.analysis.call):
                note = f"these norms over channels run as they are over those that are left: {', '.join(left)}"
                masked = dataclasses.replace(masked, notes=(*masked.notes, note))
        stale = count_anew(task.original, dense, task.analysis.call)
        trained = run_in_training(task.original, dense, task.analysis.call) if check else TrainingRun()
        _report(task, masked, dense, checked, trained, stale)
        # Last, for all before compares it with the model's evaluated copy.
        put_modes_of(model, dense)
    give_back_classes(given, dense)
    return dense


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is asked of `to_dense`."""

    analysis: Analysis
    flow: ChannelFlow
    original: torch.nn.Module  # a light copy of the model in evaluation mode
    masks: FullMasks
    round_to: int | Literal["auto"] | None
    rounded: Resolved  # the masks made to agree, with ``round_to``

    def apply(self, resolved: Resolved) -> torch.nn.Module:
        """Return the masked model for masks that agree."""
        return apply_masks(self.original, resolved.masks, light=True)


@dataclasses.dataclass(frozen=True)
class _Masked:
    """The masked model with which the dense one is compared."""

    reference: torch.nn.Module
    resolved: Resolved  # its masks
    notes: tuple[str, ...]

    @property
    def is_kept(self) -> np.ndarray:
        """Which channels stay: bool, by group id."""
        return self.resolved.is_kept


def _prepare(analysis: Analysis, masks: FullMasks, round_to: int | Literal["auto"] | None) -> _Task:
    """Resolve the masks, without measuring anything."""
    original, flow = evaluating(unwrapped_copy(analysis.model, light=True)), analysis.flow
    return _Task(analysis, flow, original, masks, round_to, resolve(original, flow, masks, round_to))


def _masked_with_constants(task: _Task) -> _Masked:
    """Mask a model as NNI does, and fold the constants that batch norms make of pruned channels into biases."""
    resolved, flow = task.rounded, task.flow
    # As in NNI's masked model, in which batch norms turn the zeros that arrive into other values.
    original, call = detached_copy(task.original, light=True), task.analysis.call
    normalize_left(original, flow, resolved.is_kept)
    with left_alone(original):
        kept = constants_read(original, flow, resolved.is_kept, call)
        lacking = dropped(original, flow, resolved.is_kept, call)
        if kept and task.analysis.second is not None:
            others = constants_read(original, flow, resolved.is_kept, task.analysis.second.call)
            for name, values in kept.items():
                is_same = (values - others.get(name, 0 * values)).abs() <= TOLERANCE * values.abs()
                if not bool(is_same.all()):
                    kept[name] = values * is_same
                    lacking = list(dict.fromkeys([*lacking, name]))
    reference = task.apply(resolved)
    notes = []
    if lacking:
        notes.append(
            f"what pruned channels contribute is no constant that can be kept, and is dropped: {', '.join(lacking)}"
        )
    bordered = [name for name in kept if is_bordered(original, flow, name)]
    if bordered:
        notes.append(f"kept constants go on beyond the border that these layers pad with zeros: {', '.join(bordered)}")
    if kept:
        notes += _notes_on_training(norms_of_constants(original, flow, resolved.is_kept, call))
    # Each layer is cut for itself, so each needs tensors of its own.
    untie(reference, find_ties(reference))
    absorb(reference, flow, resolved.is_kept, kept)
    return _Masked(reference, resolved, tuple(notes))


def _notes_on_training(norms: list[str]) -> list[str]:
    """Return a note on batch norms that make constants of pruned channels."""
    if not norms:
        return []
    told = "constants after batch norms are those of evaluation mode; in training mode the masked model computes others"
    return [f"{told}: {', '.join(norms)}"]


def _cut(task: _Task, masked: _Masked, replacers: Sequence[Replacer]) -> torch.nn.Module:
    """Cut a copy of the masked model: layers, heads, attributes that hold sizes. It is in evaluation mode."""
    flow, original = task.flow, task.original
    # Layers that are cut, or that constants are folded into, get new tensors; others may share the reference's.
    copied = detached_copy(masked.reference, light=not replacers)
    # Each layer is cut for itself, so each needs tensors of its own.
    untie(copied, find_ties(copied))
    speedup = DenseSpeedup(copied, flow, masked.is_kept, replacers)
    speedup.speedup_model()
    ties = find_ties(original)
    speedup.cut_unused(ties)
    put_sizes(copied, flow.sizes_kept(masked.is_kept))
    _take_own_widths(original, copied, flow)
    dense = narrowed(copied, flow, masked.resolved.masks, masked.is_kept, task.analysis.call)
    tie_again(dense, ties)
    tell_config(dense, original, task.analysis.call)
    forget_evaluated(dense)
    # Layers that weren't cut have the original's memory still.
    shapes = {name: each.shape for name, each in original.named_parameters(remove_duplicate=False)}
    for name, parameter in dense.named_parameters():
        if parameter.shape == shapes.get(name):
            parameter.data = parameter.data.clone()
    return dense


def _take_own_widths(original: torch.nn.Module, dense: torch.nn.Module, flow: ChannelFlow) -> None:
    """Rewrite forwards that reshape a layer's output to the width of their input, where the layer was cut."""
    for name, dim in flow.own_widths.items():
        pair = original.get_submodule(name), dense.get_submodule(name)
        before, after = ([each.shape for each in module.parameters()] for module in pair)
        if before != after:
            take_own_width(pair[1], dim)


def _compare(task: _Task, masked: _Masked, dense: torch.nn.Module, rtol: float) -> str:
    """Raise a SpeedupError unless the dense model gives the masked one's outputs; return on what they were compared."""
    kept = kept_outputs(task.flow, masked.is_kept)
    advise = partial(way_forward, task.analysis, kept)
    analysis = task.analysis
    with left_alone(dense):
        checked = check_equal(masked.reference, dense, analysis.call, kept, rtol, advise=advise)
        if not analysis.depends_on_size:
            return checked
        if analysis.second is None:
            return f"{checked}; no other size was found that the model takes, so it is right at this size alone"
        other = check_equal(masked.reference, dense, analysis.second.call, kept, rtol, advise=advise)
    return f"{checked}; {other}"


def _report(
    task: _Task,
    masked: _Masked,
    dense: torch.nn.Module,
    checked: str,
    run: TrainingRun,
    stale: Mapping[str, int],
) -> None:
    """Give a dense model its report, and warn of masked channels that it keeps for another reason than rounding."""
    model, flow, resolved = task.analysis.model, task.flow, masked.resolved
    report = dense_report(model, dense, task.masks, resolved.reasons, stale)
    notes = ((flow.missed,) if flow.missed else ()) + masked.notes
    if parted := _no_longer_shared(task.original, dense):
        notes += (f"modules that shared these have one each now, as they differ: {', '.join(parted)}",)
    lost = {row.before for row in report.rows if row.after < row.before}
    for told in _notes_on_widths(run, lost, _unread(task, dense, lost)):
        notes += (told,)
        _logger.warning("%s", told)
    report = dataclasses.replace(report, checked=checked, notes=notes)
    if report.stale:
        _logger.warning(
            "attributes keep the number of the unpruned network, because the tensor whose channels they count by "
            "register_width_attribute has another number of channels or wasn't computed: %s (all are in "
            "dense.report.stale)",
            listed(f"{name} {number}" for name, number in report.stale.items()),
        )
    if flow.missed:
        _logger.warning("%s", flow.missed)
    others = {row.name: f"{row.kept} of {row.before} ({row.reason})" for row in report.kept}
    # What is kept for rounding alone, or without its weights, is no reason to warn.
    silent = resolved.reasons.keys() - resolved.kept.keys()
    warn_of_kept({name: resolved.kept.get(name, text) for name, text in others.items() if name not in silent})
    _REPORTS[dense] = report
    give_report(dense, report)


def _notes_on_widths(run: TrainingRun, lost: set[int], unread: list[str]) -> Iterator[str]:
    """Return notes on attributes and tensors of the old width that the dense model may read later.

    ``lost``: the widths of layers that lost channels; ``unread``: what has such a width and no run has read.
    """
    if run.failure:
        yield (
            f"the dense model can't be trained further as it is: in training mode it raises {run.failure}. The model "
            "runs there, so something that only training uses has kept its width: modules that couldn't be traced, "
            "weights that follow those of another layer, a layer or tensor that isn't registered in the model, or one "
            "that the forward makes"
        )
    kept = [
        name
        for name, (before, after) in run.kept.items()
        if any(old in lost and old != new for old, new in zip(before.shape, after.shape, strict=False))
    ]
    if kept:
        yield (
            "the model keeps tensors of its last call in these attributes, which are as wide as before: "
            f"{listed(kept)}. Set them as in a new model before the dense model is called"
        )
    if unread:
        yield (
            f"no run of the model has read these, so they keep the width of layers that lost channels: {listed(unread)}"
            ". If a call with other arguments reads them, as one with labels or masks does, pass batches with these "
            "arguments"
        )


def _unread(task: _Task, dense: torch.nn.Module, lost: set[int]) -> list[str]:
    """Name the tensors that no run has read and that have the old width of a pruned layer."""
    before, after = named_tensors(task.original), named_tensors(dense)
    found = list[str]()
    for name in unused_tensors(task.original, task.flow.traced.graph):
        is_whole = name in after and after[name].shape == before[name].shape
        owner: Any = type(task.original.get_submodule(name.rpartition(".")[0]))
        if is_whole and not lost.isdisjoint(before[name].shape) and not owner.__module__.startswith("torch.nn."):
            found.append(name)
    return found


def _no_longer_shared(original: torch.nn.Module, dense: torch.nn.Module) -> list[str]:
    """Name the parameters that modules of a model share and those of its dense model don't."""
    parameters, found = dict(dense.named_parameters(remove_duplicate=False)), list[str]()
    for names in find_ties(original):
        if len({id(parameters[name]) for name in names if name in parameters}) > 1:
            found += names
    return found


# Also of models that have got another report since, or have an attribute `report` of their own.
_REPORTS: WeakKeyDictionary[torch.nn.Module, DenseReport] = WeakKeyDictionary()


def dense_report_of(dense: torch.nn.Module) -> DenseReport:
    """Return the report of a model that :func:`to_dense` returned."""
    return _REPORTS[dense]


@dataclasses.dataclass(frozen=True)
class LayerChannels:
    """The channels of one layer.

    Parameters
    ----------
    name : str
        Its name in the model.
    before : int
        Channels of the model that was pruned.
    asked : int
        Channels that the layer's own mask keeps; all of them without a mask.
    after : int
        Channels of the dense model.
    reason : str, default=""
        Why channels stay that the mask removes; empty if none does.
    """

    name: str
    before: int
    asked: int
    after: int
    reason: str = ""

    @property
    def kept(self) -> int:
        """How many channels stay although they are masked."""
        return max(self.after - self.asked, 0)


@dataclasses.dataclass(frozen=True)
class DenseReport(ModelReport):
    """The channels of every layer, before and after.

    Parameters
    ----------
    rows : tuple of LayerChannels
        Convolutions, linear layers and embeddings, and masked norms, in the order of the model.
    checked : str, default=""
        On what inputs the dense model was found to compute what the masked one does; empty if that wasn't compared.
    stale : mapping of str to int, default={}
        Attributes, by name, and the number that they keep: the tensor whose channels they count, by the table of
        `register_width_attribute`, has another number of channels or wasn't computed, and a layer of that width lost
        some.
    notes : tuple of str, default=()
        What else to know of it: where it would train another way than the masked model or can't be trained, lacks a
        part of that, or holds tensors as wide as before.
    params_before, params : int or None, default=None
        Parameters of the model that was pruned, and of the dense model; None: not counted.
    changed_since : tuple of str, default=()
        What functions of the package have changed since, in order, such as ``"distilled (nni_topo.distill)"``.

    Examples
    --------
    >>> DenseReport((LayerChannels("conv1", 8, 4, 4), LayerChannels("conv2", 8, 4, 8, "shared with conv3")))
    layer  channels  asked  after  kept although masked
    conv1         8      4      4
    conv2         8      4      8  4: shared with conv3
    """

    rows: tuple[LayerChannels, ...]
    checked: str = ""
    stale: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    params_before: int | None = None
    params: int | None = None
    changed_since: tuple[str, ...] = ()

    @property
    def pruned_layers(self) -> tuple[str, ...]:
        """Names of the layers that lost channels."""
        return tuple(row.name for row in self.rows if row.after < row.before)

    @property
    def parameters_left(self) -> int | None:
        """Parameters of the dense model; None if they weren't counted."""
        return self.params

    @property
    def kept(self) -> tuple[LayerChannels, ...]:
        """The layers that keep channels although they are masked."""
        return tuple(row for row in self.rows if row.kept)

    def __repr__(self) -> str:
        width = max([5, *(len(row.name) for row in self.rows)])
        lines = [f"{'layer':{width}}  channels  asked  after  kept although masked"]
        for row in self.rows:
            why = f"  {row.kept}: {row.reason}" if row.kept else ""
            lines.append(f"{row.name:{width}}  {row.before:8}  {row.asked:5}  {row.after:5}{why}")
        if self.stale:
            lines.append("as before: " + ", ".join(f"{name} {number}" for name, number in self.stale.items()))
        lines += [f"compared on {self.checked}"] if self.checked else []
        lines += self.notes
        lines += [told_of_changes(self.changed_since)] if self.changed_since else []
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Return the report as Markdown: parameters, if they were counted, and the layers that lost channels.

        Blocks whose layers have the same widths share a row. Where more than 24 rows are left, all blocks share one,
        with the smallest and the largest width of each layer.

        Returns
        -------
        str
            Sections with headings of the second level.
        """
        parts = []
        if self.params_before is not None and self.params is not None:
            parts += ["## Size", sizes_in_markdown({"parameters": (self.params_before, self.params)})]
        parts += self.widths_in_markdown()
        if self.checked:
            parts.append(f"On {self.checked} it computes what the unpruned network computes with masks.")
        if self.changed_since:
            parts.append(as_sentence(told_of_changes(self.changed_since)))
        return "\n\n".join(parts)

    def widths_in_markdown(self) -> list[str]:
        """Return the section on widths, in paragraphs, with the notes."""
        pruned = [row for row in self.rows if row.after < row.before]
        others = len(self.rows) - len(pruned)
        parts = ["## Widths"]
        if pruned:
            parts.append(_widths_table(pruned))
            parts.append("Channels of each layer." + _told_of_others(others))
        else:
            # A network may have lost blocks all the same, which the notes tell.
            parts.append("All its layers have all their channels.")
        if self.notes:
            parts.append("\n".join(f"- {as_sentence(note)}" for note in self.notes))
        return parts


def _told_of_others(count: int) -> str:
    """Return a sentence on the layers that a table leaves out; empty if it has all."""
    if count == 0:
        return ""
    if count == 1:
        return " One other layer keeps all its channels."
    return f" {count} other layers keep all their channels."


_MOST_ROWS = 24  # of a table of widths, before all blocks share a row


def sizes_in_markdown(sizes: Mapping[str, tuple[int, int]]) -> str:
    """Return a Markdown table of what a network costs, by name: before, after, and the share that is left."""
    rows = []
    for name, (before, after) in sizes.items():
        rows.append([name, f"{before:,}", f"{after:,}", f"{100 * after / before:.1f} %" if before else ""])
    return markdown_table(["", "before", "after", "kept"], rows)


def _widths_table(rows: Iterable[LayerChannels]) -> str:
    """Return a Markdown table of layers' channels, in which layers of the same kind in several blocks share a row."""
    by_width: dict[Any, list[tuple[LayerChannels, int | None]]] = {}
    by_kind: dict[Any, list[tuple[LayerChannels, int | None]]] = {}
    for row in rows:
        kind, block = _kind_and_block(row.name)
        by_width.setdefault((kind, row.before, row.after), []).append((row, block))
        by_kind.setdefault((kind, row.before), []).append((row, block))
    lines = []
    for (kind, before, *_), group in (by_width if len(by_width) <= _MOST_ROWS else by_kind).items():
        name, blocks = group[0][0].name, ""
        if len(group) > 1:
            name, blocks = kind, _ranges([block for _, block in group if block is not None])
        widths = sorted({row.after for row, _ in group})
        after = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        lines.append([as_code(name), blocks, f"{before}", after])
    return markdown_table(["layer", "blocks", "before", "after"], lines, text_columns=2)


def _kind_and_block(name: str) -> tuple[str, int | None]:
    """Split a layer's name at the number of its block, ``"layers.3.fc"`` into ``"layers.*.fc"`` and 3."""
    parts = name.split(".")
    for at, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join([*parts[:at], "*", *parts[at + 1 :]]), int(part)
    return name, None


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ranges, e.g. ``"0-4, 6"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def dense_report(
    model: torch.nn.Module,
    dense: torch.nn.Module,
    masks: FullMasks,
    why: Mapping[str, Reasons],
    stale: Mapping[str, int],
) -> DenseReport:
    """Compare a model with its dense one: a row for each layer that makes channels, and for each masked module."""
    rows = []
    for name, module in model.named_modules():
        if output_channels(module) is None and name not in masks:
            continue
        targets, small = masks.get(name, {}), dense.get_submodule(name)
        before, after = _channels(module), _channels(small)
        if before is not None and after is not None:
            asked = _asked(module, targets, before)
        else:
            # No layer that the package knows: what NNI masks are rows of its first parameter.
            target, mask = next(iter(targets.items()))
            before, after = (len(torch.atleast_1d(each.get_parameter(target))) for each in (module, small))
            asked = int(mask.reshape(before, -1).any(1).sum())
        found: Reasons = ()
        if after > asked:
            own = reasons.norm_follows() if follows_channels(module) else why_not_followed(model, name)
            found = why.get(name, ()) or (own,)
        rows.append(LayerChannels(name, before, asked, after, reasons.told(found)))
    params_before, params = (sum(each.numel() for each in net.parameters()) for net in (model, dense))
    return DenseReport(tuple(rows), stale=stale, params_before=params_before, params=params)


def _channels(module: torch.nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    if isinstance(module, PER_CHANNEL) and isinstance(weight, torch.Tensor):
        return weight.numel()
    return output_channels(module)


def _asked(module: torch.nn.Module, targets: Mapping[str, torch.Tensor], before: int) -> int:
    kept = kept_channels(module, targets)
    if kept is None and isinstance(module, PER_CHANNEL) and "weight" in targets:
        kept = targets["weight"].ne(0)
    return before if kept is None else int(kept.sum())
