"""What processes tell one another, and a group of one, which adds up and agrees like any."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nni_topo.errors import ConfigError
from nni_topo.network.runtime.processes import Processes, digest, in_step, is_in_step, processes_of


class Noting(Processes):
    """Notes what is gathered."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.gathered: list[tuple[str, Any]] = []

    def gather(self, value: Any, place: str) -> list[Any]:
        """Gather and note."""
        self.gathered.append((place, value))
        return super().gather(value, place)


@pytest.fixture
def alone() -> Iterator[Noting]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield Noting(dist.group.WORLD)
    dist.destroy_process_group()


class Data:
    """Stands for calibration data that processes share."""

    def __init__(self, shared: Processes | None) -> None:
        self.processes = shared


def test_a_group_of_one_shares_nothing_and_others_are_refused(alone: Noting) -> None:
    assert processes_of(None, "data") is None
    assert processes_of(alone.group, "data") is None
    with pytest.raises(ConfigError, match=r"must be a group of torch.distributed .* got str \(data\)$"):
        processes_of("gloo", "data")


def test_a_public_function_is_in_step_where_data_are_shared(alone: Noting) -> None:
    @in_step
    def work(model: Any, data: Any = None, *more: Any, device: str = "cpu", seed: int = 0) -> bool:
        if seed < 0:
            raise ValueError("negative")
        return is_in_step()

    @in_step
    def any_number(*given: Any) -> bool:
        return work(*given) and is_in_step()

    assert not work(1)
    assert not work(1, Data(None))
    assert alone.gathered == []
    assert work("net", Data(alone), device="cuda", seed=4)
    place = "test_a_public_function_is_in_step_where_data_are_shared.<locals>.work"
    assert [value for _, value in alone.gathered] == [{"model": "'net'", "seed": "4"}]
    assert alone.gathered[0][0] in place
    assert not is_in_step()
    alone.gathered.clear()
    assert any_number(3, Data(alone), 5)  # the function within takes no steps of its own
    assert [value for _, value in alone.gathered] == [{"given": "3", "2": "5"}]
    with pytest.raises(ValueError, match="negative"):
        work(1, seed=-1, data=Data(alone))
    assert not is_in_step()


def test_a_digest_is_that_of_names_shapes_and_values_in_single_precision() -> None:
    values = torch.tensor([[1.0, 2.0]])
    expected = hashlib.sha256(b"a (1, 2)" + np.float32([1, 2]).tobytes()).hexdigest()
    for same in (values, values.double(), values.int(), values.mT.contiguous().mT):
        assert digest([("a", same)]) == expected
    for other in ([("b", values)], [("a", values.mT)], [("a", values + 1)], [("a", values), ("a", values)]):
        assert digest(other) != expected
