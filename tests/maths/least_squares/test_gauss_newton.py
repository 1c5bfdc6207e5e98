"""Damped Gauss-Newton steps against problems whose least squares are known."""

from __future__ import annotations

import torch

from nni_topo.maths.least_squares.gauss_newton import gauss_newton


class Linear:
    """|A x - b|^2 over two tensors of unknowns."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(30, 8, generator=generator, dtype=torch.float64)
        self.wanted = torch.randn(30, generator=generator, dtype=torch.float64)

    def lacking(self, at):
        return self.matrix @ torch.cat([each.flatten() for each in at]) - self.wanted

    def error(self, at):
        return float(self.lacking(at).square().sum())

    def gradient(self, at):
        return self.split(self.matrix.T @ self.lacking(at))

    def product(self, at, vector):
        return self.split(self.matrix.T @ (self.matrix @ torch.cat([each.flatten() for each in vector])))

    def split(self, values):
        return [values[:6].reshape(2, 3), values[6:]]


class Rosenbrock:
    """The valley (1 - x)^2 + 100 (y - x^2)^2, whose least value is 0 at (1, 1)."""

    def error(self, at):
        x, y = at[0].tolist()
        return (1 - x) ** 2 + 100 * (y - x * x) ** 2

    def jacobian(self, at):
        return torch.tensor([[-1.0, 0.0], [-20 * float(at[0][0]), 10.0]], dtype=torch.float64)

    def gradient(self, at):
        x, y = at[0].tolist()
        return [self.jacobian(at).T @ torch.tensor([1 - x, 10 * (y - x * x)], dtype=torch.float64)]

    def product(self, at, vector):
        matrix = self.jacobian(at)
        return [matrix.T @ (matrix @ vector[0])]


def zeros():
    return [torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]


def test_linear_problems_are_solved_in_a_step_of_as_many_iterations_as_unknowns():
    problem = Linear()
    found, least, first = gauss_newton(problem, zeros(), steps=1, iterations=8, damping=0.0, seed=0)
    best = torch.linalg.lstsq(problem.matrix, problem.wanted).solution
    torch.testing.assert_close(torch.cat([each.flatten() for each in found]), best)
    assert first == float(problem.wanted.square().sum())
    assert least == problem.error(found) < first


def test_a_curved_valley_is_followed_to_its_end():
    start = [torch.tensor([-1.2, 1.0], dtype=torch.float64)]
    found, least, first = gauss_newton(Rosenbrock(), start, steps=60, iterations=2, damping=1e-2, seed=0)
    assert least < 1e-10 < first
    torch.testing.assert_close(found[0], torch.ones(2, dtype=torch.float64), atol=1e-4, rtol=0)


def test_a_step_that_makes_nothing_better_is_left_out():
    class Worse(Linear):
        def gradient(self, at):
            return [-each for each in super().gradient(at)]

    start = zeros()
    found, least, first = gauss_newton(Worse(), start, steps=2, iterations=8, damping=0.0, seed=0)
    assert least == first
    assert found is start


def test_errors_that_are_not_numbers_are_never_taken():
    class Broken(Linear):
        def error(self, at):
            return super().error(at) if not any(each.any() for each in at) else float("nan")

    start = zeros()
    assert gauss_newton(Broken(), start, steps=2, iterations=4, damping=1e-2, seed=0)[0] is start


def test_tensors_of_unknowns_in_other_units_are_solved_at_once():
    """The diagonal of each tensor is taken out before: then the unknowns of a problem without mixing need one step."""

    class Units(Linear):
        def __init__(self):
            super().__init__()
            self.matrix = torch.eye(30, 8, dtype=torch.float64)
            self.matrix[:, 6:] *= 10.0

    problem = Units()
    found, least, _ = gauss_newton(problem, zeros(), steps=1, iterations=1, damping=0.0, seed=0)
    best = torch.linalg.lstsq(problem.matrix, problem.wanted).solution
    torch.testing.assert_close(torch.cat([each.flatten() for each in found]), best)
    assert least == problem.error(found)
