"""Residual widths of tiny models of Transformers with random weights, whatever its version."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers_nets import (
    MODELS,
    SIZES,
    TOKENS,
    generated,
    inputs_of,
    logits,
    transformers,
)

from nni_topo import (
    create_pruner,
    dependency_groups,
    load,
    masked_model,
    save,
    to_dense,
)

# Its heads keep their size, which others' lose: half of their channels have rotary positions.
OTHERS = {"NemotronForCausalLM": ("NemotronConfig", {**SIZES, **TOKENS, "num_key_value_heads": 2})}


@pytest.mark.parametrize(
    # tests/test_golden.py has the widths of other families
    ("name", "tied"),
    [
        ("Gemma2ForCausalLM", True),
        ("NemotronForCausalLM", False),
    ],
)
@pytest.mark.quick_every(2)
def test_the_residual_width_of_decoders_goes_with_their_own_norms(name, tied, tmp_path):
    config, sizes = OTHERS.get(name) or MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**sizes, tie_word_embeddings=tied)
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = inputs_of(model, samples=12)
    asked = [{"op_names_re": [r".*embed_tokens|.*\.(o_proj|down_proj)"], "sparse_ratio": 0.25}]
    groups = dependency_groups(model, inputs, asked)
    assert groups.skipped == {}
    masks = create_pruner("l1", copy.deepcopy(model), list(groups)).compress()[1]
    dense, reference = to_dense(model, inputs, masks), masked_model(model, inputs, masks)
    torch.testing.assert_close(logits(dense, inputs), logits(reference, inputs), rtol=1e-5, atol=1e-5)
    assert (dense.model.embed_tokens.embedding_dim, dense.lm_head.in_features) == (12, 12)
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    generated(dense, inputs)
    save(dense, tmp_path / "dense.safetensors")
    assert torch.equal(logits(load(tmp_path / "dense.safetensors", model), inputs), logits(dense, inputs))
    assert [type(each) for each in dense.modules()] == [type(each) for each in model.modules()]
