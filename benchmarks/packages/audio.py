"""torchaudio: what ``torchaudio.models`` exports and ``test/torchaudio_unittest/models`` builds.

``RNNTBeamSearch`` is a search over the outputs of ``RNNT`` and holds no other layer.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.packages.examples import Build, images, tokens


def classes() -> dict[str, Build]:
    """Return what builds each class with its example."""
    from torchaudio import models

    speech: dict[str, Any] = {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2)],
        "extractor_conv_bias": False,
        "encoder_embed_dim": 32,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 2,
        "encoder_num_heads": 4,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": 64,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.0,
    }
    hubert: dict[str, Any] = {
        "mask_prob": 0.8,
        "mask_selection": "static",
        "mask_other": 0.0,
        "mask_length": 4,
        "no_mask_overlap": False,
        "mask_min_space": 1,
        "mask_channel_prob": 0.0,
        "mask_channel_selection": "static",
        "mask_channel_other": 0.0,
        "mask_channel_length": 4,
        "no_mask_channel_overlap": False,
        "mask_channel_min_space": 1,
        "skip_masked": False,
        "skip_nomask": False,
        "num_classes": 10,
        "final_dim": 16,
        "feature_grad_mult": 0.1,
    }
    rnnt: dict[str, Any] = {
        "input_dim": 16,
        "encoding_dim": 32,
        "num_symbols": 20,
        "segment_length": 4,
        "right_context_length": 1,
        "time_reduction_input_dim": 8,
        "time_reduction_stride": 2,
        "transformer_num_heads": 4,
        "transformer_ffn_dim": 32,
        "transformer_num_layers": 2,
        "transformer_dropout": 0.0,
        "transformer_activation": "relu",
        "transformer_left_context_length": 4,
        "transformer_max_memory_size": 0,
        "transformer_weight_init_scale_strategy": "depthwise",
        "transformer_tanh_on_mem": True,
        "symbol_embedding_dim": 16,
        "num_lstm_layers": 1,
        "lstm_layer_norm": True,
        "lstm_layer_norm_epsilon": 1e-3,
        "lstm_dropout": 0.0,
    }
    lengths = torch.tensor([20, 14])

    def subjective() -> Any:
        features = models.wav2vec2_model(**speech, aux_num_out=None)
        from torchaudio.models.squim.subjective import Predictor, SquimSubjective

        return SquimSubjective(features, torch.nn.Linear(32, 16), Predictor(32, 8))

    return {
        "Conformer": lambda: (
            models.Conformer(32, 4, 64, 2, 7),
            {"input": torch.randn(2, 20, 32), "lengths": lengths},
        ),
        "ConvTasNet": lambda: (models.ConvTasNet(2, 16, 32, 3, 16, 32, 2, 2), torch.randn(2, 1, 400)),
        "DeepSpeech": lambda: (models.DeepSpeech(16, 32, 10), torch.randn(2, 1, 20, 16)),
        "Emformer": lambda: (
            models.Emformer(32, 4, 64, 2, 4, right_context_length=1),
            {"input": torch.randn(2, 21, 32), "lengths": lengths},
        ),
        "HDemucs": lambda: (
            models.HDemucs(["drums", "vocals"], channels=8, nfft=1024, depth=5),
            torch.randn(1, 2, 4096),
        ),
        "HuBERTPretrainModel": lambda: (
            models.hubert_pretrain_model(**speech, **hubert),
            {
                "waveforms": torch.randn(2, 1600),
                "labels": torch.randint(10, (2, 159)),
                "audio_lengths": torch.tensor([1600, 1600]),
            },
        ),
        "RNNT": lambda: (
            models.emformer_rnnt_model(**rnnt),
            {
                "sources": torch.randn(2, 18, 16),
                "source_lengths": torch.tensor([16, 16], dtype=torch.int32),
                "targets": torch.randint(1, 20, (2, 6), dtype=torch.int32),
                "target_lengths": torch.tensor([6, 6], dtype=torch.int32),
            },
        ),
        "SquimObjective": lambda: (
            models.squim_objective_model(
                feat_dim=32,
                win_len=64,
                d_model=32,
                nhead=4,
                hidden_dim=32,
                num_blocks=1,
                rnn_type="LSTM",
                chunk_size=15,
            ),
            torch.randn(2, 2000),
        ),
        "SquimSubjective": lambda: (
            subjective(),
            {"waveform": torch.randn(2, 1600), "reference": torch.randn(2, 1600)},
        ),
        "Tacotron2": lambda: (
            models.Tacotron2(
                n_mels=16,
                n_symbol=50,
                symbol_embedding_dim=32,
                encoder_embedding_dim=32,
                decoder_rnn_dim=32,
                attention_rnn_dim=32,
                attention_hidden_dim=16,
                prenet_dim=16,
                postnet_embedding_dim=32,
            ),
            {
                "tokens": tokens(length=8),
                "token_lengths": torch.tensor([8, 8]),
                "mel_specgram": torch.randn(2, 16, 10),
                "mel_specgram_lengths": torch.tensor([10, 10]),
            },
        ),
        "Wav2Letter": lambda: (models.Wav2Letter(10, "mfcc", 16), torch.randn(2, 16, 60)),
        "Wav2Vec2Model": lambda: (models.wav2vec2_model(**speech, aux_num_out=10), {"waveforms": torch.randn(2, 1600)}),
        "WaveRNN": lambda: (
            models.WaveRNN([2, 2], 16, 4, n_res_block=1, n_rnn=32, n_fc=32, n_freq=16, n_hidden=16, n_output=16),
            {"waveform": torch.randn(2, 1, 24), "specgram": images(1, 1)[:, :, :1].repeat(1, 1, 16, 10)},
        ),
    }
