"""Networks that take inputs of several sizes, compared at sizes and batches that the package has never seen."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from reliability.cases import Case, images
from reliability.oracle import WrongError
from reliability.roads import Road
from reliability.serving import WholeError, with_l1, with_random
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def sequences(batch: int, length: int) -> Tensor:
    """Draw sequences, or sets, of rows of six features."""
    return torch.randn(batch, length, 6)


class DeepSets(nn.Module):
    """A sum over members of what isn't zero at zero (Zaheer et al., 2017)."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.o = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 10), nn.Linear(10, 3)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.c(self.act(self.b(self.a(x).relu())).sum(1)).relu())


class Pooling(nn.Module):
    """Convolutions, and features pooled over places."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Linear(12, 3)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.pool(self.b(self.a(x).relu()).flatten(2)))


class AttentionPooling(nn.Module):
    """A weighted sum over places, weights by a softmax (Ilse et al., 2018, gated)."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.v, self.u, self.w, self.o = (
            nn.Linear(i, o) for i, o in ((6, 16), (16, 8), (16, 8), (8, 1), (16, 3))
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x).relu()
        weight = self.w(self.v(h).tanh() * self.u(h).sigmoid()).softmax(1)
        return self.o((weight * h).sum(1))


class NonLocal(nn.Module):
    """Attention over places, divided by how many there are (Wang et al., 2018, dot product)."""

    def __init__(self, *, mixes: bool = False) -> None:
        super().__init__()
        self.a, self.q, self.k, self.v = nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 6, 1) for _ in range(3))
        self.z, self.o, self.mixes = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 3, 3, padding=1), mixes

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        b, _, h, w = x.shape
        q, k, v = (each(x).flatten(2) for each in (self.q, self.k, self.v))
        y = (q.transpose(1, 2) @ k) / (h * w) @ v.transpose(1, 2)  # (b, places, channels)
        # MAnet of segmentation_models_pytorch forgets to transpose.
        y = y.reshape(b, -1, h, w) if self.mixes else y.transpose(1, 2).reshape(b, -1, h, w)
        return self.o(x + self.z(y))


class TwoWays(nn.Module):
    """Large images go through one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.more, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)
        self.o = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        is_large = x.shape[-1] >= 16
        x = self.a(x).relu()
        x = self.more(x).relu() if is_large else x
        return self.o(self.b(x).relu().mean((2, 3)))


class Unpacked(nn.Module):
    """Places joined with channels and taken apart in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mid, self.o = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        b, c, h, w = x.shape
        return self.o(x + self.mid(x).flatten(2).transpose(1, 2).reshape(b, c, h, w))


class Recognizer(nn.Module):
    """Columns of an image as steps in time, height and channels as features (CRNN, Shi et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.fc, self.o = nn.AdaptiveAvgPool2d((2, None)), nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.b(self.a(x).relu()).relu())
        return self.o(self.fc(x.permute(0, 3, 1, 2).flatten(2)).relu())


class Vlad(nn.Module):
    """Residuals to centres, summed over places (NetVLAD, Arandjelović et al., 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.assign, self.centres, self.o = nn.Conv2d(6, 4, 1), nn.Parameter(torch.randn(4, 6)), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        weight, x = self.assign(x).softmax(1).flatten(2), x.flatten(2)
        found = weight @ x.transpose(1, 2) - weight.sum(2)[..., None] * self.centres
        return self.o(F.normalize(found, dim=2).flatten(1))


def generalized_mean(x: Tensor) -> Tensor:
    """Pool by a generalized mean (Radenović et al., 2018)."""
    return x.clamp(min=1e-6).pow(3).mean(-1).pow(1 / 3)


def linear_attention(x: Tensor) -> Tensor:
    """Sum with weights that are divided by their sum over places (Katharopoulos et al., 2020)."""
    weight = F.elu(x) + 1
    return (weight * x).sum(-1) / weight.sum(-1)


class PositionAttention(nn.Module):
    """The position-wise attention block of segmentation_models_pytorch's MAnet, which mixes places with channels."""

    def __init__(self) -> None:
        super().__init__()
        made: Any = importlib.import_module("segmentation_models_pytorch.decoders.manet.decoder")
        self.a, self.block, self.o = nn.Conv2d(3, 8, 3, padding=1), made.PABBlock(8, 4), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.block(self.a(x).relu()))


CASES = [
    Case("set, sum of sigmoids", lambda: DeepSets(torch.sigmoid), sequences, (20, 5, 31)),
    Case("set, sum of ReLU", lambda: DeepSets(torch.relu), sequences, (20, 5, 31)),
    Case("gated attention pooling", AttentionPooling, sequences, (20, 5, 31)),
    Case("logsumexp pooling", lambda: Pooling(lambda x: x.logsumexp(-1)), images, (80, 8, 11)),
    Case("softmax over places", lambda: Pooling(lambda x: x.softmax(-1).square().sum(-1).sqrt()), images),
    Case("generalized mean", lambda: Pooling(generalized_mean), images),
    Case("linear attention", lambda: Pooling(linear_attention), images),
    Case("NetVLAD", Vlad, images),
    Case("non-local block", NonLocal, images, (8, 11, 16)),
    Case("non-local block, not transposed back", lambda: NonLocal(mixes=True), images, (8, 11, 16)),
    Case("places and channels mixed", Unpacked, images, (2, 3, 5)),
    Case("two ways, large example", TwoWays, images, (32, 8, 20)),
    Case("CRNN", Recognizer, images),
]
WHOLE = {"places and channels mixed"}
"""Networks of which no layer can lose channels at every size."""


def served(case: Case) -> None:
    """Prune a network by L1 norms and at random, and compare it at all sizes with one that is masked by hand."""
    try:
        with_l1(case, case.network())
        with_random(case, case.network())
    except WholeError:
        if case.name not in WHOLE:
            raise WrongError("no layer lost channels") from None
        raise


if importlib.util.find_spec("segmentation_models_pytorch"):  # an optional package
    CASES.append(Case("MAnet", PositionAttention, images, (8, 12, 16)))
ROADS = [Road("sizes", case.name, partial(served, case)) for case in CASES]
