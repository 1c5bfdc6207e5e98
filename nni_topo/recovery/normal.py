"""Least squares from streamed sums: normal equations in float64, ridge chosen on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GRID = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_COARSE_GRID = (1e-6, 1e-4, 1e-2)
_MANY_UNKNOWNS = 4096
_LEAST_RIDGE = 1e-12


class NormalEquations:
    """Sums over samples that a least-squares problem and its error need.

    The problem is to predict residuals from inputs, several independent problems ("groups") of equal size at once.
    Memory is ``groups * unknowns * (unknowns + outputs)`` float64, whatever the number of samples.

    Attributes
    ----------
    samples : int
        Samples added.
    sums : dict of str to Tensor
        Over samples: ``x``, ``y``, ``r`` of inputs, residuals and references, ``yy`` and ``rr`` of their squares;
        ``xx`` and ``xy`` of products, shapes (groups, unknowns, unknowns) and (groups, unknowns, outputs).
    """

    def __init__(self) -> None:
        self.samples = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, inputs: Tensor, residuals: Tensor, references: Tensor) -> None:
        """Add samples.

        Parameters
        ----------
        inputs : Tensor, shape (groups, samples, unknowns)
            What predicts.
        residuals, references : Tensor, shape (groups, samples, outputs)
            What is predicted, and the values whose variance is the unit of the error.
        """
        inputs, residuals, references = inputs.double(), residuals.double(), references.double()
        self.samples += inputs.shape[1]
        turned = inputs.transpose(1, 2)
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

    def solve(self, ridges: Sequence[float], *, intercept: bool) -> Iterator[tuple[float, Solution]]:
        """Solve by Cholesky decomposition, once for each ridge.

        Parameters
        ----------
        ridges : sequence of float
            Penalties on the squared coefficients, as a share of each input's variance (its mean square without an
            intercept), so that the scale of an input doesn't matter.
        intercept : bool
            Also fit a constant, which isn't penalised.

        Yields
        ------
        float
            The ridge.
        Solution
            Coefficients of inputs that never vary are zero. A ridge so small that the decomposition fails is left out.
        """
        means = self.sums["x"] / self.samples
        products, cross = self.sums["xx"], self.sums["xy"]
        if intercept:
            cross = cross - means.unsqueeze(2) * self.sums["y"].unsqueeze(1)
        for ridge in ridges:
            matrix = products.clone()
            if intercept:
                matrix.baddbmm_(self.sums["x"].unsqueeze(2), means.unsqueeze(1), alpha=-1)
            diagonal = matrix.diagonal(dim1=1, dim2=2)
            floor = 1e-12 * self.sums["xx"].diagonal(dim1=1, dim2=2)
            idle = diagonal <= floor
            diagonal.mul_(1.0 + max(ridge, _LEAST_RIDGE)).masked_fill_(idle, torch.inf)
            scale = diagonal.rsqrt()
            matrix.mul_(scale.unsqueeze(1)).mul_(scale.unsqueeze(2))
            matrix.diagonal(dim1=1, dim2=2).fill_(1.0)
            factor, info = torch.linalg.cholesky_ex(matrix)
            del matrix
            if bool(info.any()):
                continue
            weights = torch.cholesky_solve(cross * scale.unsqueeze(2), factor) * scale.unsqueeze(2)
            shift = (self.sums["y"] - (self.sums["x"].unsqueeze(1) @ weights).squeeze(1)) / self.samples
            yield ridge, Solution(weights, shift if intercept else torch.zeros_like(shift))

    def unchanged(self) -> Solution:
        """Return the solution that predicts zero."""
        return Solution(torch.zeros_like(self.sums["xy"]), torch.zeros_like(self.sums["y"]))

    def squared_error(self, solution: Solution) -> float:
        """Return the sum of squared errors of a solution on these samples."""
        weights, shift, sums = solution.weights, solution.shift, self.sums
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
    """A solution, how it was found and how good it is.

    Attributes
    ----------
    solution : Solution
        The coefficients.
    ridge : float
        The ridge chosen; infinite if the best is to change nothing.
    before, after, held_out : float
        Squared error as a share of the references' variance: of changing nothing, of the solution on all samples, and
        on the held-out samples of the solution for the others (NaN if there are none).
    """

    solution: Solution
    ridge: float
    before: float
    after: float
    held_out: float


def fit(learned: NormalEquations, held: NormalEquations, ridge: float | None, *, intercept: bool) -> Fit:
    """Choose a ridge and solve on all samples.

    Parameters
    ----------
    learned, held : NormalEquations
        The samples to learn from and those held out; ``learned`` takes in the others.
    ridge : float or None
        Fixed ridge, or None: the one of a grid (or "change nothing") with the smallest held-out error.
    intercept : bool
        Also fit a constant.

    Returns
    -------
    Fit
        The solution.
    """
    ridges = (ridge,) if ridge is not None else _COARSE_GRID if learned.unknowns > _MANY_UNKNOWNS else GRID
    chosen, held_out = _choose(learned, held, ridges, intercept=intercept)
    if ridge is None and held.samples:
        nothing = held.relative_error(held.unchanged())
        chosen, held_out = (chosen, held_out) if held_out < nothing else (math.inf, nothing)
    learned.merge(held)
    before = learned.relative_error(learned.unchanged())
    solution = learned.unchanged()
    for _, found in learned.solve([chosen] if chosen < math.inf else [], intercept=intercept):
        solution = found
    return Fit(solution, chosen, before, learned.relative_error(solution), held_out)


def _choose(
    learned: NormalEquations, held: NormalEquations, ridges: Sequence[float], *, intercept: bool
) -> tuple[float, float]:
    """Return the ridge with the smallest error on held-out samples, and the error; without any, a middle one."""
    if not held.samples:
        return ridges[len(ridges) // 2], math.nan
    errors = {r: held.relative_error(found) for r, found in learned.solve(ridges, intercept=intercept)}
    if not errors:
        return math.inf, held.relative_error(held.unchanged())
    best = min(errors, key=lambda r: errors[r])
    return best, errors[best]
