"""Several layers ahead: the layers of a block are solved for the unpruned network's values some layers later.

The recovery method "ahead" of ``bench_recovery_rules.py``: after `Reconstruct` the weights and constants of two
neighbouring blocks take damped Gauss-Newton steps for the values at a later place, so that errors of earlier layers are
corrected as well. The layers between don't change meanwhile. SNOWS does so for single weights with the full Hessian
[1]_; here whole channels are pruned, and Gauss-Newton leaves out second derivatives. The steps are found by conjugate
gradients from products with Jacobians, forward and backward [2]_.

It isn't part of the package because it takes as long as distillation and gains less (``archive/recovery_methods.md``).
Importing this module registers the name::

    from benchmarks.recovery import ahead

    nni_topo.compensate(model, masks, batches, method=ahead.Ahead(layers=4))

References
----------
.. [1] R. Lucas and R. Mazumder, "Preserving deep representations in one-shot pruning: a Hessian-free second-order
   optimization framework", https://arxiv.org/abs/2411.18376
.. [2] J. Martens, "Deep learning via Hessian-free optimization", ICML 2010,
   https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from nni_topo import RecoveryInfo, register_recovery
from nni_topo.errors import DataError
from nni_topo.network.layers.kinds import by_output, is_plain_norm, of_output, through_norms
from nni_topo.network.runtime.inputs import tensors_of
from nni_topo.network.runtime.progress import bar
from nni_topo.recovery.networks import Networks
from nni_topo.recovery.reconstruct import Reconstruct, ReconstructTask, add_constant
from nni_topo.recovery.registry import Tools
from nni_topo.recovery.replay import Replay, Values
from nni_topo.recovery.report import LayerReport
from nni_topo.recovery.samples import Task
from nni_topo.recovery.windows import Segment, alive, entering, floats, moments, segments
from nni_topo.rules import check_fields, whole

Vector = list[Tensor]

_TOGETHER = 2  # blocks that are solved at once
_STEPS, _ITERATIONS, _DAMPING = 4, 6, 1e-2
_IMAGES_A_PRODUCT = 128
_LEAST_VARIANCE = 1e-12
_SHORTER = (1.0, 0.5, 0.25)  # shares of a step, tried one after the other
_CHANGE = 3.0  # of the damping, from step to step
_TINY = 1e-30

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Batch:
    """What enters a window in the pruned network, the unpruned values at its end, and where there is no padding."""

    entering: dict[str, Any]
    wanted: list[Tensor]
    reached: list[Tensor]  # what the pruned network had there at first
    real: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in [*tensors_of(self.entering), *self.wanted, *self.reached])


@dataclass(frozen=True)
class Ahead(Reconstruct):
    """After :class:`Reconstruct`, solve the layers of each block for the unpruned values several layers ahead."""

    # So many layers that are solved, at least 1, lie between a block and the place where the unpruned network's
    # values are the target; the network's output where there are fewer.
    layers: int = 4

    def __post_init__(self) -> None:
        check_fields(self, "ahead", refine=whole(0), layers=whole(1))

    def after(self, tasks: Sequence[Task], networks: Networks, tools: Tools) -> tuple[LayerReport, ...]:
        """Solve the layers block by block."""
        # Another pass from the inputs on: the first one has cached values after layers that change again.
        return look_ahead(
            tools.new_replay(),
            networks,
            tasks,
            tools.images,
            ahead=self.layers,
            seed=tools.seed,
            cache_bytes=tools.cache_bytes,
            progress=tools.progress,
        )


def look_ahead(
    replay: Replay,
    networks: Networks,
    tasks: Sequence[Task],
    images: int,
    *,
    ahead: int,
    seed: int,
    cache_bytes: int,
    progress: bool | None,
) -> tuple[LayerReport, ...]:
    """Solve the layers of `tasks`, which are done, block by block for places so many layers after them."""
    by_node = {task.layer.node: task for task in tasks if isinstance(task, ReconstructTask)}
    found = _with_places_ahead(replay, by_node, ahead)
    reports = []
    for segment in bar("look ahead", progress, found):
        window = Window(segment, networks.pruned, by_node)
        data = _Data(replay, segment, entering(segment, replay.nodes), cache_bytes)
        try:
            unknowns, report = _solved(segment, window, data, images, seed)
        except NotImplementedError as error:
            _logger.warning(
                "the layers after %s can't be taken into account, an operation has no forward derivative: %s",
                _names(segment),
                error,
            )
            continue
        window.put((networks.pruned, networks.result), unknowns)
        reports.append(report)
    return tuple(reports)


def _with_places_ahead(replay: Replay, layers: Collection[Node], ahead: int) -> list[Segment]:
    """Return the blocks, each with the end of the first block that leaves so many layers in between, or the output."""
    ends = [each.last for each in segments(replay.nodes, replay.touched_nodes, layers, 1)]
    found = []
    for segment in segments(replay.nodes, replay.touched_nodes, layers, _TOGETHER):
        place = replay.nodes[-1]
        for end in ends:
            if end >= segment.last and sum(segment.last < replay.order[layer] <= end for layer in layers) >= ahead:
                place = replay.nodes[end]
                break
        found.append(replace(segment, place=place))
    return found


def _solved(segment: Segment, window: Window, data: _Data, images: int, seed: int) -> tuple[Vector, LayerReport]:
    """Return what a stretch's unknowns become, and the report."""
    began = time.perf_counter()
    problem, start = _Problem(window, data, images), window.start()
    # The other kernels of attention have no forward derivatives.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        unknowns, after, before = gauss_newton(problem, start, seed)
    if not math.isfinite(before):
        raise DataError(f"activations must be finite, got NaN or infinity ({segment.place.name})")
    report = LayerReport(
        layer=_names(segment),
        place=segment.place.name,
        unknowns=sum(each.numel() for each in start),
        samples=problem.samples,
        ridge=_DAMPING,
        error_before=before,
        error_after=after,
        error_held_out=math.nan,
        seconds=time.perf_counter() - began,
    )
    return unknowns, report


def _names(segment: Segment) -> str:
    return ", ".join(str(layer.target) for layer in segment.layers)


class _Data:
    """The batches of a stretch: kept where they fit into memory, or the networks run again for each pass."""

    def __init__(self, replay: Replay, segment: Segment, read: list[Node], cache_bytes: int) -> None:
        self._replay, self._segment, self._read = replay, segment, read
        self._cache_bytes = cache_bytes
        self._kept: list[_Batch] | None = None

    def __iter__(self) -> Iterator[_Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[_Batch] | None = []
        size = 0
        place = self._segment.place
        for unpruned, pruned in self._replay.run(self._segment.first, [*self._read, place]):
            values = {node.name: pruned[node] for node in self._read}
            there = floats(unpruned[place]), floats(pruned[place])
            batch = _Batch(values, *there, self._replay.unpadded())
            size += batch.nbytes
            kept = [*kept, batch] if kept is not None and size <= self._cache_bytes else None
            yield batch
        self._kept = kept


class _Problem:
    """The squared error at the end of a window, as a share of the unpruned network's variance there."""

    # The gradient is that of all images. Products, which most of the time goes into, are those of every so many a
    # batch, others at each step.

    def __init__(self, window: Window, data: _Data, images: int) -> None:
        self._window, self._data = window, data
        self._turn, self._few = 0, list[tuple[_Batch, Vector, list[Tensor]]]()
        self._lives = alive(batch.reached for batch in data)
        found = [[moments(each) for each in self._unpadded(batch.wanted, batch)] for batch in data]
        sums = [torch.stack(each).sum(0) for each in zip(*found, strict=True)]
        # Of what is alive alone: the rest is an error that no weight changes.
        spreads = [float(square - total.square() / number) for number, total, square in sums]
        self._weights = [1.0 / (len(sums) * max(spread, _LEAST_VARIANCE)) for spread in spreads]
        self.samples = int(sums[0][0])
        self._stride = min(len(found), max(1, images // _IMAGES_A_PRODUCT))

    def error(self, at: Vector) -> float:
        """Return the error over all images."""
        with torch.no_grad():
            return sum(float(self._squares(self._lacking(batch, at)).detach()) for batch in self._data)

    def gradient(self, at: Vector) -> Vector:
        """Return half the gradient of the error, and choose the batches of the products that follow."""
        found = [torch.zeros_like(each) for each in at]
        self._few = []
        for index, batch in enumerate(self._data):
            leaves = [each.detach().requires_grad_() for each in at]
            lacking = self._lacking(batch, leaves)
            is_chosen = (index + self._turn) % self._stride == 0
            half = 0.5 * self._squares(lacking)
            found = _summed(found, torch.autograd.grad(half, leaves, retain_graph=is_chosen, allow_unused=True))
            if is_chosen:
                self._few.append((batch, leaves, lacking))
        self._turn += 1
        return found

    def product(self, at: Vector, vector: Vector) -> Vector:
        """Return the Gauss-Newton matrix times a vector, of some batches, as if these were all."""
        found = [torch.zeros_like(each) for each in at]
        for batch, leaves, lacking in self._few:
            # Forward for J v, without a graph of its own, and backward for J^T (J v) through the one that is there.
            with torch.no_grad(), forward_ad.dual_level():
                duals = [forward_ad.make_dual(*pair) for pair in zip(at, vector, strict=True)]
                reached = [forward_ad.unpack_dual(each) for each in floats(self._window(batch.entering, duals))]
            # Of what is wanted and what counts nothing moves.
            moves = [torch.zeros_like(plain) if move is None else move for plain, move in reached]
            seen = [
                (value, weight * move)
                for value, move, weight in zip(lacking, self._unpadded(moves, batch), self._weights, strict=True)
                if value.requires_grad
            ]
            if seen:
                values, slopes = zip(*seen, strict=True)
                parts = torch.autograd.grad(values, leaves, slopes, retain_graph=True, allow_unused=True)
                found = _summed(found, parts)
        return [self._stride * each for each in found]

    def _lacking(self, batch: _Batch, at: Sequence[Tensor]) -> list[Tensor]:
        found = floats(self._window(batch.entering, at))
        return self._unpadded([mine - meant for mine, meant in zip(found, batch.wanted, strict=True)], batch)

    def _unpadded(self, values: list[Tensor], batch: _Batch) -> list[Tensor]:
        """Return values in single precision at least, 0 where nothing is alive, without padding."""
        wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in values]
        wide = [each if lives is None else each * lives for each, lives in zip(wide, self._lives, strict=True)]
        real = batch.real
        return wide if real is None else [e[real.to(e.device)] if e.shape[:2] == real.shape else e for e in wide]

    def _squares(self, lacking: list[Tensor]) -> Tensor:
        parts = [weight * each.square().sum() for weight, each in zip(self._weights, lacking, strict=True)]
        return torch.stack(parts).sum()


def _summed(found: Vector, more: Sequence[Tensor | None]) -> Vector:
    return [one if other is None else one + other for one, other in zip(found, more, strict=True)]


class Window:
    """What a network puts out at the end of a stretch, as a function of changes of weights and constants."""

    # Unknowns are two tensors a layer: of the weights between kept channels, (groups, rows, columns, kernel), and of
    # the constants of its outputs, (groups, rows), which stay 0 where nobody can take them.

    def __init__(self, segment: Segment, network: GraphModule, tasks: dict[Node, ReconstructTask]) -> None:
        # Of the network's own graph, whose nodes have the names of the unpruned one's.
        nodes: list[Node] = list(network.graph.nodes)
        end = next(rank for rank, node in enumerate(nodes) if node.name == segment.place.name)
        program = nodes[segment.first : end + 1]
        read = {parent for node in program for parent in node.all_input_nodes} - set(program)
        self._program = [node for node in nodes if node in read and node.op == "get_attr"] + program
        self._runner = Interpreter(network)
        self._network = network
        by_name = {tasks[node].layer.name: tasks[node] for node in segment.layers}
        self._layers = {name: task.layer for name, task in by_name.items()}
        norms = {str(node.target) for node in program if node.op == "call_module"}
        self._norms = {name: _affine(network.get_submodule(name)) for name in norms if _is_affine(network, name)}
        self._blocks = {name: task.block(self._weight(name)) for name, task in by_name.items()}

    def start(self) -> list[Tensor]:
        """Return unknowns that change nothing."""
        found = []
        for name, place in self._blocks.items():
            weight = self._weight(name)
            wide = torch.promote_types(weight.dtype, torch.float32)
            found += [torch.zeros_like(weight[place], dtype=wide), weight.new_zeros(place[0].shape[:2], dtype=wide)]
        return found

    def __call__(self, entering: dict[str, Any], unknowns: Sequence[Tensor]) -> Any:
        """Return the value at the place, from the values of the nodes that enter."""
        changes = dict(zip(self._layers, zip(unknowns[::2], unknowns[1::2], strict=True), strict=True))
        values: Values = {node: entering[node.name] for node in self._network.graph.nodes if node.name in entering}
        self._runner.env = values
        for node in self._program:
            name = str(node.target)
            if node.op == "call_module" and name in changes:
                values[node] = self._changed(name, values[node.all_input_nodes[0]], *changes[name])
            elif node.op == "call_module" and name in self._norms:
                # PyTorch takes three times as long for the forward derivative of a batch norm.
                values[node] = _per_channel(self._norms[name], values[node.all_input_nodes[0]])
            else:
                values[node] = self._runner.run_node(node)
        return values[self._program[-1]]

    def put(self, nets: Iterable[nn.Module], unknowns: Sequence[Tensor]) -> None:
        """Write changes into networks."""
        for (name, layer), weight, constant in zip(self._layers.items(), unknowns[::2], unknowns[1::2], strict=True):
            for net in nets:
                module: Any = net.get_submodule(name)
                with torch.no_grad():
                    rows = by_output(module.weight, module)
                    old = rows[self._blocks[name]]
                    rows[self._blocks[name]] = (old + weight).to(old.dtype)
                    module.weight.copy_(of_output(rows, module))
                    if layer.intercept is not None:
                        add_constant(net, layer.intercept, self._blocks[name][0][..., 0], constant.double())

    def _changed(self, name: str, value: Tensor, change: Tensor, constant: Tensor) -> Tensor:
        """Call a layer with changed weights."""
        module: Any = self._network.get_submodule(name)
        weight, place = self._weight(name), self._blocks[name]
        moved = of_output(weight.index_put(place, change.to(weight.dtype), accumulate=True), module)
        found: Tensor = functional_call(module, {"weight": moved}, (value,))
        if self._layers[name].intercept is None:
            return found
        rows = weight.new_zeros(len(weight)).index_put((place[0][..., 0],), constant.to(weight.dtype))
        shape = () if isinstance(module, nn.Linear) else [1] * len(module.kernel_size)
        return found + rows.reshape(-1, *shape)

    def _weight(self, name: str) -> Tensor:
        module: Any = self._network.get_submodule(name)
        return by_output(module.weight.detach(), module)


def _is_affine(network: GraphModule, name: str) -> bool:
    """Say whether a module is a batch norm that doesn't look at the batch."""
    module = network.get_submodule(name)
    return is_plain_norm(module) and module.running_var is not None


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a batch norm's factors and constants, both (channels,)."""
    mean: Tensor = norm.running_mean  # type: ignore[assignment]
    scale, shift = through_norms([norm], torch.zeros_like(mean))
    return scale.to(mean), shift.to(mean)


def _per_channel(factors: tuple[Tensor, Tensor], value: Tensor) -> Tensor:
    scale, shift = (each.reshape(-1, *[1] * (value.dim() - 2)) for each in factors)
    plain, move = forward_ad.unpack_dual(value)
    if move is None:
        return value * scale + shift
    # What a constant adds to a derivative PyTorch works out in Python: 0.9 ms here, a small product takes 0.02.
    moved: Tensor = forward_ad.make_dual(plain * scale + shift, move * scale)
    return moved


def gauss_newton(problem: _Problem, start: Vector, seed: int) -> tuple[Vector, float, float]:
    """Return unknowns with a smaller sum of squares, that sum, and what it was at the start.

    Each step solves ``(J^T J + damping * D) step = -J^T f`` by a few conjugate gradients; it is taken whole, by half or
    by a quarter, as the sum gets smaller, or not at all. D is for each tensor of unknowns the mean diagonal of
    ``J^T J``, estimated from one random vector of signs.
    """
    generator = torch.Generator().manual_seed(seed)
    found, first = start, problem.error(start)
    least, damping = first, _DAMPING
    for _ in range(_STEPS):
        slope = problem.gradient(found)
        scales = _scales(problem, found, generator)
        step = _step(problem, found, slope, scales, damping)
        tried = _shorter(problem, found, step, least)
        damping *= 1.0 / _CHANGE if tried and tried[2] else _CHANGE
        if tried:
            found, least, _ = tried
    return found, least, first


def _shorter(problem: _Problem, at: Vector, step: Vector, least: float) -> tuple[Vector, float, bool] | None:
    """Return the longest share of a step that makes the sum smaller, the sum, and whether it is the whole step."""
    for share in _SHORTER:
        there = [one + share * other for one, other in zip(at, step, strict=True)]
        error = problem.error(there)
        if error < least:  # never where it is NaN
            return there, error, share == 1.0
    return None


def _scales(problem: _Problem, at: Vector, generator: torch.Generator) -> list[float]:
    """Estimate the mean of the diagonal of ``J^T J`` for each tensor of unknowns (Hutchinson)."""
    signs = [
        (torch.randint(2, one.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(one.device, one.dtype)
        for one in at
    ]
    means = [float((sign * made).mean()) for sign, made in zip(signs, problem.product(at, signs), strict=True)]
    largest = max(means)
    # One vector only estimates, and what isn't seen has no diagonal: neither may divide by almost nothing.
    return [max(mean, 1e-3 * largest, _TINY) for mean in means]


def _step(problem: _Problem, at: Vector, slope: Vector, scales: Sequence[float], damping: float) -> Vector:
    """Solve for a step by preconditioned conjugate gradients, from zero."""
    step = [torch.zeros_like(one) for one in slope]
    lacking = [-one for one in slope]
    ready = _divided(lacking, scales)
    direction, size = ready, _dot(lacking, ready)
    for _ in range(_ITERATIONS):
        if not size > _TINY:
            break
        made = problem.product(at, direction)
        made = [one + damping * scale * other for one, scale, other in zip(made, scales, direction, strict=True)]
        curvature = _dot(direction, made)
        if not curvature > 0.0:
            break
        length = size / curvature
        step = _moved(step, length, direction)
        lacking = _moved(lacking, -length, made)
        ready = _divided(lacking, scales)
        size, before = _dot(lacking, ready), size
        direction = _moved(ready, size / before, direction)
    return step


def _moved(vector: Vector, length: float, direction: Vector) -> Vector:
    return [one + length * other for one, other in zip(vector, direction, strict=True)]


def _divided(vector: Vector, scales: Sequence[float]) -> Vector:
    return [one / scale for one, scale in zip(vector, scales, strict=True)]


def _dot(one: Vector, other: Vector) -> float:
    return sum(float(torch.vdot(a.flatten().double(), b.flatten().double())) for a, b in zip(one, other, strict=True))


register_recovery(RecoveryInfo("ahead", f"{__name__}:Ahead", "then solves each block for values some layers ahead"))
