"""Networks that aren't in the zoo go through every door: a call, the command, a script for NNI, and a trial."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
import torch

import nni_topo
from nni_topo.cli import main
from nni_topo.runs.trial import TrialSettings, run_trial
from nni_topo.studies.report import write_report

MINE = '''
import torch
from torch import nn


class Segmenter(nn.Module):
    """A small U-Net: a class for each pixel."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1)
        self.up, self.last = nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(32, 4, 1)

    def forward(self, x):
        whole = self.down1(x).relu()
        return self.last(torch.cat([whole, self.up(self.down2(whole).relu())], 1))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Residual(nn.Sequential):
    """A ResNet with group norms."""

    def __init__(self, in_channels=3, num_classes=10):
        stem = nn.Conv2d(in_channels, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()
        super().__init__(*stem, Block(16), Block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))


class Embedder(nn.Module):
    """Vectors of length one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))

    def forward(self, x):
        return nn.functional.normalize(self.layers(x), dim=-1)


class Table(nn.Sequential):
    """A regression on a table."""

    def __init__(self):
        super().__init__(nn.Linear(12, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))


class Recurrent(nn.Module):
    """Classes of sequences."""

    def __init__(self):
        super().__init__()
        self.enter, self.cell, self.last = nn.Linear(6, 32), nn.GRU(32, 32, batch_first=True), nn.Linear(32, 5)

    def forward(self, x):
        return self.last(self.cell(self.enter(x).relu())[0][:, -1])


class Attending(nn.Module):
    """A transformer on patches."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up, self.down, self.last = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 6)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.last((x + self.down(nn.functional.gelu(self.up(x)))).mean(1))
'''
SHAPES = {
    "Segmenter": (3, 16, 16),
    "Residual": (3, 16, 16),
    "Embedder": (12,),
    "Table": (12,),
    "Recurrent": (9, 6),
    "Attending": (3, 16, 16),
}
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder but for a file with networks."""
    (tmp_path / "strangers.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("strangers", None)


@pytest.fixture(params=SHAPES)
def stranger(request, folder):
    """A network's name, the network, and inputs."""
    torch.manual_seed(0)
    network = getattr(importlib.import_module("strangers"), request.param)().eval()
    return request.param, network, torch.randn(192, *SHAPES[request.param])


def check_smaller(dense, network, inputs):
    """The dense network runs, is smaller, and takes the shape of the unpruned one's outputs."""
    with torch.no_grad():
        assert dense(inputs[:4]).shape == network(inputs[:4]).shape
    sizes = [sum(parameter.numel() for parameter in net.parameters()) for net in (dense, network)]
    assert sizes[0] < 0.9 * sizes[1]


def test_a_call_makes_it_smaller_and_a_file_keeps_it(stranger):
    _, network, inputs = stranger
    dense = nni_topo.shrink(network, inputs.split(64), {"macs": 0.5}, distill={"seconds": 1.0})
    check_smaller(dense, network, inputs)
    assert 0.35 < dense.report.stages[-1].macs / dense.report.stages[0].macs < 0.6
    assert repr(dense.report).startswith(dense.report.sentence)
    nni_topo.save(dense, "small.safetensors")
    again = nni_topo.load("small.safetensors", network)
    torch.testing.assert_close(again(inputs[:4]), dense(inputs[:4]))


def test_the_command_makes_it_smaller_from_a_file_of_inputs(stranger, folder, capsys):
    name, network, inputs = stranger
    torch.save(network.state_dict(), "weights.pt")
    np.savez("inputs.npz", x=inputs.numpy(force=True))
    words = ["--model", f"strangers.py:{name}", "--checkpoint", "weights.pt", "--data", "inputs.npz", "--macs", "0.5"]
    assert main(["shrink", *words, "--distill-seconds", "1", "--export", "onnx", "--out", "small"]) == 0
    document = json.loads((folder / "small" / "shrink.json").read_text())
    assert document["sentence"] in capsys.readouterr().out
    assert document["sentence"] in (folder / "small" / "report.html").read_text()
    check_smaller(nni_topo.load("small/dense.safetensors", network), network, inputs)
    assert (folder / "small" / "small.onnx").is_file()


def test_a_script_for_nni_with_our_lines_keeps_more_than_with_its_own(stranger):
    stranger_name, network, inputs = stranger
    # Least squares has no score for the channels that a recurrent layer reads, as its error says.
    kinds = ["GRU"] if stranger_name == "Recurrent" else ["Conv2d", "Linear"]
    asked = [{"op_types": kinds, "sparse_ratio": 0.5}]
    config_list = nni_topo.dependency_groups(network, inputs[:2], asked)
    distances = []
    for name, knobs in (("l1", {}), ("reconstruction", {"calibration": inputs.split(64)})):
        pruner = nni_topo.create_pruner(name, network, config_list, **knobs)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        model = nni_topo.compensate(network, masks, inputs.split(64)) if knobs else network
        dense = nni_topo.to_dense(model, inputs, masks)
        check_smaller(dense, network, inputs)
        assert "% of the answers" in dense.report.answers or "standard deviations" in dense.report.answers
        with torch.no_grad():
            distances.append(float((dense(inputs) - network(inputs)).square().mean()))
    assert distances[1] < distances[0]


def test_a_trial_of_an_experiment_takes_a_network_of_ones_own(folder):
    settings = TrialSettings(
        model="strangers:Residual",
        data="digits",
        limit=200,
        train_epochs=1,
        retrain_epochs=0,
        pruner="l1",
        ratio=0.5,
        compensate=128,
    )
    metrics = run_trial(settings, folder / "trial")
    assert 0.0 < metrics["flops_share"] < 0.7
    assert write_report(folder / "trial").is_file()
