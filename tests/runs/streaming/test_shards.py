"""Files of weights: what is read of them, what is written, and what is told of those that can't be used."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.streaming import shards as module
from nni_topo.runs.streaming.shards import Shards, check_float, key_of, keys_by_name, write_index, write_shard

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """Two files: `a` and `c` in the second one, `b` in the first."""
    sizes = write_shard(tmp_path / "1.safetensors", {"b": torch.ones(2, 3)})
    sizes += write_shard(
        tmp_path / "2.safetensors", {"a": torch.arange(6.0).reshape(2, 3).T, "c": torch.zeros(1, dtype=torch.int64)}
    )
    assert sizes == 24 + 24 + 8
    write_index(tmp_path, {"2.safetensors": ["a", "c"], "1.safetensors": ["b"]}, sizes)
    return tmp_path


def test_tensors_are_read_by_name_from_the_files_that_hold_them(folder):
    found = Shards(folder)
    assert found.names == ["a", "b", "c"]
    assert ("a" in found, "d" in found) == (True, False)
    assert found.nbytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    read = found.read(["b", "a"])
    assert list(read) == ["b", "a"]
    assert torch.equal(read["a"], torch.arange(6.0).reshape(2, 3).T)
    assert json.loads((folder / INDEX).read_text()) == {
        "metadata": {"total_size": 56},
        "weight_map": {"a": "2.safetensors", "c": "2.safetensors", "b": "1.safetensors"},
    }
    with safe_open(str(folder / "1.safetensors"), "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    stats = [(folder / name).stat() for name in ("1.safetensors", "2.safetensors")]
    assert found.identity() == [
        [f"{number}.safetensors", stat.st_size, stat.st_mtime_ns] for number, stat in enumerate(stats, 1)
    ]


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    found = Shards(tmp_path)
    assert (found.names, found.nbytes) == (["a"], (tmp_path / "model.safetensors").stat().st_size)
    assert torch.equal(found.read(["a"])["a"], torch.ones(2))


@pytest.mark.parametrize("content", [[], {}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}])
def test_an_index_without_names_of_files_is_told(content, folder):
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"an index of weights must have a weight_map, got none"):
        Shards(folder)


def test_tensors_that_the_index_names_but_no_file_holds_are_told(folder):
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] |= {"d": "1.safetensors", "e": "1.safetensors"}
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"got none of d, e \(.*1.safetensors\)"):
        Shards(folder)


def test_folders_of_other_files_are_told(tmp_path):
    with pytest.raises(DataError, match=r"got none of that name; .*\(.*nowhere\)"):
        Shards(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"got neither; from_pretrained"):
        Shards(tmp_path)
    for name in ("b.bin", "a.bin", "a.txt"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"got a.bin; from_pretrained"):
        Shards(tmp_path)


def test_a_full_disk_is_told_and_leaves_no_file(tmp_path, monkeypatch):
    def full(*arguments):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(DataError, match="free disk"):
        write_shard(tmp_path / "1.safetensors", {"a": torch.ones(2)})

    def wrong(*arguments):
        raise SafetensorError("something else")

    monkeypatch.setattr(module, "save_file", wrong)
    with pytest.raises(SafetensorError, match="something else"):
        write_shard(tmp_path / "1.safetensors", {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_weights_are_written_as_they_are_wherever_they_come_from(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).half())
    assert write_shard(tmp_path / "1.safetensors", {"a": weight.T}) == 12
    found = load_file(tmp_path / "1.safetensors")["a"]
    assert found.dtype == torch.float16
    assert torch.equal(found, weight.detach().T)


def test_names_in_files_may_lack_the_prefix_or_be_older():
    keys = {name: f"file {name}" for name in ("base.a.weight", "b.weight", "c.LayerNorm.gamma", "d.LayerNorm.beta")}
    wanted = {
        "base.a.weight": "base.a.weight",
        "a.weight": "base.a.weight",
        "base.b.weight": "b.weight",
        "b.weight": "b.weight",
        "c.LayerNorm.weight": "c.LayerNorm.gamma",
        "base.d.LayerNorm.bias": "d.LayerNorm.beta",
        "c.LayerNorm.bias": None,
        "e": None,
    }
    found = {name: key_of(name, keys, "base") for name in wanted}
    assert found == {name: key and f"file {key}" for name, key in wanted.items()}


def test_names_of_a_model_whose_class_has_not_changed_are_those_of_the_files(folder):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 8, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 4}
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    assert keys_by_name(model, Shards(folder)) == {"a": "a", "b": "b", "c": "c"}


def test_quantised_weights_and_those_that_are_not_finite_are_told(tmp_path):
    good = torch.ones(2)
    check_float({"a": good, "b": good.bfloat16()}, tmp_path)
    check_float({}, tmp_path)
    with pytest.raises(ConfigError, match=r"must be floating-point, got torch.int8 \(b, .*\)"):
        check_float({"a": good, "b": torch.ones(2, dtype=torch.int8), "c": good.long()}, tmp_path)
    for value in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(DataError, match=r"must be finite, got NaN or infinity \(b, "):
            check_float({"a": good, "b": torch.tensor([1.0, value])}, tmp_path)
