from __future__ import annotations

import pytest

from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.choices import (
    CompensationChoice,
    DataChoice,
    DistillationChoice,
    ModelChoice,
    PrunerChoice,
    Target,
)
from nni_topo.runs.trial import TrialSettings, read_parameters, with_parameters


def test_parameters_replace_settings_and_fill_ratios_and_knobs():
    found = with_parameters(
        TrialSettings(pruner="topological", seed=3),
        {
            "ratio.conv1": 0.25,
            "ratio.*": 0.75,
            "knob.n_jobs": 7,
            "knob.solver.patience": 3,
            "retrain_epochs": 2.0,
            "flops": 0.5,
        },
    )
    assert (found.retrain_epochs, found.flops, found.seed) == (2, 0.5, 3)
    assert type(found.retrain_epochs) is int
    assert [found.layer_ratio(name) for name in ("conv1", "conv2")] == [0.25, 0.75]
    assert (found.cell().pruner.knobs, found.cell().seed) == ({"n_jobs": 7, "solver": {"patience": 3}}, 3)
    assert TrialSettings(**found.to_dict()) == found


def test_a_layer_without_a_ratio_gets_the_common_one():
    assert TrialSettings(ratio=0.3, ratios={"conv?": 0.6}).layer_ratio("fc1") == 0.3


def test_later_trials_may_retrain_on_more_images():
    growing = TrialSettings(retrain_images=150, double_images_after=10)
    assert [growing.for_trial(number).retrain_images for number in (0, 9, 10, 25)] == [150, 150, 300, 600]
    assert TrialSettings(retrain_images=150).for_trial(25).retrain_images == 150
    with pytest.raises(ConfigError, match="need retrain_images to begin with"):
        TrialSettings(double_images_after=10)


def test_retraining_takes_a_rate_of_its_own():
    usual = TrialSettings(retrain_epochs=2).cell().retrain
    assert (usual.epochs, usual.lr) == (2, pytest.approx(0.01))
    assert TrialSettings(lr=0.5).cell().retrain.lr == 0.5


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"prunner": "l1"}, "did you mean pruner"),
        ({"pruner": "l3"}, "did you mean l"),
        ({"TRIAL_BUDGET": 3}, "must be a known name, got 'TRIAL_BUDGET'"),
        ({"knob.generations": 3}, "knob of pruner 'l1'"),
        ({"ratio": 1.0}, r"a ratio must be in \[0, 1\), got 1.0 \(ratio\)"),
        ({"ratio.conv1": -0.1}, r"got -0.1 \(ratio.conv1\)"),
        ({"ratio": "half"}, r"must be of type float, got 'half' \(ratio\)"),
        ({"seed": 1.5}, r"must be of type int, got 1.5 \(seed\)"),
        ({"lr": float("nan")}, "must be of type float, got nan"),
        ({"retrain_images": 0}, "retrain_images must be an integer of at least 1.*, got 0"),
    ],
)
def test_bad_parameters_are_refused(parameters, message):
    with pytest.raises(ConfigError, match=message):
        with_parameters(TrialSettings(), parameters)


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "must be a JSON object, got list"), ("{", "a whole file of JSON")]
)
def test_files_of_parameters_must_be_json_objects(text, message, tmp_path):
    path = tmp_path / "params.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_parameters(path)
    with pytest.raises(DataError, match="must be a file that exists, got none"):
        read_parameters(tmp_path / "missing.json")


def test_a_cell_has_what_the_settings_say():
    cell = TrialSettings(
        model="lenet5_like",
        width=0.5,
        data="digits",
        data_dir="there",
        limit=50,
        image_size=16,
        train_epochs=3,
        pruner="l2",
        flops=0.25,
        calibration=8,
        compensate=16,
        distill=32,
        retrain_epochs=4,
        seed=5,
        device="cuda",
    ).cell()
    assert cell.model == ModelChoice("lenet5_like", 0.5)
    assert cell.data == DataChoice("digits", "there", 50, image_size=16)
    assert cell.pruner == PrunerChoice("l2")  # it takes no calibration data
    searched = TrialSettings(pruner="subcluster", calibration=8).cell()
    assert searched.pruner == PrunerChoice("subcluster", calibration=8)
    assert (cell.target, cell.seed, cell.device) == (Target("flops", 0.25), 5, "cuda")
    assert (cell.train.epochs, cell.retrain.epochs) == (3, 4)
    assert (cell.compensate, cell.distill) == (CompensationChoice(16), DistillationChoice(32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": -1}, "calibration must be an integer of at least 0.*, got -1"),
        ({"flops_weight": -0.5}, "flops_weight must be at least 0 and finite, got -0.5"),
        ({"limit": 0}, "limit must be an integer of at least 1.*, got 0"),
        ({"double_images_after": 0, "retrain_images": 1}, "double_images_after must be .* at least 1.*, got 0"),
        ({"flops": 2.0}, r"must be in \(0, 1\], got 2.0"),
        ({"ratio": -0.25}, r"a ratio must be in \[0, 1\), got -0.25 \(ratio\)"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrialSettings(**changes)
    edges = TrialSettings(limit=1, retrain_images=1, double_images_after=1, ratio=0.0, flops=1.0, retrain_epochs=0)
    assert edges.for_trial(3).retrain_images == 8
    assert edges.for_trial(3).double_images_after is None


def test_parameters_come_on_top_of_those_that_are_there():
    settings = TrialSettings(
        pruner="topological", ratios={"conv1": 0.25, "fc": 0.5}, knobs={"solver": {"patience": 3}, "n_jobs": 2}
    )
    found = with_parameters(settings, {"ratio.fc": 0.75, "knob.solver.generations": 5, "knob.criterion": "bottleneck"})
    assert found.ratios == {"conv1": 0.25, "fc": 0.75}
    assert found.knobs == {"solver": {"patience": 3, "generations": 5}, "n_jobs": 2, "criterion": "bottleneck"}
    assert settings.ratios == {"conv1": 0.25, "fc": 0.5}
    assert with_parameters(TrialSettings(flops=0.5, limit=5), {"flops": None}).flops is None
    assert type(with_parameters(TrialSettings(), {"flops_weight": 1}).flops_weight) is float
    for parameters in ({"seed": None}, {"seed": [1]}, {"model": True}, {"seed": float("inf")}, {"seed": "1"}):
        (name,) = parameters
        with pytest.raises(ConfigError, match=rf"a parameter must be of type \w+, got .* \({name}\)"):
            with_parameters(TrialSettings(), parameters)


def test_the_first_pattern_that_a_layer_matches_counts():
    settings = TrialSettings(ratio=0.125, ratios={"conv*": 0.25, "conv1": 0.75, "*1": 0.5})
    assert [settings.layer_ratio(name) for name in ("conv1", "conv2", "fc1", "fc2")] == [0.75, 0.25, 0.5, 0.125]
