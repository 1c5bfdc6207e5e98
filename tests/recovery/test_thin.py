"""Layers that leave out what is zero: they compute the same, at once and once what a task may change has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nni_topo.recovery.plan import Solvable
from nni_topo.recovery.thin import thin_out

LAYERS = {
    "linear": (nn.Linear(8, 6), (3, 5, 8)),
    "linear without bias": (nn.Linear(8, 6, bias=False), (3, 8)),
    "1-D": (nn.Conv1d(8, 6, 3, padding=1), (3, 8, 7)),
    "2-D": (nn.Conv2d(8, 6, 3, stride=2, padding=1, padding_mode="circular"), (3, 8, 9, 7)),
    "2-D, one sample without a batch": (nn.Conv2d(8, 6, 3), (8, 9, 7)),
    "3-D": (nn.Conv3d(8, 6, 2, dilation=2), (3, 8, 5, 6, 5)),
}
READ, MADE = [0, 2, 3, 7], [1, 4]


class Task:
    """What may change of a layer named "0"."""

    def __init__(self, columns, rows):
        self.layer = Solvable("0", None, torch.tensor([columns]), torch.tensor([rows]), None)


def masked(layer, read=READ, made=MADE):
    torch.manual_seed(0)
    net = nn.Sequential(copy.deepcopy(layer))
    keep = torch.zeros_like(net[0].weight)
    keep[torch.tensor(made)[:, None], torch.tensor(read)] = 1
    with torch.no_grad():
        net[0].weight.mul_(keep)
        if net[0].bias is not None:
            net[0].bias.mul_(keep.flatten(1).any(1))
    return net


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_left_out_is_zero(name):
    layer, shape = LAYERS[name]
    net, values = masked(layer), torch.randn(*shape)
    thin = copy.deepcopy(net)
    thin_out(thin, [])
    assert type(thin[0]) is not type(layer)
    with torch.no_grad():
        assert (len(thin[0].outs), len(thin[0].ins)) == (2, 4)
        torch.testing.assert_close(thin(values), net(values))


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_task_changes_is_computed(name):
    layer, shape = LAYERS[name]
    net, values = masked(layer), torch.randn(*shape)
    thin = copy.deepcopy(net)
    thin_out(thin, [Task([1, 2], [4, 5])])
    with torch.no_grad():
        for each in (net, thin):
            each[0].weight[5, 1] = 2.0
            each[0].weight[4, 2] = -1.0
            if each[0].bias is not None:
                each[0].bias[5] = 3.0
        torch.testing.assert_close(thin(values), net(values))


def test_layers_of_which_little_is_zero_or_of_another_kind_stay_as_they_are():
    class Other(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(8, 8), Other(8, 8), nn.Conv1d(8, 8, 1, groups=2))
    with torch.no_grad():
        net[1].weight[2:] = 0
        net[2].weight[2:] = 0
    kinds = [type(each) for each in net]
    thin_out(net, [])
    assert [type(each) for each in net] == kinds


@pytest.mark.parametrize(
    ("read", "made", "bias", "is_thin"),
    [
        (range(9), range(10), (), True),  # nine tenths of the weights
        (range(10), range(9), (), True),
        (range(10), range(10), (), False),
        (range(9), range(9), (9,), True),  # a constant alone
        ([3], [5], (), True),
        ([3], [5], (5,), True),
        ([], [], (), False),
        ([], [], (2, 3), False),
    ],
)
def test_layers_are_thin_if_they_hold_at_most_nine_tenths_of_their_weights(read, made, bias, is_thin):
    torch.manual_seed(0)
    net, values = nn.Sequential(nn.Linear(10, 10)), torch.randn(4, 10)
    keep = torch.zeros(10, 10)
    keep[torch.tensor(list(made), dtype=torch.long)[:, None], torch.tensor(list(read), dtype=torch.long)] = 1.0
    with torch.no_grad():
        net[0].weight.mul_(keep)
        net[0].bias.mul_(torch.tensor([float(row in bias) for row in range(10)]))
        expected = net(values)
        thin_out(net, [])
        assert (type(net[0]) is not nn.Linear) is is_thin
        torch.testing.assert_close(net(values), expected)
