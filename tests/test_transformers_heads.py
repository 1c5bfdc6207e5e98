"""Heads of tiny models of Transformers with random weights, whatever its version."""

from __future__ import annotations

import copy
import re
from collections import defaultdict

import pytest
import torch
from transformers_nets import (
    families,
    generated,
    inputs_of,
    logits,
    make,
    pruned,
    transformers,
)

from nni_topo import (
    compensate,
    create_pruner,
    dependency_groups,
    load,
    masked_model,
    remove_blocks,
    save,
    save_pretrained,
    to_dense,
)
from nni_topo.errors import ConfigError
from nni_topo.network.attention.heads import find_attention
from nni_topo.testing import require_unchanged, snapshot


# tests/test_golden.py has ModernBERT, and Gemma 2 differs from LLaMA in what the heads don't meet.
@pytest.mark.parametrize("name", families(slow=("ModernBertForSequenceClassification", "Gemma2ForCausalLM")))
@pytest.mark.quick_every(6)
def test_half_of_the_heads_go(name):
    check_half_of_the_heads(make(name))


def test_a_decoder_generates_and_loads_by_its_config(tmp_path):
    model = make("LlamaForCausalLM")
    dense = check_half_of_the_heads(model)
    assert generated(dense, inputs_of(model)).shape == (1, 11)
    assert (dense.config.num_attention_heads, dense.config.num_key_value_heads) == (2, 1)
    assert model.config.num_attention_heads == 4
    save_pretrained(dense, tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, inputs_of(model)), logits(dense, inputs_of(model)))


def check_half_of_the_heads(model):
    """Prune half of the heads, compare with the masked model at two sizes, and return the dense model."""
    inputs = inputs_of(model)
    masks = pruned(model, inputs)
    dense = to_dense(model, inputs, masks)
    before, after = find_attention(model), find_attention(dense)
    assert before.keys() == after.keys()
    assert len(before) == model.config.num_hidden_layers
    assert all(after[each].query_heads == before[each].query_heads // 2 for each in before)
    reference = masked_model(model, inputs, masks)
    for given in (inputs, inputs_of(model, samples=2, places=5)):
        torch.testing.assert_close(logits(dense, given), logits(reference, given), rtol=1e-5, atol=1e-5)
    return dense


@pytest.mark.slow
def test_heads_of_t5_go_from_all_blocks_that_share_their_positions(tmp_path):
    kinds = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 31}
    config = transformers.T5Config(**kinds, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    inputs = inputs_of(model)
    inputs["decoder_input_ids"] = inputs["input_ids"]
    groups = dependency_groups(model, inputs, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    sharing = defaultdict(set)
    for entry in groups:
        place = entry["op_names"][0].rpartition(".")[0]
        if "Attention" in place:
            sharing[entry["dependency_group_id"]].add(place)
    # The first block of each kind says for all of them how far apart places are, head by head.
    kinds = [("decoder", "0.SelfAttention"), ("decoder", "1.EncDecAttention"), ("encoder", "0.SelfAttention")]
    expected = [[f"{side}.block.{block}.layer.{layer}" for block in (0, 1)] for side, layer in kinds]
    assert sorted(sorted(each) for each in sharing.values()) == expected
    masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    reference, dense = masked_model(model, inputs, masks), to_dense(model, inputs, masks)
    torch.testing.assert_close(logits(dense, inputs), logits(reference, inputs), rtol=1e-5, atol=1e-5)
    assert {each.heads for each in find_attention(dense).values()} == {2}
    assert dense.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.embedding_dim == 2
    generated(dense, inputs)
    save_pretrained(dense, tmp_path)
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, inputs), logits(dense, inputs))


def test_what_a_config_cannot_say_is_refused_and_loads_by_the_original(tmp_path):
    model = make("ModernBertForSequenceClassification")
    inputs = inputs_of(model)
    dense = to_dense(model, inputs, pruned(model, inputs))
    number = re.escape(transformers.__version__)
    why = rf"\(Transformers {number} prunes no heads of this class\), got 2 heads of 4 where the config makes 4 heads"
    with pytest.raises(ConfigError, match=why):
        save_pretrained(dense, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    save(dense, tmp_path / "dense.safetensors")
    loaded = load(tmp_path / "dense.safetensors", model)
    assert torch.equal(logits(loaded, inputs), logits(dense, inputs))


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) > 4, reason="Transformers 5 prunes no heads")
def test_heads_of_single_blocks_are_in_the_config_and_load_by_it(tmp_path):
    model = make("BertForSequenceClassification")
    inputs = inputs_of(model)
    # Of the first block two heads go, and of the second one.
    masks = pruned(model, inputs)
    first, second = find_attention(model).values()
    for layer, channels in second.channels.items():
        for mask in masks.get(layer, {}).values():
            mask[channels[[0, 1, 2]].ravel()] = 1
            mask[channels[3]] = 0
    dense = to_dense(model, inputs, masks)
    counts = [find_attention(dense)[each.name].heads for each in (first, second)]
    assert counts == [2, 3]
    before = snapshot(dense)
    save_pretrained(dense, tmp_path)
    require_unchanged(before, dense)
    assert not dense.config.pruned_heads
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert {block: len(gone) for block, gone in loaded.config.pruned_heads.items()} == {0: 2, 1: 1}
    assert torch.equal(logits(loaded, inputs), logits(dense, inputs))
    # What was loaded can lose more.
    fewer = to_dense(loaded, inputs, pruned(loaded, inputs))
    save_pretrained(fewer, tmp_path / "fewer")
    again = type(model).from_pretrained(tmp_path / "fewer").eval()
    assert [find_attention(again)[each.name].heads for each in (first, second)] == [1, 2]
    assert torch.equal(logits(again, inputs), logits(fewer, inputs))


def test_blocks_of_two_widths_are_refused(tmp_path):
    model = make("LlamaForCausalLM")
    inputs = inputs_of(model)
    names = [f"model.layers.1.mlp.{each}_proj" for each in ("up", "gate")]
    groups = dependency_groups(model, inputs, [{"op_names": names, "sparse_ratio": 0.5}])
    masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = to_dense(model, inputs, masks)
    with pytest.raises(ConfigError, match=r"one width for all blocks, got 12 where the config makes 24.*nni_topo.load"):
        save_pretrained(dense, tmp_path)
    with pytest.raises(ConfigError, match=r"one of Transformers, .*, got Linear; nni_topo.save takes any"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)


def test_a_model_whose_padding_was_set_after_loading_is_written(tmp_path):
    model = make("LlamaForCausalLM")
    model.config.pad_token_id = 1
    save_pretrained(model, tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    inputs = inputs_of(model)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    # RoBERTa counts positions from the id of padding.
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.RobertaModel(transformers.RobertaConfig(vocab_size=50, **sizes))
    model.config.pad_token_id = 3
    with pytest.raises(ConfigError, match=r"got 1 where the config makes 3 .*position_embeddings.padding_idx"):
        save_pretrained(model, tmp_path)


def test_what_is_padding_does_not_count_in_compensation():
    model = make("BertForSequenceClassification")
    inputs = inputs_of(model, samples=10)
    masks = pruned(model, inputs)
    padding = inputs["attention_mask"] == 0
    others = {**inputs, "input_ids": inputs["input_ids"].masked_fill(padding, 4)}
    found, again = (compensate(model, masks, [each]).state_dict() for each in (inputs, others))
    assert any(not torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())
    for name, tensor in found.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", pytest.param("BertForSequenceClassification", marks=pytest.mark.slow)]
)
def test_a_model_without_a_block_and_heads_loads_by_the_original(name, tmp_path):
    model = make(name, layers=4)
    inputs = inputs_of(model, samples=20)
    blocks = next(n for n, each in model.named_modules() if isinstance(each, torch.nn.ModuleList) and len(each) == 4)
    # The second call goes by the numbers that the first one left: of the original it is the last block.
    small = remove_blocks(remove_blocks(model, [f"{blocks}.1"], [inputs]), [f"{blocks}.2"], [inputs])
    masks = pruned(small, inputs)
    dense = to_dense(compensate(small, masks, [inputs]), inputs, masks)
    save(dense, tmp_path / "dense.safetensors")
    for base in (model, small):
        loaded = load(tmp_path / "dense.safetensors", base)
        assert loaded.config.num_hidden_layers == 2
        assert torch.equal(logits(loaded, inputs), logits(dense, inputs))
        if name == "LlamaForCausalLM":
            assert torch.equal(generated(loaded, inputs), generated(dense, inputs))
    with pytest.raises(ConfigError, match="got 1 blocks where block 2 is kept"):
        load(tmp_path / "dense.safetensors", make(name, layers=1))
    if name == "LlamaForCausalLM":
        save_pretrained(dense, tmp_path / "folder")
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "folder").eval()
        torch.testing.assert_close(logits(loaded, inputs), logits(dense, inputs))


def test_blocks_that_ask_the_models_config_for_their_heads_may_keep_different_ones(tmp_path):
    model = make("Phi3ForCausalLM")
    inputs = inputs_of(model)
    config = [{"op_names": ["model.layers.1.self_attn"], "granularity": "head", "sparse_ratio": 0.5}]
    groups = list(dependency_groups(model, inputs, config))
    masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = to_dense(model, inputs, masks)
    assert [each.query_heads for each in find_attention(dense).values()] == [4, 2]
    assert model.config.num_attention_heads == dense.config.num_attention_heads == 4
    torch.testing.assert_close(logits(dense, inputs), logits(masked_model(model, inputs, masks), inputs))
    save(dense, tmp_path / "dense.pt")
    again = load(tmp_path / "dense.pt", make("Phi3ForCausalLM"))
    assert torch.equal(logits(again, inputs), logits(dense, inputs))


def test_a_model_without_its_pooling_layer_is_saved_as_a_folder(tmp_path):
    """The argument isn't in the config, and from_pretrained takes it again."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    asked = [{"op_names_re": [r".*\.intermediate\.dense"], "sparse_ratio": 0.5}]
    masks = create_pruner("l1", copy.deepcopy(model), list(dependency_groups(model, ids, asked))).compress()[1]
    dense = to_dense(model, ids, masks)
    save_pretrained(dense, tmp_path / "folder")
    loaded = transformers.BertModel.from_pretrained(tmp_path / "folder", add_pooling_layer=False).eval()
    assert loaded.encoder.layer[1].intermediate.dense.out_features == 12
    torch.testing.assert_close(loaded(ids).last_hidden_state, dense(ids).last_hidden_state)
