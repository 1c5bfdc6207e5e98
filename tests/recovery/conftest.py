from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from twin_nets import *  # noqa: F403

from nni_topo.network.runtime.processes import Processes


@pytest.fixture
def one_process() -> Iterator[Processes]:
    """Return a group of this process alone, which shares with others as one of several would."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield Processes(dist.group.WORLD)
    dist.destroy_process_group()


class Watch:
    """Stands still but for what the steps of a test take."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Return the clock of courses, which a test sets."""
    watch = Watch()
    monkeypatch.setattr("nni_topo.recovery.course.time", watch)
    return watch
