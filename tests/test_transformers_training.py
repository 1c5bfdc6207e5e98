"""Pruned models of Transformers train on: with gradient checkpointing, and with adapters of PEFT."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers_nets import inputs_of, logits, make, pruned

import nni_topo
from nni_topo.errors import ConfigError

NAMES = (
    "LlamaForCausalLM",
    "BertForSequenceClassification",
)


@cache
def pruned_model(name: str) -> Any:
    """Return a model with half of its heads, and half of the width between the two layers of each MLP."""
    model = make(name)
    inputs = inputs_of(model)
    narrower = nni_topo.to_dense(model, inputs, pruned(model, inputs))
    inner = [name for name, layer in model.named_modules() if getattr(layer, "out_features", 0) == 24]
    groups = nni_topo.dependency_groups(narrower, inputs, [{"op_names": inner, "sparse_ratio": 0.5}])
    masks = nni_topo.create_pruner("l1", copy.deepcopy(narrower), groups).compress()[1]
    dense = nni_topo.to_dense(narrower, inputs, masks)
    assert [dense.get_submodule(layer).out_features for layer in inner] == [12] * len(inner)
    assert sum(each.numel() for each in narrower.parameters()) < sum(each.numel() for each in model.parameters())
    return dense


def trained(model: Any, inputs: dict[str, torch.Tensor], steps: int) -> list[float]:
    """Train the parameters that aren't frozen towards zeros, and return the losses."""
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(free, 0.01), []
    torch.manual_seed(0)  # of dropout
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).logits.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.quick_every(2)
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    plain, again = (copy.deepcopy(pruned_model(name)).train() for _ in range(2))
    inputs = inputs_of(plain)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert again.is_gradient_checkpointing
    assert trained(again, inputs, 2) == trained(plain, inputs, 2)
    gradients = [parameter.grad for parameter in plain.parameters() if parameter.grad is not None]
    assert len(gradients) > 10
    for found, wanted in zip(again.parameters(), plain.parameters(), strict=True):
        assert (found.grad is None) == (wanted.grad is None)
        if found.grad is not None and wanted.grad is not None:
            assert torch.equal(found.grad, wanted.grad)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_of_peft_are_trained_merged_and_loaded(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    dense = copy.deepcopy(pruned_model(name))
    inputs = inputs_of(dense)
    wanted = logits(dense, inputs)
    blocks = {layer for layer, module in dense.named_modules() if isinstance(module, torch.nn.Linear) and "." in layer}
    targets = sorted({layer.rpartition(".")[2] for layer in blocks})
    adapted = peft.get_peft_model(copy.deepcopy(dense), peft.LoraConfig(r=2, target_modules=targets))
    with pytest.raises(ConfigError, match=r"adapters merged, got PeftModel"):
        nni_topo.save_pretrained(adapted, tmp_path / "refused")
    assert torch.equal(logits(adapted.eval(), inputs), wanted)  # adapters begin at zero
    losses = trained(adapted.train(), inputs, 4)
    assert losses[-1] < losses[0]
    found = logits(adapted.eval(), inputs)
    assert not torch.allclose(found, wanted, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), found)
    merged = adapted.merge_and_unload()
    assert [each.shape for each in merged.state_dict().values()] == [each.shape for each in dense.state_dict().values()]
    torch.testing.assert_close(logits(merged, inputs), found, rtol=1e-4, atol=1e-5)


def test_layers_with_adapters_of_peft_are_pruned_by_their_type() -> None:
    peft = pytest.importorskip("peft")
    unpruned = make("BertForSequenceClassification")
    inputs = inputs_of(unpruned)
    lora = peft.LoraConfig(r=4, target_modules=["query", "intermediate.dense"])
    model = peft.get_peft_model(unpruned, lora).eval()
    groups = nni_topo.dependency_groups(model, inputs, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    pruner = nni_topo.create_pruner("l1", model, groups)
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    name = "base_model.model.bert.encoder.layer.0.intermediate.dense"
    dense = nni_topo.to_dense(model, inputs, masks).get_submodule(name)
    assert (dense.base_layer.out_features, dense.lora_B["default"].out_features) == (12, 12)
    with pytest.raises(ConfigError, match=rf"must hold its weight itself, got peft.*\({name}\)"):
        nni_topo.create_pruner("l1", model, [{"op_names": [name], "sparse_ratio": 0.5}])
