from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from nni_topo.errors import DataError
from nni_topo.network.cost import latency
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.speedup import LatencyTable, LayerLatency, measure_latency


def plane(entering, leaving, each=1.0):
    """Seconds proportional to the product of the widths."""
    seconds = tuple(tuple(each * i * o for o in leaving) for i in entering)
    return LayerLatency(entering, leaving, seconds, activation=float(leaving[-1]))


def test_interpolation_is_linear_in_both_widths_and_clamped():
    layer = plane((1, 4, 16), (1, 8))
    assert layer.at(4, 8) == 32.0
    assert layer.at(10, 5) == pytest.approx(50.0)  # a product is linear in each width
    assert layer.at(1, 1) == layer.at(0, 0) == 1.0
    assert layer.at(99, 99) == 128.0


def test_the_rest_shrinks_with_what_the_layers_put_out():
    table = LatencyTable({"a": plane((1, 2), (1, 10)), "b": plane((1, 10), (1, 30))}, rest=4.0)
    whole = table({"a": (2, 10), "b": (10, 30)})
    assert whole == 20.0 + 300.0 + 4.0
    assert table({"a": (2, 5), "b": (5, 15)}) == pytest.approx(10.0 + 75.0 + 2.0)
    assert table({"a": (2, 10), "unknown": (5, 5)}) == 24.0
    assert LatencyTable({}, rest=3.0)({"unknown": (5, 5)}) == 3.0


def test_a_saved_table_is_the_same(tmp_path):
    table = LatencyTable({"a": plane((1, 2), (1, 10), each=1e-5)}, rest=1e-4, batch_size=8, threads=2)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    in_order = LatencyTable({"b": plane((1,), (1,)), "a": plane((2, 3), (1,))})
    in_order.save(tmp_path / "table.json")
    assert list(LatencyTable.load(tmp_path / "table.json").layers) == ["b", "a"]
    assert (in_order.rest, in_order.batch_size, in_order.threads) == (0.0, 1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"entering": [2, 1]},
        {"entering": [0, 1]},
        {"seconds": [[1.0, 2.0]]},
        {"seconds": [[1.0, 2.0], [3.0, float("nan")]]},
        {"activation": None},
    ],
)
def test_files_that_hold_no_table_are_refused(change, tmp_path):
    layer = {"entering": [1, 2], "leaving": [1, 4], "seconds": [[1.0, 2.0], [3.0, 4.0]], "activation": 1.0}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"layers": {"a": layer}}))
    assert LatencyTable.load(path).layers["a"].at(1, 4) == 2.0
    path.write_text(json.dumps({"layers": {"a": {**layer, **change}}}))
    with pytest.raises(DataError, match=r"table\.json"):
        LatencyTable.load(path)
    with pytest.raises(DataError, match=r"none\.json"):
        LatencyTable.load(tmp_path / "none.json")


class Layers(nn.Module):
    """Every kind of layer that is timed, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same")
        self.grouped = nn.Conv2d(8, 16, 3, groups=4, padding=1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        maps = self.up(self.depthwise(self.depthwise(self.grouped(self.stem(images)))))
        return self.head(maps.mean((2, 3)))


def test_measured_tables_have_a_grid_for_every_layer():
    model = Layers().train()
    before = torch.get_num_threads()
    table = measure_latency(model, torch.randn(2, 3, 8, 8))
    grids = {name: (layer.entering, layer.leaving) for name, layer in table.layers.items()}
    assert grids == {
        "stem": ((1, 2, 3), (1, 2, 4, 6, 8)),
        "grouped": ((4, 8), (4, 8, 12, 16)),
        "depthwise": ((16,), (1, 4, 8, 12, 16)),
        "up": ((1, 4, 8, 12, 16), (1, 2, 4, 6, 8)),
        "head": ((1, 2, 4, 6, 8), (1, 2, 3, 4)),
    }
    assert (table.batch_size, table.threads) == (2, 1)
    assert table.layers["depthwise"].activation == 2 * (2 * 16 * 8 * 8)
    assert table.rest >= 0.0
    for layer in table.layers.values():
        seconds = np.array(layer.seconds)
        assert seconds.min() >= 0.0  # what a busy machine lets a layer wait is taken off, not quite exactly
        assert seconds.max() > 0.0
        assert (np.diff(seconds, axis=0) >= 0).all()
        assert (np.diff(seconds, axis=1) >= 0).all()
    assert torch.get_num_threads() == before
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def timed_layers(model, inputs):
    """List the layers that are run alone for a table: what they print, and the shape of their input."""
    depth, found = [0], []

    def enter(module, entering):
        if depth[0] == 0 and type(module) is not type(model):
            found.append((repr(module), tuple(entering[0].shape), entering[0].dtype))
        depth[0] += 1

    def leave(module, entering, output):
        depth[0] -= 1

    module = nn.modules.module
    handles = module.register_module_forward_pre_hook(enter), module.register_module_forward_hook(leave)
    try:
        table = measure_latency(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return table, found


KINDS = {
    "convolution": (
        nn.Conv2d(4, 8, (3, 5), stride=2, padding=(1, 2), dilation=2, padding_mode="reflect"),
        (2, 4, 16, 16),
    ),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 5, 5)),
    "linear of tokens": (nn.Linear(4, 8, bias=False), (3, 5, 4)),
}


@pytest.mark.parametrize("name", KINDS)
def test_layers_of_the_same_kind_are_timed_at_every_width(name):
    layer, shape = KINDS[name]
    inputs = torch.randn(shape).to(layer.weight.dtype)
    table, found = timed_layers(nn.Sequential(layer), inputs)
    reads, makes = ((2, 4), (2, 4, 6, 8)) if name == "grouped" else ((1, 2, 3, 4), (1, 2, 4, 6, 8))
    widths = [(i, o) for i in reads for o in makes]
    dim = len(shape) - 1 if isinstance(layer, nn.Linear) else 1
    expected = []
    for entering, leaving in widths:
        printed = repr(layer).replace("(4, 8", f"({entering}, {leaving}", 1)
        printed = printed.replace("in_features=4, out_features=8", f"in_features={entering}, out_features={leaving}")
        expected += [(printed, (*shape[:dim], entering, *shape[dim + 1 :]), layer.weight.dtype)] * 6  # one warms up
    assert found == expected
    assert table.batch_size == shape[0]


def test_equal_layers_are_timed_once_and_a_layer_of_two_calls_twice():
    one, other, wide = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    model = nn.Sequential(one, other, one, wide)
    table, found = timed_layers(model, torch.zeros(2, 4))
    assert len(found) == 2 * 16 * 6  # with a bias and without, at sixteen pairs of widths, six times each
    assert np.array_equal(table.layers["0"].seconds, 2 * np.array(table.layers["1"].seconds))
    assert (table.layers["0"].activation, table.layers["1"].activation) == (16.0, 8.0)


class Clock:
    """Stands still but for what layers say they take."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("nni_topo.network.cost.measure.time", clock)
    monkeypatch.setattr("nni_topo.network.cost.measure._seconds_waiting", lambda: 0.0)
    return clock


def test_a_table_holds_the_medians_of_layers_and_never_less_for_a_wider_one(clock):
    calls = dict[int, int]()

    class Taking(nn.Linear):
        """Takes less time for four rows than for one; of three passes one is slow."""

        def forward(self, rows):
            width = rows.shape[1]
            calls[width] = calls.get(width, 0) + 1
            clock.now += (5.0 if width == 1 else 3.0) * (1 if calls[width] % 3 else 10)
            return super().forward(rows)

    class Waiting(nn.Module):
        def forward(self, rows):
            clock.now += 0.5
            return rows

    model = nn.Sequential(Taking(2, 2), Waiting())
    table = measure_latency(model, torch.zeros(1, 2))
    assert table.layers["0"].seconds == ((5.0, 5.0), (5.0, 5.0))
    assert table.rest == 0.5


class Mixed(nn.Module):
    """Attention, a recurrent layer and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Linear(16, 24)
        self.recurrent = nn.LSTM(24, 20, batch_first=True)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        x = self.entry(x)
        x = torch.relu(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(self.recurrent(torch.relu(self.mlp(x)))[0][:, -1])


def test_attention_and_recurrent_layers_are_in_the_table():
    torch.manual_seed(0)
    model, inputs = Mixed().eval(), torch.randn(4, 5, 8)
    table = measure_latency(model, inputs)
    assert table.layers.keys() >= {"entry", "attention", "mlp", "recurrent", "head"}
    widths = NetworkCost.on(model, inputs).widths({})
    for name in ("attention", "recurrent"):
        entering, leaving = widths[name]
        layer = table.layers[name]
        assert (layer.entering[-1], layer.leaving[-1]) == (entering, leaving)
        assert layer.at(entering // 2, leaving // 2) == pytest.approx(layer.at(entering, leaving) / 4)
        assert layer.at(entering, leaving) > 0.0
    assert table(widths) > sum(table.layers[name].at(*widths[name]) for name in ("attention", "recurrent"))


def test_the_output_projection_of_attention_has_its_share_of_the_time(monkeypatch):
    monkeypatch.setattr(latency, "_pass_times", lambda *_: (0.0, {"attention": 4.0, "recurrent": 2.0}))
    model, inputs = Mixed().eval(), torch.randn(4, 5, 8)
    layers = measure_latency(model, inputs).layers
    # 16 times 16 weights and 16 biases each of queries, keys, values and projection
    assert "attention.out_proj" in layers
    shares = {"attention": 0.75, "recurrent": 1.0}
    for name, seconds in (("attention", 4.0), ("recurrent", 2.0)):
        assert layers[name].seconds[-1][-1] == pytest.approx(seconds * shares[name])
