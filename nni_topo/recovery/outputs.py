"""Which outputs of two networks distillation and reports compare, and how far apart they are.

They are a model's ``logits``, or else all floating tensors with an entry for each sample. With a user's ``outputs=``
they are taken from what that function returns. Padding doesn't count. Distillation can also compare the outputs of
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nni_topo.context import advice
from nni_topo.errors import ConfigError, listed
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import (
    Call,
    batch_size,
    cast_floats,
    lists_of_samples,
    on_device,
    returned_by_name,
    returned_tensors,
    take_samples,
    tensors_of,
)
from nni_topo.network.runtime.modules import device_of
from nni_topo.recovery.origins import Origin, operations_noted

Outputs = Callable[[Any, Any], Any]
"""Takes a model's output and its inputs, as a batch holds them; returns the outputs to compare."""
OBJECTIVES: dict[str, Literal["classes", "decisions", "vectors", "numbers"]] = {
    "kl": "classes",
    "binary": "decisions",
    "cosine": "vectors",
    "squares": "numbers",
}
"""What an output holds by the loss that suits it."""

READ = 16
"""Number of samples on which a run shows which operation made the outputs."""
KNOWN = 1024
"""Number of samples whose values decide where the operation says nothing."""
_MOST_VALUES = 2**24  # of large outputs fewer samples decide
_UNIT = 1e-3  # largest difference from 1 of a vector's length or a sum of probabilities
_FEWEST_JUDGED = 8  # number of samples needed to distinguish probabilities from scores
_MANY = 16  # number of rows needed for the statistics of scores
# Cross-entropy leaves the sum of all scores as it is, so that it varies little: the variance of the sum over the sum of
# the variances is at most 0.12 for most trained classifiers, up to 0.58 for small ones after a few epochs, 1 for
# independent numbers, and more where they rise together; the least of a regression was 0.64.
_MOST_TOGETHER = 0.2
_APART = 0.6
# Adam doesn't leave the sum as it is: scores of a hundred classes then vary together, up to 3 times. But one of them is
# high where the others are low: rows are less in doubt than rows of unrelated scores, 0.25 to 0.75 times for
# classifiers that are right on four fifths and more, and 0.94 to 1.6 times for regressions.
_LEAST_DOUBT, _MOST_SHUFFLED, _SHUFFLES = 0.85, 1024, 4
_LEAST_DEVIATION = 0.6  # of numbers; outputs of untrained classifiers vary less
_MOST_OFFSET = 3.0  # of the mean of an output, in standard deviations; of untrained classifiers it is more
_MOST_SCORE = 50.0  # median of the largest difference from the mean of a row; no classifier has more
# Decisions and classes by place must be sure on average, because numbers are possible, too.
_SURE, _SURE_OF_CLASS = 0.85, 0.6
_TWO_HUMPED = 0.72  # least squared mean size over the mean square; 0.64 for a normal distribution around zero


class OutputKind(NamedTuple):
    """What one output of a network holds, which decides its loss and what agreement means."""

    # classes: one score each; decisions: one score each, yes or no; vectors: of length one; numbers: anything else
    holds: Literal["classes", "decisions", "vectors", "numbers"]
    form: Literal["scores", "probabilities", "log-probabilities"] = "scores"  # of classes and decisions
    axis: int = -1  # of classes, or of a vector's numbers, counted from the last one
    origin: str = ""  # what says so, in words

    @property
    def objective(self) -> str:
        """Name of the loss, as `distill` takes it."""
        return next(name for name, holds in OBJECTIVES.items() if holds == self.holds)

    @property
    def has_answer(self) -> bool:
        """Whether there is an answer to agree on: a class, or a decision."""
        return self.holds in ("classes", "decisions")

    def is_class_of_sample(self, output: Tensor) -> bool:
        """Return whether an output holds classes, one for each sample and not for each place."""
        return self.holds == "classes" and output.dim() == 2

    def aligned(self, output: Tensor) -> Tensor:
        """Return an output with the classes, or a vector's numbers, in its last dimension."""
        return output if self.axis == -1 or output.dim() < -self.axis else output.movedim(self.axis, -1)

    def scores(self, output: Tensor) -> Tensor:
        """Return the scores of an aligned output, whose softmax or sigmoid are its probabilities."""
        if self.form != "probabilities":
            return output
        info = torch.finfo(output.dtype)
        if self.holds == "classes":
            return output.clamp_min(info.tiny).log()
        return output.clamp(info.eps, 1.0 - info.eps).logit()

    def answers(self, output: Tensor) -> Tensor:
        """Return the classes, or the decisions, of an aligned output."""
        if self.holds == "classes":
            return output.argmax(-1)
        return output > (0.5 if self.form == "probabilities" else 0.0)

    def sentence(self, output: Tensor, *, with_agreement: bool = True) -> str:
        """Return in words what an output (samples, ...) holds, and what agreement means."""
        shape = self.aligned(output).shape[1:]
        by_place = " by place" if len(shape) > (self.holds != "decisions") else ""
        agreement = ""
        if self.holds == "classes":
            content = f"{self.form} of {shape[-1]} classes{by_place}"
            agreement = f"; agreement is the share of {'places' if by_place else 'samples'} with the same class"
        elif self.holds == "decisions":
            content = f"{self.form} of decisions, which are taken at {0.5 if self.form == 'probabilities' else 0}"
            agreement = "; agreement is the share of equal decisions"
        elif self.holds == "vectors":
            content = f"vectors of length one with {shape[-1]} numbers{by_place}"
        else:
            content = "numbers"
        return f"{content}{f' ({self.origin})' if self.origin else ''}{agreement if with_agreement else ''}"


NUMBERS = OutputKind("numbers")
_BY_OPERATION = {
    "softmax": OutputKind("classes", "probabilities"),
    "log_softmax": OutputKind("classes", "log-probabilities"),
    "sigmoid": OutputKind("decisions", "probabilities"),
    "normalize": OutputKind("vectors"),
    "tanh": NUMBERS,
}


def kind_of(outputs: Sequence[Tensor], origin: Origin | None, *, is_named: bool, is_single: bool) -> OutputKind:
    """Return what an output holds, by the operation that made it, or else by its values in several batches.

    ``is_named``: whether its name says that these are logits; ``is_single``: whether it is all that a model returns.
    """
    axis = None if origin is None else origin.axis
    is_ragged = len({(output.dim(), *output.shape[-1:]) for output in outputs}) > 1
    if is_ragged and (origin is None or origin.operation not in _BY_OPERATION or axis == -1):
        return NUMBERS  # lengths differ along the last dimension, which has no classes then
    if origin is not None and origin.operation in _BY_OPERATION:
        kind = _BY_OPERATION[origin.operation]
        if kind.holds in ("classes", "vectors") and axis is not None:
            return kind._replace(axis=axis, origin=str(origin))
        if kind.holds in ("decisions", "numbers"):
            return kind._replace(origin=str(origin))
        if origin.operation == "softmax":  # of one class, or of some of them
            return OutputKind("decisions", "probabilities", origin=f"of {origin}")
    by_values = "by their values"
    shape = outputs[0].shape
    samples, is_flat = sum(map(len, outputs)), len(shape) == 2
    for last in [-1, 1 - len(shape)][: max(0, min(2, len(shape) - 1))] if samples >= _FEWEST_JUDGED else []:
        if shape[last] < 2 or len({output.shape[last] for output in outputs}) > 1:
            continue
        rows = _rows(outputs, last)
        if _are_shares(rows):
            return OutputKind("classes", "probabilities", last, by_values)
        if bool((rows <= 0.0).all()) and bool((rows.exp().sum(1) - 1.0).abs().le(_UNIT).all()) and not is_named:
            return OutputKind("classes", "log-probabilities", last, by_values)
    if is_flat and samples >= _FEWEST_JUDGED and shape[1] > 1 and not is_named:
        rows = _rows(outputs, -1)
        is_between = bool(((rows > 0.0) & (rows < 1.0)).any())
        if bool(((rows >= 0.0) & (rows <= 1.0)).all()) and is_between and float(rows.amax()) > 0.5:
            return OutputKind("decisions", "probabilities", origin=by_values)
    if len(shape) > 1 and shape[-1] > 1 and not is_named:
        rows = _rows(outputs, -1)
        is_one_hot = bool(((rows == 0.0) | (rows == 1.0)).all())
        if not is_one_hot and bool((rows.norm(dim=1) - 1.0).abs().le(_UNIT).all()):
            return OutputKind("vectors", origin=by_values)

    layer = "" if origin is None else str(origin)
    if is_named and (axis is not None or (len(shape) > 1 and shape[-1] > 1)):
        return OutputKind("classes", axis=axis or -1, origin="called logits")
    is_one = origin is not None and not origin.axes  # a layer with a single output, for each sample or place
    if is_one:
        rows = torch.cat([output.float().reshape(-1, 1) for output in outputs])
        return OutputKind("decisions", origin=_why(layer, by_values)) if _are_decisions(rows) else NUMBERS
    if is_single and is_flat and shape[1] > 1:
        rows = _rows(outputs, -1)
        if _are_numbers(rows):
            if _are_decisions(rows):
                return OutputKind("decisions", origin=_why(layer, by_values))
            return OutputKind("numbers", origin=by_values)
        numbers = advice("objective='squares'", "--objective squares")
        return OutputKind("classes", origin=_why(layer, f"assumed; {numbers} compares numbers"))
    if axis is not None and shape[axis] > 1 and len({output.shape[axis] for output in outputs}) == 1:
        rows = _rows(outputs, axis)
        is_sure = len(rows) >= _MANY and _sureness(rows) >= _SURE_OF_CLASS
        if is_sure and (_together(rows) <= _MOST_TOGETHER or _doubt(rows) < _LEAST_DOUBT):
            return OutputKind("classes", axis=axis, origin=_why(layer, by_values))
    return NUMBERS


def _why(layer: str, reason: str) -> str:
    return f"{layer}, {reason}" if layer else reason


def _rows(outputs: Sequence[Tensor], axis: int) -> Tensor:
    """Return the entries along a dimension for each sample and place: (rows, entries)."""
    aligned = [output.movedim(axis, -1) for output in outputs]
    rows = torch.cat([output.reshape(-1, output.shape[-1]).float() for output in aligned if output.dim() > 1])
    return rows[rows.isfinite().all(1)]  # rows with masked scores say nothing


def _are_shares(rows: Tensor) -> bool:
    """Say whether rows are probabilities of classes: in [0, 1], not all of them 0 or 1, with sums of 1."""
    is_between = bool(((rows > 0.0) & (rows < 1.0)).any())
    return is_between and bool((rows >= 0.0).all()) and bool((rows.sum(1) - 1.0).abs().le(_UNIT).all())


def _are_numbers(rows: Tensor) -> bool:
    """Say whether outputs have a range, or vary together, as no scores of classes do."""
    if len(rows) < _MANY:
        return False
    centered = rows - rows.mean(1, keepdim=True)
    if float(centered.abs().amax(1).median()) > _MOST_SCORE:
        return True
    deviation = float(rows.var(0).mean().sqrt())
    offset = float((rows.mean(0) - rows.mean()).abs().max())
    if deviation < _LEAST_DEVIATION or offset > _MOST_OFFSET * deviation or _together(rows) < _APART:
        return False
    return _doubt(rows) >= _LEAST_DOUBT


def _together(rows: Tensor) -> float:
    """Return the variance of the sum of a row over the sum of the variances."""
    return float(rows.sum(1).var() / rows.var(0).sum().clamp_min(torch.finfo(rows.dtype).tiny))


def _doubt(rows: Tensor) -> float:
    """Return how unsure rows are of a class, as a share of what rows of the same, but unrelated, scores would be.

    It is about 1 for numbers, and less for scores of classes, of which one is high where the others are low. Of two
    numbers one is always the lower, which says nothing: 1.
    """
    if rows.shape[1] < 3:
        return 1.0
    rows = rows[:_MOST_SHUFFLED].double().cpu()
    count = rows.shape[1]
    centered = rows - rows.mean(1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    unrelated = list[float]()
    for _ in range(_SHUFFLES):
        order = torch.rand(rows.shape, generator=generator).argsort(0)
        shuffled = centered.gather(0, order)
        # Rows that sum to zero vary less than others, and shuffled ones are centred once more.
        spread = math.sqrt(count / (count - 1))
        unrelated.append(_sureness((shuffled - shuffled.mean(1, keepdim=True)) * spread))
    least = torch.finfo(torch.float32).tiny
    return (1.0 - _sureness(centered)) / max(1.0 - fmean(unrelated), least)


def _sureness(rows: Tensor) -> float:
    return float(rows.softmax(1).amax(1).mean())


def _are_decisions(rows: Tensor) -> bool:
    """Say whether numbers are scores of decisions: of both signs, mostly far from zero, few in between."""
    if len(rows) < _MANY or float(rows.abs().amax(1).median()) > _MOST_SCORE:
        return False
    has_both = bool((rows.amax(0) > 0.0).all()) and bool((rows.amin(0) < 0.0).all())
    sure = float(rows.abs().sigmoid().mean())
    humped = float(rows.abs().mean().square() / rows.square().mean().clamp_min(torch.finfo(rows.dtype).tiny))
    return has_both and sure >= _SURE and humped >= _TWO_HUMPED


class Reading:
    """Which tensors of a network's output are compared, and what each of them holds.

    They are a model's ``logits``, or else all floating tensors with an entry for each sample. A run on few samples
    shows which operation made each of them. Where that says nothing, `settle` decides by their values.
    """

    def __init__(
        self, model: nn.Module, call: Call, outputs: Outputs | None, objective: str = "auto", *, are_whole: bool = False
    ) -> None:
        self.outputs, self._objective = outputs, objective
        self._places: tuple[int, ...] | None = None  # of the floating tensors that have an entry for each sample
        self.kinds: tuple[OutputKind, ...] = ()
        is_cut = not are_whole and batch_size(call) > 1 and not lists_of_samples((*call[0], *call[1].values()))
        count = min(READ, batch_size(call))
        few = take_samples(call, torch.arange(count)) if is_cut else call
        with evaluation_mode(model), torch.no_grad(), operations_noted(model) as operations:
            answer = model(*few[0], **few[1])
            entries = self._entries(answer, few)
        if is_cut:
            # One run can't distinguish outputs from a tensor that happens to be as long, such as anchors of shape
            # (1, n, 4) beside the output for one image.
            fewer = take_samples(call, torch.arange(count - 1))
            with evaluation_mode(model), torch.no_grad():
                fewer_tensors = self._entries(model(*fewer[0], **fewer[1]), fewer)
            if len(entries) == len(fewer_tensors):  # otherwise the number of tensors depends on the samples
                pairs = enumerate(zip(entries, fewer_tensors, strict=True))
                self._places = tuple(
                    place
                    for place, (tensor, fewer_tensor) in pairs
                    if len(tensor) == count and len(fewer_tensor) == count - 1
                )
        self._origins: list[Origin | None] = []
        self._names: list[str] = []
        self.named = ComparedOutputs((), ())
        with suppress(ConfigError):  # outputs without an entry per sample, such as lists of boxes, are numbers
            tensors = self.read(answer, few, entry_count(answer, few, outputs) if not is_cut else count)
            self._origins = [operations.get(tensor) for tensor in tensors]
            names = {id(tensor): name for name, tensor in returned_by_name(answer)}
            self._names = [names.get(id(tensor), "") for tensor in tensors]
            if outputs is None:
                self.named = compared_outputs(answer, tensors)
            # A single tensor of scores, (samples, classes), is all that many classifiers return.
            self._is_single = tensors[0] is (answer if outputs is None else entries[0]) and len(entries) == 1

    def read(self, answer: Any, call: Call, count: int) -> list[Tensor]:
        """Return the outputs to compare for a call of ``count`` samples."""
        chosen, source = answer, "a model's output"
        if self.outputs is not None:
            chosen, source = self.outputs(answer, as_in_batch(call)), "what outputs= returns"
        logits = _logits_of(chosen)
        if logits is not None:
            return [logits]
        entries, places = _with_entries(chosen), self._places
        tensors = [
            tensor
            for place, tensor in enumerate(entries)
            if len(tensor) == count and (places is None or place in places)
        ]
        if not tensors:
            description = f"{in_words(chosen)} for {count} samples"
            if any(len(tensor) == count for tensor in entries):
                description += ", whose length doesn't depend on the number of samples"
            if isinstance(chosen, Tensor) and chosen.is_floating_point() and chosen.shape[1:2] == (count,):
                description += (
                    "; if the samples are its second dimension, outputs=lambda output, inputs: output.transpose(0, 1)"
                )
            raise ConfigError(f"{source} must hold a floating tensor with an entry per sample, got {description}")
        return tensors

    def settle(self, values: Iterable[Sequence[Tensor]]) -> None:
        """Decide what each output holds, by the operations that made it or by values of several batches.

        Pass all samples, or many: a few scores may lie in [0, 1] by chance.
        """
        batches = list(values)
        kinds = []
        for place, origin in enumerate(self._origins):
            tensors = [batch[place].detach() for batch in batches if place < len(batch)]
            step = -(-sum(tensor.numel() for tensor in tensors) // _MOST_VALUES)
            tensors = [tensor[:: max(step, 1)] for tensor in tensors]
            kind = kind_of(tensors, origin, is_named="logits" in self._names[place], is_single=self._is_single)
            if self._objective != "auto" and kind.objective != self._objective:
                axis = kind.axis if kind.axis != -1 or origin is None else origin.axis
                is_share = all(bool(((tensor >= 0.0) & (tensor <= 1.0)).all()) for tensor in tensors)
                form: Any = "probabilities" if self._objective == "binary" and is_share else "scores"
                kind = OutputKind(OBJECTIVES[self._objective], form, axis or -1, "objective=")
            kinds.append(kind)
        self.kinds = tuple(kinds)

    def kind(self, place: int) -> OutputKind:
        """Return what an output holds; outputs beyond those of the first samples, as of detectors, are numbers."""
        return self.kinds[place] if place < len(self.kinds) else NUMBERS

    def aligned(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return outputs with classes, or a vector's numbers, in the last dimension."""
        return [self.kind(place).aligned(tensor) for place, tensor in enumerate(tensors)]

    def sentence(self, tensors: Sequence[Tensor], *, with_agreement: bool = True) -> str:
        """Return what the outputs hold, in words; empty if they have no entry per sample."""
        pairs = zip(self.kinds, tensors, strict=False)
        sentences = [kind.sentence(tensor, with_agreement=with_agreement) for kind, tensor in pairs]
        if len(sentences) > 1:
            names = (name or f"output[{place}]" for place, name in enumerate(self._names))
            sentences = [f"{name}: {sentence}" for name, sentence in zip(names, sentences, strict=True)]
        return f"outputs: {'. '.join(sentences)}" if sentences else ""

    def _entries(self, answer: Any, call: Call) -> list[Tensor]:
        return _with_entries(answer if self.outputs is None else self.outputs(answer, as_in_batch(call)))


def _logits_of(answer: Any) -> Tensor | None:
    logits = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def entry_count(answer: Any, call: Call, outputs: Outputs | None) -> int:
    """Return the number of samples of a whole batch: the length of its inputs, or else that of all outputs.

    The outputs for a batch of graphs have an entry for each graph, its inputs one for each node.
    """
    lengths = {
        len(tensor) for tensor in _with_entries(answer if outputs is None else outputs(answer, as_in_batch(call)))
    }
    count = batch_size(call)
    return count if count in lengths or len(lengths) != 1 else lengths.pop()


def as_in_batch(call: Call) -> Any:
    """Return a call's inputs as a batch holds them: a tensor; for several arguments their tuple or dict."""
    args, kwargs = call
    return kwargs or (args[0] if len(args) == 1 else args)


def _with_entries(answer: Any) -> list[Tensor]:
    """Return the floating tensors of a model's output that have a first dimension."""
    return [tensor for tensor in returned_tensors(answer) if tensor.is_floating_point() and tensor.dim()]


class ComparedOutputs(NamedTuple):
    """Names of a model's outputs that are compared with the unpruned network's, and the others; ``str`` is a sentence.

    Both are empty with a user's ``outputs=``.
    """

    compared: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        verb = "is" if len(self.compared) == 1 else "are"
        return (
            f"of the model's outputs {listed(self.compared)} {verb} compared, but not {listed(self.left_out)}: "
            f"{advice('outputs=', 'in Python, outputs=')} chooses others, e.g. outputs=lambda output, inputs: "
            "tuple(output.values())"
        )


def compared_outputs(answer: Any, read: Sequence[Tensor]) -> ComparedOutputs:
    """Return which tensors of a model's output are compared, given those that `read_outputs` returned."""
    chosen = {id(tensor) for tensor in read}
    compared: list[str] = []
    left_out: list[str] = []
    for name, tensor in returned_by_name(answer):
        (compared if id(tensor) in chosen else left_out).append(name)
    return ComparedOutputs(tuple(compared), tuple(left_out))


def unpadded(outputs: list[Tensor], real: Tensor | None) -> list[Tensor]:
    """Return outputs by position without padding, ``(positions, ...)``, and other outputs unchanged."""
    if real is None:
        return outputs
    return [
        output[real.to(output.device)] if output.dim() > 2 and output.shape[:2] == real.shape else output
        for output in outputs
    ]


def minus(output: Tensor, target: Tensor) -> Tensor:
    """Return `output` minus `target`: zero where both are the same infinity, as masked scores are."""
    return torch.where(output == target, 0.0, output - target)


def finite(outputs: Tensor) -> Tensor:
    """Return outputs with zero in place of values that aren't finite, such as masked scores."""
    return outputs.nan_to_num(0.0, 0.0, 0.0)


def mean_distances(outputs: list[Tensor], targets: list[Tensor], scales: list[float]) -> list[Tensor]:
    """Return the mean squared distance of each output, divided by its variance."""
    return [
        minus(output, target).square().mean() / scale
        for output, target, scale in zip(outputs, targets, scales, strict=True)
    ]


def shared_blocks(
    unpruned: nn.Module, student: nn.Module, call: Call, place: tuple[torch.device, torch.dtype]
) -> list[str]:
    """Return the blocks whose last output has the same shape in both networks, in the order of their calls.

    A block is an entry of an ``nn.ModuleList`` or ``nn.Sequential`` that holds at least two layers with weights.
    """
    shapes: list[dict[str, Any]] = []
    for net in (unpruned, student):
        names = [
            f"{parent}.{key}".lstrip(".")
            for parent, module in net.named_modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential))
            for key, child in module._modules.items()
            if child is not None and sum(bool(list(layer.parameters(recurse=False))) for layer in child.modules()) > 1
        ]
        args, kwargs = on_device(cast_floats(call, place[1]) if net is student else call, device_of(net))
        with evaluation_mode(net), torch.no_grad(), blocks_seen(net, names) as seen:
            net(*args, **kwargs)
        shapes.append({name: output.shape for name, output in seen.items()})
    return [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]


@contextmanager
def blocks_seen(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect by name the first floating tensor of each module's last output, with at least two dimensions."""
    seen: dict[str, Tensor] = {}

    def look(name: str, output: Any) -> None:
        tensors = [tensor for tensor in tensors_of(output) if tensor.is_floating_point() and tensor.dim() > 1]
        if tensors:
            seen[name] = tensors[0]

    looks = [(net.get_submodule(name), lambda _, output, name=name: look(name, output)) for name in names]
    with watched(leaving=looks):
        yield seen


def in_words(value: Any) -> str:
    """Return a value's type, and the shapes of its tensors, for an error."""
    shapes = [f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in tensors_of(value)]
    return f"{type(value).__name__} ({listed(shapes)})" if shapes else type(value).__name__
