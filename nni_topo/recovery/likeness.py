"""How similar a network's outputs are to the unpruned network's on some images, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from nni_topo.context import leaving_out
from nni_topo.errors import ConfigError, DataError, SpeedupError
from nni_topo.network.runtime.calibration import BatchStore, Calibration
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.network.runtime.inputs import batch_size, calls, fitting, real_positions_of, returned_tensors
from nni_topo.network.runtime.progress import bar
from nni_topo.recovery.outputs import (
    KNOWN,
    ComparedOutputs,
    OutputKind,
    Outputs,
    Reading,
    entry_count,
    finite,
    minus,
    unpadded,
)

NO_SCALE = (
    "the unpruned network's outputs don't vary over the samples by which the networks are compared, so that distances, "
    "which are shares of that variance, are infinite: pass samples that differ"
)
_Z = 1.959964  # 95 % of a normal distribution
_TAIL = 0.975
_MOST_ENTRIES = 2**26  # of outputs by whose values it is decided what they hold
_ROUNDING = 1e-14  # relative, of a sum of squares in double precision


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Likeness:
    """How similar the outputs of two networks are."""

    distance: Estimate  # mean squared distance over the variance of the unpruned outputs; NaN if shapes differ
    agreement: Estimate  # share of equal classes or decisions, over samples; NaN if outputs have none


@dataclass(frozen=True)
class Differences:
    """How far the outputs of two networks differ on each sample, or on each batch if outputs have no samples."""

    distances: list[float]  # squared, over the variance of the unpruned outputs; NaN if shapes differ
    agreed: list[float]  # share of a sample's classes or decisions that are the same; NaN if outputs have none


class _Answer(NamedTuple):
    """A network's outputs for one batch, on the CPU."""

    outputs: list[Tensor]
    real: Tensor | None  # which positions aren't padding, bool (samples, places)
    samples: int


class Answers:
    """The unpruned network's outputs on several parts of the images, with which other networks are compared.

    Distances are shares of the variance over the last part, the held-out images, because images of one kind vary less
    than images of all kinds. If that part is a single image, they are shares of the variance over all parts.
    """

    def __init__(
        self, model: nn.Module, *parts: Calibration, outputs: Outputs | None = None, objective: str = "auto"
    ) -> None:
        self._model, self._parts = model, parts
        self._wanted = [BatchStore() for _ in parts]
        self._reading = _reading(model, parts[0], outputs, objective)
        for part, store in zip(parts, self._wanted, strict=True):
            for answer in _answers(model, part, self._reading):
                store.append(answer)
        self._reading.settle(_first_values(self._wanted[0]))
        first: _Answer = self._wanted[0][0]
        self.named: ComparedOutputs = self._reading.named
        """Which of the model's outputs are compared, and which aren't."""
        self.kinds: tuple[OutputKind, ...] = self._reading.kinds
        """What each of the compared outputs holds."""
        self.hold = self._reading.sentence(first.outputs, with_agreement=False)
        """The same in words."""
        self.read_as = self._reading.sentence(first.outputs)
        """The same, and what agreement means."""
        self.have_answers = any(kind.has_answer for kind in self.kinds)
        """Whether outputs are classes or decisions, on which networks can agree."""
        self.is_classifier = len(self.kinds) == 1 and self.kinds[0].is_class_of_sample(first.outputs[0])
        """Whether the only output holds classes, one for each sample."""
        stores = self._wanted[-1:] if parts[-1].samples > 1 else self._wanted
        self._scales = _scales([self._aligned(answer) for store in stores for answer in store])

    def _aligned(self, answer: _Answer) -> _Answer:
        return answer._replace(outputs=self._reading.aligned(answer.outputs))

    def likenesses(self, net: nn.Module) -> list[Likeness]:
        """Compare a network on each part."""
        exact = Likeness(Estimate(0.0, 0.0, 0.0), Estimate(*([1.0 if self.have_answers else math.nan] * 3)))
        if net is self._model:
            return [exact] * len(self._parts)
        likenesses = []
        for part in range(len(self._parts)):
            differences = self.differences(net, part)
            likenesses.append(Likeness(_mean(differences.distances), _share(differences.agreed)))
        return likenesses

    def differences(self, net: nn.Module, part: int) -> Differences:
        """Compare a network on each sample of a part."""
        distances: list[float] = []
        agreed: list[float] = []
        answers = _answers(net, self._parts[part], self._reading)
        try:
            for answer, stored in zip(answers, self._wanted[part], strict=True):
                aligned, target = self._aligned(answer), self._aligned(stored)
                distances += self._distances(aligned, target)
                agreed += _agreements(aligned, target, self.kinds)
        except DataError as error:  # the data aren't the cause: the model itself has run on them
            raise SpeedupError(
                "a smaller network must run on every batch on which the model runs, got "
                f"{str(error.__cause__).partition(chr(10))[0]}: a forward that decides by values of tensors, as in "
                f"`if x.mean() > 0`, may go another way with fewer channels; {leaving_out('the layers around it')}"
            ) from error
        return Differences(distances, agreed)

    def _distances(self, answer: _Answer, target: _Answer) -> list[float]:
        """Return the squared distance of each sample's outputs, as a share of the variance, averaged over outputs."""
        shapes = [[output.shape for output in side.outputs] for side in (answer, target)]
        if shapes[0] != shapes[1]:  # such as the boxes that a detector finds
            return [math.nan] * target.samples
        total = torch.zeros(target.samples, dtype=torch.float64)
        # A smaller batch may have fewer outputs than scales.
        for output, target_output, scale in zip(answer.outputs, target.outputs, self._scales, strict=False):
            squares = minus(output.double(), target_output.double()).square()
            if target.real is not None and squares.dim() > 2 and squares.shape[:2] == target.real.shape:
                squares = squares.flatten(2).sum(2) * target.real
            by_sample = squares.reshape(target.samples, -1).sum(1)
            # Outputs that never vary have no scale: equal outputs have distance 0, others an infinite one.
            total += by_sample / scale if scale > 0.0 else torch.where(by_sample == 0.0, 0.0, math.inf)
        distances: list[float] = (total / max(len(answer.outputs), 1)).tolist()
        return distances


def have_answers(
    model: nn.Module, images: Calibration, outputs: Outputs | None = None, objective: str = "auto"
) -> bool:
    """Say whether a model's outputs are classes or decisions; it runs on as many batches as are needed."""
    reading = _reading(model, images, outputs, objective)
    reading.settle(_first_values(_answers(model, images, reading)))
    return any(kind.has_answer for kind in reading.kinds)


def outputs_in_words(model: nn.Module, images: Calibration) -> str:
    """Say what a model's outputs hold; empty if they have no floating tensor, or no entry per sample."""
    try:
        reading = _reading(model, images, None, "auto", are_whole=True)  # the model may not run on parts of batches
        values = _first_values(_answers(model, images, reading))
    except ConfigError:
        return ""
    reading.settle(values)
    return reading.sentence(values[0], with_agreement=False)


def _reading(
    model: nn.Module, images: Calibration, outputs: Outputs | None, objective: str, *, are_whole: bool = False
) -> Reading:
    with fitting(0, images):
        call = next(calls(model, images))
        return Reading(model, call, outputs, objective, are_whole=are_whole or bool(images.why_whole))


def _first_values(answers: Iterable[_Answer]) -> list[list[Tensor]]:
    """Return the outputs for the first samples, without padding."""
    values, samples, entries = [], 0, 0
    for answer in answers:
        values.append(unpadded(answer.outputs, answer.real))
        samples += answer.samples
        entries += sum(output.numel() for output in answer.outputs)
        if samples >= KNOWN or entries >= _MOST_ENTRIES:
            break
    return values


def _answers(net: nn.Module, images: Calibration, reading: Reading) -> Iterator[_Answer]:
    """Run a network over images, in evaluation mode."""
    with evaluation_mode(net), torch.no_grad():
        for index, call in enumerate(bar("comparing", None, calls(net, images))):
            with fitting(index, images):
                outputs = net(*call[0], **call[1])
            count = entry_count(outputs, call, reading.outputs) if images.why_whole else batch_size(call)
            real = real_positions_of(net, call)
            try:
                read = reading.read(outputs, call, count)
            except ConfigError:
                # If outputs, such as lists of boxes, have no entry per image, a batch is one sample.
                read = [tensor.flatten()[None] for tensor in returned_tensors(outputs) if tensor.is_floating_point()]
                if not read:
                    raise
                real, count = None, 1
            yield _Answer([tensor.detach().cpu() for tensor in read], None if real is None else real.cpu(), count)


def _scales(answers: Sequence[_Answer]) -> list[float]:
    """Return for each output the mean squared distance of a sample from the mean over all samples."""
    scales = []
    numbers = {len(answer.outputs) for answer in answers}
    groups = [[(answer, answer.outputs[index]) for answer in answers] for index in range(min(numbers))]
    if len(numbers) > 1:
        # Batches with different numbers of outputs, such as a list of boxes per image: all are of one kind.
        groups = [[(answer, output) for answer in answers for output in answer.outputs]]
    for group in groups:
        shapes = {output.shape[1:] for _, output in group}
        # Where lengths differ, or some positions are padding, every position is an observation of its own.
        is_ragged = len(shapes) > 1 or any(answer.real is not None for answer in answers)
        total = torch.zeros((), dtype=torch.float64)
        # Samples, observations and the sum of their squares.
        counts = torch.zeros(3, dtype=torch.float64)
        for answer, output in group:
            rows = finite(output.double())
            if is_ragged and rows.dim() > 2:
                is_masked = answer.real is not None and rows.shape[:2] == answer.real.shape
                rows = rows[answer.real] if is_masked else rows.flatten(0, -2)
            if len({shape[-1:] for shape in shapes}) > 1:
                rows = rows.reshape(-1, 1)
            total = total + rows.sum(0)
            counts += torch.tensor([answer.samples, len(rows), float(rows.square().sum())], dtype=torch.float64)
        samples, observations, squares = counts.tolist()
        around_mean = squares - float(total.square().sum()) / observations
        # Around outputs that never vary only a rounding error is left, which is no scale.
        scales.append(around_mean / samples if around_mean > _ROUNDING * squares else 0.0)
    return scales if len(numbers) == 1 else scales * max(numbers)


def _agreements(answer: _Answer, target: _Answer, kinds: Sequence[OutputKind]) -> list[float]:
    """Return for each sample the share of its classes or decisions that are the same, as the mean over outputs."""
    shares = []
    for kind, output, target_output in zip(kinds, answer.outputs, target.outputs, strict=False):
        if not kind.has_answer or output.shape != target_output.shape:
            continue
        same = (kind.answers(output) == kind.answers(target_output)).double().reshape(target.samples, -1)
        shape = target_output.shape[: 2 if target.real is not None and target_output.dim() > 2 else 0]
        if target.real is not None and shape == target.real.shape:
            weights = target.real.double().repeat_interleave(same.shape[1] // target.real.shape[1], 1)
            same = same * weights / weights.sum(1, keepdim=True).clamp_min(1.0)
            shares.append(same.sum(1))
        else:
            shares.append(same.mean(1))
    if not shares:
        return [math.nan] * target.samples
    means: list[float] = torch.stack(shares).mean(0).tolist()
    return means


def _mean(values: list[float]) -> Estimate:
    """Return a mean of nonnegative numbers and its interval by Student's t."""
    count = len(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    mean = float(tensor.mean())
    if not math.isfinite(mean):
        return Estimate(mean, mean, mean)
    if count < 2:
        return Estimate(mean, 0.0, math.inf)
    half = float(stdtrit(count - 1, _TAIL)) * float(tensor.std()) / math.sqrt(count)
    return Estimate(mean, max(mean - half, 0.0), mean + half)


def _share(values: list[float]) -> Estimate:
    """Return a mean of numbers in [0, 1] and Wilson's interval."""
    count = len(values)
    share = math.fsum(values) / count
    if math.isnan(share):
        return Estimate(share, share, share)
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    # A share of 0 has the exact limit 0, and a share of 1 the exact limit 1; rounding would change them.
    low = max(middle - half, 0.0) if share > 0.0 else 0.0
    high = min(middle + half, 1.0) if share < 1.0 else 1.0
    return Estimate(share, low, high)
