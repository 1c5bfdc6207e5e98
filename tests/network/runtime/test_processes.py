"""What processes tell one another, and a group of one, which adds up and agrees like any."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.network.runtime import processes
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


def test_sums_of_one_process_are_what_it_has(alone: Noting) -> None:
    assert alone.gather({"a": 1}, "here") == [{"a": 1}]
    assert alone.first("mine", "here") == "mine"
    given = [torch.arange(3.0), torch.ones(2, 2), torch.arange(2), torch.tensor(5.0, dtype=torch.float64)]
    tensors = [each.clone() for each in given]
    alone.add(tensors, "sums")
    alone.agree(tensors, "agreed")
    assert all(torch.equal(*pair) for pair in zip(tensors, given, strict=True))
    assert alone.total(None, torch.device("cpu"), "totals") is None
    total = alone.total(given[0], torch.device("cpu"), "totals")
    assert total is not given[0]
    assert total.tolist() == [0.0, 1.0, 2.0]
    shapes = [(3,), (2, 2), (2,), ()]
    told = [("here", {"a": 1}), ("here", "mine"), ("sums", shapes), ("agreed", None), ("totals", None)]
    assert alone.gathered == [*told, ("totals", (3,)), ("totals", [(3,)])]


class Two(Processes):
    """Stands for two processes that have the same."""

    def _collect(self, work: Any, tensor: torch.Tensor, place: str) -> None:
        super()._collect(lambda buffer: (work(buffer), buffer.mul_(2)), tensor, place)


def test_all_tensors_of_a_bucket_are_added_up_in_place(alone: Noting) -> None:
    two = Two(alone.group)
    tensors = [torch.ones(2), torch.ones(2, 2).mT, torch.ones(1, dtype=torch.float64), torch.ones(3, 2).mT]
    weight = nn.Parameter(torch.ones(2))
    two.add([*tensors, weight], "sums")
    assert [float(each.min()) for each in (*tensors, weight)] == 5 * [2.0]
    turned = torch.ones(3, 2).mT
    two.add([turned], "sums")
    assert turned.unique().tolist() == [2.0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        ([(2, torch.float32)] * 3, [2, 1]),  # of 8 bytes each, where 16 are added up in one go
        ([(2, torch.float32)] * 2, [2]),
        ([(9, torch.float32), (1, torch.float32)], [1, 1]),
        ([(1, torch.float32), (1, torch.float64), (1, torch.float64), (1, torch.float32)], [1, 2, 1]),
    ],
)
def test_neighbours_of_one_type_are_added_up_in_one_go(given, expected, monkeypatch) -> None:
    monkeypatch.setattr(processes, "_BUCKET_BYTES", 16)
    tensors = [torch.zeros(count, dtype=dtype) for count, dtype in given]
    buckets = list(processes._buckets(tensors))
    assert [len(bucket) for bucket in buckets] == expected
    assert [id(each) for bucket in buckets for each in bucket] == [id(each) for each in tensors]


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
    assert [value for _, value in alone.gathered] == [{"model": "'net'", "seed": "4"}, None]
    assert alone.gathered[0][0] in place
    assert alone.gathered[1][0] == f"the end of {alone.gathered[0][0]}"
    assert not is_in_step()
    alone.gathered.clear()
    assert any_number(3, Data(alone), 5)  # the function within takes no steps of its own
    assert [value for _, value in alone.gathered] == [{"given": "3", "2": "5"}, None]
    with pytest.raises(ValueError, match="negative"):
        work(1, seed=-1, data=Data(alone))
    assert not is_in_step()


def test_a_place_is_told_with_the_function_that_runs(alone: Noting) -> None:
    assert processes._at("sums") == "sums"
    with alone.in_step("compensate"):
        assert processes._at("sums") == "sums, compensate"
        assert processes._at("the end of compensate") == "the end of compensate"
        with alone.in_step("distill"):
            assert processes._at("sums") == "sums, compensate"
    assert [place for place, _ in alone.gathered] == ["compensate", "the end of compensate"]


def test_errors_are_told_in_their_first_sentence() -> None:
    for error, words in (
        ("[/src/pair.cc:534] Connection closed by peer. Try again.\nat 3", "Connection closed by peer"),
        ("Timed out", "Timed out"),
        ("Timed out\n[x] later", "Timed out"),
    ):
        assert processes._words(RuntimeError(error)) == words


def test_only_what_differs_is_told_of_arguments_by_name() -> None:
    given = [{"seed": "1", "model": "a"}, {"seed": "2", "model": "a"}, {"model": "a"}]
    assert processes._differing(given) == ["seed 1", "seed 2", "seed not given"]
    assert processes._differing([{"seed": "1"}, None]) == ["{'seed': '1'}", "None"]


def test_a_digest_is_that_of_names_shapes_and_values_in_single_precision() -> None:
    values = torch.tensor([[1.0, 2.0]])
    expected = hashlib.sha256(b"a (1, 2)" + np.float32([1, 2]).tobytes()).hexdigest()
    for same in (values, values.double(), values.int(), values.mT.contiguous().mT):
        assert digest([("a", same)]) == expected
    for other in ([("b", values)], [("a", values.mT)], [("a", values + 1)], [("a", values), ("a", values)]):
        assert digest(other) != expected


@dataclass
class Budget:
    """A knob of several parts."""

    share: float
    name: str
    data: object = None


WEIGHT, BIAS = torch.ones(2, 2), torch.zeros(2)
LINEAR = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (3, "3"),
        ("flops", "'flops'"),
        (None, "None"),
        (True, "True"),
        (object(), ""),
        (Budget, ""),
        (WEIGHT, ""),
        (Budget(0.5, "flops", object()), "Budget(name='flops', share=0.5)"),
        ({"b": 1, "a": {"d": 2.5, "c": None}, "model": LINEAR}, "a.c=None, a.d=2.5, b=1"),
        ({"a": {}, "b": object()}, ""),
        (["a", 2], "['a', 2]"),
        (("a",), "['a']"),
        ([{"op_names": ["x"], "sparse_ratio": 0.5}], "[op_names=['x'], sparse_ratio=0.5]"),
        ([WEIGHT, {"images": WEIGHT}, 3], "[3]"),
        (["a" * 198], f"['{'a' * 198}']"),
        (["a" * 199], f"[1 entries {hashlib.sha256(repr('a' * 199).encode()).hexdigest()[:12]}]"),
        (LINEAR, f"with weights {digest(LINEAR.state_dict().items())[:12]}"),
        (
            {"z": {"weight": WEIGHT}, "a": {"weight": BIAS, "bias": 3}},
            f"a.bias=3, with tensors {digest([('a.weight', BIAS), ('z.weight', WEIGHT)])[:12]}",
        ),
    ],
)
def test_arguments_are_told_by_what_has_to_be_equal(value: Any, told: str) -> None:
    assert processes._told(value) == told
