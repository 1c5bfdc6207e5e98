"""diffusers: U-Nets and autoencoders that ``tests/models`` builds, and the transformers of ten pipelines.

The modules are ``diffusers.models.unets`` (with ``UNetControlNetXSModel``, which is tested with them),
``diffusers.models.autoencoders``, and of ``diffusers.models.transformers`` the files ``auraflow_transformer_2d``,
``cogvideox_transformer_3d``, ``dit_transformer_2d``, ``pixart_transformer_2d``, ``prior_transformer``,
``sana_transformer``, ``transformer_flux``, ``transformer_ltx``, ``transformer_sd3`` and ``transformer_wan``. The tests
don't build the U-Nets of DreamLite, Kandinsky 3, I2VGen and Stable Cascade, ``UVit2DModel``, and the autoencoders of
Allegro, Flux 2, HunyuanImage, HunyuanVideo 1.5, LongCat and Qwen; ``MotionAdapter`` is no network by itself. Sizes are
those of the tests or near them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.packages.examples import Build, Inputs, images

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
TIME = torch.tensor([10])
TWO_STAGES: dict[str, Any] = {
    "down_block_types": (DOWN, DOWN),
    "up_block_types": (UP, UP),
    "block_out_channels": (8, 16),
    "latent_channels": 4,
    "norm_num_groups": 4,
}
CROSS: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "sample_size": 16,
}
FOUR: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "latent_channels": 4}
LTX: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "decoder_inject_noise": (False,) * 5,
    "upsample_residual": (False,) * 4,
    "upsample_factor": (1,) * 4,
    "patch_size": 1,
    "patch_size_t": 1,
}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}


def film(channels: int = 3, frames: int = 9, size: int = 16, batch: int = 1) -> Tensor:
    """Return random films, ``(batch, channels, frames, size, size)``."""
    return torch.randn(batch, channels, frames, size, size)


def classes() -> dict[str, Build]:
    """Return what builds each class with its example."""
    import diffusers

    def net(name: str, inputs: dict[str, Any], sizes: dict[str, Any]) -> tuple[nn.Module, Inputs]:
        network: nn.Module = getattr(diffusers, name)(**sizes)
        return network, inputs

    text = torch.randn(2, 4, 8)
    unets: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "UNet1DModel": (
            {"sample": torch.randn(2, 14, 16), "timestep": torch.tensor([10, 10])},
            {
                "block_out_channels": (8, 8, 16, 16),
                "in_channels": 14,
                "out_channels": 14,
                "time_embedding_type": "positional",
                "use_timestep_embedding": True,
                "flip_sin_to_cos": False,
                "freq_shift": 1.0,
                "out_block_type": "OutConv1DBlock",
                "mid_block_type": "MidResTemporalBlock1D",
                "down_block_types": ("DownResnetBlock1D",) * 4,
                "up_block_types": ("UpResnetBlock1D",) * 3,
                "act_fn": "swish",
            },
        ),
        "UNet2DModel": (
            {"sample": images(), "timestep": TIME},
            {
                "block_out_channels": (8, 16),
                "norm_num_groups": 4,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": 4,
                "sample_size": 32,
            },
        ),
        "UNet2DConditionModel": (
            {"sample": images(4, 16), "timestep": TIME, "encoder_hidden_states": text},
            {
                **CROSS,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            },
        ),
        "UNet3DConditionModel": (
            {"sample": film(4, 4, batch=2), "timestep": TIME, "encoder_hidden_states": text},
            {
                **CROSS,
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            },
        ),
        "UNetControlNetXSModel": (
            {
                "sample": images(4, 16),
                "timestep": TIME,
                "encoder_hidden_states": text,
                "controlnet_cond": images(3, 32),
                "conditioning_scale": 1,
            },
            {
                "sample_size": 16,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "block_out_channels": (8, 16),
                "cross_attention_dim": 8,
                "transformer_layers_per_block": 1,
                "num_attention_heads": 2,
                "norm_num_groups": 4,
                "upcast_attention": False,
                "ctrl_block_out_channels": [4, 8],
                "ctrl_num_attention_heads": 4,
                "ctrl_max_norm_num_groups": 2,
                "ctrl_conditioning_embedding_out_channels": (4, 4),
            },
        ),
        "UNetMotionModel": (
            {"sample": film(4, 4, batch=2), "timestep": TIME, "encoder_hidden_states": torch.randn(8, 4, 16)},
            {
                "block_out_channels": (16, 32),
                "norm_num_groups": 16,
                "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
                "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
                "cross_attention_dim": 16,
                "num_attention_heads": 2,
                "layers_per_block": 1,
                "sample_size": 16,
            },
        ),
        "UNetSpatioTemporalConditionModel": (
            {
                "sample": torch.randn(2, 2, 4, 16, 16),
                "timestep": TIME,
                "encoder_hidden_states": torch.randn(2, 1, 32),
                "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]] * 2),
            },
            {
                "block_out_channels": (32, 64),
                "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
                "cross_attention_dim": 32,
                "num_attention_heads": 8,
                "in_channels": 4,
                "layers_per_block": 1,
                "sample_size": 16,
                "addition_time_embed_dim": 32,
                "projection_class_embeddings_input_dim": 96,
            },
        ),
    }
    autoencoders: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "AsymmetricAutoencoderKL": (
            {"sample": images(), "mask": torch.ones(2, 1, 32, 32)},
            {
                "down_block_types": (DOWN, DOWN),
                "down_block_out_channels": (8, 16),
                "up_block_types": (UP, UP),
                "up_block_out_channels": (8, 16),
                "latent_channels": 4,
                "norm_num_groups": 4,
            },
        ),
        "AutoencoderDC": (
            {"sample": images()},
            {
                "latent_channels": 4,
                "attention_head_dim": 4,
                "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
                "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
                "encoder_block_out_channels": (16, 16),
                "decoder_block_out_channels": (16, 16),
                "encoder_qkv_multiscales": ((), (5,)),
                "decoder_qkv_multiscales": ((), (5,)),
                "encoder_layers_per_block": (1, 1),
                "decoder_layers_per_block": (1, 1),
                "downsample_block_type": "conv",
                "upsample_block_type": "interpolate",
            },
        ),
        "AutoencoderKL": ({"sample": images()}, TWO_STAGES),
        "AutoencoderKLCogVideoX": (
            {"sample": film(frames=8)},
            {
                **FOUR,
                "down_block_types": ("CogVideoXDownBlock3D",) * 4,
                "up_block_types": ("CogVideoXUpBlock3D",) * 4,
                "block_out_channels": (8, 8, 8, 8),
                "layers_per_block": 1,
                "norm_num_groups": 2,
                "temporal_compression_ratio": 4,
            },
        ),
        "AutoencoderKLCosmos": (
            {"sample": film(size=32)},
            {
                **FOUR,
                "encoder_block_out_channels": (8, 8, 8, 8),
                "decode_block_out_channels": (8, 8, 8, 8),
                "attention_resolutions": (8,),
                "resolution": 64,
                "num_layers": 2,
                "patch_size": 4,
                "spatial_compression_ratio": 4,
                "temporal_compression_ratio": 4,
            },
        ),
        "AutoencoderKLHunyuanVideo": (
            {"sample": film()},
            {
                **FOUR,
                "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
                "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
                "block_out_channels": (8, 8, 8, 8),
                "layers_per_block": 1,
                "norm_num_groups": 4,
            },
        ),
        "AutoencoderKLKVAE": (
            {"sample": images()},
            {
                "channels": 32,
                "num_enc_blocks": 1,
                "num_dec_blocks": 1,
                "z_channels": 4,
                "ch_mult": (1, 2),
                "sample_size": 32,
            },
        ),
        "AutoencoderKLKVAEVideo": (
            {"sample": film(frames=3)},
            {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 2},
        ),
        "AutoencoderKLLTX2Audio": (
            {"sample": torch.randn(2, 2, 8, 16)},
            {
                "latent_channels": 4,
                "base_channels": 16,
                "ch_mult": (1, 2, 4),
                "resolution": 16,
                "num_res_blocks": 1,
                "mel_bins": 16,
            },
        ),
        "AutoencoderKLLTX2Video": (
            {"sample": film()},
            {
                "latent_channels": 8,
                "block_out_channels": (8, 8, 8, 8),
                "decoder_block_out_channels": (16, 32, 64),
                "layers_per_block": (1, 1, 1, 1, 1),
                "decoder_layers_per_block": (1, 1, 1, 1),
                "patch_size": 1,
                "patch_size_t": 1,
            },
        ),
        "AutoencoderKLLTXVideo": ({"sample": film()}, LTX),
        "AutoencoderKLMagvit": (
            {"sample": film()},
            {
                **FOUR,
                "block_out_channels": [8, 8, 8, 8],
                "down_block_types": ["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3],
                "up_block_types": ["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3],
                "layers_per_block": 1,
                "norm_num_groups": 8,
            },
        ),
        "AutoencoderKLMochi": (
            {"sample": film(frames=7)},
            {
                "latent_channels": 4,
                "encoder_block_out_channels": (32, 32, 32, 32),
                "decoder_block_out_channels": (32, 32, 32, 32),
                "layers_per_block": (1, 1, 1, 1, 1),
            },
        ),
        "AutoencoderKLTemporalDecoder": (
            {"sample": images(batch=3), "num_frames": 3},
            {
                "block_out_channels": [32, 64],
                "down_block_types": [DOWN, DOWN],
                "latent_channels": 4,
                "layers_per_block": 1,
            },
        ),
        "AutoencoderKLWan": (
            {"sample": film()},
            {
                "base_dim": 8,
                "z_dim": 4,
                "dim_mult": [1, 1, 1, 1],
                "num_res_blocks": 1,
                "temperal_downsample": [False, True, True],
            },
        ),
        "AutoencoderOobleck": (
            {"sample": torch.randn(2, 2, 24), "sample_posterior": False},
            {
                "encoder_hidden_size": 12,
                "decoder_channels": 12,
                "decoder_input_channels": 6,
                "audio_channels": 2,
                "downsampling_ratios": [2, 4],
                "channel_multiples": [1, 2],
            },
        ),
        "AutoencoderTiny": (
            {"sample": images()},
            {
                "encoder_block_out_channels": (16, 16),
                "decoder_block_out_channels": (16, 16),
                "num_encoder_blocks": (1, 1),
                "num_decoder_blocks": (1, 1),
            },
        ),
        "AutoencoderVidTok": (
            {"sample": film(frames=4)},
            {
                "ch": 32,
                "ch_mult": [1, 2],
                "z_channels": 4,
                "num_res_blocks": 1,
                "regularizer": "kl",
                "is_causal": False,
            },
        ),
        "ConsistencyDecoderVAE": (
            {"sample": images()},
            {
                "encoder_block_out_channels": (8, 16),
                "encoder_down_block_types": (DOWN, DOWN),
                "encoder_norm_num_groups": 4,
                "decoder_add_attention": False,
                "decoder_block_out_channels": (8, 16),
                "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
                "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
                "decoder_layers_per_block": 1,
                "decoder_norm_num_groups": 4,
                "latent_channels": 4,
            },
        ),
        "Cosmos3AVAEAudioTokenizer": (
            {"sample": torch.randn(2, 2, 64)},
            {
                "sampling_rate": 16,
                "hop_size": 4,
                "input_channels": 1,
                "enc_dim": 8,
                "enc_num_blocks": 1,
                "enc_n_fft": 8,
                "enc_hop_length": 2,
                "enc_latent_dim": 8,
                "enc_c_mults": (1,),
                "enc_strides": (2,),
                "vocoder_input_dim": 4,
                "dec_dim": 8,
                "dec_c_mults": (1, 2),
                "dec_strides": (2, 2),
            },
        ),
        "AutoencoderRAE": (
            {"sample": images()},
            {
                "encoder_type": "mae",
                "encoder_hidden_size": 32,
                "encoder_num_hidden_layers": 2,
                "encoder_patch_size": 8,
                "encoder_input_size": 32,
                "patch_size": 4,
                "image_size": 16,
                "decoder_hidden_size": 32,
                "decoder_num_hidden_layers": 1,
                "decoder_num_attention_heads": 4,
                "decoder_intermediate_size": 64,
            },
        ),
        "VQModel": ({"sample": images()}, {**TWO_STAGES, "latent_channels": 3}),
    }
    latents = images(4, 8)
    prompt: dict[str, Any] = {"hidden_states": latents, "encoder_hidden_states": torch.randn(2, 6, 16)}
    transformers: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "AuraFlowTransformer2DModel": (
            {**prompt, "timestep": torch.tensor([0.5, 0.5])},
            {
                "sample_size": 8,
                "patch_size": 2,
                "num_mmdit_layers": 1,
                "num_single_dit_layers": 1,
                "attention_head_dim": 8,
                "num_attention_heads": 4,
                "caption_projection_dim": 32,
                "joint_attention_dim": 16,
                "out_channels": 4,
                "pos_embed_max_size": 64,
            },
        ),
        "CogVideoXTransformer3DModel": (
            {
                "hidden_states": torch.randn(1, 2, 4, 8, 8),
                "encoder_hidden_states": torch.randn(1, 6, 16),
                "timestep": TIME,
            },
            {
                **HEADS,
                "in_channels": 4,
                "out_channels": 4,
                "time_embed_dim": 8,
                "text_embed_dim": 16,
                "sample_width": 8,
                "sample_height": 8,
                "sample_frames": 8,
                "patch_size": 2,
                "temporal_compression_ratio": 4,
                "max_text_seq_length": 6,
            },
        ),
        "DiTTransformer2DModel": (
            {"hidden_states": latents, "timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([3, 4])},
            {**HEADS, "in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2, "norm_num_groups": 4},
        ),
        "FluxTransformer2DModel": (
            {
                "hidden_states": torch.randn(2, 16, 4),
                "encoder_hidden_states": torch.randn(2, 6, 32),
                "pooled_projections": torch.randn(2, 32),
                "timestep": torch.tensor([0.5, 0.5]),
                "img_ids": torch.randn(16, 3),
                "txt_ids": torch.randn(6, 3),
            },
            {
                "patch_size": 1,
                "in_channels": 4,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 32,
                "axes_dims_rope": (4, 4, 8),
            },
        ),
        "LTXVideoTransformer3DModel": (
            {
                "hidden_states": torch.randn(2, 32, 4),
                "encoder_hidden_states": torch.randn(2, 6, 16),
                "timestep": torch.tensor([500, 500]),
                "encoder_attention_mask": torch.ones(2, 6),
                "num_frames": 2,
                "height": 4,
                "width": 4,
            },
            {
                **HEADS,
                "in_channels": 4,
                "out_channels": 4,
                "cross_attention_dim": 32,
                "caption_channels": 16,
            },
        ),
        "PixArtTransformer2DModel": (
            {
                **prompt,
                "timestep": torch.tensor([1, 2]),
                "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
            },
            {
                **HEADS,
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 8,
                "cross_attention_dim": 32,
                "caption_channels": 16,
                "use_additional_conditions": False,
            },
        ),
        "PriorTransformer": (
            {
                "hidden_states": torch.randn(2, 16),
                "timestep": 2,
                "proj_embedding": torch.randn(2, 16),
                "encoder_hidden_states": torch.randn(2, 7, 16),
            },
            {**HEADS, "embedding_dim": 16, "num_embeddings": 7, "additional_embeddings": 4},
        ),
        "SanaTransformer2DModel": (
            {**prompt, "timestep": torch.tensor([1, 2])},
            {
                **HEADS,
                "patch_size": 1,
                "in_channels": 4,
                "out_channels": 4,
                "num_cross_attention_heads": 4,
                "cross_attention_head_dim": 8,
                "cross_attention_dim": 32,
                "caption_channels": 16,
                "sample_size": 8,
            },
        ),
        "SD3Transformer2DModel": (
            {
                **prompt,
                "pooled_projections": torch.randn(2, 64),
                "timestep": torch.tensor([1, 2]),
            },
            {
                **HEADS,
                "sample_size": 8,
                "patch_size": 1,
                "in_channels": 4,
                "out_channels": 4,
                "joint_attention_dim": 16,
                "caption_projection_dim": 32,
                "pooled_projection_dim": 64,
                "pos_embed_max_size": 64,
            },
        ),
        "WanTransformer3DModel": (
            {
                "hidden_states": film(4, 2, 16),
                "timestep": TIME,
                "encoder_hidden_states": torch.randn(1, 6, 16),
            },
            {
                "patch_size": (1, 2, 2),
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "in_channels": 4,
                "out_channels": 4,
                "text_dim": 16,
                "freq_dim": 64,
                "ffn_dim": 32,
                "num_layers": 2,
                "cross_attn_norm": True,
                "qk_norm": "rms_norm_across_heads",
                "rope_max_seq_len": 32,
            },
        ),
    }
    return {
        name: partial(net, name, inputs, sizes)
        for name, (inputs, sizes) in {**unets, **autoencoders, **transformers}.items()
    }
