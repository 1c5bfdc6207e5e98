"""Least squares from streamed sums: normal equations in float64, ridge chosen on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nni_topo.maths.least_squares.windows import Windows

GRID = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_FIRST_TRIED = 5  # place of the first ridge tried; also of the ridge if no sample is held out
_LEAST_RIDGE = 1e-12
_LEAST_VARIANCE = 1e-12
# Share of the mean variance in the ridge, so that an input that hardly varies doesn't get a huge weight, which would
# hinder fine-tuning.
_FLOOR = 0.1


class NormalEquations:
    """Sums over samples to predict residuals from inputs by least squares, in independent groups of equal size."""

    # Memory is ``groups * unknowns * (unknowns + outputs)`` float64 and as much again while solving, whatever the
    # number of samples. While there are fewer samples than unknowns, the samples are kept instead.

    def __init__(self, source: NormalEquations | None = None) -> None:
        # `source`: equations of the same inputs, whose products and factors are used here, too.
        self.samples = 0
        self._rows: list[tuple[Tensor, Tensor]] | None = []  # inputs and residuals; None once products are summed
        self._sums: dict[str, Tensor] = {}
        self._parts: tuple[NormalEquations, ...] = ()  # equations whose products of inputs add up to these
        # By number of samples: ridge, intercept and factor of the last solution.
        self._factors: dict[int, tuple[float, bool, _Factor]] = {}
        # For few samples, by their number and whether they are centred: tensors that don't depend on the ridge.
        self._few: dict[tuple[int, bool], tuple[Tensor, Tensor, Tensor]] = {}
        self._shares_products = False
        if source is not None:
            self._factors, self._few = source._factors, source._few
            if source._rows is None:
                self._rows, self._sums["xx"] = None, source.sums["xx"]
                self._shares_products = True

    @classmethod
    def of(cls, samples: int, sums: dict[str, Tensor]) -> NormalEquations:
        """Make equations from sums over so many samples."""
        equations = cls()
        equations.samples, equations._sums, equations._rows = samples, sums, None
        return equations

    @property
    def sums(self) -> dict[str, Tensor]:
        """Sums over samples, (groups, ...)."""
        # x, y and r: of inputs, residuals and references; yy and rr: of squares; xx and xy: of products, (groups,
        # unknowns, unknowns) and (groups, unknowns, outputs).
        if self._rows:
            inputs, residuals = self._join_samples()
            self._rows = None
            self._multiply(inputs, residuals)
        if self._parts:
            self._sums["xx"], self._parts = self._products(), ()
        return self._sums

    def add(self, inputs: Tensor | Windows, residuals: Tensor, references: Tensor) -> None:
        """Add inputs (groups, samples, unknowns), and residuals and references (groups, samples, outputs).

        Windows are summed at once, even while there are fewer samples than unknowns.
        """
        # Normal equations square the condition number: float64, whatever the network computes in.
        residuals, references = residuals.double(), references.double()
        self.samples += residuals.shape[1]
        moments = {"y": residuals, "yy": residuals.square(), "r": references, "rr": references.square()}
        for name, values in moments.items():
            self._accumulate(name, values.sum(1))
        if isinstance(inputs, Windows):
            _ = self.sums  # rows of earlier batches are multiplied
            self._rows = None
            self._accumulate("x", inputs.total())
            if not self._shares_products:
                self._accumulate("xx", inputs.products())
            self._accumulate("xy", inputs.cross(residuals))
            return
        inputs = inputs.double()
        self._accumulate("x", inputs.sum(1))
        if self._rows is None:
            self._multiply(inputs, residuals)
            return
        self._rows.append((inputs, residuals))
        if self.samples >= self.unknowns:
            _ = self.sums

    def combine(self, more: NormalEquations) -> NormalEquations:
        """Return the equations of all samples of both."""
        if not self.samples:
            return more
        if not more.samples:
            return self
        total = NormalEquations()
        total.samples = self.samples + more.samples
        total._factors, total._few = self._factors, self._few
        if self._rows and more._rows and total.samples < self.unknowns:
            total._rows = [*self._rows, *more._rows]
        else:
            total._rows, total._parts = None, (self, more)
        for equations in (self, more):
            for name, summed in equations._sums.items():
                if name != "xx" and (name != "xy" or total._rows is None):
                    total._accumulate(name, summed.clone())
            if equations._rows and total._rows is None:
                inputs, residuals = equations._join_samples()
                total._accumulate("xy", inputs.mT @ residuals)
        return total

    @property
    def unknowns(self) -> int:
        """Unknowns of each group, the intercept not counted."""
        return self._sums["x"].shape[-1]

    def is_finite(self) -> bool:
        """Tell whether no sample was NaN or infinite."""
        # NaN and infinity show in the plain sums; products can overflow even if these are finite.
        input_squares = [self._sums["xx"].diagonal(dim1=1, dim2=2)] if "xx" in self._sums else []
        totals = [total for name, total in self._sums.items() if name != "xx"] + input_squares
        return all(bool(torch.isfinite(total).all()) for total in totals)

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return covariances of inputs, covariances of inputs with residuals, and variances of residuals, by group.

        The sums of products are overwritten: these equations can't be solved afterwards.
        """
        sums = self.sums
        x, y = sums["x"] / self.samples, sums["y"] / self.samples
        input_covariances = sums.pop("xx").div_(self.samples).baddbmm_(x.unsqueeze(2), x.unsqueeze(1), alpha=-1)
        across = sums.pop("xy").div_(self.samples).baddbmm_(x.unsqueeze(2), y.unsqueeze(1), alpha=-1)
        return input_covariances, across, sums["yy"] / self.samples - y.square()

    def centred(self) -> tuple[Tensor, Tensor]:
        """Return inputs and residuals minus their means; needs fewer samples than unknowns."""
        inputs, residuals = self._join_samples()
        return inputs - inputs.mean(1, keepdim=True), residuals - residuals.mean(1, keepdim=True)

    def solve(self, ridge: float, *, intercept: bool) -> Solution | None:
        """Solve by Cholesky decomposition, with a ridge as a share of each input's variance; None if that fails."""
        # Never zero: collinear inputs are common, and have no Cholesky factor without a ridge.
        ridge = max(ridge, _LEAST_RIDGE)
        solution = self._solve_few(ridge, intercept) if self._rows else self._solve_many(ridge, intercept)
        if solution is None:
            return None
        weights, error = solution
        shift = (self._sums["y"] - (self._sums["x"].unsqueeze(1) @ weights).squeeze(1)) / self.samples
        if not intercept:
            shift = torch.zeros_like(shift)
        return Solution(weights, shift, max(error, 0.0))

    def factors(self) -> dict[int, tuple[float, bool, _Factor]]:
        """Return a copy of the cached factors, for `take_factors` after other ridges were tried."""
        return dict(self._factors)

    def take_factors(self, factors: dict[int, tuple[float, bool, _Factor]]) -> None:
        """Restore cached factors, of a ridge that is better than the last one."""
        self._factors.clear()
        self._factors.update(factors)

    def unchanged(self) -> Solution:
        """Return the solution that predicts zero."""
        x, y = self._sums["x"], self._sums["y"]
        return Solution(y.new_zeros(len(y), x.shape[1], y.shape[1]), torch.zeros_like(y))

    def squared_error(self, solution: Solution) -> float:
        """Return the sum of squared errors of a solution on these samples."""
        weights, shift = solution.weights, solution.shift
        if not (bool(weights.any()) or bool(shift.any())):
            return float(self._sums["yy"].sum())
        if self._rows:
            inputs, residuals = self._join_samples()
            return float((residuals - inputs @ weights - shift.unsqueeze(1)).square().sum())
        sums = self.sums
        # The squared error, expanded into the sums; rounding can make it negative.
        predicted = (weights * (sums["xx"] @ weights)).sum(1) + self.samples * shift.square()
        predicted += 2.0 * shift * (sums["x"].unsqueeze(1) @ weights).squeeze(1)
        projection = (weights * sums["xy"]).sum(1) + shift * sums["y"]
        return max(float((sums["yy"] - 2.0 * projection + predicted).sum()), 0.0)

    def relative_error(self, solution: Solution) -> float:
        """Return the error of a solution as a share of the references' variance; NaN without samples."""
        if not self.samples:
            return math.nan
        return self.share(self.squared_error(solution))

    def share(self, error: float) -> float:
        """Return a sum of squared errors as a share of the references' variance."""
        variance = float((self._sums["rr"] - self._sums["r"].square() / self.samples).sum())
        if variance > 0.0:
            return error / variance
        return float(error > 0.0)

    def _solve_many(self, ridge: float, intercept: bool) -> tuple[Tensor, float] | None:
        """Solve from products: weights and the sum of squared errors."""
        sums, means = self._sums, self._sums["x"] / self.samples
        cross, squares = sums["xy"], sums["yy"]
        if intercept:
            cross = cross.baddbmm(means.unsqueeze(2), sums["y"].unsqueeze(1), alpha=-1)
            squares = squares - sums["y"].square() / self.samples
        cached = self._factors.pop(self.samples, None)
        if cached and cached[:2] == (ridge, intercept):
            factor = cached[2]
        else:
            matrix = self._products()
            # A view: centring turns it from sums of squares into sums about the means; `floor` is computed before.
            diagonal = matrix.diagonal(dim1=1, dim2=2)
            floor = _LEAST_VARIANCE * diagonal
            if intercept:
                matrix.baddbmm_(sums["x"].unsqueeze(2), means.unsqueeze(1), alpha=-1)
            penalty = _penalty(diagonal, ridge)
            # Inputs are scaled before the decomposition. An input that only varies by rounding is scaled to 0: its
            # equation is separate from the others, and its coefficient is 0.
            scale = (diagonal + penalty).masked_fill(diagonal <= floor, torch.inf).rsqrt()
            matrix.mul_(scale.unsqueeze(1)).mul_(scale.unsqueeze(2))
            # The penalty is in the scale, so that the scaled diagonal is 1, up to rounding.
            diagonal.fill_(1.0)
            # In place, which needs a column-major matrix: the transpose of a symmetric matrix is the matrix itself.
            info = torch.empty(len(matrix), dtype=torch.int32, device=matrix.device)
            torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, info))
            if bool(info.any()):
                return None
            factor = _Factor(matrix.mT, scale, penalty)
        self._factors[self.samples] = ridge, intercept, factor
        scales = factor.scale.unsqueeze(2)
        weights = _solve_factored(factor.lower, cross * scales).mul_(scales)
        # By the equations, `xx` times the weights is `cross` minus the penalty times the weights.
        projection = torch.linalg.vecdot(weights.flatten(), (cross + factor.penalty.unsqueeze(2) * weights).flatten())
        return weights, float(squares.sum() - projection)

    def _solve_few(self, ridge: float, intercept: bool) -> tuple[Tensor, float] | None:
        """Solve the dual problem, with one number per sample, for few samples; the solution is the same."""
        inputs, residuals = self._join_samples()
        if intercept:
            residuals = residuals - residuals.mean(1, keepdim=True)
        if (self.samples, intercept) not in self._few:
            # Inputs over the roots of their penalties at ridge 1, the inverse roots, and products of scaled inputs.
            floor = _LEAST_VARIANCE * inputs.square().sum(1)
            if intercept:
                inputs = inputs - inputs.mean(1, keepdim=True)
            squares = inputs.square().sum(1)
            roots = _penalty(squares, 1.0).masked_fill(squares <= floor, torch.inf).rsqrt().unsqueeze(1)
            self._few[self.samples, intercept] = inputs * roots, roots, symmetric((inputs * roots).mT)
        scaled, scale, products = self._few[self.samples, intercept]
        matrix = products / ridge
        matrix.diagonal(dim1=1, dim2=2).add_(1.0)
        lower, info = torch.linalg.cholesky_ex(matrix)
        if bool(info.any()):
            return None
        # ``(X'X + 1)^-1 X'Y = X'(XX' + 1)^-1 Y``, and ``(XX' + 1)^-1 Y`` is the error itself.
        errors = _solve_factored(lower, residuals)
        return (scaled.mT @ errors).mul_(scale.mT / ridge), float(errors.square().sum())

    def _products(self) -> Tensor:
        """Return the sums of products of inputs, which may be changed in place."""
        if self._parts:
            first, second = self._parts
            return first._products().add_(second._read_products())
        products = self._read_products()
        if products is self._sums.get("xx"):
            products = products.clone()
        return products

    def _read_products(self) -> Tensor:
        """Return the sums of products of inputs, which mustn't be changed."""
        if self._parts:
            return self._products()
        if self._rows:
            inputs, _ = self._join_samples()
            return symmetric(inputs)
        return self._sums["xx"]

    def _join_samples(self) -> tuple[Tensor, Tensor]:
        """Return all samples that are kept: inputs and residuals, (groups, samples, ...)."""
        if self._rows and len(self._rows) > 1:
            inputs, residuals = zip(*self._rows, strict=True)
            self._rows = [(torch.cat(inputs, 1), torch.cat(residuals, 1))]
        assert self._rows  # only called while samples are kept
        return self._rows[0]

    def _multiply(self, inputs: Tensor, residuals: Tensor) -> None:
        if not self._shares_products:
            self._accumulate("xx", symmetric(inputs))
        self._accumulate("xy", inputs.mT @ residuals)

    def _accumulate(self, name: str, total: Tensor) -> None:
        if name in self._sums:
            self._sums[name].add_(total)
        else:
            self._sums[name] = total


def symmetric(rows: Tensor) -> Tensor:
    """Return ``rows.mT @ rows``, (groups, columns, columns), of rows (groups, rows, columns)."""
    if rows.device.type != "cpu":
        return rows.mT @ rows
    # NumPy sees that both factors are one matrix and computes half of the symmetric product; PyTorch computes it all.
    with np.errstate(invalid="ignore", over="ignore"):
        products = [matrix.T @ matrix for matrix in rows.numpy()]
    stacked = np.stack(products) if len(products) > 1 else products[0][None]
    return torch.from_numpy(stacked)


@dataclass(frozen=True)
class _Factor:
    """The Cholesky factor of scaled equations, the scale and the penalty, (groups, unknowns)."""

    lower: Tensor
    scale: Tensor
    penalty: Tensor


def _solve_factored(lower: Tensor, values: Tensor) -> Tensor:
    """Solve equations by their Cholesky factor."""
    # As `torch.cholesky_solve`, which copies the factor first.
    half = torch.linalg.solve_triangular(lower, values, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return solution


def _penalty(squares: Tensor, ridge: float) -> Tensor:
    return ridge * (squares + _FLOOR * squares.mean(1, keepdim=True))


@dataclass(frozen=True)
class Solution:
    """Coefficients ``(groups, unknowns, outputs)`` and intercepts ``(groups, outputs)``."""

    weights: Tensor
    shift: Tensor
    error: float = math.nan  # the sum of squared errors on the samples that it was solved from


@dataclass(frozen=True)
class Fit:
    """A solution, its ridge and its errors: squared, as shares of the references' variance."""

    solution: Solution  # the coefficients
    ridge: float  # the one chosen; infinite if changing nothing was best
    before: float  # error of the zero solution
    after: float  # error of the solution, on all samples
    held_out: float  # error on the held-out samples of the solution from the others; NaN if none are held out


def fit(learned: NormalEquations, validation: NormalEquations, ridge: float | None, *, intercept: bool) -> Fit:
    """Choose a ridge, if None is given, on the held-out samples, and solve on all."""
    chosen, held_out = _choose(learned, validation, ridge, intercept=intercept)
    equations = learned.combine(validation)
    solution = equations.solve(chosen, intercept=intercept) if chosen < math.inf else None
    before = equations.relative_error(equations.unchanged())
    if solution is None:
        return Fit(equations.unchanged(), chosen, before, before, held_out)
    return Fit(solution, chosen, before, equations.share(solution.error), held_out)


def fit_by(solve: Callable[[NormalEquations], Solution], learned: NormalEquations, validation: NormalEquations) -> Fit:
    """Solve by a rule without a ridge: from ``learned``, for the error on ``validation``, then from all samples."""
    held_out = validation.relative_error(solve(learned)) if validation.samples else math.nan
    equations = learned.combine(validation)
    solution = solve(equations)
    before = equations.relative_error(equations.unchanged())
    return Fit(solution, 0.0, before, equations.relative_error(solution), held_out)


def _choose(
    learned: NormalEquations, validation: NormalEquations, ridge: float | None, *, intercept: bool
) -> tuple[float, float]:
    """Return the ridge with the smallest error on held-out samples, and the error."""
    if not validation.samples:
        return GRID[_FIRST_TRIED] if ridge is None else ridge, math.nan
    nothing = validation.relative_error(validation.unchanged())
    if ridge is not None:
        solution = learned.solve(ridge, intercept=intercept)
        if solution is None:
            return math.inf, nothing
        return ridge, validation.relative_error(solution)
    # Downhill along the grid, to smaller ridges first; the factor of the best one is kept.
    best, least = _FIRST_TRIED, math.inf

    def is_better(tried: int) -> bool:
        nonlocal best, least
        factors = learned.factors()
        solution = learned.solve(GRID[tried], intercept=intercept)
        error = math.inf if solution is None else validation.relative_error(solution)
        if error < least:
            best, least = tried, error
            return True
        learned.take_factors(factors)
        return False

    is_better(_FIRST_TRIED)
    # The error is assumed to have one minimum along the grid, so that few of the eight ridges are tried.
    for way in (-1, 1):
        while 0 <= best + way < len(GRID) and is_better(best + way):
            pass
        if best != _FIRST_TRIED:
            break
    if least < nothing:
        return GRID[best], least
    return math.inf, nothing
