"""Filter energies against single convolutions, Parseval's theorem and hand-made sums."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.maths import signals
from nni_topo.pruners.energy import (
    ChirpEnergyCollector,
    CumulativeEnergyMetric,
    DataEnergyCollector,
    chirp_response_energy,
    cumulative_shares,
    input_sizes,
    masked_parameters,
)
from nni_topo.pruners.random import RandomPruner
from nni_topo.testing import toy_images, toy_model

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
    energy, positions = chirp_response_energy(module, weight, bias, planes)
    expected = torch.stack([direct_energy(module, plane) for plane in planes]).mean(0)
    torch.testing.assert_close(energy, expected, rtol=1e-10, atol=0.0)
    assert positions == module(torch.zeros(1, module.in_channels, *size))[0, 0].numel()


@pytest.mark.parametrize("kind", LAYERS)
def test_one_channel_at_a_time_adds_the_channels_energies_up(kind):
    module, size = LAYERS[kind]
    plane = torch.from_numpy(signals.chirp(size))
    bias = None if module.bias is None else module.bias.detach().double()
    weight = module.weight.detach().double()
    energy, _ = chirp_response_energy(module, weight, bias, plane[None], separate=True)
    silent = copy.deepcopy(module).double().requires_grad_(False)
    silent.bias = None
    expected = torch.zeros_like(energy) if bias is None else bias**2
    for channel in range(module.in_channels):
        alone = torch.zeros(1, module.in_channels, *size, dtype=torch.float64)
        alone[0, channel] = plane
        expected = expected + silent(alone)[0].flatten(1).pow(2).mean(1)
    torch.testing.assert_close(energy, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("direction", ["radial", "mean", "diagonal"])
@settings(max_examples=10)
@given(seed=st.integers(0, 1000), size=st.integers(5, 11))
def test_mirrored_and_turned_kernels_have_the_same_energies(direction, seed, size):
    torch.manual_seed(seed)
    module = nn.Conv2d(3, 6, 3, padding=1).double()
    planes = torch.from_numpy(signals.Chirp(direction).planes((size, size)))
    weight, bias = module.weight.detach(), module.bias.detach()
    energy, _ = chirp_response_energy(module, weight, bias, planes)
    same = [
        torch.allclose(chirp_response_energy(module, other, bias, planes)[0], energy, rtol=1e-9)
        for other in (weight.flip(2), weight.flip(3), weight.transpose(2, 3))
    ]
    assert same == ([True] * 3 if direction != "diagonal" else [False, False, True])


def test_kernels_that_cancel_over_the_channels_have_energy_one_channel_at_a_time_only():
    module = nn.Conv2d(2, 1, 3, bias=False)
    with torch.no_grad():
        module.weight[:, 1] = -module.weight[:, 0]
    images = torch.ones(1, 2, 8, 8)
    found = {
        channels: collected(
            ChirpEnergyCollector(images, signal={"channels": channels}), nn.Sequential(copy.deepcopy(module))
        )
        for channels in ("together", "separate")
    }
    assert found["together"]["0"].abs().max() < 1e-12
    assert found["separate"]["0"].min() > 0.0


def test_energies_are_those_of_the_spectrum():
    """Parseval: with circular padding, a response's energy is that of the product of the spectra."""
    torch.manual_seed(0)
    module = nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular", bias=False)
    plane = signals.chirp_2d(16, 16)
    energy, _ = chirp_response_energy(module, module.weight.detach().double(), None, torch.from_numpy(plane)[None])
    kernels = module.weight.detach().double().sum(1).numpy()
    products = np.fft.fft2(plane) * np.conj(np.fft.fft2(kernels, s=(16, 16)))
    expected = [float(np.square(np.abs(product)).sum()) / 256 / 256 for product in products]
    np.testing.assert_allclose(energy.numpy(), expected, rtol=1e-10)


def test_memory_is_bounded_by_taking_filters_in_turns():
    module, size = LAYERS["2d"]
    plane = torch.from_numpy(signals.chirp(size))
    whole, _ = chirp_response_energy(module, module.weight.double(), module.bias.double(), plane[None])
    weight, bias, most = module.weight.double(), module.bias.double(), 2 * plane.numel()
    parts, _ = chirp_response_energy(module, weight, bias, plane[None], most=most)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0.0)


def test_input_sizes_are_those_of_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Flatten(2), nn.Conv1d(4, 2, 5))
    assert input_sizes(model, ["0", "2", "4"], torch.ones(1, 3, 16, 18)) == {"0": (16, 18), "2": (7, 8), "4": (30,)}
    assert model.training


def test_collector_measures_each_layer_at_its_own_size():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3))
    originals = copy.deepcopy(model)
    found = collected(ChirpEnergyCollector(torch.ones(1, 3, 16, 18), signal=signals.Chirp("radial")), model)
    torch.testing.assert_close(found["0"], direct_energy(originals[0], torch.from_numpy(signals.chirp_2d(16, 18))))
    torch.testing.assert_close(found["2"], direct_energy(originals[2], torch.from_numpy(signals.chirp_2d(7, 8))))


def test_a_collector_may_be_used_on_another_model():
    collector = ChirpEnergyCollector(torch.ones(1, 3, 9, 9), signal={"direction": "radial"})
    for stride in (1, 2):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=stride, padding=1), nn.Conv2d(4, 4, 3))
        original = copy.deepcopy(model[1])
        plane = torch.from_numpy(signals.chirp_2d(-(-9 // stride), -(-9 // stride)))
        torch.testing.assert_close(collected(collector, model)["1"], direct_energy(original, plane))


def test_knobs_change_what_they_say():
    images = toy_images(1)

    def energies(**knobs):
        return collected(ChirpEnergyCollector(images, **knobs), toy_model())["stem"]

    default = energies()
    torch.testing.assert_close(energies(normalization="none"), 64 * default)
    torch.testing.assert_close(energies(normalization="layer"), default / default.sum())
    signal = ({"sweep": "thesis"}, {"direction": "diagonal"}, {"direction": "radial"})
    for knobs in (*({"signal": each} for each in signal), {"signal": {"channels": "separate"}}, {"bias": False}):
        assert not torch.allclose(energies(**knobs), default, rtol=1e-3), knobs


def test_batch_norm_scales_responses():
    model = toy_model()
    with torch.no_grad():
        model.norm.weight.copy_(torch.arange(8.0))
        model.norm.running_var.fill_(4.0)
    images = toy_images(1)
    plain = collected(ChirpEnergyCollector(images), copy.deepcopy(model))
    scaled = collected(ChirpEnergyCollector(images, batch_norm=True), model)
    torch.testing.assert_close(scaled["stem"], plain["stem"] * torch.arange(8.0).double() ** 2 / (4.0 + 1e-5))
    assert torch.equal(scaled["inner"], plain["inner"])


def test_unit_energy_of_a_linear_layer_is_the_expected_one():
    model = nn.Sequential(nn.Linear(6, 4))
    original = copy.deepcopy(model[0]).double()
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    energy = collected(ChirpEnergyCollector(None), model, config)["0"]
    inputs = torch.randn(200_000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(energy, original(inputs).pow(2).mean(0).detach(), rtol=0.02, atol=0.0)


def test_data_energies_are_mean_squares_of_outputs():
    model = toy_model()
    images = toy_images(12)
    outputs = copy.deepcopy(model).stem(images).detach().double()
    found = collected(DataEnergyCollector(calibration=[images[:5], (images[5:], None)]), copy.deepcopy(model))
    torch.testing.assert_close(found["stem"], outputs.pow(2).mean((0, 2, 3)))
    bare = collected(DataEnergyCollector(calibration=[images], bias=False), copy.deepcopy(model))
    without = (outputs - model.stem.bias.detach().double()[:, None, None]).pow(2).mean((0, 2, 3))
    torch.testing.assert_close(bare["stem"], without, rtol=1e-5, atol=1e-7)


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
    with pytest.raises(DataError, match="no response \\(idle\\)"):
        DataEnergyCollector(calibration=[images]).collect(context_of(Idle()))


def test_finer_blocks_than_channels_are_refused():
    config = [{**CONVS[0], "granularity": [1, 1]}]
    with pytest.raises(ConfigError, match="by output channel, got a Conv2d of 8 channels in 216 blocks"):
        ChirpEnergyCollector(toy_images(1)).collect(context_of(toy_model(), config))


def test_an_energy_that_overflows_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 3).double())
    with torch.no_grad():
        model[0].weight.mul_(1e200)
    with pytest.raises(DataError, match=r"must be finite.*\(0.weight\)"):
        ChirpEnergyCollector(torch.ones(1, 1, 6, 6, dtype=torch.float64)).collect(context_of(model))
