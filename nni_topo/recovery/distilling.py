"""Distillation without labels: a dense or masked network learns the unpruned one's outputs for some images [1]_.

The second step of a recovery. Compensation solves each layer alone and once; here all weights move together, a few
hundred steps of AdamW, on the images that compensation had. Classifiers learn softened class probabilities, whatever
else a network gives is met in squares.

References
----------
.. [1] G. Hinton, O. Vinyals and J. Dean, "Distilling the knowledge in a neural network",
   https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.disk import check_output_file, path_of
from nni_topo.errors import (
    ANYTHING,
    FLAG,
    FUNCTION,
    NONE,
    SEED,
    ConfigError,
    DataError,
    check_knobs,
    checked,
    number,
    unknown_name,
    whole,
)
from nni_topo.network.runtime import (
    BATCHES,
    HELD_OUT,
    MODEL,
    Call,
    batches_of,
    calls,
    check_fits,
    check_model,
    detached_copy,
    in_smaller_batches,
    leaves_models_alone,
)
from nni_topo.recovery.batchnorm import recalibrate_batch_norm
from nni_topo.recovery.course import Course
from nni_topo.recovery.lesson import (
    MOST_DISTANCE,
    Augment,
    Lesson,
    Objective,
    Outputs,
    is_better,
    is_blendable,
    joined,
    student_copy,
)
from nni_topo.recovery.report import signed_like
from nni_topo.sharing import named_tensors

OBJECTIVES = ("auto", "kl", "squares", "cosine")

_STEPS, _PASSES = 600, 10
_BATCH_NORM_IMAGES = 256
_RATES = (6e-3, 2e-3, 6e-4)

_POSITIVE = number(0.0, closed="neither")
KNOBS = {
    "temperature": _POSITIVE,
    "steps": whole(1) | NONE,
    "seconds": _POSITIVE | NONE,
    "batch_size": whole(1),
    "lr": _POSITIVE | NONE,
    "warmup": number(0.0, 1.0, "left"),
    "blocks": number(0.0),
    "outputs": FUNCTION | NONE,
    "blend": FLAG,
    "state_seconds": number(0.0),
}
"""Rules of the numbers that :func:`distill` takes; None stands for its own choice."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """Whether learned weights are kept, and the held-out figures that say so; ``str`` is a sentence.

    They are kept if the loss falls and the distance is at most twice what it was before.
    """

    objective: str  # what the loss is: "kl" or "squares"
    is_kept: bool
    loss_before: float
    loss_after: float
    distance_before: float  # mean squared distance of the outputs over their variance
    distance_after: float
    agreement_before: float  # share of largest logits that are the same, in [0, 1]; NaN for "squares"
    agreement_after: float

    def __str__(self) -> str:
        text = f"distillation is {'kept' if self.is_kept else 'discarded'}: on held-out images the loss "
        text += f"({self.objective}) is {self.loss_after:.3g}, {self.loss_before:.3g} without it; the distance "
        text += f"{self.distance_after:.3g}, {self.distance_before:.3g} without it"
        if not math.isnan(self.agreement_before):
            text += f"; the agreement {self.agreement_after:.3g}, {self.agreement_before:.3g} without it"
        if self.is_kept and self.distance_after > self.distance_before:
            text += f". The loss decides unless the distance grows to more than {MOST_DISTANCE:g} times its value"
        elif not self.is_kept and self.loss_after < self.loss_before:
            text += f". The loss falls, but the distance grows to more than {MOST_DISTANCE:g} times its value"
        if self.objective == "kl" and self.distance_after > self.distance_before:
            text += "; if the outputs aren't class scores, set distill's objective='squares', which is the distance"
        return text


@dataclass(frozen=True)
class Distillation:
    """A distilled model and how it came about.

    Attributes
    ----------
    model : torch.nn.Module
        As :func:`distill` returns it.
    objective : {"kl", "squares"}
        What was made small.
    loss_before, loss_after : float
        On the images held out, in evaluation mode: of the model that was given, and of what was learned.
    agreement_before, agreement_after : float
        Share of them, in [0, 1], whose largest logit is the unpruned network's; NaN for ``"squares"``.
    is_kept : bool
        Whether ``model`` has the learned weights: their loss there is smaller, and their distance at most twice that of
        the model that was given.
    images : int
        All images, those held out included.
    lr : float
        Learning rate at first.
    steps : int
        Gradient steps at that rate.
    seconds : float
        Wall time.
    distance_before, distance_after : float
        Mean squared distance of their outputs from the unpruned network's, over the variance of these.
    """

    model: nn.Module
    objective: str
    loss_before: float
    loss_after: float
    agreement_before: float
    agreement_after: float
    is_kept: bool
    images: int
    lr: float
    steps: int
    seconds: float
    distance_before: float
    distance_after: float

    @property
    def verdict(self) -> Verdict:
        """The figures by which the learned weights were kept or discarded."""
        return Verdict(
            objective=self.objective,
            is_kept=self.is_kept,
            loss_before=self.loss_before,
            loss_after=self.loss_after,
            distance_before=self.distance_before,
            distance_after=self.distance_after,
            agreement_before=self.agreement_before,
            agreement_after=self.agreement_after,
        )


@checked(dense=MODEL, original=MODEL, images=BATCHES, held_out=BATCHES | NONE, state=ANYTHING, **KNOBS)
@leaves_models_alone
@in_smaller_batches
def distillation(
    dense: nn.Module,
    original: nn.Module,
    images: Iterable[Any] | Evaluator,
    *,
    held_out: Iterable[Any] | Evaluator | None = None,
    objective: Objective = "auto",
    temperature: float = 2.0,
    steps: int | None = None,
    seconds: float | None = None,
    batch_size: int = 64,
    lr: float | None = None,
    warmup: float = 0.0,
    outputs: Outputs | None = None,
    blocks: float = 0.0,
    augment: Augment | None = None,
    blend: bool = True,
    state: str | Path | None = None,
    state_seconds: float = 30.0,
    seed: int = 0,
    progress: bool | None = None,
) -> Distillation:
    """Distil a model and report what was done; parameters and errors are those of :func:`distill`."""
    began = time.perf_counter()
    if objective not in OBJECTIVES:
        raise unknown_name("objective", str(objective), OBJECTIVES)
    numbers = {"temperature": temperature, "steps": steps, "seconds": seconds, "batch_size": batch_size, "lr": lr}
    others = {"warmup": warmup, "blocks": blocks, "outputs": outputs, "blend": blend, "state_seconds": state_seconds}
    check_knobs("distill", numbers | others, KNOBS)
    SEED.check("seed", seed, "distill")
    if state is not None:
        check_output_file(path_of(state, "state"))
    for model in (original, dense):
        check_model(model)
    both = {"images": images, "held_out": held_out}
    given = [batches_of(each, original, knob) for knob, each in both.items() if each is not None]
    for each in given:
        for model in (original, dense):
            check_fits(model, next(calls(model, each)), each.name)
    counts = [each.samples for each in given]
    pool = joined([call for each in given for call in calls(dense, each)])
    student = _student(dense, pool)
    lesson = Lesson(original, student, pool, objective, temperature, outputs=outputs, blocks=blocks)
    order = torch.randperm(counts[0], generator=torch.Generator().manual_seed(seed))
    if given[0].groups is None:
        is_held = torch.arange(len(order)) % HELD_OUT == 0
    else:
        is_held = given[0].held_out(HELD_OUT)[order]
    held, learned = order[is_held], order[~is_held]
    if held_out is not None:
        held, learned = counts[0] + torch.arange(counts[1]), order
    if not len(learned):
        raise DataError(f"distillation must have at least two images, one to judge by, got {len(order)} (images)")
    before = lesson.judge(student, held)
    total = steps or max(_STEPS, _PASSES * math.ceil(len(learned) / batch_size))
    is_normed = len(learned) >= _BATCH_NORM_IMAGES

    is_blended = blend and is_blendable(pool)
    knobs = {"steps": total, "seconds": seconds, "batch_size": batch_size, "lr": lr, "blend": blend}
    knobs |= {"warmup": warmup, "blocks": blocks}
    kind = {**knobs, "temperature": temperature, "objective": lesson.kind, "seed": seed, "images": sum(counts)}
    rates = [lr] if lr is not None else _RATES
    seconds_left = seconds  # for the courses to come
    for rate in rates:
        course = Course(
            _student(dense, pool),
            is_normed=is_normed,
            rate=rate,
            kind=kind,
            seconds=seconds_left,
            warmup=warmup,
            path=state,
            every=state_seconds,
        )
        if course.rate < rate:  # the file is that of a later course
            continue
        batches = lesson.batches(learned, batch_size, seed, augment, is_blended)
        course.run(
            lesson,
            batches,
            total,
            progress,
            grows=lambda net, times: not lesson.judge(net, held).loss <= times * before.loss,
        )
        student = course.student
        if course.ended_early:
            _logger.info(
                "learning rate %g is given up after %d of %d steps: the loss on held-out images has grown",
                rate,
                course.done,
                total,
            )
        if is_normed:  # views and blends differ from the images that will come
            student = recalibrate_batch_norm(student, lesson.plain(student, learned))
        after = lesson.judge(student, held)
        is_kept = is_better(after, before)
        if course.seconds is not None:
            seconds_left = course.seconds - course.spent
        if is_kept or rate == rates[-1] or (seconds_left is not None and seconds_left <= 0.0):
            break
        course.forget()
    result = detached_copy(dense)
    if is_kept:
        _take_values(result, student)
    done = Distillation(
        model=result,
        objective=lesson.kind,
        loss_before=before.loss,
        loss_after=after.loss,
        agreement_before=before.agreement,
        agreement_after=after.agreement,
        is_kept=is_kept,
        images=sum(counts),
        lr=course.rate,
        steps=course.done,
        seconds=time.perf_counter() - began,
        distance_before=before.distance,
        distance_after=after.distance,
    )
    if not is_kept:
        _logger.warning("%s", done.verdict)
    return done


@signed_like(distillation)
def distill(*args: Any, **knobs: Any) -> nn.Module:
    """Let a pruned network learn, without labels, the outputs of the unpruned one.

    Parameters
    ----------
    dense : torch.nn.Module
        The network that :func:`nni_topo.to_dense` or :func:`nni_topo.masked_model` returned, best after
        :func:`nni_topo.compensate`. It isn't changed.
    original : torch.nn.Module
        The trained network before pruning, with the same inputs and outputs. It isn't changed.
    images : iterable or nni.compression.utils.Evaluator
        Batches of inputs, or of ``(inputs, ...)``; labels aren't looked at. Of an evaluator, what it
        evaluates on. Inputs of all batches have one shape, but for the number of samples. 1,000 are enough for
        small networks.
    held_out : iterable or nni.compression.utils.Evaluator, optional
        Batches like those of ``images``, to judge by. By default every eighth of ``images``, or every eighth group of a
        :class:`nni_topo.Calibration` with groups, from which nothing is learned then. Those that
        :func:`nni_topo.compensate` had count for ``dense`` more than others would: what it never saw judges fairly.
    objective : {"auto", "kl", "squares", "cosine"}, default="auto"
        ``"kl"``: Kullback-Leibler divergence from the unpruned network's softened probabilities along the last axis.
        ``"squares"``: squared distance of all floating outputs, each as a share of its variance over the images.
        ``"cosine"``, for one vector a sample: one minus the cosine with the unpruned network's vector, and five times
        the squared difference of the cosines between all samples of a batch [3]_. ``"auto"``: ``"cosine"`` where
        ``outputs`` gives vectors of length one, ``"kl"`` for outputs that are called ``logits`` and for a single tensor
        (images, classes), else ``"squares"``.
    temperature : float, default=2.0
        Logits are divided by it, above 0; for ``"kl"``.
    steps : int, optional
        Gradient steps, at least 1; by default 600, or ten passes over the images where that is more.
    seconds : float, optional
        Budget of wall time, above 0, for all learning rates that are tried: steps end there, and the learning rate
        falls such that it ends with them. With a budget that binds, the result depends on the machine's speed.
    batch_size : int, default=64
        Images a step, at least 1.
    lr : float, optional
        Learning rate of AdamW, above 0, at first; it falls along half a cosine. By default 6e-3; a result that
        would be discarded is learned once more at 2e-3, and then at 6e-4. A rate is given up early if the loss on the
        held-out images has grown tenfold after a tenth of the way, fourfold after a fifth or twofold at half.
    warmup : float, default=0.0
        Share of the steps, in [0, 1), in which the rate rises from zero to ``lr`` before it falls.
    outputs : callable, optional
        What counts of a model's output, where that is only a part or a function of it, e.g. a pooled embedding. It gets
        what the model returned, and the inputs as ``augment`` does, and returns a tensor, or several in a tuple or
        dict, with an entry for each sample.
    blocks : float, default=0.0
        Weight, at least 0, of a second loss: the squared distance of what each block puts out, over its variance in the
        batch, as the mean over all blocks. A block is an entry of an ``nn.ModuleList`` or ``nn.Sequential`` with at
        least two layers that have weights; those count whose output has the same shape in both networks. Padding
        doesn't. ``original`` runs at every step then.
    augment : callable, optional
        Gets inputs as a batch holds them (a tensor; for several arguments their tuple or dict) and returns others,
        equally many. It draws from PyTorch's generators, as torchvision's transforms do. Up to eight views of the
        images are made, the first of them as they are.
    blend : bool, default=True
        In all views but the first, move half of the images towards other ones, by a share drawn from [0, 1) [2]_;
        ``original`` answers for what comes out. For models that take one floating tensor; others' inputs stay.
    state : str or Path, optional
        File that gets the state every ``state_seconds`` and at the end. If it is there, learning goes on from it, to
        the same result on one machine.
    state_seconds : float, default=30
        Seconds of learning from one state to the next, at least 0, which means after every step.
    seed : int, default=0
        For the order of the images and what is held out; and of PyTorch's generators for ``augment``.
    progress : bool or None, default=None
        Show on standard error how far it is: in a terminal a bar, elsewhere a line every half minute. None: after
        five seconds.

    Returns
    -------
    torch.nn.Module
        A new model in the mode of ``dense``, module by module: with the learned weights if their loss on the images
        held out is smaller and their distance from the outputs of ``original`` at most twice that of ``dense``, else an
        equal copy. Masked weights stay zero.

    Raises
    ------
    ConfigError
        If a knob can't be used, the two models' outputs differ in kind or shape, nothing can be learned, or ``state``
        is that of another distillation.
    DataError
        If there are fewer than two images, inputs are NaN or infinite, a batch doesn't fit a model, or ``state`` isn't
        a state of the model.
    SpeedupError
        If a model is still wrapped.

    See Also
    --------
    distillation : The same with a report.
    nni_topo.compensate : The step before, without gradients.

    Notes
    -----
    With at least 256 images to learn from, batch norms take their statistics from the batches, and in the end from all
    of these images as they are. Dropout is off. Weight
    decay is 0. Half precision learns in single precision. The loss of ``"kl"`` is multiplied by
    the squared temperature.

    Cost: a step runs ``dense`` forward and back; ``original`` runs once over the images, or over each of their views,
    and with ``blocks`` once more at every step.

    References
    ----------
    .. [1] G. Hinton, O. Vinyals and J. Dean, "Distilling the knowledge in a neural network",
       https://arxiv.org/abs/1503.02531
    .. [2] L. Beyer et al., "Knowledge distillation: a good teacher is patient and consistent",
       https://arxiv.org/abs/2106.05237
    .. [3] F. Tung and G. Mori, "Similarity-preserving knowledge distillation", https://arxiv.org/abs/1907.09682

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> original, small = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    >>> images = [torch.randn(64, 8)]
    >>> learned = distill(small, original, images, lr=0.05, steps=200)
    >>> same = learned(images[0]).argmax(1) == original(images[0]).argmax(1)
    >>> float(same.float().mean()) > 0.9
    True
    """
    return distillation(*args, **knobs).model


def _student(dense: nn.Module, pool: Call) -> nn.Module:
    """Return a copy that can learn."""
    if not any(parameter.requires_grad for parameter in dense.parameters()):
        raise ConfigError("a model must have parameters that require gradients, got none (dense)")
    return student_copy(dense, pool)


def _take_values(model: nn.Module, other: nn.Module) -> None:
    """Give a model another's parameters and buffers, in its own types."""
    values = named_tensors(other)
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            tensor.copy_(values[name])
