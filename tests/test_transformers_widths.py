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
from nni_topo.network.attention.heads import find_attention

# Its heads keep their size, which others' lose: half of their channels have rotary positions.
OTHERS = {"NemotronForCausalLM": ("NemotronConfig", {**SIZES, **TOKENS, "num_key_value_heads": 2})}


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("LlamaForCausalLM", False),
        ("Gemma2ForCausalLM", True),
        ("CohereForCausalLM", True),
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


class Logits(torch.nn.Module):
    """A model that reads and writes, of which what its encoder makes is no output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, decoder_input_ids):
        return self.model(input_ids=input_ids, decoder_input_ids=decoder_input_ids).logits


@pytest.mark.parametrize("kind", ["T5", "Bart"])
@pytest.mark.quick_every(2)
def test_widths_of_encoder_and_decoder_go_with_the_attention_between_them(kind):
    t5 = {"d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    sides = {f"{side}_{key}": size for side in ("encoder", "decoder") for key, size in
             (("layers", 1), ("attention_heads", 4), ("ffn_dim", 24))}  # fmt: skip
    sizes = {"vocab_size": 31, "d_model": 16, **(t5 if kind == "T5" else sides)}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    inner = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    model, ids = Logits(inner).eval(), torch.randint(5, 31, (2, 12))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :7]}
    groups = dependency_groups(model, inputs, [{"op_types": ["Linear", "Embedding"], "sparse_ratio": 0.5}])
    masks = create_pruner("l1", copy.deepcopy(model), list(groups)).compress()[1]
    dense, reference = to_dense(model, inputs, masks), masked_model(model, inputs, masks)
    others = {name: torch.randint(5, 31, (3, size)) for name, size in (("input_ids", 8), ("decoder_input_ids", 5))}
    torch.testing.assert_close(dense(**others), reference(**others), rtol=1e-5, atol=1e-5)
    found = find_attention(dense)
    (between,) = (found[name] for name in found if name.endswith(("encoder_attn", "EncDecAttention")))
    layers = {name: dense.get_submodule(name) for name in between.channels}
    assert {(layer.in_features, layer.out_features) for layer in layers.values()} == {(8, 8)}
