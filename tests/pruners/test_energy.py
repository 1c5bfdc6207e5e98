"""EnergyFilterPruner: Algorithm 3, ratios, groups, schedules, and what it refuses."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.maths import signals
from nni_topo.pruners.energy import (
    ChirpEnergyCollector,
    CumulativeEnergyMetric,
    chirp_response_energy,
    cumulative_shares,
    masked_parameters,
)
from nni_topo.pruners.random import RandomPruner
from nni_topo.testing import toy_images, toy_model

IMAGES = torch.ones(1, 1, 8, 8)


def layer_with(energies):
    """One convolution whose filters answer a chirp with given energies: kernels of a single weight."""
    module = nn.Conv2d(1, len(energies), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(energies, dtype=torch.float64).sqrt().reshape(-1, 1, 1, 1))
    return nn.Sequential(module)


def kept(model, config=None, images=IMAGES, **knobs):
    """Which filters of the first layer stay."""
    entry = {"op_names": ["0"], **(config or {})}
    images = images.to(model[0].weight.dtype)
    pruner = nni_topo.EnergyFilterPruner(copy.deepcopy(model), [entry], example_inputs=images, **knobs)
    _, masks = pruner.compress()
    return masks["0"]["weight"].flatten(1)[:, 0].bool()


def algorithm_3(model, threshold, images):
    """The text's pseudocode, line by line, on one convolution."""
    layer = copy.deepcopy(model[0]).double()
    chirp = torch.from_numpy(signals.chirp_2d(*images.shape[2:], direction="diagonal"))
    with torch.no_grad():
        responses = layer(chirp.expand(1, layer.in_channels, *chirp.shape))[0]
    energies = responses.pow(2).sum((1, 2)) / responses[0].numel()
    energies = energies / energies.sum()
    ordered, indices = energies.sort()
    valid = torch.zeros(len(energies), dtype=torch.bool)
    valid[indices[ordered.cumsum(0) > threshold]] = True
    return valid


@pytest.mark.parametrize("threshold", [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9])
def test_threshold_is_algorithm_3(threshold):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1))
    images = torch.ones(1, 3, 12, 9)
    signal = nni_topo.Chirp("diagonal")
    found = kept(model, {"sparse_threshold": threshold}, images, signal=signal)
    assert torch.equal(found, algorithm_3(model, threshold, images))


@pytest.mark.parametrize(("threshold", "count"), [(0.1, 9), (0.2, 8), (0.5, 5), (0.05, 10)])
def test_ten_equal_energies(threshold, count):
    mask = kept(layer_with([1.0] * 10), {"sparse_threshold": threshold})
    assert mask.tolist() == [True] * count + [False] * (10 - count)


@given(
    energies=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12),
    thresholds=st.lists(st.floats(0.001, 0.999), min_size=2, max_size=4),
)
@settings(max_examples=25, deadline=None)
def test_more_goes_at_a_higher_threshold_and_never_more_energy_than_it(energies, thresholds):
    model = layer_with(energies)
    masks = [kept(model, {"sparse_threshold": threshold}) for threshold in sorted(thresholds)]
    total = sum(energies)
    for mask, threshold in zip(masks, sorted(thresholds), strict=True):
        lost = sum(energy for energy, stays in zip(energies, mask.tolist(), strict=True) if not stays)
        assert mask.any()
        assert lost <= (threshold + 1e-6) * total
    for looser, tighter in itertools.pairwise(masks):
        assert not (tighter & ~looser).any()


def test_ratio_takes_the_weakest():
    assert kept(layer_with([5, 1, 4, 2, 3]), {"sparse_ratio": 0.4}).tolist() == [True, False, True, False, True]
    assert kept(layer_with([5, 1, 4, 2, 3]), {"sparse_ratio": 0.39}).tolist() == [True, False, True, True, True]


def test_bounds_hold_for_thresholds():
    model = layer_with([5, 1, 4, 2, 3])
    assert kept(model, {"sparse_threshold": 0.99, "max_sparse_ratio": 0.4}).sum() == 3
    assert kept(model, {"sparse_threshold": 0.01, "min_sparse_ratio": 0.6}).sum() == 2


def test_one_filter_always_stays():
    assert kept(layer_with([1.0, 1e9]), {"sparse_threshold": 1 - 1e-12}).tolist() == [False, True]
    assert kept(layer_with([0.0, 0.0, 0.0]), {"sparse_threshold": 0.9}).sum() == 1


def test_bias_counts_unless_told_otherwise():
    model = layer_with([1.0, 4.0])
    model[0].bias = nn.Parameter(torch.tensor([5.0, 0.0], dtype=torch.float64))
    assert kept(model, {"sparse_ratio": 0.5}).tolist() == [True, False]
    assert kept(model, {"sparse_ratio": 0.5}, bias=False).tolist() == [False, True]


def test_a_global_group_is_one_threshold_over_the_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    shares, masks = {}, {}
    pruner = nni_topo.EnergyFilterPruner(
        model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.4, "global_group_id": 1}], example_inputs=IMAGES
    )
    metrics = pruner.calculator.calculate(pruner.collector.collect(pruner.context), pruner.context)
    for name, found in pruner.allocator.allocate(metrics, pruner.context).items():
        masks[name] = found["weight"].flatten(1)[:, 0].bool()
        shares[name] = metrics[name]["weight"].flatten()
    pruned = torch.cat([shares[name][~masks[name]] for name in masks])
    stays = torch.cat([shares[name][masks[name]] for name in masks])
    assert pruned.max() <= stays.min()


CONV = {"op_types": ["Conv2d"], "sparse_ratio": 0.5}


@pytest.mark.parametrize(
    ("layer", "entry", "knobs", "error", "words"),
    [
        (nn.Conv2d(1, 4, 3), {"sparse_threshold": 0.0}, {}, ConfigError, "in \\(0, 1\\), got 0.0"),
        (nn.Conv2d(1, 4, 3), {"sparse_threshold": 1.0}, {}, ConfigError, "in \\(0, 1\\), got 1.0"),
        (nn.Conv2d(1, 4, (9, 5), padding=(0, 2)), CONV, {}, ConfigError, "kernel 9x5, got 8x12 \\(0\\)"),
        (nn.Conv2d(1, 4, 3), CONV, {"example_inputs": None}, ConfigError, "must be known.*\\(0\\)"),
        (nn.Conv2d(1, 4, 3, dtype=torch.complex64), CONV, {}, DataError, "got torch.complex64 \\(0.weight\\)"),
    ],
)
def test_bad_requests_are_refused_before_wrapping(layer, entry, knobs, error, words):
    model = nn.Sequential(layer)
    before = copy.deepcopy(model.state_dict())
    entry = {"op_names": ["0"], **{key: value for key, value in entry.items() if key != "op_types"}}
    with pytest.raises(error, match=words):
        nni_topo.EnergyFilterPruner(model, [entry], **{"example_inputs": IMAGES, **knobs})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not hasattr(model[0], "_nni_wrapper")


CONVS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def context_of(model, config_list=CONVS):
    return RandomPruner(model, config_list).context


def collected(collector, model, config_list=CONVS):
    data = collector.collect(context_of(model, config_list))
    return {name: targets["weight"][:, 0] for name, targets in data.items()}


def direct_energy(module, plane):
    """Mean squared response of a float64 copy of the layer to the plane in each of its input channels."""
    inputs = plane.expand(1, module.in_channels, *plane.shape)
    with torch.no_grad():
        return copy.deepcopy(module).double()(inputs)[0].flatten(1).pow(2).mean(1)


LAYERS = {
    "1d": (nn.Conv1d(3, 5, 4, stride=2, padding=1), (17,)),
    "2d": (nn.Conv2d(3, 5, (3, 2), padding=(1, 2), dilation=(1, 2)), (9, 12)),
    "3d": (nn.Conv3d(2, 4, 3, stride=(1, 2, 2)), (5, 7, 6)),
    "no bias": (nn.Conv2d(3, 5, 3, bias=False), (8, 8)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2, padding=1), (8, 8)),
    "depth-wise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (8, 8)),
    "same": (nn.Conv2d(2, 3, 4, padding="same"), (8, 8)),
    "valid": (nn.Conv2d(2, 3, 4, padding="valid"), (8, 8)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (8, 8)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=(0, 2), padding_mode="reflect"), (8, 8)),
    "transposed": (nn.ConvTranspose2d(3, 5, 3, stride=2, padding=1, output_padding=1), (6, 6)),
    "grouped transposed": (nn.ConvTranspose1d(4, 6, 3, groups=2), (6,)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_one_plane_per_filter_equals_the_whole_layer(kind):
    module, size = LAYERS[kind]
    planes = torch.from_numpy(signals.Chirp("mean").planes(size))
    weight = module.weight.detach().double()
    bias = None if module.bias is None else module.bias.detach().double()
    energy = chirp_response_energy(module, weight, bias, planes)
    expected = torch.stack([direct_energy(module, plane) for plane in planes]).mean(0)
    torch.testing.assert_close(energy, expected, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("direction", ["radial", "mean", "diagonal"])
@settings(max_examples=10)
@given(seed=st.integers(0, 1000), size=st.integers(5, 11))
def test_mirrored_and_turned_kernels_have_the_same_energies(direction, seed, size):
    torch.manual_seed(seed)
    module = nn.Conv2d(3, 6, 3, padding=1).double()
    planes = torch.from_numpy(signals.Chirp(direction).planes((size, size)))
    weight, bias = module.weight.detach(), module.bias.detach()
    energy = chirp_response_energy(module, weight, bias, planes)
    same = [
        torch.allclose(chirp_response_energy(module, other, bias, planes), energy, rtol=1e-9)
        for other in (weight.flip(2), weight.flip(3), weight.transpose(2, 3))
    ]
    assert same == ([True] * 3 if direction != "diagonal" else [False, False, True])


def test_memory_is_bounded_by_taking_filters_in_turns():
    module, size = LAYERS["2d"]
    plane = torch.from_numpy(signals.chirp(size))
    whole = chirp_response_energy(module, module.weight.double(), module.bias.double(), plane[None])
    weight, bias, most = module.weight.double(), module.bias.double(), 2 * plane.numel()
    parts = chirp_response_energy(module, weight, bias, plane[None], most=most)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0.0)


def test_collector_measures_each_layer_at_its_own_size():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3))
    originals = copy.deepcopy(model)
    found = collected(ChirpEnergyCollector(torch.ones(1, 3, 16, 18), signals.Chirp("radial")), model)
    torch.testing.assert_close(found["0"], direct_energy(originals[0], torch.from_numpy(signals.chirp_2d(16, 18))))
    torch.testing.assert_close(found["2"], direct_energy(originals[2], torch.from_numpy(signals.chirp_2d(7, 8))))


def test_unit_energy_of_a_linear_layer_is_the_expected_one():
    model = nn.Sequential(nn.Linear(6, 4))
    original = copy.deepcopy(model[0]).double()
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    energy = collected(ChirpEnergyCollector(None), model, config)["0"]
    inputs = torch.randn(200_000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(energy, original(inputs).pow(2).mean(0).detach(), rtol=0.02, atol=0.0)


def test_masked_weights_have_no_energy():
    model = toy_model()
    pruner = RandomPruner(model, [{"op_names": ["stem"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    weight, bias = masked_parameters(pruner.context, "stem")
    energy = ChirpEnergyCollector(toy_images(1)).collect(pruner.context)["stem"]["weight"][:, 0]
    assert torch.equal(energy > 0, masks["stem"]["bias"].bool())
    assert torch.equal(weight.flatten(1).any(1), masks["stem"]["bias"].bool())
    assert torch.equal(bias != 0, masks["stem"]["bias"].bool())


def test_energies_of_a_group_add_up():
    config = [{"op_names": ["stem", "inner"], "sparse_ratio": 0.5, "dependency_group_id": 0}]
    context = context_of(toy_model(), config)
    data = ChirpEnergyCollector(toy_images(1)).collect(context)
    metrics = CumulativeEnergyMetric().calculate(data, context)
    expected = cumulative_shares(data["stem"]["weight"][:, 0] + data["inner"]["weight"][:, 0])
    for name in ("stem", "inner"):
        assert metrics[name]["weight"].shape == (8, 1, 1, 1)
        assert torch.equal(metrics[name]["weight"].flatten(), expected)


def test_cumulative_shares_by_hand():
    assert cumulative_shares(torch.tensor([3.0, 1.0, 4.0])).tolist() == [0.5, 0.125, 1.0]
    assert cumulative_shares(torch.tensor([1.0, 1.0, 2.0, 1.0])).tolist() == [0.6, 0.4, 1.0, 0.2]
    assert cumulative_shares(torch.zeros(4)).tolist() == [1.0, 0.75, 0.5, 0.25]


def test_a_layer_that_is_not_reached_is_named():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)

        def forward(self, images):
            return self.used(images)

    images = torch.ones(2, 1, 6, 6)
    with pytest.raises(ConfigError, match="miss it \\(idle\\)"):
        ChirpEnergyCollector(images).collect(context_of(Idle()))


def test_an_energy_that_overflows_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 3).double())
    with torch.no_grad():
        model[0].weight.mul_(1e200)
    with pytest.raises(DataError, match=r"must be finite.*\(0.weight\)"):
        ChirpEnergyCollector(torch.ones(1, 1, 6, 6, dtype=torch.float64)).collect(context_of(model))
