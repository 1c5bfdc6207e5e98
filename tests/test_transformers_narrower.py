"""Narrower heads and residual widths of Transformers' models."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers_nets import families, inputs_of, logits, make

from nni_topo import (
    create_pruner,
    dependency_groups,
    load,
    masked_model,
    narrow_heads,
    save,
    save_pretrained,
    to_dense,
)
from nni_topo.errors import ConfigError
from nni_topo.network.attention.heads import find_attention

ROTARY = ("Cohere", "GPTNeoX", "Phi", "StableLm", "ModernBert", "Llama", "Qwen2", "Mistral", "Gemma2")


@pytest.mark.parametrize("name", families(*ROTARY, "Deberta", slow=("DistilBertForSequenceClassification",)))
@pytest.mark.quick_every(6)
def test_heads_with_half_of_their_channels(name, tmp_path):
    model = make(name)
    inputs = inputs_of(model, samples=12)
    turned, masks = narrow_heads(model, [inputs], 0.5)
    torch.testing.assert_close(logits(turned, inputs), logits(model, inputs), rtol=1e-3, atol=1e-3)
    dense, reference = to_dense(turned, inputs, masks), masked_model(turned, inputs, masks)
    for given in (inputs, inputs_of(model, samples=2, places=5)):
        torch.testing.assert_close(logits(dense, given), logits(reference, given), rtol=1e-5, atol=1e-5)
    sizes = {each.head_size for each in find_attention(dense).values()}
    assert sizes == {2}
    save(dense, tmp_path / "dense.safetensors")
    assert torch.equal(logits(load(tmp_path / "dense.safetensors", model), inputs), logits(dense, inputs))
    with pytest.raises(ConfigError, match=r"got .*2.* where the config makes"):
        save_pretrained(dense, tmp_path / "folder")


def test_padding_says_nothing_about_which_channels_of_heads_matter():
    model = make("BertForSequenceClassification")
    inputs = inputs_of(model, samples=12)
    others = {**inputs, "input_ids": torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], 7)}
    assert not torch.equal(inputs["input_ids"], others["input_ids"])
    one, other = (narrow_heads(model, [each], 0.5)[0].state_dict() for each in (inputs, others))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name].abs(), tensor.abs(), rtol=1e-3, atol=1e-4)


def test_heads_under_rotary_positions_stay_as_large_as_they_are(caplog):
    model = make("LlamaForCausalLM")
    assert narrow_heads(model, [inputs_of(model)], 0.5)[1] == {}
    assert "model.layers.1.self_attn (its queries and keys have rotary positions)" in caplog.text


def test_heads_whose_queries_meet_positions_stay_as_large_as_they_are(caplog):
    model = make("DebertaV2ForSequenceClassification")
    assert narrow_heads(model, [inputs_of(model)], 0.5)[1] == {}
    assert "encoder.layer.0.attention.self (its queries and keys meet positions too)" in caplog.text


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("BertForSequenceClassification", r".*_embeddings|.*\.output\.dense"),
        ("DebertaV2ForSequenceClassification", r".*word_embeddings|.*\.output\.dense"),
        ("DistilBertForSequenceClassification", r".*_embeddings|.*\.(out_lin|lin2)"),
        ("ViTForImageClassification", r".*projection|.*\.output\.dense|.*\.(o_proj|fc2)"),
    ],
)
@pytest.mark.quick_every(2)
def test_the_residual_width_goes(name, asked, tmp_path):
    model = make(name)
    inputs = inputs_of(model)
    groups = dependency_groups(model, inputs, [{"op_names_re": [asked], "sparse_ratio": 0.25}])
    assert not groups.skipped
    masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = to_dense(model, inputs, masks)
    expected = logits(masked_model(model, inputs, masks), inputs)
    torch.testing.assert_close(logits(dense, inputs), expected, rtol=1e-5, atol=1e-5)
    width = {each.normalized_shape for each in dense.modules() if isinstance(each, torch.nn.LayerNorm)}
    assert width == {(12,)}
    with pytest.raises(ConfigError, match=r"nni_topo.save and nni_topo.load take it"):
        save_pretrained(dense, tmp_path / "folder")
    save(dense, tmp_path / "dense.safetensors")
    assert torch.equal(logits(load(tmp_path / "dense.safetensors", model), inputs), logits(dense, inputs))
