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
    assert f"nni-topo prune --model {MODEL} --data digits --checkpoint {words[3]} --limit 300 --config" in written
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


@pytest.mark.slow
def test_parts_are_printed_and_recorded(words, tmp_path, capsys, drawn):
    parts = ["dropout", "accumulated", "iterative", "replacement", "selection"]
    study = ["analyze", "energy", *words, "--images", "100", "--thresholds", "0.05", "0.1", "0.3", "--parts", *parts]
    assert main([*study, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for title in (
        "loss (nats)",
        "dropout at test time",
        "without fine-tuning",
        "2 epochs of fine-tuning in all",
        "replaced",
        "selected by",
    ):
        assert title in text
    record = json.loads((tmp_path / "energy.json").read_text())
    assert set(parts) < set(record)
    iterative = record["iterative"]
    assert iterative["threshold"] == 0.1
    first, second = (sum(step["removed"] for step in iterative[way]) for way in ("none", "between"))
    assert 0 < first < 32
    assert 0 < second < 32
    # the first layer is pruned before anything is trained
    assert iterative["none"][0]["removed"] == iterative["between"][0]["removed"]
    assert iterative["after"] != iterative["none"][-1]["quality"]
    assert set(record["selection"]["methods"]) > {"energy", "taylor, genetic"}
    found = list(record["dropout"]["0.1"].values())
    for suffix, key, factor in (("", "accuracy", 100.0), ("_loss", "loss", 1.0)):
        values = {rate: [factor * row[rate][key] for row in found] for rate in found[0]}
        for more, start in (("", 0.0), ("_change", 1.0)):
            shown = drawn.lines(f"dropout_0.1{suffix}{more}.png")
            assert list(shown) == [f"rate {float(rate):g}" for rate in values]
            for points, heights in zip(shown.values(), values.values(), strict=True):
                changes = [height - start * plain for height, plain in zip(heights, values["0.0"], strict=True)]
                assert [x for x, _ in points] == list(range(len(found)))
                assert [y for _, y in points] == pytest.approx(changes)
    shown = f"{record['layers'][1]['alone']['0.3']['loss']:.3f}"
    assert shown in text.split("loss (nats)")[1].split("saturated")[0]
    rates = record["dropout"]["unpruned"]
    assert rates["0.0"]["accuracy"] == record["baseline"]["accuracy"]
    assert rates["0.9"]["loss"] > rates["0.0"]["loss"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--thresholds", "0.5", "0.1"], "that ascend, got (0.5, 0.1)"),
        (["--parts", "dropuot"], "did you mean dropout"),
        (["--parts", "replacement", "--layer", "9", "--images", "20"], "got none (9)"),
        (["--sweep", "niquist"], "did you mean nyquist"),
        (["--images", "0"], "test_limit must be at least 1"),
    ],
)
@pytest.mark.quick_every(2)
def test_bad_requests(words, more, message, tmp_path, capsys):
    assert main(["analyze", "energy", *words, *more, "--out", str(tmp_path)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_comparisons_tell_the_pruner_the_input_sizes(words, tmp_path, capsys):
    quick = ["--limit", "200", "--train-epochs", "1", "--retrain-epochs", "1", "--in-process", "--json"]
    compare = ["compare", "--model", MODEL, "--pruners", "energy,l1", "--ratio", "0.5", *quick]
    assert main([*compare, "--out", str(tmp_path)]) == 0
    energy, l1 = json.loads(capsys.readouterr().out)
    assert energy["widths"] == l1["widths"] == {"0": 4, "3": 12, "8": 10}


def test_dropout_needs_a_dropout(tmp_path, capsys):
    words = ["analyze", "energy", "--model", "small_cnn", "--limit", "50", "--parts", "dropout"]
    assert main([*words, "--out", str(tmp_path)]) == 2
    assert "must have a torch.nn.Dropout" in capsys.readouterr().err
