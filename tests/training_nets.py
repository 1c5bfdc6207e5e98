"""A small network with every kind of norm over channels, and its training by two processes."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from whole_nets import ResponseBlock

import nni_topo

PROCESSES = 2


class Block(nn.Module):
    """A block of a Transformer, whose attention is PyTorch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(width), nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        found: Tensor = x + self.down(functional.gelu(self.up(self.rms(x))))
        return found


class Net(nn.Module):
    """Convolutions, a response norm, and blocks of a Transformer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
        )
        self.response = ResponseBlock(width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.response(self.stem(images)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x.mean(1))
        return found


def pruned_net() -> Any:
    """Return the network with half of its channels, in evaluation mode."""
    torch.manual_seed(0)
    model = Net().eval()
    images = torch.randn(2, 3, 8, 8)
    asked = [{"op_types": ["Conv2d", "Linear", "MultiheadAttention"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(model, images, asked)
    pruner = nni_topo.create_pruner("l1", copy.deepcopy(model), groups)
    return nni_topo.to_dense(model, images, pruner.compress()[1])


def labelled() -> tuple[Tensor, Tensor]:
    """Return 16 images and their labels."""
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(16) % 4


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Train for a step and return the loss before it."""
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(images).float(), labels)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def train_shared(rank: int, how: str, saved: Path, folder: Path) -> None:
    """Train one of two processes' copies, or shards, for two steps on half of the images; the first writes the weights.

    Batch norms stay in evaluation mode: each process would normalize by its own half.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/{how}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)
    dense = nni_topo.load(saved, Net).eval()
    trained: nn.Module = dense
    if how == "ddp":
        trained = nn.parallel.DistributedDataParallel(dense)
    else:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for block in dense.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(dense, mesh=mesh)
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    images, labels = labelled()
    for _ in range(2):
        step(trained, optimizer, images[rank::PROCESSES], labels[rank::PROCESSES])
    weights = get_model_state_dict(trained, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(weights, folder / f"{how}.pt")
    dist.barrier()  # a process that still waits for messages aborts if the other one is gone
    dist.destroy_process_group()
    # A device mesh keeps the group's threads; one that frees a tensor while the interpreter ends aborts the process.
    os._exit(0)
