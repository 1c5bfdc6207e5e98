"""Means and maxima over channels within a forward: the weights that read a mean make up for removed channels."""

from __future__ import annotations

import pytest
import torch
from speedup_nets import l1_masks, same_output
from torch import nn

import nni_topo


class Attended(nn.Module):
    """CBAM in one module: channels, then places are weighted by means and maxima."""

    def __init__(self, weights_of_places, inputs=2):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 5)
        self.squeeze, self.excite, self.middle = nn.Linear(16, 4), nn.Linear(4, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.places, self.weights_of_places = nn.Conv2d(inputs, 1, 3, padding=1), weights_of_places
        with torch.no_grad():
            self.norm.running_mean.uniform_(-1, 1)
            self.norm.bias.uniform_(-1, 1)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        weights = self.excite(self.squeeze(x.mean((2, 3))).relu()) + self.excite(self.squeeze(x.amax((2, 3))).relu())
        x = x * weights.sigmoid()[:, :, None, None]
        x = x * self.weights_of_places(self, x)
        return self.head(self.middle(x).relu().mean((2, 3)))


PLACES = {
    "cat": lambda net, x: net.places(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid(),
    "max": lambda net, x: net.places(
        torch.cat([torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)], dim=1)
    ).sigmoid(),
    "stack": lambda net, x: net.places(torch.stack([x.mean(dim=1), x.max(dim=1).values], 1)).sigmoid(),
    "mean": lambda net, x: net.places(x.mean(1, keepdim=True)).sigmoid(),
    "beside": lambda net, x: net.places(torch.cat([x, x.mean(1, keepdim=True)], 1)).sigmoid(),
    "largest": lambda net, x: x.amax(1, keepdim=True),
    "all": lambda net, x: net.places(x.mean((1, 2, 3), keepdim=True)).sigmoid(),
}
INPUTS = {"mean": 1, "beside": 17, "all": 1}


def cut(model, ratio):
    """Remove a share of the channels; compare with the masked network at another size and batch."""
    images = torch.randn(2, 3, 8, 8)
    groups = nni_topo.dependency_groups(model, images, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": ratio}])
    masks = l1_masks(model, groups)
    dense = nni_topo.to_dense(model, images, masks)
    for others in (torch.randn(5, 3, 12, 10), 100 * torch.randn(1, 3, 9, 9)):
        same_output(dense, nni_topo.masked_model(model, images, masks), others)
    return dense, groups


@pytest.mark.parametrize(("ratio", "width"), [(0.5, 8), (0.7, 5)])
@pytest.mark.parametrize("name", PLACES)
def test_layers_before_spatial_attention_in_a_forward_lose_channels(name, ratio, width):
    dense, _ = cut(Attended(PLACES[name], INPUTS.get(name, 2)).eval(), ratio)
    assert (dense.first.out_channels, dense.excite.out_features, dense.middle.out_channels) == (width, width, width)


def test_the_weights_that_read_a_mean_shrink_with_its_channels():
    model = Attended(PLACES["cat"]).eval()
    dense, _ = cut(model, 0.75)
    torch.testing.assert_close(dense.places.weight[:, 0], model.places.weight[:, 0] / 4)
    torch.testing.assert_close(dense.places.weight[:, 1], model.places.weight[:, 1])


KEPT = {
    "softmax": lambda net, x: x.softmax(1),
    "signed": lambda net, x: net.places((x - 1).amax(1, keepdim=True)),
    "half": lambda net, x: net.places(x.sigmoid().mean(1, keepdim=True)),
    "not read by a layer": lambda net, x: x.mean(1, keepdim=True).exp(),
    "twice": lambda net, x: net.places(x.mean(1, keepdim=True)) + net.places(x.amax(1, keepdim=True)),
    "largest place": lambda net, x: x.max(1, keepdim=True)[1] * x,
}


@pytest.mark.parametrize("name", KEPT)
def test_channels_stay_where_zeros_change_the_result(name):
    dense, groups = cut(Attended(KEPT[name], 1).eval(), 0.5)
    assert dense.first.out_channels == 16
    assert groups.reasons["first"][0].kind in ("result_depends", "nonzero_values")
