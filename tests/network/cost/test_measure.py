"""What networks take, measured beside each other."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.cli import main
from nni_topo.errors import ConfigError
from nni_topo.network.cost.measure import profile
from nni_topo.network.speedup.reconcile import widths_multiple


def net(width):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 4, 1))


def test_a_row_for_every_mode_and_network():
    images = torch.rand(2, 3, 16, 16)
    rows = profile({"wide": net(16), "narrow": net(8)}, images, modes=("plain", "channels_last", "bf16"), runs=2)
    modes = ("plain", "channels_last", "bf16")
    assert [(row.mode, row.network) for row in rows] == [(mode, name) for mode in modes for name in ("wide", "narrow")]
    for row in rows:
        width = 16 if row.network == "wide" else 8
        assert row.macs == 16 * 16 * (27 * width + 4 * width)
        assert row.params == 28 * width + 4 * width + 4
        assert row.failed == ""
        assert row.throughput == pytest.approx(2000 / row.latency_ms)
        # The widest tensor and the one made of it are held at once.
        bytes_each = 2 if row.mode == "bf16" else 4
        assert row.peak_bytes >= bytes_each * (row.params + 2 * 2 * 16 * 16 * width)
    assert rows[0].peak_bytes > rows[1].peak_bytes  # bf16 may take more on a CPU that converts it


def test_a_network_that_cannot_run_in_a_mode_says_why():
    class Refusing(nn.Module):
        def forward(self, x):
            if x.dtype == torch.bfloat16:
                raise RuntimeError("no bf16 here")
            return x

    (row,) = profile({"net": Refusing()}, torch.rand(1, 2), modes=("bf16",), runs=1)
    assert math.isnan(row.latency_ms)
    assert row.failed == "RuntimeError: no bf16 here"
    with pytest.raises(ConfigError, match="mode"):
        profile({"net": Refusing()}, torch.rand(1, 2), modes=("fast",))


def test_the_verb_measures_before_and_after(capsys):
    words = ["profile", "--model", "resnet20", "--width", "0.5", "--round-to", "4", "--modes", "plain,bf16", "--runs"]
    assert main([*words, "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["mode"], row["network"]) for row in rows] == [
        ("plain", "original"), ("plain", "dense"), ("bf16", "original"), ("bf16", "dense")
    ]  # fmt: skip
    assert rows[1]["params"] < 0.5 * rows[0]["params"]
    assert rows[1]["macs"] < 0.5 * rows[0]["macs"]


def test_auto_rounds_to_what_the_processor_takes_at_once():
    model, images = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 2, 1)), torch.rand(1, 3, 4, 4)
    mask = torch.zeros(64, 3, 1, 1)
    mask[:33] = 1
    dense = nni_topo.to_dense(model, images, {"0": {"weight": mask}}, round_to="auto")
    step = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
    assert dense[0].out_channels == -(-33 // step) * step
    assert widths_multiple("auto", torch.device("cuda")) == 8
    with pytest.raises(ConfigError, match="round_to must be a known name"):
        nni_topo.to_dense(model, images, {"0": {"weight": mask}}, round_to="fast")
