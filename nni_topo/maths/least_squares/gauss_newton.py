"""Nonlinear least squares of many unknowns: damped Gauss-Newton steps by conjugate gradients [1]_.

References
----------
.. [1] J. Martens, "Deep learning via Hessian-free optimization", ICML 2010,
   https://www.cs.toronto.edu/~jmartens/docs/Deep_HessianFree.pdf
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Vector = list[Tensor]

_SHORTER = (1.0, 0.5, 0.25)  # shares of a step, tried one after the other
_CHANGE = 3.0  # of the damping, from step to step
_TINY = 1e-30


class Problem(Protocol):
    """Half a sum of squares ``|f(x)|^2 / 2``, by what is computed of it; unknowns are lists of tensors."""

    def error(self, at: Vector) -> float:
        """Return the sum of squares, ``|f|^2``."""

    def gradient(self, at: Vector) -> Vector:
        """Return ``J^T f``."""

    def product(self, at: Vector, vector: Vector) -> Vector:
        """Return ``J^T J vector``, or an estimate, the same from one gradient to the next."""


def gauss_newton(
    problem: Problem, start: Vector, *, steps: int, iterations: int, damping: float, seed: int
) -> tuple[Vector, float, float]:
    """Return unknowns with a smaller sum of squares, that sum, and what it was at the start.

    Each step solves ``(J^T J + damping * D) step = -J^T f`` by so many conjugate gradients at most; it is taken whole,
    by half or by a quarter, as the sum gets smaller, or not at all. D is for each tensor of unknowns the mean diagonal
    of ``J^T J``, estimated from one random vector of signs.
    """
    generator = torch.Generator().manual_seed(seed)
    found, first = start, problem.error(start)
    least = first
    for _ in range(steps):
        slope = problem.gradient(found)
        scales = _scales(problem, found, generator)
        step = _solved(problem, found, slope, scales, damping, iterations)
        tried = _shorter(problem, found, step, least)
        damping *= 1.0 / _CHANGE if tried and tried[2] else _CHANGE
        if tried:
            found, least, _ = tried
    return found, least, first


def _shorter(problem: Problem, at: Vector, step: Vector, least: float) -> tuple[Vector, float, bool] | None:
    """Return the longest share of a step that makes the sum smaller, the sum, and whether it is the whole step."""
    for share in _SHORTER:
        there = [one + share * other for one, other in zip(at, step, strict=True)]
        error = problem.error(there)
        if error < least:  # never where it is NaN
            return there, error, share == 1.0
    return None


def _scales(problem: Problem, at: Vector, generator: torch.Generator) -> list[float]:
    """Estimate the mean of the diagonal of ``J^T J`` for each tensor of unknowns (Hutchinson)."""
    signs = [
        (torch.randint(2, one.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(one.device, one.dtype)
        for one in at
    ]
    means = [float((sign * made).mean()) for sign, made in zip(signs, problem.product(at, signs), strict=True)]
    largest = max(means)
    # One vector only estimates, and what isn't seen has no diagonal: neither may divide by almost nothing.
    return [max(mean, 1e-3 * largest, _TINY) for mean in means]


def _solved(
    problem: Problem, at: Vector, slope: Vector, scales: Sequence[float], damping: float, iterations: int
) -> Vector:
    """Solve for a step by preconditioned conjugate gradients, from zero."""
    step = [torch.zeros_like(one) for one in slope]
    lacking = [-one for one in slope]
    ready = _divided(lacking, scales)
    direction, size = ready, _dot(lacking, ready)
    for _ in range(iterations):
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
