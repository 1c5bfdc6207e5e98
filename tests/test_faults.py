"""Damaged files, full and read-only disks, and folders that another run is at work in."""

from __future__ import annotations

import gc
import resource
from contextlib import contextmanager

import damage
import pytest
import torch
from matplotlib.figure import Figure

import nni_topo
from nni_topo import zoo
from nni_topo.disk import only_process, whole_file, write_json, write_tensors
from nni_topo.errors import DataError
from nni_topo.runs.choices import DataChoice, ModelChoice, PrunerChoice, Target
from nni_topo.studies.analysis.rounds import run_rounds
from nni_topo.studies.compare import compare
from nni_topo.studies.plan import ComparisonPlan
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.study import save_figures

PLAN = ComparisonPlan(
    models=(ModelChoice("small_cnn"),),
    data=(DataChoice("digits", limit=200),),
    pruners=(PrunerChoice("l1"),),
    targets=(Target("ratio", 0.5),),
    train={"epochs": 1},
    retrain={"epochs": 0},
)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_as_they_were_or_refused_in_words():
    for kind, counts, broken in damage.served(40, 0):
        assert not broken, (kind, broken)
        assert sum(counts.values()) == 40


@contextmanager
def full_disk(room=2000):
    """Let no file grow beyond so many bytes: to write more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def of_pictures(path):
    save_figures(path.parent, {path.stem: Figure()})


WRITERS = {
    "tensors": lambda path: write_tensors(path, torch.zeros(10_000)),
    "model": lambda path: nni_topo.save(torch.nn.Linear(100, 100), path),
    "checkpoint": lambda path: zoo.save_checkpoint(path, torch.nn.Linear(100, 100), {}),
    "json": lambda path: write_json(path, list(range(10_000))),
    "record": lambda path: append_record(path, {"key": "a" * 10_000}),
    "pictures": of_pictures,
    "program": lambda path: nni_topo.export(torch.nn.Linear(100, 100), path, torch.zeros(2, 100)),
    "onnx": lambda path: nni_topo.export(torch.nn.Linear(100, 100), path, torch.zeros(2, 100)),
}
ENDINGS = {"program": ".pt2", "onnx": ".onnx"}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_in_words_and_what_was_there_stays(name, tmp_path):
    if name == "onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / f"file{ENDINGS.get(name, '.png')}"
    path.write_bytes(b"{}\n")
    with full_disk(), pytest.raises(DataError, match=rf"needs free disk, got none left \(.*{path.name}\)") as caught:
        WRITERS[name](path)
    assert caught.value.__suppress_context__
    gc.collect()  # PyTorch's writer of programs would end the process here
    assert list(tmp_path.iterdir()) == [path]
    if name == "record":  # the half line goes when there is room for the next
        assert read_records(path) == [{}]
        append_record(path, {"key": "b"})
        assert read_records(path) == [{}, {"key": "b"}]
    elif name != "pictures":
        assert path.read_bytes() == b"{}\n"


def test_a_comparison_on_a_full_disk_goes_on_where_there_is_room(tmp_path):
    with full_disk(), pytest.raises(DataError, match="needs free disk, got none left"):
        compare(PLAN, tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    assert len(compare(PLAN, tmp_path)[0]) == 1


@pytest.mark.slow
def test_a_cut_checkpoint_is_to_be_deleted(tmp_path):
    compare(PLAN, tmp_path)
    (tmp_path / "results.jsonl").unlink()
    (path,) = (tmp_path / "checkpoints").glob("*.pt")
    path.write_bytes(path.read_bytes()[:1000])
    _, (failure,) = compare(PLAN, tmp_path)
    assert failure["reason"].endswith("; delete it and run again")
    assert str(path) in failure["reason"]
    assert not any(word in failure["reason"] for word in ("Traceback", "weights_only", "File "))
    path.unlink()
    assert len(compare(PLAN, tmp_path)[0]) == 1


def test_a_folder_of_rounds_takes_one_run_at_a_time(tmp_path):
    with only_process(tmp_path), pytest.raises(DataError, match="one run at a time"):
        run_rounds([], tmp_path)
    assert run_rounds([], tmp_path) == []


def test_what_is_interrupted_leaves_no_half_file(tmp_path):
    def stopped():
        with whole_file(tmp_path / "a") as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not list(tmp_path.iterdir())
