"""Models of Transformers that `shrink` makes smaller with nothing but a budget, loaded by from_pretrained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers_nets import transformers

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.testing import require_unchanged, snapshot

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = {**SIZES, "vocab_size": 40, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
SHARED = {**TEXTS, "num_key_value_heads": 2}
IMAGES = {**SIZES, "image_size": 32, "patch_size": 8}
DISTIL = {"vocab_size": 40, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 24}
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0}  # fmt: skip
WHISPER = {
    "vocab_size": 40, "num_mel_bins": 8, "d_model": 32, "max_source_positions": 16, "max_target_positions": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    **{f"{side}_{key}": size for side in ("encoder", "decoder")
       for key, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))},
}  # fmt: skip
# By class: its config, and whether the config of every version of Transformers can say that there are fewer heads.
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "BertForSequenceClassification": ("BertConfig", TEXTS, False),
    "BertForMaskedLM": ("BertConfig", TEXTS, False),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTIL, False),
    "ElectraForSequenceClassification": ("ElectraConfig", {**TEXTS, "embedding_size": 16}, False),
    "ViTForImageClassification": ("ViTConfig", IMAGES, False),
    "LlamaForCausalLM": ("LlamaConfig", SHARED, True),
    "Qwen2ForCausalLM": ("Qwen2Config", SHARED, True),
    "GPT2LMHeadModel": ("GPT2Config", GPT2, False),
    "T5ForConditionalGeneration": ("T5Config", T5, True),
    "WhisperForConditionalGeneration": ("WhisperConfig", WHISPER, False),
}
QUICK = {"BertForSequenceClassification": "params", "LlamaForCausalLM": "flops", "GPT2LMHeadModel": "params"}
FAST: dict[str, Any] = {"pruner": "l1", "compensate": None, "distill": False}


def make(name: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config, given, _ = MODELS[name]
    return getattr(transformers, name)(getattr(transformers, config)(**{**given, **sizes})).eval()


def inputs_of(name: str, samples: int = 32, places: int = 10) -> dict[str, torch.Tensor]:
    drawing = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (samples, places), generator=drawing)
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(samples, 3, 32, 32, generator=drawing)}
    if name.startswith("Whisper"):
        return {"input_features": torch.randn(samples, 8, 32, generator=drawing), "decoder_input_ids": ids[:, :6]}
    return {"input_ids": ids, "decoder_input_ids": ids[:, :6]} if name.startswith("T5") else {"input_ids": ids}


def batches_of(name: str, **more: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    inputs = {**inputs_of(name), **more}
    return [{key: value[at : at + 16] for key, value in inputs.items()} for at in (0, 16)]


def shrunk(name: str, budget: dict[str, Any], **knobs: Any) -> Any:
    return nni_topo.shrink(make(name), batches_of(name), budget, **{**FAST, **knobs})


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


def saved_by_trainer(model: Any, folder: Path) -> None:
    pytest.importorskip("accelerate")
    settings = transformers.TrainingArguments(str(folder), report_to=[], use_cpu=True)
    transformers.Trainer(model, settings).save_model(str(folder))


WAYS: dict[str, Callable[[Any, Path], None]] = {
    "nni_topo": nni_topo.save_pretrained,
    "own": lambda model, folder: model.save_pretrained(folder),
    "trainer": saved_by_trainer,
}


CASES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in MODELS]


@pytest.mark.parametrize("name", CASES)
def test_half_of_a_model_loads_by_from_pretrained(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, cost = make(name), QUICK.get(name, "params")
    before = snapshot(model)
    knobs = FAST if name in QUICK else {"distill": False}
    with caplog.at_level(logging.WARNING, "nni_topo"):
        small: Any = nni_topo.shrink(model, batches_of(name), {cost: 0.5}, **knobs)
    require_unchanged(before, model)
    outcome = small.report.budget
    assert type(small) is type(model)
    assert outcome.left < 0.85
    if not outcome.is_met:  # these networks are small beside what stays: the share that can be reached is told first
        reached = f"{outcome.left:.4g} can be reached"
        ours = [record.getMessage() for record in caplog.records if record.name.startswith("nni_topo")]
        assert reached in ours[0]
        assert any(reached in warning for warning in small.report.warnings)
    assert outcome.is_met or not MODELS[name][2]
    assert small.report.undescribed == ""
    for way, save in WAYS.items():
        save(small, tmp_path / way)
        again = type(model).from_pretrained(tmp_path / way)
        for samples, places in ((4, 10), (3, 13)):
            inputs = inputs_of(name, samples, places)
            assert torch.equal(logits(again, inputs), logits(small, inputs)), way
    nni_topo.save(small, tmp_path / "small.pt")
    assert torch.equal(logits(nni_topo.load(tmp_path / "small.pt", model), inputs), logits(small, inputs))


@pytest.mark.slow
def test_layers_that_a_config_gives_no_width_of_their_own_stay_whole() -> None:
    small = shrunk("BertForSequenceClassification", {"params": 0.9})
    assert {small.get_submodule(name).out_features for name in small.report.pruned_layers} == {
        small.config.intermediate_size
    }
    assert small.config.intermediate_size < 64
    kept = small.report.whole
    for layer in ("bert.pooler.dense", "bert.encoder.layer.1.attention.self.query"):
        assert "equal_blocks" in kept[layer]
        assert small.get_submodule(layer).out_features == 32


def test_free_widths_are_asked_for_and_the_report_says_what_no_config_can(tmp_path: Path) -> None:
    name = "LlamaForCausalLM"
    budget = {"flops": 0.6, "equal_blocks": False, "allocation": "error"}
    small, inputs = shrunk(name, budget, pruner="reconstruction", round_to=1), inputs_of(name)
    assert "where the config makes" in small.report.undescribed
    assert small.report.undescribed in repr(small.report)
    with pytest.raises(ConfigError, match="by its config"):
        nni_topo.save_pretrained(small, tmp_path / "folder")
    nni_topo.save(small, tmp_path / "small.pt")
    again = nni_topo.load(tmp_path / "small.pt", make(name))
    assert torch.equal(logits(again, inputs), logits(small, inputs))


@pytest.mark.parametrize(
    ("budget", "knobs", "told"),
    [
        ({"flops": 0.6, "allocation": "error"}, {"pruner": "reconstruction"}, "'error'"),
        ({"flops": 0.6}, {"layers": ["bert.pooler.dense"]}, r"bert\.pooler\.dense"),
        ({"flops": 0.6}, {"layers": [{"op_types": ["Linear"]}]}, r"self\.query"),
    ],
)
def test_what_no_config_can_describe_is_refused_with_the_argument_that_helps(
    budget: dict[str, Any], knobs: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{told}.*'equal_blocks': False"):
        shrunk("BertForSequenceClassification", budget, **knobs)


def test_models_that_their_config_does_not_describe_are_refused() -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    images = [torch.randn(16, 3, 32, 32)]
    model, budget = transformers.ResNetForImageClassification(config).eval(), {"params": 0.6, "equal_blocks": True}
    with pytest.raises(ConfigError, match=r"ResNetForImageClassification.*'equal_blocks': False"):
        nni_topo.shrink(model, images, budget)
    linear = nni_topo.as_torch_layers(make("GPT2LMHeadModel"))
    with pytest.raises(ConfigError, match=r"h\.0\.attn\.c_attn\.weight.*'equal_blocks': False"):
        nni_topo.shrink(linear, batches_of("GPT2LMHeadModel"), {"params": 0.6})


@pytest.mark.slow
def test_labels_in_the_batches_change_nothing() -> None:
    name = "BertForSequenceClassification"
    small: Any = nni_topo.shrink(make(name), batches_of(name, labels=torch.arange(32) % 2), {"params": 0.9}, **FAST)
    assert small.report.outputs.left_out == ("loss",)
    assert torch.equal(logits(small, inputs_of(name)), logits(shrunk(name, {"params": 0.9}), inputs_of(name)))


@pytest.mark.slow
def test_configs_within_a_config_say_the_widths_of_clip(tmp_path: Path) -> None:
    texts = {**TEXTS, "eos_token_id": 39}
    config = transformers.CLIPConfig(text_config=texts, vision_config=IMAGES, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    inputs = {**inputs_of("Bert"), **inputs_of("ViT")}
    small: Any = nni_topo.shrink(model, [inputs], {"params": 0.8}, distill=False)
    assert small.report.budget.is_met
    assert {small.config.text_config.intermediate_size, small.config.vision_config.intermediate_size} < set(range(64))
    nni_topo.save_pretrained(small, tmp_path)
    with torch.no_grad():
        found, again = small(**inputs), transformers.CLIPModel.from_pretrained(tmp_path).eval()(**inputs)
    assert torch.equal(found.logits_per_image, again.logits_per_image)


@pytest.mark.slow
def test_fewer_blocks_and_several_sizes_are_described_too(tmp_path: Path) -> None:
    name = "BertForSequenceClassification"
    model = make(name, num_hidden_layers=3)
    short: Any = nni_topo.shrink(model, batches_of(name), {"flops": 0.5}, depth=True, distill=False)
    removed = len(short.report.depth.removed)
    assert removed > 0  # the MLPs alone can't save so much
    assert short.config.num_hidden_layers == 3 - removed
    networks = nni_topo.frontier(model, batches_of(name), (0.9, 0.8), budget="params", distill=False)
    for at, small in enumerate((short, *networks.values())):
        assert small.report.undescribed == ""  # type: ignore[union-attr]
        nni_topo.save_pretrained(small, tmp_path / str(at))
        again = type(model).from_pretrained(tmp_path / str(at))
        assert torch.equal(logits(again, inputs_of(name)), logits(small, inputs_of(name)))
