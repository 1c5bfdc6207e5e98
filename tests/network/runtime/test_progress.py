from __future__ import annotations

import io
import sys
import time

import pytest

from nni_topo.network.runtime.calibration import bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "seconds", "shown"),
    [
        (io.StringIO, True, 0.0, True),
        (io.StringIO, None, 6.0, False),
        (Terminal, None, 0.0, False),
        (Terminal, None, 6.0, True),
        (Terminal, False, 6.0, False),
    ],
)
def test_a_bar_is_shown_where_it_is_asked_for_or_a_terminal_waits(stream, progress, seconds, shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    clock, late = time.time, [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock() + late[0])
    for _ in bar("work", progress, range(3)):
        late[0] += seconds / 2
    assert ("work" in sys.stderr.getvalue()) == shown
