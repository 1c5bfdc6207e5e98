from __future__ import annotations

import json

import pytest
import torch

from nni_topo import zoo
from nni_topo.analysis import neural_persistence
from nni_topo.cli import main
from nni_topo.studies.analysis.compression import AnalyzeCompression

COMPRESSION = ["analyze", "compression", "--model"]


@pytest.mark.parametrize(
    ("model", "size", "final"),
    [("mnist_fcn", 28, 66.77852), ("mnist_cnn", 28, 9.31005), ("resnet20", 32, 4.16786)],
)
def test_the_command_prints_the_papers_tables(model, size, final, capsys):
    words = ["--input-size", "1", str(size), str(size), "--convention", "tables"]
    assert main([*COMPRESSION, model, *words]) == 0
    text = capsys.readouterr().out
    assert f"{final:.5f}" in text
    assert ("skipped: stage2.0.shortcut.0 (1x1)" in text) == (model == "resnet20")


def test_compression_as_json_and_to_a_file(tmp_path, capsys):
    words = ["torchvision/resnet18", "--input-size", "3", "64", "64", "--classes", "200"]
    assert main([*COMPRESSION, *words, "--json", "--out", str(tmp_path / "found")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "found" / "compression.json").read_text())
    assert len(document["layers"]) == 21
    assert document["layers"]["fc"]["ratio"] == pytest.approx(144.0225, abs=5e-6)
    assert document["layers"]["conv1"]["ratio"] == pytest.approx(49 * 32**2 / (70**2 + 32**2 - 1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mnist_fcm", "--input-size", "1", "28", "28"], "did you mean mnist_fcn"),
        (["mnist_fcn", "--input-size", "1", "28", "30"], "a square, got (1, 28, 30)"),
        (["mnist_fcn", "--input-size", "1", "28", "28", "--convention", "table"], "did you mean tables"),
        (["mnist_fcn", "--input-size", "1", "0", "28"], "at least 1, got (1, 0, 28)"),
        (["torch.nn:Identity", "--input-size", "3"], "must have a layer of type Linear"),
        (["torchvision/alexnet", "--input-size", "3", "8", "8"], "example_inputs must be ones that the model runs on"),
    ],
)
def test_bad_requests_end_with_2(words, message, capsys):
    assert main([*COMPRESSION, *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_any_model_and_any_input(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_nets.py").write_text("import torch.nn as nn\n\ndef tagger():\n    return nn.LSTM(20, 30)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*COMPRESSION, "own_nets:tagger", "--input-size", "5", "20"]) == 0
    shown = capsys.readouterr().out
    assert f"{30 * 20 / 49:.5f}" in shown
    assert "weight_hh_l0[forget]" in shown
    found = AnalyzeCompression(model="torchvision/resnet18", input_size=(3, 64, 96)).find(print)
    assert found.layers["conv1"] == pytest.approx(49 * 32 * 48 / (70 * 102 + 32 * 48 - 1))


@pytest.mark.slow
def test_persistence_of_a_checkpoint_and_along_a_training(tmp_path, capsys):
    words = ["analyze", "persistence", "--model", "small_cnn", "--limit", "100", "--normalized", "--json"]
    assert main([*words, "--out", str(tmp_path / "trained")]) == 0
    trend = json.loads(capsys.readouterr().out)
    assert len(trend["totals"]) == 26
    assert trend["totals"][0] == pytest.approx(sum(layer[0] for layer in trend["layers"].values()))

    model = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=3)
    zoo.save_checkpoint(tmp_path / "model.pt", model, {})
    graph = ["--checkpoint", str(tmp_path / "model.pt"), "--conv-graph", "toeplitz", "--p", "1"]
    assert main([*words[:-1], *graph, "--out", str(tmp_path / "loaded")]) == 0
    assert "features.conv2" in capsys.readouterr().out
    found = json.loads((tmp_path / "loaded" / "persistence.json").read_text())
    images = torch.zeros(1, 1, 8, 8)
    wanted = neural_persistence(model, images, p=1.0, normalized=True, conv_graph="toeplitz")
    assert found["last"]["layers"] == pytest.approx(wanted.layers)
