"""Transformers' thirty most used kinds of model, sentence-transformers, and open_clip.

Transformers: thirty kinds (``model_type``) that are loaded most, by the maintainers' knowledge of the Hub's lists of
downloads and not by a dated listing; each with the task that its checkpoints are mostly used for.
``tests/models/KIND/test_modeling_KIND.py`` builds each small. sentence-transformers: the three kinds of model that it
exports, and the modules of ``sentence_transformers.models`` that hold layers, in the pipeline that its tests build.
open_clip: the networks that it exports, and the parts of a network that ``open_clip.transformer`` and
``open_clip.modified_resnet`` hold, which ``tests/test_inference_simple.py`` builds with them.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.packages.examples import Build, Inputs, images, tokens

WIDTH: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
READS: dict[str, Any] = {**WIDTH, "vocab_size": 100, "max_position_embeddings": 64}
WRITES: dict[str, Any] = {**READS, "num_key_value_heads": 2, "pad_token_id": 0}
SEES: dict[str, Any] = {**WIDTH, "image_size": 32, "patch_size": 8}
HEARS: dict[str, Any] = {
    **WIDTH,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 32,
}
BOTH: dict[str, Any] = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FOUR_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
TRUNK: dict[str, Any] = {"model_type": "resnet", "embedding_size": 8, **FOUR_STAGES, "out_features": ["stage4"]}
PAIR: dict[str, Any] = {"text_config": {**READS, "eos_token_id": 2, "bos_token_id": 1}, "vision_config": SEES}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("AlbertForSequenceClassification", {**READS, "embedding_size": 16}),
    "bart": ("BartForConditionalGeneration", BOTH),
    "bert": ("BertForSequenceClassification", READS),
    "blip": ("BlipForConditionalGeneration", PAIR),
    "clip": ("CLIPModel", {**PAIR, "projection_dim": 16}),
    "convnext": ("ConvNextForImageClassification", {**FOUR_STAGES, "image_size": 32}),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {**READS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "detr": (
        "DetrForObjectDetection",
        {
            **{key: value for key, value in BOTH.items() if key not in ("vocab_size", "max_position_embeddings")},
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": TRUNK,
            "num_queries": 6,
        },
    ),
    "dinov2": ("Dinov2Model", {**SEES, "mlp_ratio": 2}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 100, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    ),
    "electra": ("ElectraForSequenceClassification", {**READS, "embedding_size": 32}),
    "gemma2": ("Gemma2ForCausalLM", {**WRITES, "head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("LlamaForCausalLM", WRITES),
    "marian": ("MarianMTModel", {**BOTH, "decoder_start_token_id": 1}),
    "mistral": ("MistralForCausalLM", WRITES),
    "mpnet": ("MPNetModel", READS),
    "opt": (
        "OPTForCausalLM",
        {**READS, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "phi3": ("Phi3ForCausalLM", {**WRITES, "bos_token_id": 1, "eos_token_id": 2}),
    "qwen2": ("Qwen2ForCausalLM", WRITES),
    "qwen3": ("Qwen3ForCausalLM", {**WRITES, "head_dim": 8}),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}),
    "roberta": ("RobertaForSequenceClassification", {**READS, "pad_token_id": 1}),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [8, 16, 16, 32],
            "depths": [1] * 4,
            "decoder_hidden_size": 16,
            "num_attention_heads": [1, 2, 2, 4],
        },
    ),
    "siglip": ("SiglipModel", PAIR),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "vit": ("ViTForImageClassification", SEES),
    "wav2vec2": ("Wav2Vec2ForCTC", HEARS),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **{key: value for key, value in BOTH.items() if key != "max_position_embeddings"},
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


MLP_WIDTHS = ("intermediate_size", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff")


def widened(sizes: dict[str, Any]) -> dict[str, Any]:
    """Return a config's sizes with MLPs four times as wide as the hidden states, as released models have them."""
    wide = {key: 128 if key in MLP_WIDTHS else value for key, value in sizes.items()}
    wide |= {"mlp_ratio": 4} if "mlp_ratio" in sizes else {}
    return {key: widened(value) if key.endswith("_config") else value for key, value in wide.items()}


def of_transformers(kind: str, *, wide: bool = False) -> tuple[nn.Module, Inputs]:
    """Return a small network with random weights and its inputs."""
    name, sizes = TRANSFORMERS[kind]
    network_class = getattr(importlib.import_module("transformers"), name)
    network = network_class(network_class.config_class(**copy.deepcopy(widened(sizes) if wide else sizes)))
    if hasattr(network.config, "use_cache"):
        network.config.use_cache = False
    ids = tokens(90)
    ids[:, -1] = 2  # where a text ends
    if kind in ("clip", "blip", "siglip"):
        return network, {"input_ids": ids, "pixel_values": images()}
    if kind == "whisper":
        return network, {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids}
    if network.main_input_name == "input_values":
        return network, {"input_values": torch.randn(2, 800)}
    if network.main_input_name == "pixel_values":
        return network, {"pixel_values": images(3, 64 if kind in ("detr", "segformer") else 32)}
    if kind in ("bart", "marian", "t5"):
        return network, {"input_ids": ids, "decoder_input_ids": ids[:, :7]}
    return network, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def transformers_classes() -> dict[str, Build]:
    """Return what builds each of the thirty with its example."""
    return {kind: partial(of_transformers, kind) for kind in TRANSFORMERS}


def wide_transformers_classes() -> dict[str, Build]:
    """Return what builds those of the thirty whose MLPs are narrower than four times the hidden states, with such."""
    narrow = {kind for kind, (_, sizes) in TRANSFORMERS.items() if widened(sizes) != sizes}
    return {kind: partial(of_transformers, kind, wide=True) for kind in TRANSFORMERS if kind in narrow}


def folder_of(kind: str, network_class: str = "") -> str:
    """Return a folder with a small model of Transformers and a tokenizer of a few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tempfile.mkdtemp()
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[MASK]", *map(chr, range(97, 123))])}
    tokenizer = Tokenizer(WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(folder)
    built = getattr(importlib.import_module("transformers"), network_class or kind)
    sizes = {**READS, "vocab_size": len(words)}
    if kind == "CrossEncoder":
        sizes["num_labels"] = 1
    built(built.config_class(**sizes)).save_pretrained(folder)
    return folder


TEXTS = ["a b c d e f", "g h i j"]


def sentence(modules: list[nn.Module]) -> tuple[nn.Module, Inputs]:
    """Return a pipeline of modules with two texts as its tokenizer gives them."""
    from sentence_transformers import SentenceTransformer

    network = SentenceTransformer(modules=modules, device="cpu")
    return network, {"input": dict(network.tokenize(TEXTS))}


def sentence_classes() -> dict[str, Build]:
    """Return what builds each class of sentence-transformers with its example."""
    from sentence_transformers import CrossEncoder, SparseEncoder, models
    from sentence_transformers.models.tokenizer import WhitespaceTokenizer
    from sentence_transformers.sparse_encoder.models import MLMTransformer, SpladePooling

    def encoder() -> Any:
        return models.Transformer(folder_of("BertModel"))

    def vectors() -> Any:
        words = [chr(number) for number in range(97, 123)]
        return models.WordEmbeddings(WhitespaceTokenizer(words, stop_words=[]), torch.randn(26, 32))

    def cross() -> tuple[nn.Module, Inputs]:
        network = CrossEncoder(folder_of("CrossEncoder", "BertForSequenceClassification"), device="cpu")
        return network, {
            "input": dict(network.tokenizer([(TEXTS[0], TEXTS[1])] * 2, padding=True, return_tensors="pt"))
        }

    def sparse() -> tuple[nn.Module, Inputs]:
        network = SparseEncoder(modules=[MLMTransformer(folder_of("BertForMaskedLM")), SpladePooling()], device="cpu")
        return network, {"input": dict(network.tokenize(TEXTS))}

    def pair() -> tuple[nn.Module, Inputs]:
        from PIL import Image
        from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

        config = CLIPModel.config_class(**copy.deepcopy(TRANSFORMERS["clip"][1]))
        folder = tempfile.mkdtemp()
        CLIPModel(config).save_pretrained(folder)
        words = Path(folder, "words.json")
        words.write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}', encoding="utf-8")
        merges = Path(folder, "merges.txt")
        merges.write_text("#version: 0.2", encoding="utf-8")
        pixels = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        CLIPProcessor(pixels, CLIPTokenizer(str(words), str(merges))).save_pretrained(folder)
        network = models.CLIPModel(folder)
        return network, {"features": dict(network.tokenize([Image.new("RGB", (32, 32))] * 2))}

    def routed() -> tuple[nn.Module, Inputs]:
        network = models.Router.for_query_document([encoder(), models.Pooling(32)], [encoder(), models.Pooling(32)])
        return network, {"features": dict(network.tokenize(TEXTS)), "task": "query"}

    return {
        "CrossEncoder": cross,
        "SentenceTransformer": lambda: sentence([encoder(), models.Pooling(32), models.Normalize()]),
        "SparseEncoder": sparse,
        "models.CLIPModel": pair,
        "models.CNN": lambda: sentence([vectors(), models.CNN(32, 32), models.Pooling(96)]),
        "models.Dense": lambda: sentence([encoder(), models.Pooling(32), models.Dense(32, 64), models.Dense(64, 16)]),
        "models.LSTM": lambda: sentence([vectors(), models.LSTM(32, 32, num_layers=2), models.Pooling(64)]),
        "models.LayerNorm": lambda: sentence([encoder(), models.Pooling(32), models.LayerNorm(32)]),
        "models.Router": routed,
        "models.Transformer": lambda: (encoder(), {"features": dict(encoder().tokenize(TEXTS))}),
        "models.WeightedLayerPooling": lambda: sentence(
            [
                models.Transformer(folder_of("BertModel"), config_args={"output_hidden_states": True}),
                models.WeightedLayerPooling(32, num_hidden_layers=2, layer_start=1),
                models.Pooling(32),
            ]
        ),
    }


def clip_classes() -> dict[str, Build]:
    """Return what builds each class of open_clip with its example."""
    import open_clip
    from open_clip import transformer
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel

    text: dict[str, Any] = {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2}
    seen: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8}
    both: Inputs = {"image": images(), "text": tokens(length=16)}
    towers: dict[str, Any] = {"embed_dim": 16, "vision_cfg": seen, "text_cfg": text}
    writer: dict[str, Any] = {"heads": 4, "layers": 2, "width": 32, "context_length": 15}

    def coca() -> tuple[nn.Module, Inputs]:
        words: dict[str, Any] = {**text, "embed_cls": True, "output_tokens": True, "context_length": 15}
        pooled: dict[str, Any] = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 16}
        network = open_clip.CoCa(32, writer, words, {**seen, **pooled, "output_tokens": True})
        # The class leaves it as the memory was, because weights are loaded afterwards.
        nn.init.normal_(network.text_decoder.text_projection, std=32**-0.5)
        return network, {"image": images(), "text": tokens(length=15)}

    return {
        "CLIP": lambda: (open_clip.CLIP(**towers), both),
        "CoCa": coca,
        "CustomTextCLIP": lambda: (open_clip.CustomTextCLIP(**towers), both),
        "ModifiedResNet": lambda: (ModifiedResNet([1, 1, 1, 1], 16, 4, 32, 8), images(3, 32)),
        "TextTransformer": lambda: (
            transformer.TextTransformer(16, 60, 32, 4, 2, output_dim=16),
            tokens(length=16),
        ),
        "TimmModel": lambda: (TimmModel("test_vit", 16, image_size=64, pretrained=False), images(3, 64)),
        "VisionTransformer": lambda: (
            transformer.VisionTransformer(32, 8, 32, 2, 4, 2.0, output_dim=16),
            images(),
        ),
    }
