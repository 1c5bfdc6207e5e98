from __future__ import annotations

import pytest
import torch
from distill_nets import inputs, pair

from nni_topo.recovery.course import Clock
from nni_topo.recovery.lesson import Lesson, student_copy
from nni_topo.recovery.rates import RATES, try_rates


def tried(judge, total=300, rates=RATES, constant=100.0, clock=None, made=None):
    dense, original = pair()
    pool = ((inputs(64),), {})
    lesson = Lesson(original, dense, pool, "kl", 2.0)

    def student():
        if made is not None:
            made.append("a network")
        return student_copy(dense, pool)

    return try_rates(
        lesson,
        student,
        lambda: lesson.batches(torch.arange(64), 64, 0, None, False),
        judge,
        1.0,
        constant,
        total,
        is_normed=False,
        rates=rates,
        clock=clock,
        progress=False,
    )


@pytest.mark.parametrize(("losses", "expected"), [([0.5], 6e-3), ([4.0, 2.0], 2e-3), ([4.0, float("nan"), 1.9], 6e-4)])
def test_the_highest_rate_is_taken_that_breaks_nothing(losses, expected):
    left = list(losses)
    found = tried(lambda _: left.pop(0))
    assert [each.loss for each in found] == pytest.approx(losses, nan_ok=True)
    assert [each.is_taken for each in found] == [False] * (len(losses) - 1) + [True]
    assert found[-1].lr == expected


@pytest.mark.parametrize(
    ("constant", "expected"), [(100.0, 6e-3), (4.7, 6e-3), (4.0, 2e-3), (1.5, 6e-4), (1.0, 2e-4), (0.5, 6e-4)]
)
def test_a_rate_must_not_lead_to_a_network_that_always_gives_the_same_answer(constant, expected):
    """After a loss of 1, with losses of 1.9, 1.7, 1.1 and 0.9: it may grow by a quarter of what is between them."""
    left = [1.9, 1.7, 1.1, 0.9]
    assert tried(lambda _: left.pop(0), constant=constant)[-1].lr == expected


def test_none_is_taken_where_all_break_the_network():
    found = tried(lambda _: 2.1)
    assert [each.lr for each in found] == list(RATES)
    assert not any(each.is_taken for each in found)


@pytest.mark.parametrize(("total", "steps"), [(300, 10), (1000, 30), (10, 10)])
def test_a_rate_costs_few_steps(total, steps):
    assert {each.steps for each in tried(lambda _: 9.0, total)} == {steps}


def test_each_rate_begins_with_the_same_network():
    """Steps of almost no length leave it as it is, whatever was tried before."""
    seen = []
    tried(lambda net: seen.append(net.first.weight.detach().clone()) or 9.0, rates=(1.0, 1e-12))
    assert not torch.allclose(seen[0], seen[1], atol=0.1)
    assert torch.allclose(seen[1], pair()[0].first.weight, atol=1e-10)


@pytest.mark.parametrize(("seconds", "count"), [(0.0, 0), (100.0, 3)])
def test_no_network_learns_where_the_time_is_over(seconds, count):
    """With time, one takes the first step, one shows how long a step takes, and the first rate has one."""
    made = []
    found = tried(lambda _: 0.5, clock=Clock(seconds), made=made)
    assert (len(made), len(found)) == (count, min(count, 1))
