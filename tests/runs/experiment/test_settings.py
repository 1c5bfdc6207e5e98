from __future__ import annotations

import pytest

from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.experiment.settings import TrialSettings, read_parameters, with_parameters


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


def test_a_tuners_budget_becomes_images():
    settings = TrialSettings(images_per_budget=150)
    assert with_parameters(settings, {"TRIAL_BUDGET": 3}).retrain_images == 450
    assert with_parameters(TrialSettings(images_per_budget=1), {"TRIAL_BUDGET": 0.25}).retrain_images == 1
    with pytest.raises(ConfigError, match="needs images_per_budget, got none"):
        with_parameters(TrialSettings(), {"TRIAL_BUDGET": 3})


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
        ({"knob.generations": 3}, "knob of pruner 'l1'"),
        ({"ratio": 1.0}, r"a ratio must be in \[0, 1\), got 1.0 \(ratio\)"),
        ({"ratio.conv1": -0.1}, r"got -0.1 \(ratio.conv1\)"),
        ({"ratio": "half"}, r"must be of type float, got 'half' \(ratio\)"),
        ({"seed": 1.5}, r"must be of type int, got 1.5 \(seed\)"),
        ({"pruner": 1}, "must be of type str, got 1"),
        ({"seed": True}, "must be of type int, got True"),
        ({"lr": float("nan")}, "must be of type float, got nan"),
        ({"flops": 0.0}, r"must be in \(0, 1\], got 0.0"),
        ({"retrain_epochs": -1}, "retrain_epochs must be at least 0, got -1"),
        ({"retrain_images": 0}, "retrain_images must be at least 1, got 0"),
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
