"""What processes that retrain together share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

from nni_topo import zoo
from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.processes import (
    broadcast,
    broadcast_masks,
    data_share,
    process_group,
    world,
)


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


@pytest.mark.parametrize("size", [None, "1"])
def test_a_process_alone_joins_no_group(size, monkeypatch):
    """Two processes that join one and leave it are in experiment/test_processes_together.py."""
    if size is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", size)
    with process_group() as found:
        assert found == (0, 1)
        assert not dist.is_initialized()


def test_a_group_that_is_there_is_used_and_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with process_group() as found:
            assert found == world() == (0, 1)
        assert dist.is_initialized()
        assert broadcast("a value") == "a value"
        mask = torch.ones(2, requires_grad=True)
        found = broadcast_masks({"conv": {"weight": mask, "bias": None}})
        assert (list(found["conv"]), found["conv"]["weight"].requires_grad) == (["weight"], False)
        with pytest.raises(DataError, match=r"the process that pruned must have masks, got None \(rank 0\)"):
            broadcast_masks(None)
    finally:
        dist.destroy_process_group()
