"""Why a layer keeps its channels; why a dense model can't equal the masked one, and every way on that it names."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from speedup_nets import filter_mask
from torch import Tensor, nn
from torch.nn import functional

from nni_topo import to_dense
from nni_topo.errors import ConfigError, SpeedupError
from nni_topo.speedup import dependency_groups, explain

GONE = [1, 2, 4, 5]


class Net(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3)
        self.between = between
        self.second = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.between(self.first(images))).relu().mean((2, 3)))


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def normalized(images: Tensor) -> Tensor:
    return functional.normalize(images.sigmoid(), dim=1)


MIXED = {
    "sort": Function(lambda images: images.sort(dim=1)[0]),
    "functional softmax": Function(lambda images: functional.softmax(images, dim=1)),
}


def images() -> Tensor:
    return torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def test_values_of_removed_channels_that_an_operation_reads_name_every_way_on():
    net = Net(Function(normalized)).eval()
    with pytest.raises(SpeedupError, match="got a difference") as caught:
        to_dense(net, images(), {"first": filter_mask(net.first, GONE)})
    assert "masks remove channels of first that have to stay: removed channels arrive as values" in str(caught.value)
    assert "(made by sigmoid in between, read by normalize in between)" in str(caught.value)
    assert "exclude first from the config_list (exclude_op_names)" in str(caught.value)
    assert "check=False returns the dense model all the same" in str(caught.value)


class Scaled(nn.Module):
    """Attention that divides by the root of a number of channels."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        weights = self.q(x) @ self.k(x).mT / math.sqrt(self.q(x).shape[-1])
        return self.out(weights.softmax(-1) @ self.v(x))


def test_masks_that_remove_what_has_to_stay_are_told_why_it_has_to():
    model, x = Scaled().eval(), torch.rand(2, 5, 8, generator=torch.Generator().manual_seed(0))
    masks = {name: filter_mask(model.get_submodule(name), [0, 3, 5]) for name in ("q", "k")}
    with pytest.raises(SpeedupError, match="got a difference") as caught:
        to_dense(model, x, masks)
    told = "masks remove channels of q, k that have to stay: the forward computes with their number"
    assert told in str(caught.value)
    assert "exclude q, k from the config_list" in str(caught.value)
    assert "or checks it (size in q)" in str(explain(model, x, "q"))


@pytest.mark.parametrize("kind", MIXED)
def test_channels_before_what_mixes_them_stay_and_the_report_says_why(kind):
    net = Net(MIXED[kind]).eval()
    dense = to_dense(net, images(), {"first": filter_mask(net.first, GONE)})
    (row,) = dense.report.kept
    assert (row.name, row.after) == ("first", 8)
    assert "the result of an operation depends on removed channels" in row.reason
    for scale in (1.0, 100.0):
        with torch.no_grad():
            torch.testing.assert_close(dense(scale * images()), net(scale * images()))


class Branches(nn.Module):
    """Layers that are coupled, counted, mixed and grouped; a choice by value lets no symbolic tracer in."""

    def __init__(self) -> None:
        super().__init__()
        self.counted, self.coupled, self.mixed = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)
        self.state = nn.LSTM(8, 6, proj_size=3)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        counted = self.counted(features)
        if float(counted.sum()) > 1e9:
            counted = counted * 2
        first = counted[:, :3].sum(1, keepdim=True)
        mixed = torch.softmax(self.mixed(counted + self.coupled(features)), 1)
        return self.head(mixed) + first, self.state(mixed)[0]


FEATURES = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))


def test_a_layer_that_keeps_some_channels_is_explained_with_the_line_of_the_forward():
    found = explain(Branches(), FEATURES, "counted")
    assert (found.channels, found.kept, found.coupled, found.in_part) == (8, 3, ("coupled",), False)
    (reason,) = found.reasons
    assert (reason.kind, reason.place) == ("fixed_channels", "getitem")
    source, first = inspect.getsourcelines(Branches.forward)
    (line,) = [number for number, text in enumerate(source, first) if ":3]" in text]
    assert reason.line == f"{__file__}:{line}"
    (addition,) = [number for number, text in enumerate(source, first) if "self.coupled(features)" in text]
    assert "counted: 3 of 8 channels are kept" in str(found)
    assert f"coupled by add at {__file__}:{addition}" in str(found)
    assert f"(getitem), at {__file__}:{line}" in str(found)


KINDS = {"coupled": "fixed_channels", "mixed": "result_depends", "head": "model_output", "state": "recurrent_state"}


@pytest.mark.parametrize("layer", KINDS)
def test_the_reasons_of_an_explanation_are_those_of_dependency_groups(layer):
    model = Branches()
    found = explain(model, FEATURES, layer)
    groups = dependency_groups(model, FEATURES, [{"op_types": ["Linear", "LSTM"], "sparse_ratio": 0.5}])
    assert [each.kind for each in found.reasons] == [KINDS[layer]]
    assert (groups.reasons[layer], groups.skipped[layer].endswith(str(found.reasons[0]))) == (found.reasons, True)
    assert (found.kept == found.channels) == (layer != "coupled")
    assert len(found.advice) == 1


def test_a_layer_that_can_be_pruned_is_explained_by_its_blocks_and_what_it_is_coupled_with():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1))
    found = explain(model, images(), "1")
    assert (found.kept, found.blocks, found.reasons, found.advice) == (0, 4, (), ())
    assert "4 blocks of channels lose equally many, because of 1: Conv2d, 2: GroupNorm" in str(found)
    follows = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))
    assert (explain(follows, images(), "0").coupled, explain(follows, images(), "1").coupled) == (("1",), ("0",))


def test_layers_of_attention_are_explained_by_its_heads():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model, states = nn.Sequential(nn.Linear(4, 16), layer, nn.Linear(16, 3)), torch.rand(2, 5, 4)
    attention, out = explain(model, states, "1.self_attn"), explain(model, states, "1.self_attn.out_proj")
    assert (attention.heads, attention.mixes, attention.kept) == ("1.self_attn", "", 0)
    assert (out.heads, out.mixes, out.coupled) == ("", "1.self_attn", ("0", "1.linear2"))
    assert "columns of its weight are pruned with the heads of 1.self_attn" in str(out)


def test_what_is_no_layer_is_refused_by_name():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match=r"layer must be a known name, got '0\.00'; did you mean 0\.0"):
        explain(model, FEATURES, "0.00")
    with pytest.raises(ConfigError, match=r"layer must name a convolution.*got ReLU \(0\.1\)$"):
        explain(model, FEATURES, "0.1")
    with pytest.raises(ConfigError, match=r"got Sequential \(0\); it holds 0\.0$"):
        explain(model, FEATURES, "0")
    with pytest.raises(ConfigError, match="example_inputs must fit the model"):
        explain(model, FEATURES[:, :3], "1")


def test_the_empty_name_is_refused_with_the_layers_that_there_are():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    words = r"layer must name a convolution.*got the empty name, which is the model itself \(layer\)"
    with pytest.raises(ConfigError, match=rf"{words}; the model's layers are 0\.0, 1$"):
        explain(model, FEATURES, "")
    with pytest.raises(ConfigError, match=rf"{words}; the model has no such layer$"):
        explain(nn.Sequential(nn.ReLU()), FEATURES, "")


def test_the_operation_that_gives_removed_channels_values_is_named_with_the_one_that_reads_them():
    (reason,) = explain(Net(Function(normalized)).eval(), images(), "first").reasons
    text = (
        "removed channels arrive as values that aren't zero (made by sigmoid in between, read by normalize in between)"
    )
    assert (reason.kind, reason.place, str(reason)) == ("nonzero_values", "sigmoid in between", text)
    assert reason.line.startswith(f"{__file__}:")


class _Routed(nn.Module):
    """Two experts, to which a router gives places by its values."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.enter, self.router, self.head = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        states = self.enter(x).flatten(0, 1)
        shares, chosen = self.router(states).softmax(-1).topk(self.most, dim=-1)
        found = torch.zeros_like(states)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen[:, 0] == number)
            found.index_add_(0, rows, expert(states[rows]) * shares[rows, :1])
        return self.head(found.unflatten(0, x.shape[:2]))


def test_a_router_picks_places_by_its_values():
    torch.manual_seed(0)
    model, words = _Routed(2).eval(), torch.randn(2, 20, 5)
    found = explain(model, words, "router")
    assert (found.kept, found.reasons[0].kind) == (2, "picked_by_value")
    assert str(found.reasons[0]) == "the forward picks places by the values of these channels (where)"
    assert any("each output stands for an expert" in line for line in found.advice)
    skipped = dependency_groups(model, words, [{"op_types": ["Linear"], "sparse_ratio": 0.5}]).skipped
    assert skipped.keys() == {"router", "head"}
    (reason,) = explain(_Routed(1).eval(), words, "router").reasons
    assert str(reason) == "the result of an operation depends on removed channels (topk)"
