"""Embeddings that are added to features, or scale them, lose the features' channels by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_topo
from nni_topo import zoo
from nni_topo.errors import ConfigError


class Timed(nn.Module):
    """A time embedding is added to the output of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.last = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.leave, self.time = nn.Linear(64, 16), nn.Embedding(10, 64)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        time = self.time(y)
        x = functional.silu(self.enter(x) + time)
        return self.leave(functional.silu(self.last(functional.silu(self.inner(x) + time))))


class ByClass(nn.Module):
    """A class embedding scales and shifts what a batch norm without weights returns."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(16, 256), nn.BatchNorm2d(16, affine=False)
        self.scales, self.inner, self.leave = nn.Embedding(10, 32), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.enter(x).view(len(x), -1, 4, 4)
        scale, shift = self.scales(y)[:, :, None, None].chunk(2, 1)
        return self.leave(self.inner(functional.relu(self.norm(x) * (1 + scale) + shift)).relu())


class Places(nn.Module):
    """Each pixel's row has an embedding; the class embedding is added at all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.rows, self.kinds = nn.Conv2d(1, 24, 1), nn.Embedding(4, 24), nn.Embedding(10, 24)
        self.inner, self.leave = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.enter(x.view(-1, 1, 4, 4))
        rows = self.rows(torch.arange(4, device=x.device)).t()[None, :, :, None]
        return self.leave(self.inner((x + rows + self.kinds(y)[:, :, None, None]).relu()).relu())


def batch_of(count: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(count, 16), "y": torch.randint(0, 10, (count,))}


@pytest.mark.parametrize("pruner", ["reconstruction", "random", "l1", "topological"])
@pytest.mark.parametrize(("make", "joined"), [(Timed, {"time"}), (ByClass, {"scales"}), (Places, {"rows", "kinds"})])
def test_embeddings_lose_the_channels_of_the_layers_that_they_meet(make: Any, joined: set[str], pruner: str) -> None:
    torch.manual_seed(0)
    model, batch = make().eval(), batch_of(32)
    small = nni_topo.shrink(model, [batch], {"flops": 0.5}, pruner=pruner, compensate=None, distill=False)
    share = zoo.count_macs(small, batch_of(1)) / zoo.count_macs(model, batch_of(1))
    assert share == pytest.approx(0.5, abs=0.03)
    rows = {row.name: row for row in small.report.layers.rows}
    assert all(rows[name].after < rows[name].before for name in joined | {"enter", "inner"})
    assert not small.report.layers.kept


@pytest.mark.parametrize("make", [Timed, ByClass, Places])
def test_the_dense_network_computes_what_the_masked_one_does(make: Any) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    two, five = ({name: each.double() if name == "x" else each for name, each in batch_of(n).items()} for n in (2, 5))
    config = [{"op_types": ["Conv2d", "Linear", "Embedding"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(model, two, config)
    masks = nni_topo.create_pruner("l1", make().double(), groups).compress()[1]
    dense, masked = nni_topo.to_dense(model, two, masks), nni_topo.masked_model(model, two, masks)
    assert not dense.report.kept
    assert all(row.after * 2 == row.before for row in dense.report.rows if row.name != "leave")
    torch.testing.assert_close(dense(**five), masked(**five), rtol=1e-9, atol=1e-9)


class Tokens(nn.Module):
    """Tables of tokens and positions, from which a residual stream begins; ``reads`` makes its layers."""

    def __init__(self, reads: Any) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 32), nn.Embedding(16, 32)
        self.inner, self.head = reads(), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        states = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(states + self.inner(states)).mean(1)


class Patches(nn.Module):
    """A table of positions is added to patches, and attention reads the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.positions = nn.Conv2d(3, 32, 4, 4), nn.Embedding(4, 32)
        self.block, self.head = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        states = self.enter(x).flatten(2).transpose(1, 2)
        states = states + self.positions(torch.arange(states.shape[1], device=x.device))
        return self.head(self.block(states)).mean(1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Tokens(mlp), torch.arange(16).view(2, 8)),
        (Tokens(lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)), torch.arange(16).view(2, 8)),
        (Patches(), torch.rand(8, 3, 8, 8)),
    ],
)
def test_tables_of_tokens_and_positions_keep_the_residual_stream(model: nn.Module, batch: Tensor) -> None:
    small: Any = nni_topo.shrink(model.eval(), [batch], {"flops": 0.6}, pruner="random", distill=False)
    widths = {row.name: (row.before, row.after) for row in small.report.layers.rows}
    assert all(before == after for name, (before, after) in widths.items() if before == 32 and "in_proj" not in name)
    assert any(after < before for before, after in widths.values())


def test_without_layers_a_refusal_does_not_speak_of_them() -> None:
    class Held(nn.Module):
        """The only layer is coupled with a table that attention-free tokens begin with."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.inner, self.head = nn.Embedding(20, 32), nn.Linear(32, 32), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            states = self.tokens(x)
            return self.head(states + self.inner(states)).mean(1)

    with pytest.raises(
        ConfigError, match=r"whose channels can be removed, got none: .*inner: shared with tokens"
    ) as told:
        nni_topo.shrink(Held().eval(), [torch.arange(16).view(2, 8)], {"flops": 0.5}, distill=False)
    assert "(layers)" not in str(told.value)
    assert "name these" not in str(told.value)
