from __future__ import annotations

import math

import pytest
import torch
from distill_nets import inputs, pair

from nni_topo.recovery.course import Clock, Course, Schedule
from nni_topo.recovery.lesson import Lesson


class Seen(Lesson):
    """Notes the learning rate of each step."""

    def __init__(self, *args, **knobs):
        super().__init__(*args, **knobs)
        self.rates = []

    def objective(self, student, call, wanted):
        self.rates.append(self.course.optimizer.param_groups[0]["lr"])
        return super().objective(student, call, wanted)


def course(total, losses=None, *, rate=0.01, first=math.inf, clock=None, warmup=0.0):
    """Run a course whose looks find the given losses, the last one again and again; return it and the rates."""
    dense, original = pair()
    lesson = Seen(original, dense, ((inputs(64),), {}), "kl", 2.0)
    lesson.course = Course(dense, is_normed=False, rate=rate, clock=clock, schedule=Schedule(warmup))
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
    done, rates = course(100, [0.9**look for look in range(20)])
    assert (done.done, len(rates), done.is_given_up) == (100, 100, False)
    assert [each.step for each in done.curve] == [*range(5, 100, 5), 100]


def test_the_rate_falls_at_once_where_there_is_no_more_progress():
    # Looks after 5, 10, ... steps. The four after the second one find nothing smaller: at step 30 the fall begins.
    done, rates = course(100, [1.0, 0.5, 0.5, 0.495, 0.5, 0.6, 0.7])
    assert rates[29] == 0.01
    assert rates[30] == pytest.approx(0.01)
    assert rates[31] < 0.01
    # Three fifths of the course are before the fall and two after it.
    assert done.done == 50
    assert rates[-1] == pytest.approx(0.01 / 20)


def test_small_progress_counts_as_none():
    assert course(100, [1.0 - 1e-4 * look for look in range(20)])[0].done < 50


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([25.0], 60),
        ([15.0] * 2 + [11.0], 120),
        ([15.0] * 2 + [9.0, 8.0, 7.0, 6.5, 6.4, 6.2, 6.1, 6.0], 300),
        ([math.nan], 30),
    ],
)
def test_a_course_is_given_up_where_the_loss_grows(losses, steps):
    done, _ = course(600, losses, first=1.0)
    assert (done.is_given_up, done.done) == (True, steps)


def test_time_that_is_over_takes_no_step():
    done, rates = course(100, clock=Clock(1e-9))
    assert (done.done, rates) == (0, [])


def test_the_fall_is_as_much_shorter_as_what_was_before_it():
    schedule = Schedule()
    assert schedule.level(0.59, 0.01) == 1.0
    schedule.fall(0.3)
    assert schedule.end == pytest.approx(0.5)
    assert schedule.level(0.4, 0.01) == pytest.approx(0.5)
    assert schedule.level(0.5, 0.01) == 0.0
    schedule.fall(0.45)  # it falls already
    assert schedule.end == pytest.approx(0.5)
