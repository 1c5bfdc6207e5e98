"""Block by block: the parameters of each pruned block learn the outputs of the unpruned block by gradients.

A closed form solves one layer, and looks no further than the next sum. Between the layers of a block are attention,
norms and activations. Here all weights of a block move together, by gradients of that block alone [1]_. Its inputs come
through the pruned blocks before it, which have learned already, so that it also makes up for their errors. The steps
are those of `distill`: a range test finds the rate, held-out samples end them.

References
----------
.. [1] M. Wagner et al., "A free lunch in LLM compression: revisiting retraining after pruning",
   https://arxiv.org/abs/2510.14444
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from nni_topo.errors import DataError
from nni_topo.network.layers.kinds import PER_CHANNEL, WEIGHTED
from nni_topo.network.runtime.calibration import BatchStore, nbytes_of
from nni_topo.network.runtime.memory import out_of_memory
from nni_topo.network.runtime.progress import bar
from nni_topo.recovery.course import RATES, Course, Training, try_rates
from nni_topo.recovery.networks import Networks
from nni_topo.recovery.reconstruct import Reconstruct
from nni_topo.recovery.registry import Tools
from nni_topo.recovery.replay import Replay
from nni_topo.recovery.report import LayerReport
from nni_topo.recovery.samples import HELD_OUT_ENTRIES, Task
from nni_topo.recovery.windows import Segment, Stretch, alive, entering, floats, moments, segments
from nni_topo.rules import NONE, check_fields, number, whole
from nni_topo.sharing import find_ties

_LOOKED_AT = 64  # most held-out samples for the loss during training; the result is judged by all
_REPORTED = 256  # most training samples for the errors in the report
_AT_ONCE = 256  # batch size without gradients
_TOGETHER = 4  # neighbouring stretches that are trained together: of a transformer, two attention layers and two MLPs
_LEAST_VARIANCE = 1e-12

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Block(Reconstruct):
    """After :class:`Reconstruct`, let all parameters of each block learn the unpruned block's outputs by gradients."""

    # Gradient steps for each block at most, at least 1. They end earlier where the held-out error makes no more
    # progress.
    steps: int = 200
    # Learning rate of AdamW at its highest, above 0. None: a range test finds it, for each block anew.
    lr: float | None = None
    # Samples a step, at least 1.
    batch_size: int = 32

    def __post_init__(self) -> None:
        counts = {"refine": whole(0), "steps": whole(1), "batch_size": whole(1)}
        check_fields(self, "block", lr=number(0.0, closed="neither") | NONE, **counts)

    def after(self, tasks: Sequence[Task], networks: Networks, tools: Tools) -> tuple[LayerReport, ...]:
        """Train the blocks one after the other."""
        del tasks
        replay = tools.new_replay()
        learners = _learners(networks, replay.touched_nodes)
        layers: list[Node] = []
        for node, names in learners.items():
            if any(networks.pruned.get_parameter(name).dim() > 1 for name in names):  # not a norm's alone
                layers.append(node)
        found = segments(replay.nodes, replay.touched_nodes, layers, _TOGETHER)[::_TOGETHER]
        if not found:
            return ()
        if not bool(tools.held_out.any()):
            _logger.warning(
                "blocks stay as the closed form leaves them: of %d samples none is held out, which takes at least %d",
                tools.images,
                HELD_OUT_ENTRIES,
            )
            return ()
        reports = list[LayerReport]()
        rates: Sequence[float] = RATES
        for segment in bar("learn blocks", tools.progress, found):
            names = []
            for node, own in learners.items():
                if segment.first <= replay.order[node] <= segment.last:
                    names += own
            values = _Values(replay, segment, tools)
            block = _Learning(self, networks, segment, names, values, tools.seed)
            try:
                report = block.run(rates)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                first_line = str(error).splitlines()[0]
                _logger.warning("%s can't learn and stay as the closed form leaves them: %s", block.layers, first_line)
                continue
            reports.append(report)
            # A rate that breaks one block usually breaks the next one, too.
            rates = tuple(each for each in RATES if each <= report.lr) or rates
        return tuple(reports)


def _learners(networks: Networks, touched: Collection[Node]) -> dict[Node, list[str]]:
    """Return the parameters to train by the node that uses them: those of layers and norms that are used once."""
    nodes = networks.unpruned.graph.nodes
    called = [str(node.target) for node in nodes if node.op == "call_module"]
    used = [str(node.target) for node in nodes if node.op in ("call_module", "get_attr")]
    tied = {name for names in find_ties(networks.result) for name in names}
    result = dict(networks.result.named_parameters())
    owners: dict[str, str] = {}  # by parameter that may learn, its layer
    for owner, module in networks.pruned.named_modules():
        if isinstance(module, (*WEIGHTED, *PER_CHANNEL)):
            for key, parameter in module.named_parameters(owner, recurse=False):
                # In the result, a computed weight has other names.
                if key in result and result[key].shape == parameter.shape and key not in tied:
                    owners[key] = owner
    found: dict[Node, list[str]] = {}
    for node in nodes:
        if node not in touched:
            continue
        # In a graph, attention is an argument of a function, inside of which all its layers but the last one run.
        targets = [str(each.target) for each in node.all_input_nodes if each.op == "get_attr"]
        if node.op == "call_module":
            targets.append(str(node.target))
        names = []
        for target in targets:
            for key, owner in owners.items():
                is_inside = f"{owner}.".startswith(f"{target}.")
                is_elsewhere = owner in called and owner != str(node.target)
                if is_inside and not is_elsewhere and used.count(target) == 1:
                    names.append(key)
        if names:
            found[node] = names
    return found


class _Part(NamedTuple):
    """Some samples of a block."""

    entering: list[Any]  # in the pruned network
    wanted: list[Tensor]  # of the unpruned network, at the place
    real: Tensor | None  # which positions aren't padding: bool, (samples, positions)
    rows: Tensor | None = None  # which samples count: bool, (samples,); None: all

    def taken(self, index: Tensor) -> _Part:
        """Return some of the samples."""
        entered, wanted = ([each[index.to(each.device)] for each in values] for values in (self.entering, self.wanted))
        return _Part(entered, wanted, None if self.real is None else self.real[index.to(self.real.device)])


def _joined(parts: Sequence[_Part]) -> _Part:
    """Concatenate samples of several batches."""
    if len(parts) == 1:
        return parts[0]
    entered = [torch.cat(each) for each in zip(*(part.entering for part in parts), strict=True)]
    wanted = [torch.cat(each) for each in zip(*(part.wanted for part in parts), strict=True)]
    real = [part.real for part in parts if part.real is not None]
    return _Part(entered, wanted, torch.cat(real) if real else None)


class _Values:
    """The inputs of a block and its targets for all samples, in memory up to a limit, then in files.

    Samples are mixed across batches if all tensors have an entry for each sample.
    """

    def __init__(self, replay: Replay, segment: Segment, tools: Tools) -> None:
        self.held_out, place = tools.held_out, segment.place
        read = entering(segment, replay.nodes)
        self._sizes = list[int]()
        extremes = list[list[Tensor]]()
        self._store: Any = BatchStore(tools.cache_bytes)
        shapes = list[Any]()
        for index, (unpruned, pruned) in enumerate(replay.run(segment.first, [*read, place])):
            size = tools.sizes[index]
            given = [_in_single(pruned[node]) for node in read]
            wanted, reached = ([_in_single(each) for each in floats(net[place])] for net in (unpruned, pruned))
            part = _Part(given, wanted, replay.unpadded())
            extremes.append([torch.stack([each.amin(0), each.amax(0)]) for each in reached])
            if not self._store.has_room(nbytes_of(part)):
                raise DataError(
                    f"the values of a block must fit into {self._store.limit}, got {tools.images} samples with "
                    f"{nbytes_of(part) / size / 2**20:.1f} MiB each: fewer samples take less ({place.name})"
                )
            self._store.append(part)
            self._sizes.append(size)
            found = [*given, *wanted]
            is_by_sample = all(isinstance(each, Tensor) and each.dim() and len(each) == size for each in found)
            shapes.append([each.shape[1:] for each in found] if is_by_sample else None)
        self.lives = alive(extremes)  # which values differ between samples in the pruned network
        self._are_mixed = shapes[0] is not None and all(each == shapes[0] for each in shapes)
        if self._are_mixed and self._store.nbytes <= tools.cache_bytes:
            self._store, self._sizes = [_joined(list(self))], [sum(self._sizes)]

    def __iter__(self) -> Iterator[_Part]:
        """Yield all samples, batch by batch."""
        yield from self._store

    def parts(self, index: Tensor, size: int) -> Iterator[_Part]:
        """Yield samples by index in batches of ``size``; if samples aren't mixed, in the given batches."""
        starts = torch.tensor([0, *self._sizes]).cumsum(0)
        if self._are_mixed:
            for chosen in index.tensor_split(-(-len(index) // size)):
                found = []
                for batch, (first, end) in enumerate(itertools.pairwise(starts.tolist())):
                    own = chosen[(chosen >= first) & (chosen < end)] - first
                    if len(own):
                        found.append(self._store[batch].taken(own))
                yield _joined(found)
            return
        batches = torch.bucketize(index, starts[1:], right=True).tolist()
        for batch in dict.fromkeys(batches):
            rows = torch.zeros(self._sizes[batch], dtype=torch.bool)
            own = index[(index >= starts[batch]) & (index < starts[batch + 1])] - starts[batch]
            rows[own] = True
            yield self._store[batch]._replace(rows=rows)


def _in_single(value: Any) -> Any:
    """Return a value, a tensor of half precision in single precision."""
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


class _Learning:
    """The training of one block."""

    def __init__(
        self, knobs: Block, networks: Networks, segment: Segment, names: list[str], values: _Values, seed: int
    ) -> None:
        self._knobs, self._networks, self._segment, self._names = knobs, networks, segment, names
        self._values, self._seed = values, seed
        index = torch.arange(len(values.held_out))
        self._held, self._learned = index[values.held_out], index[~values.held_out]
        found = [[moments(each) for each in self._counted(part.wanted, part)] for part in values]
        sums = [torch.stack(each).sum(0) for each in zip(*found, strict=True)]
        self._scales = [float(square - total.square() / count) / float(count) for count, total, square in sums]
        self._scales = [max(each, _LEAST_VARIANCE) for each in self._scales]
        self.samples = int(sums[0][0]) if sums else 0

    def student(self) -> Stretch:
        """Return a copy of the block in which only the trained parameters require gradients."""
        stretch = Stretch(self._networks.pruned, self._segment)
        for name, parameter in stretch.body.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in self._names)
            if name in self._names:
                # Biases of removed channels, such as those that a depth-wise convolution adds, are zero here alone.
                kept = (parameter != 0) | (self._networks.result.get_parameter(name) == 0)
                parameter.register_hook(lambda gradient, kept=kept: gradient * kept)
        return stretch

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """Yield training batches, epoch after epoch."""
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            order = self._learned[torch.randperm(len(self._learned), generator=generator)]
            for part in self._values.parts(order, self._knobs.batch_size):
                if part.rows is None or bool(part.rows.any()):
                    yield part, part.wanted

    def objective(self, student: nn.Module, call: Any, wanted: list[Tensor]) -> Tensor:
        """Return the mean squared distance from the targets over their variance."""
        off = self._lacking(student, call, wanted)
        return torch.stack([each.square().mean() / scale for each, scale in zip(off, self._scales, strict=True)]).mean()

    def judge(self, student: nn.Module, index: Tensor) -> float:
        """Return the same over some samples."""
        squares, counts = [0.0] * len(self._scales), [0] * len(self._scales)
        with torch.no_grad():
            for part in self._values.parts(index, _AT_ONCE):
                for which, each in enumerate(self._lacking(student, part, part.wanted)):
                    squares[which] += float(each.double().square().sum())
                    counts[which] += each.numel()
        shares = [one / max(count, 1) / scale for one, count, scale in zip(squares, counts, self._scales, strict=True)]
        return sum(shares) / len(shares)

    @property
    def layers(self) -> str:
        """Names of the trained layers."""
        return ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in self._names))

    def run(self, rates: Sequence[float]) -> LayerReport:
        """Train the block, and put the weights into the networks if the held-out error has fallen."""
        began = time.perf_counter()
        if not self._scales:
            raise RuntimeError(f"{self._segment.place.name} has no floating values")
        student, looked_at, reported = self.student(), self._held[:_LOOKED_AT], self._learned[:_REPORTED]
        before, held_before = self.judge(student, reported), self.judge(student, self._held)
        if not math.isfinite(before + held_before):
            raise DataError(f"activations must be finite, got NaN or infinity ({self.layers})")
        start = {name: student.body.get_parameter(name).detach().clone() for name in self._names}
        training = Training(
            student=self.student,
            batches=self.batches,
            objective=self.objective,
            total=self._knobs.steps,
            look=lambda net: self.judge(net, looked_at),
            first=self.judge(student, looked_at),
            constant=1.0,  # because errors are divided by the variance
        )
        rate = self._knobs.lr
        if rate is None:
            tried = try_rates(training, training.look, rates, progress=False)
            rate = next((each.lr for each in tried if each.is_taken), math.nan)
        after, held, is_kept = before, held_before, False
        if not math.isnan(rate):
            course = Course(training, rate, best_of=1)
            course.run(progress=False)
            is_best_at_end = not course.best or course.curve[-1].loss < course.least
            student.load_state_dict(course.student.state_dict() if is_best_at_end else course.best)
            after, held = self.judge(student, reported), self.judge(student, self._held)
            is_kept = held < held_before
        if is_kept:
            learned = dict(student.body.named_parameters())
            with torch.no_grad():
                for name in self._names:
                    change = learned[name] - start[name]
                    for net in (self._networks.pruned, self._networks.result):
                        parameter = net.get_parameter(name)
                        parameter.copy_((parameter + change).to(parameter.dtype))
        return LayerReport(
            layer=self.layers,
            place=self._segment.place.name,
            unknowns=sum(value.numel() for value in start.values()),
            samples=self.samples,
            ridge=0.0 if is_kept else math.inf,
            error_before=before,
            error_after=after if is_kept else before,
            error_held_out=held if is_kept else held_before,
            seconds=time.perf_counter() - began,
            lr=rate,
            is_kept=is_kept,
        )

    def _lacking(self, student: nn.Module, part: _Part, wanted: list[Tensor]) -> list[Tensor]:
        """Return the differences between a student's outputs and the targets, without padding."""
        found = floats(student(*part.entering))
        return self._counted([mine - meant for mine, meant in zip(found, wanted, strict=True)], part)

    def _counted(self, values: list[Tensor], part: _Part) -> list[Tensor]:
        """Return values without padding and unused samples; 0 where the pruned network's values are constant."""
        found = []
        for value, lives in zip(values, self._values.lives, strict=True):
            value = value if lives is None else value * lives
            rows = None if part.rows is None else part.rows.to(value.device)
            if part.real is not None and value.shape[:2] == part.real.shape:
                real = part.real.to(value.device)
                value = value[real if rows is None else real & rows[:, None]]
            elif rows is not None and value.dim() and len(value) % len(rows) == 0:
                value = value[rows.repeat_interleave(len(value) // len(rows))]
            found.append(value)
        return found
