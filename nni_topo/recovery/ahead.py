"""Several layers ahead: the layers of a block are solved for what the original has some layers behind them.

What a layer gives needn't be met for its own sake. Behind closed forms, which look no further than the next sum, each
block's weights and constants take damped Gauss-Newton steps for the values at a place behind layers that stay as they
are meanwhile: those between show which errors count there, and what the layers before got wrong is mended on the way.
The steps are found by conjugate gradients from products with Jacobians, forward and backward, as SNOWS does for single
weights [1]_; here whole channels are gone, and what is left is solved.

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

from nni_topo.errors import DataError
from nni_topo.maths.least_squares.gauss_newton import Vector, gauss_newton
from nni_topo.network.inputs import tensors_of
from nni_topo.network.progress import bar
from nni_topo.recovery.networks import Networks
from nni_topo.recovery.plan import Solvable
from nni_topo.recovery.reconstruct import ReconstructTask
from nni_topo.recovery.replay import Replay
from nni_topo.recovery.report import LayerReport
from nni_topo.recovery.windows import Stretch, Window, stretches

_STEPS, _ITERATIONS, _DAMPING = 2, 8, 1e-2
_IMAGES_A_PRODUCT = 128
_LEAST_VARIANCE = 1e-12

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Batch:
    """What enters a window in the pruned network, what the original has at its end, and where that isn't padding."""

    entering: dict[str, Any]
    wanted: list[Tensor]
    real: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in [*tensors_of(self.entering), *self.wanted])


def look_ahead(
    replay: Replay,
    networks: Networks,
    tasks: Sequence[ReconstructTask],
    images: int,
    *,
    ahead: int,
    seed: int,
    cache_bytes: int,
    progress: bool | None,
) -> tuple[LayerReport, ...]:
    """Solve the layers of `tasks`, which are done, block by block for places so many layers behind them."""
    by_name = {task.layer.name: task for task in tasks}
    layers: list[Solvable] = [task.layer for task in by_name.values()]
    found = stretches(replay.nodes, replay.touched_nodes, layers, ahead)
    windows = [Window(stretch, networks.pruned, by_name) for stretch in found]
    reports = []
    for index, (stretch, window) in enumerate(zip(bar("look ahead", progress, found), windows, strict=True)):
        names = {name for other in windows[index + 1 :] for name in other.entering}
        later = {node for node in replay.nodes if node.name in names} | {other.place for other in found[index + 1 :]}
        began = time.perf_counter()
        problem = _Problem(window, stretch.place, replay, stretch.first, later, images, cache_bytes)
        start = window.start()
        try:
            with sdpa_kernel(SDPBackend.MATH):
                unknowns, after, before = gauss_newton(
                    problem, start, steps=_STEPS, iterations=_ITERATIONS, damping=_DAMPING, seed=seed
                )
        except NotImplementedError as error:
            _logger.warning("nothing ahead of %s is met, it has no derivatives: %s", _names(stretch), error)
            continue
        if not math.isfinite(before):
            raise DataError(f"activations must be finite, got NaN or infinity ({stretch.place.name})")
        window.put((networks.pruned, networks.result), unknowns)
        reports.append(
            LayerReport(
                layer=_names(stretch),
                place=stretch.place.name,
                unknowns=sum(each.numel() for each in start),
                samples=problem.samples,
                ridge=_DAMPING,
                error_before=before,
                error_after=after,
                error_held_out=math.nan,
                seconds=time.perf_counter() - began,
            )
        )
    return tuple(reports)


def _names(stretch: Stretch) -> str:
    return ", ".join(layer.name for layer in stretch.layers)


class _Problem:
    """The squared error at the end of a window, as a share of the original's variance there."""

    # The gradient is that of all images. Products take every so many a batch, others at each step, which is what most
    # of the time goes into; the batches themselves are kept where they fit into memory, or the networks run again.

    def __init__(
        self, window: Window, place: Node, replay: Replay, settled: int, later: set[Node], images: int, cache_bytes: int
    ) -> None:
        self._window, self._place, self._replay, self._settled, self._later = window, place, replay, settled, later
        names = set(window.entering)
        self._entering = [node for node in replay.nodes if node.name in names]
        self._turn, self._few = 0, list[_Batch]()
        self._kept: list[_Batch] | None = None
        kept: list[_Batch] = []
        moments: list[list[Tensor]] = []
        count = size = 0
        for batch in self._batches():
            count, size = count + 1, size + batch.nbytes
            kept = [*kept, batch] if size <= cache_bytes else []
            moments.append([_moments(each) for each in _real(batch.wanted, batch.real)])
        self._kept = kept if size <= cache_bytes else None
        sums = [torch.stack(each).sum(0) for each in zip(*moments, strict=True)]
        spreads = [float(square - total.square() / number) for number, total, square in sums]
        self._weights = [1.0 / (len(sums) * max(spread, _LEAST_VARIANCE)) for spread in spreads]
        self.samples = int(sums[0][0])
        self._stride = max(1, count * _IMAGES_A_PRODUCT // images)

    def error(self, at: Vector) -> float:
        """Return the error over all images."""
        with torch.no_grad():
            return sum(float(self._squares(self._lacking(batch, at)).detach()) for batch in self._batches())

    def gradient(self, at: Vector) -> Vector:
        """Return half the gradient of the error, and choose the batches of the products that follow."""
        found = [torch.zeros_like(each) for each in at]
        few: list[_Batch] = []
        for index, batch in enumerate(self._batches()):
            leaves = [each.detach().requires_grad_() for each in at]
            half = 0.5 * self._squares(self._lacking(batch, leaves))
            found = _summed(found, torch.autograd.grad(half, leaves, allow_unused=True))
            if (index + self._turn) % self._stride == 0:
                few.append(batch)
        self._few, self._turn = few or self._few, self._turn + 1
        return found

    def product(self, at: Vector, vector: Vector) -> Vector:
        """Return the Gauss-Newton matrix times a vector, of some batches, as if these were all."""
        found = [torch.zeros_like(each) for each in at]
        for batch in self._few:
            with forward_ad.dual_level():
                leaves = [each.detach().requires_grad_() for each in at]
                pairs = zip(leaves, vector, strict=True)
                lacking = self._lacking(batch, [forward_ad.make_dual(*pair) for pair in pairs])
                # Backward from the forward derivatives: J^T (J v).
                values, moves = zip(*(forward_ad.unpack_dual(each) for each in lacking), strict=True)
                moved = [
                    (value, weight * move.detach())
                    for value, move, weight in zip(values, moves, self._weights, strict=True)
                    if move is not None
                ]
                if moved:
                    outputs, slopes = zip(*moved, strict=True)
                    found = _summed(found, torch.autograd.grad(outputs, leaves, slopes, allow_unused=True))
        return [self._stride * each for each in found]

    def _batches(self) -> Iterator[_Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        watched = [*self._entering, self._place]
        for original, pruned in self._replay.run(self._settled, watched, self._later):
            entering = {node.name: pruned[node] for node in self._entering}
            yield _Batch(entering, _floats(original[self._place]), self._replay.counted(original))

    def _lacking(self, batch: _Batch, at: Sequence[Tensor]) -> list[Tensor]:
        found = _floats(self._window(batch.entering, at))
        return _real([mine - meant for mine, meant in zip(found, batch.wanted, strict=True)], batch.real)

    def _squares(self, lacking: list[Tensor]) -> Tensor:
        parts = [weight * each.square().sum() for weight, each in zip(self._weights, lacking, strict=True)]
        return torch.stack(parts).sum()


def _floats(value: Any) -> list[Tensor]:
    return [each for each in tensors_of(value) if each.is_floating_point()]


def _real(values: list[Tensor], real: Tensor | None) -> list[Tensor]:
    """Return values in single precision at least, of those by position what isn't padding."""
    wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in values]
    return wide if real is None else [e[real.to(e.device)] if e.shape[:2] == real.shape else e for e in wide]


def _moments(values: Tensor) -> Tensor:
    """Return the number of values, their sum and that of their squares."""
    wide = values.double()
    return torch.stack([wide.new_tensor(wide.numel()), wide.sum(), wide.square().sum()]).cpu()


def _summed(found: Vector, more: Sequence[Tensor | None]) -> Vector:
    return [one if other is None else one + other for one, other in zip(found, more, strict=True)]
