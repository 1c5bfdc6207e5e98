"""Small networks that decide by values, which no tracer follows as they are."""
# ruff: noqa: D102

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def block(entering: int, leaving: int, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Make a convolution that keeps sizes, a norm and a ReLU."""
    return nn.Sequential(nn.Conv2d(entering, leaving, 3, padding=1), norm(leaving), nn.ReLU())


class Untraceable(nn.Module):
    """A loop over values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.one(row) * float(row.sum()) for row in x.unbind(0)]
        return self.two(torch.stack(rows))


class InParts(nn.Module):
    """A list of images, and boxes that are chosen by value between a backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(block(3, 8), block(8, 12))
        self.head = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for rows in self.backbone(torch.stack(images)).flatten(2).transpose(1, 2):
            best = [row for row in rows if float(row.sum()) > 0] or [rows[0]]
            found.append({"scores": self.head(torch.stack(best))})
        return found


class Experts(nn.Module):
    """Rows go to those of several experts that a router chooses for them, and what these make is put together again."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(4, 12), nn.Linear(12, count), nn.Linear(12, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.stem(x)) * 3
        samples, places, width = x.shape
        rows = x.view(-1, width)
        shares, chosen = torch.topk(self.router(rows).softmax(1), 2, dim=1)
        hit = functional.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        out = torch.zeros((samples * places, width), dtype=x.dtype, device=x.device)
        for expert in torch.greater(hit.sum((1, 2)), 0).nonzero():
            rank, row = torch.where(hit[expert].squeeze(0))
            made = self.experts[expert](rows[None, row].reshape(-1, width)) * shares[row, rank, None]
            out.index_add_(0, row, made)
        return self.head(x + out.reshape(samples, places, width))


class Detector(nn.Module):
    """Levels of a backbone that go to heads, which are named before it; what these give is chosen from by value."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = (nn.Sequential(block(12, 12), nn.Conv2d(12, n, 1)) for n in (3, 4))
        self.levels = _Levels()

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        levels = [*self.levels(torch.stack(images)).values()]
        sizes = [level.shape[-2:] for level in levels]
        scores, boxes = ([head(level) for level in levels] for head in (self.scores, self.boxes))
        scores, boxes = (torch.cat([each.flatten(2) for each in heads], 2).transpose(1, 2) for heads in (scores, boxes))
        places = torch.cat([torch.arange(height * width) for height, width in sizes])
        found = []
        for rows, sides in zip(scores, boxes, strict=True):
            best = [at for at, row in enumerate(rows) if float(row.sum()) > 0] or [0]
            found.append({"scores": rows[best], "boxes": sides[best] + places[best, None]})
        return found


class _Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Sequential(block(3, 8), block(8, 12)), block(12, 12)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x)
        return {"fine": fine, "coarse": self.coarse(functional.max_pool2d(fine, 2))}
