"""Transformers with a narrower residual stream, written as folders that from_pretrained loads."""

from __future__ import annotations

import copy

import pytest
import torch

import nni_topo

transformers = pytest.importorskip("transformers")
IDS = {"input_ids": torch.arange(14).view(2, 7)}
WIDTHS = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "BertForSequenceClassification": ("BertConfig", {**WIDTHS, "vocab_size": 50}, IDS),
    "ViTForImageClassification": (
        "ViTConfig",
        {**WIDTHS, "image_size": 32, "patch_size": 8},
        {"pixel_values": torch.linspace(-1, 1, 6144).sin().view(2, 3, 32, 32)},
    ),
    "LlamaForCausalLM": ("LlamaConfig", {**WIDTHS, "num_key_value_heads": 4, "vocab_size": 50}, IDS),
    # norms without parameters
    "OlmoForCausalLM": (
        "OlmoConfig",
        {**WIDTHS, "vocab_size": 50, "pad_token_id": 1, "eos_token_id": 2, "use_cache": False},
        IDS,
    ),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 50}, IDS),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.quick_every(2)
def test_a_folder_of_half_the_width_is_loaded(name, tmp_path):
    config, sizes, inputs = MODELS[name]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = nni_topo.as_torch_layers(kind(getattr(transformers, config)(**sizes)).eval())
    asked = [{"op_types": ["Linear", "Embedding", "Conv2d"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(model, inputs, asked)
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = nni_topo.to_dense(model, inputs, masks, groups=groups)
    assert (dense.config.hidden_size, dense.config.num_attention_heads) == (24, 2)
    assert (model.config.hidden_size, model.config.num_attention_heads) == (48, 4)
    nni_topo.save_pretrained(dense, tmp_path)
    loaded = kind.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, dense(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_a_constructor_that_computes_a_number_of_the_width_keeps_it():
    """XGLM's embeddings multiply by its root, which a network built anew would take of the smaller one."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "vocab_size": 50}
    model = transformers.XGLMForCausalLM(transformers.XGLMConfig(**sizes)).eval()
    groups = nni_topo.dependency_groups(model, IDS, [{"op_types": ["Linear", "Embedding"], "sparse_ratio": 0.5}])
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = nni_topo.to_dense(model, IDS, masks, groups=groups)
    assert dense.get_input_embeddings().embedding_dim == 16
    assert dense.config.hidden_size == 32


def test_a_forward_that_reads_the_width_in_the_config_keeps_it():
    """Gemma multiplies its embeddings by the root of it."""
    torch.manual_seed(0)
    sizes = {**WIDTHS, "num_key_value_heads": 4, "head_dim": 12, "vocab_size": 50}
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes)).eval()
    asked = [{"op_names_re": [r".*embed_tokens|.*\.(o_proj|down_proj)"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(model, IDS, asked)
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = nni_topo.to_dense(model, IDS, masks, groups=groups)
    assert dense.model.embed_tokens.embedding_dim == 24
    assert dense.config.hidden_size == 48
