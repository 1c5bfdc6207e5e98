from __future__ import annotations

import copy
import math

import pytest
import torch
from distill_nets import inputs, pair
from shared_data_nets import in_threads
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.recovery.course import Clock, Course, Look, RateTrial, learning
from nni_topo.recovery.lesson import Lesson


class Seen(Lesson):
    """Notes the learning rate of each step."""

    def __init__(self, *args, **knobs):
        super().__init__(*args, **knobs)
        self.rates = []

    precision = "float32"

    def objective(self, student, call, wanted):
        self.rates.append(self.course.optimizer.param_groups[0]["lr"])
        return super().objective(student, call, wanted)


def course(total, losses=None, *, rate=0.01, first=math.inf, clock=None, warmup=0.0, ends_early=False, states=None):
    """Run a course whose looks find the given losses, the last one again and again; return it and the rates.

    ``states`` gets the weights at each look.
    """
    dense, original = pair()
    lesson = Seen(original, dense, ((inputs(64),), {}), "kl", 2.0)
    lesson.course = Course(dense, is_normed=False, rate=rate, clock=clock, warmup=warmup)
    left = None if losses is None else list(losses)

    def batches():
        return lesson.batches(torch.arange(64), 16, 0, None, False)

    def look(net):
        if states is not None:
            states.append(copy.deepcopy(net.state_dict()))
        return left.pop(0) if len(left) > 1 else left[0]

    knobs = {"look": None if left is None else look, "again": batches if ends_early else None}
    lesson.course.run(lesson, batches(), total, False, first=first, **knobs)
    return lesson.course, lesson.rates


def test_the_rate_rises_stays_and_falls():
    _, rates = course(20, warmup=0.2)
    # The first of four rising steps has the rate of the second one, where one at zero would be lost.
    assert rates[:5] == pytest.approx([0.0025, 0.0025, 0.005, 0.0075, 0.01])
    assert rates[5:13] == pytest.approx([0.01] * 8)
    assert rates[13:] == pytest.approx([0.01 * left / 8 for left in range(7, 0, -1)])


def test_a_course_that_makes_progress_has_all_its_steps():
    done, rates = course(100, [0.9**look for look in range(25)])
    assert (done.done, len(rates), done.is_given_up) == (100, 100, False)
    assert [each.step for each in done.curve] == [*range(4, 100, 4), 100]


def test_the_rate_falls_at_once_where_there_is_no_more_progress():
    # Looks after 4, 8, ... steps. The mean of the fifth to the eighth isn't smaller than that of the four before,
    # though the least of all is among them: at step 32 the fall begins.
    done, rates = course(100, [1.0, 0.5, 0.6, 0.5, 0.9, 0.45, 0.6, 0.6, 0.6])
    assert rates[:33] == pytest.approx([0.01] * 33)
    assert rates[33] < 0.01
    # Three fifths of the course are before the fall and two after it.
    assert done.done == 54
    assert rates[-1] < 0.0005


def test_looks_while_the_rate_rises_do_not_count():
    done, _ = course(100, [0.1, 0.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.19, 0.18], warmup=0.1)
    assert done.curve[12].lr == 0.01


def test_small_progress_counts_as_none():
    assert course(100, [1.0 - 1e-3 * look for look in range(25)])[0].done == 54


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([25.0], 72),  # the first look after a tenth of 600 steps
        ([15.0, 15.0, 14.0, 13.0, 12.0, 11.0], 120),
        ([15.0, 15.0, 14.0, 13.0, 9.0, 8.0, 7.0, 6.9, 6.8, 6.7, 6.0, 5.9, 5.8], 312),
        ([math.nan], 24),
    ],
)
@pytest.mark.quick_every(2)
def test_a_course_is_given_up_where_the_loss_grows(losses, steps):
    done, _ = course(600, losses, first=1.0)
    assert (done.is_given_up, done.done) == (True, steps)


def test_a_single_large_loss_does_not_end_a_course():
    done, _ = course(600, [0.9, 0.8, 30.0, 0.7, 0.6], first=1.0)
    assert not done.is_given_up


def test_the_state_is_kept_where_two_looks_in_turn_were_best():
    states = []
    done, _ = course(100, [0.9, 0.8, 0.2, 0.85, 0.7, 0.6, 0.75, *[2.0] * 18], first=1.0, states=states, ends_early=True)
    assert done.best_step == 24  # looks are after 4, 8, ... steps
    torch.testing.assert_close(done.best, states[5], rtol=0, atol=0)
    assert course(100, [0.9, 1.0, 0.9, 1.1, 0.8, 1.2], first=1.0, ends_early=True)[0].best == {}


def test_a_course_ends_where_its_first_fifth_gains_nothing_at_any_rate():
    done, rates = course(600, [1.2, 1.3, 1.1, 1.2, 1.0, 1.5], first=1.0, ends_early=True)
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
    done, rates = course(total, losses, first=1.0, ends_early=True)
    falls = [1.4] if len(losses) == 7 else []
    plain, others = course(total, [each for each in losses if each not in falls] if falls else losses, first=1.0)
    assert (done.gains_nothing, done.done) == (False, plain.done)
    assert len(rates) == len(others) + 60 * len(falls)
    torch.testing.assert_close(done.student.state_dict(), plain.student.state_dict(), rtol=0, atol=0)
    assert done.curve == plain.curve


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
    with learning(net, [net[1]]):
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


def test_a_course_goes_on_from_all_that_its_file_says(tmp_path):
    dense, original = pair()
    lesson = Lesson(original, dense, ((inputs(64),), {}), "kl", 2.0)
    path, trials = tmp_path / "state.pt", (RateTrial(0.1, 10, 9.0, False), RateTrial(0.01, 10, 0.5, True))
    known = {"rate": 0.01, "kind": {"seed": 3}, "path": path}
    clock = Clock(1000.0)
    clock.go_on_from(100.0)
    one = Course(dense, is_normed=True, clock=clock, warmup=0.1, falls_from=0.3, rates=trials, **known)
    assert not path.exists()
    one._end = 0.5

    def batches():
        return lesson.batches(torch.arange(64), 64, 0, None, False)

    one.run(lesson, batches(), 50, False, look=lambda _: 0.5, again=batches)
    other = Course(pair()[0], is_normed=False, clock=(later := Clock(1000.0)), **{**known, "rate": 0.5})
    assert (other.done, other.rate, other.is_normed, other.rates) == (one.done, 0.01, True, trials)
    assert (other.curve, other._looked, other._began) == (one.curve, one._looked, one._began)
    assert (other._falls_from, other._end) == (0.3, 0.5)
    assert (other.best_step, other._least) == (one.best_step, one._least) == (4, 0.5)
    torch.testing.assert_close(other.best, one.best, rtol=0, atol=0)
    assert len(one.curve) > 5
    assert one.done == 25  # the fall ends at half of the course
    assert 100.0 <= later.spent < 200.0
    assert 99.0 < one._began < 150.0
    torch.testing.assert_close(other.student.state_dict(), dense.state_dict(), rtol=0, atol=0)
    assert other.optimizer.state_dict()["state"].keys() == one.optimizer.state_dict()["state"].keys()
    with pytest.raises(ConfigError, match="must go on with seed 3, got 4"):
        Course(pair()[0], is_normed=False, **{**known, "kind": {"seed": 4}})
    with pytest.raises(ConfigError, match="must go on with other None, got 4"):
        Course(pair()[0], is_normed=False, **{**known, "kind": {"other": 4}})


def test_time_left_is_what_neither_the_past_nor_the_last_judgements_take(watch):
    clock = Clock(100.0)
    watch.now += 10.0
    with clock.judging(4):
        watch.now += 2.0
    assert (clock.spent, clock.left) == (12.0, 88.0)
    clock.judged_at_end = 20
    assert clock.left == 78.0  # half a second for each
    with clock.judging(4):
        watch.now += 4.0
    assert clock.left == 74.0
    with clock.judging(8):
        watch.now += 2.0
    assert clock.left == 77.0
    clock.go_on_from(60.0)
    assert (clock.spent, clock.left) == (60.0, 35.0)


class Timed(Seen):
    """Notes the learning rate of each step, which takes some seconds, and what the course's file says before it."""

    seconds = 0.5

    def objective(self, student, call, wanted):
        self.watch.now += self.seconds
        path = self.course.path
        is_there = path is not None and path.exists()
        self.kept.append(torch.load(path, weights_only=True)["done"] if is_there else 0)
        return super().objective(student, call, wanted)


def timed(watch, **knobs):
    dense, original = pair()
    lesson = Timed(original, dense, ((inputs(64),), {}), "kl", 2.0)
    lesson.course, lesson.watch, lesson.kept = Course(dense, is_normed=False, rate=0.01, **knobs), watch, []
    return lesson, lesson.batches(torch.arange(64), 64, 0, None, False)


def test_a_file_gets_the_state_every_half_minute(watch, tmp_path):
    lesson, batches = timed(watch, path=tmp_path / "state.pt")
    lesson.seconds = 10.0
    lesson.course.run(lesson, batches, 8, False)
    assert lesson.kept == [0, 0, 0, 3, 3, 3, 6, 6]


def test_gradients_of_all_processes_are_added_up():
    """One weight has no part in the outputs."""

    def work(processes):
        dense, original = pair()
        dense.unused = nn.Parameter(torch.ones(2))
        lesson = Lesson(original, dense, ((inputs(8),), {}), "kl", 2.0)
        steps = Course(dense, is_normed=False, rate=0.1, processes=processes)
        steps.run(lesson, lesson.batches(torch.arange(8), 8, 0, None, False), 1, False)
        return dense.head.bias.grad, dense.unused.grad

    alone, none = work(None)
    assert none is None
    for together, zeros in in_threads(2, work):
        torch.testing.assert_close(together, 2.0 * alone)
        assert zeros.tolist() == [0.0, 0.0]


class Shift(nn.Module):
    """Has a bias and no weight."""

    def __init__(self, width):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(width))

    def forward(self, rows):
        return rows + self.bias


def test_channels_of_zeros_are_held_in_all_modules_until_the_end():
    torch.manual_seed(0)
    rows, norms = torch.randn(8, 4), [nn.BatchNorm1d(4).eval() for _ in range(3)]
    net = nn.Sequential(nn.Linear(3, 4), Shift(4), *norms)
    with torch.no_grad():
        for norm in norms:
            norm.weight[1] = 0.0
    norms[1].weight.requires_grad_(False)
    with learning(net, []):
        torch.stack([norm(rows).sum() for norm in norms]).sum().backward()
    assert [norm.bias.grad.tolist() for norm in norms] == [[8.0, 0.0, 8.0, 8.0]] * 3
    net.zero_grad()
    torch.stack([norm(rows).sum() for norm in norms]).sum().backward()
    assert [norm.bias.grad.tolist() for norm in norms] == [[8.0] * 4] * 3


@pytest.mark.parametrize(
    ("looked", "share", "done", "total", "losses", "is_given_up"),
    [
        (0.05, 0.1, 60, 600, [20.1], True),
        (0.05, 0.1, 60, 600, [20.0], False),
        (0.1, 0.15, 90, 600, [99.0], False),  # no line is passed
        (0.05, 0.2, 120, 600, [10.1], True),  # of two lines the later one counts
        (0.2, 0.5, 300, 600, [5.1], True),
        (0.2, 0.5, 300, 600, [5.0, 9.0], False),  # one of two looks is below
        (0.2, 0.5, 300, 600, [4.0, 9.0, 9.0], True),
        (0.05, 0.1, 49, 490, [99.0], False),
        (0.05, 0.1, 50, 500, [99.0], True),
        (0.05, 0.1, 4, 500, [99.0], False),  # time allows few steps
        (0.05, 0.1, 5, 500, [99.0], True),
        (0.1, 0.15, 90, 600, [math.nan], True),
        (0.1, 0.15, 90, 600, [math.inf], True),
    ],
)
def test_lines_that_a_loss_may_not_be_above(looked, share, done, total, losses, is_given_up):
    first = 0.5
    steps = Course(pair()[0], is_normed=False, rate=0.5)
    steps.done, steps._looked = done, looked
    steps.curve = [Look(1, 0.1, first * loss) for loss in losses[:-1]]
    steps._look(first * losses[-1], share, first, total)
    assert steps.is_given_up is is_given_up
    assert (steps.curve[-1].step, len(steps.curve)) == (done, len(losses))
