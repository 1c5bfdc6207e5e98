"""Distillation without labels: a dense or masked network learns what the original says of unlabelled images [1]_.

The second step of a recovery. Compensation solves each layer alone and once; here all weights move together, a few
hundred steps of AdamW, on the images that compensation had. Classifiers learn softened class probabilities, whatever
else a network gives is met in squares.

References
----------
.. [1] G. Hinton, O. Vinyals and J. Dean, "Distilling the knowledge in a neural network",
   https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

import itertools
import logging
import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from tqdm import tqdm

from nni_topo.errors import SEED, ConfigError, DataError, check_integer, is_finite, unknown_name
from nni_topo.network.capture import batches_of
from nni_topo.network.files import whole_file
from nni_topo.network.inputs import Call, call_arguments, calls, cast_floats, on_device, tensors_of
from nni_topo.network.layers import TRANSPOSED
from nni_topo.network.masks import check_model
from nni_topo.network.modes import detached_copy, device_of, evaluation_mode, random_state_kept
from nni_topo.network.zeros import zeros_held
from nni_topo.recovery.compensating import survey
from nni_topo.sharing import named_tensors

Objective = Literal["auto", "kl", "squares"]
Augment = Callable[[Any], Any]
OBJECTIVES = ("auto", "kl", "squares")

_HELD_OUT = 8  # every eighth image judges
_STEPS, _PASSES = 600, 10
_BATCH_NORM_IMAGES = 256
_RATE, _RATE_WITH_NORMS = 1e-3, 3e-3
_VIEWS = 8
_AT_ONCE = 256
_FORMAT = "nni-topo distillation 1"
_SECONDS_A_STATE = 30.0
_MOMENTUM = 0.1  # of batch norms that have none of their own
_LEAST_VARIANCE = 1e-12

_logger = logging.getLogger(__name__)


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
        Share of them, in [0, 1], whose largest logit is the original's; NaN for ``"squares"``.
    is_kept : bool
        Whether what was learned is better there, and so is in ``model``: by agreement; by loss where that is equal, or
        none.
    images : int
        All images, those held out included.
    steps : int
        Gradient steps.
    seconds : float
        Wall time.
    """

    model: nn.Module
    objective: str
    loss_before: float
    loss_after: float
    agreement_before: float
    agreement_after: float
    is_kept: bool
    images: int
    steps: int
    seconds: float


def distill(
    dense: nn.Module,
    original: nn.Module,
    images: Iterable[Any] | Evaluator,
    *,
    objective: Objective = "auto",
    temperature: float = 2.0,
    steps: int | None = None,
    seconds: float | None = None,
    batch_size: int = 64,
    lr: float | None = None,
    augment: Augment | None = None,
    state: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Let a pruned network learn, without labels, to answer as the original does.

    Parameters
    ----------
    dense : torch.nn.Module
        The network that :func:`nni_topo.to_dense` or :func:`nni_topo.masked_model` returned, best after
        :func:`nni_topo.compensate`. It isn't changed.
    original : torch.nn.Module
        The trained network before pruning, with the same inputs and outputs. It isn't changed.
    images : iterable or nni.compression.utils.Evaluator
        Batches of inputs, or of ``(inputs, ...)``; labels aren't looked at. Of an evaluator, what it
        evaluates on. Inputs of all batches have one shape but for their number. Every eighth image is held out. Some
        1,000 are enough for small nets.
    objective : {"auto", "kl", "squares"}, default="auto"
        ``"kl"``: Kullback-Leibler divergence from the original's softened probabilities along the last axis.
        ``"squares"``: squared distance of all floating outputs, each as a share of its variance over the images.
        ``"auto"``: ``"kl"`` for outputs that are called ``logits`` and for a single tensor (images, classes), else
        ``"squares"``.
    temperature : float, default=2.0
        Logits are divided by it, above 0; for ``"kl"``.
    steps : int, optional
        Gradient steps, at least 1; by default 600, or ten passes over the images where that is more.
    seconds : float, optional
        Budget of wall time, above 0: steps end there, and the learning rate falls such that it ends with them. With a
        budget that binds, the result depends on the machine's speed.
    batch_size : int, default=64
        Images a step, at least 1.
    lr : float, optional
        Highest learning rate of AdamW, above 0, which falls along half a cosine; by default 1e-3, and 3e-3 where batch
        norms take their statistics from the batches, which they do with at least 256 images.
    augment : callable, optional
        Gets inputs as a batch holds them (a tensor; for several arguments their tuple or dict) and returns others,
        equally many. It draws from PyTorch's generators, as torchvision's transforms do. Up to eight views of the
        images are made, the first of them as they are.
    state : str or Path, optional
        File that gets the state every half minute and at the end. If it is there, learning goes on from it, to the same
        result on one machine.
    seed : int, default=0
        For the order of the images and what is held out; and of PyTorch's generators for ``augment``.
    progress : bool, default=False
        Show a bar on standard error.

    Returns
    -------
    torch.nn.Module
        A new model in the mode of ``dense``, module by module: what was learned if that is better on the images held
        out, else an equal copy. Masked weights stay zero.

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
    Dropout is off. Weight decay is 0. Half precision learns in single precision. The loss of ``"kl"`` is multiplied by
    the squared temperature.

    Cost: a step runs ``dense`` forward and back; ``original`` runs once over the images, or over each of their views.

    References
    ----------
    .. [1] G. Hinton, O. Vinyals and J. Dean, "Distilling the knowledge in a neural network",
       https://arxiv.org/abs/1503.02531

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
    return distillation(
        dense,
        original,
        images,
        objective=objective,
        temperature=temperature,
        steps=steps,
        seconds=seconds,
        batch_size=batch_size,
        lr=lr,
        augment=augment,
        state=state,
        seed=seed,
        progress=progress,
    ).model


def distillation(
    dense: nn.Module,
    original: nn.Module,
    images: Iterable[Any] | Evaluator,
    *,
    objective: Objective = "auto",
    temperature: float = 2.0,
    steps: int | None = None,
    seconds: float | None = None,
    batch_size: int = 64,
    lr: float | None = None,
    augment: Augment | None = None,
    state: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Distillation:
    """Distil a model and report what was done; parameters and errors are those of :func:`distill`."""
    began = time.perf_counter()
    if objective not in OBJECTIVES:
        raise unknown_name("objective", str(objective), OBJECTIVES)
    check_knobs(temperature, steps, seconds, batch_size, lr)
    SEED.check("seed", seed, "distill")
    for model in (original, dense):
        check_model(model)
    images = batches_of(images, original)
    survey(original, images)
    student = _student(dense)
    lesson = _Lesson(original, student, _joined(list(calls(dense, images))), objective, temperature)
    order = torch.randperm(lesson.images, generator=torch.Generator().manual_seed(seed))
    held, learned = order[::_HELD_OUT], order[torch.arange(len(order)) % _HELD_OUT != 0]
    if not len(learned):
        raise DataError(f"distillation must have at least two images, one to judge by, got {len(order)} (images)")
    before = lesson.judge(student, held)
    total = steps or max(_STEPS, _PASSES * math.ceil(len(learned) / batch_size))
    norms = [module for module in student.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    norms = norms if len(learned) >= _BATCH_NORM_IMAGES else []
    highest = lr or (_RATE_WITH_NORMS if norms else _RATE)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], weight_decay=0.0)
    knobs = {"steps": total, "seconds": seconds, "batch_size": batch_size, "lr": highest, "temperature": temperature}
    course = _Course({**knobs, "objective": lesson.kind, "seed": seed, "images": len(order)}, student, optimizer, state)
    batches = itertools.islice(lesson.batches(learned, batch_size, seed, augment), course.done, None)
    with _learning(student, norms):
        for share in course.shares(total, seconds, progress):
            optimizer.param_groups[0]["lr"] = highest * (1.0 + math.cos(math.pi * share)) / 2.0
            optimizer.zero_grad()
            lesson.objective(student, *next(batches)).backward()
            optimizer.step()
    after = lesson.judge(student, held)
    # Who learns from few images gets too sure of itself on others, which costs loss and no answer: answers come first.
    is_kept = (after[1], -after[0]) > (before[1], -before[0]) if lesson.kind == "kl" else after[0] < before[0]
    result = detached_copy(dense)
    if is_kept:
        _take_values(result, student)
    else:
        _logger.warning(
            "what was distilled is left out: held out it has loss %.3g and agreement %.3g, without it %.3g and %.3g",
            *after,
            *before,
        )
    took = time.perf_counter() - began
    judged = (before[0], after[0], before[1], after[1])
    return Distillation(result, lesson.kind, *judged, is_kept, len(order), course.done, took)


class _Lesson:
    """What the original says of some images, and how far another network is from it."""

    def __init__(self, original: nn.Module, student: nn.Module, pool: Call, objective: str, temperature: float) -> None:
        self._original, self._pool, self._temperature = original, pool, temperature
        self._place = next((p.device, p.dtype) for p in student.parameters() if p.requires_grad)
        self.images = len(tensors_of(pool)[0])
        self._wanted, likely = self._answers(pool)
        self.kind = likely if objective == "auto" else objective
        self._scales = [float(wanted.var(0, correction=0).mean()) + _LEAST_VARIANCE for wanted in self._wanted]
        found = self._run(student, _taken(pool, torch.arange(1)))
        shapes, expected = ([tuple(each.shape[1:]) for each in tensors] for tensors in (found, self._wanted))
        if shapes != expected:
            raise ConfigError(f"both models must give outputs of the same shapes, got {shapes} and {expected} (dense)")

    def judge(self, student: nn.Module, index: Tensor) -> tuple[float, float]:
        """Return the mean loss on some of the images in evaluation mode, and the share of largest logits that agree."""
        loss, agreed, answers = 0.0, 0.0, 0
        with evaluation_mode(student), torch.no_grad():
            for part in index.split(_AT_ONCE):
                wanted = [each[part.to(each.device)] for each in self._wanted]
                found = self._run(student, _taken(self._pool, part))
                loss += len(part) * float(self._loss(found, wanted))
                for mine, theirs in zip(found, wanted, strict=True):
                    agreed += float((mine.argmax(-1) == theirs.argmax(-1)).sum())
                    answers += theirs[..., 0].numel()
        return loss / len(index), agreed / answers if self.kind == "kl" else math.nan

    def objective(self, student: nn.Module, call: Call, wanted: list[Tensor]) -> Tensor:
        """Return the mean loss on a call of which the original says `wanted`."""
        return self._loss(self._run(student, call), wanted)

    def _loss(self, found: list[Tensor], wanted: list[Tensor]) -> Tensor:
        if self.kind == "squares":
            shares = [
                (mine - theirs).square().mean() / scale
                for mine, theirs, scale in zip(found, wanted, self._scales, strict=True)
            ]
            return torch.stack(shares).mean()
        t = self._temperature
        losses = [
            kl_div(log_softmax(mine / t, -1), log_softmax(theirs / t, -1), reduction="none", log_target=True)
            for mine, theirs in zip(found, wanted, strict=True)
        ]
        return torch.stack([t * t * each.sum(-1).mean() for each in losses]).mean()

    def batches(
        self, index: Tensor, size: int, seed: int, augment: Augment | None
    ) -> Iterator[tuple[Call, list[Tensor]]]:
        """Yield batches of some of the images, pass after pass, with what the original says of them."""
        generator = torch.Generator().manual_seed(seed)
        plain = _taken(self._pool, index)
        answers = {0: [each[index.to(each.device)] for each in self._wanted]}
        for turn in itertools.count():
            view = 0 if augment is None else turn % _VIEWS
            # Drawn again from the view's own seed: the original answers once, and one view at a time is in memory.
            call = plain if augment is None or view == 0 else _augmented(plain, augment, seed + view)
            if view not in answers:
                answers[view] = self._answers(call)[0]
            for chosen in torch.randperm(len(index), generator=generator).tensor_split(-(-len(index) // size)):
                yield _taken(call, chosen), [each[chosen.to(each.device)] for each in answers[view]]

    def _answers(self, call: Call) -> tuple[list[Tensor], str]:
        """Return all floating outputs of the original, and what should be made small for such."""
        place, found, kind = device_of(self._original), [], ""
        with evaluation_mode(self._original), torch.no_grad():
            for part in torch.arange(len(tensors_of(call)[0])).split(_AT_ONCE):
                args, kwargs = on_device(_taken(call, part), place)
                outputs, kind = _outputs(self._original(*args, **kwargs), len(part))
                found.append(on_device(outputs, self._place[0]))
        return [torch.cat(each).to(self._place[1]) for each in zip(*found, strict=True)], kind

    def _run(self, student: nn.Module, call: Call) -> list[Tensor]:
        args, kwargs = cast_floats(call, self._place[1])
        return _outputs(student(*args, **kwargs), len(tensors_of(call)[0]))[0]


def _outputs(found: Any, count: int) -> tuple[list[Tensor], str]:
    """Return the outputs to be met, of so many entries, and whether they are logits (``kl``) or not (``squares``)."""
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        return [logits], "kl"
    tensors = [each for each in tensors_of(found) if each.is_floating_point() and each.dim() and len(each) == count]
    if not tensors:
        raise ConfigError(
            f"a model's output must hold a floating tensor with an entry per image, got {type(found).__name__}"
        )
    return tensors, "kl" if found is tensors[0] and found.dim() == 2 and found.shape[1] > 1 else "squares"


def _joined(parts: list[Call]) -> Call:
    """Make one call of several; a DataError if their inputs don't fit together."""
    flat = [tree_flatten(part) for part in parts]
    leaves = []
    for column in zip(*(values for values, _ in flat), strict=False):
        shapes = {tuple(each.shape[1:]) for each in column if isinstance(each, Tensor) and each.dim()}
        if len(shapes) > 1 or any(spec != flat[0][1] for _, spec in flat):
            raise DataError(f"inputs of all batches must have one shape but for their number, got {sorted(shapes)}")
        leaves.append(torch.cat(column) if shapes else column[0])
    joined: Call = tree_unflatten(leaves, flat[0][1])
    return joined


def _taken(call: Call, index: Tensor) -> Call:
    """Return the entries `index` of a call."""
    count = len(tensors_of(call)[0])
    taken: Call = tree_map_only(
        Tensor, lambda each: each[index.to(each.device)] if each.dim() and len(each) == count else each, call
    )
    return taken


def _augmented(call: Call, augment: Augment, seed: int) -> Call:
    """Return another view of a call's inputs; the global generators are left as they were."""
    count = len(tensors_of(call)[0])
    views = []
    with random_state_kept():
        torch.manual_seed(seed)
        for part in torch.arange(count).split(_AT_ONCE):
            args, kwargs = _taken(call, part)
            views.append(call_arguments(augment(kwargs or (args[0] if len(args) == 1 else args))))
    view = _joined(views)
    if len(tensors_of(view)[0]) != count:
        raise ConfigError(f"augment must return as many images as it gets, {count}, got {len(tensors_of(view)[0])}")
    return view


def _student(dense: nn.Module) -> nn.Module:
    """Return a copy that can learn: in evaluation mode, in single precision at least."""
    # Laid out as CPUs convolve faster.
    student: nn.Module = detached_copy(dense).eval().to(memory_format=torch.channels_last)
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ConfigError("a model must have parameters that require gradients, got none (dense)")
    is_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in student.parameters())
    return student.float() if is_half else student


@contextmanager
def _learning(student: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Let gradients be taken and some batch norms use their batches; what masks have made zero stays zero."""
    handles = []
    for module in student.modules():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or bias is None:
            continue
        # A channel of zeros would come back by its bias, or by its norm's factor.
        rows = weight.detach().movedim(int(isinstance(module, TRANSPOSED)), 0)
        lives = rows.reshape(len(rows), -1).any(1)
        if lives.shape == bias.shape:
            lives |= bias.detach() != 0
            vectors = (each for each in (weight, bias) if each.dim() == 1 and each.requires_grad)
            handles += [each.register_hook(lambda gradient, lives=lives: gradient * lives) for each in vectors]
    for norm in norms:
        norm.train()
        norm.momentum = norm.momentum or _MOMENTUM
    try:
        with zeros_held(student), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Course:
    """How many steps are behind, and the file from which they go on."""

    def __init__(
        self, kind: dict[str, Any], student: nn.Module, optimizer: torch.optim.Optimizer, path: str | Path | None
    ) -> None:
        self.kind, self.student, self.optimizer = kind, student, optimizer
        self.path = None if path is None else Path(path)
        self.done, self.spent = 0, 0.0
        if self.path is not None and self.path.exists():
            self._resume(self.path)

    def shares(self, total: int, seconds: float | None, progress: bool) -> Iterator[float]:
        """Yield before each step the share of steps, or of time, that is behind."""
        began = kept = time.perf_counter() - self.spent
        for step in tqdm(range(self.done, total), desc="distill", initial=self.done, total=total, disable=not progress):
            self.spent = time.perf_counter() - began
            share = max(step / total, 0.0 if seconds is None else self.spent / seconds)
            if share >= 1.0:
                break
            yield share
            self.done += 1
            if time.perf_counter() - kept >= _SECONDS_A_STATE:
                self._keep()
                kept = time.perf_counter()
        self._keep()

    def _keep(self) -> None:
        if self.path is not None:
            now = {"done": self.done, "spent": self.spent, "model": self.student.state_dict()}
            with whole_file(self.path) as part:
                torch.save(
                    {"format": _FORMAT, "kind": self.kind, **now, "optimizer": self.optimizer.state_dict()}, part
                )

    def _resume(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["format"] != _FORMAT:
                raise KeyError(state["format"])
            self.student.load_state_dict(state["model"])
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"a state must be a whole file of this distillation, got: {reason} ({path})") from error
        for key, value in self.kind.items():
            if state["kind"].get(key) != value:
                raise ConfigError(f"distillation must go on with {key} {state['kind'].get(key)}, got {value} ({path})")
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.spent = state["done"], state["spent"]


def _take_values(model: nn.Module, other: nn.Module) -> None:
    """Give a model another's parameters and buffers, in its own types."""
    values = named_tensors(other)
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            tensor.copy_(values[name])


def check_knobs(temperature: Any, steps: Any, seconds: Any, batch_size: Any, lr: Any) -> None:
    """Raise a ConfigError for numbers that :func:`distill` can't use; None stands for its own choice."""
    for name, value in (("temperature", temperature), ("seconds", seconds), ("lr", lr)):
        if (value is not None or name == "temperature") and not (is_finite(value) and value > 0.0):
            raise ConfigError(f"{name} must be a finite number above 0, got {value!r} (distill)")
    check_integer("steps", 1 if steps is None else steps, 1, "distill")
    check_integer("batch_size", batch_size, 1, "distill")
