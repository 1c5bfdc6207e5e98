"""A smaller network in one call: dependency groups, pruning, weight reconstruction, distillation, checks, report."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.errors import ConfigError, listed
from nni_topo.network.attention.config import is_pretrained
from nni_topo.network.io.checkpoint import tell_pruned_heads, why_undescribed
from nni_topo.network.layers.kinds import with_transposed_weights
from nni_topo.network.runtime.arguments import BATCHES, MODEL, ROUND_TO, check_model
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import structure_call
from nni_topo.network.runtime.hooks import batches_of
from nni_topo.network.runtime.public import Running, public
from nni_topo.network.runtime.reports import (
    ModelReport,
    as_code,
    as_sentence,
    give_report,
    markdown_table,
    told_of_changes,
)
from nni_topo.network.speedup.dense import DenseReport, dense_report_of, sizes_in_markdown, to_dense
from nni_topo.network.speedup.dependency import OUTPUT, by_reason
from nni_topo.network.speedup.reconcile import MasksLike
from nni_topo.pruners.budget import AUTO, BUDGETS, Budget, BudgetOutcome, as_budget
from nni_topo.recovery import RecoveryMethod
from nni_topo.recovery.distilling import Verdict
from nni_topo.recovery.lesson import ComparedOutputs, Outputs
from nni_topo.recovery.report import CompensationReport
from nni_topo.rules import ANYTHING, NONE, number, one_of
from nni_topo.runs.allocating import Tried
from nni_topo.runs.depth import DepthOutcome, DepthSteps
from nni_topo.runs.steps import (
    LEAVE_OUT,
    UNPRUNED,
    Compensate,
    Distill,
    ImageParts,
    Measurements,
    RecoveredNetwork,
    ShrinkSteps,
    Stage,
    as_described,
    check_can_be_distilled,
    check_can_be_shared,
    check_choices,
    check_has_size,
    check_layers,
    check_one_distilled,
    chooses_how_many,
    plain_weights,
)
from nni_topo.runs.tolerance import (
    MEASURES,
    PARTS,
    Judge,
    ToleranceOutcome,
    check_tolerance,
    resolved_measure,
    within_tolerance,
)

if TYPE_CHECKING:
    import pandas

_NAMES = 8  # of layers that a line names
_MANY = 8  # so many channels make it worth telling that only one is left
_UNGROUPED = (
    "where several samples are of one source, such as a speaker or a photo, nni_topo.Calibration(groups=...) holds out "
    "whole sources: on new ones a network is worse than on other samples of known ones"
)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class ShrinkReport(ModelReport):
    """How a network was made smaller; its ``repr`` is a table with notes.

    Attributes
    ----------
    stages : tuple of Stage
        The unpruned network, and the network after each step. Distances and agreements are those of held-out images.
    layers : DenseReport
        Channels of every layer before and after, and why some channels are kept although they were to be removed.
    compensation : CompensationReport or None
        Errors of each layer before and after weight reconstruction; None without a method of this package.
    tried : tuple of Tried
        The ways to distribute the budget that were tried, with ``allocation="auto"``.
    budget : BudgetOutcome or None
        Whether the budget was met, and why not.
    images : int
        Number of calibration images: pruning, weight reconstruction and distillation use them.
    held_out : int
        Number of held-out images, which no step uses; 0 if there were fewer than eight images in all. Then the figures
        are those of the calibration images.
    warnings : tuple of str
        What makes the figures doubtful, with what to do about it.
    whole : dict of str to str
        By layer that keeps all channels because they can't be removed, the reason. If ``layers`` was given, of those
        layers alone.
    distillation : Verdict or None
        Whether the distilled weights were kept, and the figures that decided; None where :func:`nni_topo.distill`
        didn't run, or what it made wasn't confirmed.
    tolerance : ToleranceOutcome or None
        With a ``tolerance``: the difference that was confirmed, its upper 95 % limit, and the candidates of the search.
        Then ``images`` are calibration data only, ``held_out`` those that confirm; other ones judged the candidates.
    depth : DepthOutcome or None
        With ``depth=True``: the blocks that were removed, what makes up for them, and the networks that were tried.
        Names are those in the unpruned network, while ``layers`` has those in the smaller one.
    outputs : ComparedOutputs or None
        By name, the outputs of the model that distances, agreements and distillation compare (``outputs.compared``) and
        those that they don't (``outputs.left_out``); none are named where ``outputs=`` said what counts.
    pruner : str
        Name of the pruner, or of the function that selected the channels.
    allocation : str
        How the budget was distributed, ``"uniform"``, ``"topological"`` or ``"error"``; empty where the pruner chose
        how many channels it keeps.
    equal_blocks : bool
        Whether all blocks were to keep the same widths.
    recovery : str
        Name of the recovery method, or of its class or function; empty where no weights were reconstructed.
    undescribed : str
        Of a model of Transformers, what its config can't say of the network; empty where ``from_pretrained`` loads it.
    changed_since : tuple of str
        What functions of the package have changed since, in order, such as ``"distilled (nni_topo.distill)"``: the
        figures are those before.
    grouped : bool
        Whether ``groups`` of the calibration data said which samples belong together.
    """

    stages: tuple[Stage, ...]
    layers: DenseReport
    compensation: CompensationReport | None = None
    tried: tuple[Tried, ...] = ()
    budget: BudgetOutcome | None = None
    images: int = 0
    held_out: int = 0
    warnings: tuple[str, ...] = ()
    whole: dict[str, str] = field(default_factory=dict)
    distillation: Verdict | None = None
    tolerance: ToleranceOutcome | None = None
    depth: DepthOutcome | None = None
    outputs: ComparedOutputs | None = None
    pruner: str = ""
    allocation: str = ""
    equal_blocks: bool = False
    recovery: str = ""
    undescribed: str = ""
    changed_since: tuple[str, ...] = ()
    grouped: bool = False

    def to_frame(self) -> pandas.DataFrame:
        """Return the stages as a table, one row each."""
        import pandas

        return pandas.DataFrame([asdict(stage) for stage in self.stages])

    @property
    def pruned_layers(self) -> tuple[str, ...]:
        """Names of the layers that lost channels."""
        return self.layers.pruned_layers

    @property
    def parameters_left(self) -> int:
        """Parameters of the network that was returned."""
        return self.stages[-1].params

    def to_markdown(self) -> str:
        """Return the report as Markdown, for the card of a network that is published.

        It has the sizes before and after, the steps, what the report's table says of distances and agreements, the
        layers that lost channels, and the warnings.

        Returns
        -------
        str
            Sections with headings of the second level.
        """
        first, last = self.stages[0], self.stages[-1]
        sizes = {"parameters": (first.params, last.params), "MACs of one sample": (first.macs, last.macs)}
        parts = ["## Size", sizes_in_markdown(sizes)]
        if self.budget is not None:
            parts.append(as_sentence(str(self.budget)))
        if self.tolerance is not None:
            parts.append(as_sentence(str(self.tolerance)))
        steps = []
        if self.pruner:
            steps.append(f"pruner: {as_code(self.pruner)}")
        if self.allocation:
            alike = ", the same widths in all blocks" if self.equal_blocks else ""
            steps.append(f"allocation of the budget: {as_code(self.allocation)}{alike}")
        if self.depth is not None:
            # The notes on the layers name them.
            steps.append(f"blocks removed: {len(self.depth.removed)}")
        steps.append(f"weight reconstruction: {as_code(self.recovery) if self.recovery else 'none'}")
        if self.distillation is not None:
            weights = "kept" if self.distillation.is_kept else "discarded"
            steps.append(f"distillation: {self.distillation.steps} steps, whose weights are {weights}")
        else:
            is_distilled = self.stages[-1].network == "distilled"
            steps.append(f"distillation: {'by a function of the caller' if is_distilled else 'none'}")
        steps.append(f"calibration data: {self.images} samples, without labels")
        parts += ["## How it was pruned", "\n".join(f"- {each}" for each in steps)]
        rows = self._rows()
        columns = [
            name for name in ("network", "distance", "agreement", "accuracy") if any(_shown(row[name]) for row in rows)
        ]
        table = markdown_table(columns, [[_shown(row[name]) for name in columns] for row in rows])
        told = [as_sentence(self._measured_on("agreement" in columns))]
        told.append("Distance: mean squared distance of the outputs from the unpruned network's, over their variance.")
        if "agreement" in columns:
            told.append("Agreement: share of the largest outputs that are the same.")
        if "accuracy" in columns:
            told.append("Accuracy: what the evaluation function of the call returned.")
        if self.outputs is not None and self.outputs.left_out:
            told.append(f"Outputs that are compared: {', '.join(map(as_code, self.outputs.compared))}.")
        parts += ["## How much changes", table, " ".join(told)]
        parts += self.layers.widths_in_markdown()
        if self.changed_since:
            parts.append(as_sentence(told_of_changes(self.changed_since)))
        if self.warnings:
            parts += ["## Warnings", "\n".join(f"- {as_sentence(each)}" for each in self.warnings)]
        return "\n\n".join(parts)

    def _measured_on(self, has_agreement: bool) -> str:
        """Return a sentence that says what the figures are measured on."""
        measured = "distance and agreement are" if has_agreement else "distance is"
        if not self.held_out:
            return (
                f"{measured} measured on the {self.images} calibration samples, on which networks look better than "
                "they are"
            )
        others = f"the {self.images} other samples are the calibration data"
        if self.tolerance is not None and self.tolerance.measure != "evaluate":
            others = f"{self.images} other samples are the calibration data, the rest judged the candidates"
        return f"{measured} measured on {self.held_out} held-out samples, with 95 % intervals; {others}"

    def _rows(self) -> list[dict[str, Any]]:
        """Return the table's rows, with numbers and intervals as text."""
        is_discarded = self.distillation is not None and not self.distillation.is_kept
        rows: list[dict[str, Any]] = []
        for stage in self.stages:
            network = stage.network
            if network == "distilled" and is_discarded:
                network = "distilled (discarded)"
            rows.append(
                {
                    "network": network,
                    "macs": stage.macs,
                    "params": stage.params,
                    "distance": _with_interval(stage.distance, stage.distance_low, stage.distance_high),
                    "agreement": _with_interval(stage.agreement, stage.agreement_low, stage.agreement_high),
                    "accuracy": stage.accuracy,
                    "seconds": stage.seconds,
                }
            )
        return rows

    def __repr__(self) -> str:
        import pandas

        frame = pandas.DataFrame(self._rows()).dropna(axis="columns", how="all")
        lines = [frame.to_string(index=False, float_format=lambda value: f"{value:.4g}")]
        if self.held_out:
            lines.append(self._measured_on("agreement" in frame))
            if not self.grouped:
                lines.append(_UNGROUPED)
        if self.outputs is not None and self.outputs.left_out:
            lines.append(str(self.outputs))
        if self.tolerance is not None:
            lines.append(str(self.tolerance))
            lines.append(self.tolerance.told_candidates())
        if self.budget is not None:
            lines.append(str(self.budget))
        if self.depth is not None:
            lines.append(str(self.depth))
        if self.distillation is not None:
            lines.append(str(self.distillation))
        lines += [f"warning: {each}" for each in self.warnings]
        lines += map(repr, self.tried)
        left_alone = self.compensation.left_alone if self.compensation else {}
        for reason, names in by_reason(left_alone).items():
            lines.append(f"the weights of {listed(names, _NAMES)} are not reconstructed: {reason}")
        # Of a layer that keeps all channels, one line says why.
        held = {f"{row.name} {row.kept}": row.reason for row in self.layers.kept if row.name not in self.whole}
        for reason, names in by_reason(held).items():
            lines.append(f"channels that were to be removed are kept: {listed(names, _NAMES)} ({reason})")
        for reason, names in by_reason(self.whole).items():
            if reason != OUTPUT:
                keeps = "keeps" if len(names) == 1 else "keep"
                lines.append(f"{listed(names, _NAMES)} {keeps} all channels: {reason}")
        if self.undescribed:
            lines.append(
                f"from_pretrained can't build the network by its config, {self.undescribed}: use nni_topo.save and "
                "nni_topo.load"
            )
        if self.changed_since:
            lines.append(told_of_changes(self.changed_since))
        return "\n".join(lines)


def _shown(figure: str | float | None) -> str:
    """Return a cell of a table as text; empty for None and NaN."""
    if isinstance(figure, float):
        return "" if math.isnan(figure) else f"{figure:.4g}"
    return "" if figure is None else figure


def names_of_steps(
    steps: ShrinkSteps, budget: Budget, tried: tuple[Tried, ...]
) -> dict[Literal["pruner", "allocation", "equal_blocks", "recovery"], Any]:
    """Return what a report says of the pruner, the allocation and the recovery method, by its fields."""
    allocation = "" if chooses_how_many(steps.pruner) else str(budget.allocation)
    if allocation == AUTO:
        allocation = next((each.allocation for each in tried if each.is_chosen), "")
    return {
        "pruner": _name_of(steps.pruner),
        "allocation": allocation,
        "equal_blocks": bool(budget.equal_blocks),
        "recovery": "" if steps.compensate is None else _name_of(steps.compensate),
    }


def _name_of(choice: Any) -> str:
    """Return the name of a choice that is given by name, as a function, or as an object with settings."""
    return choice if isinstance(choice, str) else str(getattr(choice, "__name__", type(choice).__name__))


def _with_interval(value: float, low: float, high: float) -> str | None:
    """Return a number and its interval as the table shows them; None for NaN."""
    if math.isnan(value):
        return None
    return f"{value:.4g}" if low == high else f"{value:.4g} ({low:.3g}-{high:.3g})"


KNOBS = {"tolerance": number(0.0, 1.0, "neither") | NONE, "measure": one_of(MEASURES)}
"""Rules of the knobs that say how far the network's answers may differ."""


# Arguments that are names, knobs or functions are checked by `check_choices`.
@public(
    Running(leaves_out=LEAVE_OUT),
    model=MODEL,
    images=BATCHES,
    budget=ANYTHING,
    pruner=ANYTHING,
    distill=ANYTHING,
    round_to=ROUND_TO,
    **KNOBS,
)
def shrink(
    model: nn.Module,
    images: Iterable[Any] | Evaluator,
    budget: Budget | Mapping[str, Any] | str | None = None,
    *,
    tolerance: float | None = None,
    measure: str = "auto",
    pruner: str | Callable[..., MasksLike] = "reconstruction",
    knobs: Mapping[str, Any] | None = None,
    layers: Iterable[str | Mapping[str, Any]] | None = None,
    compensate: str | RecoveryMethod | Compensate | None = "reconstruct",
    distill: Mapping[str, Any] | Distill | bool = True,
    narrow_heads: bool | None = None,
    depth: bool = False,
    outputs: Outputs | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    round_to: int | Literal["auto"] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> nn.Module:
    """Make a trained network smaller, from unlabelled images alone.

    Parameters
    ----------
    model : torch.nn.Module
        The trained network, not wrapped by a pruner. It isn't changed.
    images : iterable or nni.compression.utils.Evaluator
        Batches of inputs, or of ``(inputs, ...)``; labels aren't used. If it is an evaluator, the batches it evaluates
        on. They are read once, see :class:`nni_topo.Calibration`; a DataLoader may shuffle and augment. Several
        processes can share them (``process_group`` of :class:`nni_topo.Calibration`).
        Every eighth image is held out from all steps, for the report. 1,000 images are enough for small networks.
    budget : Budget, mapping, str or None, default=None
        The share of the cost to keep, e.g. ``{"flops": 0.25}``, see :class:`nni_topo.Budget`. With a ``tolerance`` it
        may be the name of the cost that is made as small as possible, ``"flops"``, ``"params"``, ``"latency"`` or
        ``"memory"``, with other settings ``{"flops": None, "allocation": "error"}``; None: ``"flops"``. A share beside
        a ``tolerance`` is the least that is kept: whichever of the two keeps more decides, so that the tolerance always
        holds, and a warning says where the budget is missed. Time is that of a batch as large as the first one of
        ``images``: pass batches as large as the network will get, because single samples may gain nothing. With
        ``"allocation": "auto"`` the budget is distributed in every way that the pruner offers, the weights of each
        network are reconstructed, and the network with the smallest loss on the held-out images is kept; the loss is
        that of :func:`nni_topo.distill`. That takes two or three times as long; the report has the figures of all.
    tolerance : float, optional
        In (0, 1). Instead of a network of a given cost, find the smallest one whose answers differ from the unpruned
        network's by at most so much, e.g. 0.01 for one changed answer in a hundred; see the notes.
    measure : {"auto", "outputs", "distance", "evaluate"}, default="auto"
        What the ``tolerance`` is about. ``"outputs"``: the share of images whose answer, the class with the largest
        output, changes; where outputs aren't scores of classes, the distance. ``"distance"``: the mean squared distance
        of the outputs, over their variance. ``"evaluate"``: the fall of the number that ``evaluate`` returns, so 0.01
        is one point of an accuracy. ``"auto"``: ``"evaluate"`` where that is given, else ``"outputs"``.
    pruner : str or callable, default="reconstruction"
        Name of a structured pruner, NNI's own too. Or a function of (a copy of the model, a
        config_list with dependency groups and without ratios, the calibration images) that returns masks.
    knobs : mapping, optional
        The named pruner's own arguments.
    layers : iterable of str or mapping, optional
        Names of the layers to prune, or entries of a config_list without ratios. Their ``max_sparse_ratio`` and
        ``min_sparse_ratio`` are the largest and smallest share of channels that a layer loses. By default all
        convolutions, linear and recurrent layers except those that give the output.
    compensate : str, RecoveryMethod, callable or None, default="reconstruct"
        Method of :func:`nni_topo.compensate`, by name or as an object with settings of its own such as
        ``nni_topo.recovery.Reconstruct(refine=0)``; or a function of (model, masks, images) that returns a model of
        full size; None: the weights are not reconstructed.
    distill : mapping, callable or bool, default=True
        Whether to distil at the end. The distilled weights are kept only if, on the held-out images, the loss falls and
        the distance at most doubles; ``report.distillation`` has the figures. A network of whose outputs no gradients
        can be taken isn't distilled, with a warning. Or knobs of :func:`nni_topo.distill`, e.g.
        ``{"seconds": 60, "augment": ...}``; or a function of (dense, model, images) that returns a dense model, which
        is kept in any case.
    narrow_heads : bool, optional
        Instead of removing heads of attention, make all heads of the module narrower for the same cost, where
        :func:`nni_topo.narrow_heads` can. Not done for a latency budget, nor with ``round_to`` or ``equal_blocks``,
        nor on a GPU unless ``round_to`` is 1. None: as True, but for a model of Transformers; see the notes.
    depth : bool, default=False
        Whether blocks compete with channels for the budget: residual blocks, blocks of transformers, and attention or
        the MLP in these; see the notes. That takes two to three times as long.
    outputs : callable, optional
        What counts of the model's output, as for :func:`nni_topo.distill`: the report, the allocation and distillation
        look at nothing else.
    evaluate : callable, optional
        A function of a network in evaluation mode that returns a number for the report, e.g. its accuracy. It gets
        ``model`` itself and the networks made of it; what it does to them, such as ``half()`` or to train them, is put
        back when it returns. With a ``tolerance`` it decides (larger is better), unless ``measure`` says otherwise. It
        then needs data of its own, which no longer tell how good the network is: they chose it.
    round_to : int or "auto", optional
        Pruned layers keep a multiple of this number of channels; ``"auto"`` chooses it for the model's device, 1: any
        number. None: any number on a CPU, as ``"auto"`` on a GPU, which may take several times as long over other
        numbers.
    seed : int, default=0
        Seed of all steps.
    progress : bool or None, default=None
        Show on standard error how far it is: in a terminal a bar, elsewhere a line every half minute. None: after
        five seconds.

    Returns
    -------
    torch.nn.Module
        The dense network, in the mode of ``model``. Its ``report`` is a :class:`ShrinkReport`.

    Raises
    ------
    ConfigError
        If the budget, a name or a knob is invalid, or the allocation is ``"auto"`` and the pruner has only one. If the
        images are too few to confirm the ``tolerance`` even if no answer changes, or there are no channels to remove,
        also because the ``layers`` share all of theirs with layers that aren't among them.
        If ``depth`` is True and the pruner chooses how many channels it keeps. If the config of a model of Transformers
        can't describe the smaller network, as with ``layers`` that have no width of their own in it.
    DataError
        If the images can't be used, or are fewer than eight for ``"auto"`` or ``depth``.
    SpeedupError
        If the model can't be traced, or is still wrapped.
    ProcessError
        If one of the processes that share the images fails or is gone; in the others.

    See Also
    --------
    nni_topo.frontier : Networks of several sizes.
    nni_topo.compensate, nni_topo.distill, nni_topo.to_dense : The steps, one by one.

    Notes
    -----
    With a ``tolerance``, three of eight images are calibration data, two judge the candidates of a search (six to nine
    networks after weight reconstruction, the smallest one that is within the tolerance after distillation, and where
    that helps a smaller one), and three, which the search never saw, confirm the result: the upper 95 %
    limit of the difference there is at most the tolerance. For shares of changed answers the limit is exact (Clopper
    and Pearson; Hoeffding's for outputs by position), for distances Student's t. Samples of one group
    (:class:`nni_topo.Calibration`) count as one. 299 images without a change are needed for 0.01, 59 for 0.05; so pass
    797 and 157 images at least, better twice as many.

    The candidates that are within the tolerance on the judging images are confirmed from the largest to the smallest,
    until one fails, so that the risk that the network which is returned misses the tolerance stays 5 %, however many
    are looked at. If all fail, a copy of the unpruned network is returned, with a warning. ``report.tolerance`` has the
    figures of all. The limit is one for images of the same kind: on images that the network was trained on, answers
    change less often than on others. An ``evaluate`` function gives no limit: what it returns is taken as it is.

    The smaller network of a model of Transformers is one that its config describes, so that ``from_pretrained`` loads
    what :func:`nni_topo.save_pretrained`, its own ``save_pretrained`` or a ``Trainer`` saves: blocks are equally wide,
    heads are removed whole or, where the config can't say fewer heads, kept, and poolers, classifiers and the residual
    stream stay as wide as they are. A warning before the work says if this can't meet the budget, and which share it
    reaches. ``"equal_blocks": False`` in the budget asks for free widths and narrower heads, ``narrow_heads=True`` as
    well; ``report.undescribed`` then says what no config can say.

    With ``depth`` blocks are put in an order first: the next one is the block without which the loss, on 128 held-out
    images, grows least for the cost that it saves, after the layer before it was solved on 256 calibration images to
    make up for it; the eight most promising ones are looked at again after each removal. Then two or three networks
    are made: without any block removed, and without blocks for a half and a quarter, three quarters or all of the
    saving, counted in quotients; channels take the rest of the budget, and weights are reconstructed. The one with
    the smallest loss on the held-out images is distilled. With a latency budget, blocks go first where layers with as
    few channels as possible aren't fast enough; the report says what share of the time such layers leave. With a
    ``tolerance`` each candidate is found in this way. A block stays if a hook meets it, if what it puts out is an
    output of the model, and, with ``layers``, if one of its layers has a ``max_sparse_ratio``, or isn't named and has
    channels that only the block uses; parts of blocks stay with ``equal_blocks``, so that Transformers' config
    describes the network. Where no block can go, a warning says so and the network is that of ``depth=False``.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> small = shrink(model, [torch.randn(256, 16)], {"flops": 0.25}, distill={"steps": 100})
    >>> [stage.network for stage in small.report.stages]
    ['unpruned', 'pruned', 'reconstructed', 'distilled']
    >>> small(torch.randn(2, 16)).shape
    torch.Size([2, 4])
    """
    calibration = batches_of(images, model, "images", shared=True)
    asked, kind_and_allocation = budget_settings(budget, tolerance)
    layers = None if layers is None else list(layers)
    check_model(model)
    check_layers(model, layers, "shrink")
    check_choices(kind_and_allocation, pruner, knobs, layers, compensate, distill, outputs, evaluate, "shrink")
    check_can_be_shared(calibration, kind_and_allocation, pruner, compensate, distill, tolerance, depth)
    kind_and_allocation, is_described = as_described(model, kind_and_allocation, narrow_heads, pruner)
    model, told_of_weights = plain_weights(model)
    structure_call(model, calibration)  # an error that says what to change
    parts: tuple[Calibration | None, ...] | None = None
    if depth:
        check_has_size(pruner, "depth=True needs")
    if tolerance is not None:
        check_one_distilled(distill, "candidates of the tolerance", "shrink")
        measure = resolved_measure(measure, evaluate, model, calibration, outputs)
        # A function has its own data, so no image must be withheld from the calibration data to confirm.
        parts = None if measure == "evaluate" else calibration.in_parts(PARTS)
        check_tolerance(tolerance, measure, calibration, parts or (), pruner)
    data = ImageParts.of(calibration, model, parts)
    check_can_be_distilled(model, data.all, distill, outputs)
    steps = ShrinkSteps.prepare(
        model,
        data,
        kind_and_allocation.kind,
        pruner=pruner,
        knobs=knobs,
        layers=layers,
        compensate=compensate,
        distill=distill,
        narrow_heads=narrow_heads,
        outputs=outputs,
        round_to=round_to,
        seed=seed,
        progress=progress,
        is_search=tolerance is not None,
        is_described=is_described,
    )
    if asked is not None and not depth:
        steps.tell_reachable(kind_and_allocation)
    measured = Measurements(model, data, evaluate, outputs)
    measured.add(UNPRUNED, model)
    if depth:
        steps = DepthSteps.of(steps, kind_and_allocation)
    found: ToleranceOutcome | None = None
    tried: tuple[Tried, ...] = ()
    outcome: BudgetOutcome | None
    verdict: Verdict | None
    recovered: RecoveredNetwork | None
    more_warnings: tuple[str, ...] = ()
    if tolerance is not None:
        judging = [] if parts is None else [each for each in parts[1:] if each is not None]
        judge = Judge(model, measured.answers, judging, tolerance, measure, evaluate)
        result = within_tolerance(steps, judge, kind_and_allocation, asked)
        outcome, found, more_warnings = result.budget, result.outcome, result.warnings
        chosen = result.chosen
        recovered, tried, verdict = None, (), None
        if chosen is None:
            final = to_dense(model, data.example, {})
            layer_report = dense_report_of(final)
        else:
            recovered, tried, verdict, final = chosen.recovered, chosen.tried, chosen.verdict, chosen.network
            layer_report = recovered.layers
            measured.add("pruned", recovered.pruned.dense)
            if compensate is not None:
                measured.add("reconstructed", recovered.dense)
            if chosen.candidate.is_distilled:
                measured.add("distilled", final)
    else:
        if kind_and_allocation.allocation == AUTO or isinstance(steps, DepthSteps):
            recovered, tried = steps.recover(kind_and_allocation)
            measured.add("pruned", recovered.pruned.dense)
        else:
            pruned = steps.prune(kind_and_allocation)
            measured.add("pruned", pruned.dense)
            recovered = steps.reconstruct(pruned)
        outcome = steps.outcome(kind_and_allocation, recovered)
        if compensate is not None:
            measured.add("reconstructed", recovered.dense)
        layer_report = recovered.layers
        final, verdict = steps.distil(recovered.dense)
        if callable(distill) or final is not recovered.dense:
            measured.add("distilled", final)
    undescribed = told_by_config(final, is_described)
    compensation_report = None if recovered is None else recovered.report
    report = ShrinkReport(
        stages=tuple(measured.stages),
        layers=layer_report,
        compensation=compensation_report,
        tried=tried,
        budget=outcome,
        images=data.learned.samples_of_all,
        held_out=0 if data.held_out is None else data.held_out.samples_of_all,
        warnings=told_of_weights
        + measured.warnings()
        + (compensation_report.warnings if compensation_report is not None else ())
        + steps.warnings
        + _nearly_gone(layer_report)
        + more_warnings,
        whole=steps.prunable.unpruned,
        distillation=verdict,
        tolerance=found,
        depth=None if recovered is None else recovered.depth,
        outputs=measured.answers.named,
        undescribed=undescribed,
        grouped=calibration.groups is not None,
        **names_of_steps(steps, kind_and_allocation, tried),
    )
    tell_report(final, report)
    return final


def told_by_config(network: nn.Module, is_described: bool) -> str:
    """Let a network of Transformers be as its config describes it, and return what the config can't say."""
    if is_described:
        with_transposed_weights(network)
    if not is_pretrained(network):
        return ""
    tell_pruned_heads(network)
    return why_undescribed(network)


def _nearly_gone(layers: DenseReport) -> tuple[str, ...]:
    """Return a warning that names the layers of which one channel is left."""
    left = [f"{row.name} (of {row.before})" for row in layers.rows if row.after == 1 and row.before >= _MANY]
    if not left:
        return ()
    return (
        f"one channel is left of these layers: {listed(left)}; ask for a larger share of the cost, or give them a "
        "max_sparse_ratio (layers)",
    )


def tell_report(network: nn.Module, report: ShrinkReport) -> None:
    """Let a network have its report, or log the report where the network has an attribute of that name."""
    if not give_report(network, report):
        _logger.warning(
            "the model has an attribute of its own called report, so that this is only told here: %s", report
        )


def budget_settings(
    budget: Budget | Mapping[str, Any] | str | None, tolerance: float | None
) -> tuple[float | None, Budget]:
    """Return the share that is asked for, if any, and the budget; without a share it says only which cost counts."""
    if tolerance is None:
        if budget is None or isinstance(budget, str):
            got = "neither" if budget is None else repr(budget)
            raise ConfigError(
                f"shrink needs a budget with a share, e.g. {{'flops': 0.25}}, or a tolerance, got {got} (budget)"
            )
        found = as_budget(budget)
        return found.share, found
    named = without_share("flops" if budget is None else budget, "shrink")
    if named is not None:
        return None, named
    with_share: Any = budget
    found = as_budget(with_share)
    return found.share, found


def without_share(budget: Budget | Mapping[str, Any] | str, place: str) -> Budget | None:
    """Return the budget of a cost that is only named, as ``"flops"`` or ``{"flops": None, ...}``; None for others."""
    if isinstance(budget, str):
        one_of(BUDGETS).check("budget", budget, place)
    given: Any = {budget: None} if isinstance(budget, str) else budget
    if isinstance(given, Mapping):
        costs = [name for name in BUDGETS if name in given]
        if len(costs) == 1 and given[costs[0]] is None:
            return as_budget({**given, costs[0]: 1.0})
    return None
