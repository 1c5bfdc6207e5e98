from __future__ import annotations

import dataclasses

import pytest

from nni_topo.errors import ConfigError
from nni_topo.runs.choices import CompensationChoice, DataChoice, DistillationChoice, ModelChoice, PrunerChoice, Target
from nni_topo.studies.plan import ComparisonPlan, load_plan


def plan(**changes):
    factors = {
        "models": (ModelChoice("small_cnn"),),
        "data": (DataChoice("digits"),),
        "pruners": (PrunerChoice("l1"), PrunerChoice("random")),
        "targets": (Target("ratio", 0.5), Target("flops", 0.3)),
    }
    return ComparisonPlan(**{**factors, **changes})


def test_every_combination_is_a_cell_and_has_a_key_of_its_own():
    cells = list(plan(seeds=3).cells())
    assert len(cells) == 12
    assert len({cell.key for cell in cells}) == 12
    assert len({cell.training_key for cell in cells}) == 3


def test_knobs_and_recipes_are_part_of_a_key():
    cell = next(plan().cells())
    other_knob = dataclasses.replace(cell, pruner=PrunerChoice("l1", knobs={"seed": 1}))
    longer = next(plan(train={"epochs": 99}).cells())
    assert len({cell.key, other_knob.key, longer.key}) == 3
    assert longer.train.epochs == 99


def test_fine_tuning_until_a_share_has_a_constant_rate_and_a_key_of_its_own():
    (full, _, _, _) = plan(retrain={"epochs": 40, "lr": 0.01}).cells()
    (cell, _, _, _) = plan(retrain={"epochs": 40, "lr": 0.01, "until": 0.99}).cells()
    assert (full.until, full.retrain.schedule) == (None, "cosine")
    assert (cell.until, cell.retrain.schedule, cell.retrain.epochs, cell.retrain.lr) == (0.99, "constant", 40, 0.01)
    constant = plan(retrain={"epochs": 40, "lr": 0.01, "schedule": "constant"}).cells()
    assert len({full.key, cell.key, next(constant).key}) == 3
    chosen = plan(retrain={"epochs": 40, "until": 0.99, "schedule": "one-cycle"}).cells()
    assert next(chosen).retrain.schedule == "one-cycle"


HALF = (Target("ratio", 0.5),)
YAML = """
models: [small_cnn, {name: vgg16, width: 0.25}]
data: digits
pruners:
  - l1
  - {name: topological, label: activations, calibration: 64, knobs: {criterion: cover}}
targets: [{ratio: 0.5}, {flops: 0.25}]
seeds: 2
train: {epochs: 4}
retrain: {epochs: 1}
"""


def test_a_row_is_compensated_in_its_own_way():
    rows = (
        PrunerChoice("l1"),
        PrunerChoice("l1", "never", compensate=False),
        PrunerChoice("l1", "less", compensate=CompensationChoice(images=8)),
    )
    images = {
        common: [
            cell.compensate and cell.compensate.images
            for cell in plan(pruners=rows, targets=HALF, compensate=common).cells()
        ]
        for common in (None, CompensationChoice(images=64))
    }
    assert list(images.values()) == [[None, None, 8], [64, None, 64 // 8]]


def test_a_plan_is_read_from_yaml(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(YAML)
    read = load_plan(path)
    assert read.models == (ModelChoice("small_cnn"), ModelChoice("vgg16", 0.25))
    assert read.pruners[1] == PrunerChoice("topological", "activations", {"criterion": "cover"}, 64)
    assert read.targets == (Target("ratio", 0.5), Target("flops", 0.25))
    assert len(list(read.cells())) == 16


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds: 2", "seed: 2", "did you mean seeds"),
        ("seeds: 2", "seeds: 0", "seeds must be an integer of at least 1, got 0"),
        ("width: 0.25", "widht: 0.25", "did you mean width"),
        ("{ratio: 0.5}", "{ratio: 1.0}", r"ratio target must be in \[0, 1\), got 1.0"),
        ("{flops: 0.25}", "{flops: 0}", r"flops target must be in \(0, 1\], got 0.0"),
        ("{flops: 0.25}", "{flop: 0.25}", "a target must be a known name, got 'flop'; did you mean flops"),
        ("{flops: 0.25}", "0.25", "mapping with one key"),
        ("train: {epochs: 4}", "train: {epoch: 4}", "did you mean epochs"),
        ("retrain: {epochs: 1}", "retrain: {epochs: 9, until: 0}", r"until must be in \(0, 1\], got 0 \(retrain\)"),
        ("retrain: {epochs: 1}", "retrain: {epochs: 9, until: most}", r"until must be .*, got 'most' \(retrain\)"),
        ("retrain: {epochs: 1}", "retrain: {until: 0.99}", r"until needs epochs, .*'until': 0.99"),
        ("label: activations", "label: l1", "labels of pruners must differ, got twice: l1"),
        ("- l1", "- {label: l1}", "a mapping with a name"),
    ],
)
def test_bad_plans_are_refused(tmp_path, old, new, words):
    path = tmp_path / "plan.yaml"
    path.write_text(YAML.replace(old, new))
    with pytest.raises(ConfigError, match=words):
        list(load_plan(path).cells())


def test_a_row_is_distilled_in_its_own_way_and_keys_of_plans_without_it_stay():
    common = DistillationChoice(images=64)
    rows = (
        PrunerChoice("l1"),
        PrunerChoice("l1", "never", distill=False),
        PrunerChoice("l1", "less", distill=DistillationChoice(images=8)),
    )
    cells = list(plan(pruners=rows, targets=HALF, distill=common).cells())
    assert [cell.distill and cell.distill.images for cell in cells] == [64, None, 8]
    assert len({cell.key for cell in cells}) == 3
    (without,) = plan(pruners=(PrunerChoice("l1", "never"),), targets=HALF).cells()
    assert cells[1].key == without.key


def test_a_plan_of_several_networks_is_read_one_at_a_time(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "pruners: l1\ntargets: [{ratio: 0.5}]\nseeds: 2\ncompensate: {images: 8}\nnetworks:\n"
        "  small: {models: small_cnn, data: digits}\n"
        "  wide: {models: {name: vgg16, width: 0.5}, data: digits, seeds: 1, compensate: {images: 4}}\n"
    )
    small, wide = load_plan(path, "small"), load_plan(path, "wide")
    assert (small.models, small.seeds, small.compensate) == ((ModelChoice("small_cnn"),), 2, CompensationChoice(8))
    assert (wide.models, wide.seeds, wide.compensate) == ((ModelChoice("vgg16", 0.5),), 1, CompensationChoice(4))
    for name, words in (("", "known: small, wide"), ("smal", "did you mean small")):
        with pytest.raises(ConfigError, match=f"network must be a known name, got '{name}'; {words}"):
            load_plan(path, name)
    path.write_text("pruners: l1\ntargets: [{ratio: 0.5}]\nmodels: small_cnn\ndata: digits\nnetworks: [small]\n")
    with pytest.raises(ConfigError, match="networks must be a mapping"):
        load_plan(path, "small")
