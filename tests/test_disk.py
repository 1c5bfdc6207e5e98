"""What is written where: behind links, never in the place of what is no file, and refused before long work."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo import disk, zoo
from nni_topo.cli import main, studies
from nni_topo.errors import ConfigError, DataError
from nni_topo.network import LatencyTable, LayerLatency
from nni_topo.studies.records import append_record

TABLE = LatencyTable({"0": LayerLatency((1,), (1,), ((1.0,),), 0.0)})


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def figure(path):
    from matplotlib.figure import Figure

    disk.write_figure(path, Figure(), dpi=10)


WRITERS = {
    "save": lambda path: nni_topo.save(net(), path),
    "checkpoint": lambda path: zoo.save_checkpoint(path, net(), {}),
    "latency table": TABLE.save,
    "export": lambda path: nni_topo.export(net(), path, torch.ones(2, 3), "torch.export"),
    "figure": figure,
    "record": lambda path: append_record(path, {"key": "a"}),
    "text": lambda path: disk.write_text(path, "words"),
}
NAMES = {"figure": "out.png", "export": "out.pt2"}


def put(kind, path):
    """Put something that is no regular file at a path."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to(os.devnull)
    elif kind == "link to itself":
        path.symlink_to(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "folder") for name in WRITERS),
        *(("save", kind) for kind in ("pipe", "link to a device", "link to itself")),
    ],
)
def test_only_regular_files_are_replaced(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / NAMES.get(name, "out.pt")
    put(kind, path)
    before = path.lstat().st_mode, path.lstat().st_ino, os.stat(os.devnull).st_mode
    rule = (
        "a file must be writable" if kind == "link to itself" else "an output file must be a regular file or a new one"
    )
    with pytest.raises(DataError, match=rf"{rule}, got .* \({re.escape(str(path))}\)"):
        WRITERS[name](path)
    assert (path.lstat().st_mode, path.lstat().st_ino, os.stat(os.devnull).st_mode) == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_stays_and_its_file_is_written(name, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    path, target = (place / NAMES.get(name, "out.pt") for place in (tmp_path, folder))
    path.symlink_to(target)
    if name != "text":  # the others have a file there already, whose mode stays
        target.touch(0o640)
    WRITERS[name](path)
    assert path.is_symlink()
    assert target.stat().st_size
    assert name == "text" or stat.S_IMODE(target.stat().st_mode) == 0o640
    assert sorted(each.name for each in folder.iterdir()) == [target.name]


@pytest.mark.parametrize("name", ["save", "checkpoint", "latency table", "export", "load"])
def test_what_names_no_place_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"a path must (be text or a path-like object|name a place), got .* \(\w+\)"):
        {**WRITERS, "load": lambda path: nni_topo.load(path, net)}[name]("")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_others_may_read_a_file_as_the_umask_says(tmp_path):
    path = tmp_path / "net.safetensors"
    before = os.umask(0o027)
    try:
        nni_topo.save(net(), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_folder_is_probed_by_writing_to_it():
    # Root may write to any folder by its rights, but files can't be made in this one.
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc")
    with pytest.raises(DataError, match="must be a folder that can be written to, got one that can't"):
        disk.check_free_disk(Path("/proc/out"))


def test_a_lock_is_a_file(tmp_path):
    put("pipe", tmp_path / ".lock")
    with pytest.raises(DataError, match="an output file must be a regular file"), disk.only_process(tmp_path):
        pass


CONFIGS = Path(__file__).parents[1] / "configs"
VERBS = {
    "shrink": "shrink --model small_cnn --data digits",
    "prune": f"prune --config {CONFIGS}/prune_l1.yaml --model small_cnn --data digits",
    "compare": "compare --model small_cnn --data digits",
    "demo": "demo",
    **{name: f"analyze {name} --model small_cnn" for name in studies()},
    "compression": "analyze compression --model small_cnn --input-size 1 8 8",
    "experiment run": f"experiment run {CONFIGS}/experiments/tpe_ratios.yml",
    "experiment export": "experiment export",
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_looks_at_its_output_folder_before_it_works(verb, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    assert main([*VERBS[verb].split(), "--out", str(tmp_path / "file")]) == 2
    assert "an output folder must be a folder that can be written to" in " ".join(capsys.readouterr().err.split())


KILLED = """
import os, sys
from pathlib import Path
from safetensors.torch import save_file
import torch
from nni_topo.disk import whole_file
with whole_file(Path(sys.argv[1])) as part:
    save_file({"x": torch.ones(2)}, part)
    part.with_name(".tmpAbC").write_text("half of it")
    print("written", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_save_clears_what_killed_saves_left_and_nothing_of_running_ones(tmp_path):
    file = tmp_path / "dense.safetensors"
    command = [sys.executable, "-c", KILLED, str(file)]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"written\n"
        writers[0].kill()
        writers[0].wait()
        assert len(list(tmp_path.rglob("*.tmp*"))) == 2
        disk.write_text(tmp_path / "other.txt", "whole")
        left = list(tmp_path.iterdir())
        assert sum(each.is_dir() for each in left) == 1  # of the running one
        assert not file.exists()
    finally:
        writers[1].communicate(b"")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["dense.safetensors", "other.txt"]
