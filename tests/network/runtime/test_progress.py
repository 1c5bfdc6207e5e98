"""What takes long shows a progress bar."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest

import nni_topo
from nni_topo.network.runtime.progress import bar, duration
from nni_topo.testing import toy_images, toy_model


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def late(monkeypatch):
    """Seconds by which tqdm's clock is ahead."""
    clock, seconds = time.time, [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock() + seconds[0])
    return seconds


@pytest.mark.parametrize(
    ("progress", "seconds", "shown"), [(True, 0.0, True), (None, 4.0, False), (None, 6.0, True), (False, 6.0, False)]
)
def test_progress_is_shown_where_it_is_asked_for_or_after_five_seconds(progress, seconds, shown, monkeypatch, late):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in bar("work", progress, range(3)):
        late[0] += seconds / 3
    assert ("work" in sys.stderr.getvalue()) == shown


@pytest.mark.parametrize(("stream", "most"), [(io.StringIO, 13), (Terminal, 90)])
def test_a_file_gets_a_bar_every_half_minute_and_a_terminal_more(stream, most, monkeypatch, late):
    monkeypatch.setattr(sys, "stderr", stream())
    for _ in bar("work", None, range(10, 100), total=100, done=10):
        late[0] += 4.0
    bars = sys.stderr.getvalue().split("\r")[1:]
    assert most // 2 < len(bars) <= most
    assert "100/100 [06:0" in bars[-1]


def test_a_process_without_an_output_works_on(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(bar("work", True, range(3))) == [0, 1, 2]


def selected(model, images, **progress):
    config_list = [{"op_names": ["hidden"], "sparse_ratio": 0.5}]
    pruner = nni_topo.ReconstructionPruner(model, config_list, calibration=[images], **progress)
    pruner.compress()
    pruner.unwrap_model()


def shrunk(model, images, **progress):
    steps = {"distill": {"steps": 2, "lr": 1e-3}}
    nni_topo.shrink(model, [images], {"params": 0.6}, pruner="reconstruction", **steps, **progress)


@pytest.mark.parametrize("called", [selected, shrunk])
@pytest.mark.parametrize("progress", [None, False])
def test_no_progress_is_shown_where_it_is_not_wanted(called, progress, monkeypatch):
    monkeypatch.setattr("nni_topo.network.runtime.progress._DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    called(toy_model(), toy_images(40), progress=progress)
    assert ("\r" in sys.stderr.getvalue()) == (progress is None)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (99.4, "99 s"),
        (100.0, "2 minutes"),
        (5990.0, "100 minutes"),
        (6600.0, "1.8 hours"),
    ],
)
def test_how_long_something_takes_is_told_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.slow
def test_how_processes_are_started_stays_the_users_choice():
    program = """
import multiprocessing
import nni_topo
from nni_topo.testing import toy_images, toy_model

nni_topo.shrink(toy_model(), [toy_images(64)], {"flops": 0.5}, distill={"steps": 2})
multiprocessing.set_start_method("spawn")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
