"""Attention in windows, and the widths of attention whose layers nobody calls."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
)
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d
from torchvision.models.vision_transformer import VisionTransformer

from nni_topo import (
    create_pruner,
    dependency_groups,
    masked_model,
    to_dense,
)
from nni_topo.network.attention.heads import find_attention
from nni_topo.network.attention.unfused.swin import relative, windowed


def _drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _filled(net):
    drawing = torch.Generator().manual_seed(0)
    net = net.double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=drawing)
    return net


def _swin(**kinds):
    return SwinTransformer(
        [2, 2], 12, [2, 2], [3, 6], [4, 4], num_classes=5, stochastic_depth_prob=0.0, mlp_ratio=1.0, **kinds
    )


NETS = {
    "swin": (lambda: _swin(), (2, 3, 28, 28)),  # maps of 14 and 7: padded to windows, and before they are merged
    "vit": (lambda: VisionTransformer(32, 8, 2, 3, 12, 12, num_classes=5), (2, 3, 32, 32)),
}  # fmt: skip


def _make(name):
    build, shape = NETS[name]
    return _filled(build()), _drawn(*shape)


@pytest.mark.parametrize("shifts", [(0, 0), (2, 1)])
@pytest.mark.parametrize("sizes", [(7, 10), (3, 9)])
@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
def test_windows_compute_what_torchvision_does(kind, sizes, shifts):
    attention, x = _filled(kind(12, [4, 4], list(shifts), 3)), _drawn(2, *sizes, 12)
    if kind is ShiftedWindowAttentionV2:
        attention.qkv.bias.data[12:24] += 1  # which its own leaves out
    torch.testing.assert_close(windowed(attention, x), attention(x))


@pytest.mark.parametrize("shifts", [(0, 0, 0), (1, 2, 2)])
@pytest.mark.parametrize("sizes", [(3, 7, 9), (1, 3, 5)])
def test_windows_of_videos_compute_what_torchvision_does(sizes, shifts):
    attention, x = _filled(ShiftedWindowAttention3d(12, [2, 4, 4], list(shifts), 3)), _drawn(2, *sizes, 12)
    torch.testing.assert_close(windowed(attention, x), attention(x))


def test_attention_of_maxvit_computes_what_torchvision_does():
    attention, x = _filled(RelativePositionalMultiHeadAttention(12, 4, 16)), _drawn(2, 3, 16, 12)
    torch.testing.assert_close(relative(attention, x), attention(x))


def test_a_width_that_enters_attention_from_two_sides_goes_on_both():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 3, 8, batch_first=True), 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.decoder, self.head = (
                nn.Linear(5, 12), nn.Linear(4, 12), decoder, nn.Linear(12, 2),
            )  # fmt: skip

        def forward(self, x, y):
            return self.head(self.decoder(self.one(x), self.other(y)))

    model, inputs = _filled(Net()), (_drawn(2, 6, 5), _drawn(2, 7, 4))
    names = ["one", "other", *(name for name, _ in model.named_modules() if name.endswith(("out_proj", "linear2")))]
    groups = dependency_groups(model, inputs, [{"op_names": names, "sparse_ratio": 0.5}])
    assert len({entry["dependency_group_id"] for entry in groups}) == 1
    masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = to_dense(model, inputs, masks)
    torch.testing.assert_close(dense(*inputs), masked_model(model, inputs, masks)(*inputs))
    assert dense.one.out_features == dense.other.out_features == dense.head.in_features == 6
    assert dense.decoder.layers[0].multihead_attn.embed_dim == 6


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_masks_within_attention_act_while_it_is_wrapped(name):
    model, inputs = _make(name)
    before = copy.deepcopy(model)
    groups = dependency_groups(model, inputs, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}])
    pruner = create_pruner("l1", model, groups)
    masks = pruner.compress()[1]
    projection = next(each.out for each in find_attention(before).values())
    changed = copy.deepcopy(before)
    for layer, targets in masks.items():
        for target, mask in targets.items():
            if mask is not None:
                changed.get_submodule(layer).get_parameter(target).data.mul_(mask)
    assert bool((masks[projection]["weight"] == 0).any())
    torch.testing.assert_close(model(inputs), changed(inputs))
    pruner.unwrap_model()
    assert [type(part) for part in model.modules()] == [type(part) for part in before.modules()]
    assert torch.equal(model(inputs), before(inputs))
