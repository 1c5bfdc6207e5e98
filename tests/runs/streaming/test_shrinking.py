"""Models of Transformers that are pruned block by block, from a folder into another one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import nni_topo
from nni_topo.disk import only_process
from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.streaming import shrinking

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

VOCABULARY, LENGTH = 50, 6
FAST = {"pruner": "l1", "compensate": None, "distill": False, "progress": False}


def llama_config(**changes):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return transformers.LlamaConfig(**{**sizes, **heads, **changes})


def tokens(batches=2, samples=8, *, padded=False, length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        ids = torch.randint(1, VOCABULARY, (samples, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded and found:
            mask[:3, -2:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config())
    model.save_pretrained(tmp_path / "source", max_shard_size="8KB")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def files_of(folder):
    """By file a digest of its content, without the seconds that a report holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "shrink_pretrained.json":
                content = re.sub(rb'"seconds": [^,\n]+', b"", content)
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def stopping(prune):
    """Return the step of a run that prunes the first block, then stops."""

    def step(run, index):
        if index == 1:
            raise StopError
        prune(run, index)

    return step


def weights_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def logits(folder, batch):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**batch).logits


def test_the_folder_is_loaded_by_transformers_and_has_what_the_report_says(source, tmp_path):
    before, target = files_of(source), tmp_path / "small"
    report = nni_topo.shrink_pretrained(source, tokens(padded=True), target, {"params": 0.7}, **FAST)
    assert files_of(source) == before
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    config = model.config
    assert config.num_attention_heads < 4 or config.intermediate_size < 24
    assert report.params == sum(each.numel() for each in model.parameters())
    assert report.budget.left == pytest.approx(report.params / report.params_before)
    assert [row.block for row in report.blocks] == ["model.layers.0", "model.layers.1"]
    assert all(0.0 < row.seconds < 600.0 for row in report.blocks)
    assert report.widths["mlp.up_proj"][1] < 24 or report.widths["self_attn.q_proj"][1] < 16
    assert (target / "tokenizer.json").read_text() == "{}"
    assert not [path.name for path in target.iterdir() if path.name.startswith(".")]
    # The held-out samples are every eighth one; what the report says of them is what the loaded model does.
    together = {name: torch.cat([batch[name] for batch in tokens(padded=True)])[7::8] for name in tokens()[0]}
    real = together["attention_mask"].bool()
    wanted, reached = (logits(folder, together).argmax(-1)[real] for folder in (source, target))
    assert report.held_out == 2
    assert report.likeness.agreement.value == pytest.approx(float((wanted == reached).double().mean()), abs=1e-6)


@pytest.mark.slow
def test_padding_changes_nothing(source, tmp_path):
    found = []
    for number, filler in enumerate((1, 2)):
        batches = tokens(padded=True)
        for batch in batches:
            batch["input_ids"][batch["attention_mask"] == 0] = filler
        target = tmp_path / str(number)
        knobs = FAST | {"pruner": "reconstruction", "compensate": "reconstruct"}
        nni_topo.shrink_pretrained(source, batches, target, {"params": 0.7}, **knobs)
        found.append(weights_of(target))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


class StopError(Exception):
    pass


@pytest.mark.slow
def test_a_block_makes_up_for_the_errors_of_those_before_it(source, tmp_path, monkeypatch):
    knobs = FAST | {"compensate": "reconstruct"}
    found = {"both": nni_topo.shrink_pretrained(source, tokens(16), tmp_path / "both", {"params": 0.75}, **knobs)}
    # Where the unpruned block gets the states of the pruned ones, errors before it can't be seen.
    monkeypatch.setattr(nni_topo.Calibration, "instead", property(lambda _: {}, lambda _, names: None), raising=False)
    found["alone"] = nni_topo.shrink_pretrained(source, tokens(16), tmp_path / "alone", {"params": 0.75}, **knobs)
    (first, last), (same, worse) = (each.blocks for each in found.values())
    assert first.distance == same.distance
    assert last.distance < worse.distance


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("no config", r"a model's config must be a file that exists, got none"),
        (
            "no weights",
            r"a folder of weights must hold model.safetensors or .*, got pytorch_model.bin; from_pretrained",
        ),
        ("missing shard", r"a file of weights must be a file that exists, got none \(.*model-00002-of"),
        ("damaged shard", r"a file of weights must be a whole file of safetensors, got \d+ bytes .*model-00002-of"),
        (
            "missing tensor",
            r"every tensor that LlamaForCausalLM has by its config.json, in its shape, got none for mod.*up_proj",
        ),
        ("NaN", r"weights must be finite, got NaN or infinity \(model.layers.1.mlp.up_proj.weight"),
        (
            "other shape",
            r"must hold every tensor that .* has by its config.json, in its shape, got .*model.layers.0",
        ),
    ],
)
def test_damaged_sources_are_told(source, tmp_path, change, words):
    name = "model.layers.1.mlp.up_proj.weight"
    files = sorted(source.glob("model-*"))
    if change == "no config":
        (source / "config.json").unlink()
    elif change == "no weights":
        for path in (*files, source / "model.safetensors.index.json"):
            path.unlink()
        torch.save({}, source / "pytorch_model.bin")
    elif change == "missing shard":
        files[1].unlink()
    elif change == "damaged shard":
        files[1].write_bytes(files[1].read_bytes()[:100])
    elif change == "other shape":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 20}))
    else:
        tensors = weights_of(source)
        for path in (*files, source / "model.safetensors.index.json"):
            path.unlink()
        if change == "NaN":
            tensors[name][3, 4] = torch.nan
        else:
            del tensors[name]
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises((ConfigError, DataError), match=words):
        nni_topo.shrink_pretrained(source, tokens(), tmp_path / "small", {"params": 0.7}, **FAST)


def test_a_block_whose_outputs_are_not_finite_is_named(source, tmp_path):
    tensors = weights_of(source)
    for path in source.glob("model*"):
        path.unlink()
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e38
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    target = tmp_path / "small"
    with pytest.raises(DataError, match=r"must be finite, got NaN or infinity \(model.layers.1, batch 0\)"):
        nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.7}, **FAST)
    assert (target / "model-00002-of-00003.safetensors").exists()  # the first block isn't lost


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {"latency": 0.5}}, r"needs a budget of flops or params, got latency"),
        ({"budget": {"params": 0.5, "allocation": "error"}}, r"by the allocation 'uniform', got 'error'"),
        ({"budget": {"params": 0.2}}, r"got 0.2 of the params where 0.\d+ lie outside of the blocks \(budget\)"),
        ({"layers": ["mlp.up_prj"]}, r"got 'mlp.up_prj'; did you mean mlp.up_proj"),
        ({"pruner": "l11"}, r"did you mean"),
        ({"round_to": "auto"}, r"round_to must be an integer of at least 1 or None, got 'auto'"),
        ({"folder": "source"}, r"needs a folder of its own, got that of the source"),
        ({"batches": "other lengths"}, r"must have one length, got 5 and 6 places: pad or cut them \(batch 1\)"),
        ({"batches": "other vocabulary"}, r"batches must fit the model.*index out of range.*batch 1"),
        ({"batches": "one sample", "distill": True}, r"at least two samples, one to judge by, got 1: .* \(batches\)"),
        ({"source": "meta-llama/none"}, r"must be a folder on this machine, got none of that name; of a model on the"),
        ({"batches": "no batch"}, r"must hold at least one batch, got none"),
        (
            {"batches": "other inputs"},
            r"the same inputs, got .*, input_ids, and .*, attention_mask, input_ids",
        ),
    ],
)
def test_arguments_that_cannot_be_used_are_told(source, tmp_path, changes, words):
    known = {"no batch": [], "one sample": tokens(1, 1), "other lengths": [*tokens(1), *tokens(1, length=5)]}
    known["other inputs"] = [{"input_ids": tokens(1)[0]["input_ids"]}, *tokens(1)]
    known["other vocabulary"] = tokens()
    known["other vocabulary"][1]["input_ids"][0, 0] = VOCABULARY
    batches = known.get(changes.get("batches"), tokens())
    folder = source if "folder" in changes else tmp_path / "small"
    others = {name: value for name, value in changes.items() if name not in ("batches", "folder", "budget", "source")}
    before = files_of(source)
    with pytest.raises((ConfigError, DataError), match=words):
        nni_topo.shrink_pretrained(
            changes.get("source", source), batches, folder, changes.get("budget", {"params": 0.7}), **FAST | others
        )
    assert files_of(source) == before


def test_a_folder_with_other_files_or_another_run_at_work_is_left_alone(source, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"must be empty or new, or hold a run that was stopped, got notes.txt there"):
        nni_topo.shrink_pretrained(source, tokens(), tmp_path / "small", {"params": 0.7}, **FAST)
    assert (tmp_path / "small" / "notes.txt").read_text() == "mine"
    target = tmp_path / "locked"
    with only_process(target), pytest.raises(DataError, match="by one run at a time, got another run"):
        nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.7}, **FAST)


def test_disk_and_memory_are_looked_at_first(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shrinking, "free_memory_of", lambda device: 2**20)
        words = r"statistics and states \(on cpu\) must fit into memory.*fewer or shorter samples"
        with pytest.raises(DataError, match=words):
            nni_topo.shrink_pretrained(source, tokens(), tmp_path / "small", {"params": 0.7}, **FAST)
    monkeypatch.setattr(shrinking, "check_free_disk", lambda folder, needed: asked.append(needed))
    asked = []
    nni_topo.shrink_pretrained(source, tokens(), tmp_path / "small", {"params": 0.7}, **FAST)
    # the weights, and the states in single precision of two networks before and after a block
    assert asked == [sum(path.stat().st_size for path in source.glob("*.safetensors")) + 2 * 2 * 4 * 16 * LENGTH * 16]


def test_models_of_other_kinds_are_told(tmp_path):
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    t5, llama = transformers.T5Config(**sizes), llama_config(num_hidden_layers=1)
    for kind, config, words in (
        (transformers.T5ForConditionalGeneration, t5, r"one list of blocks, got an encoder and a decoder"),
        (transformers.T5EncoderModel, t5, r"the same tensors.*got T5Block and another T5Block as encoder.block.0 and "),
        (transformers.LlamaForCausalLM, llama, r"a list of at least two blocks of one class"),
    ):
        source = saved(kind, config, tmp_path / kind.__name__)
        with pytest.raises(ConfigError, match=words):
            nni_topo.shrink_pretrained(source, tokens(), tmp_path / "small", {"params": 0.7}, **FAST)


def test_widths_that_no_config_describes_are_told_after_the_first_block(tmp_path):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    config = transformers.OPTConfig(**sizes, num_attention_heads=4, word_embed_proj_dim=16, max_position_embeddings=32)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    budget = {"params": 0.8}
    with pytest.raises(ConfigError, match=r"by its config, got self_attn.*prune other layers only \(layers\)"):
        nni_topo.shrink_pretrained(tmp_path / "opt", tokens(), tmp_path / "small", budget, **FAST)
    nni_topo.shrink_pretrained(tmp_path / "opt", tokens(), tmp_path / "mlp", budget, layers=["fc1"], **FAST)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mlp").config.ffn_dim < 24


class ScaledByHeads(transformers.LlamaForCausalLM):
    """Attention that is scaled by the width for each head, which its shapes don't show."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.model.layers:
            block.self_attn.scaling = (config.num_attention_heads / config.hidden_size) ** 0.5


def test_a_block_that_its_config_builds_otherwise_is_told(tmp_path, monkeypatch):
    # Transformers replaces its own module when a model is first imported.
    monkeypatch.setattr(sys.modules["transformers"], "ScaledByHeads", ScaledByHeads, raising=False)
    source = saved(ScaledByHeads, llama_config(initializer_range=0.5), tmp_path / "source")
    # With all heads nothing differs.
    layers = ["mlp.gate_proj", "mlp.up_proj"]
    nni_topo.shrink_pretrained(source, tokens(), tmp_path / "mlp", {"params": 0.8}, layers=layers, **FAST)
    with pytest.raises(ConfigError, match=r"must have the outputs of the pruned block, .* 0\.\d+ .*layers.0, Scaled"):
        nni_topo.shrink_pretrained(source, tokens(), tmp_path / "small", {"params": 0.7}, **FAST)
    assert not list((tmp_path / "small").glob("model-00002*"))


def test_a_model_without_values_is_told_where_to_go():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(llama_config())
    with pytest.raises(DataError, match=r"nni_topo\.shrink_pretrained prunes a folder of Transformers"):
        nni_topo.shrink(model, tokens(), {"params": 0.7})


def families():
    plain = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
    shared = {**plain, "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return {
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", shared),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**shared, "head_dim": 8}),
        "mistral": ("MistralForCausalLM", "MistralConfig", {**shared, "sliding_window": 4}),
        "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**shared, "head_dim": 8, "sliding_window": 4}),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**shared, "head_dim": 8, "sliding_window": 4}),
        "phi3": ("Phi3ForCausalLM", "Phi3Config", {**shared, "pad_token_id": 0}),
        "gpt2": (
            "GPT2LMHeadModel",
            "GPT2Config",
            {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
        ),
        "bert": ("BertForMaskedLM", "BertConfig", {**plain, "num_hidden_layers": 2}),
        "vit": (
            "ViTForImageClassification",
            "ViTConfig",
            {**plain, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8},
        ),
    }


FIRST_OF_MLP = ("mlp.c_fc", "intermediate.dense", "mlp.fc1")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(families()))
def test_families_are_loaded_by_transformers(name, tmp_path):
    model_name, config_name, sizes = families()[name]
    kind = getattr(transformers, model_name)
    # Transformers 5 prunes no heads, so that a config of these classes can't describe fewer.
    needs_four = name in ("gpt2", "bert", "vit") and int(transformers.__version__.split(".")[0]) > 4
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(
        **{key: value for key, value in sizes.items() if name != "vit" or key != "vocab_size"}
    )
    model = kind(config).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "source")
    # Its name depends on the class, and of the ViT on the version.
    wide = next((each for each, _ in model.named_modules() if each.endswith(FIRST_OF_MLP)), "")
    layers = [wide.partition(".0.")[2]] if needs_four else None
    batches = [torch.randn(8, 3, 16, 16) for _ in range(3)] if name == "vit" else tokens(3, padded=True)
    report = nni_topo.shrink_pretrained(
        tmp_path / "source",
        batches,
        tmp_path / "small",
        {"flops": 0.75},
        layers=layers,
        distill={"steps": 5},
        progress=False,
    )
    small = kind.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    assert report.params == sum(each.numel() for each in small.parameters())
    assert weights_of(tmp_path / "small")[next(iter(weights_of(tmp_path / "small")))].dtype == torch.bfloat16
    with torch.no_grad():
        output = small(batches[0]) if name == "vit" else small(**batches[0])
    assert output.logits.isfinite().all()


def saved(kind, config, folder):
    torch.manual_seed(0)
    kind(config).eval().save_pretrained(folder)
    return folder


def bert_config(**changes):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return transformers.BertConfig(**{**sizes, "num_attention_heads": 4, "max_position_embeddings": 32, **changes})


@pytest.mark.slow
def test_blocks_that_return_tuples_go_on_too(tmp_path, monkeypatch):
    source = saved(transformers.BertForMaskedLM, bert_config(), tmp_path / "source")
    target, knobs, prune = tmp_path / "stopped", FAST | {"layers": ["intermediate.dense"]}, shrinking._Run.prune
    whole = nni_topo.shrink_pretrained(source, tokens(), tmp_path / "whole", {"params": 0.85}, **knobs)

    def fails(*args, **kwargs):
        raise StopError

    for step in (stopping(prune), prune):
        monkeypatch.setattr(shrinking._Run, "prune", step)
        monkeypatch.setattr(shrinking._Run, "finish", fails)
        with pytest.raises(StopError):
            nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.85}, **knobs)
    monkeypatch.undo()
    report = nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.85}, **knobs)
    assert files_of(target) == files_of(tmp_path / "whole")
    assert report.likeness == whole.likeness


def test_every_argument_of_a_stopped_run_must_be_the_same(source, tmp_path, monkeypatch):
    target = tmp_path / "small"
    with pytest.raises(ConfigError, match="lie outside of the blocks"):
        nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.2}, **FAST)
    # It failed in its first block, so other settings may begin anew.
    monkeypatch.setattr(shrinking._Run, "prune", stopping(shrinking._Run.prune))
    knobs = FAST | {"layers": ["mlp.up_proj", "mlp.gate_proj"], "compensate": Nothing(1), "round_to": 5}
    with pytest.raises(StopError):
        nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.81}, **knobs)
    monkeypatch.undo()
    for change, words in (
        ({"pruner": "l2"}, "pruner"),
        ({"layers": None}, "layers"),
        ({"compensate": Nothing(2)}, "compensate"),
        ({"distill": {"steps": 2}}, "distill"),
        ({"round_to": 4}, "round_to"),
        ({"seed": 1}, "seed"),
    ):
        with pytest.raises(ConfigError, match=f"with the same settings, got others: {words}; delete"):
            nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.81}, **knobs | change)
    with pytest.raises(ConfigError, match=r"others: batches \(a loader that shuffles .*\); delete"):
        nni_topo.shrink_pretrained(source, tokens(seed=1), target, {"params": 0.81}, **knobs)
    # An object of its own, as in another process, is the same method.
    report = nni_topo.shrink_pretrained(
        source, tokens(), target, {"params": 0.81}, **knobs | {"compensate": Nothing(1)}
    )
    assert (report.recovery, report.widths["mlp.up_proj"]) == ("Nothing", (24, 15))
    os.utime(next(source.glob("*.safetensors")), (1, 1))
    with pytest.raises(ConfigError, match="with the same settings, got others: source; delete"):
        nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.81}, **knobs)


@pytest.mark.slow
def test_few_samples_are_enough(source, tmp_path):
    report = nni_topo.shrink_pretrained(source, tokens(1, 1), tmp_path / "one", {"flops": 0.6}, **FAST)
    assert (report.samples, report.held_out, report.recovery) == (1, 0, "")
    assert all(row.distance == row.calibration_distance for row in report.blocks)
    assert report.warnings[0].startswith("no sample could be held out")
    knobs = FAST | {"distill": {"steps": 1}}
    report = nni_topo.shrink_pretrained(source, tokens(1, 2), tmp_path / "two", {"params": 0.8}, **knobs)
    assert report.samples + report.held_out == 2


def test_groups_of_samples_are_held_out_as_a_whole(source, tmp_path):
    data = nni_topo.Calibration(tokens(1, 6), groups=[0, 0, 0, 0, 1, 1])
    report = nni_topo.shrink_pretrained(source, data, tmp_path / "small", {"params": 0.7}, **FAST)
    assert (report.samples, report.held_out) == (4, 2)


def test_a_finished_folder_returns_its_report(source, tmp_path, monkeypatch):
    target, knobs = tmp_path / "small", FAST | {"compensate": "reconstruct"}
    report = nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.7}, **knobs)
    before = files_of(target)
    assert str(tmp_path) not in (target / "shrink_pretrained.json").read_text()
    # A run may be killed while it deletes its journal, after the report was written.
    (target / ".shrink_pretrained" / "states-2").mkdir(parents=True)
    # Nothing is written, so that a full disk is enough.
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
        again = nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.7}, **knobs)
    assert again == report
    assert repr(again) == repr(report)
    assert files_of(target) == before
    with pytest.raises(ConfigError, match="with the same settings, got others: budget, pruner"):
        nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.6}, **knobs | {"pruner": "l2"})
    assert files_of(target) == before


def test_weights_keep_the_precision_of_the_files(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = "bfloat16"
    (source / "config.json").write_text(json.dumps(config))
    nni_topo.shrink_pretrained(source, tokens(), tmp_path / "small", {"params": 0.7}, **FAST)
    assert {value.dtype for value in weights_of(tmp_path / "small").values()} == {torch.float32}


class Nothing(nni_topo.RecoveryMethod):
    """A method of the user's own."""

    def __init__(self, strength):
        self.strength = strength

    def tasks(self, plan, networks):
        return []


KILLED_ANYWHERE = """
import os, shutil, signal, sys
sys.path.insert(0, sys.argv[3])
from test_shrinking import FAST, files_of, tokens
from pathlib import Path
import nni_topo

source, place = Path(sys.argv[1]), Path(sys.argv[2])
seen, last, counts = [0], [10**9], [False]

def kill(event, args):
    if counts[0] and event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(place) in str(args[0]):
        seen[0] += 1
        if seen[0] == last[0]:
            os.kill(os.getpid(), signal.SIGKILL)

def run(name):
    nni_topo.shrink_pretrained(source, tokens(), place / name, {"params": 0.7}, **FAST)
    return files_of(place / name)

sys.addaudithook(kill)
counts[0] = True
whole, counts[0] = run("whole"), False
events = seen[0]
for number in range(5, events, max(events // 6, 1)):
    if os.fork() == 0:
        seen[0], last[0], counts[0] = 0, number, True
        run("killed")
        os._exit(0)
    _, status = os.wait()
    assert os.WIFSIGNALED(status), number
    assert run("killed") == whole, number
    shutil.rmtree(place / "killed")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_run_that_is_killed_anywhere_comes_to_the_same(source, tmp_path):
    command = [sys.executable, "-c", KILLED_ANYWHERE, str(source), str(tmp_path), os.path.dirname(__file__)]
    # Threads of OpenMP don't survive a fork.
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def test_samples_that_are_all_the_same_are_told(source, tmp_path):
    batches = [{"input_ids": tokens(1)[0]["input_ids"]}] * 2
    report = nni_topo.shrink_pretrained(source, batches, tmp_path / "small", {"params": 0.7}, **FAST)
    assert report.likeness.distance.value == math.inf
    assert "outputs don't vary over the samples" in report.warnings[0]


def test_a_budget_of_work_counts_the_head_and_all_blocks(source, tmp_path):
    report = nni_topo.shrink_pretrained(source, tokens(), tmp_path / "small", {"flops": 0.7}, **FAST)

    def macs(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        heads = sum(block.self_attn.q_proj.out_features for block in model.model.layers)
        # of one token: its products with weights, with all keys and with all values
        return sum(layer.weight.numel() for layer in layers) + 2 * LENGTH * heads

    left = macs(tmp_path / "small") / macs(source)
    assert (report.budget.kind, report.budget.asked) == ("flops", 0.7)
    assert report.budget.left == pytest.approx(left, abs=1e-4)  # and the angles of positions
    assert left == pytest.approx(0.7, abs=0.05)
    assert report.budget.why in ("", "blocks are equally wide")
    with pytest.raises(ConfigError, match=r"got 0.1 of the flops where 0.159 lie outside of the blocks \(budget\)"):
        nni_topo.shrink_pretrained(source, tokens(), tmp_path / "none", {"flops": 0.1}, **FAST)


def test_distances_of_a_block_are_over_the_variance_of_the_unpruned_states(source, tmp_path):
    batches = [*tokens(padded=True), *tokens(1, 3, seed=1)]
    report = nni_topo.shrink_pretrained(source, batches, tmp_path / "small", {"params": 0.7}, **FAST)
    together = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    found = []
    for folder in (source, tmp_path / "small"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            found.append(model(**together, output_hidden_states=True).hidden_states[1].double())
    is_real, is_held_out = together["attention_mask"].bool(), torch.zeros(19, dtype=torch.bool)
    is_held_out[7::8] = True
    expected = []
    for samples in (is_held_out, ~is_held_out):
        wanted, reached = (states[samples][is_real[samples]] for states in found)
        expected.append(float((wanted - reached).square().mean() / wanted.var(unbiased=False)))
    row = report.blocks[0]
    assert (row.distance, row.calibration_distance) == pytest.approx(tuple(expected), rel=1e-4)
    assert (report.samples, report.held_out) == (17, 2)


@pytest.mark.slow
def test_weights_that_distillation_finds_are_kept_where_the_loss_falls(source, tmp_path, capsys):
    found = []
    for distill in (False, {"steps": 30, "lr": 1e-2}):
        target = tmp_path / str(len(found))
        knobs = FAST | {"distill": distill}
        # Heads must go: random weights lose so little with a quarter of the MLP that no step is an improvement.
        report = nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.6}, **knobs)
        assert report.widths["self_attn.q_proj"] == (16, 8)
        found.append((report.blocks[0], weights_of(target)["model.layers.0.mlp.down_proj.weight"]))
    (plain, before), (distilled, after) = found
    assert (plain.is_distilled, distilled.is_distilled) == (False, True)
    assert distilled.distance < plain.distance
    assert not torch.equal(before, after)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_other_files_of_the_source_are_copied(source, tmp_path):
    for name in ("pytorch_model.bin", "model.gguf", ".hidden", "README.md", "shrink_pretrained.json", "vocab.txt"):
        (source / name).write_text(name)
    (source / "onnx").mkdir()
    target = tmp_path / "small"
    nni_topo.shrink_pretrained(source, tokens(), target, {"params": 0.7}, **FAST)
    weights = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    own = ["config.json", "generation_config.json", *weights, "model.safetensors.index.json", "shrink_pretrained.json"]
    assert sorted(path.name for path in target.iterdir()) == sorted([*own, "tokenizer.json", "vocab.txt"])
    assert json.loads((target / "shrink_pretrained.json").read_text())["report"]["params"] > 0
    assert sorted(load_file(target / weights[0])) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) > 4, reason="Transformers 5 prunes no heads")
def test_heads_that_are_pruned_are_noted_in_the_config(tmp_path):
    source = saved(transformers.BertForMaskedLM, bert_config(), tmp_path / "source")
    report = nni_topo.shrink_pretrained(source, tokens(1), tmp_path / "small", {"params": 0.7}, **FAST)
    before, after = report.widths["attention.self.query"]
    small = transformers.BertForMaskedLM.from_pretrained(tmp_path / "small")
    count = (before - after) // 4
    assert count > 0
    assert small.config.pruned_heads == {0: list(range(count)), 1: list(range(count))}
    assert small.bert.encoder.layer[1].attention.self.query.out_features == after


def with_tokenizer(folder, rows):
    """Write a model with the tokenizer of a few words, and return the tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = ["<pad>", "<end>", *"abcdef", "ab", "cd", "ef", "abcd", "cdef"]
    merges = [("a", "b"), ("c", "d"), ("e", "f"), ("ab", "cd"), ("cd", "ef")]
    bpe = tokenizers.models.BPE({token: place for place, token in enumerate(vocab)}, merges)
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = {"pad_token": "<pad>", "eos_token": "<end>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **ends)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama_config(vocab_size=rows, eos_token_id=1, bos_token_id=1))
    model.generation_config.suppress_tokens = [vocab.index("ef")]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").write_text("with the old ids")
    return tokenizer


def test_a_vocabulary_is_trimmed_before_the_blocks(tmp_path):
    source, target = tmp_path / "source", tmp_path / "small"
    tokenizer = with_tokenizer(source, 40)
    batches = [{"input_ids": torch.tensor([tokenizer("abcd a")["input_ids"], tokenizer("ab d")["input_ids"]] * 4)}]
    knobs = FAST | {"vocabulary": ["abcd", "c e"]}
    report = nni_topo.shrink_pretrained(source, batches, target, {"params": 0.7}, **knobs)
    unpruned = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    small = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    words = transformers.AutoTokenizer.from_pretrained(target)
    # "cdef" goes, and 27 rows without a token; a config for generation names "ef".
    assert sorted(words.get_vocab()) == sorted(["<pad>", "<end>", *"abcdef", "ab", "cd", "ef", "abcd"])
    assert small.config.vocab_size == len(small.model.embed_tokens.weight) == len(small.lm_head.weight) == 12
    assert (report.vocabulary.tokens_before, report.vocabulary.tokens) == (13, 12)
    assert report.vocabulary.params == report.vocabulary.params_before - 2 * 28 * 16
    old, new = (each.convert_tokens_to_ids(sorted(words.get_vocab())) for each in (tokenizer, words))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(small.get_parameter(name)[new], unpruned.get_parameter(name)[old])
    assert small.generation_config.suppress_tokens == [words.convert_tokens_to_ids("ef")]
    assert not (target / "tokenizer.model").exists()
    # The budget is a share of the model with all tokens.
    counts = [sum(each.numel() for each in model.parameters()) for model in (unpruned, small)]
    assert [report.params_before, report.params] == counts
    assert report.budget.left == pytest.approx(counts[1] / counts[0])
    assert small.config.intermediate_size == 24 or counts[1] / counts[0] < 0.75
    assert repr(nni_topo.shrink_pretrained(source, batches, target, {"params": 0.7}, **knobs)) == repr(report)
    with pytest.raises(ConfigError, match="got others: vocabulary"):
        nni_topo.shrink_pretrained(source, batches, target, {"params": 0.7}, **knobs | {"vocabulary": ["a"]})


def test_a_vocabulary_that_cannot_be_trimmed_is_refused(source, tmp_path):
    knobs = FAST | {"vocabulary": ["a"]}
    with pytest.raises(ConfigError, match=r"budget must be one of params.*got flops \(budget\)"):
        nni_topo.shrink_pretrained(source, tokens(), tmp_path / "small", {"flops": 0.7}, **knobs)
    with pytest.raises(ConfigError, match=r"the source must hold the model's tokenizer, got none"):
        nni_topo.shrink_pretrained(source, tokens(), tmp_path / "small", {"params": 0.7}, **knobs)
    with pytest.raises(ConfigError, match=r"vocabulary must be a list of texts.*got 'a'"):
        nni_topo.shrink_pretrained(source, tokens(), tmp_path / "small", {"params": 0.7}, **FAST, vocabulary="a")
