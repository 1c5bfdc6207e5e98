"""Tiny models of Transformers whose widths meet buffers: pruned, saved, loaded and trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import nni_topo

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIDES = {f"{side}_{key}": size for side in ("encoder", "decoder") for key, size in
         (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
BOTH = {"vocab_size": 50, "d_model": 32, "max_position_embeddings": 32, **SIDES}
DETR = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "num_queries": 6, "d_model": 32,
    **SIDES,
    "backbone_config": {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
                        "out_features": ["stage2"]},
}  # fmt: skip
RT_DETR = {
    "use_pretrained_backbone": False, "d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "encoder_in_channels": [16, 16, 32], "decoder_in_channels": [32] * 3,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "decoder_layers": 1, "num_queries": 6,
    "backbone_config": {"model_type": "rt_detr_resnet", "layer_type": "basic", "embedding_size": 8,
                        "hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4,
                        "out_features": ["stage2", "stage3", "stage4"]},
}  # fmt: skip
SEES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 64,
        "patch_size": 16}  # fmt: skip
# By class: sizes, the share of the parameters that is left at most, and how the name of a layer ends that loses half of
# its channels: what holds the backbone of DETR has another name in each version.
FAMILIES: dict[str, tuple[dict[str, Any], float, str]] = {
    # Sinusoidal positions are a buffer.
    "XGLMForCausalLM": ({"vocab_size": 50, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48,
                         "max_position_embeddings": 32}, 0.35, "model.embed_tokens"),
    "M2M100ForConditionalGeneration": (BOTH, 0.45, "model.encoder.layers.1.fc2"),
    # Biases by position are computed of slopes, one for each head (ALiBi), so the heads stay.
    "BloomForCausalLM": ({"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}, 0.45,
                         "transformer.h.1.mlp.dense_h_to_4h"),
    # One layer makes queries, keys and values, head by head.
    "GPTBigCodeForCausalLM": ({"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
                               "multi_query": False}, 0.35, "transformer.h.1.attn.c_attn"),
    # Biases of the logits are a buffer.
    "PegasusForConditionalGeneration": (BOTH, 0.6, "model.encoder.layers.1.fc2"),
    # Norms of the backbone are buffers.
    "DetrForObjectDetection": (DETR, 0.55, "encoder.stages.1.layers.0.layer.0.convolution"),
    # And which queries there are is up to the scores.
    "RTDetrForObjectDetection": (RT_DETR, 0.4, "model.backbone.model.encoder.stages.1.layers.0.layer.0.convolution"),
    # Attention adds positions to what it reads, or takes the width of its heads from its input.
    "TableTransformerForObjectDetection": (DETR, 0.55, "model.decoder.layers.1.encoder_attn.q_proj"),
    "ConditionalDetrForObjectDetection": (DETR, 0.6, "model.encoder.layers.0.self_attn.v_proj"),
    "OwlViTVisionModel": (SEES, 0.85, "vision_model.encoder.layers.1.self_attn.v_proj"),
    "BlipVisionModel": (SEES, 0.85, "encoder.layers.1.self_attn.qkv"),
    # Heads have biases by position, which LeViT looks up once for evaluation mode.
    "LevitForImageClassification": ({
        "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8], "down_ops": [["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 3, 2, 2, 2]],
    }, 0.35, "levit.encoder.stages.0.layers.0.module.queries_keys_values.linear"),
    "SamVisionModel": ({
        **SEES, "patch_size": 8, "output_channels": 16, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 48,
    }, 0.5, "vision_encoder.layers.1.attn.qkv"),
    "XLNetForSequenceClassification": ({
        "vocab_size": 50, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48,
    }, 0.9, "transformer.word_embedding"),
    # Heads of attention and heads that convolutions make are concatenated.
    "ConvBertForSequenceClassification": ({
        **SIZES, "embedding_size": 32, "conv_kernel_size": 3,
    }, 0.4, "convbert.encoder.layer.1.attention.self.conv_out_layer"),
    # Channels meet a matrix with a row for each, and states that start at zero.
    "MambaForCausalLM": ({
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "use_cache": False,
    }, 0.45, "backbone.layers.1.mixer.in_proj"),
    "RwkvForCausalLM": ({
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 16, "use_cache": False,
    }, 0.45, "rwkv.blocks.1.attention.key"),
    # What a layer makes is split by the width of the residual stream.
    "FocalNetForImageClassification": ({
        "image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2],
        "focal_windows": [3, 3], "hidden_sizes": [16, 32],
    }, 0.45, "focalnet.encoder.stages.0.layers.0.modulation.projection_context"),
    # Rotary frequencies are a buffer; norms of all queries keep the heads from being known by name.
    "Olmo2ForCausalLM": ({
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2,
    }, 0.4, "model.layers.1.self_attn.q_proj"),
    # The width of a head is a quotient of two attributes, and a grid says where features are read.
    "DeformableDetrForObjectDetection": ({
        **DETR, "num_feature_levels": 2,
        "backbone_config": {**DETR["backbone_config"], "out_features": ["stage1", "stage2"]},
    }, 0.55, "encoder.layers.1.self_attn.value_proj"),
    # A single head keeps its queries, keys and values, and not what it reads.
    "PvtV2ForImageClassification": ({
        "image_size": 64, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 2], "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
        "num_hidden_layers": 2,
    }, 0.75, "encoder.layers.0.patch_embedding.proj"),
}  # fmt: skip


FAST = ("XGLMForCausalLM", "BloomForCausalLM")


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
    sizes = FAMILIES[name][0]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = kind.config_class(**copy.deepcopy(sizes))  # that of RT-DETR takes keys out of its settings
    model = nni_topo.as_torch_layers(Outputs(kind(config).eval()))
    with torch.no_grad():
        for each in model.parameters():
            each += 0.1 * torch.randn_like(each)
        for key, each in model.named_buffers():
            if "normalization" in key:  # a frozen norm that does something
                each += 0.3 * torch.rand_like(each)
    if kind.main_input_name == "pixel_values":
        return model, (torch.randn(3, 3, 64, 64),)
    ids = torch.randint(5, 50, (3, 12))
    return model, (ids, ids[:, :7]) if "Conditional" in name else (ids,)


def _run(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    found = model(*inputs)
    return torch.cat([each.flatten() for each in (found if isinstance(found, tuple) else (found,))])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in FAMILIES]
)
@pytest.mark.quick_every(2)
def test_a_pruned_family_computes_what_the_masked_one_does_and_goes_on(name: str, tmp_path: Any) -> None:
    _, most, halved = FAMILIES[name]
    model, inputs = _made(name)
    asked = [{"op_types": ["Linear", "Embedding", "Conv1d", "Conv2d"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(model, inputs, asked)
    masks = nni_topo.RandomPruner(copy.deepcopy(model), groups, seed=0).compress()[1]  # it selects tied channels as one
    dense, reference = nni_topo.to_dense(model, inputs, masks), nni_topo.masked_model(model, inputs, masks)
    left, before = (sum(each.numel() for each in net.parameters()) for net in (dense, model))
    assert left < most * before
    (layer,) = (key for key, _ in model.named_modules() if key.endswith(f".{halved}"))
    wide, narrow = (net.get_submodule(layer).weight for net in (model, dense))
    assert any(2 * small == size for small, size in zip(narrow.shape, wide.shape, strict=True))
    with torch.no_grad():
        expected, actual = _run(reference, inputs), _run(dense, inputs)
    assert float((expected - actual).abs().max() / expected.abs().max()) < 1e-5
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
