"""Small models of Transformers; tests/test_golden.py has more, pruned by half."""

from __future__ import annotations

import copy

import pytest
import torch

from nni_topo import as_torch_layers, create_pruner, dependency_groups

transformers = pytest.importorskip("transformers")


SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 8}
RELATIVE = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 4,
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0, "max_position_embeddings": 16,
}  # fmt: skip
"""DeBERTa's third version: positions are read by the layers of queries and keys."""
DISTIL = {"vocab_size": 31, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 4}
TOKENS = {f"{kind}_token_id": at for at, kind in enumerate(("pad", "bos", "eos", "cls", "sep"))}


MODELS = {
    "BertForSequenceClassification": ("BertConfig", SIZES),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", {**SIZES, **RELATIVE}),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTIL),
    "ViTForImageClassification": ("ViTConfig", {**IMAGES, "patch_size": 4}),
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 31, "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4}),
    "LlamaForCausalLM": ("LlamaConfig", {**SIZES, "num_key_value_heads": 2, "head_dim": 4}),
    "Qwen2ForCausalLM": ("Qwen2Config", {**SIZES, "num_key_value_heads": 2}),
    "Gemma2ForCausalLM": ("Gemma2Config", {**SIZES, "num_key_value_heads": 2, "head_dim": 4}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {**SIZES, "rotary_pct": 0.5}),
    "Phi3ForCausalLM": ("Phi3Config", {**SIZES, **TOKENS, "num_key_value_heads": 2}),
    "ModernBertForSequenceClassification": ("ModernBertConfig", {**SIZES, **TOKENS}),
}


def families(slow=()):
    """All kinds of models."""
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in MODELS]


def make(name, layers=None):
    torch.manual_seed(0)
    config, sizes = MODELS[name]
    depth = {} if layers is None else {"n_layer" if "n_layer" in sizes else "num_hidden_layers": layers}
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes | depth)).eval()
    model = as_torch_layers(model) if name.startswith("GPT2") else model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def inputs_of(model, samples=3, places=6):
    drawing = torch.Generator().manual_seed(1)
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(samples, 3, 8, 8, generator=drawing)}
    ids = torch.randint(5, 31, (samples, places), generator=drawing)
    lengths = places - 2 * (torch.arange(samples) % 3 == 1).long()
    return {"input_ids": ids, "attention_mask": (torch.arange(places) < lengths[:, None]).long()}


def pruned(model, inputs, ratio=0.5):
    config = [{"op_types": ["Linear"], "granularity": "head", "sparse_ratio": ratio}]
    groups = list(dependency_groups(model, inputs, config))
    work = copy.deepcopy(model)
    return create_pruner("l1", work, groups).compress()[1]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def generated(model, inputs):
    """Five more tokens of the first sample, which have to be the same with and without a cache of keys and values."""
    start = inputs["input_ids"][:1]
    texts = [model.generate(start, max_new_tokens=5, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*texts)
    return texts[0]
