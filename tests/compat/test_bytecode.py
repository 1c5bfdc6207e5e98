"""The traced values read the bytecode of the Python that runs the tests."""

from __future__ import annotations

import dis
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nni.common.concrete_trace_utils import concrete_trace
from torch import Tensor, nn

ONES = torch.ones(4, 3)


def branch(self: nn.Module, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x + 1
    return x - 1


def branch_and(self: nn.Module, x: Tensor) -> Tensor:
    if x.sum() > 0 and x.max() > 0.5:
        return x + 1
    return x - 1


def branch_on_shape(self: nn.Module, x: Tensor) -> Tensor:
    if x.shape[0] == 4 and x.dim() != 3:
        return x + 1
    return x - 1


def value_of_and(self: nn.Module, x: Tensor) -> Tensor:
    flag = x.sum() > 0 and x > 0.5
    return x * flag


def loop_while(self: nn.Module, x: Tensor) -> Tensor:
    while x.sum() < 100:
        x = x * 2
    return x


def unpacking(self: nn.Module, x: Tensor) -> Tensor:
    first, second = x.chunk(2)
    rows, columns = x.shape
    return first * rows + second * columns


def list_display(self: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([*x.chunk(2), x, *x.chunk(4)])


def scaled(x: Tensor, factor: float = 1.0, shift: float = 0.0) -> Tensor:
    return x * factor + shift


def call_with_keywords(self: nn.Module, x: Tensor, options: dict[str, float]) -> Tensor:
    return scaled(x, **options)


def items(self: nn.Module, x: Tensor, options: dict[str, float]) -> Tensor:
    for _, value in options.items():  # noqa: PERF102
        x = x * value
    return x


def length(self: nn.Module, x: Tensor) -> Tensor:
    return x * len(x)


CASES: list[Callable[..., Tensor]] = [
    branch, branch_and, branch_on_shape, value_of_and, loop_while, unpacking, list_display, length,
]  # fmt: skip
KEYWORD_CASES: list[Callable[..., Tensor]] = [call_with_keywords, items]


def module(forward: Callable[..., Tensor]) -> nn.Module:
    built = type("Case", (nn.Module,), {"forward": forward})()
    assert isinstance(built, nn.Module)
    return built


@pytest.mark.parametrize("operator_patch", [True, False])
@pytest.mark.parametrize("forward", CASES, ids=lambda case: case.__name__)
@pytest.mark.quick_every(2)
def test_trace_computes_what_the_function_computes(forward: Callable[..., Tensor], operator_patch: bool) -> None:
    traced = concrete_trace(module(forward), (ONES,), use_operator_patch=operator_patch)
    same_branch = ONES + 0.01 * torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    for x in (ONES, same_branch):
        torch.testing.assert_close(traced(x), forward(None, x))


@pytest.mark.parametrize("forward", KEYWORD_CASES, ids=lambda case: case.__name__)
def test_trace_opens_a_dictionary(forward: Callable[..., Tensor]) -> None:
    traced = concrete_trace(module(forward), (ONES, {"factor": 3.0}))
    torch.testing.assert_close(traced(2 * ONES, {"factor": 5.0}), forward(None, 2 * ONES, {"factor": 5.0}))


@pytest.mark.parametrize("start", [1.0, -1.0])
def test_trace_follows_the_branch_that_its_input_takes(start: float) -> None:
    traced = concrete_trace(module(branch), (start * ONES,))
    torch.testing.assert_close(traced(ONES), ONES + start)


def test_branch_over_a_jump_too_far_for_one_byte() -> None:
    body = "        x = x + 1\n" * 100
    namespace: dict[str, Any] = {}
    exec(f"def forward(self, x):\n    if x.sum() > 0:\n{body}        return x\n    return x - 1\n", namespace)
    opnames = [instruction.opname for instruction in dis.get_instructions(namespace["forward"])]
    assert "EXTENDED_ARG" in opnames
    traced = concrete_trace(module(namespace["forward"]), (ONES,), use_operator_patch=False)
    torch.testing.assert_close(traced(ONES), ONES + 100)
