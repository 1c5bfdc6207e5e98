"""With ``constants="keep"`` biases add what removed channels are in the model that NNI's pruner wraps."""

from __future__ import annotations

import copy

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from speedup_nets import Doubling, Net, Rows, filter_mask, lively
from tied_nets import TiedReaders
from torch import Tensor, nn

from nni_topo import to_dense
from nni_topo.speedup import dependency_groups

GONE = [1, 2, 4, 5]  # equally many of both groups
ASKED = [{"op_names": ["first"], "sparse_ratio": 0.5}]


BEHIND = {
    "bias": lambda: [nn.Conv2d(8, 6, 3)],
    "groups": lambda: [nn.Conv2d(8, 6, 3, groups=2)],
    "reflected border": lambda: [nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")],
    "norm": lambda: [nn.Conv2d(8, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)],
    "linear": lambda: [Rows(nn.Linear(8, 6))],
    "pooled": lambda: [nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 6, 1)],
    "own class": lambda: [Doubling(8, 6, 3)],
}


def made(between: nn.Module, behind: list[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = lively(Net(between, *behind).eval()).double()
    return net, torch.rand(2, 3, 10, 10, dtype=torch.float64)


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


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


BETWEEN = {"shift of a norm": lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), "sigmoid": nn.Sigmoid}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("behind", BEHIND)
@torch.no_grad()
@pytest.mark.quick_every(3)
def test_kept_constants_give_what_nnis_wrapped_model_does(between, behind):
    net, images = made(BETWEEN[between](), BEHIND[behind]())
    expected, masks, net = wrapped(net, images, "head")
    before = copy.deepcopy(net.state_dict())
    dense = to_dense(net, images, masks, constants="keep")
    assert dense.first.out_channels == 4
    assert gap(dense(images), expected) < 1e-9
    assert gap(to_dense(net, images, masks)(images), expected) > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


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
def test_shared_layers_keep_each_its_own():
    torch.manual_seed(0)
    net, rows = TiedReaders().double(), torch.rand(3, 4, dtype=torch.float64)
    masks = {name: filter_mask(net.get_submodule(name), GONE) for name in ("first", "other")}
    dense = to_dense(net, rows, masks, constants="keep")
    assert dense.third.weight is dense.second.weight
    assert "no longer shared, because their values differ now: second.bias, third.bias" in dense.report.notes
    for name in ("first", "other"):
        layer = net.get_submodule(name)
        layer.weight[GONE], layer.bias[GONE] = 0, 0
    assert gap(dense(rows), net(rows)) < 1e-9


class Shifted(nn.Module):
    """A layer, a parameter of the model's own and another layer."""

    def __init__(self, shape: tuple[int, ...], last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), last
        self.shift = nn.Parameter(torch.randn(shape))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images).flatten(2).transpose(1, 2) + self.shift)


@pytest.mark.parametrize(
    ("shape", "last"), [((1, 36, 8), nn.Linear(8, 5)), ((8,), nn.Linear(8, 5, bias=False))], ids=["places", "no bias"]
)
def test_what_no_layer_can_keep_is_named(shape, last):
    net, images = Shifted(shape, last).eval(), torch.randn(2, 3, 6, 6)
    masks = {"first": filter_mask(net.first, GONE)}
    (note,) = to_dense(net, images, masks, constants="keep").report.notes
    assert note == "contributions of pruned channels were dropped because they can't be kept as constants: last"
    assert to_dense(net, images, masks).report.notes == ()


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(512), lambda: nn.GroupNorm(2, 512), lambda: nn.RMSNorm(512)])
def test_kept_constants_bring_norms_near_those_that_see_zeros(norm) -> None:
    torch.manual_seed(0)
    rows = torch.randn(256, 8)
    model = nn.Sequential(nn.Linear(8, 512), norm(), nn.Tanh(), nn.Linear(512, 5)).eval()
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.uniform_(0.5, 1.5)
    before = copy.deepcopy(model.state_dict())
    mask = torch.ones(512, 8)
    mask[torch.arange(512) % 8 < 5] = 0
    masks = {"0": {"weight": mask, "bias": mask[:, 0]}}
    wrapped = copy.deepcopy(model)
    with torch.no_grad():  # as NNI's pruner masks: the norm sees zeros
        wrapped[0].weight.mul_(mask)
        wrapped[0].bias.mul_(mask[:, 0])
        kept = mask[:, 0].bool()
        hidden = wrapped[2](wrapped[1](wrapped[0](rows)))[:, kept]
        wanted = hidden @ wrapped[3].weight[:, kept].T + wrapped[3].bias
        plain = to_dense(model, rows, masks)
        near = to_dense(model, rows, masks, constants="keep")
        lost = [
            float((dense[3](dense[2](dense[1](dense[0](rows)))) - wanted).square().mean()) for dense in (plain, near)
        ]
    assert type(near[1]) is type(model[1])
    assert lost[1] < 0.1 * lost[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
