"""Models of Transformers that keep a state, and norms that are more than norms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import nni_topo

transformers = pytest.importorskip("transformers")

ASKED = [{"op_types": ["Linear", "Embedding", "Conv1d"], "sparse_ratio": 0.5}]
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
MAMBA2 = {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4}


@pytest.mark.parametrize(
    ("name", "sizes"), [("Rwkv", {"context_length": 16}), ("Mamba", {"state_size": 4}), ("Mamba2", MAMBA2)]
)
@pytest.mark.quick_every(6)
def test_a_model_with_a_state_is_pruned_and_generates(name: str, sizes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    assert model.config.use_cache
    inputs = {"input_ids": torch.randint(5, 45, (2, 8))}
    groups = nni_topo.dependency_groups(model, inputs, ASKED)
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense: Any = nni_topo.to_dense(model, inputs, masks)
    assert sum(each.numel() for each in dense.parameters()) < 0.85 * sum(each.numel() for each in model.parameters())
    assert dense.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False).shape == (2, 11)
    if name == "Rwkv":
        assert "(put in rwkv.blocks.0.attention)" in groups.skipped["rwkv.embeddings"]


@pytest.mark.slow
@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) > 4, reason="Transformers 5 joins the experts")
def test_experts_that_get_other_tokens_are_left_as_they_are_and_told():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**sizes, **heads, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.MixtralForCausalLM(config).eval()
    texts = [torch.randint(0, 50, (8, 6)) for _ in range(4)]
    small = nni_topo.shrink(model, texts, {"params": 0.7}, pruner="l1", distill=False, progress=False)
    report = small.report.compensation
    others = [name for name, why in report.left_alone.items() if "a router sends it other samples" in why]
    assert others
    assert all(".experts." in name for name in others)
    solved = [row.layer for row in report.layers]
    assert solved
    assert not set(solved) & set(others)
    assert "not reconstructed: in the pruned network a router sends it other samples" in str(small.report)
