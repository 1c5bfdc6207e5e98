from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from nni_topo.maths.least_squares.normal import GRID, NormalEquations, fit


def problem(samples=60, unknowns=5, outputs=3, groups=1, noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(groups, samples, unknowns, generator=generator, dtype=torch.float64) + 2.0
    weights = torch.randn(groups, unknowns, outputs, generator=generator, dtype=torch.float64)
    shift = torch.randn(groups, 1, outputs, generator=generator, dtype=torch.float64)
    targets = inputs @ weights + shift
    targets += noise * torch.randn(targets.shape, generator=generator, dtype=torch.float64)
    return inputs, targets, weights, shift[:, 0]


def equations(inputs, targets, pieces=4):
    sums = NormalEquations()
    for x, y in zip(inputs.chunk(pieces, dim=1), targets.chunk(pieces, dim=1), strict=True):
        sums.add(x, y, y)
    return sums


def test_solution_is_that_of_numpy():
    inputs, targets, _, _ = problem(noise=0.5)
    solution = equations(inputs, targets).solve(0.0, intercept=True)
    augmented = np.column_stack([inputs[0], np.ones(inputs.shape[1])])
    expected = np.linalg.lstsq(augmented, targets[0], rcond=None)[0]
    np.testing.assert_allclose(solution.weights[0], expected[:-1], rtol=1e-8)
    np.testing.assert_allclose(solution.shift[0], expected[-1], rtol=1e-8)


def test_covariances_are_those_of_numpy():
    inputs, targets, _, _ = problem(noise=0.5, groups=2)
    own, across, variances = equations(inputs, targets).covariances()
    for group in range(2):
        expected = np.cov(inputs[group].T, targets[group].T, bias=True)
        np.testing.assert_allclose(own[group], expected[:5, :5], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(across[group], expected[:5, 5:], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(variances[group], expected.diagonal()[5:], rtol=1e-10)


def test_solution_without_intercept_goes_through_the_origin():
    inputs, targets, _, _ = problem(noise=0.5)
    solution = equations(inputs, targets).solve(0.0, intercept=False)
    expected = np.linalg.lstsq(inputs[0].numpy(), targets[0].numpy(), rcond=None)[0]
    np.testing.assert_allclose(solution.weights[0], expected, rtol=1e-8)
    assert not solution.shift.any()


def test_ridge_minimises_error_plus_share_of_variance():
    inputs, targets, _, _ = problem(noise=0.5)
    solution = equations(inputs, targets).solve(0.3, intercept=True)
    x, y = inputs[0] - inputs[0].mean(0), targets[0] - targets[0].mean(0)
    squares = x.square().sum(0)
    penalty = 0.3 * (squares + 0.1 * squares.mean()).diag()
    np.testing.assert_allclose(solution.weights[0], torch.linalg.solve(x.T @ x + penalty, x.T @ y), rtol=1e-8)


def test_constant_input_gets_no_weight():
    inputs, targets, _, _ = problem()
    inputs[:, :, 2] = 7.0
    solution = equations(inputs, targets).solve(1e-6, intercept=True)
    assert not solution.weights[:, 2].any()
    assert bool(torch.isfinite(solution.weights).all())


def test_errors_are_those_of_the_samples():
    inputs, targets, _, _ = problem(noise=0.5)
    sums = equations(inputs, targets)
    solution = sums.solve(0.1, intercept=True)
    residual = targets - inputs @ solution.weights - solution.shift[:, None]
    assert sums.squared_error(solution) == pytest.approx(float(residual.square().sum()), rel=1e-9)
    variance = float((targets - targets.mean(1, keepdim=True)).square().sum())
    assert sums.relative_error(solution) == pytest.approx(float(residual.square().sum()) / variance, rel=1e-9)
    assert sums.squared_error(sums.unchanged()) == pytest.approx(float(targets.square().sum()), rel=1e-9)


def test_fit_recovers_exact_relations_with_the_smallest_ridge():
    inputs, targets, weights, _ = problem(samples=200)
    found = fit(equations(inputs[:, :150], targets[:, :150]), equations(inputs[:, 150:], targets[:, 150:]), None,
                intercept=True)  # fmt: skip
    assert found.ridge == GRID[0]
    assert found.held_out < 1e-10
    assert found.after < 1e-10 < found.before
    torch.testing.assert_close(found.solution.weights, weights, rtol=1e-5, atol=1e-5)


def test_fit_changes_nothing_where_nothing_is_to_be_learned():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 400, 30, generator=generator, dtype=torch.float64)
    noise = torch.randn(1, 400, 1, generator=generator, dtype=torch.float64)
    found = fit(equations(inputs[:, :40], noise[:, :40]), equations(inputs[:, 40:], noise[:, 40:]), None,
                intercept=False)  # fmt: skip
    assert found.ridge == math.inf
    assert not found.solution.weights.any()
    assert found.after == found.before


def test_fit_learns_from_the_held_out_samples_in_the_end():
    inputs, targets, weights, _ = problem(samples=6, unknowns=5, noise=0.0)
    few, rest = equations(inputs[:, :3], targets[:, :3], 1), equations(inputs[:, 3:], targets[:, 3:], 1)
    found = fit(few, rest, 1e-10, intercept=True)
    torch.testing.assert_close(found.solution.weights, weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_few_samples_are_solved_as_products_are(ridge, intercept):
    """Of fewer samples than unknowns the products aren't formed, which says the same at less cost."""
    inputs, targets, _, _ = problem(samples=12, unknowns=40, noise=0.5, groups=2)
    inputs[:, :, 3] = 7.0
    few, many = equations(inputs, targets), equations(inputs, targets)
    assert many.sums["xx"].shape == (2, 40, 40)  # asked for, they are there
    one, other = (sums.solve(ridge, intercept=intercept) for sums in (few, many))
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(one.shift, other.shift, rtol=1e-8, atol=1e-11)
    assert one.error == pytest.approx(other.error, rel=1e-6)
    assert few.squared_error(one) == pytest.approx(many.squared_error(one), rel=1e-6)


@pytest.mark.parametrize(("samples", "unknowns"), [(60, 5), (12, 40), (50, 40)])
def test_a_solution_knows_its_error_and_a_merged_problem_is_that_of_all_samples(samples, unknowns):
    inputs, targets, _, _ = problem(samples=samples, unknowns=unknowns, noise=0.5)
    parts = [equations(inputs[:, chosen], targets[:, chosen], 2) for chosen in (slice(0, 30), slice(30, None))]
    whole, merged = equations(inputs, targets), parts[0].combine(parts[1]) if samples > 30 else parts[0]
    found, again = (each.solve(0.1, intercept=True) for each in (whole, merged))
    torch.testing.assert_close(again.weights, found.weights, rtol=1e-8, atol=1e-11)
    assert found.error == pytest.approx(whole.squared_error(found), rel=1e-8)
    assert merged.relative_error(found) == pytest.approx(whole.relative_error(found), rel=1e-8)


def test_equations_of_known_inputs_take_their_products_over():
    inputs, targets, _, _ = problem(samples=40, noise=0.5)
    known = equations(inputs[:, :30], targets[:, :30]), equations(inputs[:, 30:], targets[:, 30:])
    first = fit(*known, 0.1, intercept=True)
    later = tuple(NormalEquations(each) for each in known)
    for sums, chosen in zip(later, (slice(0, 30), slice(30, None)), strict=True):
        sums.add(inputs[:, chosen], 2.0 * targets[:, chosen], targets[:, chosen])
    second = fit(*later, 0.1, intercept=True)
    torch.testing.assert_close(second.solution.weights, 2.0 * first.solution.weights, rtol=1e-12, atol=1e-14)
    other = fit(*later, 0.3, intercept=False)
    alone = fit(equations(inputs[:, :30], 2.0 * targets[:, :30]), equations(inputs[:, 30:], 2.0 * targets[:, 30:]), 0.3,
                intercept=False)  # fmt: skip
    torch.testing.assert_close(other.solution.weights, alone.solution.weights, rtol=1e-9, atol=1e-12)


def test_of_references_that_never_vary_any_error_is_all():
    inputs, targets, _, _ = problem()
    sums = equations(inputs, torch.ones_like(targets))
    assert sums.share(0.0) == 0.0
    assert sums.share(1e-9) == 1.0


@pytest.mark.parametrize("samples", [60, 4])
def test_a_device_solves_as_the_cpu_does(device, samples):
    inputs, targets, _, _ = problem(samples, noise=0.5, groups=2)
    expected = equations(inputs, targets, pieces=2).solve(0.1, intercept=True)
    found = equations(inputs.to(device), targets.to(device), pieces=2).solve(0.1, intercept=True)
    assert found.weights.device == found.shift.device == device
    torch.testing.assert_close(found.weights.cpu(), expected.weights, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.shift.cpu(), expected.shift, rtol=1e-9, atol=1e-10)


def test_products_that_overflow_are_not_finite():
    inputs, targets, _, _ = problem()
    assert equations(inputs, targets).is_finite()
    assert not equations(inputs * 1e160, targets).is_finite()  # their squares are more than a number can be
    assert not equations(inputs, targets * 1e160).is_finite()


def test_the_ridge_of_the_least_error_in_the_grid_is_found():
    """From the middle of the grid in both directions, as long as the error has one valley."""
    chosen = set()
    for seed, noise, samples in itertools.product(range(6), (0.01, 1.0, 3.0, 10.0), (40, 300)):
        inputs, targets, _, _ = problem(samples, unknowns=20, noise=noise, seed=seed)
        half = samples // 2
        learned, held = equations(inputs[:, :half], targets[:, :half]), equations(inputs[:, half:], targets[:, half:])
        errors = [held.relative_error(learned.solve(ridge, intercept=True)) for ridge in GRID]
        best = int(np.argmin(errors))
        falls, rises = np.diff(errors[: best + 1]), np.diff(errors[best:])
        if (falls < 0).all() and (rises > 0).all() and min(errors) < held.relative_error(held.unchanged()):
            found = fit(learned, held, None, intercept=True)
            assert found.ridge == GRID[best]
            assert found.held_out == pytest.approx(errors[best], rel=1e-9)
            chosen.add(best)
    assert len(chosen) >= 4


def test_where_no_ridge_has_a_solution_none_is_taken():
    inputs, targets, _, _ = problem()
    parts = slice(30), slice(30, None)
    learned, held = (equations(1e160 * inputs[:, part], targets[:, part], 1) for part in parts)
    found = fit(learned, held, None, intercept=True)
    assert found.ridge == math.inf
    assert not found.solution.weights.any()
    assert found.after == found.before
