from __future__ import annotations

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from speedup_nets import chain, filter_mask
from torch import nn

from nni_topo.errors import ConfigError, DataError, SpeedupError
from nni_topo.network.layers.kinds import kept_channels, spread
from nni_topo.network.speedup.reconcile import check_masks
from nni_topo.speedup import masked_model, to_dense

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("function", [to_dense, masked_model])
@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"conv": {"weight": torch.ones(8, 1, 1, 1)}}, ConfigError, "module of a mask .* got 'conv'"),
        ({"0": {"gamma": torch.ones(8)}}, ConfigError, r"must be a parameter .* got 'gamma' \(0.gamma\)"),
        ({"3": {"bias": torch.ones(6)}}, ConfigError, r"must be a parameter .* \(weight\), got 'bias'"),
        ({"0": {"weight": torch.ones(7, 1, 1, 1)}}, ConfigError, r"shape \(8, 3, 3, 3\).*got \(7, 1, 1, 1\) \(0.w"),
        ({"0": {"weight": torch.full((8, 3, 3, 3), 0.5)}}, ConfigError, r"zeros and ones, .* \(0.weight\)"),
        ({"0": {"bias": torch.full((8,), float("nan"))}}, ConfigError, r"zeros and ones, .* NaN \(0.bias\)"),
        ({"3": {"weight": torch.zeros(6, 1, 1, 1)}}, SpeedupError, r"at least one channel.*\(3.weight\)"),
        ({"0": {"weight": [1, 0]}}, ConfigError, r"must be a tensor, got list \(0.weight\)"),
    ],
)
def test_bad_masks_are_refused_with_their_place(function, masks, error, message):
    with pytest.raises(error, match=message):
        function(chain(), IMAGES, masks)


@pytest.mark.parametrize("function", [to_dense, masked_model])
def test_a_wrapped_model_is_refused(function):
    model = chain()
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    with pytest.raises(SpeedupError, match=r"call pruner.unwrap_model\(\) first; got .* \(0\)"):
        function(model, IMAGES, masks)
    pruner.unwrap_model()
    function(model, IMAGES, masks)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    model = chain()
    model[1].running_mean[3] = value
    with pytest.raises(DataError, match=r"must be finite.*\(1.running_mean\)"):
        to_dense(model, IMAGES, {})


def test_masks_of_blocks_are_expanded_and_take_the_bias_along():
    model = chain()
    block = torch.ones(8, 1, 1, 1)
    block[[2, 5]] = 0
    masks = check_masks(model, {"0": {"weight": block, "bias": None}})
    assert masks["0"]["weight"].shape == model[0].weight.shape
    assert masks["0"]["bias"].tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    assert block.shape == (8, 1, 1, 1)


def test_one_module_with_two_names_has_one_mask():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    one, other = filter_mask(shared, [0]), filter_mask(shared, [1])
    assert list(check_masks(model, {"2": one})) == ["0"]
    with pytest.raises(ConfigError, match=r"two names must have one mask.*\(2\)"):
        check_masks(model, {"0": one, "2": other})


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(4, 6, 1), nn.Linear(4, 6), nn.Embedding(5, 6),
        nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2),
    ],
    ids=repr,
)  # fmt: skip
def test_a_mask_spread_from_channels_keeps_these_channels_and_zeroes_the_output_of_the_others(module):
    kept = torch.tensor([True, False, True, True, False, False])
    mask = spread(module, kept)
    assert torch.equal(kept_channels(module, {"weight": mask}), kept)
    with torch.no_grad():
        module.weight.copy_(mask)
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
        spatial = {"1d": 1, "2d": 2, "3d": 3}.get(type(module).__name__[-2:], 0)
        inputs = torch.tensor([1, 2]) if isinstance(module, nn.Embedding) else torch.ones(1, 4, *[5] * spatial)
        output = module(inputs)
    dim = 1 if spatial else -1
    assert torch.equal(output.transpose(0, dim).flatten(1).ne(0).any(1), kept)
