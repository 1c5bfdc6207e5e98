"""Several layers ahead: the layers of a block are solved for the unpruned network's values some layers later.

A layer's own output needn't be reproduced exactly. After the closed forms, which look no further than the next sum,
each block's weights and constants take damped Gauss-Newton steps for the values at a later place. The layers between
don't change meanwhile: they show which errors matter there, so that errors of earlier layers are corrected as well.
The steps are found by conjugate gradients from products with Jacobians, forward and backward. SNOWS does so for single
weights with the full Hessian [1]_; here whole channels are pruned, and Gauss-Newton leaves out second derivatives.

References
----------
.. [1] R. Lucas and R. Mazumder, "Preserving deep representations in one-shot pruning: a Hessian-free second-order
   optimization framework", https://arxiv.org/abs/2411.18376
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from nni_topo.errors import DataError, check_fields, whole
from nni_topo.maths.least_squares.gauss_newton import Vector, gauss_newton
from nni_topo.network.runtime import bar, tensors_of
from nni_topo.recovery.networks import Networks
from nni_topo.recovery.reconstruct import Reconstruct, ReconstructTask
from nni_topo.recovery.registry import Tools
from nni_topo.recovery.replay import Replay
from nni_topo.recovery.report import LayerReport
from nni_topo.recovery.samples import Task
from nni_topo.recovery.windows import Segment, Window, alive, entering, floats, moments, segments

_STEPS, _ITERATIONS, _DAMPING = 4, 6, 1e-2
_IMAGES_A_PRODUCT = 128
_LEAST_VARIANCE = 1e-12

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
    found = segments(replay.nodes, replay.touched_nodes, by_node, ahead)
    entered = [entering(segment, replay.nodes) for segment in found]
    reports = []
    for index, segment in enumerate(bar("look ahead", progress, found)):
        # A later place that is reached already is this segment's, too, which the data keep.
        later = {node for nodes in entered[index + 1 :] for node in nodes}
        window = Window(segment, networks.pruned, by_node)
        data = _Data(replay, segment, entered[index], later, cache_bytes)
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


def _solved(segment: Segment, window: Window, data: _Data, images: int, seed: int) -> tuple[Vector, LayerReport]:
    """Return what a stretch's unknowns become, and the report."""
    began = time.perf_counter()
    problem, start = _Problem(window, data, images), window.start()
    # The other kernels of attention have no forward derivatives.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        unknowns, after, before = gauss_newton(
            problem, start, steps=_STEPS, iterations=_ITERATIONS, damping=_DAMPING, seed=seed
        )
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

    def __init__(self, replay: Replay, segment: Segment, read: list[Node], later: set[Node], cache_bytes: int) -> None:
        self._replay, self._segment, self._read = replay, segment, read
        # The next pass over this stretch reads the same places again.
        self._later = {*later, *read, segment.place}
        self._cache_bytes = cache_bytes
        self._kept: list[_Batch] | None = None

    def __iter__(self) -> Iterator[_Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[_Batch] | None = []
        size = 0
        place = self._segment.place
        for unpruned, pruned in self._replay.run(self._segment.first, [*self._read, place], self._later):
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
