"""Least squares from streamed sums: normal equations in float64, ridge chosen on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GRID = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Where the walk along the grid begins, and what is taken where no sample is held out.
_FIRST_TRIED = 5
_LEAST_RIDGE = 1e-12
_LEAST_VARIANCE = 1e-12
# Share of the mean variance in the ridge, so that an input that hardly varies doesn't get the huge weight that
# retraining would stumble over.
_FLOOR = 0.1


class NormalEquations:
    """Sums over samples for the least squares of residuals by inputs, in several independent groups of equal size."""

    # Memory is ``groups * unknowns * (unknowns + outputs)`` float64, whatever the number of samples.

    def __init__(self) -> None:
        self.samples = 0
        # Over samples: x, y and r of inputs, residuals and references, yy and rr of squares, (groups, ...); xx and xy
        # of products, (groups, unknowns, unknowns) and (groups, unknowns, outputs).
        self.sums: dict[str, Tensor] = {}

    def add(self, inputs: Tensor, residuals: Tensor, references: Tensor, *, products: bool = True) -> None:
        """Add inputs (groups, samples, unknowns), and residuals and references (groups, samples, outputs)."""
        # Normal equations square the condition number: float64, whatever the network computes in.
        inputs, residuals, references = inputs.double(), residuals.double(), references.double()
        self.samples += inputs.shape[1]
        turned = inputs.transpose(1, 2)
        # Without, ``sums["xx"]`` has to be set to those of the same samples.
        if products:
            self._accumulate("xx", turned, inputs)
        self._accumulate("xy", turned, residuals)
        moments = {"x": inputs, "y": residuals, "yy": residuals.square(), "r": references, "rr": references.square()}
        for name, values in moments.items():
            total = values.sum(1)
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    def merge(self, other: NormalEquations) -> None:
        """Add another problem's samples, in place."""
        self.samples += other.samples
        for name, total in other.sums.items():
            if name in self.sums:
                self.sums[name] += total
            else:
                self.sums[name] = total.clone()

    @property
    def unknowns(self) -> int:
        """Unknowns of each group, the intercept not counted."""
        return self.sums["xx"].shape[-1]

    def is_finite(self) -> bool:
        """Say whether no sample was NaN or infinite."""
        return all(bool(torch.isfinite(total).all()) for total in self.sums.values())

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return covariances of inputs and of these with residuals, in groups, and variances of residuals."""
        x, y = self.sums["x"] / self.samples, self.sums["y"] / self.samples
        own = self.sums["xx"] / self.samples - x.unsqueeze(2) * x.unsqueeze(1)
        across = self.sums["xy"] / self.samples - x.unsqueeze(2) * y.unsqueeze(1)
        return own, across, self.sums["yy"] / self.samples - y.square()

    def solve(self, ridge: float, *, intercept: bool) -> Solution | None:
        """Solve by Cholesky decomposition, with a ridge as a share of each input's variance; None where that fails."""
        means = self.sums["x"] / self.samples
        matrix, cross = self.sums["xx"].clone(), self.sums["xy"]
        # A view: centring, below, turns these sums of squares into those about the means; `floor` is of what they were.
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        floor = _LEAST_VARIANCE * diagonal
        if intercept:
            matrix.baddbmm_(self.sums["x"].unsqueeze(2), means.unsqueeze(1), alpha=-1)
            cross = cross - means.unsqueeze(2) * self.sums["y"].unsqueeze(1)
        # Never quite none: collinear inputs are common, and have no Cholesky factor.
        penalty = max(ridge, _LEAST_RIDGE) * (diagonal + _FLOOR * diagonal.mean(1, keepdim=True))
        # Units are taken out before the decomposition. What varies by no more than rounding is scaled to 0, an equation
        # apart from the others, with coefficient 0.
        scale = (diagonal + penalty).masked_fill(diagonal <= floor, torch.inf).rsqrt()
        matrix.mul_(scale.unsqueeze(1)).mul_(scale.unsqueeze(2))
        # The penalty is in the scale, so that the scaled diagonal is 1, up to rounding.
        diagonal.fill_(1.0)
        factor, info = torch.linalg.cholesky_ex(matrix)
        del matrix, diagonal
        if bool(info.any()):
            return None
        weights = torch.cholesky_solve(cross * scale.unsqueeze(2), factor) * scale.unsqueeze(2)
        shift = (self.sums["y"] - (self.sums["x"].unsqueeze(1) @ weights).squeeze(1)) / self.samples
        return Solution(weights, shift if intercept else torch.zeros_like(shift))

    def unchanged(self) -> Solution:
        """Return the solution that predicts zero."""
        return Solution(torch.zeros_like(self.sums["xy"]), torch.zeros_like(self.sums["y"]))

    def squared_error(self, solution: Solution) -> float:
        """Return the sum of squared errors of a solution on these samples."""
        weights, shift, sums = solution.weights, solution.shift, self.sums
        # The square of the error, multiplied out into the sums; rounding can take it below 0.
        predicted = (weights * (sums["xx"] @ weights)).sum(1) + self.samples * shift.square()
        predicted += 2.0 * shift * (sums["x"].unsqueeze(1) @ weights).squeeze(1)
        met = (weights * sums["xy"]).sum(1) + shift * sums["y"]
        return max(float((sums["yy"] - 2.0 * met + predicted).sum()), 0.0)

    def relative_error(self, solution: Solution) -> float:
        """Return the error of a solution as a share of the references' variance; NaN without samples."""
        if not self.samples:
            return float("nan")
        variance = float((self.sums["rr"] - self.sums["r"].square() / self.samples).sum())
        error = self.squared_error(solution)
        return error / variance if variance > 0.0 else float(error > 0.0)

    def _accumulate(self, name: str, left: Tensor, right: Tensor) -> None:
        if name in self.sums:
            # In place: a second matrix of this size would double the memory.
            self.sums[name].baddbmm_(left, right)
        else:
            self.sums[name] = left @ right


@dataclass(frozen=True)
class Solution:
    """Coefficients ``(groups, unknowns, outputs)`` and intercepts ``(groups, outputs)``."""

    weights: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Fit:
    """A solution, how it was found and how good it is; errors are squared, as shares of the references' variance."""

    solution: Solution  # the coefficients
    ridge: float  # the one chosen; infinite if changing nothing was best
    before: float  # of changing nothing
    after: float  # of the solution, on all samples
    held_out: float  # of the solution for the others, on the samples held out; NaN if there are none


def fit(learned: NormalEquations, held: NormalEquations, ridge: float | None, *, intercept: bool) -> Fit:
    """Choose a ridge, if None is given, on the held-out samples, and solve on all, which `learned` then holds."""
    chosen, held_out = _choose(learned, held, ridge, intercept=intercept)
    learned.merge(held)
    unchanged = learned.unchanged()
    found = learned.solve(chosen, intercept=intercept) if chosen < math.inf else None
    solution = unchanged if found is None else found
    result = Fit(solution, chosen, learned.relative_error(unchanged), learned.relative_error(solution), held_out)
    if held.samples:
        # A refinement takes these products over, and must not learn from the samples that judge it.
        learned.sums["xx"] -= held.sums["xx"]
    return result


def _choose(
    learned: NormalEquations, held: NormalEquations, ridge: float | None, *, intercept: bool
) -> tuple[float, float]:
    """Return the ridge with the smallest error on held-out samples, and the error."""
    if not held.samples:
        return (GRID[_FIRST_TRIED] if ridge is None else ridge), math.nan
    nothing = held.relative_error(held.unchanged())

    def error(tried: float) -> float:
        solution = learned.solve(tried, intercept=intercept)
        return math.inf if solution is None else held.relative_error(solution)

    if ridge is not None:
        alone = error(ridge)
        return (ridge, alone) if alone < math.inf else (math.inf, nothing)
    chosen, least = _descend(error)
    return (chosen, least) if least < nothing else (math.inf, nothing)


def _descend(error: Callable[[float], float]) -> tuple[float, float]:
    """Walk along the grid downhill, to smaller ridges first."""
    best, least = _FIRST_TRIED, error(GRID[_FIRST_TRIED])
    # The error is taken to have one valley, so that few of the eight ridges are solved for.
    for way in (-1, 1):
        while 0 <= best + way < len(GRID) and (next_error := error(GRID[best + way])) < least:
            best, least = best + way, next_error
        if best != _FIRST_TRIED:
            break
    return GRID[best], least
