"""Processes that share calibration data, started by the tests, and the networks that they prune and solve."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_topo.errors import NniTopoError
from nni_topo.network.runtime.processes import Processes

TIMEOUT = 60  # seconds
_LENGTH = 400  # of sentences: with 48 of them positions are sampled


class Convolutions(nn.Module):
    """Convolutions with batch norms; of the first layer positions are sampled, at the others all are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.mixing = nn.Conv2d(12, 16, 1)
        self.last, self.last_norm = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(images)))
        x = functional.relu(self.mixing(x))
        x = functional.relu(self.last_norm(self.last(x)))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


class Residual(nn.Module):
    """A stem and two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 1))
            for _ in range(2)
        )
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(functional.relu(x))
        found: Tensor = self.head(x.mean((2, 3)))
        return found


class Transformer(nn.Module):
    """A block of a Transformer, that takes a mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(16, 4, 40, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        x = self.body(tokens, src_key_padding_mask=src_key_padding_mask)
        found: Tensor = self.head(x)
        return found


class Wide(nn.Module):
    """Linear layers with more inputs than there are samples, which are kept as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(40, 64), nn.Linear(64, 48), nn.Linear(48, 5)

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.head(functional.relu(self.second(functional.relu(self.first(rows)))))
        return found


def made(kind: type[nn.Module]) -> nn.Module:
    """Return a network with statistics of its own, in evaluation mode."""
    torch.manual_seed(0)
    model = kind()
    if kind in (Convolutions, Residual):
        with torch.no_grad():
            model.train()
            for _ in range(3):
                model(torch.randn(32, 3, 12, 12))
    return model.eval()


def batches(kind: type[nn.Module], sizes: tuple[int, ...], *, mixed: bool = False) -> list[Any]:
    """Return batches of these sizes: of images, every second batch smaller if so asked, or of padded sentences."""
    generator = torch.Generator().manual_seed(1)
    if kind is Wide:
        return [torch.randn(size, 40, generator=generator) for size in sizes]
    if kind is not Transformer:
        sides = (24, 20) if mixed else (24, 24)
        return [
            torch.randn(size, 3, side, side, generator=generator) for size, side in zip(sizes, itertools.cycle(sides))
        ]
    found = []
    for size in sizes:
        tokens = torch.randn(size, _LENGTH, 16, generator=generator)
        padding = torch.arange(_LENGTH) >= torch.randint(100, _LENGTH + 1, (size, 1), generator=generator)
        found.append({"tokens": tokens, "src_key_padding_mask": padding})
    return found


def told(work: Any) -> tuple[str, str]:
    """Return an error's type and words."""
    try:
        work()
    except NniTopoError as error:
        return type(error).__name__, str(error)
    return "", "no error"


def start(work: Callable[..., None], count: int, folder: Path, *given: Any, timeout: int = TIMEOUT) -> list[Any]:
    """Run a function in so many processes of a gloo group, and return their processes, which have ended."""
    context = torch.multiprocessing.get_context("spawn")
    store = f"file://{folder}/store-{work.__name__}-{count}"
    started = [
        context.Process(target=_join, args=(work, rank, count, store, folder, given, timeout), daemon=True)
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(4 * TIMEOUT)
    return started


def _join(
    work: Callable[..., None], rank: int, count: int, store: str, folder: Path, given: tuple[Any, ...], timeout: int
) -> None:
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timedelta(seconds=timeout))
    work(rank, count, folder, *given)
    dist.destroy_process_group()


class Thread(Processes):
    """One of some threads that share images as processes do: what they tell goes through a list."""

    def __init__(self, rank: int, told: list[Any], barrier: Barrier) -> None:
        self.rank, self.size = rank, len(told)
        self._told, self._barrier = told, barrier

    def gather(self, value: Any, place: str) -> list[Any]:
        """Return what each thread has."""
        self._told[self.rank] = value
        self._barrier.wait()
        found = list(self._told)
        self._barrier.wait()
        return found

    def add(self, tensors: Sequence[Tensor], place: str) -> None:
        """Replace tensors by their sums over all threads."""
        found = self.gather([each.detach().clone() for each in tensors], place)
        for tensor, of_all in zip(tensors, zip(*found, strict=True), strict=True):
            assert all(each.dtype == tensor.dtype for each in of_all)
            tensor.detach().copy_(sum(of_all))

    def agree(self, tensors: Sequence[Tensor], place: str) -> None:
        """Replace tensors by those of the first thread."""
        for tensor, first in zip(tensors, self.first([each.detach().clone() for each in tensors], place), strict=True):
            tensor.detach().copy_(first)


def in_threads(count: int, work: Callable[[Thread], Any]) -> list[Any]:
    """Return what a function returns in each of some threads that share images."""
    told, barrier = [None] * count, Barrier(count, timeout=10)

    def run(rank: int) -> Any:
        try:
            return work(Thread(rank, told, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
