"""Tiny networks of Transformers for `zoo`, with random weights: by name the class, its config, and what enters."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SEES = {**WIDTH, "image_size": 32, "patch_size": 8}
READS = {**WIDTH, "vocab_size": 100, "max_position_embeddings": 64}
SHARES = {**READS, "num_key_value_heads": 2}
WRITES = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}
BOTH = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
        (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
HEARS = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1], "image_size": 32}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}

STAGE = {"model_type": "resnet", **RESNET, "out_features": ["stage2"]}
FOUR_STAGES = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4,
               "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
FINDS = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 32,
         "num_queries": 6, **BOTH}  # fmt: skip

NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", READS),
    "roberta": ("RobertaForSequenceClassification", READS),
    "distilbert": ("DistilBertForSequenceClassification", {"vocab_size": 100, "dim": 32, "hidden_dim": 64,
                                                           "n_layers": 2, "n_heads": 4}),
    "electra": ("ElectraForSequenceClassification", {**READS, "embedding_size": 32}),
    "albert": ("AlbertForSequenceClassification", {**READS, "embedding_size": 16}),
    "deberta_v2": ("DebertaV2ForSequenceClassification", READS),
    "deberta_v3": ("DebertaV2ForSequenceClassification", {
        **READS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "position_buckets": 8, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0}),
    "mpnet": ("MPNetForSequenceClassification", READS),
    "modernbert": ("ModernBertForSequenceClassification", {**READS, **TOKENS}),
    "xlnet": ("XLNetForSequenceClassification", {"vocab_size": 100, "d_model": 32, "n_layer": 2, "n_head": 4,
                                                 "d_inner": 64}),
    "fnet": ("FNetForSequenceClassification", {**READS}),
    "t5": ("T5ForSequenceClassification", {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
                                           "num_heads": 4, "eos_token_id": 2, "decoder_start_token_id": 0}),
    "t5_logits": ("T5ForConditionalGeneration", {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64,
                                                 "num_layers": 2, "num_heads": 4}),
    "bart_logits": ("BartForConditionalGeneration", {"vocab_size": 100, "d_model": 32, "max_position_embeddings": 64,
                                                     **BOTH}),
    "marian_logits": ("MarianMTModel", {"vocab_size": 100, "d_model": 32, "max_position_embeddings": 64,
                                        "pad_token_id": 0, "decoder_start_token_id": 1, **BOTH}),
    "bart": ("BartForSequenceClassification", {"vocab_size": 100, "d_model": 32, "max_position_embeddings": 64,
                                               **BOTH}),
    "gpt_neo": ("GPTNeoForCausalLM", {"vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                                      "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", READS),
    "gpt2": ("GPT2LMHeadModel", WRITES),
    "gptj": ("GPTJForCausalLM", {**WRITES, "rotary_dim": 4}),
    "codegen": ("CodeGenForCausalLM", {**WRITES, "rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("OPTForCausalLM", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                               "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "llama": ("LlamaForCausalLM", SHARES),
    "mistral": ("MistralForCausalLM", SHARES),
    "qwen2": ("Qwen2ForCausalLM", SHARES),
    "qwen3": ("Qwen3ForCausalLM", {**SHARES, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", {**SHARES, "head_dim": 8}),
    "phi": ("PhiForCausalLM", READS),
    "stablelm": ("StableLmForCausalLM", SHARES),
    "cohere": ("CohereForCausalLM", {**SHARES, **TOKENS}),
    "phi3": ("Phi3ForCausalLM", {**SHARES, **TOKENS}),
    "glm": ("GlmForCausalLM", {**SHARES, "head_dim": 8, "pad_token_id": 0}),
    "starcoder2": ("Starcoder2ForCausalLM", SHARES),
    "falcon": ("FalconForCausalLM", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2,
                                     "num_attention_heads": 4}),
    "mixtral": ("MixtralForCausalLM", {**SHARES, "num_local_experts": 2, "experts_implementation": "eager"}),
    "mamba": ("MambaForCausalLM", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "vit": ("ViTForImageClassification", SEES),
    "deit": ("DeiTForImageClassification", SEES),
    "beit": ("BeitForImageClassification", SEES),
    "dinov2": ("Dinov2ForImageClassification", {**SEES, "mlp_ratio": 2}),
    "vit_mae": ("ViTMAEModel", SEES),
    "yolos": ("YolosForObjectDetection", {**SEES, "image_size": [32, 32]}),
    "clip_vision": ("CLIPVisionModelWithProjection", {**SEES, "projection_dim": 16}),
    "clip_text": ("CLIPTextModelWithProjection", {**READS, "projection_dim": 16, "eos_token_id": 2}),
    "siglip_vision": ("SiglipVisionModel", SEES),
    "swin": ("SwinForImageClassification", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1],
                                            "num_heads": [2, 4], "window_size": 4}),
    "segformer": ("SegformerForSemanticSegmentation", {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
        "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "decoder_hidden_size": 32}),
    "convnext": ("ConvNextForImageClassification", STAGES),
    "poolformer": ("PoolFormerForImageClassification", {key: STAGES[key] for key in ("hidden_sizes", "depths")}),
    "resnet": ("ResNetForImageClassification", RESNET),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", {**WIDTH, **HEARS, "vocab_size": 32}),
    "whisper": ("WhisperForAudioClassification", {"d_model": 32, "num_mel_bins": 16, "max_source_positions": 20,
                                                  "vocab_size": 100, "pad_token_id": 0, **BOTH}),
    "ast": ("ASTForAudioClassification", {**WIDTH, "patch_size": 8, "frequency_stride": 8, "time_stride": 8,
                                          "max_length": 32, "num_mel_bins": 16}),
    "rwkv": ("RwkvForCausalLM", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 16}),
    "detr": ("DetrForObjectDetection", {**FINDS, "backbone_config": STAGE}),
    "rt_detr": ("RTDetrForObjectDetection", {
        "use_pretrained_backbone": False, "d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 48,
        "encoder_attention_heads": 4, "encoder_in_channels": [16, 16, 32], "decoder_in_channels": [32] * 3,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "decoder_layers": 1, "num_queries": 6,
        "backbone_config": {"model_type": "rt_detr_resnet", "layer_type": "basic", "embedding_size": 8,
                            "hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4,
                            "out_features": ["stage2", "stage3", "stage4"]}}),
    "levit": ("LevitForImageClassification", {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8], "down_ops": [["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 3, 2, 2, 2]]}),
    "sam_vision": ("SamVisionModel", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                                      "image_size": 64, "patch_size": 8, "output_channels": 16, "window_size": 4,
                                      "global_attn_indexes": [1], "mlp_dim": 64}),
    "olmo": ("OlmoForCausalLM", {**SHARES, "pad_token_id": 0, "eos_token_id": 2}),
    "olmo2": ("Olmo2ForCausalLM", {**SHARES, "pad_token_id": 0, "eos_token_id": 2}),
    "nemotron": ("NemotronForCausalLM", {**SHARES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "mpt": ("MptForCausalLM", {"vocab_size": 100, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {**WRITES, "pad_token_id": 0, "eos_token_id": 2}),
    "gemma": ("GemmaForCausalLM", {**SHARES, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}),
    "xglm_logits": ("XGLMForCausalLM", {"vocab_size": 100, "d_model": 32, "num_layers": 2, "attention_heads": 4,
                                        "ffn_dim": 64, "max_position_embeddings": 64}),
    "m2m100_logits": ("M2M100ForConditionalGeneration", {"vocab_size": 100, "d_model": 32,
                                                         "max_position_embeddings": 64, **BOTH}),
    "pegasus_logits": ("PegasusForConditionalGeneration", {"vocab_size": 100, "d_model": 32,
                                                           "max_position_embeddings": 64, **BOTH}),
    "convbert": ("ConvBertForSequenceClassification", {**READS, "embedding_size": 32, "conv_kernel_size": 3}),
    "squeezebert": ("SqueezeBertForSequenceClassification", {**READS, "embedding_size": 32}),
    "nystromformer": ("NystromformerForSequenceClassification", {**READS, "num_landmarks": 4,
                                                  "segment_means_seq_len": 12,
                                                                 "conv_kernel_size": 3}),
    "funnel": ("FunnelForSequenceClassification", {"vocab_size": 100, "d_model": 32, "n_head": 4, "d_head": 8,
                                                   "d_inner": 64, "block_sizes": [1, 1]}),
    "dpt": ("DPTForSemanticSegmentation", {**SEES, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
                                           "neck_hidden_sizes": [8, 16, 32, 32], "fusion_hidden_size": 16,
                                           "use_auxiliary_head": False}),
    "pvt": ("PvtForImageClassification", {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1],
                                          "sequence_reduction_ratios": [2, 1], "hidden_sizes": [16, 32],
                                          "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2],
                                          "mlp_ratios": [2, 2]}),
    "pvt_v2": ("PvtV2ForImageClassification", {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1],
                                               "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
                                               "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
                                               "num_hidden_layers": 2}),
    "focalnet": ("FocalNetForImageClassification", {"image_size": 32, "patch_size": 2, "embed_dim": 16,
                                                    "depths": [1, 1], "focal_levels": [2, 2],
                                                    "focal_windows": [3, 3], "hidden_sizes": [16, 32]}),
    "conditional_detr": ("ConditionalDetrForObjectDetection", {**FINDS, "backbone_config": STAGE}),
    "deformable_detr": ("DeformableDetrForObjectDetection", {**FINDS, "backbone_config": FOUR_STAGES}),
    "dab_detr": ("DabDetrForObjectDetection", {**FINDS, "hidden_size": 32, "backbone_config": FOUR_STAGES}),
    "mask2former": ("Mask2FormerForUniversalSegmentation", {
        "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 48,
        "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 4, "dim_feedforward": 48, "num_queries": 5,
        "use_pretrained_backbone": False,
        "backbone_config": {"model_type": "swin", "image_size": 64, "embed_dim": 16, "depths": [1] * 4,
                            "num_heads": [2, 2, 4, 4], "window_size": 4,
                            "out_features": ["stage1", "stage2", "stage3", "stage4"]}}),
    "owlvit_vision": ("OwlViTVisionModel", SEES),
    "blip_vision": ("BlipVisionModel", SEES),
    "vitdet": ("VitDetBackbone", {**SEES, "pretrain_image_size": 32, "window_size": 2, "window_block_indices": [0],
                                  "residual_block_indices": [1], "mlp_ratio": 2,
                                  "use_relative_position_embeddings": True, "out_features": ["stage2"]}),
    "hiera": ("HieraForImageClassification", {
        "embed_dim": 16, "image_size": [32, 32], "patch_size": [4, 4], "patch_stride": [4, 4], "patch_padding": [0, 0],
        "depths": [1, 1], "num_heads": [1, 2], "query_stride": [2, 2], "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, False], "num_query_pool": 1, "mlp_ratio": 2.0}),
    "swinv2": ("Swinv2ForImageClassification", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1],
                                                "num_heads": [2, 4], "window_size": 4}),
    "mobilevit": ("MobileViTForImageClassification", {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
        "num_attention_heads": 4}),
    "mamba2": ("Mamba2ForCausalLM", {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
                                     "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {
        **READS, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1,
        "first_k_dense_replace": 2, "pad_token_id": 0}),
    "longformer": ("LongformerForSequenceClassification", {**READS, "attention_window": 4, "pad_token_id": 0}),
}  # fmt: skip


class Logits(nn.Module):
    """A model that reads and writes, of which what its encoder makes is no output."""

    main_input_name = "input_ids"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor) -> Tensor:
        """Write along with what it reads."""
        logits: Tensor = self.model(input_ids=input_ids, decoder_input_ids=input_ids[:, :7]).logits
        return logits


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Make a network in evaluation mode, of PyTorch's layers where it can be, and its input."""
    kind, sizes = NETS[name]
    build = getattr(importlib.import_module("transformers"), kind)
    model: Any = build(build.config_class(**copy.deepcopy(sizes))).eval()  # some configs take keys out of theirs
    model = nni_topo.as_torch_layers(Logits(model) if name.endswith("_logits") else model)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    entering, drawing = model.main_input_name, torch.Generator().manual_seed(0)
    if entering == "input_ids":
        ids = torch.randint(5, 90, (2, 12), generator=drawing)
        ids[:, -1] = 2  # where a text ends
        return model, {entering: ids}
    shape = {"wav2vec2": (2, 800), "whisper": (2, 16, 40), "ast": (2, 32, 16)}.get(name)
    if shape is None:
        size = 64 if name in ("sam_vision", "levit", "mobilevit", "mask2former") or "detr" in name else 32
        shape = (2, 3, size, size)
    return model, {entering: torch.randn(*shape, generator=drawing)}
