"""The journal of a run: what it keeps from one block to the next, and whose run it goes on with."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError

from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.streaming.journal import Journal

SETTINGS = {"budget": ["params", 0.5], "seed": 0, "batches": "abc", "knobs": [("a", 1)]}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def begun(folder):
    """A journal in which the first of two blocks is finished."""
    journal = Journal(folder, SETTINGS, 2)
    journal.begin()
    journal.begin_states(0)
    journal.add_states(0, 0, {"a": torch.zeros(1)})
    journal.write_weights(0, {"rest": torch.ones(3)})
    journal.note()
    journal.begin_states(1)
    journal.add_states(1, 0, {"a": torch.ones(2)})
    journal.add_states(1, 1, {"a": torch.ones(1), "b": torch.zeros(1)})
    journal.write_weights(1, {"x": torch.ones(2, 2), "y": torch.ones(1)})
    journal.note({"block": "first"})
    return journal


def test_a_finished_folder_holds_the_report_and_no_settings_of_this_machine(tmp_path):
    begun(tmp_path).finish({"params": 7})
    assert names_in(tmp_path) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "shrink_pretrained.json",
    ]
    assert Journal(tmp_path, SETTINGS, 2).report == {"params": 7}
    content = json.loads((tmp_path / "shrink_pretrained.json").read_text())
    assert content.keys() == {"settings", "report"}
    assert content["settings"].keys() == SETTINGS.keys()
    assert "abc" not in content["settings"].values()
    with pytest.raises(ConfigError, match="must be called with the same settings, got others: seed"):
        Journal(tmp_path, SETTINGS | {"seed": 1}, 2)


def test_damaged_files_of_a_run_are_told(tmp_path):
    journal = begun(tmp_path)
    (tmp_path / ".shrink_pretrained" / "states-1" / "0.safetensors").write_bytes(b"half a file")
    with pytest.raises(DataError, match=rf"a file of states must .*; delete {tmp_path} to begin anew"):
        journal.states(1)
    (tmp_path / "shrink_pretrained.json").write_text("[]")
    with pytest.raises(ConfigError, match="got others: batches, budget, knobs, seed"):
        Journal(tmp_path, SETTINGS, 2)


def test_a_full_disk_is_told_and_leaves_no_file(tmp_path, monkeypatch):
    def fails(words):
        def save(*arguments):
            raise SafetensorError(words)

        monkeypatch.setattr("nni_topo.disk.save_file", save)

    journal = Journal(tmp_path, SETTINGS, 2)
    fails("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(DataError, match="free disk"):
        journal.write_weights(0, {"a": torch.ones(2)})
    fails("something else")
    with pytest.raises(SafetensorError, match="something else"):
        journal.write_weights(0, {"a": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []
