"""Tiny models of Transformers whose widths meet buffers, or whose attention is a kind of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import nni_topo
from benchmarks.networks import zoo_transformers
from nni_topo.network.runtime.choices import ChoicesNoted, ChoicesRepeated

transformers = pytest.importorskip("transformers")

# By name in benchmarks/networks/zoo_transformers.py: the share of the parameters that is left at most.
# tests/test_golden.py has other families.
FAMILIES = {
    # Sinusoidal positions are a buffer.
    "xglm_logits": 0.33,
    "m2m100_logits": 0.32,
    # One layer makes queries, keys and values, head by head.
    "gpt_bigcode": 0.44,
    # Biases of the logits are a buffer.
    "pegasus_logits": 0.35,
    # Norms of the backbone are buffers.
    "detr": 0.41,
    # And which queries there are is up to the scores.
    "rt_detr": 0.32,
    # Attention adds positions to what it reads, or takes the width of its heads from its input.
    "conditional_detr": 0.44,
    "owlvit_vision": 0.68,
    "blip_vision": 0.68,
    # Heads have biases by position, which LeViT looks up once for evaluation mode.
    "levit": 0.31,
    "sam_vision": 0.39,
    # Heads of attention and heads that convolutions make are concatenated.
    "convbert": 0.35,
    # Channels meet a matrix with a row for each, and states that start at zero.
    "rwkv": 0.45,
    # What a layer makes is split by the width of the residual stream.
    "focalnet": 0.32,
    # Rotary frequencies are a buffer; norms of all queries keep the heads from being known by name.
    "olmo2": 0.35,
    # The width of a head is a quotient of two attributes, and a grid says where features are read.
    "deformable_detr": 0.53,
    # A single head keeps its queries, keys and values, and not what it reads.
    "pvt_v2": 0.35,
}
FAST = ("xglm_logits",)


class Outputs(torch.nn.Module):
    """A model of which the logits are the output, and the boxes where there are any."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.reads = model.main_input_name

    def forward(self, entering: torch.Tensor, start: torch.Tensor | None = None) -> Any:
        others = {} if start is None else {"decoder_input_ids": start}
        found = self.model(**{self.reads: entering}, **others)
        if not hasattr(found, "logits"):
            return found.last_hidden_state
        return (found.logits, found.pred_boxes) if hasattr(found, "pred_boxes") else found.logits


def _made(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    kind_name, sizes = zoo_transformers.NETS[name]
    torch.manual_seed(0)
    kind = getattr(transformers, kind_name)
    config = kind.config_class(**copy.deepcopy(sizes))  # that of RT-DETR takes keys out of its settings
    config.use_cache = False
    model = nni_topo.as_torch_layers(Outputs(kind(config).eval()))
    with torch.no_grad():
        for each in model.parameters():
            each += 0.1 * torch.randn_like(each)
        for key, each in model.named_buffers():
            if "normalization" in key:  # a frozen norm that does something
                each += 0.3 * torch.rand_like(each)
    if kind.main_input_name == "pixel_values":
        size = 64 if name in ("levit", "sam_vision") or "detr" in name else 32
        return model, (torch.randn(3, 3, size, size),)
    ids = torch.randint(5, 90, (3, 12))
    return model, (ids, ids[:, :7]) if "Conditional" in kind_name else (ids,)


def _run(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    found = model(*inputs)
    return torch.cat([each.flatten() for each in (found if isinstance(found, tuple) else (found,))])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in FAMILIES]
)
@pytest.mark.quick_every(2)
def test_a_pruned_family_computes_what_the_masked_one_does_and_goes_on(name: str, tmp_path: Any) -> None:
    model, inputs = _made(name)
    asked = [{"op_types": ["Linear", "Embedding", "Conv1d", "Conv2d"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(model, inputs, asked)
    masks = nni_topo.RandomPruner(copy.deepcopy(model), groups, seed=0).compress()[1]  # it selects tied channels as one
    dense, reference = nni_topo.to_dense(model, inputs, masks), nni_topo.masked_model(model, inputs, masks)
    left, before = (sum(each.numel() for each in net.parameters()) for net in (dense, model))
    assert left < FAMILIES[name] * before
    with torch.no_grad():
        with ChoicesNoted() as noted:
            expected = _run(reference, inputs)
        with ChoicesRepeated(noted.choices):  # an untrained detector's boxes have equal scores but for rounding
            found = _run(dense, inputs)
        actual = _run(dense, inputs)
    assert float((expected - found).abs().max() / expected.abs().max()) < 1e-5
    nni_topo.save(dense, tmp_path / "dense.safetensors")
    loaded = nni_topo.load(tmp_path / "dense.safetensors", model)
    with torch.no_grad():
        assert torch.equal(_run(loaded, inputs), actual)
    optimizer = torch.optim.SGD(dense.parameters(), 1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = _run(dense, inputs).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
