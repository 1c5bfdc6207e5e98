"""Heads of attention: found, tied, removed and made up for."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from attention_nets import HEADS, NETS, SIZE, WIDTH, _states, head_masks, make, same
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from nni_topo import compensate, create_pruner, dependency_groups, load, masked_model, save, to_dense, zoo
from nni_topo.network.attention.config import accepted_heads
from nni_topo.network.attention.heads import find_attention
from nni_topo.network.attention.unfused.multihead import multihead


@pytest.mark.parametrize("name", NETS)
@pytest.mark.quick_every(3)
def test_heads_that_are_masked_go(name):
    model, inputs = make(name), _states(3, 7, 5)
    (attention,) = find_attention(model).values()
    masks = head_masks(model, [0, 2])
    dense = to_dense(model, inputs, masks)
    masked = masked_model(model, inputs, masks)
    same(dense, masked, inputs)
    same(dense, masked, _states(2, 4, 5))
    (left,) = find_attention(dense).values()
    assert (left.heads, left.size) == (2, attention.size)
    projection = dense.get_submodule(attention.out)
    assert projection.in_features == 2 * attention.size
    gone = attention.heads - 2
    rows = sum(channels.shape[1] for channels in attention.channels.values())
    biased = getattr(model.get_submodule(attention.out), "bias", None) is not None
    expected = gone * (rows * (WIDTH + biased) + WIDTH * attention.size)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in dense.parameters()) == expected


def test_a_vision_transformer_of_torchvision():
    torch.manual_seed(0)
    model, images = VisionTransformer(16, 4, 2, HEADS, WIDTH, 24, num_classes=5).eval(), _states(2, 3, 16, 16)
    nn.init.normal_(model.heads.head.weight)
    masks = head_masks(model, [0, 3])
    dense = to_dense(model, images, masks)
    assert [each.heads for each in find_attention(dense).values()] == [2, 2]
    same(dense, masked_model(model, images, masks), images)


def test_a_head_of_which_any_block_is_left_stays_and_the_rest_of_it_stays_masked():
    model, inputs = make("apart"), _states(3, 7, 5)
    masks = head_masks(model, [0, 2])
    name = "1.attention.v_proj"
    masks[name]["weight"][3] = 1  # one channel of head 1
    masks[name]["weight"][0] = 0  # one of head 0
    dense = to_dense(model, inputs, masks)
    assert dense.get_submodule(name).out_features == 3 * SIZE
    weight = dense.get_submodule(name).weight
    assert torch.equal(weight[3], model.get_submodule(name).weight[3])
    assert not weight[[0, 4, 5]].any()
    same(dense, masked_model(model, inputs, masks), inputs)


def test_round_to_brings_whole_heads_back_with_their_weights():
    model, inputs = make("apart"), _states(3, 7, 5)
    dense = to_dense(model, inputs, head_masks(model, [0, 1]), round_to=9)
    assert dense.get_submodule("1.attention.q_proj").out_features == 9
    assert dense.get_submodule("1.attention.v_proj").weight.flatten(1).any(1).all()


@pytest.mark.parametrize(("batch_first", "bias"), [(True, False), (False, True)])
def test_multihead_computes_what_torch_does(batch_first, bias):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, bias=bias).eval()
    shape = (2, 5, WIDTH) if batch_first else (5, 2, WIDTH)
    query, key = _states(*shape), _states(2, 6, WIDTH) if batch_first else _states(6, 2, WIDTH)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    by_head = _states(2 * HEADS, 5, 6) > 2
    for knobs in (
        {},
        {"need_weights": False, "attn_mask": _states(5, 6)},
        {"key_padding_mask": padding, "attn_mask": torch.ones(5, 6).triu(3).bool(), "average_attn_weights": False},
        {"attn_mask": by_head},
    ):
        expected, found = attention(query, key, key, **knobs), multihead(attention, query, key, key, **knobs)
        for one, other in zip(expected, found, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    single = query[0] if batch_first else query[:, 0]
    for one, other in zip(attention(single, single, single), multihead(attention, single, single, single), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_drops_shares_of_attention_in_training_alone(need_weights):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=1.0, batch_first=True)
    nn.init.normal_(attention.out_proj.bias)
    states = _states(2, 5, WIDTH)
    for mode in (attention.train(), attention.eval()):
        (expected, _), (found, _) = (
            call(states, states, states, need_weights=need_weights) for call in (mode, partial(multihead, mode))
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        # Without any shares all that is left is the bias.
        assert torch.equal(found, attention.out_proj.bias.expand(2, 5, WIDTH)) is mode.training


def test_attention_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=WIDTH, num_heads=HEADS, qk_norm=True
    )
    images = _states(2, 3, 32, 32)
    masks = head_masks(model.eval(), [0, 3])
    dense = to_dense(model, images, masks)
    assert [each.heads for each in find_attention(dense).values()] == [2, 2]
    same(dense, masked_model(model, images, masks), images)


def test_groups_tie_queries_keys_values_and_what_mixes_them():
    model = make("shared keys")
    asked = [{"op_types": ["Linear"], "exclude_op_names": ["0"], "sparse_ratio": 0.4}]
    groups = dependency_groups(model, _states(2, 7, 5), asked)
    found = {e["op_names"][0]: (e.get("dependency_group_id"), e.get("granularity")) for e in groups}
    assert found == {
        "1.attention.q_proj": ("group_0", [4, -1]),
        "1.attention.k_proj": ("group_0", [2, -1]),
        "1.attention.v_proj": ("group_0", [2, -1]),
        "1.attention.o_proj": ("group_0", [-1, 4]),
        "1.mlp.gate_proj": ("group_1", None),
        "1.mlp.up_proj": ("group_1", None),
    }


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda mixed, shares: mixed, None),
        (lambda mixed, shares: mixed * shares.mean(), "depends on removed channels (mean)"),
    ],
)
def test_shares_of_each_head_keep_the_heads_where_something_reads_them(use, reason):
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.attention = nn.Linear(5, WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x):
            x = self.enter(x)
            return use(*self.attention(x, x, x, average_attn_weights=False))

    asked = [{"op_types": ["MultiheadAttention", "Linear"], "sparse_ratio": 0.5}]
    groups = dependency_groups(Read().eval(), _states(2, 7, 5), asked)
    assert "enter" not in groups.skipped
    assert ("attention" in groups.skipped) is (reason is not None)
    assert (reason or "") in groups.skipped.get("attention", "")


@pytest.mark.parametrize("asked", [{"op_names": ["1.attention"]}, {"op_names_re": [r"1\.attention\..*"]}])
def test_heads_may_be_asked_for_by_name_and_of_a_module_that_holds_them(asked):
    groups = dependency_groups(make("apart"), _states(2, 7, 5), [{**asked, "granularity": "head", "sparse_ratio": 0.5}])
    assert [e["op_names"][0].rpartition(".")[2] for e in groups] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert {e["dependency_group_id"] for e in groups} == {"group_0"}


def test_layers_without_heads_are_left_out_and_named():
    config = [{"op_types": ["Linear"], "granularity": "head", "sparse_ratio": 0.5}]
    groups = dependency_groups(make("apart"), _states(2, 7, 5), config)
    assert groups.skipped.keys() == {"0", "1.mlp.fc1", "1.mlp.fc2", "2"}
    assert all("no heads" in reason for reason in groups.skipped.values())


@pytest.mark.parametrize("name", ["multihead", "shared keys"])
def test_a_model_with_fewer_heads_is_saved_and_loaded(name, tmp_path):
    model, inputs = make(name), _states(3, 7, 5)
    dense = to_dense(model, inputs, head_masks(model, [0, 2]))
    save(dense, tmp_path / "dense.pt")
    loaded = load(tmp_path / "dense.pt", model)
    assert [each.heads for each in find_attention(loaded).values()] == [2]
    same(loaded, dense, inputs)


def _width(name):
    """A model of the zoo, inputs of it, and a request for a quarter of its residual width."""
    sizes = {"num_classes": 10, "in_channels": 1, "image_size": 16}
    model = zoo.create_model(name, **sizes, seed=0).eval()
    drawing = torch.Generator().manual_seed(0)
    text = torch.randint(0, 10, (40, 9), generator=drawing)
    inputs = text if name == "gpt_small" else torch.randn(40, 1, 16, 16, generator=drawing)
    return model, inputs, [{"op_names_re": [r"patches|embedding|.*\.(o_proj|fc2|down_proj)"], "sparse_ratio": 0.25}]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("vit_small", "l1"), ("bert_small", "reconstruction"), ("gpt_small", "l1")],
)
@pytest.mark.slow
def test_the_residual_width_goes_with_all_that_reads_it_and_norms_count_on(name, kind, tmp_path):
    model, inputs, asked = _width(name)
    groups = dependency_groups(model, inputs[:2], asked)
    assert not groups.skipped
    assert len({entry["dependency_group_id"] for entry in groups}) == 1
    knobs = {"calibration": [inputs]} if kind == "reconstruction" else {}
    masks = create_pruner(kind, copy.deepcopy(model), groups, **knobs).compress()[1]
    dense = to_dense(model, inputs[:2], masks)
    with torch.no_grad():
        expected = masked_model(model, inputs[:2], masks)(inputs)
        torch.testing.assert_close(dense(inputs), expected, rtol=1e-5, atol=1e-5)
        mended = to_dense(compensate(model, masks, [inputs]), inputs[:2], masks)
        lost = [(net(inputs) - model(inputs)).square().sum() for net in (dense, mended)]
    assert lost[1] < 0.3 * lost[0]
    block = dense.blocks[0]
    assert {layer.in_features for layer in (block.attention.q_proj, block.attention.k_proj, dense.head)} == {72}
    assert block.attention.o_proj.weight.shape == (72, 96)
    assert repr(block.norm1).startswith("RMSNorm((72,)" if name == "gpt_small" else "LayerNorm((72,)")
    save(dense, tmp_path / "dense.safetensors")
    assert torch.equal(load(tmp_path / "dense.safetensors", model)(inputs), dense(inputs))


@pytest.mark.slow
def test_all_layers_asked_for_by_kind_lose_heads_neurons_and_the_width():
    model, inputs, _ = _width("vit_small")
    everything = {"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}
    groups = dependency_groups(model, inputs[:2], [everything])
    assert list(groups.skipped) == ["head"]
    by_name = {entry["op_names"][0]: entry for entry in groups}
    assert by_name["blocks.0.attention.o_proj"]["dependency_group_id"] == by_name["patches"]["dependency_group_id"]
    masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = to_dense(model, inputs[:2], masks)
    torch.testing.assert_close(dense(inputs), masked_model(model, inputs[:2], masks)(inputs), rtol=1e-5, atol=1e-5)
    whole, left = (
        [part.weight.shape for part in net.modules() if isinstance(part, (torch.nn.Conv2d, torch.nn.Linear))]
        for net in (model, dense)
    )
    # Of the convolution and the classifier half of one side goes, of all others half of both.
    assert [2 * after.numel() for after in left[:1] + left[-1:]] == [
        before.numel() for before in whole[:1] + whole[-1:]
    ]
    assert [4 * after.numel() for after in left[1:-1]] == [before.numel() for before in whole[1:-1]]
    with_heads = [{"op_names_re": [r".*\.attention"], "granularity": "head", "sparse_ratio": 0.5}, everything]
    assert "which loses heads" in dependency_groups(model, inputs[:2], with_heads).skipped["patches"]


class Config:
    """Settings of a model whose width has to be divided by its number of heads, which may share keys and values."""

    def __init__(self, width, heads, shared):
        self.hidden_size, self.num_attention_heads, self.num_key_value_heads = width, heads, shared

    def validate(self):
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("heads")


LAYERS = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("name", "settings", "expected", "layers"),
    [
        ("apart", (10, 4, 4), [1, 2], LAYERS),
        ("apart", (12, 4, 4), None, LAYERS),
        ("shared keys", (8, 6, 3), [1, 2], LAYERS),
        ("one key", (10, 6, 1), [1, 2, 5], LAYERS[:1]),
    ],
)
def test_numbers_of_heads_that_a_config_accepts(name, settings, expected, layers):
    model = make(name)
    assert accepted_heads(model) == {}
    model.config = Config(*settings)
    wanted = {} if expected is None else {f"1.attention.{layer}": expected for layer in layers}
    assert accepted_heads(model) == wanted
    assert vars(model.config) == vars(Config(*settings))
    model[1].attention.config = {}  # its own comes first, and can't be asked
    assert accepted_heads(model) == {}
