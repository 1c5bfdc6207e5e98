"""The journal of a run: what it keeps from one block to the next, and whose run it goes on with."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.streaming.journal import Journal, finished_report
from nni_topo.runs.streaming.shards import write_index

SETTINGS = {"budget": ["params", 0.5], "seed": 0, "batches": "abc", "knobs": {"a": 1, "b": 2}}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def begun(folder):
    """A journal in which the first of two blocks is finished."""
    journal = Journal(folder, SETTINGS)
    journal.begin_states()
    journal.add_states(0, {"a": torch.zeros(1)})
    journal.end_states(0)
    journal.kept = (0, 2)
    journal.write_weights("model-00001-of-00003.safetensors", {"rest": torch.ones(3)})
    journal.note(0)
    journal.begin_states()
    journal.add_states(0, {"a": torch.ones(2)})
    journal.add_states(1, {"a": torch.ones(1), "b": torch.zeros(1)})
    journal.end_states(1)
    journal.write_weights("model-00002-of-00003.safetensors", {"x": torch.ones(2, 2), "y": torch.ones(1)})
    journal.note(1, {"block": "first"})
    return journal


def test_a_journal_that_is_opened_again_knows_what_is_finished(tmp_path):
    states = tmp_path / ".shrink_pretrained"
    fresh = Journal(tmp_path, SETTINGS)
    assert (fresh.done, fresh.kept, fresh.files, fresh.rows) == (0, [], {}, [])
    assert names_in(states) == ["journal.json"]
    # what can't be deleted stays
    (states / "states-x").touch()
    begun(tmp_path)
    assert names_in(states) == ["journal.json", "states-1", "states-x"]  # those of before are gone
    (tmp_path / "model-00003-of-00003.safetensors.7.part").touch()
    again = Journal(tmp_path, SETTINGS | {"knobs": {"b": 2, "a": 1}})
    assert not list(tmp_path.glob("*.part"))
    assert (again.done, again.kept, again.rows) == (1, [0, 2], [{"block": "first"}])
    assert again.files == {
        "model-00001-of-00003.safetensors": {"names": ["rest"], "nbytes": 12},
        "model-00002-of-00003.safetensors": {"names": ["x", "y"], "nbytes": 20},
    }
    first, second = again.states(2)
    assert (list(first), sorted(second)) == (["a"], ["a", "b"])
    assert torch.equal(first["a"], torch.ones(2))
    assert len(again.states(1)) == 1
    # states that were begun and not ended don't count
    again.begin_states()
    again.add_states(0, {"a": torch.zeros(5)})
    assert torch.equal(again.states(1)[0]["a"], torch.ones(2))
    again.begin_states()
    assert names_in(states / "part") == []
    again.add_states(0, {"a": torch.zeros(5)})
    again.end_states(1)
    assert torch.equal(again.states(1)[0]["a"], torch.zeros(5))
    (states / "states-1" / "0.safetensors").write_bytes(b"half a file")
    with pytest.raises(DataError, match=rf"a file of states must .*; delete {tmp_path} to begin anew"):
        again.states(1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "got others: seed; delete"),
        ({"seed": 1, "batches": "b"}, r"got others: batches, seed \(a loader that shuffles gives other batches each"),
        ({"budget": ["params", 0.25]}, "got others: budget; delete the folder to begin anew"),
    ],
)
def test_a_finished_block_goes_on_with_the_same_settings_alone(changes, words, tmp_path):
    begun(tmp_path)
    before = names_in(tmp_path)
    with pytest.raises(ConfigError, match=f"a run that was stopped must go on with the same settings, {words}"):
        Journal(tmp_path, SETTINGS | changes)
    assert names_in(tmp_path) == before
    (tmp_path / ".shrink_pretrained" / "journal.json").write_text("[]")
    with pytest.raises(ConfigError, match="got others: all; delete the folder"):
        Journal(tmp_path, SETTINGS)


def test_before_the_first_block_other_settings_begin_anew(tmp_path):
    journal = Journal(tmp_path, SETTINGS)
    for name in ("model-00001-of-00003.safetensors", "config.json", "generation_config.json", "x.7.part"):
        (tmp_path / name).touch()
    journal.write_weights("model-00002-of-00003.safetensors", {"rest": torch.ones(3)})
    journal.note(0)
    # the same settings keep what was written
    assert list(Journal(tmp_path, SETTINGS).files) == ["model-00002-of-00003.safetensors"]
    assert "config.json" in names_in(tmp_path)
    assert Journal(tmp_path, SETTINGS | {"seed": 1}).files == {}
    assert names_in(tmp_path) == [".shrink_pretrained"]
    assert Journal(tmp_path, SETTINGS | {"seed": 1}).done == 0


def test_folders_with_other_files_are_left_alone(tmp_path):
    (tmp_path / ".lock").touch()
    Journal(tmp_path, SETTINGS)
    shutil.rmtree(tmp_path / ".shrink_pretrained")
    (tmp_path / "b.txt").touch()
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match=r"or hold a run that was stopped, got a.txt there"):
        Journal(tmp_path, SETTINGS)
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(ConfigError, match=r"got a whole model there"):
        Journal(tmp_path, SETTINGS)
    assert not (tmp_path / ".shrink_pretrained").exists()


def test_a_finished_folder_holds_the_report_and_the_sizes_of_its_files(tmp_path):
    journal = begun(tmp_path)
    write_index(tmp_path, {file: content["names"] for file, content in journal.files.items()}, 32)
    journal.finish({"params": 7})
    assert names_in(tmp_path) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model.safetensors.index.json",
        "shrink_pretrained.json",
    ]
    # a run may be killed before it has deleted all
    (tmp_path / ".shrink_pretrained" / "states-1").mkdir(parents=True)
    for _ in range(2):
        assert finished_report(tmp_path, SETTINGS) == {"params": 7}
    assert not (tmp_path / ".shrink_pretrained").exists()
    content = json.loads((tmp_path / "shrink_pretrained.json").read_text())
    assert content["settings"].keys() == SETTINGS.keys()
    assert "abc" not in content["settings"].values()
    with pytest.raises(ConfigError, match="a finished model must be asked for with the same settings, got others: see"):
        finished_report(tmp_path, SETTINGS | {"seed": 1})
    index = tmp_path / "model.safetensors.index.json"
    size = index.stat().st_size
    index.write_text("{}")
    with pytest.raises(DataError, match=rf"got 2 bytes where it wrote {size} \(.*index.json\)"):
        finished_report(tmp_path, SETTINGS)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(DataError, match=r"must have the files that its run wrote, got none \(.*model-00001-of"):
        finished_report(tmp_path, SETTINGS)


def processes(rank, first=None):
    """A process among others: what the first one has is given, what is gathered is noted."""
    told = []
    return SimpleNamespace(
        rank=rank,
        first=lambda value, what: value if rank == 0 else first,
        gather=lambda value, what: told.append(what) or [value],
        told=told,
    )


def test_of_several_processes_the_first_one_writes_what_all_share(tmp_path):
    one = Journal(tmp_path, SETTINGS, processes(0))
    assert names_in(tmp_path / ".shrink_pretrained") == ["journal.json"]
    content = json.loads((tmp_path / ".shrink_pretrained" / "journal.json").read_text())
    group = processes(1, content)
    other = Journal(tmp_path, SETTINGS, group)
    other.write_weights("model-00001-of-00001.safetensors", {"a": torch.ones(1)})
    assert (other.files, names_in(tmp_path)) == ({}, [".shrink_pretrained"])
    for journal in (one, other):
        journal.begin_states()
        journal.add_states(0, {"a": torch.full((1,), 1.0 if journal is one else 2.0)})
        journal.end_states(0)
    assert sorted(path.name for path in (tmp_path / ".shrink_pretrained").iterdir()) == [
        "journal.json", "rank-1", "states-0",
    ]  # fmt: skip
    group.first = lambda row, what: {"block": "first"}
    other.note(1, None)
    assert (other.done, other.rows) == (1, [{"block": "first"}])
    assert group.told == ["the journal of 1 blocks"]
    assert json.loads((tmp_path / ".shrink_pretrained" / "journal.json").read_text())["done"] == 0
    assert names_in(tmp_path / ".shrink_pretrained" / "rank-1") == []  # its states of before
    assert one.states(1)[0]["a"].item() == 1.0
    other.finish({})
    assert group.told[-1] == "the report"
    assert not (tmp_path / "shrink_pretrained.json").exists()
    assert names_in(tmp_path / ".shrink_pretrained") == ["journal.json", "states-0"]
    write_index(tmp_path, {}, 0)
    one.finish({"params": 7})
    assert names_in(tmp_path) == ["model.safetensors.index.json", "shrink_pretrained.json"]
