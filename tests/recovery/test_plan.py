from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_topo.recovery import compensation

BETWEEN = {
    "nothing": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "dropout": nn.Dropout(),
    "function": lambda x: nn.functional.dropout(x, training=False),
    "identity": nn.Identity(),
    "batch norm": nn.BatchNorm1d(3),
    "tanh": torch.tanh,
    "double": lambda x: 2.0 * x,
}


class Branch(nn.Module):
    """A branch of two layers, something between, and a sum."""

    def __init__(self, between):
        super().__init__()
        self.up, self.down, self.between = nn.Linear(3, 4), nn.Linear(4, 3), between

    def forward(self, x):
        return self.between(self.down(torch.relu(self.up(x)))) + x


@pytest.mark.parametrize("between", BETWEEN)
def test_errors_are_measured_at_the_sum_where_all_before_it_hands_on(between):
    torch.manual_seed(0)
    model = Branch(BETWEEN[between]).eval()
    masks = {"up": {"weight": torch.tensor([1.0, 0, 1, 1])[:, None]}}
    report = compensation(model, masks, [torch.randn(40, 3)]).report
    places = [(layer.layer, layer.place) for layer in report.layers]
    assert places == [("down", "down" if between in ("tanh", "double") else "add")]


class Doubling(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


class Looking(nn.Linear):
    def forward(self, x):
        return super().forward(x) * x.mean()


def solved_by_class(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), kind(4, 4), nn.Linear(4, 2)).eval()
    masks = {"0": {"weight": torch.tensor([1.0, 0, 1, 1])[:, None]}}
    return compensation(model, masks, [torch.randn(40, 3)]).report


def test_a_layer_whose_forward_looks_at_its_input_twice_is_left_alone():
    report = solved_by_class(Looking)
    assert report.left_alone == {"1": "of type Looking, which does more than a convolution or a product"}


def test_a_layer_whose_forward_goes_on_with_its_product_is_solved():
    report = solved_by_class(Doubling)
    assert report.left_alone == {}
    assert [(each.layer, each.place) for each in report.layers] == [("1", "_1"), ("2", "_2")]
