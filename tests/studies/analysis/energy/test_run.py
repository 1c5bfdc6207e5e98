"""``nni-topo analyze energy``: what it writes, and that its suggestion prunes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from nni_topo import zoo
from nni_topo.cli import main

MODEL = f"{__name__}:dropout_net"


def dropout_net(num_classes, in_channels, image_size):
    """Two convolutions and a classifier with dropout."""
    del image_size
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 24, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(96, num_classes),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    data = zoo.load_data("digits", limit=600)
    torch.manual_seed(0)
    model = dropout_net(10, 1, 8)
    zoo.train(model, data, zoo.Recipe(epochs=8, batch_size=32), seed=0)
    path = tmp_path_factory.mktemp("trained") / "net.pt"
    zoo.save_checkpoint(path, model, {})
    return path


@pytest.fixture
def words(checkpoint):
    return ["--model", MODEL, "--checkpoint", str(checkpoint), "--limit", "300"]


def test_study_and_suggestion(words, tmp_path, capsys):
    study = ["analyze", "energy", *words, "--max-drop", "0.03", "--images", "200", "--out", str(tmp_path / "study")]
    assert main([*study, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [layer["filters"] for layer in record["layers"]] == [8, 24]
    assert record["baseline"]["accuracy"] > 0.9
    files = {path.name for path in (tmp_path / "study").iterdir()}
    assert files == {
        "energy.json",
        "report.html",
        "suggested.yaml",
        *(f"{name}.png" for name in ("compression", "accuracy", "loss", "fitness")),
    }
    written = (tmp_path / "study" / "suggested.yaml").read_text()
    assert "% before) at" in written
    config = yaml.safe_load(written)
    named = {n: entry["sparse_threshold"] for entry in config["config_list"] for n in entry["op_names"]}
    assert named == record["suggested"]["thresholds"]
    prune = ["prune", *words, "--config", str(tmp_path / "study" / "suggested.yaml"), "--json"]
    assert main([*prune, "--out", str(tmp_path / "pruned")]) == 0
    pruned = json.loads(capsys.readouterr().out)
    for index, layer in enumerate(record["layers"]):
        gone = layer["removed"][str(named[layer["layers"][0]])] if layer["layers"][0] in named else 0
        assert pruned["widths"][str(3 * index)] == layer["filters"] - gone


@pytest.mark.slow
def test_layers_are_judged_on_validation_images_and_the_suggestion_on_test_images(words, tmp_path, capsys):
    raw = zoo.load_data("digits", validation=0.0)
    images = {f"x_{part}": getattr(raw, part).tensors[0].numpy() for part in ("train", "test")}
    labels = {f"y_{part}": getattr(raw, part).tensors[1].numpy() for part in ("train", "test")}
    found = {}
    for name, test_labels in (("true", labels["y_test"]), ("wrong", (labels["y_test"] + 1) % 10)):
        path = tmp_path / f"{name}.npz"
        np.savez(path, **images, **{**labels, "y_test": test_labels})
        study = ["analyze", "energy", *words, "--data", str(path), "--max-drop", "0.03", "--json"]
        assert main([*study, "--out", str(tmp_path / name)]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    true, wrong = found["true"], found["wrong"]
    assert true["suggested"]["thresholds"] == wrong["suggested"]["thresholds"] != {}
    assert true["baseline"] == wrong["baseline"]
    assert [layer["alone"] for layer in true["layers"]] == [layer["alone"] for layer in wrong["layers"]]
    assert wrong["suggested"]["quality_before"]["accuracy"] < 0.2 < true["suggested"]["quality_before"]["accuracy"]
    assert "on test images" in (tmp_path / "true" / "suggested.yaml").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--thresholds", "0.5", "0.1"], "that ascend, got (0.5, 0.1)"),
        (["--sweep", "niquist"], "did you mean nyquist"),
        (["--images", "0"], "test_limit must be at least 1"),
    ],
)
@pytest.mark.quick_every(2)
def test_bad_requests(words, more, message, tmp_path, capsys):
    assert main(["analyze", "energy", *words, *more, "--out", str(tmp_path)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
