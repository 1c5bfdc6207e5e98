"""Pruned language models in folders that Transformers loads without this package, and goes on generating with."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers_nets import SIZES, inputs_of, logits, transformers

import nni_topo
from nni_topo.errors import ConfigError

GROUPED = {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 2}
# Configs with a size of heads, and those whose constructor divides the width by the number of heads.
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": {"head_dim": 4},
    "Qwen2": {},
    "Mistral": {"sliding_window": None},
    "Gemma": {"head_dim": 4},
    "Qwen3": {"head_dim": 4},
}
LOAD = """
import sys, torch, transformers
folder, ids, found = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
ids = torch.load(ids)
with torch.no_grad():
    logits = model(input_ids=ids).logits
    text = model.generate(input_ids=ids[:1], max_new_tokens=5, do_sample=False)
torch.save((logits, text), found)
assert "nni_topo" not in sys.modules
"""


def made(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**GROUPED, **CONFIGS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model


def check_stock(dense: Any, folder: Path) -> None:
    """Load the folder in a process of its own, and compare its logits and its text."""
    ids = torch.randint(5, 31, (3, 6), generator=torch.Generator().manual_seed(2))
    nni_topo.save_pretrained(dense, folder / "model")
    torch.save(ids, folder / "ids.pt")
    paths = [str(folder / name) for name in ("model", "ids.pt", "found.pt")]
    done = subprocess.run([sys.executable, "-c", LOAD, *paths], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, text = torch.load(folder / "found.pt")
    wanted = logits(dense, {"input_ids": ids})
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(text, dense.generate(input_ids=ids[:1], max_new_tokens=5, do_sample=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_ratio_in_all_blocks_leaves_a_folder_for_transformers_alone(name: str, tmp_path: Path) -> None:
    model = made(name)
    inputs = inputs_of(model)
    asked = [
        {"op_names_re": [r".*\.self_attn"], "granularity": "head", "sparse_ratio": 0.5},
        {"op_names_re": [r".*\.(gate_proj|up_proj)"], "sparse_ratio": 0.5},
    ]
    groups = nni_topo.dependency_groups(model, inputs, asked)
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense: Any = nni_topo.to_dense(model, inputs, masks)
    config = dense.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 12)
    assert (config.head_dim, config.hidden_size) == (4, 16)
    check_stock(dense, tmp_path)


@pytest.mark.slow
def test_a_number_of_heads_that_transformers_refuses_is_an_error_that_says_so(tmp_path: Path) -> None:
    # 4 heads of 4 channels for a width of 16; Transformers 5 wants widths that the number of heads divides.
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, head_dim=4)).eval()
    inputs = inputs_of(model)
    asked = [{"op_names_re": [r".*\.self_attn"], "granularity": "head", "sparse_ratio": 0.25}]
    groups = nni_topo.dependency_groups(model, inputs, asked)
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense: Any = nni_topo.to_dense(model, inputs, masks)
    assert dense.config.num_attention_heads == 3
    if int(transformers.__version__.split(".")[0]) < 5:
        check_stock(dense, tmp_path)
        return
    with pytest.raises(ConfigError, match=r"by its config, which Transformers 5\S+ refuses: .*16.*3.*nni_topo\.load"):
        nni_topo.save_pretrained(dense, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    nni_topo.save(dense, tmp_path / "dense.safetensors")
    assert torch.equal(logits(nni_topo.load(tmp_path / "dense.safetensors", model), inputs), logits(dense, inputs))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pruner"), [("Llama", "l1"), ("Mistral", "reconstruction")])
def test_a_budget_leaves_blocks_equally_wide(name: str, pruner: str, tmp_path: Path) -> None:
    model = made(name)
    drawing = torch.Generator().manual_seed(3)
    texts = [{"input_ids": torch.randint(5, 31, (16, 6), generator=drawing)} for _ in range(4)]
    layers = [
        {"op_names_re": [r".*\.self_attn"], "granularity": "head"},
        {"op_names_re": [r".*\.(gate_proj|up_proj)"]},
    ]
    knobs: dict[str, Any] = {"pruner": pruner, "layers": layers, "distill": False}
    widths = []
    for equal_blocks in (False, True):
        dense: Any = nni_topo.shrink(model, texts, {"params": 0.7, "equal_blocks": equal_blocks}, **knobs)
        blocks = dense.model.layers
        widths.append({(block.self_attn.q_proj.out_features, block.mlp.up_proj.out_features) for block in blocks})
    assert len(widths[0]) > 1
    assert len(widths[1]) == 1
    assert sum(each.numel() for each in dense.parameters()) < 0.85 * sum(each.numel() for each in model.parameters())
    check_stock(dense, tmp_path)


def test_gpt2_as_it_is_stays_whole_and_splits_as_before():
    """Its layers of a class of Transformers' own keep all channels, so the size that the forward splits by stays."""
    model = transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=4)
    )
    tokens = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    dense = nni_topo.to_dense(model.eval(), tokens, {})
    assert dense.h[0].attn.split_size == 32
    with torch.no_grad():
        assert torch.equal(dense(tokens)[0], model(tokens)[0])
