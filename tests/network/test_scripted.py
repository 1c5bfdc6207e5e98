"""Modules that ``torch.jit`` has compiled stay whole, and so do the channels that enter them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.errors import SpeedupError

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ASKED = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
WHOLE = "they enter inner (compiled by torch.jit), which can't be cut"


class Block(nn.Module):
    """A convolution and what follows it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def traced(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, torch.randn(1, 8, 8, 8))


def net(inner: nn.Module, *, branches: bool) -> nn.Module:
    """Put a module between convolutions; with ``branches`` the forward decides by values, which has to be recorded."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Conv2d(3, 8, 1), inner
            self.second, self.last = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            is_bright = branches and bool(x.amax() > -100)
            x = self.second(self.inner(self.first(x)))
            return self.last(x.relu() if is_bright else x)

    return Net().eval()


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("compiled", [scripted, traced])
@pytest.mark.parametrize("inner", [Block, nn.ReLU])
@pytest.mark.quick_every(3)
def test_what_enters_a_compiled_module_with_weights_stays_and_the_others_go(inner, compiled, branches):
    torch.manual_seed(0)
    model = net(compiled(inner().eval()), branches=branches)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = nni_topo.dependency_groups(model, IMAGES, ASKED)
    has_weights = inner is not nn.ReLU
    assert groups.skipped == ({"first": WHOLE} if has_weights else {}) | {"last": "it gives the model's output"}
    masks = {}
    for name in [entry["op_names"][0] for entry in groups]:
        stays = torch.arange(model.get_submodule(name).out_channels) % 2 == 0
        weight = model.get_submodule(name).weight
        masks[name] = {"weight": stays[:, None, None, None].expand(weight.shape).float(), "bias": stays.float()}
    dense, reference = (each(model, IMAGES, masks) for each in (nni_topo.to_dense, nni_topo.masked_model))
    assert (dense.first.out_channels, dense.second.out_channels) == (8 if has_weights else 4, 3)
    with torch.no_grad():
        torch.testing.assert_close(dense(2 * IMAGES), reference(2 * IMAGES))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_with_a_compiled_module_is_shrunk():
    torch.manual_seed(0)
    model = net(scripted(Block().eval()), branches=False)
    batches = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    shrunk = nni_topo.shrink(model, batches, {"params": 0.95}, distill=False)
    assert shrunk.second.out_channels < 6 == model.second.out_channels


class Checked(nn.Module):
    """Without weights, and for eight channels alone."""

    def forward(self, x):
        assert x.shape[1] == 8, "eight channels"
        return x


def test_what_a_compiled_module_refuses_is_told():
    model = net(scripted(Checked()), branches=False)
    with pytest.raises(SpeedupError, match=r"fixed size.*AssertionError: eight channels, at `x = self.second.*:\d+"):
        nni_topo.to_dense(model, IMAGES, {"first": {"weight": (torch.arange(8) < 5).float().view(8, 1, 1, 1)}})
