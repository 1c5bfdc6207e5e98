from __future__ import annotations

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from speedup_nets import masks_of
from torch import nn

from nni_topo import dependency_groups, to_dense
from nni_topo.errors import ConfigError, SpeedupError
from nni_topo.network.graph.nodes import plain_name
from nni_topo.network.graph.tracing import layer_sizes, trace
from nni_topo.network.speedup.equivalence import masked_model


def test_a_model_may_put_out_nan():
    class Log(nn.Linear):
        def forward(self, x):
            return torch.log(super().forward(x) * 0.0 - 1.0)

    recording = trace(Log(3, 2).eval(), ((torch.ones(2, 3),), {}))
    assert recording.graph_module(*recording.args).isnan().all()


class ByPlace(nn.Sequential):
    """Takes its inputs by place alone."""

    def __init__(self):
        super().__init__(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, first, /):
        return super().forward(first)


class AnyAndMore(ByPlace):
    """Takes as many inputs as there are."""

    def forward(self, first, *others, scale=1.0, **ignored):
        return super().forward(sum(others, first)) * scale


@pytest.mark.parametrize(("kind", "count"), [(ByPlace, 1), (AnyAndMore, 3)])
def test_inputs_that_a_forward_takes_by_place_alone_are_followed(kind, count):
    torch.manual_seed(0)
    model, inputs = kind().eval(), tuple(torch.randn(count, 4, 3))
    groups = dependency_groups(model, inputs, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert groups.skipped.keys() == {"2"}
    masks = masks_of(L1NormPruner(model, groups))
    dense = to_dense(model, inputs, masks)
    assert dense[0].out_features == 4
    with torch.no_grad():
        torch.testing.assert_close(dense(*inputs), masked_model(model, inputs, masks)(*inputs))


class ByNumber(nn.Module):
    """Takes another way with many samples, or by the values of the last one."""

    def __init__(self, decides):
        super().__init__()
        self.few, self.many, self.decides = nn.Linear(3, 2), nn.Linear(3, 2), decides

    def forward(self, x):
        return self.many(x) if self.decides(x) else self.few(x)


def test_a_graph_in_half_precision_may_differ_by_its_rounding():
    """PyTorch's attention computes alone as one operation, and in a graph step by step."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(48, 4, batch_first=True)

        def forward(self, x):
            return x + self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    net = nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(8 * 48, 10)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    images = torch.randn(64, 8, 48).bfloat16()
    groups = dependency_groups(net.bfloat16(), images, [{"op_types": ["MultiheadAttention"], "sparse_ratio": 0.5}])
    assert groups.skipped == {}
    assert {name for entry in groups for name in entry["op_names"]} >= {"0.attention", "1.attention"}


@pytest.mark.parametrize(
    ("model", "shape", "sizes"),
    [
        (nn.LSTM(4, 3), (5, 2, 4), {"": [((2, 5, 4), (2, 5, 3))]}),
        (nn.GRUCell(4, 3), (5, 4), {"": [((5, 4), (5, 3))]}),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (2, 3, 8, 9), {"0": [((2, 3, 8, 9), (2, 4, 6, 7))]}),
    ],
    ids=["steps first", "cell", "convolution"],
)
def test_sizes_of_layers_have_the_samples_first(model, shape, sizes):
    assert layer_sizes(model, ((torch.randn(shape),), {})) == sizes
    with pytest.raises(ConfigError, match=r"must be ones that the model runs on, got: .* \(forward\)"):
        layer_sizes(model, ((torch.ones(2, 5),), {}))


def test_a_graph_that_computes_something_else_than_its_model_is_refused():
    class Writing(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            x.numpy()[:, 0] = 0.0  # which no graph shows
            return x + 1.0

    with pytest.raises(SpeedupError, match=r"got other outputs \(Writing\)"):
        trace(Writing(3, 2).eval(), ((torch.ones(2, 3),), {}))


@pytest.mark.parametrize("decides", [lambda x: len(x) > 8, lambda x: x[-1].sum() > 0], ids=["number", "value"])
def test_what_more_samples_decide_is_recorded_on_all(decides):
    model, inputs = ByNumber(decides).eval(), -torch.ones(16, 3)
    inputs[-1] = 1.0
    recording = trace(model, ((inputs,), {}))
    assert "many" in [node.target for node in recording.graph_module.graph.nodes]
    torch.testing.assert_close(recording.graph_module(*recording.args), model.many(inputs))


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: bool(x.sum() > -1e9),
        lambda x: x.sum().item() > -1e9,
        lambda x: x.numpy()[0, 0] > -1e9,
        lambda x: not torch.equal(x, x + 1.0),
        lambda x: [1, 2][(x[0, 0] > 1e9).long()] == 1,
    ],
    ids=["bool", "item", "numpy", "equal", "index"],
)
def test_a_recording_knows_that_values_were_read(decide):
    class Deciding(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            return x + 1.0 if decide(x) else x

    assert trace(Deciding(3, 2).eval(), ((torch.ones(2, 3),), {})).reads_values


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: x.shape[0] * x.size(1) > x.dim(),
        lambda x: len(x) == x.numel() // 2 and x.is_floating_point() and x.dtype == torch.float32,
        lambda x: torch.linspace(0, 1, 3).tolist()[1] == 0.5,
    ],
    ids=["sizes", "kind", "constants"],
)
def test_a_recording_knows_that_only_sizes_and_constants_were_read(decide):
    class Deciding(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            return x + 1.0 if decide(x) else x

    recording = trace(Deciding(3, 2).eval(), ((torch.ones(2, 3),), {}))
    assert not recording.reads_values
    assert "add" in [plain_name(node) for node in recording.graph_module.graph.nodes]
