"""What processes that retrain together share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

from nni_topo import zoo
from nni_topo.errors import ConfigError, DataError
from nni_topo.runs import processes
from nni_topo.runs.processes import check_equal_masks, data_share, masks_digest, process_group, world


def test_shares_leave_out_what_does_not_go_round():
    data = zoo.load_data("digits", limit=10)
    numbers = torch.arange(11)
    data = replace(data, train=TensorDataset(numbers, numbers))
    shares = [data_share(data, rank, 3) for rank in range(3)]
    assert [share.train.tensors[0].tolist() for share in shares] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert shares[1].test is data.test
    assert data_share(data, 10, 11).train.tensors[0].tolist() == [10]
    with pytest.raises(ConfigError, match=r"must get a training image, got 11 for 12 \(data_share\)"):
        data_share(data, 0, 12)


def test_digests_do_not_depend_on_the_order_or_on_masks_that_are_none():
    one, two = torch.ones(2), torch.zeros(3)
    first = {"a": {"weight": one, "bias": None}, "b": {"weight": two}}
    assert masks_digest(first) == masks_digest({"b": {"weight": two}, "a": {"weight": one}})
    assert masks_digest(first) != masks_digest({"b": {"weight": one}, "a": {"weight": two}})


@pytest.mark.parametrize(
    ("size", "device", "backend"),
    [(None, "cpu", None), ("1", "cpu", None), ("2", "cpu", "gloo"), ("2", "cuda", "nccl"), ("2", None, "gloo")],
)
def test_a_group_is_joined_where_there_are_several_processes_and_left_afterwards(size, device, backend, monkeypatch):
    if size is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", size)
    told = []
    monkeypatch.setattr(dist, "init_process_group", lambda name: told.append(name))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: told.append("left"))
    with process_group(*([] if device is None else [device])) as found:
        assert found == (0, 1)
        assert told == ([] if backend is None else [backend])
    assert told == ([] if backend is None else [backend, "left"])


def test_a_group_that_is_there_is_used_and_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with process_group() as found:
            assert found == world() == (0, 1)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_masks_that_differ_are_told_by_rank(monkeypatch):
    masks = {"a": {"weight": torch.ones(2)}}
    monkeypatch.setattr(processes, "_is_group", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert world() == (1, 3)

    def gather(found, own):
        assert len(found) == 3
        found[:] = [own, "0123456789abcdef", own]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    own = masks_digest(masks)[:12]
    words = rf"got rank 0: {own}, rank 1: 0123456789ab, rank 2: {own} \(check_equal_masks\)"
    with pytest.raises(DataError, match=words):
        check_equal_masks(masks)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, own: found.__setitem__(slice(None), [own] * 3))
    check_equal_masks(masks)
