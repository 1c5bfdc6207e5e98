from __future__ import annotations

import math

import pytest
import torch
from distill_nets import inputs, pair

from nni_topo.recovery.course import Clock, Course, RateSchedule
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


def course(total, losses=None, *, rate=0.01, first=math.inf, clock=None, warmup=0.0):
    """Run a course whose looks find the given losses, the last one again and again; return it and the rates."""
    dense, original = pair()
    lesson = Seen(original, dense, ((inputs(64),), {}), "kl", 2.0)
    lesson.course = Course(dense, is_normed=False, rate=rate, clock=clock, schedule=RateSchedule(warmup))
    batches = lesson.batches(torch.arange(64), 64, 0, None, False)
    left = None if losses is None else list(losses)
    look = None if left is None else lambda _: left.pop(0) if len(left) > 1 else left[0]
    lesson.course.run(lesson, batches, total, False, first=first, look=look)
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
def test_a_course_is_given_up_where_the_loss_grows(losses, steps):
    done, _ = course(600, losses, first=1.0)
    assert (done.is_given_up, done.done) == (True, steps)


def test_a_single_large_loss_does_not_end_a_course():
    done, _ = course(600, [0.9, 0.8, 30.0, 0.7, 0.6], first=1.0)
    assert not done.is_given_up


def test_time_that_is_over_takes_no_step():
    done, rates = course(100, clock=Clock(1e-9))
    assert (done.done, rates) == (0, [])


def test_the_fall_is_as_much_shorter_as_what_was_before_it():
    schedule = RateSchedule()
    assert schedule.level(0.59, 0.01) == 1.0
    schedule.fall(0.3)
    assert schedule.end == pytest.approx(0.5)
    assert schedule.level(0.4, 0.01) == pytest.approx(0.5)
    assert schedule.level(0.5, 0.01) == 0.0
    schedule.fall(0.45)  # it falls already
    assert schedule.end == pytest.approx(0.5)


def test_the_time_left_that_is_shown_is_no_more_than_the_limit_leaves(capsys):
    """Of a million steps, at most, a second allows some hundreds."""
    dense, original = pair()
    lesson = Lesson(original, dense, ((inputs(64),), {}), "kl", 2.0)
    clock = Clock(1.0)
    steps = Course(dense, is_normed=False, rate=1e-4, clock=clock)
    steps.run(lesson, lesson.batches(torch.arange(64), 64, 0, None, False), 1_000_000, True)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"distill: {steps.done} of ")
    assert int(last.split(" of ")[1].split(",")[0]) < 2 * steps.done + 10
