"""Every way into the pipeline hands a pruner the same knobs, and none of them looks at test images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nni.compression import TorchEvaluator
from torch.utils.data import TensorDataset

import nni_topo
from nni_topo import zoo
from nni_topo.cli import main
from nni_topo.pruners.registry import PRUNERS, PrunerInfo, register_pruner
from nni_topo.runs.choices import DataChoice, ModelChoice, PruneConfig, PrunerChoice, Target
from nni_topo.runs.prune import prune_checkpoint
from nni_topo.runs.run import Start, prune, trained
from nni_topo.runs.trial import TrialSettings, run_trial
from nni_topo.studies.analysis.pruned import study_masks
from nni_topo.studies.compare import compare
from nni_topo.studies.plan import ComparisonPlan

DATA = DataChoice("digits", limit=120)
MODEL = ModelChoice("lenet300")
SEED = 3
HANDED: list[dict[str, Any]] = []


class NosyPruner(nni_topo.RandomPruner):
    """Random choice that asks for everything a run can give."""

    def __init__(
        self,
        model,
        config_list,
        evaluator=None,
        existed_wrappers=None,
        *,
        training_steps=None,
        seed=0,
        calibration=None,
        validation=None,
        example_inputs=None,
    ):
        HANDED.append({name: value for name, value in locals().items() if name not in ("self", "model", "__class__")})
        super().__init__(model, config_list, evaluator, existed_wrappers, seed=seed)


@pytest.fixture
def nosy() -> Iterator[str]:
    HANDED.clear()
    register_pruner(PrunerInfo("nosy", f"{__name__}:NosyPruner", "anything", needs=("evaluator", "training_steps")))
    yield "nosy"
    del PRUNERS.table["nosy"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A trained network that every entry point starts from."""
    start = trained(MODEL, DATA, recipe=zoo.Recipe(epochs=1), seed=SEED)
    path = tmp_path_factory.mktemp("nets") / "lenet300.pt"
    zoo.save_checkpoint(path, start.net, {})
    return path


def through_compare(name, folder, start, checkpoint):
    choice = PrunerChoice(name, calibration=64)
    plan = ComparisonPlan((MODEL,), (DATA,), (choice,), (Target("ratio", 0.5),), first_seed=SEED, train={"epochs": 1})
    _, failures = compare(plan, folder)
    assert not failures


def through_prune(name, folder, start, checkpoint):
    config = PruneConfig(name, [{"op_names": ["fc1"], "sparse_ratio": 0.5}], calibration=64)
    prune_checkpoint(MODEL, checkpoint, config, DATA, folder, seed=SEED)


def through_a_trial(name, folder, start, checkpoint):
    settings = TrialSettings(model="lenet300", limit=120, pruner=name, calibration=64, seed=SEED)
    run_trial(dataclasses.replace(settings, checkpoint=str(checkpoint), retrain_epochs=0), folder)


def through_deviation(name, folder, start, checkpoint):
    study_masks(name, start, 0.5, 64)


def through_sensitivity(name, folder, start, checkpoint):
    words = ["analyze", "sensitivity", "--model", "lenet300", "--limit", "120", "--seed", str(SEED)]
    study = ["--pruner", name, "--ratios", "0.5", "--calibration", "64", "--checkpoint", str(checkpoint)]
    assert main([*words, *study, "--out", str(folder)]) == 0


@pytest.mark.parametrize(
    "entry", [through_compare, through_prune, through_a_trial, through_deviation, through_sensitivity]
)
@pytest.mark.quick_every(2)
def test_every_entry_point_hands_a_pruner_the_same_knobs(entry, nosy, checkpoint, tmp_path):
    start = trained(MODEL, DATA, checkpoint=checkpoint, seed=SEED)
    entry(nosy, tmp_path / "out", start, checkpoint)
    handed = HANDED[0]
    assert handed["seed"] == SEED
    assert torch.equal(torch.cat(handed["calibration"]), start.data.train.tensors[0][:64])
    for index, tensor in enumerate(start.data.validation.tensors):
        assert torch.equal(torch.cat([batch[index] for batch in handed["validation"]]), tensor)
    assert handed["example_inputs"].shape == start.example.shape
    assert handed["training_steps"] == -(-len(start.data.train) // start.recipe.batch_size)
    assert isinstance(handed["evaluator"], TorchEvaluator)


def test_an_evaluator_measures_and_leaves_the_weights(checkpoint):
    start = trained(MODEL, DATA, checkpoint=checkpoint, seed=SEED)
    before = {name: value.clone() for name, value in start.net.state_dict().items()}
    prune(start, PrunerChoice("taylor"), [{"op_names": ["fc1"], "sparse_ratio": 0.5}])
    assert all(torch.equal(before[name], value) for name, value in start.net.state_dict().items())


def test_of_text_records_hold_bits_a_byte_too():
    data = zoo.load_data("python-stdlib", limit=4, validation=0.0)
    data = dataclasses.replace(data, test=TensorDataset(*(part[:3] for part in data.test.tensors)))
    net = torch.nn.Sequential(torch.nn.Embedding(256, 4), torch.nn.Linear(4, 256)).eval()
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.zero_()
    figures = Start(net, data, zoo.Recipe(epochs=1)).figures(net, "oneshot")
    assert figures.keys() == {"accuracy_oneshot", "bits_oneshot"}
    assert figures["bits_oneshot"] == pytest.approx(8.0)  # 256 bytes, all as likely
