"""The samples of a distillation that are held out: which they are, and what a network is worth on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import check_samples_first, first_call, with_whole_batches
from nni_topo.network.runtime.hooks import batches_of
from nni_topo.network.runtime.inputs import Call, calls
from nni_topo.network.runtime.reports import solved_on
from nni_topo.recovery.batchnorm import recalibrate_batch_norm
from nni_topo.recovery.clock import Clock
from nni_topo.recovery.lesson import Judgement, Lesson
from nni_topo.recovery.pool import Pool, inputs_to_compare, without_distillation

BATCH_NORM_IMAGES = 256
"""Least images that learn for batch norms to take their statistics from the batches."""
_LOOKED_AT = 256  # most held-out images on which the loss is measured during a course; all judge the result


@dataclass(frozen=True)
class HeldOutSplit:
    """The samples of a distillation: those that judge, and those from which the network learns."""

    inputs: Call | list[Call]
    pool: Pool  # of these
    judging_numbers: Tensor  # numbers of those that judge, in the pool
    learned: Tensor  # numbers of the others
    images: int  # number of all samples
    solved_on: int  # number of those that judge on which weights were solved
    digests_learned: tuple[bytes, ...]  # of the others

    @property
    def judges(self) -> int:
        """Number of samples that judge."""
        return self.pool.samples(self.judging_numbers)


def held_out_split(
    dense: nn.Module,
    original: nn.Module,
    images: Iterable[Any] | Evaluator,
    held_out: Iterable[Any] | Evaluator | None,
    seed: int,
) -> HeldOutSplit:
    """Read the samples and split them; DataError or ConfigError if they are too few or don't fit a model."""
    data = [_read(images, "images", dense, original)]
    if held_out is not None:
        data.append(_read(held_out, "held_out", dense, original))
    for model in (original, dense):
        data = [with_whole_batches(model, part) for part in data]
    # Which samples judge, of those that are held out or else of all.
    is_held = torch.ones(data[-1].samples, dtype=torch.bool)
    if held_out is None:
        is_held = samples_to_judge_on(dense, data[0])
    inputs, why_whole = inputs_to_compare({"original": original, "dense": dense}, data)
    counts = [part.samples for part in data]
    if isinstance(inputs, list):
        if held_out is None and not data[0].withheld.any():  # parts of so few samples were not tried
            data[0] = data[0].as_whole_batches(why_whole)
            is_held = samples_to_judge_on(dense, data[0])
        parts = data if held_out is not None else [data[0].marked(~is_held), data[0].marked(is_held)]
        inputs = [call for part in parts if len(part) for call in calls(original, part)]
        counts = [len(part) for part in parts]
        if not all(counts):
            raise too_few_batches(sum(counts), why_whole)
    order = torch.randperm(counts[0], generator=torch.Generator().manual_seed(seed))
    if len(counts) > 1:
        drawn = torch.randperm(counts[1], generator=torch.Generator().manual_seed(seed))
        judging_numbers, learned = counts[0] + drawn, order
    else:
        judging_numbers, learned = order[is_held[order]], order[~is_held[order]]
    if not len(learned) or not len(judging_numbers):
        raise DataError(f"distillation must have at least two samples, one to judge by, got {len(order)} (images)")
    is_learned = torch.ones(data[0].samples, dtype=torch.bool) if held_out is not None else ~is_held
    return HeldOutSplit(
        inputs=inputs,
        pool=Pool(inputs),
        judging_numbers=judging_numbers,
        learned=learned,
        images=sum(part.samples for part in data),
        solved_on=int((is_solved_on(dense, data[-1]) & is_held).sum()),
        digests_learned=tuple(itertools.compress(data[0].digests, is_learned.tolist())),
    )


def _read(batches: Iterable[Any] | Evaluator, knob: str, dense: nn.Module, original: nn.Module) -> Calibration:
    data = batches_of(batches, original, knob)
    for model in (original, dense):
        first_call(model, data)
    check_samples_first(original, data)
    return data


def is_solved_on(model: nn.Module, images: Calibration) -> Tensor:
    """Return the samples on which a model's weights were solved, as far as is known: bool (samples,).

    If samples have groups, or batches stay whole, these are all samples of each of them on which weights were solved.
    """
    digests_solved_on = solved_on(model)
    if not digests_solved_on:
        return torch.zeros(images.samples, dtype=torch.bool)
    is_known = torch.tensor([digest in digests_solved_on for digest in images.digests])
    return torch.isin(images.units, images.units[is_known])


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
    fresh_units = units[fresh].unique()
    every = len(fresh_units) // max(1, len(units[eighth].unique())) or 1
    return torch.isin(units, fresh_units[every - 1 :: every])


def too_few_batches(count: int, why: str) -> ConfigError:
    """Return the error for too few batches of a model that runs on whole batches only."""
    return ConfigError(
        "distillation must be able to run a model on any number of samples, or have at least two batches, one to judge "
        f"by, got {count}: {why}; samples must be the first dimension of every input, also of the states of recurrent "
        f"layers. Pass more batches, or leave distillation out: {without_distillation()} (images)"
    )


class HeldOutJudge:
    """Judges networks on the held-out samples, within the time limit."""

    def __init__(self, lesson: Lesson, split: HeldOutSplit, clock: Clock) -> None:
        self._lesson, self._split, self._clock = lesson, split, clock
        self.looked_at = split.pool.first(split.judging_numbers, _LOOKED_AT)
        self.samples_looked_at = split.pool.samples(self.looked_at)

    def all(self, net: nn.Module) -> Judgement:
        """Judge on all held-out samples."""
        with self._clock.judging(self._split.judges):
            return self._lesson.judge(net, self._split.judging_numbers)

    def look(self, net: nn.Module) -> float:
        """Return the loss on some of them, which is looked at during a course."""
        with self._clock.judging(self.samples_looked_at):
            return self._lesson.judge(net, self.looked_at).loss

    def after_few_steps(self, net: nn.Module, is_normed: bool) -> float:
        """Return this loss. After few steps the running statistics of batch norms are still the old ones."""
        if is_normed:
            try:
                net = recalibrate_batch_norm(net, self._lesson.plain(self._split.learned[:BATCH_NORM_IMAGES]))
            except DataError:  # the steps have left weights that aren't finite
                return math.inf
        return self.look(net)

    def at_end(self, net: nn.Module, is_normed: bool) -> tuple[nn.Module, Judgement]:
        """Return the learned network with the better statistics of batch norms, and its judgement."""
        judgement = self._lesson.judge(net, self._split.judging_numbers)
        if is_normed and math.isfinite(judgement.loss):
            # Views and blends differ from real images. Statistics of the unchanged images may be better or worse than
            # the statistics of the steps: the held-out images decide.
            measured = recalibrate_batch_norm(net, self._lesson.plain(self._split.learned))
            judged_again = self._lesson.judge(measured, self._split.judging_numbers)
            if judged_again.loss < judgement.loss:
                return measured, judged_again
        return net, judgement
