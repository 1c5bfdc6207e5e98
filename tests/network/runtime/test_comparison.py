"""How far apart results are: by hand, with NaN, infinite values, zeros and other types among them."""

from __future__ import annotations

import math

import pytest
import torch

from nni_topo.network.runtime.comparison import agree, difference, same_program

NAN, INF = math.nan, math.inf
# Expected, given, and how far they are apart.
CASES = {
    "equal": ([1.0, -2.0], [1.0, -2.0], 0.0),
    "of the largest": ([1.0, -4.0], [1.5, -4.0], 0.125),
    "of the lowest, below": ([1.0, -4.0], [1.0, -6.0], 0.5),
    "of zeros, as it is": ([0.0, 0.0], [0.5, -0.75], 0.75),
    "nan in both": ([NAN, 2.0], [NAN, 1.0], 0.5),
    "nan against a number": ([NAN, 2.0], [2.0, 2.0], INF),
    "a number against nan": ([2.0, 2.0], [NAN, 2.0], INF),
    "infinite in both": ([INF, 2.0], [INF, 1.5], 0.25),
    "of another sign": ([INF, 2.0], [-INF, 2.0], INF),
    "infinite against a number": ([INF, 2.0], [5.0, 2.0], INF),
    "a number against infinite": ([5.0, 2.0], [-INF, 2.0], INF),
    "nothing finite": ([NAN, INF], [NAN, INF], 0.0),
    "nothing finite, and apart": ([NAN, INF], [NAN, 3.0], INF),
    "zeros beside nan, as they are": ([NAN, 0.0], [NAN, 0.25], 0.25),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_is_relative_to_the_largest_expected_value(name: str, dtype: torch.dtype) -> None:
    expected, actual, apart = CASES[name]
    assert difference(torch.tensor(expected, dtype=dtype), torch.tensor(actual, dtype=dtype)) == apart


def test_types_may_differ_and_integers_count_too() -> None:
    expected = torch.tensor([1.0, 4.0])
    assert difference(expected, torch.tensor([1.0, 5.0], dtype=torch.float64)) == 0.25
    assert difference(torch.tensor([1, 4]), torch.tensor([3, 4])) == 0.5
    assert difference(torch.tensor([True, False]), torch.tensor([True, True])) == 1.0
    assert difference(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0


def test_runs_agree_up_to_the_tolerance_tensor_by_tensor() -> None:
    one, other = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0])
    assert agree([one, one], [one, other], 0.25)
    assert not agree([one, one], [one, other], 0.2499)
    assert not agree([one, one], [other, one], 0.2499)
    assert not agree([one], [one, one], 1.0)
    assert not agree([one], [one[None]], 1.0)
    assert agree([], [], 0.0)
    assert agree([torch.tensor([NAN, INF])], [torch.tensor([NAN, INF])], 0.0)


@pytest.mark.parametrize(
    ("dtypes", "most"),
    [
        ([], 1e-4),
        ([torch.float32, torch.float64, torch.int8], 1e-4),
        ([torch.float32, torch.float16], 8 * 2.0**-10),
        ([torch.bfloat16, torch.float16], 8 * 2.0**-7),
    ],
)
def test_programs_may_be_as_far_apart_as_the_coarsest_type_rounds(dtypes, most):
    assert same_program(torch.zeros(1).to(dtype) for dtype in dtypes) == most


def test_imaginary_parts_count() -> None:
    expected = torch.tensor([2.0 + 1.0j, 4.0 - 1.0j])
    assert difference(expected, expected.clone()) == 0.0
    assert difference(expected, expected + 1.0j) == pytest.approx(0.25)
    assert difference(expected.conj(), expected) == pytest.approx(0.5)
    assert difference(torch.tensor([2.0, 4.0]), torch.tensor([2.0, 4.0 + 1.0j])) == pytest.approx(0.25)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors_differ_as_dense_ones(layout: torch.layout) -> None:
    expected = torch.tensor([[0.0, 4.0], [1.0, 0.0]])
    actual = torch.tensor([[0.0, 4.0], [0.0, 1.0]])
    assert difference(expected.to_sparse(layout=layout), expected.to_sparse(layout=layout)) == 0.0
    assert difference(expected.to_sparse(layout=layout), actual.to_sparse(layout=layout)) == pytest.approx(0.25)
