"""Operations along channels: those that a removed channel can change keep all of them, the others lose them exactly.

Maps are as wide and high as there are channels, so that no shape tells which dimension is which.
"""

from functools import wraps

import pytest
import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function_unary

import nni_topo

CHANNELS = 8
GONE = [1, 2, 4, 7]
IMAGES = torch.randn(2, 3, CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(0))


def gate(z, value):
    return z * torch.sigmoid(value)


class Between(nn.Module):
    """What a function or a module makes of one layer's channels goes into the next."""

    def __init__(self, between):
        super().__init__()
        self.first = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.between = between
        self.last = nn.Conv2d(CHANNELS, 4, 1)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def net(between) -> Between:
    torch.manual_seed(0)
    module = between if isinstance(between, nn.Module) else None
    model = Between(module or between).eval()
    nn.init.constant_(model.first.bias, 3.0)
    return model


def masks(model: Between) -> dict:
    kept = torch.ones(CHANNELS)
    kept[GONE] = 0
    weight = kept.view(-1, 1, 1, 1).expand_as(model.first.weight).clone()
    return {"first": {"weight": weight, "bias": kept}}


def test_channels_that_are_added_up_must_be_zeros_where_they_are_removed():
    # One half of each adds so little that no tolerance sees it.
    model = net(lambda z: gate(z, z + 1e-9 * z.sigmoid().sum(1, keepdim=True)))
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert (
        groups.skipped["first"] == "removed channels arrive as values that aren't zero (made by sigmoid, read by sum)"
    )


def one_node(function):
    """Let a function announce itself as PyTorch's own do, so that it is one node of a graph."""

    @wraps(function)
    def call(images):
        if has_torch_function_unary(images):
            return handle_torch_function(call, (images,), images)
        return function(images)

    return call


@one_node
def smoothed(images):
    """Add to each channel so little of its neighbours that no tolerance sees it."""
    return images + 1e-9 * (images.roll(1, 1) + images.roll(-1, 1))


def test_a_function_without_a_rule_must_not_read_other_channels():
    model = net(lambda z: smoothed(z))
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert groups.skipped["first"] == "the result of an operation depends on removed channels (smoothed)"


def neighbours(images):
    """Add up what lies on both sides; NaN is left out, so that only the numbers tell that others are read."""
    return images.nan_to_num().roll(1, 1) + images.nan_to_num().roll(-1, 1)


@one_node
def cubic(images):
    return images + 1e-5 * neighbours(images) ** 3


@one_node
def signs(images):
    return images + 1e-5 * torch.tanh(1e9 * neighbours(images))


@one_node
def above(images):
    return images + (neighbours(images) - 20.0).clamp(0, 5e-3)


# What shows others' influence on large inputs, on small ones and on shifted ones alone.
SCALED = {"cubic": lambda z: cubic(z), "signs": lambda z: signs(z), "above": lambda z: above(z)}


def scaled_net(name) -> Between:
    model = net(SCALED[name])
    nn.init.zeros_(model.last.bias)
    if name != "above":
        nn.init.zeros_(model.first.bias)
        return model
    with torch.no_grad():
        model.first.weight.fill_(0.25)  # 27 of them: the inputs' sum counts
        model.first.bias.fill_(-9.0)
    return model


@pytest.mark.parametrize(
    ("name", "inputs"), {"cubic": "times 100", "signs": "times 0.01", "above": "shifted by 3"}.items()
)
def test_a_dense_model_is_compared_at_other_scales_and_shifts(name, inputs):
    model = scaled_net(name)
    with pytest.raises(nni_topo.errors.SpeedupError, match=rf"masked one does to 0.0001 .*{inputs}"):
        nni_topo.to_dense(model, IMAGES, masks(model))


def test_the_report_says_what_was_compared():
    model = net(nn.ReLU())
    others = "times 0.01, times 100, shifted by 3, shifted by -3; the shapes of the outputs in training mode"
    assert (
        nni_topo.to_dense(model, IMAGES, masks(model)).report.checked == f"random inputs of shape (3, 8, 8), {others}"
    )
    large = torch.zeros(1, 3, 80, 100)
    given = nni_topo.to_dense(model, large, masks(model)).report.checked
    assert given == f"random inputs of shape (3, 80, 100), {others}"
    assert nni_topo.to_dense(model, IMAGES, masks(model), check=False).report.checked == ""


def test_an_input_on_which_the_model_gives_no_numbers_is_left_out():
    model = net(lambda z: torch.expm1(4 * z))
    given = nni_topo.to_dense(model, IMAGES, masks(model)).report.checked
    assert "times 0.01" in given
    assert "times 100" not in given
