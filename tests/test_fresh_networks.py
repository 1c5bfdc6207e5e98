"""The comparison on networks that chose no default: its split, its primary cells, and its page against its records."""

from __future__ import annotations

import numpy as np
import pytest
from bench_modules import BENCHMARKS, imported
from scipy import stats

from nni_topo.pruners.registry import pruner_info
from nni_topo.studies.plan import load_plan

FOLDER = BENCHMARKS / "fresh_networks"


@pytest.fixture(scope="module")
def report():
    with imported(FOLDER, "report") as module:
        yield module


@pytest.fixture(scope="module")
def split():
    with imported(FOLDER, "split") as module:
        yield module


def record(network, pruner, seed, tested, validated, target="10 % of the MACs left"):
    step = {"accuracy_compensated": tested, "validation_compensated": validated}
    costs = {"flops": 1.0, "flops_before": 2.0, "params": 1.0, "params_before": 2.0, "accuracy_before": 0.9}
    cell = {"model": network, "data": "", "pruner": pruner, "seed": seed, "target": target}
    return {**costs, **step, **cell, "pruner_name": pruner.split(",")[0]}


def test_the_split_is_even_and_takes_no_image_that_a_default_was_chosen_on(split):
    labels = np.repeat(np.arange(10), 6000)
    train, test = split.split(labels)
    assert len(set(train)) == 25_000
    assert len(set(test)) == 5_000
    assert not set(train) & set(test)
    assert np.bincount(labels[test]).tolist() == [500] * 10
    assert np.bincount(labels[train]).tolist() == [2_500] * 10
    # every prefix of the files holds all classes: the order isn't the classes'
    assert len(set(labels[test[:100]])) == 10


def test_holm_is_that_of_its_definition(report):
    values = [0.001, 0.2, 0.012, 0.04, 0.04]
    # sorted 0.001, 0.012, 0.04, 0.04, 0.2 times 5, 4, 3, 2, 1, and never below the one before
    assert report.holm(values) == pytest.approx([0.005, 0.2, 0.048, 0.12, 0.12])
    assert report.holm([0.5, 0.9]) == [1.0, 1.0]


def test_the_best_baseline_is_the_best_on_validation_images(report):
    rows = {
        "l1": {seed: record("N", "l1", seed, 0.9, 0.5) for seed in range(3)},
        "fpgm": {seed: record("N", "fpgm", seed, 0.7, 0.6) for seed in range(3)},
        "reconstruction": {
            seed: record("N", "reconstruction", seed, value, 0.6) for seed, value in enumerate((0.72, 0.74, 0.79))
        },
    }
    found = report.compared(rows, "reconstruction", "accuracy_compensated")
    assert (found.baseline, found.networks) == ("fpgm", 3)
    assert (found.ours, found.theirs) == pytest.approx((75.0, 70.0))
    assert found.p == pytest.approx(stats.ttest_rel((0.72, 0.74, 0.79), (0.7, 0.7, 0.7)).pvalue)
    assert report.compared(rows, "reconstruction", "accuracy_retrained") is None
    assert report.compared(rows, "topological, functional", "accuracy_compensated") is None


def test_cells_that_were_not_run_count_and_outcomes_follow_the_corrected_p(report):
    gains = {"reconstruction": 0.05, "topological, functional": -0.05}
    records = []
    for seed in range(5):
        records.append(record("ResNet-20", "l1", seed, 0.7, 0.7))
        for criterion, gain in gains.items():
            records.append(record("ResNet-20", criterion, seed, 0.7 + gain + 0.001 * seed, 0.7))
    page = report.tables(records)
    primary = page.split("### Differences")[0]
    lines = [line for line in primary.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 10
    assert sum("not run" in line for line in lines) == 8
    assert "| ResNet-20 | reconstruction | l1 | win | 5 | 75.2 | 70.0 | +5.2 ± 0.2 |" in primary
    assert "| ResNet-20 | topological, functional | l1 | loss | 5 | 65.2 | 70.0 | -4.8 ± 0.2 |" in primary
    # before all networks have run the page says neither an outcome nor a figure
    some = report.tables([each for each in records if each["seed"] < 4])
    assert "| ResNet-20 | reconstruction |  | open: 4 of 5 networks |  |  |  |  |  |  |" in some
    assert "###" not in some.removeprefix("### Primary cells")
    assert report.tables([]).count("not run") == 10


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_plans_follow_the_protocol(report, path):
    plan = load_plan(path)
    assert path.stem in report.NETWORKS
    assert (plan.seeds, plan.first_seed) == (5, 100)
    assert [target.value for target in plan.targets] == [0.5, 0.25, 0.1, 0.03]
    assert {*report.CRITERIA} < {pruner.row for pruner in plan.pruners}
    rows = (*report.CRITERIA, *report.PUBLISHED)
    images = {pruner.calibration for pruner in plan.pruners if pruner.row in rows}
    assert images == {plan.compensate.images} == {plan.distill.images}


def test_pruners_that_plans_name_by_their_path_are_the_published_ones(report):
    named = {}
    for path in FOLDER.glob("*.yaml"):
        named |= {pruner.row: pruner.name for pruner in load_plan(path).pruners if ":" in pruner.name}
    assert set(named) == set(report.PUBLISHED)
    for name in named.values():
        with imported(BENCHMARKS, name.partition(":")[0]):
            assert pruner_info(name).knobs()[0] == "calibration"
