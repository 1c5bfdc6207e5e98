"""The journal of a run: what it keeps from one block to the next, and whose run it goes on with."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.streaming.journal import Journal

SETTINGS = {"budget": ["params", 0.5], "seed": 0, "batches": "abc", "knobs": [("a", 1)]}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def begun(folder):
    """A journal in which the first of two blocks is finished."""
    journal = Journal(folder, SETTINGS)
    journal.begin()
    journal.begin_states(0)
    journal.add_states(0, 0, {"a": torch.zeros(1)})
    journal.kept = [0, 2]
    journal.write_weights(0, {"rest": torch.ones(3)})
    journal.note()
    journal.begin_states(1)
    journal.add_states(1, 0, {"a": torch.ones(2)})
    journal.add_states(1, 1, {"a": torch.ones(1), "b": torch.zeros(1)})
    journal.write_weights(1, {"x": torch.ones(2, 2), "y": torch.ones(1)})
    journal.note({"block": "first"})
    return journal


def test_a_journal_that_is_opened_again_knows_what_is_finished(tmp_path):
    begun(tmp_path)
    states = tmp_path / ".shrink_pretrained"
    assert names_in(states) == ["states-1"]  # those of before are gone
    (tmp_path / "model-00003-of-00003.safetensors.7.part").touch()
    again = Journal(tmp_path, SETTINGS)
    again.begin()
    assert not list(tmp_path.glob("*.part"))
    assert (again.kept, again.rows, again.report) == ([0, 2], [{"block": "first"}], None)
    first, second = again.states(2)
    assert (list(first), sorted(second)) == (["a"], ["a", "b"])
    assert torch.equal(first["a"], torch.ones(2))
    # states that were begun don't count before they are noted
    again.begin_states(2)
    again.add_states(2, 0, {"a": torch.zeros(5)})
    assert torch.equal(Journal(tmp_path, SETTINGS).states(1)[0]["a"], torch.ones(2))
    again.write_weights(2, {"z": torch.ones(1)})
    again.note({"block": "last"})
    assert torch.equal(again.states(1)[0]["a"], torch.zeros(5))
    again.write_index()
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 36},
        "weight_map": {
            "rest": "model-00001-of-00003.safetensors",
            "x": "model-00002-of-00003.safetensors",
            "y": "model-00002-of-00003.safetensors",
            "z": "model-00003-of-00003.safetensors",
        },
    }
    (states / "states-2" / "0.safetensors").write_bytes(b"half a file")
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
    with pytest.raises(ConfigError, match=f"must be called with the same settings, {words}"):
        Journal(tmp_path, SETTINGS | changes)
    assert names_in(tmp_path) == before
    (tmp_path / "shrink_pretrained.json").write_text("[]")
    with pytest.raises(ConfigError, match="got others: batches, budget, knobs, seed"):
        Journal(tmp_path, SETTINGS)


def test_before_the_first_block_a_run_begins_anew(tmp_path):
    journal = Journal(tmp_path, SETTINGS)
    journal.begin()
    journal.write_weights(0, {"rest": torch.ones(3)})
    journal.note()
    for name in ("model-00001-of-00003.safetensors", "config.json", "generation_config.json", "x.7.part"):
        (tmp_path / name).touch()
    for settings in (SETTINGS, SETTINGS | {"seed": 1}):
        again = Journal(tmp_path, settings)
        again.begin()
        assert names_in(tmp_path) == ["shrink_pretrained.json"]
        again.write_index()
        assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"] == {}
        (tmp_path / "model.safetensors.index.json").unlink()


def test_a_finished_folder_holds_the_report_and_no_settings_of_this_machine(tmp_path):
    begun(tmp_path).finish({"params": 7})
    assert names_in(tmp_path) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "shrink_pretrained.json",
    ]
    assert Journal(tmp_path, SETTINGS).report == {"params": 7}
    content = json.loads((tmp_path / "shrink_pretrained.json").read_text())
    assert content.keys() == {"settings", "report"}
    assert content["settings"].keys() == SETTINGS.keys()
    assert "abc" not in content["settings"].values()
    with pytest.raises(ConfigError, match="must be called with the same settings, got others: seed"):
        Journal(tmp_path, SETTINGS | {"seed": 1})


def test_a_full_disk_is_told_and_leaves_no_file(tmp_path, monkeypatch):
    def fails(words):
        def save(*arguments):
            raise SafetensorError(words)

        monkeypatch.setattr("nni_topo.disk.save_file", save)

    journal = Journal(tmp_path, SETTINGS)
    fails("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(DataError, match="free disk"):
        journal.write_weights(0, {"a": torch.ones(2)})
    fails("something else")
    with pytest.raises(SafetensorError, match="something else"):
        journal.write_weights(0, {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_weights_are_written_as_they_are_wherever_they_come_from(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).half())
    Journal(tmp_path, SETTINGS).write_weights(0, {"a": weight.T})
    found = load_file(tmp_path / "model-00001-of-00001.safetensors")["a"]
    assert found.dtype == torch.float16
    assert torch.equal(found, weight.detach().T)


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
    one.begin()
    content = json.loads((tmp_path / "shrink_pretrained.json").read_text())
    group = processes(1, content)
    other = Journal(tmp_path, SETTINGS, group)
    other.begin()
    other.write_weights(0, {"a": torch.ones(1)})
    assert names_in(tmp_path) == ["shrink_pretrained.json"]
    for journal, value in ((one, 1.0), (other, 2.0)):
        journal.begin_states(0)
        journal.add_states(0, 0, {"a": torch.full((1,), value)})
    group.first = lambda row, what: {"block": "first"}
    other.note(None)
    assert other.rows == [{"block": "first"}]
    assert group.told == ["the journal of 1 blocks"]
    assert json.loads((tmp_path / "shrink_pretrained.json").read_text())["rows"] == []
    assert one.states(1)[0]["a"].item() == 1.0  # those of the other one are of before
    assert names_in(tmp_path / ".shrink_pretrained" / "rank-1") == []
    other.finish({})
    assert group.told[-1] == "the report"
    assert names_in(tmp_path / ".shrink_pretrained") == ["states-0"]
    one.finish({"params": 7})
    assert names_in(tmp_path) == ["shrink_pretrained.json"]
