"""The energy study against single prunings, and what it concludes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.studies.analysis.energy.study import EnergyStudy, LayerEnergy, Quality, accumulate_energy, study_energy
from nni_topo.testing import toy_images, toy_model

THRESHOLDS = (0.05, 0.1, 0.3, 0.6)
IMAGES = toy_images(64, seed=3)


def quality(model):
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(IMAGES)
    labels = torch.arange(64) % 4
    loss = nn.functional.cross_entropy(logits, labels)
    return Quality(float(loss), float((logits.argmax(1) == labels).float().mean()))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).eval()


@pytest.fixture(scope="module")
def study():
    return study_energy(net(), ["0", "3"], IMAGES[:1], quality, thresholds=THRESHOLDS)


def test_removed_filters_are_the_pruners_and_rise_with_the_threshold(study):
    for layer in study.layers:
        counts = [layer.removed[t] for t in THRESHOLDS]
        assert counts == [sum(share <= t for share in layer.shares) for t in THRESHOLDS]
        assert all(low <= high for low, high in itertools.pairwise(counts))
        assert list(layer.shares) == sorted(layer.shares)
        assert layer.shares[-1] == 1.0


def test_each_layer_alone_equals_its_dense_network(study):
    model = net()
    for layer, threshold in itertools.product(study.layers, THRESHOLDS):
        victim = copy.deepcopy(model)
        config = [{"op_names": list(layer.layers), "sparse_threshold": threshold}]
        pruner = nni_topo.EnergyFilterPruner(victim, config, example_inputs=IMAGES[:1])
        _, masks = pruner.compress()
        pruner.unwrap_model()
        dense = nni_topo.to_dense(victim, IMAGES[:2], masks)
        assert dense.get_submodule(layer.layers[0]).out_channels == layer.filters - layer.removed[threshold]
        assert quality(dense).loss == pytest.approx(layer.alone[threshold].loss, rel=1e-4)


def test_all_at_once_is_dense_and_counted(study):
    whole = study.together[0.3]
    assert whole.removed == sum(layer.removed[0.3] for layer in study.layers)
    kept = [layer.filters - layer.removed[0.3] for layer in study.layers]
    macs = 64 * 9 * (3 * kept[0] + kept[0] * kept[1]) + 4 * kept[1]
    full = 64 * 9 * (3 * 12 + 12 * 16) + 4 * 16
    assert whole.macs == pytest.approx(macs / full)


def test_groups_are_one_row_and_data_free_studies_count():
    study = study_energy(toy_model().eval(), ["stem", "inner"], IMAGES[:1], thresholds=(0.3,), together=False)
    (row,) = study.layers
    assert set(row.layers) == {"stem", "inner"}
    assert row.name.endswith(" +1")
    assert row.alone == {}
    assert study.verdict(row) == ""
    with pytest.raises(ConfigError, match="need an evaluation"):
        study.suggestion()


def fabricated(drops, removed):
    """A study of one layer of ten filters with given accuracies lost and filters removed."""
    thresholds = tuple(0.1 * (index + 1) for index in range(len(drops)))
    alone = {t: Quality(1.0, 0.9 - drop) for t, drop in zip(thresholds, drops, strict=True)}
    row = LayerEnergy(("conv",), 10, (1.0,) * 10, dict(zip(thresholds, removed, strict=True)), alone)
    return EnergyStudy(thresholds, Quality(0.5, 0.9), [row], {}, {}), row


@pytest.mark.parametrize(
    ("drops", "removed", "verdict"),
    [
        ([0.0, 0.01, 0.5], [1, 3, 8], "redundant"),
        ([0.0, 0.03, 0.5], [1, 3, 8], "saturated"),
        ([0.0, 0.3, 0.5], [0, 1, 1], ""),
    ],
)
def test_verdicts(drops, removed, verdict):
    study, row = fabricated(drops, removed)
    assert study.verdict(row) == verdict


@pytest.mark.parametrize(
    ("drops", "removed", "level"),
    [
        ([0.0, 0.005, 0.5], [1, 3, 8], 1),
        ([0.05, 0.0, 0.0], [1, 3, 8], None),
        ([0.0, 0.0, 0.05], [0, 0, 2], None),
        ([-0.01, 0.0, 0.01], [1, 2, 3], 1),
    ],
)
def test_suggestions(drops, removed, level):
    study, _ = fabricated(drops, removed)
    expected = {} if level is None else {"conv": study.thresholds[level]}
    assert study.suggestion(0.009) == expected


def test_a_loss_of_exactly_what_is_allowed_is_allowed():
    """443 and 433 of 500 images right: in floats the difference is more than 0.02."""
    alone = {0.1: Quality(1.0, 433 / 500)}
    row = LayerEnergy(("conv",), 10, (1.0,) * 10, {0.1: 3}, alone)
    study = EnergyStudy((0.1,), Quality(0.5, 443 / 500), [row], {}, {})
    assert 443 / 500 - 433 / 500 > 0.02
    assert study.verdict(row) == "redundant"
    assert study.suggestion(0.02) == {"conv": 0.1}


def test_bad_requests():
    for thresholds in ((), (0.2, 0.1), (0.1, 0.1)):
        with pytest.raises(ConfigError, match="ascend"):
            study_energy(net(), ["0"], IMAGES[:1], thresholds=thresholds)
    with pytest.raises(ConfigError, match="in \\(0, 1\\)"):
        study_energy(net(), ["0"], IMAGES[:1], thresholds=(0.5, 1.5))
    with pytest.raises(ConfigError, match="at least 0 and finite, got -1"):
        fabricated([0.0], [1])[0].suggestion(-1)


def test_record_and_pictures(study, tmp_path, drawn):
    files = dataclasses.replace(study, more={"seed": 3}).save(tmp_path / "new")
    assert [path.name for path in files] == [
        "energy.json",
        "compression.png",
        "accuracy.png",
        "loss.png",
        "fitness.png",
    ]
    labels = [f"{100 * t:g} % of the energy" for t in THRESHOLDS]
    for name, value in (
        ("compression.png", lambda layer, t: 100.0 * layer.removed[t] / layer.filters),
        ("fitness.png", lambda layer, t: layer.removed[t] / layer.filters - 100.0 * study.lost(layer, t)),
        ("accuracy.png", lambda layer, t: 100.0 * layer.alone[t].accuracy),
        ("loss.png", lambda layer, t: layer.alone[t].loss),
    ):
        shown = drawn.lines(name)
        assert list(shown) == labels
        for points, t in zip(shown.values(), THRESHOLDS, strict=True):
            assert points == [(index, pytest.approx(value(layer, t))) for index, layer in enumerate(study.layers)]
        assert [tick.get_text() for tick in drawn[name].axes[0].get_xticklabels()] == ["0", "3"]
    for name, level in (("accuracy.png", 100.0 * study.baseline.accuracy), ("loss.png", study.baseline.loss)):
        assert set(drawn[name].axes[0].get_lines()[-1].get_ydata()) == {level}
    document = json.loads(files[0].read_text())
    assert document.pop("seed") == 3
    assert document == json.loads(json.dumps(study.to_dict()))
    assert document["layers"][0]["removed"] == {str(t): study.layers[0].removed[t] for t in THRESHOLDS}


def test_accumulated_steps_measure_and_prune_what_was_trained_in_between():
    model, images = net(), IMAGES[:2]
    layers = [("0",), ("3",)]
    plain = accumulate_energy(model, layers, images, quality, threshold=0.3)
    trained = []

    def retrain(dense):
        # all filters of the second convolution become the first one: equal energies, of which a third goes
        trained.append(dense.get_submodule("0").out_channels)
        weight = dense.get_submodule("3").weight.data
        weight.copy_(weight[:1].expand_as(weight))
        dense.get_submodule("3").bias.data.zero_()
        dense.get_submodule("7").bias.data.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))

    steps = accumulate_energy(model, layers, images, quality, threshold=0.3, retrain=retrain)
    assert trained == [12 - plain[0].removed] * 2
    assert [step.removed for step in steps] == [plain[0].removed, 4]  # 4/16 <= 0.3 < 5/16
    assert [step.quality.accuracy for step in steps] == [0.25, 0.25]  # always the first of four classes
    assert model.get_submodule("7").bias.abs().max() < 9.0
