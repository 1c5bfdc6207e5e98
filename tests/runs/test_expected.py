"""The agreement that distillation is expected to reach, and what the reports say of it."""

import logging
import math

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.runs.expected import RECORDED, expected, share_left


def test_a_share_has_the_range_of_the_nearest_recorded_one():
    for share, low, high in RECORDED:
        assert share_left(share) == (low, high)
    assert share_left(0.2) == share_left(0.25)
    assert share_left(0.7) == share_left(0.5)
    assert share_left(0.75) is None
    assert share_left(0.02) is None


@pytest.mark.parametrize(
    ("agreement", "share", "samples", "low", "high"),
    [
        (0.9, 0.1, 100, 0.9, 0.99),  # of ten changed answers between 1.2 and 10 are left: whole samples are 1 and 10
        (0.8, 0.03, 1000, 0.8, 0.972),  # of 200 between 28 and 200
        (57 / 60, 0.03, 60, 57 / 60, 1.0),  # of three between 0.42 and 3
    ],
)
def test_the_range_is_the_share_of_the_changed_answers_in_whole_samples(agreement, share, samples, low, high):
    found = expected(agreement, share, samples)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_no_range_is_given_where_no_answer_changes_or_nothing_is_recorded():
    assert expected(1.0, 0.1, 100) is None
    assert expected(0.9, 0.9, 100) is None


def classifier(places=1):
    """Return a classifier of normal numbers with sixteen inputs, and its inputs."""
    torch.manual_seed(0)
    last = nn.Linear(32, 6 * places)
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), last]
    with torch.no_grad():
        last.weight.mul_(5.0)
    if places > 1:
        layers.append(nn.Unflatten(1, (places, 6)))
        layers.append(nn.Softmax(2))
    return nn.Sequential(*layers).eval(), [torch.randn(64, 16) for _ in range(8)]


def test_the_range_is_logged_before_distillation_and_the_report_says_whether_it_held(caplog):
    caplog.set_level(logging.INFO, "nni_topo")
    model, images = classifier()
    report = nni_topo.shrink(model, images, {"flops": 0.25}, progress=False).report
    reconstructed, distilled = report.stages[2], report.stages[3]
    left, most = share_left(reconstructed.macs / report.stages[0].macs)
    changed = round((1.0 - reconstructed.agreement) * report.held_out)
    assert changed > 0
    found = report.expectation
    assert found.low == pytest.approx(1.0 - math.ceil(most * changed) / report.held_out)
    assert found.high == pytest.approx(1.0 - math.floor(left * changed) / report.held_out)
    assert found.distilled == distilled.agreement
    assert found.holds == (found.low <= distilled.agreement <= found.high)
    messages = [record.getMessage() for record in caplog.records]
    (before,) = [text for text in messages if text.startswith("reconstructed: ")]
    assert (
        f"{reconstructed.agreement:.3g} of the answers; distilled, by the recorded networks, {found.low:.3g}" in before
    )
    assert "takes at most" in before
    assert messages.index(before) < next(
        place for place, text in enumerate(messages) if text.startswith("distillation t")
    )
    assert (
        f"{found.high:.3g}: that {'held' if found.holds else 'did not hold'}, it is {distilled.agreement:.3g}"
        in str(report)
    )


@pytest.mark.parametrize(
    ("places", "knobs"),
    [
        (3, {}),
        (1, {"distill": {"objective": "squares"}}),
        (1, {"distill": {"steps": 5}}),
        (1, {"seconds": 0.5}),
        (1, {"compensate": "recalibrate"}),
    ],
)
def test_the_figure_stands_alone_where_no_such_network_is_recorded(places, knobs, caplog):
    caplog.set_level(logging.INFO, "nni_topo")
    model, images = classifier(places)
    knobs = {"distill": {"steps": 600}} | knobs
    report = nni_topo.shrink(model, images, {"flops": 0.25}, progress=False, **knobs).report
    assert report.expectation is None
    (text,) = [each.getMessage() for each in caplog.records if each.getMessage().startswith("reconstructed: ")]
    assert "recorded" not in text + str(report)


def test_a_table_of_sizes_has_the_range_without_distillation():
    model, images = classifier()
    found = nni_topo.frontier(model, images, (0.9, 0.5, 0.1), distill=False, progress=False)
    unpruned, large, *others = found.points
    assert all(math.isnan(point.distilled_low) and math.isnan(point.distilled_high) for point in (unpruned, large))
    for point in others:
        assert 0.0 <= point.distilled_low <= point.changed <= point.distilled_high + 1e-9
        low, high = share_left(point.macs / unpruned.macs)
        changed = round(point.changed * found.held_out)
        assert point.distilled_low == pytest.approx(math.floor(low * changed) / found.held_out)
        assert point.distilled_high == pytest.approx(math.ceil(high * changed) / found.held_out)
    assert "by the recorded networks" in repr(found)
