"""Retraining by several processes: the same masks everywhere, and each one's share of the data.

The processes are those of an initialised ``torch.distributed`` group, whoever started it: ``torchrun``, Lightning's
``ddp`` strategy or Accelerate. Without a group everything here is the identity.

A pruner need not choose the same channels in every process: calibration data, seeds and the order of floating-point
sums may differ. So one process prunes, :func:`broadcast_masks` hands its masks to all, and each makes the same
dense model. ``DistributedDataParallel`` then copies the first process's weights, compensated or not, to the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nni_topo.errors import ConfigError, DataError
from nni_topo.pruners.hooks import Masks
from nni_topo.runs.run import on_cpu
from nni_topo.zoo import DataBundle
from nni_topo.zoo.labelled import subset

_Plain = TypeVar("_Plain")


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without a group."""
    return (dist.get_rank(), dist.get_world_size()) if _is_group() else (0, 1)


@contextmanager
def process_group(device: torch.device | str = "cpu") -> Iterator[tuple[int, int]]:
    """Join the group that ``torchrun`` describes in the environment, if it does; yield rank and size; leave it."""
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _is_group()
    if joins:
        # NCCL connects processes on GPUs, gloo all others
        dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    try:
        yield world()
    finally:
        if joins:
            dist.destroy_process_group()


def broadcast(value: _Plain, *, source: int = 0) -> _Plain:
    """Return the value of one process in all; it is pickled on the way, so it stays among one's own processes."""
    if not _is_group():
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=source)
    return held[0]  # type: ignore[no-any-return]


def broadcast_masks(masks: Masks | None, *, source: int = 0) -> Masks:
    """Return the masks of one process, ``source``, in all, on the CPU; the others' may be None.

    DataError if ``source`` has none.
    """
    held = broadcast(None if masks is None else on_cpu(masks), source=source)
    if held is None:
        raise DataError(f"the process that pruned must have masks, got None (rank {source})")
    return held


def data_share(data: DataBundle, rank: int, size: int) -> DataBundle:
    """Return a data set with every ``size``-th training image from ``rank`` on, all validation and test images."""
    each = len(data.train) // size
    if not each:
        raise ConfigError(f"each process must get a training image, got {len(data.train)} for {size} (data_share)")
    # Shares of equal length: all processes take as many steps, and none waits for gradients that never come. Up to
    # size - 1 images are left out.
    return replace(data, train=subset(data.train, slice(rank, rank + each * size, size)))


def _is_group() -> bool:
    return dist.is_available() and dist.is_initialized()
