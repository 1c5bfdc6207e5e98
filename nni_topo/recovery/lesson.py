"""The unpruned network's outputs for unlabelled images: a smaller network learns them and is judged by them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, logsigmoid, normalize
from torch.utils._pytree import tree_map_only

from nni_topo.errors import ConfigError, NniTopoError, out_of_memory, raised
from nni_topo.network.layers.memory_format import lay_out
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import detached_copy, evaluating, evaluation_mode
from nni_topo.network.runtime.fits import failure_on
from nni_topo.network.runtime.inputs import (
    MODEL_ERRORS,
    Call,
    arguments_of,
    batch_size,
    cast_floats,
    described,
    on_device,
    real_positions_of,
    take_samples,
    tensors_of,
)
from nni_topo.network.runtime.memory import free_memory_of
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.precision import Precision, computing_in
from nni_topo.network.runtime.switches import random_state_kept, seed_torch
from nni_topo.recovery.frozen import frozen_parameters
from nni_topo.recovery.outputs import (
    KNOWN,
    READ,
    OutputKind,
    Outputs,
    Reading,
    as_in_batch,
    blocks_seen,
    entry_count,
    finite,
    in_words,
    mean_distances,
    shared_blocks,
    unpadded,
)
from nni_topo.recovery.pool import Pool, have_one_shape, inputs_to_compare, join_calls, without_distillation

Objective = Literal["auto", "kl", "binary", "squares", "cosine"]
Augment = Callable[[Any], Any]
Batches = Iterator[tuple[Any, list[Tensor]]]
"""Inputs and targets of each step."""

_BLENDED = 0.5  # share of the images in a view
_AT_ONCE = 256
_NUMBERS = 2**27  # most entries of outputs in one batch that is judged: large outputs get smaller batches
_FEWEST = 16  # smallest such batch, however large the outputs
_KEPT_SHARE = 0.25  # largest share of the free memory for stored outputs of the unpruned network
_LEAST_VARIANCE = 1e-12
_TEMPERATURE = 2.0  # for `judged`: the default of distillation
_SIMILARITIES = 5.0  # weight of the term that compares the cosines between the embeddings of a batch
_HALF = (torch.float16, torch.bfloat16)
VIEWS = 8
"""Number of views of augmented or blended images; the first view is the images themselves."""
MOST_DISTANCE = 2.0
"""Learned weights are discarded if the held-out distance grows to more than this multiple."""


class Judgement(NamedTuple):
    """How far a network's outputs are from the unpruned network's, on held-out images."""

    loss: float  # the objective
    agreement: float  # share of equal classes or decisions, in [0, 1]; NaN if outputs have none
    distance: float  # mean squared distance of the outputs over their variance, as in the report of `shrink`


def is_better(after: Judgement, before: Judgement) -> bool:
    """Return whether learned weights are kept, by the rule of `distill` and `shrink`. NaN is never better."""
    return after.loss < before.loss and after.distance <= MOST_DISTANCE * before.distance


class Lesson:
    """The unpruned network's outputs for some images, and the distance of another network's outputs from them.

    Images are numbered as in ``pool``: a call of all images, or a list of calls that stay whole; then the numbers are
    those of the calls. Values of the ``learned`` ones, by default of all, say what outputs hold, unless ``kinds`` do.
    """

    def __init__(
        self,
        unpruned: nn.Module,
        student: nn.Module,
        pool: Call | list[Call],
        objective: str,
        temperature: float,
        *,
        outputs: Outputs | None = None,
        blocks: float = 0.0,
        precision: Precision = "float32",
        kinds: tuple[OutputKind, ...] = (),
        learned: Tensor | None = None,
    ) -> None:
        # A copy that shares its weights and stays in evaluation mode.
        self._unpruned: nn.Module = evaluating(detached_copy(unpruned, light=True))
        self._pool, self._temperature, self._outputs = Pool(pool), temperature, outputs
        self.precision = precision  # of the steps; judgements are in the precision of the parameters
        # Device and type of the trained parameters; complex weights have real inputs.
        floats = [parameter for parameter in student.parameters() if parameter.is_floating_point()]
        trained = next((parameter for parameter in floats if parameter.requires_grad), floats[0])
        self._place = trained.device, trained.dtype
        self._answers = self._lazy_outputs(self._pool.count)
        # Shared by all courses, which learn from the same images.
        self._views: dict[int, _LazyOutputs | _OutputsOfBatches] = {}
        # Which outputs are compared, and how.
        first_sample = torch.arange(1)
        few = self._pool.few(READ)
        call = on_device(few, device_of(self._unpruned))
        knobs: Any = {"outputs": outputs, "objective": objective, "are_whole": self._pool.are_whole}
        self._reading = Reading(self._unpruned, call, **knobs)
        self.named = self._reading.named
        targets = self._targets_of(first_sample)
        few = cast_floats(few, self._place[1])
        with evaluation_mode(student), torch.no_grad():
            call = few if self._pool.are_whole else take_samples(few, first_sample)
            student_outputs = self._read(student(*call[0], **call[1]), call, Reading(student, few, **knobs))
        shapes, expected = ([tuple(output.shape[1:]) for output in tensors] for tensors in (student_outputs, targets))
        if shapes != expected:
            raise ConfigError(f"both models must give outputs of the same shapes, got {shapes} and {expected} (dense)")
        # Most samples at once.
        self._together = max(_FEWEST, _NUMBERS // max(1, sum(target.numel() for target in targets)))
        if kinds:
            self._reading.kinds = kinds
        else:
            self._reading.settle(self._values(torch.arange(self._pool.count) if learned is None else learned))
        self.kinds = [self._reading.kind(place) for place in range(len(targets))]
        self.objective_name = " and ".join(dict.fromkeys(kind.objective for kind in self.kinds))
        self.read_as = self._reading.sentence(targets)
        if objective == "cosine" and any(len(shape) != 1 for shape in shapes):
            raise ConfigError(
                f"objective='cosine' must have one vector for each sample, got outputs of shapes {expected}: outputs= "
                "says how they become one (objective)"
            )
        # Scales of distances, for judging and for the steps' loss.
        self._count = len(targets)  # number of outputs
        self._scales = self._learned_scales = self._variances(torch.arange(self._pool.count))
        self._weights_of_distance = [0.0] * self._count
        self._blocks = blocks  # weight of the loss of the blocks' outputs
        self._block_names = shared_blocks(self._unpruned, student, self._pool.few(1), self._place) if blocks else []
        if blocks and not self._block_names:
            raise ConfigError(
                f"blocks must be 0 where no block's output has the same shape in both models, got {blocks} (blocks)"
            )

    def split(self, held_out: Tensor, learned: Tensor) -> None:
        """Set the scales of distances: from the held-out images to judge, as in reports, from the others for the steps.

        A single image has no variance, so it sets no scale.
        """
        if self._pool.samples(held_out) > 1:
            self._scales = self._variances(held_out)
        if self._pool.samples(learned) > 1:
            self._learned_scales = self._variances(learned, of_scores=True)
            # The distance of a network with constant outputs is about 1; its divergence depends on the scale of the
            # scores. With this weight both terms are equal for such a network.
            losses = self._losses_of_a_constant(learned)
            self._weights_of_distance = [
                loss if kind.has_answer else 0.0 for kind, loss in zip(self.kinds, losses, strict=True)
            ]

    def judge(self, student: nn.Module, index: Tensor) -> Judgement:
        """Compare a network with the unpruned one on some of the images, in evaluation mode."""
        # By output: loss times entries, distance times entries, equal answers times entries, number of entries.
        sums = torch.zeros(self._count, 4, dtype=torch.float64, device="cpu")
        with evaluation_mode(student), torch.no_grad():
            for part in self._pool.together(index, _AT_ONCE):
                outputs, targets = self._compared(student, self._pool.of(part), self._targets_of(part))
                distances = mean_distances(outputs, targets, self._scales)
                losses = self._losses(outputs, targets, distances)
                for place, (kind, output, target) in enumerate(zip(self.kinds, outputs, targets, strict=True)):
                    agreed = math.nan
                    if kind.has_answer:
                        agreed = float((kind.answers(output) == kind.answers(target)).double().mean())
                    row = sums.new_tensor([float(losses[place]), float(distances[place]), agreed, 1.0])
                    sums[place] += output.numel() * row
        means = sums[:, :3] / sums[:, 3:]
        loss, distance = means[:, :2].mean(0).tolist()
        agreed = float(means[:, 2].nanmean())
        # Rounding can make a divergence of almost nothing negative.
        return Judgement(max(loss, 0.0), math.nan if math.isnan(agreed) else agreed, distance)

    def loss_of_a_constant(self, index: Tensor) -> float:
        """Return the loss of a network whose outputs for some images are always their mean output."""
        return math.fsum(self._losses_of_a_constant(index)) / self._count

    def _losses_of_a_constant(self, index: Tensor) -> list[float]:
        targets, losses = self._rows(self._pool.first(index, min(_AT_ONCE, self._together))), []
        for kind, target, scale in zip(self.kinds, targets, self._scales, strict=True):
            if kind.holds == "classes":
                # Where scores lie far apart, a class may have a probability of 0 on all images.
                likely = (kind.scores(target) / self._temperature).softmax(-1).flatten(0, -2).mean(0)
                constant = self._temperature * likely.clamp_min(torch.finfo(likely.dtype).tiny).log()
                loss = self._divergence(kind, constant.expand_as(target), kind.scores(target))
            elif kind.holds == "decisions":
                epsilon = torch.finfo(target.dtype).eps
                likely = (kind.scores(target) / self._temperature).sigmoid().mean(0)
                constant = self._temperature * likely.clamp(epsilon, 1.0 - epsilon).logit()
                loss = self._divergence(kind, constant.expand_as(target), kind.scores(target))
            else:
                mean = target.mean(0).expand_as(target)
                loss = self._loss(kind, mean, target, mean_distances([mean], [target], [scale])[0])
            losses.append(float(loss))
        return losses

    def objective(self, student: nn.Module, call: Call, targets: list[Tensor]) -> Tensor:
        """Return the mean loss on a call whose outputs should be `targets`, with the loss of the blocks."""
        names = self._block_names
        if names:
            with blocks_seen(self._unpruned, names) as target_blocks:
                targets = self.answer(call, self.precision)
        with blocks_seen(student, names) as student_blocks:
            outputs, targets = self._compared(student, call, targets, self.precision)
        # Probabilities of unlikely classes hardly differ; their scores do, whatever the last operation is.
        distances = mean_distances(self._scores(outputs), self._scores(targets), self._learned_scales)
        losses = self._losses(outputs, targets, distances)
        # The divergence hardly depends on the scores of unlikely classes, and not at all on a constant added to all
        # scores. Without the distance these would drift.
        weighted = zip(losses, self._weights_of_distance, distances, strict=True)
        losses = [loss + weight * distance if weight else loss for loss, weight, distance in weighted]
        loss = torch.stack(losses).mean()
        if not names:
            return loss
        real = real_positions_of(student, call)
        off = []
        for name in names:
            state = student_blocks[name].to(torch.promote_types(student_blocks[name].dtype, self._place[1]))
            student_rows, target_rows = (
                block_output.flatten(0, -2) if block_output.dim() > 2 and real is not None else block_output
                for block_output in unpadded([state, target_blocks[name].to(state)], real)
            )
            # Divided by the variance over this batch, so that all blocks have the same weight.
            variance = (target_rows - target_rows.mean(0)).square().mean() + _LEAST_VARIANCE
            off.append((student_rows - target_rows).square().mean() / variance)
        return loss + self._blocks * torch.stack(off).mean()

    def batches(self, index: Tensor, size: int, seed: int, augment: Augment | None, blend: bool) -> Batches:
        """Yield batches of some of the images, epoch after epoch, with the unpruned network's outputs for them.

        With a loss of the blocks no outputs are yielded: the unpruned network runs on each batch. Of calls that stay
        whole each one is a batch, whatever the ``size``.
        """
        generator = torch.Generator().manual_seed(seed)
        if self._pool.are_whole:
            yield from self._whole_batches(index, generator, seed, augment, blend)
        plain = self._pool.of(index)
        for turn in itertools.count():
            view = 0 if augment is None and not blend else turn % VIEWS
            # Views are drawn anew from their seeds, so that only one is in memory.
            call = plain if augment is None or view == 0 else _augmented(plain, augment, seed + view)
            call = _blended(call, seed + view) if blend and view else call
            if view and view not in self._views:
                self._views[view] = self._lazy_outputs(len(index))
            for chosen in torch.randperm(len(index), generator=generator).tensor_split(-(-len(index) // size)):
                if self._block_names:
                    targets = list[Tensor]()
                elif view:
                    targets = self._views[view](partial(take_samples, call), chosen, self.precision)
                else:
                    targets = self._targets_of(index[chosen], self.precision)
                yield take_samples(call, chosen), targets

    def _whole_batches(
        self, index: Tensor, generator: torch.Generator, seed: int, augment: Augment | None, blend: bool
    ) -> Batches:
        """Yield calls that stay whole, as `batches` does; each has views of its own."""
        for turn in itertools.count():
            view = 0 if augment is None and not blend else turn % VIEWS
            if view and view not in self._views:
                self._views[view] = self._lazy_outputs(self._pool.count)
            outputs = self._views[view] if view else self._answers
            for unit in index[torch.randperm(len(index), generator=generator)].split(1):
                call, seed_of_view = self._pool.of(unit), seed + view + VIEWS * int(unit)
                if augment is not None and view:
                    call = _augmented(call, augment, seed_of_view)
                if blend and view:
                    call = _blended(call, seed_of_view)
                targets = list[Tensor]()
                if not self._block_names:
                    targets = outputs(lambda _, call=call: call, unit, self.precision)  # type: ignore[misc]
                yield call, targets

    def plain(self, index: Tensor) -> list[Any]:
        """Return batches of some of the images, unchanged, for the student."""
        parts = [index[:0]] if not len(index) else list(index.tensor_split(-(-len(index) // _AT_ONCE)))
        return [(as_in_batch(cast_floats(self._pool.of(part), self._place[1])),) for part in parts]

    def answer(self, call: Call, precision: Precision) -> list[Tensor]:
        """Return the compared outputs of the unpruned network, on the student's device and in its type."""
        device = device_of(self._unpruned)
        args, kwargs = on_device(call, device)
        # Under autocast a network in half precision fails: norms get inputs of one type and weights of another.
        is_half = any(parameter.dtype in _HALF for parameter in self._unpruned.parameters())
        with (
            evaluation_mode(self._unpruned),
            torch.no_grad(),
            computing_in("float32" if is_half else precision, device),
        ):
            answer = _run(self._unpruned, (args, kwargs))
        return [output.to(*self._place) for output in self._outputs_of(answer, (args, kwargs))]

    def _compared(
        self, student: nn.Module, call: Call, targets: list[Tensor], precision: Precision = "float32"
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return a model's outputs and the targets, both without padding."""
        real = real_positions_of(student, call)
        args, kwargs = cast_floats(call, self._place[1])
        with computing_in(precision, self._place[0]):
            answer = _run(student, (args, kwargs))
        outputs = self._reading.aligned(self._outputs_of(answer, (args, kwargs)))
        return unpadded(outputs, real), unpadded(self._reading.aligned(targets), real)

    def _outputs_of(self, answer: Any, call: Call) -> list[Tensor]:
        """Return the compared outputs; bfloat16 is cast first, for the losses and for the user's function."""
        dtype = self._place[1]
        if any(tensor.dtype == torch.bfloat16 for tensor in tensors_of(answer)):
            answer = tree_map_only(
                Tensor, lambda tensor: tensor.to(dtype) if tensor.dtype == torch.bfloat16 else tensor, answer
            )
        return self._read(answer, call, self._reading)

    def _read(self, answer: Any, call: Call, reading: Reading) -> list[Tensor]:
        """Return the outputs to compare for a call."""
        count = entry_count(answer, call, self._outputs) if self._pool.are_whole else batch_size(call)
        return reading.read(answer, call, count)

    def _lazy_outputs(self, count: int) -> _LazyOutputs | _OutputsOfBatches:
        """Return the unpruned network's outputs for ``count`` images, which are computed when they are needed."""
        return _OutputsOfBatches(self.answer) if self._pool.are_whole else _LazyOutputs(self.answer, count)

    def _targets_of(self, index: Tensor, precision: Precision = "float32") -> list[Tensor]:
        """Return the unpruned network's outputs for some images, or for one call that stays whole."""
        return self._answers(self._pool.of, index, precision)

    def _rows(self, index: Tensor) -> list[Tensor]:
        """Return the unpruned network's outputs for some images without padding, by position where lengths differ."""
        rows = []
        for outputs in zip(*self._values(index), strict=True):
            shapes = {output.shape[1:] for output in outputs}
            if len({shape[-1:] for shape in shapes}) > 1:
                outputs = tuple(output.reshape(-1, 1) for output in outputs)
            elif len(shapes) > 1:
                outputs = tuple(output.flatten(0, -2) for output in outputs)
            rows.append(torch.cat(outputs))
        return rows

    def _values(self, index: Tensor) -> list[list[Tensor]]:
        """Return the unpruned network's outputs for some images, at most about `KNOWN` samples, without padding."""
        parts = []
        for part in self._pool.together(self._pool.spread(index, min(KNOWN, self._together)), len(index)):
            real = real_positions_of(self._unpruned, self._pool.of(part))
            parts.append(unpadded(self._reading.aligned(self._targets_of(part)), real))
        return parts

    def _losses(self, outputs: list[Tensor], targets: list[Tensor], distances: list[Tensor]) -> list[Tensor]:
        """Return the mean loss of each output, given the distances."""
        return [self._loss(*row) for row in zip(self.kinds, outputs, targets, distances, strict=True)]

    def _loss(self, kind: OutputKind, output: Tensor, target: Tensor, distance: Tensor) -> Tensor:
        if kind.holds == "numbers":
            return distance
        if kind.holds == "vectors":
            vectors, target_vectors = normalize(output, dim=-1), normalize(target, dim=-1)
            loss = 1.0 - (vectors * target_vectors).sum(-1).mean()
            if output.dim() == 2:
                # The cosines between samples say which are neighbours, and don't change if all embeddings are rotated.
                loss = loss + _SIMILARITIES * (vectors @ vectors.T - target_vectors @ target_vectors.T).square().mean()
            return loss
        return self._divergence(kind, kind.scores(output), kind.scores(target))

    def _divergence(self, kind: OutputKind, scores: Tensor, target_scores: Tensor) -> Tensor:
        """Return the mean divergence from the unpruned network's probabilities, for scores of classes or decisions."""
        t = self._temperature
        if kind.holds == "decisions":
            yes = (target_scores / t).sigmoid()
            loss = yes * (logsigmoid(target_scores / t) - logsigmoid(scores / t))
            loss = loss + (1.0 - yes) * (logsigmoid(-target_scores / t) - logsigmoid(-scores / t))
            return t * t * loss.mean()
        loss = kl_div(
            log_softmax(scores / t, -1), log_softmax(target_scores / t, -1), reduction="none", log_target=True
        )
        # A masked class has probability 0 and contributes nothing.
        return t * t * loss.masked_fill(target_scores == -math.inf, 0.0).sum(-1).mean()

    def _scores(self, outputs: list[Tensor]) -> list[Tensor]:
        """Return outputs with scores in place of probabilities."""
        return [kind.scores(output) for kind, output in zip(self.kinds, outputs, strict=True)]

    def _variances(self, index: Tensor, *, of_scores: bool = False) -> list[float]:
        """Return the variance of each output of the unpruned network over some images, or a sample of many."""
        rows = self._scores(self._rows(index)) if of_scores else self._rows(index)
        return [float(finite(output_rows).var(0, correction=0).mean()) + _LEAST_VARIANCE for output_rows in rows]


class _LazyOutputs:
    """The unpruned network's outputs for some images, computed when they are first needed.

    They are kept if the outputs for all images take at most a quarter of the free memory.
    """

    def __init__(self, ask: Callable[[Call, Precision], list[Tensor]], count: int) -> None:
        self._ask = ask
        self._is_known = torch.zeros(count, dtype=torch.bool, device="cpu")
        self._values: list[Tensor] = []
        self._is_kept = True

    def __call__(
        self, call_of: Callable[[Tensor], Call], index: Tensor, precision: Precision = "float32"
    ) -> list[Tensor]:
        """Return the outputs for some images; unknown ones are computed in the given precision."""
        for part in _together(index[~self._is_known[index]].unique()) if self._is_kept else ():
            outputs = self._ask(call_of(part), precision)
            if not self._values:
                count = len(self._is_known)
                needed = sum(count * output[:1].nbytes for output in outputs)  # for all images
                self._is_kept = needed <= _KEPT_SHARE * free_memory_of(outputs[0].device)
                self._values = [
                    output.new_empty(count if self._is_kept else 0, *output.shape[1:]) for output in outputs
                ]
                if not self._is_kept:
                    break
            for stored, output in zip(self._values, outputs, strict=True):
                stored[part.to(stored.device)] = output
            self._is_known[part] = True
        if self._is_kept or not len(index):
            return [stored[index.to(stored.device)] for stored in self._values]
        parts = [self._ask(call_of(part), precision) for part in _together(index)]
        return [torch.cat(part_outputs) for part_outputs in zip(*parts, strict=True)]


class _OutputsOfBatches:
    """The same for calls that stay whole and may differ in length: outputs are kept while they fit in that memory."""

    def __init__(self, ask: Callable[[Call, Precision], list[Tensor]]) -> None:
        self._ask = ask
        self._values: dict[int, list[Tensor]] = {}
        self._nbytes = 0

    def __call__(
        self, call_of: Callable[[Tensor], Call], index: Tensor, precision: Precision = "float32"
    ) -> list[Tensor]:
        """Return the outputs for one call."""
        number = int(index)
        if number in self._values:
            return self._values[number]
        outputs = self._ask(call_of(index), precision)
        nbytes = sum(output.nbytes for output in outputs)
        if self._nbytes + nbytes <= _KEPT_SHARE * free_memory_of(outputs[0].device):
            self._values[number] = outputs
            self._nbytes += nbytes
        return outputs


def _run(model: nn.Module, call: Call) -> Any:
    """Run a model on samples that form a new batch; ConfigError if it can't."""
    try:
        return model(*call[0], **call[1])
    except MODEL_ERRORS as error:
        if isinstance(error, NniTopoError) or out_of_memory(error):
            raise
        raise ConfigError(
            f"distillation must be able to run a model on any number of samples, got {raised(error)} on "
            f"{described(call)}: leave distillation out, {without_distillation()} (images)"
        ) from error


def student_of(dense: nn.Module, few: Call) -> nn.Module:
    """Return a copy of a network that can learn: in evaluation mode, in single precision at least.

    All parameters learn but those that `frozen_parameters` names. ``few``: a call on which it runs.
    """
    if not any(parameter.is_floating_point() for parameter in dense.parameters()):
        raise ConfigError("a model must have floating parameters, got none (dense)")
    student: nn.Module = evaluating(detached_copy(dense))
    if any(parameter.dtype in _HALF for parameter in student.parameters()):
        student.float()
    for module in student.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.sparse = False  # AdamW takes no sparse gradients
    floats = [parameter for parameter in student.parameters() if parameter.is_floating_point()]
    learned = next((parameter for parameter in floats if parameter.requires_grad), floats[0])
    args, kwargs = on_device(cast_floats(few, learned.dtype), device_of(student))
    student = lay_out(student, args, kwargs)
    frozen = frozen_parameters(student)
    for name, parameter in student.named_parameters(remove_duplicate=False):
        can_learn = parameter.is_floating_point() or parameter.is_complex()
        parameter.requires_grad_(can_learn and name not in frozen)
    return student


def judged(
    unpruned: nn.Module,
    nets: Sequence[nn.Module],
    images: Iterable[Any],
    outputs: Outputs | None = None,
    kinds: tuple[OutputKind, ...] = (),
) -> list[Judgement]:
    """Compare several networks with the unpruned one, as :meth:`Lesson.judge` does, on all of some images."""
    inputs, _ = inputs_to_compare({"model": unpruned}, [Calibration.of(images)])
    pool = Pool(inputs)
    students = [student_of(net, pool.few(2)) for net in nets]
    lesson = Lesson(unpruned, students[0], inputs, "auto", _TEMPERATURE, outputs=outputs, kinds=kinds)
    return [lesson.judge(net, torch.arange(pool.count)) for net in students]


def is_blendable(call: Call) -> bool:
    """Return whether a call is one floating-point tensor with several values for each sample."""
    tensors = tensors_of(call)
    return len(tensors) == 1 and tensors[0].is_floating_point() and tensors[0].dim() > 1


def _blended(call: Call, seed: int) -> Call:
    """Interpolate about half of the samples with other samples, by random weights."""
    generator = torch.Generator().manual_seed(seed)

    def blend(images: Tensor) -> Tensor:
        shape = (len(images), *[1] * (images.dim() - 1))
        shares = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < _BLENDED)
        partners = images[torch.randperm(len(images), generator=generator).to(images.device)]
        return images.lerp(partners, shares.to(images))

    blended: Call = tree_map_only(Tensor, blend, call)
    return blended


def _together(index: Tensor) -> tuple[Tensor, ...]:
    """Split image numbers into batches; without images there is no batch."""
    parts: tuple[Tensor, ...] = index.split(_AT_ONCE) if len(index) else ()
    return parts


def check_augment(unpruned: nn.Module, few: Call, augment: Augment, seed: int) -> None:
    """Raise ConfigError, before training, unless a network runs on the output of ``augment`` for a few images."""
    view = _augmented(few, augment, seed)
    error = failure_on(unpruned, view)
    if error is not None:
        got, original = (", ".join(in_words(tensor) for tensor in tensors_of(part)) for part in (view, few))
        raise ConfigError(
            f"augment must return inputs that fit the model, got {got} for {original}: {raised(error)} (augment)"
        ) from error


def _augmented(call: Call, augment: Augment, seed: int) -> Call:
    """Return another view of a call's inputs, from a seed of its own; ConfigError unless it can replace them."""
    views: list[Call] = []
    with random_state_kept():
        seed_torch(seed)
        for index in _together(torch.arange(batch_size(call))):
            part = take_samples(call, index)
            batch = as_in_batch(part)
            seen = augment(batch)
            # A model may take one mapping as its argument; then the returned mapping is that argument, too.
            is_argument = not part[1] and isinstance(batch, Mapping) and isinstance(seen, Mapping)
            view = arguments_of((seen,) if is_argument else seen) if tensors_of(seen) else ((), {})
            is_alike = len(view[0]) == len(part[0]) and view[1].keys() == part[1].keys()
            if not is_alike or len(tensors_of(view)) != len(tensors_of(part)):
                raise ConfigError(
                    "augment must return the same structure as its input (tensor, tuple or dict), "
                    f"got {in_words(seen)} for {in_words(batch)} (augment)"
                )
            before, after = (
                sum(tensor.dim() > 0 and len(tensor) == len(index) for tensor in tensors_of(inputs))
                for inputs in (part, view)
            )
            if after < before:
                raise ConfigError(
                    f"augment must return as many samples as it gets, {len(index)}, got {in_words(seen)} (augment)"
                )
            before, after = (
                sum(int((~tensor.isfinite()).sum()) for tensor in tensors_of(inputs) if tensor.is_floating_point())
                for inputs in (part, view)
            )
            if after > before:  # additive masks hold infinities
                raise ConfigError(f"augment must return finite values, got {in_words(seen)} with others (augment)")
            views.append(view)
    if not have_one_shape(views):
        got = "; ".join(in_words(as_in_batch(view)) for view in views)
        raise ConfigError(f"augment must return inputs of one shape, got {got} (augment)")
    return join_calls(views)
