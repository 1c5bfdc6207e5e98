"""Distillation without labels: a dense or masked network learns the unpruned one's outputs for some images [1]_.

The second step of a recovery. Compensation solves each layer alone and once; here all weights move together, a few
hundred steps of AdamW, on the images that compensation had. Classifiers learn softened class probabilities; for other
outputs the squared distance is minimized. A range test on held-out images finds the learning rate, and the steps end
when the loss on these makes no progress.

References
----------
.. [1] G. Hinton, O. Vinyals and J. Dean, "Distilling the knowledge in a neural network",
   https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, get_args

import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.context import context
from nni_topo.errors import GradientError
from nni_topo.network.runtime.arguments import BATCHES, MODEL, check_model
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import detached_copy, leaves_models_alone
from nni_topo.network.runtime.inputs import Call
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.precision import PRECISION, Precision, check_precision, not_under_autocast
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.reports import hand_on_report, tell_solved_on
from nni_topo.recovery.batchnorm import batch_norms
from nni_topo.recovery.clock import Clock
from nni_topo.recovery.course import Learned, Training, learn, learning
from nni_topo.recovery.frozen import frozen_layers
from nni_topo.recovery.held_out import BATCH_NORM_IMAGES, HeldOutJudge, HeldOutSplit, held_out_split
from nni_topo.recovery.lesson import (
    Augment,
    Judgement,
    Lesson,
    Objective,
    check_augment,
    is_blendable,
    student_of,
)
from nni_topo.recovery.outputs import Outputs
from nni_topo.recovery.pool import Pool, are_joinable
from nni_topo.recovery.rates import RateSearch, find_rate, median_seconds
from nni_topo.recovery.report import signed_like
from nni_topo.recovery.verdict import ROUNDING, Distillation
from nni_topo.rules import FLAG, FUNCTION, NONE, SEED, number, one_of, taking, whole
from nni_topo.sharing import named_tensors

_STEPS, _PASSES = 600, 10
_TIMED = 16  # samples of the step that is timed before the smaller model exists
_LOWER = 6.0  # divisor of the rate if the weights learned at the rate of the range test are discarded

_POSITIVE = number(0.0, closed="neither")
KNOBS = {
    "objective": one_of(get_args(Objective)),
    "temperature": _POSITIVE,
    "steps": whole(1) | NONE,
    "seconds": _POSITIVE | NONE,
    "batch_size": whole(1),
    "lr": _POSITIVE | NONE,
    "blocks": number(0.0),
    "outputs": taking("output", "inputs") | NONE,
    "blend": FLAG,
    "precision": PRECISION,
    "augment": FUNCTION | NONE,
    "seed": SEED,
}
"""Rules of the knobs that :func:`distill` takes; None: it chooses the value."""
_logger = logging.getLogger(__name__)


def course_length(images: int, batch_size: int) -> int:
    """Return the maximum number of steps of a course on ``images`` images if ``steps`` isn't given."""
    return max(_STEPS, _PASSES * math.ceil(images / batch_size))


def course_on(model: nn.Module, images: Calibration, batch_size: int) -> tuple[int, float]:
    """Return the maximum number of steps of a course on some images, and about how many images a step has."""
    if are_joinable(model, images):
        return course_length(images.samples, batch_size), min(batch_size, images.samples)
    return course_length(len(images), 1), images.samples / len(images)


@public(dense=MODEL, original=MODEL, images=BATCHES, held_out=BATCHES | NONE, **KNOBS)
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
    outputs: Outputs | None = None,
    blocks: float = 0.0,
    augment: Augment | None = None,
    blend: bool = True,
    precision: Precision = "float32",
    seed: int = 0,
    progress: bool | None = None,
) -> Distillation:
    """Distil a model and report the result; parameters and errors as for :func:`distill`."""
    clock = Clock(seconds)
    for model in (original, dense):
        check_model(model)
        check_precision(precision, device_of(model), "distill")
    split = held_out_split(dense, original, images, held_out, seed)
    pool = split.pool
    student = student_of(dense, pool.few(2))
    lesson = Lesson(
        original,
        student,
        split.inputs,
        objective,
        temperature,
        outputs=outputs,
        blocks=blocks,
        precision=precision,
        kinds=context().kinds,
        learned=split.learned,
    )
    if lesson.named.left_out:
        _logger.warning("%s", lesson.named)
    lesson.split(split.judging_numbers, split.learned)
    _check_gradients(lesson, student, split.learned[:2])
    if augment is not None:
        check_augment(original, pool.few(2), augment, seed)

    judge = HeldOutJudge(lesson, split, clock)
    before = judge.all(student)
    is_blended = blend and is_blendable(pool.few(1))
    # Whole batches may be as small as a single sample, which has no statistics.
    is_normed = not pool.are_whole and len(split.learned) >= BATCH_NORM_IMAGES and bool(batch_norms(dense)[0])
    training = Training(
        student=lambda: student_of(dense, pool.few(2)),
        batches=lambda: lesson.batches(split.learned, batch_size, seed, augment, is_blended),
        objective=lesson.objective,
        total=steps or course_length(len(split.learned), 1 if pool.are_whole else batch_size),
        look=judge.look,
        first=before.loss if len(judge.looked_at) == len(split.judging_numbers) else judge.look(student),
        constant=lesson.loss_of_a_constant(judge.looked_at),
        is_normed=is_normed,
        clock=clock,
    )
    clock.judged_at_end = judge.samples_looked_at + split.judges
    if is_normed:  # the result is judged twice, and its batch norms measured on the images
        clock.judged_at_end += len(split.judging_numbers) + len(split.learned)

    trial, learned = RateSearch(training), Learned()
    if before.loss != 0.0 and not before.distance < ROUNDING:
        trial = find_rate(training, judge, lr, progress)
        learned = _learned(trial, judge, before, progress, is_chosen=lr is None)
    done = Distillation(
        model=_with_weights(dense, split, learned),
        **_figures(before, trial, learned),
        objective=lesson.objective_name,
        most_steps=training.total,
        held_out=split.judges,
        solved_on=split.solved_on,
        images=split.images,
        seconds=clock.spent,
        outputs=lesson.named,
        read_as=lesson.read_as,
        frozen=frozen_layers(dense),
    )
    if (not done.is_kept or split.solved_on) and done.has_anything_to_learn:
        _logger.warning("%s", done.verdict)
    return done


def _learned(
    trial: RateSearch, judge: HeldOutJudge, before: Judgement, progress: bool | None, *, is_chosen: bool
) -> Learned:
    """Take the steps at the rate of the trial; if their weights are discarded, once more at a sixth of it.

    ``is_chosen``: whether the trial chose the rate, and not the user.
    """
    if math.isnan(trial.rate):
        return Learned()
    learned = learn(trial.training, judge, trial.rate, before, progress)
    if (
        learned.is_discarded
        and is_chosen
        and trial.training.clock.remaining_seconds > 0.0
        and not learned.is_out_of_time
    ):
        again = learn(trial.training, judge, trial.rate / _LOWER, before, progress)
        if again.steps:
            return replace(again, discarded_lr=trial.rate)
    return learned


def _figures(before: Judgement, trial: RateSearch, learned: Learned) -> dict[str, Any]:
    """Return the fields of a report that a trial and a course give."""
    after, course = learned.after or before, learned.course
    is_second = not math.isnan(learned.discarded_lr)
    return {
        "is_kept": not learned.is_discarded,
        "loss_before": before.loss,
        "loss_after": after.loss,
        "distance_before": before.distance,
        "distance_after": after.distance,
        "agreement_before": before.agreement,
        "agreement_after": after.agreement,
        "lr": trial.rate / _LOWER if is_second else trial.rate,
        "steps": learned.steps,
        "rates": trial.rates,
        "curve": tuple(course.curve) if course else (),
        "is_out_of_time": learned.is_out_of_time,
        "weights_of": 0 if learned.is_discarded else learned.weights_of,
        "gains_nothing": course is not None and course.gains_nothing,
        "discarded_lr": learned.discarded_lr,
    }


def _with_weights(dense: nn.Module, split: HeldOutSplit, learned: Learned) -> nn.Module:
    """Return a copy of the network, with the learned weights unless they are discarded."""
    distilled: nn.Module = detached_copy(dense)
    if learned.student is not None and not learned.is_discarded:
        learned_values = named_tensors(learned.student)
        with torch.no_grad():
            for name, tensor in named_tensors(distilled).items():
                tensor.copy_(learned_values[name])
        hand_on_report(dense, distilled, "distilled (nni_topo.distill)")
        tell_solved_on(distilled, split.digests_learned)
    return distilled


@signed_like(distillation)
def distill(*args: Any, **knobs: Any) -> nn.Module:
    """Let a pruned network learn, without labels, the outputs of the unpruned one.

    Parameters
    ----------
    dense : torch.nn.Module
        The network that :func:`nni_topo.to_dense` or :func:`nni_topo.masked_model` returned, best after
        :func:`nni_topo.compensate`. It isn't changed. Parameters that don't require gradients aren't changed, nor are
        the statistics of batch norms with such parameters; if no parameter requires gradients, all learn, and the
        result is frozen as ``dense`` is.
    original : torch.nn.Module
        The trained network before pruning, with the same inputs and outputs. It isn't changed.
    images : iterable or nni.compression.utils.Evaluator
        Batches of inputs, or of ``(inputs, ...)``; labels aren't used. If it is an evaluator, the batches it evaluates
        on. 1,000 images are enough for small networks. Samples of several batches form the batches of the steps; where
        that isn't possible, because inputs differ in shape or a model runs on whole batches only, a batch is a step.
    held_out : iterable or nni.compression.utils.Evaluator, optional
        Batches like ``images``, to judge by. By default every eighth of ``images``, or every eighth group of a
        :class:`nni_topo.Calibration` with groups, or every eighth whole batch: the samples that
        :func:`nni_topo.compensate` leaves out. Samples on which ``dense`` was solved in this process don't judge if
        there are others; if not, a warning says so.
    objective : {"auto", "kl", "binary", "squares", "cosine"}, default="auto"
        ``"kl"``, for scores or probabilities of classes: Kullback-Leibler divergence from the unpruned network's
        softened probabilities, times the squared temperature. Steps minimize it together with ``"squares"``, which
        keeps the scores of unlikely classes from drifting; both have the same value for a network with constant
        outputs. Only the divergence judges.
        ``"binary"``, for scores or probabilities of decisions such as tags: the same for each of them, with
        probabilities of yes and no.
        ``"squares"``: squared distance of all floating outputs, each as a share of its variance over the images.
        ``"cosine"``, for one vector a sample: one minus the cosine with the unpruned network's vector, and five times
        the squared difference of the cosines between all samples of a batch [3]_. ``"auto"`` chooses for each output:
        by the operation that made it (a softmax and its axis, a sigmoid, a normalization), or else by its values, see
        ``docs/recovery.md``. A single tensor (samples, outputs) counts as scores of classes unless its values speak
        against that. The report says how outputs are read.
    temperature : float, default=2.0
        Divisor of the logits for ``"kl"``, above 0.
    steps : int, optional
        Maximum number of gradient steps, at least 1, with those that find the learning rate; by default the larger of
        600 and ten passes over the images.
    seconds : float, optional
        Limit of wall time, above 0, for the whole call. No step begins that wouldn't end in time; comparing both
        networks before the first step isn't limited. If the limit ends the steps, the result depends on the machine's
        speed. Before the first step a message says how long they take at most; it is a warning if that is more than
        ten minutes without a limit.
    batch_size : int, default=64
        Images per step, at least 1.
    lr : float, optional
        Highest learning rate of AdamW, above 0. By default a range test finds it: the first of 6e-3, 2e-3, 6e-4,
        2e-4 and 6e-5 that doesn't break the network in a few steps. It takes at most a quarter of the steps, or of the
        time; if that isn't enough for two rates, 2e-4 is taken, or 2e-3 where batch norms learn from the batches. If
        the weights that are learned at this rate are discarded, the steps are taken once more at a sixth of it. If
        there is no such rate, the result is a copy of ``dense``.
    outputs : callable, optional
        Returns the part of a model's output to compare, or a function of it, e.g. a pooled embedding. It takes the
        model's output, and the inputs as ``augment`` does, and returns a tensor, or several in a tuple or dict, with an
        entry for each sample.
    blocks : float, default=0.0
        Weight, at least 0, of a second loss: the squared distance of each block's output, over its variance in the
        batch, as the mean over blocks. Blocks are the entries of an ``nn.ModuleList`` or ``nn.Sequential`` with at
        least two layers that have weights, if their output has the same shape in both networks. Padding doesn't count.
        ``original`` then runs at every step.
    augment : callable, optional
        Takes inputs as a batch holds them (a tensor; for several arguments their tuple or dict) and returns the same
        number of others. It draws from PyTorch's generators, as torchvision's transforms do. Up to eight views of the
        images are made, the first one unchanged.
    blend : bool, default=True
        In all views but the first, interpolate about half of the images with others, by a share drawn from [0, 1) [2]_;
        ``original`` is run on the results. Only for models that take one floating tensor.
    precision : {"float32", "bfloat16"}, default="float32"
        ``"bfloat16"`` computes both networks under :class:`torch.autocast` in gradient steps. Parameters, losses and
        judgements stay in the precision of ``dense``, at least single; autocast leaves double precision, and
        ``original`` in half precision, as they are. On a CPU it is for linear layers: convolutions and attention stay
        in single precision. It saves time on processors with bfloat16 instructions, for transformers.
    seed : int, default=0
        Seed of the order of the images, and of PyTorch's generators for ``augment``.
    progress : bool or None, default=None
        Show on standard error how far it is: in a terminal a bar, elsewhere a line every half minute. None: after
        five seconds.

    Returns
    -------
    torch.nn.Module
        A new model whose modules have the modes of ``dense``: with the learned weights if their loss on the held-out
        images is smaller and their distance from the outputs of ``original`` at most twice the distance of ``dense``.
        Else with the best weights measured during the steps, if they meet the same conditions; else an equal copy.
        Masked weights stay zero.

    Raises
    ------
    ConfigError
        If a knob can't be used, a model runs on whole batches only and there is one, the two models' outputs differ in
        kind or shape, or nothing can be learned.
    GradientError
        If the outputs have no gradients, for example because ``forward`` runs under :class:`torch.no_grad`, or changes
        a tensor that a gradient needs in place. It is also a ConfigError.
    DataError
        If there are fewer than two images, inputs are NaN or infinite, or a batch doesn't fit a model.
    SpeedupError
        If a model is still wrapped.

    See Also
    --------
    distillation : The same with a report.
    nni_topo.compensate : The step before, without gradients.

    Notes
    -----
    docs/recovery.md says how the rate moves, when steps end early and which statistics batch norms get. Dropout is off.
    Weight decay is 0. Networks in half precision learn in single precision.

    Cost: a step runs ``dense`` forward and back; ``original`` runs once over the images, or over each of their views,
    and with ``blocks`` once more at every step. Its outputs are kept if those for all images take at most a quarter
    of the free memory; larger ones, such as maps of segmentation, are computed again at every step.

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


def _check_gradients(lesson: Lesson, student: nn.Module, few: Tensor) -> None:
    """Raise GradientError unless a network's outputs for a few images have gradients.

    ConfigError if they have gradients only in single precision.
    """
    precision, lesson.precision = lesson.precision, "float32"
    call, targets = next(lesson.batches(few, len(few), 0, None, False))
    with learning(student):
        loss = lesson.objective(student, call, targets)
        if not loss.requires_grad:
            raise GradientError(
                "a network that is distilled must compute gradients, got outputs without any: its forward runs under "
                "torch.no_grad() or torch.inference_mode(), or detaches them (dense)"
            )
        try:
            loss.backward()
        except RuntimeError as error:
            first_line = str(error).splitlines()[0]
            raise GradientError(
                f"a network that is distilled must compute gradients, got: {first_line} (dense)"
            ) from error
        lesson.precision = precision
        if precision != "float32":
            try:
                lesson.answer(call, precision)
                lesson.objective(student, call, targets).backward()
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
                raise not_under_autocast(precision, error, "distill") from error
    student.zero_grad(set_to_none=True)


@leaves_models_alone
def check_can_learn(
    model: nn.Module,
    inputs: Call | list[Call],
    *,
    objective: Objective = "auto",
    temperature: float = 2.0,
    outputs: Outputs | None = None,
    blocks: float = 0.0,
    blend: bool = True,
    precision: Precision = "float32",
) -> float:
    """Raise errors of `distillation` for a model's outputs on a batch, or on whole ones, before the work.

    ConfigError for outputs that can't be compared, GradientError for outputs without gradients. Return the seconds per
    sample of a gradient step.
    """
    check_precision(precision, device_of(model), "distill")
    pool = Pool(inputs)
    student = student_of(model, pool.few(2))
    lesson = Lesson(model, student, inputs, objective, temperature, outputs=outputs, blocks=blocks, precision=precision)
    units = torch.arange(pool.count)
    _check_gradients(lesson, student, units[:2])
    # On few samples, because the model may need more memory for a whole batch than the smaller one will.
    few = units[:1] if pool.are_whole else units[:_TIMED]
    batch, targets = next(lesson.batches(few, len(few), 0, None, False))
    with learning(student):
        seconds = median_seconds(lambda: lesson.objective(student, batch, targets).backward(), student)
    return seconds / pool.samples(few)
