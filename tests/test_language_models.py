"""Tiny models of Transformers with random weights: tied embeddings and heads, buffers that no state_dict holds."""

from __future__ import annotations

import pytest
import torch
import transformers
from nni.compression.pruning import L1NormPruner

from nni_topo import RandomPruner, compensate, load, masked_model, save, to_dense
from nni_topo.sharing import find_ties

TOKENS = torch.randint(0, 31, (4, 6), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, return_dict=False, attn_implementation="eager")
    return transformers.BertForMaskedLM(config).eval()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, use_cache=False)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", [L1NormPruner, RandomPruner])
@pytest.mark.parametrize("make", [bert, llama])
def test_pruners_leave_the_tie_of_embedding_and_head(make, kind):
    model = make()
    ties = find_ties(model)
    assert len(ties) >= 1
    with torch.no_grad():
        expected = model(TOKENS)[0]
        pruner = kind(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
        pruner.compress()
        assert not torch.equal(model(TOKENS)[0], expected)
        pruner.unwrap_model()
        assert torch.equal(model(TOKENS)[0], expected)
    assert find_ties(model) == ties


@pytest.mark.slow
def test_bert_made_dense_compensated_and_loaded(tmp_path):
    model, name = bert(), "bert.encoder.layer.0.intermediate.dense"
    inputs = {
        "input_ids": TOKENS,
        "attention_mask": torch.ones_like(TOKENS),
        "token_type_ids": (TOKENS > 15).long(),
    }
    pruner = RandomPruner(model, [{"op_names": [name], "sparse_ratio": 0.5}], seed=0)
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    repaired = compensate(model, masks, [inputs])
    dense = to_dense(repaired, inputs, masks)
    assert find_ties(dense) == find_ties(model)
    assert dense.get_submodule(name).out_features == 12
    save(dense, tmp_path / "dense.pt")
    built = load(tmp_path / "dense.pt", bert)
    with torch.no_grad():
        expected, found = model(**inputs)[0], built(**inputs)[0]
        shipped = masked_model(model, inputs, masks)(**inputs)[0]
        assert torch.equal(found, dense(**inputs)[0])
    assert (found - expected).square().sum() < (shipped - expected).square().sum()
