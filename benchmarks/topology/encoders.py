"""The networks of T4 and T5 of HYPOTHESES.md: encoders of patches, trained without labels, and what is asked of them.

An encoder learns that two random patches of one image are nearer to each other than to patches of other images [1]_.
Its outputs are compared by their cosine.

References
----------
.. [1] T. Chen, S. Kornblith, M. Norouzi and G. Hinton, "A simple framework for contrastive learning of visual
   representations", https://arxiv.org/abs/2002.05709
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot
from which_filters import four_convolutions, pruner_masks

import nni_topo
from nni_topo import zoo

SIDE = 20  # pixels of a patch
OUTPUTS = 32
WIDTHS = (12, 16, 24, 32)  # filters of the first two convolutions, by seed; the other two have twice as many
EPOCHS, BATCH, RATE, TEMPERATURE = 4, 128, 3e-3, 0.1
NEIGHBOURS = 10
SOLVED = 512  # patches for weight reconstruction


def width_of(seed: int) -> int:
    """Return how many filters the first two convolutions of a seed's encoder have."""
    return WIDTHS[seed % len(WIDTHS)]


def trained_encoder(seed: int, data: zoo.DataBundle, out: Path) -> nn.Module:
    """Return the encoder of a seed, trained on patches of the training images."""
    torch.manual_seed(seed)
    width = width_of(seed)
    model = four_convolutions(OUTPUTS, data.in_channels, (width, width, 2 * width, 2 * width))
    path = out / "checkpoints" / f"encoder-{seed}.pt"
    if path.exists():
        zoo.load_checkpoint(path, model)
    else:
        _train(model, data.train.tensors[0], seed)
        zoo.save_checkpoint(path, model, {"seed": seed})
    return model.eval()


def _train(model: nn.Module, images: Tensor, seed: int) -> None:
    """Train an encoder in place: each image's two patches find each other in a batch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * batches)
    model.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: batches * BATCH].split(BATCH):
            pairs = torch.cat([random_patches(images[chosen], generator) for _ in range(2)])
            one, other = normalize(model(pairs)).chunk(2)
            similar = one @ other.T / TEMPERATURE
            same = torch.arange(BATCH)
            loss = (cross_entropy(similar, same) + cross_entropy(similar.T, same)) / 2.0
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def random_patches(images: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a patch (n, c, SIDE, SIDE) from a random place of each image (n, c, h, w)."""
    count, _, height, width = images.shape
    top = torch.randint(0, height - SIDE + 1, (count, 1), generator=generator) + torch.arange(SIDE)
    left = torch.randint(0, width - SIDE + 1, (count, 1), generator=generator) + torch.arange(SIDE)
    item = torch.arange(count).view(-1, 1, 1)
    return images[item, :, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2).contiguous()


def centre_patches(images: Tensor) -> Tensor:
    """Cut the patch (n, c, SIDE, SIDE) in the middle of each image (n, c, h, w)."""
    top, left = ((side - SIDE) // 2 for side in images.shape[2:])
    return images[:, :, top : top + SIDE, left : left + SIDE].contiguous()


def embedded(model: nn.Module, patches: Tensor) -> Tensor:
    """Return the outputs (n, OUTPUTS) for patches, as they are."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in patches.split(500)])


def pruned_encoder(model: nn.Module, share: float, patches: Tensor, seed: int) -> nn.Module:
    """Keep a share of every convolution's filters by L1, and reconstruct the weights with some patches."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    masks = pruner_masks("l1", share, model, names, patches[:2], seed)
    solved = nni_topo.compensate(model, masks, [patches[:SOLVED]], progress=False)
    return nni_topo.to_dense(solved, patches[:2], masks)


def nearest(queries: Tensor, others: Tensor) -> Tensor:
    """Return the numbers (n, NEIGHBOURS) of the vectors with the largest cosine; no vector is its own neighbour."""
    similar = normalize(queries) @ normalize(others).T
    if queries is others:
        similar.fill_diagonal_(-torch.inf)
    return similar.topk(NEIGHBOURS).indices


def recall(found: Tensor, wanted: Tensor) -> float:
    """Return which share of the neighbours (n, NEIGHBOURS) that are wanted was found."""
    return float((found[:, :, None] == wanted[:, None, :]).any(2).double().mean())


def neighbour_accuracy(queries: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor) -> float:
    """Return the share of vectors whose label most of the nearest vectors of a gallery have."""
    votes = one_hot(gallery_labels[nearest(queries, gallery)]).sum(1)
    return float((votes.argmax(1) == labels).double().mean())
