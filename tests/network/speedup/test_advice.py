"""A dense model that can't equal the masked one: the error says why, and every way on that it names works."""

from __future__ import annotations

import pytest
import torch
from speedup_nets import filter_mask
from torch import Tensor, nn
from torch.nn import functional

from nni_topo.errors import SpeedupError
from nni_topo.speedup import to_dense

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


def add_in_place(images: Tensor) -> Tensor:
    images += 0.5
    return images


CONSTANTS = {
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(),
    "functional": Function(torch.sigmoid),
    "added in place": Function(add_in_place),
}
MIXED = {
    "response norm": nn.LocalResponseNorm(3, alpha=3.0),
    "softmax": nn.Softmax(dim=1),
    "functional softmax": Function(lambda images: functional.softmax(images, dim=1)),
    "functional norm": Function(lambda images: functional.group_norm(images, 1)),
}


def images() -> Tensor:
    return torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def refused(net: nn.Module) -> str:
    with pytest.raises(SpeedupError, match="got a difference") as caught:
        to_dense(net, images(), {"first": filter_mask(net.first, GONE)})
    return str(caught.value)


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_in_front_of_zeros_beyond_the_border_name_both_ways(kind):
    net = Net(CONSTANTS[kind]).eval()
    words = refused(net)
    assert "removed channels of first arrive at second as values that aren't zero" in words
    assert "exclude first from the config_list (exclude_op_names)" in words
    assert 'constants="keep" takes over what is constant, but for borders' in words
    masks = {"first": filter_mask(net.first, GONE)}
    dense = to_dense(net, images(), masks, constants="keep")
    with torch.no_grad():
        constant = float(net.between(torch.zeros(1, 1, 1, 1)))
        first, other = net.second.weight.sum((2, 3)).split(3)
        added = torch.cat([first[:, [1, 2]], other[:, [0, 1]]]).sum(1) * constant
    assert torch.allclose(dense.second.bias, net.second.bias + added, atol=1e-6)


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


def test_all_ways_end_in_check_false():
    for between in (CONSTANTS["sigmoid"], CONSTANTS["softplus"]):
        assert "check=False gives the dense model all the same" in refused(Net(between).eval())


def test_every_layer_that_arrives_there_is_named():
    class Sum(Net):
        def __init__(self) -> None:
            super().__init__(nn.Sigmoid())
            self.beside = nn.Conv2d(3, 8, 3)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, images: Tensor) -> Tensor:
            met = self.norm(self.first(images)) + self.beside(images)
            return self.head(self.second(self.between(met)).relu().mean((2, 3)))

    net = Sum().eval()
    masks = {name: filter_mask(net.get_submodule(name), GONE) for name in ("first", "beside")}
    with pytest.raises(SpeedupError, match="removed channels of first, beside arrive at second as values"):
        to_dense(net, images(), masks)


def test_a_constant_that_arrives_at_the_output_is_no_layers_to_take():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(4, 8)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.first(inputs).sigmoid().sum(1, keepdim=True)

    net = Gated()
    with pytest.raises(SpeedupError, match=r"behind the last layer.*exclude first from the config_list"):
        to_dense(net, torch.rand(3, 4), {"first": filter_mask(net.first, GONE)})
