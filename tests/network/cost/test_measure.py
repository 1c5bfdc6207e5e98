"""What networks take, measured beside each other."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.cli import main
from nni_topo.errors import DataError
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.network.cost.measure import now, profile, time_shares
from nni_topo.zoo import count_macs, count_params, latencies


# Convolution: output positions * output channels * input channels per group * kernel area.
@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 12), 10 * 12 * 8 * 3 * 9),
        (nn.Conv2d(4, 8, (3, 5), groups=2, padding=(1, 2)), (4, 6, 6), 6 * 6 * 8 * 2 * 15),
        (nn.Conv2d(6, 6, 3, groups=6, padding=1), (6, 5, 5), 5 * 5 * 6 * 1 * 9),
        (nn.ConvTranspose2d(4, 2, 2, stride=2), (4, 5, 5), 5 * 5 * 4 * 2 * 4),
        (nn.Linear(20, 7), (5, 20), 5 * 20 * 7),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)), (3, 4, 4), 0),
    ],
)
def test_macs_by_hand(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert count_macs(layer, torch.zeros(1, *shape)) == expected
    assert count_macs(layer, torch.zeros(4, *shape)) == expected


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def test_macs_of_attention_by_hand() -> None:
    tokens, width = 10, 16
    # Queries, keys, values and output projection; then scores and weighted values, all heads together.
    expected = 4 * tokens * width * width + 2 * tokens * tokens * width
    assert count_macs(SelfAttention(width, heads=4), torch.zeros(2, tokens, width)) == expected


class Positions(nn.Module):
    """A view of a parameter enters a layer, as relative positions do in DeBERTa."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.read, self.head = nn.Embedding(9, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = self.read(self.table.weight[: tokens.shape[1]].unsqueeze(0))
        return self.head(torch.relu(tokens + positions))


@pytest.mark.parametrize("trained", [True, False])
def test_macs_where_a_view_of_a_parameter_enters_a_layer(trained: bool) -> None:
    model, tokens = Positions().requires_grad_(trained), torch.rand(3, 5, 8)
    assert count_macs(model, tokens) == NetworkCost.on(model, tokens)({}).macs == 5 * 16 * 8 + 5 * 8 * 2
    assert all(each.requires_grad is trained for each in model.parameters())


def test_macs_of_an_encoder_layer_see_through_the_fast_path() -> None:
    tokens, width, hidden = 6, 8, 32
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True)
    expected = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
    assert count_macs(layer, torch.zeros(1, tokens, width)) == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_params_count_shared_ones_once_and_no_buffers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert count_params(model) == 16 + 4 + 8 + 4


def test_latencies_order_models_by_their_work() -> None:
    """A hundred times the work takes longer on any machine, however busy: the two are timed in turns."""
    models = {"large": nn.Linear(1500, 1500), "small": nn.Linear(1500, 15)}
    times = latencies(models, torch.zeros(64, 1500), runs=9)
    assert list(times) == ["large", "small"]
    assert times["large"] > times["small"] > 0


class Clock:
    """Stands still but for what models say they take; notes which one ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def model(self, name: str, *seconds: float) -> nn.Module:
        """A model that takes so many seconds at its first, second, ... pass."""
        passes = iter(seconds)

        class Timed(nn.Module):
            def forward(_, inputs: torch.Tensor) -> torch.Tensor:  # noqa: N805
                self.now += next(passes)
                self.ran.append(name)
                return inputs

        return Timed()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("nni_topo.network.cost.measure.time", clock)
    monkeypatch.setattr("nni_topo.network.cost.measure._seconds_waiting", lambda: 0.0)
    return clock


def test_a_latency_is_the_median_in_milliseconds_without_the_warm_up(clock: Clock) -> None:
    models = {
        "one": clock.model("one", 100.0, 50.0, 50.0, 50.0, 50.0, 1.0, 9.0, 2.0),
        "two": clock.model("two", 7.0, 7.0, 7.0, 7.0, 7.0, 4.0, 4.0, 99.0),
    }
    assert latencies(models, torch.zeros(1), runs=3) == {"one": 2000.0, "two": 4000.0}


def test_rounds_go_on_until_a_share_is_known_or_the_seconds_are_over(clock: Clock) -> None:
    def timed(seconds: float, wanted: float | None = None) -> tuple[float, float, int]:
        generator, clock.ran = random.Random(0), []
        part = clock.model("a", *(generator.uniform(0.4, 0.6) for _ in range(4000)))
        whole = clock.model("b", *[1.0] * 4000)
        (found,) = time_shares([part], whole, torch.zeros(1), wanted, seconds=seconds)
        return *found, len(clock.ran) // 2 - 1

    share, off, rounds = timed(1e9)
    assert share == pytest.approx(0.5, rel=0.02)
    assert off <= 0.015
    assert rounds == 1024  # of so many evenly spread ones the median is known to 1.96 * 0.1 / sqrt(1024) of 0.5: 1.2 %
    assert timed(1e9, wanted=0.25)[2] <= 32  # far from a quarter a tenth does
    share, off, rounds = timed(30.0)
    assert off > 0.02
    assert 19 <= rounds <= 21


def test_several_shares_are_found_in_the_same_rounds(clock: Clock) -> None:
    slow = [1.0, 10.0, 10.0, 1.0, 1.0, 10.0, 1.0, 10.0, 1.0]
    factors = {"a": 1.0, "b": 3.0, "whole": 4.0}
    one, other, whole = (clock.model(name, *(by * each for each in slow)) for name, by in factors.items())
    assert time_shares([one, other], whole, torch.zeros(1)) == [(0.25, 0.0), (0.75, 0.0)]
    assert sorted(clock.ran[-3:]) == ["a", "b", "whole"]


def test_models_are_timed_in_turns_of_random_order(clock: Clock) -> None:
    models = {name: clock.model(name, *[1.0] * 15) for name in "abc"}
    latencies(models, torch.zeros(1), runs=10)
    rounds = [tuple(clock.ran[first : first + 3]) for first in range(0, 45, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 3


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="the system doesn't tell waits for a core")
def test_waiting_for_a_core_is_not_the_models_time_and_waiting_for_else_is() -> None:
    """Three busy programs on the same core take three quarters of it."""
    inputs, cores = torch.zeros(1), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(cores)})
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        start, own, clock = now(inputs), time.thread_time(), time.perf_counter()
        while time.thread_time() - own < 0.5:
            pass
        counted, wall = now(inputs) - start, time.perf_counter() - clock
        before = now(inputs)
        time.sleep(0.2)
        assert now(inputs) - before > 0.19
    finally:
        for each in busy:
            each.kill()
            each.wait()
        os.sched_setaffinity(0, cores)
    assert counted == pytest.approx(0.5, rel=0.2)
    assert wall > 1.5 * counted


def test_latency_restores_the_thread_count_even_after_an_error() -> None:
    before = torch.get_num_threads()
    models = {"net": nn.Linear(4, 2)}
    assert latencies(models, torch.zeros(1, 4), runs=3, threads=before + 1)["net"] > 0
    assert torch.get_num_threads() == before
    with pytest.raises(DataError, match="example_inputs must fit the model"):
        latencies(models, torch.zeros(1, 5), runs=1, threads=before + 1)
    assert torch.get_num_threads() == before


def net(width):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 4, 1))


def test_a_profile_has_a_row_for_every_network():
    rows = profile({"wide": net(16), "narrow": net(8)}, torch.rand(2, 3, 16, 16), runs=2)
    assert [row.network for row in rows] == ["wide", "narrow"]
    for row in rows:
        width = 16 if row.network == "wide" else 8
        assert row.macs == 16 * 16 * (27 * width + 4 * width)
        assert row.params == 28 * width + 4 * width + 4
        assert row.throughput == pytest.approx(2000 / row.latency_ms)
        # The widest tensor and the one made of it are held at once.
        assert row.peak_bytes >= 4 * (row.params + 2 * 2 * 16 * 16 * width)
    assert rows[0].peak_bytes > rows[1].peak_bytes


def test_the_verb_measures_before_and_after(capsys):
    words = ["profile", "--model", "resnet20", "--width", "0.5", "--round-to", "4", "--runs", "1"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["network"] for row in rows] == ["unpruned", "dense"]
    assert rows[1]["params"] < 0.5 * rows[0]["params"]
    assert rows[1]["macs"] < 0.5 * rows[0]["macs"]


class Steps(nn.Module):
    """A recurrent layer over seven steps, or a cell that is called for each."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, rows):
        if isinstance(self.layer, nn.RNNBase):
            return self.layer(rows)[0]
        state = None
        for step in range(rows.shape[1]):
            state = self.layer(rows[:, step], state)
        return state


# By hand, for each of seven steps: gates x units x (inputs + units), levels above the first reading units.
@pytest.mark.parametrize(
    ("layer", "products"),
    [
        (lambda: nn.LSTM(6, 16, 2, batch_first=True), 4 * 16 * (22 + 32)),
        (lambda: nn.GRU(6, 16, batch_first=True, bidirectional=True), 2 * 3 * 16 * 22),
        # 8 outputs are projected from 16 units, and read back.
        pytest.param(
            lambda: nn.LSTM(6, 16, proj_size=8, batch_first=True),
            4 * 16 * 14 + 8 * 16,
            marks=pytest.mark.filterwarnings("ignore:LSTM with projections"),
        ),
        (lambda: nn.LSTMCell(6, 16), 4 * 16 * 22),
    ],
)
def test_recurrent_layers_count_by_both_counters(layer, products):
    model, rows = Steps(layer()), torch.randn(3, 7, 6)
    assert count_macs(model, rows) == 7 * products
    assert NetworkCost.on(model, rows)({}).macs == 7 * products


def test_units_that_go_take_their_weights_along():
    torch.manual_seed(0)
    model, rows = (
        nn.Sequential(Steps(nn.LSTM(6, 16, 2, bias=False, batch_first=True)), nn.Linear(16, 4)).eval(),
        torch.randn(3, 7, 6),
    )
    cost, kept = NetworkCost.on(model, rows), {"0.layer": np.arange(16) % 3 > 0}
    dense = nni_topo.to_dense(model, rows, cost.masks(kept))
    assert dense[0].layer.hidden_size == 10
    assert (cost(kept).params, cost(kept).macs) == (count_params(dense), count_macs(dense, rows))


def test_the_most_bytes_are_what_is_stored_and_what_a_pass_holds_at_once() -> None:
    kept = nn.Linear(8, 16, bias=False)
    kept.register_buffer("mean", torch.zeros(5, dtype=torch.float64))
    # The output of the first is freed after the second, before the third makes its own.
    three = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 2, bias=False))
    rows = profile({"kept": kept, "three": three}, torch.zeros(4, 8), runs=1)
    assert rows[0].peak_bytes == 4 * 8 * 16 + 8 * 5 + 4 * 4 * 16
    assert rows[1].peak_bytes == 4 * (8 * 16 + 16 * 2) + 2 * (4 * 4 * 16)
