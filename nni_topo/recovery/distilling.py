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

import itertools
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.context import advice, context
from nni_topo.errors import ConfigError, DataError, GradientError
from nni_topo.network.runtime.arguments import BATCHES, MODEL, check_model
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import detached_copy, leaves_models_alone
from nni_topo.network.runtime.fits import check_samples_first, first_call, with_whole_batches
from nni_topo.network.runtime.hooks import batches_of
from nni_topo.network.runtime.inputs import Call, calls
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.precision import PRECISION, Precision, check_precision, not_under_autocast
from nni_topo.network.runtime.progress import LONG, duration
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.reports import hand_on_report, solved_on, tell_solved_on
from nni_topo.recovery.batchnorm import batch_norms, recalibrate_batch_norm
from nni_topo.recovery.course import (
    LOOKS,
    MOST_LOST,
    ONE_RATE,
    RATES,
    Clock,
    Course,
    Look,
    RateTrial,
    Training,
    learning,
    most_tried_steps,
    range_test,
    seconds_of_a_step,
    timed,
    try_rates,
)
from nni_topo.recovery.frozen import frozen_layers, told_of_frozen
from nni_topo.recovery.lesson import (
    MOST_DISTANCE,
    Augment,
    Judgement,
    Lesson,
    Objective,
    check_augment,
    is_better,
    is_blendable,
    student_of,
)
from nni_topo.recovery.outputs import ComparedOutputs, Outputs
from nni_topo.recovery.pool import Pool, are_joinable, inputs_to_compare, without_distillation
from nni_topo.recovery.report import signed_like
from nni_topo.rules import FLAG, FUNCTION, NONE, SEED, number, one_of, taking, whole
from nni_topo.sharing import named_tensors

_STEPS, _PASSES = 600, 10
_BATCH_NORM_IMAGES = 256
_FEW = 25  # with fewer held-out images, a kept result was often worse on other images
_TIMED = 16  # samples of the step that is timed before the smaller model exists
ROUNDING = 1e-11
"""Distance below which outputs differ by rounding, so that there is nothing to learn."""
_LOWER = 6.0  # divisor of the rate if the weights learned at the rate of the range test are discarded
_LOOKED_AT = 256  # most held-out images on which the loss is measured during a course; all judge the result

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


@dataclass(frozen=True, repr=False)
class Verdict:
    """Whether learned weights are kept, and the held-out figures that decide; see `Distillation`."""

    objective: str
    is_kept: bool
    loss_before: float
    loss_after: float
    distance_before: float
    distance_after: float
    agreement_before: float
    agreement_after: float
    lr: float = math.nan
    steps: int = 0
    most_steps: int = 0
    rates: tuple[RateTrial, ...] = ()
    curve: tuple[Look, ...] = ()
    held_out: int = 0
    solved_on: int = 0
    is_out_of_time: bool = False
    weights_of: int = 0
    gains_nothing: bool = False
    discarded_lr: float = math.nan

    def __repr__(self) -> str:
        text = f"distillation is {'kept' if self.is_kept else 'discarded'}: on held-out samples the loss "
        text += f"({self.objective}) is {self.loss_after:.3g}, {self.loss_before:.3g} without it; the distance "
        text += f"{self.distance_after:.3g}, {self.distance_before:.3g} without it"
        if not math.isnan(self.agreement_before):
            text += f"; the agreement {self.agreement_after:.3g}, {self.agreement_before:.3g} without it"
        if not self.is_kept and self.loss_after < self.loss_before:
            text += f". The loss falls, but the distance grows to more than {MOST_DISTANCE:g} times its value"
        # How many steps were taken, and at which rate.
        if not self.has_anything_to_learn:
            return f"{text}. No step was taken: there is nothing to learn"
        if not math.isnan(self.lr):
            searched = sum(trial.steps for trial in self.rates)
            text += f". It took {self.steps} of at most {self.most_steps - searched} steps at a learning rate of up to "
            text += f"{self.lr:g}{f', which {searched} steps before these found' if searched else ''}"
            text += ", until the time limit" if self.is_out_of_time else ""
            text += ", and ended early because the loss hadn't fallen" if self.gains_nothing else ""
            if not math.isnan(self.discarded_lr):
                text += f", after what was learned at {self.discarded_lr:g} had been discarded"
            if self.is_kept and self.weights_of < self.steps:
                text += f"; the weights are those after {self.weights_of} steps"
                text += ", because those at the end are no better than without distillation"
        elif self.rates:
            tried = ", ".join(dict.fromkeys(f"{each.lr:g}" for each in self.rates))
            text += f". No step was taken: a few at each of the learning rates {tried} make the loss too large"
        else:
            text += f". No step was taken: {_seconds()} allows too few"
        if self.held_out < _FEW:
            text += f". {self.held_out} held-out samples are few for this decision: pass more"
        if self.solved_on:
            text += f". The network's weights were solved on {self.solved_on} of the {self.held_out} held-out samples, "
            text += "where it looks better than it is, and the learned weights look worse: pass others, held_out="
        return text

    @property
    def has_anything_to_learn(self) -> bool:
        """Whether the network without distillation has a loss."""
        return not (math.isnan(self.lr) and (self.loss_before == 0.0 or self.distance_before < ROUNDING))


@dataclass(frozen=True, kw_only=True, repr=False)
class Distillation(Verdict):
    """A distilled model with the figures of its distillation; its ``repr`` is a few sentences.

    Losses, agreements and distances are measured on the held-out images in evaluation mode, for the given model and for
    the learned weights.

    Attributes
    ----------
    model : torch.nn.Module
        The model that :func:`distill` returns.
    objective : str
        The loss that was minimized: "kl", "binary", "squares" or "cosine"; if outputs differ in kind, several of these,
        with "and" between them.
    is_kept : bool
        Whether ``model`` has the learned weights.
    loss_before, loss_after : float
        The loss.
    distance_before, distance_after : float
        Mean squared distance from the unpruned network's outputs, over their variance.
    agreement_before, agreement_after : float
        Share, in [0, 1], of the unpruned network's classes or decisions; NaN if outputs have none.
    images, held_out : int
        Number of all images, and of held-out images.
    solved_on : int
        Number of the held-out images on which weights of ``dense`` had been solved before.
    lr : float
        Highest learning rate; NaN if no step was taken.
    steps, most_steps : int
        Gradient steps at that rate, and the largest number of steps in all, with those of the range test.
    seconds : float
        Wall time.
    rates : tuple of RateTrial
        The range test, the highest rate first: the held-out loss after a few steps at each. Empty if ``lr`` was given,
        or the steps were too few. Where batch norms first took their statistics from the batches and then kept their
        own, it has rates twice.
    curve : tuple of Look
        Step, learning rate and held-out loss along the course.
    is_out_of_time : bool
        Whether ``seconds`` ended the steps.
    weights_of : int
        The step whose weights are kept, the last one or an earlier one; 0 if they are discarded.
    gains_nothing : bool
        Whether the steps ended early because the loss didn't fall.
    discarded_lr : float
        The rate of the range test, if the weights that it led to were discarded, and ``lr`` is a sixth of it; else NaN.
    outputs : ComparedOutputs or None
        Names of the model's outputs that were compared, and of the others.
    read_as : str
        What the compared outputs hold, in words.
    frozen : tuple of str
        Names of the layers with parameters that don't require gradients and weren't changed.
    """

    model: nn.Module
    images: int
    seconds: float
    outputs: ComparedOutputs | None = None
    read_as: str = ""
    frozen: tuple[str, ...] = ()

    def __repr__(self) -> str:
        lines = [super().__repr__()]
        if self.read_as:
            lines.append(self.read_as)
        if self.outputs is not None and self.outputs.left_out:
            lines.append(str(self.outputs))
        if self.frozen:
            lines.append(told_of_frozen(self.frozen))
        return "\n".join(lines)

    @property
    def verdict(self) -> Verdict:
        """The figures by which the learned weights were kept or discarded."""
        return Verdict(**{each.name: getattr(self, each.name) for each in fields(Verdict)})


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
    split = _held_out_split(dense, original, images, held_out, seed)
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
    lesson.split(split.held, split.learned)
    _check_gradients(lesson, student, split.learned[:2])
    if augment is not None:
        check_augment(original, pool.few(2), augment, seed)

    judge = _Judge(lesson, split, clock)
    before = judge.all(student)
    is_blended = blend and is_blendable(pool.few(1))
    most_steps = steps or course_length(len(split.learned), 1 if pool.are_whole else batch_size)
    # Whole batches may be as small as a single sample, which has no statistics.
    is_normed = not pool.are_whole and len(split.learned) >= _BATCH_NORM_IMAGES and bool(batch_norms(dense)[0])
    training = Training(
        student=lambda: student_of(dense, pool.few(2)),
        batches=lambda: lesson.batches(split.learned, batch_size, seed, augment, is_blended),
        objective=lesson.objective,
        total=most_steps,
        look=judge.look,
        first=before.loss if len(judge.looked_at) == len(split.held) else judge.look(student),
        constant=lesson.loss_of_a_constant(judge.looked_at),
        is_normed=is_normed,
        clock=clock,
    )
    clock.judged_at_end = judge.samples_looked_at + pool.samples(split.held)
    if is_normed:  # the result is judged twice, and its batch norms measured on the images
        clock.judged_at_end += len(split.held) + len(split.learned)

    trial = _Trial(training)
    if before.loss != 0.0 and not before.distance < ROUNDING:
        trial = _tried(training, judge, lr, progress)
    learned = _Learned()
    if not math.isnan(trial.rate):
        learned = _course(trial.training, judge, trial.rate, before, progress)
        if learned.is_discarded and lr is None and clock.left > 0.0 and not learned.is_out_of_time:
            again = _course(trial.training, judge, trial.rate / _LOWER, before, progress)
            if again.steps:
                learned = replace(again, discarded=learned)

    result = detached_copy(dense)
    if learned.student is not None and not learned.is_discarded:
        learned_values = named_tensors(learned.student)
        with torch.no_grad():
            for name, tensor in named_tensors(result).items():
                tensor.copy_(learned_values[name])
        hand_on_report(dense, result, "distilled (nni_topo.distill)")
        tell_solved_on(result, split.digests_learned)
    after, course = learned.after or before, learned.course
    is_kept = not learned.is_discarded
    done = Distillation(
        model=result,
        objective=lesson.objective_name,
        is_kept=is_kept,
        loss_before=before.loss,
        loss_after=after.loss,
        distance_before=before.distance,
        distance_after=after.distance,
        agreement_before=before.agreement,
        agreement_after=after.agreement,
        lr=trial.rate if learned.discarded is None else trial.rate / _LOWER,
        steps=learned.steps,
        most_steps=most_steps,
        rates=trial.rates,
        curve=tuple(course.curve) if course else (),
        held_out=pool.samples(split.held),
        solved_on=split.solved_on,
        is_out_of_time=learned.is_out_of_time,
        weights_of=learned.weights_of if is_kept else 0,
        gains_nothing=course is not None and course.gains_nothing,
        discarded_lr=math.nan if learned.discarded is None else trial.rate,
        images=split.images,
        seconds=clock.spent,
        outputs=lesson.named,
        read_as=lesson.read_as,
        frozen=frozen_layers(dense),
    )
    if (not is_kept or split.solved_on) and done.has_anything_to_learn:
        _logger.warning("%s", done.verdict)
    return done


@dataclass(frozen=True)
class _Split:
    """The samples of a distillation: those that judge, and those from which the network learns."""

    inputs: Call | list[Call]
    pool: Pool  # of these
    held: Tensor  # numbers of those that judge, in the pool
    learned: Tensor  # numbers of the others
    images: int  # number of all samples
    solved_on: int  # number of those that judge on which weights were solved
    digests_learned: tuple[bytes, ...]  # of the others


def _held_out_split(dense: nn.Module, original: nn.Module, images: Any, held_out: Any, seed: int) -> _Split:
    """Read the samples and split them; DataError or ConfigError if they are too few or don't fit a model."""
    both = {"images": images, "held_out": held_out}
    given = [batches_of(each, original, knob) for knob, each in both.items() if each is not None]
    for each in given:
        for model in (original, dense):
            first_call(model, each)
        check_samples_first(original, each)
    for model in (original, dense):
        given = [with_whole_batches(model, each) for each in given]
    # Which samples judge, of those that are held out or else of all.
    is_held = torch.ones(given[-1].samples, dtype=torch.bool)
    if held_out is None:
        is_held = samples_to_judge_on(dense, given[0])
    inputs, why_whole = inputs_to_compare({"original": original, "dense": dense}, given)
    counts = [each.samples for each in given]
    if isinstance(inputs, list):
        if held_out is None and not given[0].withheld.any():  # parts of so few samples were not tried
            given[0] = given[0].as_whole_batches(why_whole)
            is_held = samples_to_judge_on(dense, given[0])
        parts = given if held_out is not None else [given[0].marked(~is_held), given[0].marked(is_held)]
        inputs = [call for part in parts if len(part) for call in calls(original, part)]
        counts = [len(part) for part in parts]
        if not all(counts):
            raise too_few_batches(sum(counts), why_whole)
    order = torch.randperm(counts[0], generator=torch.Generator().manual_seed(seed))
    if len(counts) > 1:
        drawn = torch.randperm(counts[1], generator=torch.Generator().manual_seed(seed))
        held, learned = counts[0] + drawn, order
    else:
        held, learned = order[is_held[order]], order[~is_held[order]]
    if not len(learned) or not len(held):
        raise DataError(f"distillation must have at least two samples, one to judge by, got {len(order)} (images)")
    is_learned = torch.ones(given[0].samples, dtype=torch.bool) if held_out is not None else ~is_held
    return _Split(
        inputs=inputs,
        pool=Pool(inputs),
        held=held,
        learned=learned,
        images=sum(each.samples for each in given),
        solved_on=int((is_solved_on(dense, given[-1]) & is_held).sum()),
        digests_learned=tuple(itertools.compress(given[0].digests, is_learned.tolist())),
    )


class _Judge:
    """Judges networks on the held-out samples, within the time limit."""

    def __init__(self, lesson: Lesson, split: _Split, clock: Clock) -> None:
        self._lesson, self._split, self._clock = lesson, split, clock
        self.looked_at = split.pool.first(split.held, _LOOKED_AT)
        self.samples_looked_at = split.pool.samples(self.looked_at)

    def all(self, net: nn.Module) -> Judgement:
        """Judge on all held-out samples."""
        with self._clock.judging(self._split.pool.samples(self._split.held)):
            return self._lesson.judge(net, self._split.held)

    def look(self, net: nn.Module) -> float:
        """Return the loss on some of them, which is looked at during a course."""
        with self._clock.judging(self.samples_looked_at):
            return self._lesson.judge(net, self.looked_at).loss

    def after_few_steps(self, net: nn.Module, is_normed: bool) -> float:
        """Return this loss. After few steps the running statistics of batch norms are still the old ones."""
        if is_normed:
            try:
                net = recalibrate_batch_norm(net, self._lesson.plain(self._split.learned[:_BATCH_NORM_IMAGES]))
            except DataError:  # the steps have left weights that aren't finite
                return math.inf
        return self.look(net)

    def at_end(self, net: nn.Module, is_normed: bool) -> tuple[nn.Module, Judgement]:
        """Return the learned network with the better statistics of batch norms, and its judgement."""
        found = self._lesson.judge(net, self._split.held)
        if is_normed and math.isfinite(found.loss):
            # Views and blends differ from real images. Statistics of the unchanged images may be better or worse than
            # the statistics of the steps: the held-out images decide.
            measured = recalibrate_batch_norm(net, self._lesson.plain(self._split.learned))
            judged_again = self._lesson.judge(measured, self._split.held)
            if judged_again.loss < found.loss:
                return measured, judged_again
        return net, found


@dataclass(frozen=True)
class _Trial:
    """What the range test found."""

    training: Training  # the steps that are left, with the batch norms' statistics that the network bears
    rate: float = math.nan  # NaN: none, or nothing is left to learn
    rates: tuple[RateTrial, ...] = ()


def _tried(training: Training, judge: _Judge, lr: float | None, progress: bool | None) -> _Trial:
    """Say how long the steps take, and find the learning rate unless it is given.

    The steps of the range test are some of all steps. If they don't allow to try further rates, the next lower one is
    taken.
    """
    clock = training.clock
    if clock.left <= 0.0:
        return _Trial(training, math.nan if lr is None else lr)

    def after_few_steps(net: nn.Module) -> float:
        return judge.after_few_steps(net, training.is_normed)

    if training.is_normed:
        # Networks trained with fixed statistics, or on other images, break by the statistics of the batches.
        is_normed = after_few_steps(training.student()) <= MOST_LOST * training.first
        training = replace(training, is_normed=is_normed)
    a_step = seconds_of_a_step(training)
    looks = LOOKS * clock.seconds_to_judge(judge.samples_looked_at)
    _tell_time(training, a_step, looks, is_searched=lr is None)
    steps = training.total
    if clock.seconds is not None:
        steps = max(0, min(steps, int((clock.left - looks) / a_step)))
    rates: tuple[RateTrial, ...] = ()
    if lr is None or training.is_normed:
        candidates: tuple[float, ...] = RATES if lr is None else (lr,)
        most, steps_of_each = range_test(steps, rates=min(2, len(candidates)))
        rates = try_rates(training, after_few_steps, candidates[:most], steps_of_each, progress)
        if training.is_normed and rates and not rates[-1].is_taken:
            training = replace(training, is_normed=False)
            if lr is None:
                candidates = RATES[: max(most - len(rates), 0)]
                rates += try_rates(training, after_few_steps, candidates, steps_of_each, progress)
    training = replace(training, total=training.total - sum(trial.steps for trial in rates))
    if lr is not None:
        return _Trial(training, lr)
    if not rates:
        return _Trial(training, ONE_RATE)
    last = rates[-1]
    if last.is_taken:
        return _Trial(training, last.lr, rates)
    lower = [rate for rate in RATES if rate < last.lr]
    return _Trial(training, lower[0] if lower else math.nan, rates)


def _seconds() -> str:
    """Return what limits the time, for messages."""
    return advice("seconds=", "--distill-seconds")


def _tell_time(training: Training, a_step: float, looks: float, *, is_searched: bool) -> None:
    """Log how long distillation takes at most: as a warning if that is more than ten minutes without a limit."""
    total, limit = training.total, training.clock.seconds
    courses = 2 if is_searched else 1  # the second one if the result of the first one is discarded
    needed = courses * (total * a_step + looks)
    text = f"distillation takes at most about {duration(needed)}: {total} steps of {duration(a_step)} each"
    if is_searched:
        tried = most_tried_steps(total)
        text += f", at most {tried} of them to find the learning rate" if tried else ""
        text += ", as many again at a sixth of the rate if the result is discarded"
    text += ", and comparisons with the unpruned network"
    text += f"; {_seconds()} limits it" if limit is None else f"; {_seconds()} ends it after {duration(limit)}"
    _logger.log(logging.WARNING if limit is None and needed > LONG else logging.INFO, "%s", text)


@dataclass(frozen=True)
class _Learned:
    """What a course learned."""

    course: Course | None = None
    student: nn.Module | None = None
    after: Judgement | None = None
    steps: int = 0
    weights_of: int = 0  # the step that they are from
    is_discarded: bool = True
    is_out_of_time: bool = False
    discarded: _Learned | None = None  # the course before, at the rate of the range test


def _course(training: Training, judge: _Judge, rate: float, before: Judgement, progress: bool | None) -> _Learned:
    """Take the steps at a rate, and judge the weights at the end, or else the best ones on the way."""
    clock, course = training.clock, Course(training, rate)
    course.run(progress)
    is_out_of_time = course.is_out_of_time or clock.left <= 0.0
    if course.is_given_up and not course.gains_nothing:
        told = "learning rate %g is given up after %d of %d steps: the loss on held-out samples has grown"
        _logger.info(told, rate, course.done, training.total)
    if not course.done:
        return _Learned(course, is_out_of_time=is_out_of_time)
    student, after = judge.at_end(course.student, training.is_normed)
    weights_of = course.done
    if not is_better(after, before) and course.best and (clock.seconds is None or clock.left > 0.0):
        course.student.load_state_dict(course.best)
        earlier, then = judge.at_end(course.student, training.is_normed)
        if is_better(then, before):
            student, after, weights_of = earlier, then, course.best_step
    return _Learned(course, student, after, course.done, weights_of, not is_better(after, before), is_out_of_time)


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
        time; if that isn't enough for two rates, 2e-4 is taken. If the weights that are learned at this rate are
        discarded, the steps are taken once more at a sixth of it. If there is no such rate, the result is a copy of
        ``dense``.
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


def is_solved_on(model: nn.Module, images: Calibration) -> Tensor:
    """Return the samples on which a model's weights were solved, as far as is known: bool (samples,).

    If samples have groups, or batches stay whole, these are all samples of each of them on which weights were solved.
    """
    known = solved_on(model)
    if not known:
        return torch.zeros(images.samples, dtype=torch.bool)
    found = torch.tensor([each in known for each in images.digests])
    return torch.isin(images.units, images.units[found])


def samples_to_judge_on(model: nn.Module, images: Calibration) -> Tensor:
    """Return which samples judge by default: bool (samples,).

    They are the eighth that other steps leave out. If weights of the model were solved on some of these, the
    same number of samples on which none were solved is used instead, if there are any. Of fewer than eight samples the
    last one judges.
    """
    units, eighth = images.units, images.withheld
    if len(units.unique()) > 1 and not eighth.any():
        eighth = units == units[-1]
    fresh = ~is_solved_on(model, images)
    if bool(fresh[eighth].all()) or not fresh.any():
        return eighth
    others = units[fresh].unique()
    every = len(others) // max(1, len(units[eighth].unique())) or 1
    return torch.isin(units, others[every - 1 :: every])


def _check_gradients(lesson: Lesson, student: nn.Module, few: Tensor) -> None:
    """Raise GradientError unless a network's outputs for a few images have gradients.

    ConfigError if they have gradients only in single precision.
    """
    precision, lesson.precision = lesson.precision, "float32"
    call, wanted = next(lesson.batches(few, len(few), 0, None, False))
    with learning(student):
        loss = lesson.objective(student, call, wanted)
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
                lesson.objective(student, call, wanted).backward()
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
                raise not_under_autocast(precision, error, "distill") from error
    student.zero_grad(set_to_none=True)


def too_few_batches(count: int, why: str) -> ConfigError:
    """Return the error for too few batches of a model that runs on whole batches only."""
    return ConfigError(
        "distillation must be able to run a model on any number of samples, or have at least two batches, one to judge "
        f"by, got {count}: {why}; samples must be the first dimension of every input, also of the states of recurrent "
        f"layers. Pass more batches, or leave distillation out: {without_distillation()} (images)"
    )


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
    batch, wanted = next(lesson.batches(few, len(few), 0, None, False))
    with learning(student):
        seconds = timed(lambda: lesson.objective(student, batch, wanted).backward(), student)
    return seconds / pool.samples(few)
