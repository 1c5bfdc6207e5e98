"""A folder of Transformers that is pruned block by block on another device is what it is on the CPU."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import nni_topo
from nni_topo.errors import DataError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

VOCABULARY = 50
SELECTED = {"pruner": "l1", "compensate": None, "distill": False, "progress": False}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
MODELS = {
    # Angles of positions come from the model, and a mask for each batch.
    "LlamaForCausalLM": ("LlamaConfig", {"num_key_value_heads": 2}, None),
    # Two masks and two kinds of angles, and embeddings that are scaled by a buffer.
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 4}, None),
    # Positions are part of the embeddings, and masks attend to both sides.
    "BertForMaskedLM": ("BertConfig", {}, ["intermediate.dense"]),
}


@pytest.fixture
def source(tmp_path):
    return written("LlamaForCausalLM", tmp_path / "source")


def written(name, folder):
    kind, changes, _ = MODELS[name]
    config = getattr(transformers, kind)(**SIZES, num_attention_heads=4, max_position_embeddings=32, **changes)
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(folder)
    return folder


def tokens(device="cpu"):
    """Three batches, of which the last two have padding."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        ids = torch.randint(1, VOCABULARY, (8, 6), generator=generator)
        mask = torch.ones_like(ids)
        if found:
            mask[:3, -2:] = 0
        found.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return found


def contents(folder):
    """The config and the weights of a folder."""
    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return (folder / "config.json").read_text(), weights


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_the_same_channels_are_kept(device, name, tmp_path):
    source, layers = written(name, tmp_path / "source"), MODELS[name][2]
    reports = []
    for place in ("cpu", device):
        knobs = SELECTED | {"layers": layers, "device": place}
        target = tmp_path / str(place).replace(":", "")
        reports.append(nni_topo.shrink_pretrained(source, tokens(), target, {"flops": 0.75}, **knobs))
    one, other = (contents(tmp_path / name) for name in ("cpu", str(device).replace(":", "")))
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert reports[0].widths == reports[1].widths
    assert reports[0].budget == reports[1].budget
    distances = [[row.distance for row in report.blocks] for report in reports]
    assert distances[1] == pytest.approx(distances[0], rel=1e-3)
    assert reports[1].likeness.distance.value == pytest.approx(reports[0].likeness.distance.value, rel=1e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_does_not_fit_into_the_memory_of_the_device_is_told(source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**30))
    words = r"statistics and states \(on cuda\) must fit into memory, got 0.25 GiB for 0.00 GiB that are free"
    with pytest.raises(DataError, match=words):
        nni_topo.shrink_pretrained(source, tokens(), tmp_path / "small", {"params": 0.7}, **SELECTED, device="cuda")
