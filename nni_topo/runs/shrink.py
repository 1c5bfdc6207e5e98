"""A smaller network in one call: dependency groups, pruning, weight reconstruction, distillation, checks, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.network.io.importing.files import taking_files
from nni_topo.network.runtime.arguments import BATCHES, MODEL, ROUND_TO
from nni_topo.network.runtime.hooks import batches_of
from nni_topo.network.runtime.public import Running, public
from nni_topo.pruners.budget import AUTO, Budget, as_budget
from nni_topo.recovery import RecoveryMethod
from nni_topo.recovery.clock import Clock
from nni_topo.recovery.distilling import KNOBS as DISTILLATION
from nni_topo.recovery.outputs import Outputs
from nni_topo.rules import ANYTHING, NONE, number, one_of
from nni_topo.runs.prepared import prepare
from nni_topo.runs.settings import LEAVE_OUT, TOLERANCE, Settings, allocations_to_try, cost_without_share
from nni_topo.runs.tolerance import MEASURES, checked_tolerance, within_tolerance

KNOBS = {"tolerance": number(0.0, 1.0, "neither") | NONE, "measure": one_of(MEASURES)}
"""Rules of the knobs that say how much the network's outputs may change."""


@taking_files
@public(
    Running(leaves_out=LEAVE_OUT),
    model=MODEL,
    images=BATCHES,
    budget=ANYTHING,
    round_to=ROUND_TO,
    seconds=DISTILLATION["seconds"],
    **KNOBS,
)
def shrink(
    model: nn.Module | Any,
    images: Iterable[Any] | Evaluator,
    budget: Budget | Mapping[str, Any] | str | None = None,
    *,
    tolerance: float | None = None,
    measure: str = "auto",
    pruner: str = "reconstruction",
    knobs: Mapping[str, Any] | None = None,
    layers: Iterable[str | Mapping[str, Any]] | None = None,
    compensate: str | RecoveryMethod | None = "reconstruct",
    distill: Mapping[str, Any] | bool = True,
    depth: bool = False,
    outputs: Outputs | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    round_to: int | None = None,
    time: bool = False,
    seconds: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> nn.Module:
    """Make a trained network smaller, from unlabelled images alone.

    Parameters
    ----------
    model : torch.nn.Module, str, Path, onnx.ModelProto or torch.export.ExportedProgram
        The trained network, not wrapped by a pruner. It isn't changed. Also what :func:`nni_topo.from_file` takes: the
        path of an ``.onnx`` or ``.pt2`` file, or what is loaded from it. Then batches may be arrays, or dicts by the
        names of the file's inputs, and :func:`nni_topo.export` writes the smaller file without inputs.
    images : iterable or nni.compression.utils.Evaluator
        Batches of inputs, or of ``(inputs, ...)``; labels aren't used. If it is an evaluator, the batches it evaluates
        on. They are read once, see :class:`nni_topo.Calibration`; a DataLoader may shuffle and augment.
        Every eighth image is held out: half of these judge the results of the steps, and the others, which no step
        uses, give the report's figures. 1,000 images are enough for small networks.
    budget : Budget, mapping, str or None, default=None
        The share of the cost to keep, e.g. ``{"flops": 0.25}``, see :class:`nni_topo.Budget`. Time is measured on a
        batch as large as the first one of ``images``: pass batches as large as the network will get, because single
        samples may gain nothing. With ``"allocation": "auto"`` a network is made in every way that the pruner can
        distribute the budget, and the one with the smallest loss on the images that judge is kept; that takes two or
        three times as long. With a ``tolerance`` it is the name of the cost to minimize: ``"flops"`` (the default),
        ``"params"``, ``"latency"`` or ``"memory"``, with other settings ``{"flops": None, "allocation": "error"}``.
    tolerance : float, optional
        In (0, 1). Instead of a network of a given cost, find the smallest one whose answers differ from the unpruned
        network's by at most this value, e.g. 0.01 for one changed answer in a hundred; see the notes.
    measure : {"auto", "outputs", "distance", "evaluate"}, default="auto"
        The difference that the ``tolerance`` limits. ``"outputs"``: the share of answers, classes or decisions, that
        change; if outputs have none, the distance. ``"distance"``: the mean squared
        distance of the outputs, over their variance. ``"evaluate"``: the fall of the number that ``evaluate`` returns,
        so 0.01 is one point of an accuracy. ``"auto"``: ``"evaluate"`` if that is given, else ``"outputs"``.
    pruner : str, default="reconstruction"
        Name of a structured pruner, NNI's own too, or ``"package.module:Class"``.
    knobs : mapping, optional
        The named pruner's own arguments.
    layers : iterable of str or mapping, optional
        Names of the layers to prune, or entries of a config_list without ratios. Their ``max_sparse_ratio`` and
        ``min_sparse_ratio`` are the largest and smallest share of channels that a layer loses. By default all
        convolutions, linear and recurrent layers except those that compute the output, and embeddings that are added to
        such layers' outputs or scale them (of a class or time, say; not the tables of tokens and their positions).
    compensate : str, RecoveryMethod or None, default="reconstruct"
        Method of :func:`nni_topo.compensate`, by name or as an object with settings of its own such as
        ``nni_topo.recovery.Reconstruct(refine=0)``; None: the weights are not reconstructed.
    distill : mapping or bool, default=True
        Whether to distil at the end, or knobs of :func:`nni_topo.distill`, e.g. ``{"seconds": 60, "augment": ...}``,
        where ``seconds`` is the wall time of distillation alone. The distilled weights are kept only if, on the
        images that judge, the loss falls and the distance at most doubles. A network whose outputs have no gradients
        isn't distilled, and a warning says so.
    depth : bool, default=False
        Whether blocks compete with channels for the budget: residual blocks, blocks of transformers, and attention or
        the MLP in these; see the notes. That takes two to four times as long. ``layers`` then are names, and a budget
        of latency has a share and no table.
    outputs : callable, optional
        Returns the outputs to compare, as for :func:`nni_topo.distill`: the report, the allocation and distillation use
        nothing else.
    evaluate : callable, optional
        A function of a network in evaluation mode that returns a number for the report, e.g. its accuracy. It gets
        ``model`` itself and the networks made of it; its changes to them, such as ``half()`` or training, are undone
        when it returns. If the ``tolerance`` limits its fall, larger must be better, and its data no longer tell how
        good the network is, because they chose it.
    round_to : int, optional
        Pruned layers keep a multiple of this number of channels; 1: any number. None: processors compute several
        channels at once, so on a CPU layers keep a multiple of 16 from 128 channels on, of 8 from 64, of 4 from 32 and
        of 2 from 16; for a latency budget of 16 from 32 channels on, 8 from 16, 4 from 8 and 2 from 4. If the budget
        couldn't be met otherwise, the number is smaller. On a GPU it is 8.
    time : bool, default=False
        Whether the report has the times of the unpruned and of the returned network: medians of alternating passes over
        a batch as large as the first one of ``images``, with one thread on a CPU. That takes at most about ten seconds,
        or eight passes if these are slow. With a budget of latency the report always has them.
    seconds : float, optional
        Wall time of the whole call without ``time``, above 0. The steps before distillation aren't limited, and
        distillation gets the time left; without any, the network isn't distilled, and a warning says so. Not with a
        ``tolerance``, nor with ``distill=False``.
    seed : int, default=0
        Seed of all steps.
    progress : bool or None, default=None
        Show on standard error how far it is: in a terminal a bar, elsewhere a line every half minute. None: after
        five seconds.

    Returns
    -------
    torch.nn.Module
        The dense network, in the mode of ``model``. Its ``report`` is a
        :class:`ShrinkReport <nni_topo.runs.report.ShrinkReport>`.

    Raises
    ------
    ConfigError
        If the budget, a name or a knob is invalid, or arguments don't go together. If the images are too few to confirm
        the ``tolerance``, or there are no channels to remove. If the config of a model of Transformers can't describe
        the smaller network, for example if ``layers`` have no width of their own in it.
    DataError
        If the images can't be used, or are fewer than eight for ``"auto"`` or ``depth``.
    SpeedupError
        If the model can't be traced, or is still wrapped.

    See Also
    --------
    nni_topo.frontier : Networks of several sizes.
    nni_topo.compensate, nni_topo.distill, nni_topo.to_dense : The steps, one by one.

    Notes
    -----
    Before the work a message estimates its time; it is a warning if that is more than ten minutes. Before distillation
    another one has the agreement after weight reconstruction, and for classifiers the range of the agreement that
    recorded networks reached by distillation; ``report.expectation`` says whether it held.

    With a ``tolerance``, three of eight images are calibration data, two judge the candidates of a search, and three,
    which the search never saw, confirm the result: the upper 95 % limit of the difference there is at most the
    tolerance. 299 images without a change are needed for 0.01, 59 for 0.05; so pass 797 and 157 images at least, better
    twice as many. If no candidate is confirmed, a copy of the unpruned network is returned, with a warning.

    A model of Transformers becomes a smaller network that its config describes, so that ``from_pretrained`` can load
    it: blocks are equally wide, heads are removed whole or, if the config can't say fewer heads, kept, and poolers,
    classifiers and the residual stream keep their width. A warning before the work says if
    this can't meet the budget. ``"equal_blocks": False`` in the budget asks for free widths, which are the default
    where a config can describe fewer channels of no layer, as ResNet's; ``report.undescribed``
    then says what the config can't describe.

    With ``depth`` two or three networks are made: with all blocks, and without blocks that save parts of the cost. In
    each, channels are removed for the rest, and the one with the smallest loss on the images that judge is distilled.
    ``docs/how_small.md`` has more on tolerances and blocks.

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
    arguments, clock = locals(), Clock(seconds)
    settings = Settings.among(arguments)
    calibration = batches_of(images, model, "images")
    if tolerance is None and measure != "auto":
        raise ConfigError(f"measure needs a tolerance, got {measure!r} without one (shrink)")
    several = "" if tolerance is None else TOLERANCE
    wanted = settings.checked(model, asked_budget(budget, tolerance), several)
    is_timed = time or wanted.kind == "latency"
    if tolerance is not None:
        measure, parts = checked_tolerance(tolerance, measure, model, calibration, settings)
        prepared = prepare(model, calibration, settings, wanted, parts=parts, is_timed=is_timed)
        return within_tolerance(prepared, tolerance, measure)
    prepared = prepare(model, calibration, settings, wanted, is_timed=is_timed, clock=clock)
    prepared.tell_cost(made=len(allocations_to_try(pruner)) if wanted.allocation == AUTO else 1)
    made = prepared.make(wanted.share)
    outcome = prepared.outcome(wanted.share, made)
    prepared.measure(made)
    expectation = prepared.expect() if settings.compensate is not None else None
    final = prepared.distil(made)
    if final is not made:
        prepared.measured.add("distilled", final.dense, final.seconds_of_distillation)
        if expectation is not None:
            expectation = replace(expectation, distilled=prepared.measured.stages[-1].agreement)
    warnings = prepared.measured.warnings(made.layers.rows)
    prepared.report(final.dense, final, warnings, budget=outcome, expectation=expectation)
    network: nn.Module = final.dense
    return network


def asked_budget(budget: Budget | Mapping[str, Any] | str | None, tolerance: float | None) -> Budget:
    """Return the budget; with a tolerance it only names the cost."""
    if tolerance is not None:
        return cost_without_share("flops" if budget is None else budget, "shrink", TOLERANCE)
    if budget is None or isinstance(budget, str):
        got = "neither" if budget is None else repr(budget)
        raise ConfigError(
            f"shrink needs a budget with a share, e.g. {{'flops': 0.25}}, or a tolerance, got {got} (budget)"
        )
    return as_budget(budget)
