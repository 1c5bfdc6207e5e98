"""Removed channels that aren't zero where they are read: what is constant goes into biases, and nothing else does."""

from __future__ import annotations

import copy

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from speedup_nets import filter_mask, lively
from torch import Tensor, nn

from nni_topo.errors import ConfigError, SpeedupError
from nni_topo.speedup import dependency_groups, masked_model, to_dense

GONE = [1, 2, 4, 5]  # equally many of both groups
ASKED = [{"op_names": ["first"], "sparse_ratio": 0.5}]
BY_TYPE = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]


class Net(nn.Module):
    """A layer, something between that makes constants of zeros, and what reads these."""

    def __init__(self, between: nn.Module, *behind: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.first, self.between, self.behind = nn.Conv2d(3, 8, 3), between, nn.Sequential(*behind)
        self.head = nn.Linear(width, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.behind(self.between(self.first(images))).relu().flatten(2).mean(2))


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(2).transpose(1, 2)).transpose(1, 2)


class Added(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        images += 0.5
        return images


BETWEEN = {"sigmoid": nn.Sigmoid, "added in place": Added}
BEHIND = {
    "bias": lambda: [nn.Conv2d(8, 6, 3)],
    "groups": lambda: [nn.Conv2d(8, 6, 3, groups=2)],
    "reflected border": lambda: [nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")],
    "norm": lambda: [nn.Conv2d(8, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)],
    "linear": lambda: [Rows()],
    "pooled": lambda: [nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 6, 1)],
    "own class": lambda: [Doubling(8, 6, 3)],
}
CARRIED = {
    "zeros beyond the border": lambda: [nn.Conv2d(8, 6, 3, padding=1)],
    "zeros around what enters": lambda: [nn.ZeroPad2d(1), nn.Conv2d(8, 6, 3)],
    "transposed": lambda: [nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1)],
    "no bias": lambda: [nn.Conv2d(8, 6, 1, bias=False)],
    "norm that isn't alone": lambda: [Twice()],
    "positions": lambda: [Positions(), nn.Conv2d(8, 6, 3)],
}
LEFT_ALONE = {
    "groups and zeros beyond the border": lambda: [nn.Conv2d(8, 6, 3, padding=1, groups=2)],
    "groups and no bias": lambda: [nn.Conv2d(8, 6, 1, groups=2, bias=False)],
}


class Doubling(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * super().forward(images)


class Positions(nn.Module):
    """Something else at every place, of all channels the same."""

    def forward(self, images: Tensor) -> Tensor:
        return images * torch.linspace(0.5, 2.0, images.shape[-1]).to(images)


class Twice(nn.Module):
    """A layer that is read by its norm and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer(images)
        return x + self.norm(x)


def made(between: nn.Module, behind: list[nn.Module], **knobs) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = lively(Net(between, *behind, **knobs).eval()).double()
    return net, torch.rand(2, 3, 10, 10, dtype=torch.float64)


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("behind", BEHIND)
@torch.no_grad()
@pytest.mark.quick_every(3)
def test_a_constant_is_taken_over(between, behind):
    net, images = made(BETWEEN[between](), BEHIND[behind]())
    assert dependency_groups(net, images, BY_TYPE).skipped.keys() == {"head"}
    masks = {"first": filter_mask(net.first, GONE)}
    dense = to_dense(net, images, masks)
    assert dense.first.out_channels == 4
    reference = masked_model(net, images, masks)
    others = torch.randn(3, 3, 10, 10, dtype=torch.float64)
    assert gap(dense(others), reference(others)) < 1e-9
    dropped = to_dense(net, images, masks, check=False)
    assert torch.equal(dropped(others), dense(others))


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("behind", CARRIED)
@torch.no_grad()
@pytest.mark.quick_every(3)
def test_where_no_bias_can_one_channel_brings_what_all_did(between, behind):
    net, images = made(BETWEEN[between](), CARRIED[behind]())
    assert dependency_groups(net, images, BY_TYPE).skipped.keys() == {"head"}
    masks = {"first": filter_mask(net.first, GONE)}
    before = copy.deepcopy(net.state_dict())
    dense = to_dense(net, images, masks)
    assert dense.first.out_channels == 5
    assert not dense.first.weight[1].any()
    assert dense.first.bias[1] == 0
    (row,) = dense.report.kept
    assert (row.name, row.kept) == ("first", 1)
    assert "kept to carry the constant contribution of the removed channels (behind." in row.reason
    others = torch.randn(3, 3, 10, 10, dtype=torch.float64)
    assert gap(dense(others), masked_model(net, images, masks)(others)) < 1e-9
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Apart(nn.Module):
    """Where the channels of two layers differ from one, they do so each at other places."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4 * parts, 3, padding=1)
        self.read, self.head, self.parts = nn.Conv2d(4 * parts, 4, 3, padding=1), nn.Linear(4, 2), parts

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images).sigmoid()
        parts = [nn.functional.pad(part, (each, 8 - each)) for each, part in enumerate(x.chunk(self.parts, 1))]
        return self.head(self.read(torch.cat(parts, 1)).relu().mean((2, 3)))


@pytest.mark.parametrize("parts", [3, 6])
@torch.no_grad()
def test_few_patterns_each_have_a_channel_and_many_have_none(parts):
    torch.manual_seed(0)
    net, images = lively(Apart(parts).eval()).double(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    skipped = dependency_groups(net, images, BY_TYPE).skipped
    assert ("first" in skipped) is (parts == 6)
    masks = {"first": filter_mask(net.first, range(0, 4 * parts, 2))}
    if parts == 6:
        with pytest.raises(SpeedupError, match="arrive at read as values that aren't zero"):
            to_dense(net, images, masks)
    else:
        assert to_dense(net, images, masks).first.out_channels == 6 + parts


@pytest.mark.parametrize("behind", LEFT_ALONE)
def test_where_none_takes_it_over_the_layer_stays_whole(behind):
    net, images = made(nn.Sigmoid(), LEFT_ALONE[behind]())
    skipped = dependency_groups(net, images, BY_TYPE).skipped
    assert "removed channels arrive as values that aren't zero" in skipped["first"]


class Gated(nn.Module):
    """Times a gate that depends on the image, and is the same at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(8, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return images.sigmoid() * self.gate(images).mean((2, 3), keepdim=True)


def test_what_depends_on_the_input_is_no_constant_although_it_is_one_number_for_one_image():
    net, images = made(Gated(), [nn.Conv2d(8, 6, 1)])
    assert "first" in dependency_groups(net, images[:1], BY_TYPE).skipped


def wrapped(net: nn.Module, images: Tensor, look: str) -> tuple[Tensor, dict, nn.Module]:
    """Run the model as NNI's pruner wraps it; return what a module gives, the masks, and the model unwrapped."""
    found = []
    pruner = L1NormPruner(net, dependency_groups(net, images, ASKED))
    _, masks = pruner.compress()
    net.get_submodule(look).register_forward_hook(lambda _, __, output: found.append(output.detach().clone()))
    net(images)
    pruner.unwrap_model()
    net.get_submodule(look)._forward_hooks.clear()
    return found[0], masks, net


@pytest.mark.parametrize("behind", ["bias", "norm", "groups", "linear"])
@torch.no_grad()
@pytest.mark.quick_every(2)
def test_kept_shifts_give_what_nnis_wrapped_model_does(behind):
    net, images = made(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), BEHIND[behind]())
    expected, masks, net = wrapped(net, images, "head")
    dense = to_dense(net, images, masks, constants="keep")
    assert dense.first.out_channels == 4
    assert gap(dense(images), expected) < 1e-9
    assert gap(to_dense(net, images, masks)(images), expected) > 1e-3


@torch.no_grad()
def test_beyond_a_border_a_kept_shift_goes_on():
    net, images = made(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), [nn.Conv2d(8, 6, 3, padding=1)])
    expected, masks, net = wrapped(net, images, "behind")
    found = []
    dense = to_dense(net, images, masks, constants="keep")
    dense.behind.register_forward_hook(lambda _, __, output: found.append(output))
    dense(images)
    inner = (..., slice(1, -1), slice(1, -1))
    assert gap(found[0][inner], expected[inner]) < 1e-9
    assert gap(found[0], expected) > 1e-3


@torch.no_grad()
def test_shared_layers_take_over_each_its_own():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = nn.Linear(4, 8), nn.Linear(4, 8)
            self.second, self.third = nn.Linear(8, 5), nn.Linear(8, 5)
            self.third.weight, self.third.bias = self.second.weight, self.second.bias

        def forward(self, rows: Tensor) -> Tensor:
            return self.second(self.first(rows).sigmoid()) + 2 * self.third(self.other(rows).relu())

    torch.manual_seed(0)
    net, rows = Tied().double(), torch.rand(3, 4, dtype=torch.float64)
    masks = {name: filter_mask(net.get_submodule(name), GONE) for name in ("first", "other")}
    before = copy.deepcopy(net.state_dict())
    dense = to_dense(net, rows, masks)
    assert gap(dense(rows), masked_model(net, rows, masks)(rows)) < 1e-9
    assert dense.second.in_features == 4
    assert dense.third.weight is dense.second.weight
    told = "modules that shared these have one each now, as they differ: second.bias, third.bias"
    assert told in dense.report.notes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_another_word_is_refused():
    net, images = made(nn.ReLU(), [nn.Conv2d(8, 6, 1)])
    with pytest.raises(ConfigError, match="constants must be a known name, got 'fold'; known: keep, zero"):
        to_dense(net, images, {"first": filter_mask(net.first, GONE)}, constants="fold")


class Shifted(nn.Module):
    """A layer, a parameter of the model's own and another layer."""

    def __init__(self, shape: tuple[int, ...], last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), last
        self.shift = nn.Parameter(torch.randn(shape))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images).flatten(2).transpose(1, 2) + self.shift)


@torch.no_grad()
def test_a_parameter_that_is_added_is_kept_where_constants_are():
    net, images = Shifted((1, 1, 8), nn.Linear(8, 5)).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    masks = {"first": filter_mask(net.first, GONE)}
    masked = copy.deepcopy(net)
    masked.first.weight[GONE], masked.first.bias[GONE] = 0, 0
    kept = to_dense(net, images, masks, constants="keep")
    assert kept.first.out_channels == 8 - len(GONE)
    assert gap(kept(images), masked(images)) < 1e-9
    assert kept.report.notes == ()
    assert gap(to_dense(net, images, masks)(images), masked_model(net, images, masks)(images)) < 1e-9


@pytest.mark.parametrize(
    ("shape", "last"), [((1, 36, 8), nn.Linear(8, 5)), ((8,), nn.Linear(8, 5, bias=False))], ids=["places", "no bias"]
)
def test_what_no_layer_can_keep_is_named(shape, last):
    net, images = Shifted(shape, last).eval(), torch.randn(2, 3, 6, 6)
    masks = {"first": filter_mask(net.first, GONE)}
    (note,) = to_dense(net, images, masks, constants="keep").report.notes
    assert note == "what pruned channels contribute is no constant that can be kept, and is dropped: last"
    assert to_dense(net, images, masks).report.notes == ()


def test_a_border_beyond_which_constants_go_on_is_named():
    net, images = made(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), [nn.Conv2d(8, 6, 3, padding=1)])
    masks = {"first": filter_mask(net.first, GONE)}
    report = to_dense(net, images, masks, constants="keep").report
    assert "kept constants go on beyond the border that these layers pad with zeros: behind.0" in report.notes
    assert repr(report).endswith(report.notes[-1])


@torch.no_grad()
def test_norms_whose_constants_differ_in_training_are_named():
    net, images = made(nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(8)), [nn.Conv2d(8, 6, 1)])
    masks = {"first": filter_mask(net.first, GONE)}
    dense, masked = to_dense(net, images, masks), masked_model(net, images, masks)
    assert gap(dense(images), masked(images)) < 1e-9
    assert gap(dense.train()(images), masked.train()(images)) > 1e-3
    (note,) = dense.report.notes
    assert note.startswith("constants after batch norms are those of evaluation mode")
    plain, images = made(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), [nn.Conv2d(8, 6, 1)])
    assert to_dense(plain, images, masks).report.notes == ()
