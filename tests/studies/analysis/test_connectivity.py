from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nni_topo import zoo
from nni_topo.analysis import connectivity
from nni_topo.errors import ConfigError, DataError
from nni_topo.testing import toy_images, toy_model


def mask_of(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return {"weight": torch.tensor(rows, dtype=torch.float32)}


def test_a_chain_by_hand():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
    masks = {"0": mask_of([[0, 0, 1], [0, 0, 0]]), "2": mask_of([[1, 0], [0, 1], [1, 1], [0, 0]])}
    found = connectivity(model, torch.zeros(2, 3), masks)
    assert found.reached == {"0": 0.5, "2": 0.5}
    assert found.outputs == 0.5
    assert found.connected == pytest.approx({"0": 2 / 5, "2": 5 / 6})
    assert found.channels == pytest.approx(2 / 5)


def test_a_shortcut_keeps_channels_alive():
    model = toy_model()
    before = copy.deepcopy(model.state_dict())
    masks = {"inner": {"weight": torch.zeros_like(model.inner.weight)}}
    found = connectivity(model, toy_images(2), masks)
    assert found.outputs == 1.0
    assert found.reached["inner"] == 0.0
    assert found.channels == 0.0
    masks["stem"] = {"weight": torch.zeros_like(model.stem.weight)}
    assert connectivity(model, toy_images(2), masks).outputs == 0.0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_groups_read_their_own_channels():
    model = nn.Sequential(nn.Conv2d(4, 2, 1, groups=2), nn.Flatten())
    mask = torch.zeros(2, 2, 1, 1)
    mask[0, 1] = 1
    found = connectivity(model, torch.zeros(1, 4, 1, 1), {"0": {"weight": mask}})
    assert found.connected == pytest.approx({"0": 2 / 6})
    assert found.outputs == 0.5


def test_a_deep_net_neither_overflows_nor_vanishes():
    model = zoo.create_model("resnet56", num_classes=10, in_channels=1, image_size=28, seed=0)
    found = connectivity(model, torch.zeros(1, 1, 28, 28), {})
    assert found.outputs == 1.0
    assert set(found.reached.values()) == {1.0}


def test_what_cannot_be_followed_is_refused():
    with pytest.raises(ConfigError, match="maps zeros to zeros"):
        connectivity(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), torch.zeros(1, 2), {})
    with pytest.raises(DataError, match=r"got \(1, 2\) \(0.weight\)"):
        connectivity(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2), {"0": mask_of([[1, 1]])})
    with pytest.raises(ConfigError, match="a layer of masks must be a known name, got 'zz'"):
        connectivity(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2), {"zz": mask_of([[1, 1]])})
    with pytest.raises(ConfigError, match="example_inputs must be ones that the model runs on"):
        connectivity(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 3), {})


@pytest.mark.parametrize(
    "between",
    [nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm2d(4), nn.RMSNorm(8), nn.Softshrink(5.0), nn.Threshold(9.0, 0)],
)
def test_norms_and_thresholds_pass_what_is_reached(between):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), between, nn.Flatten(), nn.Linear(256, 5))
    mask = torch.ones(4, 3, 1, 1)
    mask[1] = 0
    found = connectivity(model, torch.ones(2, 3, 8, 8), {"0": {"weight": mask}})
    assert (found.outputs, found.reached) == (1.0, {"0": 0.75, "3": 1.0})
    assert connectivity(model, torch.ones(2, 3, 8, 8), {}).channels == 1.0
