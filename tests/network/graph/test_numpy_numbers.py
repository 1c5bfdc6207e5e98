"""Numpy's numbers in a forward are plain numbers: they keep no channels."""

import numpy as np
import pytest
import torch
from speedup_nets import masks_of
from torch import nn

import nni_topo

ONE, LAST = np.int64(1), np.int32(-1)
CALLS = {
    "slice": lambda x: x[:, :, ONE:].mean((2, 3)),
    "slices": lambda x: x[np.int64(0) :, :, ONE : np.uint8(6) : np.int16(2)].mean((2, 3)),
    "index": lambda x: x[..., LAST].mean(2),
    "array": lambda x: x[:, :, np.array([1, 2])].mean((2, 3)),
    "array of no dimension": lambda x: x[:, :, np.array(2)].mean(2),
    "dim": lambda x: x.mean(np.int64(2)).mean(LAST),
    "sizes": lambda x: x.view(x.size(np.int64(0)), x.shape[1] * ONE, np.int64(-1)).mean(2),
    "size from the right": lambda x: x.view(len(x), ONE * x.shape[1], -1).mean(2),
    "floats": lambda x: (x * np.float64(2) + np.float32(1)).mean((2, 3)),
    "padding": lambda x: nn.functional.pad(x, (ONE, ONE)).mean((2, 3)),
}


class Net(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        return self.last(self.call(self.second(self.first(x).relu()).relu()))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_numpy_numbers_keep_no_channels(call):
    torch.manual_seed(0)
    model, inputs = Net(call).eval(), torch.randn(2, 3, 8, 8)
    groups = nni_topo.dependency_groups(model, inputs, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=0))
    dense = nni_topo.to_dense(model, inputs, masks)
    assert (dense.first.out_channels, dense.second.out_channels, dense.last.in_features) == (4, 4, 4)
    others = torch.randn(3, 3, 10, 12)
    torch.testing.assert_close(dense(others), nni_topo.masked_model(model, inputs, masks)(others))
