"""Modules that read all channels at once, in networks that lose half of them."""

from __future__ import annotations

import copy

import pytest
import torch
import whole_nets
from speedup_nets import masks_of
from torch import nn
from whole_nets import NETS, Gate, ResponseNorm, Standardized, make

import nni_topo
from nni_topo.network.layers.derived import PaddedAlike
from nni_topo.network.layers.original_width import keep_original_width
from nni_topo.network.layers.slicing import ChannelwiseConv1d
from nni_topo.network.speedup.equivalence import masked_model

IMAGES = torch.rand(2, 3, 13, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HALF = [{"op_types": ["Conv1d", "Conv2d", "Linear"], "sparse_ratio": 0.5}]


def pruned(model, ratio=0.5):
    groups = nni_topo.dependency_groups(model, IMAGES, [{**HALF[0], "sparse_ratio": ratio}])
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=1))
    return groups, masks, nni_topo.to_dense(model, IMAGES, masks)


def widths(model):
    """Output channels of all layers but the head and what goes along channels."""
    layers = [each for each in model.modules() if isinstance(each, (nn.Conv2d, nn.Linear))][:-1]
    return [len(each.weight) for each in layers]


def zeroed(model, masks):
    """What a model gives when hooks zero the channels that masks remove, behind each layer and all that norms add."""

    def hook(kept, dim):
        view = [1, 1, 1, 1]
        view[dim] = -1
        return lambda _, __, output: output * kept.view(view)

    handles = []
    for name, targets in masks.items():
        kept = targets["weight"].flatten(1).amax(1)
        module = model.get_submodule(name)
        norm = {"expand": "norm", "0": "1"}.get(name.rpartition(".")[2])
        handles.append(module.register_forward_hook(hook(kept, -1 if isinstance(module, nn.Linear) else 1)))
        behind = dict(model.named_modules()).get(f"{name.rpartition('.')[0]}.{norm}")
        if isinstance(behind, (ResponseNorm, nn.BatchNorm2d)):
            handles.append(behind.register_forward_hook(hook(kept, getattr(behind, "dim", 1))))
    with torch.no_grad():
        outputs = model(IMAGES)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("name", NETS)
@pytest.mark.quick_every(4)
def test_half_of_the_channels_go_and_the_dense_model_computes_the_same(name):
    model = make(name)
    groups, masks, dense = pruned(model)
    assert [2 * width for width in widths(dense)] == widths(model)
    assert not dense.report.kept
    assert {why for why in groups.skipped.values() if "output" not in why} <= {
        "it is a convolution along the channels of another layer"
    }
    with torch.no_grad():
        found, whole = dense(IMAGES), model(IMAGES)
        torch.testing.assert_close(found, masked_model(model, IMAGES, masks)(IMAGES), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, zeroed(model, masks), rtol=1e-12, atol=1e-12)
    assert (found - whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", NETS)
@pytest.mark.quick_every(2)
def test_a_dense_model_is_pruned_again_saved_and_loaded(name, tmp_path):
    model = make(name)
    once = pruned(model, ratio=0.25)[2]
    _, masks, dense = pruned(once)
    assert all(width < first for width, first in zip(widths(dense), widths(once), strict=True))
    with torch.no_grad():
        expected = dense(IMAGES)
        torch.testing.assert_close(expected, masked_model(once, IMAGES, masks)(IMAGES), rtol=1e-12, atol=1e-12)
        for path in (tmp_path / "dense.pt", tmp_path / "dense.safetensors"):
            nni_topo.save(dense, path)
            again = nni_topo.load(path, lambda: make(name))
            assert torch.equal(again(IMAGES), expected)
            assert [type(each) for each in again.modules()] == [type(each) for each in dense.modules()]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.quick_every(2)
def test_a_dense_model_learns(name):
    dense = pruned(make(name))[2].train()
    dense(IMAGES).square().sum().backward()
    assert all(each.grad is not None and bool(each.grad.isfinite().all()) for each in dense.parameters())


def test_what_a_tap_sees_is_looked_up():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Gate(3), nn.Conv2d(6, 2, 1)).double().eval()
    mask = torch.tensor([1, 0, 0, 1, 1, 0]).view(-1, 1, 1, 1).expand(6, 3, 1, 1).double()
    dense = nni_topo.to_dense(model, IMAGES, {"0": {"weight": mask}})
    assert isinstance(dense[1].conv, ChannelwiseConv1d)
    # Of channels 0, 3 and 4 the first has no neighbours left, the others each other; 3 stands for a zero.
    assert dense[1].conv.taps.tolist() == [[3, 0, 3], [3, 1, 2], [1, 2, 3]]
    assert torch.equal(dense[1].conv.weight, model[1].conv.weight)
    assert "counted=6" in repr(dense[1].conv)


def test_channels_that_a_hidden_layer_makes_constants_of_stay():
    model = whole_nets._eca(Gate(1, bias=True, hidden=3)).double().eval()
    groups = nni_topo.dependency_groups(model, IMAGES, HALF)
    # A gate isn't zero, but multiplies what is: the hidden layer's bias harms nothing with a kernel of one channel.
    assert not {"0", "2.body.0"} & groups.skipped.keys()
    model = whole_nets._eca(Gate(3, bias=True, hidden=3)).double().eval()
    model[2].body[3].last = nn.Conv1d(3, 1, 3, padding=1).double()
    groups = nni_topo.dependency_groups(model, IMAGES, HALF)
    made_and_read = "made by 2.body.3.conv: Conv1d, read by 2.body.3.last: Conv1d"
    assert groups.skipped["2.body.0"] == f"removed channels arrive as values that aren't zero ({made_and_read})"


@pytest.mark.parametrize("size", [1, 3000])  # squares of the larger one overflow float16
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["layer", "rms", "group"])
def test_half_precision_is_as_precise_as_in_the_norms_of_pytorch(name, kind, size):
    makers = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "group": lambda channels: nn.GroupNorm(4, channels)}
    torch.manual_seed(0)
    plain, norm = (makers[name](512) for _ in range(2))
    nn.init.normal_(plain.weight, 1, 0.1)
    norm.load_state_dict(plain.state_dict())
    keep_original_width(norm, 128 if name == "group" else 512)  # no channel is pruned, so both compute the same
    x = ((torch.randn(4, 512) + 0.3) * size).to(kind)
    assert type(norm) is not type(plain)
    near = 2 * torch.finfo(kind).eps
    torch.testing.assert_close(norm.to(kind)(x), plain.to(kind)(x), rtol=near, atol=near)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm.float()(x.float()), plain.float()(x.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_response_norm_of_large_values_in_half_precision(kind):
    torch.manual_seed(0)
    norm = ResponseNorm(512)
    x = (300 * torch.randn(4, 7, 7, 512)).to(kind)
    wanted = norm(x.float())
    keep_original_width(norm, 512)
    found = norm.to(kind)(x)
    assert found.dtype == kind
    assert (found - wanted).abs().max() <= 2 * torch.finfo(kind).eps * wanted.abs().max()


def test_computed_weights_become_the_layers_own():
    model = make("standardized")
    dense = pruned(model)[2]
    assert not any(isinstance(each, Standardized) for each in dense.modules())
    assert {name for name, _ in dense.named_parameters() if name.startswith("0.")} == {"0.weight", "0.bias"}
    alike = pruned(make("standardized_alike"))[2]
    assert {type(each) for each in alike.modules() if isinstance(each, nn.Conv2d)} == {nn.Conv2d, PaddedAlike}


class Normed(nn.Module):
    """Layers whose weights norms of both kinds compute, by hooks and by parametrizations."""

    def __init__(self):
        super().__init__()
        make = (
            nn.utils.weight_norm, nn.utils.spectral_norm,
            nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm,
        )  # fmt: skip
        self.layers = nn.ModuleList(
            norm(nn.Conv2d(3 if at == 0 else 8, 8, 3, padding=1)) for at, norm in enumerate(make)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("trained", [False, True])
def test_layers_with_norms_of_weights_are_plain_ones_that_lose_channels(trained):
    torch.manual_seed(0)
    model = Normed().double()
    if trained:
        model(IMAGES[:, :3]).sum().backward()  # weights have a history now, and copies of them none
    before = copy.deepcopy({name: value.detach() for name, value in model.state_dict().items()})
    plain = nni_topo.as_torch_layers(model)
    assert plain.training
    assert {type(layer) for layer in plain.layers} == {nn.Conv2d}
    assert [name for name, _ in plain.layers[0].named_parameters()] == ["bias", "weight"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model, plain = model.eval(), plain.eval()
    torch.testing.assert_close(plain(IMAGES), model(IMAGES))
    groups = nni_topo.dependency_groups(plain, IMAGES, HALF)
    assert groups.skipped.keys() == {"head"}
    masks = nni_topo.create_pruner("l1", copy.deepcopy(plain), list(groups)).compress()[1]
    dense = nni_topo.to_dense(plain, IMAGES, masks)
    assert [layer.out_channels for layer in dense.layers] == [4, 4, 4, 4]
    skipped = nni_topo.dependency_groups(model, IMAGES, HALF).skipped
    assert "nni_topo.as_torch_layers(model) makes plain layers that compute the same" in skipped["layers.0"]


@pytest.mark.parametrize("layer", [nn.LayerNorm(12), nn.GroupNorm(1, 12)], ids=lambda layer: type(layer).__name__)
def test_exported_norms_of_a_cpu_are_made_of_operations_that_converters_know(layer):
    """Core ML's knows no addcmul."""
    model = nn.Sequential(nn.Linear(12, 12), layer, nn.Linear(12, 4)).eval()
    masks = {"0": {"weight": torch.ones(12, 12), "bias": torch.ones(12)}}
    for values in masks["0"].values():
        values[::3] = 0.0
    images = torch.randn(5, 12)
    dense = nni_topo.to_dense(model, images, masks)
    assert type(dense[1]).__name__.startswith("OriginalWidth")
    program = torch.export.export(dense, (images,)).run_decompositions({})
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "addcmul" in name]
    assert any("mul" in name for name in called)
    assert not [name for name in called if "pad" in name]  # no zeros are written for a CPU to add up
