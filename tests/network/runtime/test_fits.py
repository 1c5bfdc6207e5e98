"""Inputs in other forms than a model takes: floats are cast, else the error says what the model got."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import check_samples_first, first_call, structure_call

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()


@pytest.mark.parametrize(
    ("dtype", "given"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float64, torch.half)]
)
def test_floats_of_another_type_are_cast_to_the_models_own(dtype, given):
    model = classifier().to(dtype)
    (images,), _ = first_call(model, [IMAGES.to(given)])
    assert images.dtype == dtype
    torch.testing.assert_close(images, IMAGES.to(given).to(dtype), rtol=0.0, atol=0.0)


def test_a_model_of_several_types_gets_floats_as_they_are_and_integers_are_never_cast():
    model = nn.Sequential(nn.Linear(3, 3).double(), nn.Linear(3, 3))
    assert structure_call(nn.Sequential(model[0]), [torch.rand(4, 3)])[0][0].dtype == torch.float64
    with pytest.raises(DataError, match="must fit the model, got RuntimeError"):
        structure_call(model, [torch.rand(4, 3)])
    tokens = torch.arange(6).view(2, 3)
    assert structure_call(nn.Embedding(8, 4), [tokens])[0][0].dtype == torch.int64


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IMAGES.mul(255).byte(), r"got RuntimeError: .* on uint8 of shape \(6, 3, 8, 8\) \(batch 0\)$"),
        (IMAGES.movedim(1, -1), r"got RuntimeError: .* on float32 of shape \(6, 8, 8, 3\) \(batch 0\)$"),
        ({"pixels": IMAGES}, r"got TypeError: .* on \{'pixels': float32 of shape \(6, 3, 8, 8\)\} \(batch 0\)$"),
    ],
    ids=["bytes", "channels last", "mapping"],
)
def test_what_the_model_can_not_run_on_is_told(batch, message):
    with pytest.raises(DataError, match=message):
        structure_call(classifier(), Calibration.of([batch], "images"))


@pytest.mark.parametrize(
    ("layer", "sample", "named"),
    [
        (nn.Conv2d(3, 4, 3), (3, 8, 8), "Conv2d '0'"),
        (nn.ConvTranspose1d(3, 4, 3), (3, 9), "ConvTranspose1d '0'"),
        (nn.Linear(3, 4), (3,), "Linear '0'"),
        (nn.GRU(3, 4, batch_first=True), (5, 3), "GRU '0'"),
        (nn.TransformerEncoderLayer(4, 2, batch_first=True), (5, 4), "MultiheadAttention '0.self_attn'"),
    ],
    ids=["2d", "transposed 1d", "linear", "recurrent", "attention"],
)
def test_a_layer_that_takes_the_batch_for_one_sample_is_named(layer, sample, named):
    # Without the check, channels, or points in time, would be taken for samples.
    model = nn.Sequential(layer)
    with pytest.raises(DataError, match=rf"first dimension.*which {named} takes for a single"):
        structure_call(model, [torch.rand(sample)])
    structure_call(model, [torch.rand(2, *sample)])


class Reading(nn.Module):
    """Reads (time, samples, features), or its samples first, by a layer that takes the time first."""

    def __init__(self, layer: nn.Module, turns: bool) -> None:
        super().__init__()
        self.layer, self.turns = layer, turns

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.turns else x
        found = self.layer(x)
        first: Tensor = found[0] if isinstance(found, tuple) else found
        return first


@pytest.mark.parametrize(
    "layer",
    [nn.LSTM(4, 3), nn.TransformerEncoderLayer(4, 2)],
    ids=["LSTM", "transformer"],
)
def test_time_steps_are_not_taken_for_samples(layer: nn.Module) -> None:
    # As many steps as samples, or more, or fewer: only one of both dimensions can be the time.
    for shape in ((6, 6, 4), (6, 3, 4), (3, 6, 4)):
        with pytest.raises(DataError, match=r"first dimension.*takes for time, as batch_first=False says"):
            check_samples_first(Reading(layer, turns=False), [torch.rand(shape)])
        check_samples_first(Reading(layer, turns=True), [torch.rand(shape)])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (TensorDataset(IMAGES), r"must be an iterable of batches, .* or a DataLoader, got TensorDataset"),
        ([IMAGES.tolist()], r"a tensor, .*, got \[.* \(images, batch 0\)"),
        ([{"input_ids": [[1, 2]]}], r"mapping with a tensor in it, got \{'input_ids': \[\[1, 2\]\]\}"),
        ([IMAGES[:1]], "distillation must have at least two samples, one to judge by, got 1: pass more, or leave"),
    ],
    ids=["data set", "lists", "tokens", "one image"],
)
def test_batches_that_are_none_say_how_to_make_some_before_anything_runs(batches, message):
    with pytest.raises((ConfigError, DataError), match=message):
        nni_topo.shrink(classifier(), batches, {"flops": 0.5}, evaluate=lambda net: pytest.fail("ran"))


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        (lambda net, x: nni_topo.export(net, "small.pt2", x), "inputs"),
        (lambda net, x: nni_topo.shrink(net, [x] * 16, {"flops": 0.5}), "images"),
        (lambda net, x: nni_topo.explain(net, x, "0"), "example_inputs"),
    ],
)
def test_a_missing_batch_dimension_is_named_by_every_entry_point(entry, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()
    with pytest.raises((ConfigError, DataError)) as caught:
        entry(net, torch.randn(3, 8, 8))
    assert str(caught.value).startswith(f"{place} must ")
    assert "(3, 8, 8)" in str(caught.value)
    assert not list(tmp_path.iterdir())


class _ByTurns(nn.Module):
    """Runs a layer for each kind of sample that is there."""

    def __init__(self):
        super().__init__()
        self.layers, self.unused = nn.ModuleList(nn.Linear(2, 2) for _ in range(3)), nn.Linear(2, 2)

    def forward(self, x):
        out = x.clone()
        for index, layer in enumerate(self.layers):
            rows = x[:, 0] == index
            if rows.any():
                out[rows] = layer(x[rows])
        return out


@pytest.mark.parametrize(("kinds", "traced"), [
        ([0, 1, 2, 2], 4), ([0, 1, 1, 0], 2), ([1], 1),
    ],
)  # fmt: skip
def test_a_batch_is_traced_whole_where_more_layers_run_on_it_than_on_two_samples(kinds, traced):
    model = _ByTurns().train()
    batch = torch.tensor([[float(kind), 0.5] for kind in kinds])
    ((found,), named) = structure_call(model, [batch])
    assert not named
    torch.testing.assert_close(found, batch[:traced], rtol=0, atol=0)
    assert model.training
    assert not model.layers[0]._forward_pre_hooks
