from __future__ import annotations

import pytest
import torch
from distill_nets import inputs, pair
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nni_topo.recovery.course import RATES, Clock, try_rates
from nni_topo.recovery.lesson import Lesson, student_of


class Timed(Lesson):
    """Counts the steps, which take time, and notes the learning rates of those before them."""

    def objective(self, student, call, wanted):
        self.watch.now += 0.5
        self.steps.append(student)
        return super().objective(student, call, wanted)


def tried(
    judge,
    total=300,
    rates=RATES,
    constant=100.0,
    clock=None,
    made=None,
    first=1.0,
    progress=False,
    watch=None,
    steps=(),
    processes=None,
):
    dense, original = pair()
    pool = ((inputs(64),), {})
    lesson = (Lesson if watch is None else Timed)(original, dense, pool, "kl", 2.0)
    lesson.watch, lesson.steps = watch, steps

    def student():
        if made is not None:
            made.append("a network")
        return student_of(dense, pool)

    return try_rates(
        lesson,
        student,
        lambda: lesson.batches(torch.arange(64), 64, 0, None, False),
        judge,
        first,
        constant,
        total,
        is_normed=False,
        rates=rates,
        clock=clock,
        seconds_of_a_step=0.5,
        progress=progress,
        processes=processes,
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


@pytest.mark.parametrize(("first", "most"), [(2.0, 4.0), (0.5, 1.0)])
def test_a_rate_may_double_the_loss(first, most):
    left = [1.01 * most, most]
    assert [each.is_taken for each in tried(lambda _: left.pop(0), first=first)] == [False, True]


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


@pytest.mark.parametrize(
    ("seconds", "trials", "steps"),
    [
        (2000.0, 5, 12),
        (100.0, 5, 6),  # 3 % of 100 seconds
        (13.0, 3, 3),  # 13, 11.5 and 10 seconds are left: twenty more steps take 10
        (0.5, 0, 0),
    ],
)
def test_time_allows_few_steps_and_few_rates(watch, seconds, trials, steps):
    """A step takes half a second."""
    taken = []
    found = tried(lambda _: 9.0, 400, clock=Clock(seconds), watch=watch, steps=taken)
    assert [each.steps for each in found] == [steps] * trials
    counts = [sum(each is student for each in taken) for student in dict.fromkeys(taken)]
    assert counts == [steps] * trials


def test_the_rate_rises_in_three_tenths_of_the_steps_and_falls_in_the_others():
    seen = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    try:
        tried(lambda _: 0.5, 10, rates=(0.21,))
    finally:
        hook.remove()
    assert seen == pytest.approx([0.07, 0.07, 0.14, 0.21, 0.18, 0.15, 0.12, 0.09, 0.06, 0.03])
