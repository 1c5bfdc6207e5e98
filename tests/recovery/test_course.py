from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from distill_nets import inputs, pair
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nni_topo.recovery.clock import Clock
from nni_topo.recovery.course import Course, Training, learning
from nni_topo.recovery.lesson import Lesson
from nni_topo.recovery.rates import RATES, range_test, try_rates


def training(student=None, **knobs):
    """Return what a small network learns from 64 images, in batches of 16."""
    dense, original = pair()
    lesson = Lesson(original, dense, ((inputs(64),), {}), "kl", 2.0)
    given = {
        "student": lambda: copy.deepcopy(student or dense),
        "batches": lambda: lesson.batches(torch.arange(64), 16, 0, None, False),
        "objective": lesson.objective,
        "total": 50,
        "look": lambda _: 0.5,
    }
    return Training(**given | knobs)


def course(total, losses=(), *, first=math.inf, clock=None, states=None):
    """Run a course whose looks find the given losses, the last one again and again, and without any ever smaller ones.

    Returned are the course and its rates; ``states`` gets the weights at each look.
    """
    left = list(losses) or [0.9**look for look in range(30)]
    rates = []

    def look(net):
        if states is not None:
            states.append(copy.deepcopy(net.state_dict()))
        return left.pop(0) if len(left) > 1 else left[0]

    usual = training()

    def objective(*given):
        rates.append(made.optimizer.param_groups[0]["lr"])
        return usual.objective(*given)

    own = replace(usual, objective=objective, total=total, look=look, first=first, clock=clock or Clock())
    made = Course(own, 0.01)
    made.run(progress=False)
    return made, rates


def test_the_rate_rises_stays_and_falls():
    _, rates = course(40)
    # The first of four rising steps has the rate of the second one, where one at zero would be lost.
    assert rates[:5] == pytest.approx([0.0025, 0.0025, 0.005, 0.0075, 0.01])
    assert rates[5:25] == pytest.approx([0.01] * 20)
    assert rates[25:] == pytest.approx([0.01 * left / 16 for left in range(15, 0, -1)])


def test_a_course_that_makes_progress_has_all_its_steps():
    done, rates = course(100)
    assert (done.done, len(rates), done.is_given_up) == (100, 100, False)
    assert [each.step for each in done.curve] == [*range(4, 100, 4), 100]


def test_the_rate_falls_at_once_where_there_is_no_more_progress():
    # Looks after 4, 8, ... steps, of which two are while the rate rises and don't count. The mean of the next fifth to
    # eighth isn't smaller than that of the four before, though the least is among them: at step 40 the fall begins.
    done, rates = course(100, [0.1, 0.1, 1.0, 0.5, 0.6, 0.5, 0.9, 0.45, 0.6, 0.6, 0.6])
    assert rates[10:41] == pytest.approx([0.01] * 31)
    assert rates[41] < 0.01
    # Three fifths of the course are before the fall and two after it.
    assert done.done == 67
    assert rates[-1] < 0.0005


def test_small_progress_counts_as_none():
    assert course(100, [1.0 - 1e-3 * look for look in range(25)])[0].done == 67


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([25.0], 72),  # the first look after a tenth of 600 steps
        ([0.9, 25.0, 19.0, 21.0, 19.0, 22.0, 21.0], 168),  # two in turn
        ([math.nan], 24),
    ],
)
def test_a_course_is_given_up_where_the_loss_grows(losses, steps):
    done, _ = course(600, losses, first=1.0)
    assert (done.is_given_up, done.done) == (True, steps)


def test_a_single_large_loss_does_not_end_a_course():
    done, _ = course(600, [0.9, 0.8, 30.0, 0.7, 0.6], first=1.0)
    assert not done.is_given_up


def test_a_course_ends_where_its_first_fifth_gains_nothing_at_any_rate():
    done, rates = course(600, [1.2, 1.3, 1.1, 1.2, 1.0, 1.5], first=1.0)
    assert (done.is_given_up, done.gains_nothing, done.done) == (True, True, 180)
    assert rates[120:] == pytest.approx([0.01 * left / 60 for left in range(60, 0, -1)])
    assert done.curve[-1].step == 180


@pytest.mark.parametrize(
    ("losses", "total"),
    [
        ([1.2, 1.2, 1.2, 1.2, 1.2, 1.4, 0.8], 600),  # the sixth loss is found where the rate has fallen
        ([1.2, 0.9, 1.2, 1.2, 1.2, 0.8], 600),  # a look has gained
        ([1.2], 240),  # of 48 steps little is known
    ],
)
def test_a_course_that_gains_early_or_where_the_rate_falls_goes_on_as_it_was(losses, total):
    done, rates = course(total, losses, first=1.0)
    falls = [1.4] if len(losses) == 7 else []
    plain, others = course(total, [each for each in losses if each not in falls])
    assert (done.gains_nothing, done.done) == (False, plain.done)
    assert len(rates) == len(others) + 60 * len(falls)
    torch.testing.assert_close(done.student.state_dict(), plain.student.state_dict(), rtol=0, atol=0)
    assert done.curve == plain.curve


def test_the_state_is_kept_where_two_looks_in_turn_were_best():
    states = []
    losses = [0.9, 0.8, 0.2, 0.85, 0.7, 0.6, 0.75, *[2.0] * 18]
    done, _ = course(100, losses, first=1.0, states=states)
    assert done.best_step == 24  # looks are after 4, 8, ... steps
    torch.testing.assert_close(done.best, states[5], rtol=0, atol=0)
    assert course(100, [0.9, 1.0, 0.9, 1.1, 0.8, 1.2], first=1.0)[0].best == {}


def test_time_that_is_over_takes_no_step():
    done, rates = course(100, [1.0], clock=Clock(1e-9))
    assert (done.done, rates, done.curve) == (0, [], [])


@pytest.mark.parametrize("has_bias", [True, False])
def test_channels_of_zeros_stay_zero_while_others_learn(has_bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4, bias=has_bias), nn.BatchNorm1d(4, momentum=None))
    with torch.no_grad():
        net[0].weight[1:3] = 0.0
        net[1].weight[1:3] = 0.0
        if has_bias:
            net[0].bias[1] = 0.0
        net[1].bias[[0, 2, 3]] = 0.5
    with learning(net, is_normed=True):
        assert net[1].training
        assert net[1].momentum == 0.1
        net(torch.randn(8, 3)).square().sum().backward()
    assert float(net[1].weight.grad[1]) == 0.0
    assert (net[1].bias.grad != 0).tolist() == [True, False, True, True]
    if has_bias:
        assert float(net[0].bias.grad[1]) == 0.0
    net.zero_grad()
    net[1].eval()
    net(torch.randn(8, 3)).square().sum().backward()
    assert float(net[0].weight.grad[0].abs().sum()) > 0.0


def test_time_left_is_what_neither_the_past_nor_the_last_judgements_take(watch):
    clock = Clock(100.0)
    watch.now += 10.0
    with clock.judging(4):
        watch.now += 2.0
    assert (clock.spent, clock.remaining_seconds) == (12.0, 88.0)
    clock.judged_at_end = 20
    assert clock.remaining_seconds == 78.0  # half a second for each
    with clock.judging(4):
        watch.now += 4.0
    assert clock.remaining_seconds == 74.0
    with clock.judging(8):
        watch.now += 2.0
    assert clock.remaining_seconds == 77.0


def tried(judge, steps=10, rates=RATES, **knobs):
    """Return what the range test finds for a network whose loss is 1 before any step, and 100 if it is constant."""
    return try_rates(training(**{"first": 1.0, "constant": 100.0} | knobs), judge, rates, steps, False)


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
    found = tried(lambda _: 2.1, 7)
    assert [(each.lr, each.steps, each.is_taken) for each in found] == [(rate, 7, False) for rate in RATES]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(1000, (8, 30)), (600, (8, 18)), (120, (3, 10)), (80, (3, 6)), (40, (3, 3)), (24, (2, 3)), (23, (0, 3))],
)
def test_the_range_test_has_a_quarter_of_the_steps(steps, expected):
    assert range_test(steps) == expected


def test_each_rate_begins_with_the_same_network():
    """Steps of almost no length leave it as it is, whatever was tried before."""
    seen = []
    tried(lambda net: seen.append(net.first.weight.detach().clone()) or 9.0, rates=(1.0, 1e-12))
    assert not torch.allclose(seen[0], seen[1], atol=0.1)
    assert torch.allclose(seen[1], pair()[0].first.weight, atol=1e-10)


@pytest.mark.parametrize(("seconds", "trials"), [(2000.0, 5), (11.0, 3), (0.0, 0)])
def test_no_rate_is_tried_when_time_has_ended(watch, seconds, trials):
    """A step takes half a second."""
    usual = training()

    def objective(*given):
        watch.now += 0.5
        return usual.objective(*given)

    found = tried(lambda _: 9.0, clock=Clock(seconds), objective=objective)
    assert [each.steps for each in found] == [10] * trials


def test_the_rate_rises_in_three_tenths_of_the_steps_and_falls_in_the_others():
    seen = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    try:
        tried(lambda _: 0.5, 10, rates=(0.21,))
    finally:
        hook.remove()
    assert seen == pytest.approx([0.07, 0.07, 0.14, 0.21, 0.18, 0.15, 0.12, 0.09, 0.06, 0.03])
