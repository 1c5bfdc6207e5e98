from __future__ import annotations

import pytest
from twin_nets import *  # noqa: F403


class Watch:
    """Stands still but for what the steps of a test take."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Return the clock of courses, which a test sets."""
    watch = Watch()
    for module in ("clock", "course", "rates"):
        monkeypatch.setattr(f"nni_topo.recovery.{module}.time", watch)
    return watch
