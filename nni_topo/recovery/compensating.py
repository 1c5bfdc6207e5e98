"""Weight reconstruction: weights after pruned channels are solved anew, without labels, gradients or fine-tuning."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.context import context
from nni_topo.errors import listed
from nni_topo.network.layers.derived import give_back_classes, with_known_layers
from nni_topo.network.runtime.arguments import BATCHES, MASKS, MODEL, check_model
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import check_samples_first, structure_call
from nni_topo.network.runtime.hooks import batches_of
from nni_topo.network.runtime.inputs import batch_size, calls
from nni_topo.network.runtime.progress import bar
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.reports import hand_on_report, tell_compensated, tell_solved_on
from nni_topo.network.speedup.analysis import Analysis, Facts
from nni_topo.network.speedup.dependency import by_reason
from nni_topo.network.speedup.equivalence import apply_masks
from nni_topo.network.speedup.leaving_out import leave_out
from nni_topo.network.speedup.reconcile import MasksLike
from nni_topo.recovery.batchnorm import batch_norms, recalibrate_batch_norm
from nni_topo.recovery.frozen import FROZEN
from nni_topo.recovery.likeness import outputs_in_words
from nni_topo.recovery.networks import Networks, build_networks, plan_of
from nni_topo.recovery.plan import ATTENTION, Plan
from nni_topo.recovery.reconstruct import Reconstruct
from nni_topo.recovery.registry import RECOVERIES, RecoveryMethod
from nni_topo.recovery.replay import Replay
from nni_topo.recovery.report import CompensationReport, LayerReport, signed_like
from nni_topo.recovery.samples import (
    HELD_OUT_ENTRIES,
    Sampler,
    Task,
    check_ridge,
    samples_to_solve_on,
)
from nni_topo.rules import NONE, instance, whole

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Compensation:
    """A compensated model and its report; both have the same ``repr``.

    Attributes
    ----------
    model : torch.nn.Module
        The model that :func:`compensate` returns.
    report : CompensationReport
        Errors before and after, layer by layer; ``report.to_frame()`` is a table.
    """

    model: nn.Module
    report: CompensationReport

    def __repr__(self) -> str:
        return repr(self.report)


@public(
    model=MODEL,
    masks=MASKS,
    calibration=BATCHES,
    method=instance(str, RecoveryMethod),
    cache_bytes=whole(0, 2**63 - 1) | NONE,
)
def compensation(
    model: nn.Module,
    masks: MasksLike,
    calibration: Iterable[Any] | Evaluator,
    *,
    method: str | RecoveryMethod = "reconstruct",
    ridge: float | Literal["auto"] = "auto",
    seed: int = 0,
    cache_bytes: int | None = None,
    progress: bool | None = None,
) -> Compensation:
    """Compensate a model and report the result; parameters and errors as for :func:`compensate`.

    Returns
    -------
    Compensation
        The model and the report.
    """
    began = time.perf_counter()
    check_ridge(ridge)
    chosen = method if isinstance(method, RecoveryMethod) else RECOVERIES.info(method, "compensate", "method").make()
    check_model(model)
    user_model, model = model, with_known_layers(model)
    calibration = batches_of(calibration, model)
    everything, calibration = calibration, samples_to_solve_on(model, calibration)
    networks, plan, sampler = _begin(model, calibration, masks, seed, cache_bytes or 0, context().facts)
    tasks = chosen.tasks(plan, networks)
    if cache_bytes is None:
        sampler.replay.cache_bytes = sampler.memory_beside(tasks)
    layers = _run(tasks, sampler, networks, None if ridge == "auto" else float(ridge), progress, plan.left_alone)
    unsolved_reasons = {name: why for name, why in plan.left_alone.items() if why != ATTENTION}
    if chosen.recalibrates:
        # On the masked form of the result; removed channels keep their statistics.
        masked = apply_masks(networks.result, networks.masks)
        leave_out(masked, networks.flow, networks.is_kept)
        masked = recalibrate_batch_norm(masked, calibration)
        norms, frozen = batch_norms(networks.result)
        for name, norm in norms.items():
            if norm.running_var is not None and norm.running_mean is not None:
                measured: Any = masked.get_submodule(name)
                alive = measured.running_var > 0
                norm.running_mean[alive] = measured.running_mean[alive]
                norm.running_var[alive] = measured.running_var[alive]
        plan.left_alone.update(dict.fromkeys(frozen, FROZEN))
    held_out = everything.samples - calibration.samples
    read_as = context().read_as
    if read_as is None:
        read_as = outputs_in_words(model, calibration)
    seconds = time.perf_counter() - began
    report = CompensationReport(layers, plan.left_alone, sampler.images, seconds, held_out, read_as)
    if unsolved_reasons:
        named = ", ".join(f"{listed(names)} ({why})" for why, names in by_reason(unsolved_reasons).items())
        _logger.warning("layers after removed channels that couldn't be reconstructed: %s", named)
    for text in report.warnings:
        _logger.warning("%s", text)
    give_back_classes(user_model, networks.result)
    hand_on_report(user_model, networks.result, "weights reconstructed (nni_topo.compensate)")
    tell_solved_on(networks.result, calibration.digests)
    tell_compensated(networks.result, True)
    return Compensation(networks.result, report)


@signed_like(compensation)
def compensate(*args: Any, **knobs: Any) -> nn.Module:
    """Change the kept weights of a pruned model so that they make up for the removed ones.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model after ``pruner.unwrap_model()``. It isn't changed.
    masks : mapping of str to mapping of str to Tensor or None
        NNI's masks, ``{module: {parameter: mask}}``, of any pruner. They aren't changed.
    calibration : iterable or nni.compression.utils.Evaluator
        Batches of inputs, or of ``(inputs, ...)``; labels aren't used. If it is an evaluator, the batches it evaluates
        on. 500 to 2,000 images are enough for small nets. They are read once, see :class:`nni_topo.Calibration`. Of
        eight or more, every eighth is left out, so that :func:`nni_topo.distill` can judge on it. The ``groups`` of a
        Calibration say which samples aren't independent, such as crops of a photo.
    method : str or RecoveryMethod, default="reconstruct"
        A name of :func:`nni_topo.list_recoveries`, or a method with settings of its own, such as
        ``nni_topo.recovery.Reconstruct(refine=0)``.
        ``"reconstruct"`` (:class:`~nni_topo.recovery.Reconstruct`): solve each layer after removed channels again, so
        it reproduces its unpruned output, or the sum it goes into. ``"pair"`` (:class:`~nni_topo.recovery.Pair`): one
        kept channel and a constant replace each removed one.
        ``"recalibrate"``: measure the statistics of batch norms anew and change nothing else.
    ridge : float or "auto", default="auto"
        Penalty on the change of a weight, at least 0, as a share of the variance of the weight's input plus a tenth of
        the mean variance.
        ``"auto"``: for each layer a value from 1e-8 to 1, or no change at all, by the error on held-out samples.
    seed : int, default=0
        Seed for the sampled positions of large feature maps.
    cache_bytes : int or None, default=None
        Memory for intermediate values of both networks, at least 0. With less, more is computed again. None: at
        most a quarter of the free memory of the network's device.
    progress : bool or None, default=None
        Show on standard error how far it is: in a terminal a bar, elsewhere a line every half minute. None: after
        five seconds.

    Returns
    -------
    torch.nn.Module
        A new model of full size; each module has the mode that it has in ``model``. Its kept channels no longer read
        removed ones; the weights of removed channels are unchanged. ``masked_model`` and ``to_dense`` with the same
        masks give the compensated network.

    Raises
    ------
    ConfigError
        If the masks or a knob can't be used.
    DataError
        If there is no batch, inputs or activations are NaN or infinite, or a batch doesn't fit the model.
    SpeedupError
        If the model is still wrapped or can't be traced.

    See Also
    --------
    compensation : The same with a report.
    recalibrate_batch_norm : Statistics only.

    Notes
    -----
    Activations are computed in evaluation mode, whatever the model's mode.

    Layers are solved in network order, each on the activations of the network as compensated so far. Where a
    layer's output is added to another, directly or after batch norms, the target is the sum. Batch norms keep their
    place and statistics; where a layer has no bias, the running mean of the batch norm after it takes the constant.

    Layers that are called more than once, transposed convolutions that are called with an ``output_size``, and layers
    that are masked weight by weight or whose weights are tied, computed or frozen aren't changed; the log and the
    report name them. A frozen parameter is one that doesn't require gradients, in a model where others do: a model that
    is frozen as a whole is compensated, and the result is frozen, too.

    Cost: a layer's sums of products take twice the square of ``inputs * kernel elements`` float64 numbers, whatever the
    number of images, and solving takes as much again: 11 GB for a 3x3 convolution of 2,048 channels. ``cache_bytes``
    come on top.

    Examples
    --------
    >>> import torch
    >>> from nni_topo import masked_model
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> _ = net[0].weight.data[2].copy_(net[0].weight.data[0] - net[0].weight.data[1])
    >>> mask = torch.tensor([1.0, 1.0, 0.0])[:, None]
    >>> inputs = torch.randn(64, 4)
    >>> repaired = compensate(net, {"0": {"weight": mask}}, [inputs])
    >>> bool(torch.allclose(masked_model(repaired, inputs, {"0": {"weight": mask}})(inputs), net(inputs), atol=1e-5))
    True
    """
    return compensation(*args, **knobs).model


def compensate_up_to(
    model: nn.Module,
    masks: MasksLike,
    calibration: Iterable[Any],
    layer: str,
    *,
    seed: int = 0,
    facts: Facts | None = None,
) -> nn.Module:
    """Return the pruned network, traced, with the layers in front of `layer` reconstructed; errors of `compensate`."""
    check_model(model)
    calibration = batches_of(calibration, model)
    networks, plan, sampler = _begin(model, calibration, masks, seed, 2**30, facts)
    order = sampler.replay.order
    end = next(rank for node, rank in order.items() if node.op == "call_module" and node.target == layer)
    plan.equations = [equation for equation in plan.equations if order[equation.place] < end]
    _run(Reconstruct(refine=0).tasks(plan, networks), sampler, networks, None, False, {})
    return networks.pruned


def _begin(
    model: nn.Module,
    calibration: Calibration,
    masks: MasksLike,
    seed: int,
    cache_bytes: int,
    facts: Facts | None = None,
) -> tuple[Networks, Plan, Sampler]:
    """Return the networks, the plan and the sampler; every fifth sample, or group of samples, is held out."""
    sizes = tuple(batch_size(call) for call in calls(model, calibration))
    call = structure_call(model, calibration)
    check_samples_first(model, calibration)
    networks = build_networks(Analysis(model, call, facts), masks)
    replay = Replay(model, networks.unpruned, networks.pruned, calibration, cache_bytes)
    if sum(sizes) == calibration.samples:
        held_out = calibration.held_out(HELD_OUT_ENTRIES)
    else:  # lists of images, as detectors take them
        held_out = torch.arange(sum(sizes)) % HELD_OUT_ENTRIES == HELD_OUT_ENTRIES - 1
    sampler = Sampler(replay, sizes, seed, held_out)
    return networks, plan_of(networks, replay.touched_nodes), sampler


def _run(
    tasks: list[Task],
    sampler: Sampler,
    networks: Networks,
    ridge: float | None,
    progress: bool | None,
    left_alone: dict[str, str],
) -> tuple[LayerReport, ...]:
    """Solve the tasks one after the other; tasks that refine another one use its ridge.

    Layers that get other samples in the pruned network aren't solved, and ``left_alone`` gets the reason.
    """
    sampler.check_room(tasks)
    ranks = [sampler.replay.order[task.layer.node] for task in tasks]
    layers: list[LayerReport] = []
    unmatched: set[str] = set()
    for index, task in enumerate(bar("compensate", progress, tasks)):
        if task.layer.name in unmatched:  # a task that would refine what wasn't solved
            continue
        chosen = layers[-1].ridge if task.refines and ridge is None and layers[-1].ridge < math.inf else ridge
        began = time.perf_counter()
        sums = sampler.collect(task, min(ranks[index:]))
        if sums is None:
            unmatched.add(task.layer.name)
            left_alone[task.layer.name] = "in the pruned network a router sends it other samples"
            continue
        layer_fit = task.fit(*sums, chosen)
        for net in (networks.pruned, networks.result):
            task.apply(net, layer_fit)
        layers.append(
            LayerReport(
                layer=task.layer.name,
                place=task.label,
                unknowns=task.fitted,
                samples=sum(equations.samples for equations in sums),
                ridge=layer_fit.ridge,
                error_before=layer_fit.before,
                error_after=layer_fit.after,
                error_held_out=layer_fit.held_out,
                seconds=time.perf_counter() - began,
            )
        )
        del sums  # they take much memory, and the next task has its own
    return tuple(layers)
