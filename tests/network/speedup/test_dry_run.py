"""Which channels a dry run finds that can't go."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.network.speedup import dry_run as dry_runs
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dependency import unprunable_layers
from nni_topo.network.speedup.dry_run import _DryRun

ROWS = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))


def dry_run(model: nn.Module, rows: torch.Tensor = ROWS) -> _DryRun:
    """Make one of a model of which the odd channels of the first layer go."""
    trace = Analysis.on(model, rows).trace
    assembled, flow = trace.assembled, trace.flow
    left = np.ones(flow.size, dtype=bool)
    left[flow.group_ids_of("0")[1::2]] = False
    return _DryRun(flow, left, assembled(copy.deepcopy(model)))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("layer", ["0", "2"])
@torch.no_grad()
def test_a_layer_that_was_cut_wrongly_shows(layer, name):
    torch.manual_seed(0)
    wrong = dry_run(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval())
    values = getattr(wrong.small.get_submodule(layer), name)
    values.data = values.data.flip(0)
    assert set(wrong.flow.group_ids_of("0")[1::2].tolist()) <= wrong.run((ROWS,)).keys()


class Routed(nn.Module):
    """Calls those experts that a router gives a row, in a loop over them, as mixtures of Transformers do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(4))

    def forward(self, x):
        chosen = nn.functional.one_hot(self.router(x).topk(1, 1).indices, 4).permute(2, 1, 0)
        found = torch.zeros_like(x)
        for expert in torch.greater(chosen.sum((1, 2)), 0).nonzero():
            _, rows = torch.where(chosen[expert].squeeze(0))
            found = found.index_add(0, rows, self.experts[expert](x[rows]))
        return found


def test_other_random_numbers_are_drawn_where_a_router_leaves_an_expert_out(monkeypatch):
    model, reasons = Routed().eval(), []
    for seed in range(40):
        rows = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
        if len(model.router(rows).argmax(1).unique()) < 4:  # an expert that isn't called is no part of the graph
            continue
        with monkeypatch.context() as patched:
            patched.setattr(dry_runs, "_DRAWS", 1)
            alone = str(nni_topo.explain(copy.deepcopy(model), rows, "experts.0.0"))
        if "the dry run fails on random numbers" in alone:
            reasons.append(alone)
            found = str(nni_topo.explain(copy.deepcopy(model), rows, "experts.0.0"))
            assert "all but one of 8 channels can be pruned" in found
            break
    assert "IndexError: tuple index out of range" in reasons[0]


class Picking(nn.Module):
    """Reads rows that a mask picks, and adds positions, for which it only asks the length of one of the channels."""

    def __init__(self, *, reads_values: bool):
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.places, self.reads_values = nn.Embedding(12, 8), reads_values

    def forward(self, ids):
        x = self.words(ids)
        one = x[:, :, -1]
        positions = self.places(torch.arange(one.shape[1], device=ids.device))
        x = x * one.mean(1)[:, None, None] if self.reads_values else x
        x = self.inner(x + positions).relu()
        ends = ids.eq(2)
        return self.head(x[ends, :].view(len(ids), -1, x.shape[-1])[:, -1])


@pytest.mark.parametrize("reads_values", [False, True])
@torch.no_grad()
def test_a_channel_that_is_picked_counts_where_its_values_do_and_rows_that_a_mask_picks_have_all(reads_values):
    torch.manual_seed(0)
    model, ids = Picking(reads_values=reads_values).eval(), torch.randint(3, 9, (4, 7))
    ids[:, -1] = 2
    asked = [{"op_types": ["Linear", "Embedding"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(model, ids, asked)
    told = "1 of 8 channels are kept: the forward picks or counts channels by fixed numbers (getitem)"
    assert groups.skipped.get("words") == (told if reads_values else None)
    assert "inner" not in groups.skipped
    masks = nni_topo.create_pruner("random", copy.deepcopy(model), list(groups), seed=0).compress()[1]
    if reads_values:  # the one that is read may be masked
        for name in ("words", "places"):
            masks[name]["weight"][:, -1] = 1
    dense, reference = nni_topo.to_dense(model, ids, masks), nni_topo.masked_model(model, ids, masks)
    assert dense.words.embedding_dim in ((4, 5) if reads_values else (4,))
    assert dense.inner.out_features == 4
    torch.testing.assert_close(dense(ids), reference(ids))


class LowRank(nn.Linear):
    """A linear layer that adds a product of two parameters of its own widths, as LoRA by inheritance does."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, width)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows) + rows @ self.down.T @ self.up.T


def test_a_layer_with_parameters_that_are_not_cut_keeps_its_own_channels_alone():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), LowRank(10, 12), nn.ReLU(), nn.Linear(12, 4)]
    layers += [nn.ReLU(), nn.Linear(4, 2)]
    model = nn.Sequential(*layers).eval()
    small = nni_topo.shrink(model, [ROWS], {"params": 0.8}, distill=False)
    widths = [len(each.weight) for each in small if isinstance(each, nn.Linear)]
    assert widths[1:3] == [10, 12]  # what enters it and what it makes
    assert widths[0] < 8
    assert widths[3] < 4
    kept = unprunable_layers(Analysis.on(model, ROWS), ["0", "2", "4", "6"])
    assert kept.keys() == {"2", "4"}


class Causal(nn.Conv1d):
    """A convolution that keeps the last places of its input for its next call, as autoencoders of films do."""

    last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = x[..., :1].expand(-1, -1, 2) if self.last is None else self.last
        x = torch.cat([before, x], -1)
        self.last = x[..., -2:].clone()
        return super().forward(x)


class Streaming(nn.Module):
    """Calls its convolutions on one piece after the other, and makes them forget the last one at the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = Causal(3, 8, 3), Causal(8, 8, 3), nn.Conv1d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = [self.head(self.second(self.first(piece).relu()).relu()) for piece in x.split(4, -1)]
        self.first.last = self.second.last = None
        return torch.cat(pieces, -1)


def test_what_a_layer_leaves_for_its_next_call_keeps_no_channels() -> None:
    model, sounds = Streaming().eval(), torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(0))
    groups = nni_topo.dependency_groups(model, sounds, [{"op_types": ["Conv1d"], "sparse_ratio": 0.5}])
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense: Any = nni_topo.to_dense(model, sounds, masks)
    assert [dense.first.out_channels, dense.second.out_channels] == [4, 4]
    others = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(dense(others), nni_topo.masked_model(model, sounds, masks)(others))


class Thirds(nn.Module):
    """A layer whose channels are three alike parts, of which the first is used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x).reshape(len(x), 3, -1).permute(1, 0, 2)
        return x[0] * 0.5


def test_channels_before_a_wrong_size_are_to_blame_and_not_those_of_the_whole_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Thirds(), nn.Linear(4, 4)).eval()
    trace = Analysis.on(model, ROWS).trace
    assembled, flow = trace.assembled, trace.flow
    left = np.ones(flow.size, dtype=bool)
    gone = flow.group_ids_of("2.layer")[9:]  # three of the last part, so that each part gets a channel less
    left[flow.group_ids_of("0")[1::2]] = left[gone] = False
    with torch.no_grad():
        found = _DryRun(flow, left, assembled(copy.deepcopy(model))).run((ROWS,))
    assert found.keys() == set(gone.tolist())


class Divided(nn.Module):
    """Divides by the root, say, of a size of what it computes."""

    def __init__(self, dim: int, root: Callable[[int], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.dim, self.root = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), dim, root

    def forward(self, x):
        x = self.first(x)
        return self.last(x / self.root(x.shape[self.dim]))


ROOTS = {
    "power": lambda size: size**0.5,
    "math.sqrt": math.sqrt,
    "a tensor": lambda size: torch.tensor(float(size)),
    "of the double": lambda size: math.sqrt(2 * size),
}


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.quick_every(3)
def test_a_number_that_is_made_of_how_many_channels_there_are_holds_them(dim, root):
    images, asked = torch.randn(2, 3, 5, 5), [{"op_names": ["first"], "sparse_ratio": 0.5}]
    skipped = unprunable_layers(Analysis.on(Divided(dim, root).eval(), images), ["first"])
    assert [each.kind for each in skipped.get("first", ())] == (["number_made"] if dim == 1 else [])
    assert len(nni_topo.dependency_groups(Divided(dim, root).eval(), images, asked)) == 1


class Remembering(nn.Module):
    """Joins a mask for its samples with one for a memory that is empty, as Emformer does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        memory = torch.zeros(1, x.size(0) - x[:80].size(0), device=x.device)
        mask = torch.cat([torch.ones(1, x.size(0), device=x.device), memory], 1)
        return self.last(self.first(x).relu()) * mask.transpose(0, 1)


@torch.no_grad()
def test_a_tensor_without_elements_keeps_no_channels():
    model = Remembering().eval()
    groups = nni_topo.dependency_groups(model, ROWS, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert list(groups.skipped) == ["last"]
    pruner = nni_topo.RandomPruner(model, groups, seed=0)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(model, ROWS, masks)
    assert dense.first.out_features == 4
    masked = nni_topo.masked_model(model, ROWS, masks)
    for rows in (ROWS, ROWS[:7]):
        torch.testing.assert_close(dense(rows), masked(rows))


class Returning(nn.Module):
    """Attention that also returns its weights: their mean over the heads, or those of each head."""

    def __init__(self, *, mean: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave, self.mean = nn.Linear(5, 16), nn.Linear(16, 3), mean
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = self.enter(x)
        y, weights = self.attention(x, x, x, average_attn_weights=self.mean)
        return self.leave(y), [weights]


@pytest.mark.parametrize("mean", [True, False])
@torch.no_grad()
def test_heads_stay_if_the_model_returns_their_weights(mean: bool) -> None:
    model, x, other = Returning(mean=mean).eval(), torch.randn(2, 6, 5), torch.randn(3, 9, 5)
    groups = nni_topo.dependency_groups(model, x, [{"op_types": ["Linear", "MultiheadAttention"], "sparse_ratio": 0.5}])
    assert groups.skipped.keys() == {"attention", "leave"}
    masks = nni_topo.create_pruner("random", copy.deepcopy(model), groups).compress()[1]
    dense, masked = nni_topo.to_dense(model, x, masks), nni_topo.masked_model(model, x, masks)
    assert dense.enter.out_features == dense.leave.in_features == 8
    for inputs in (x, other):
        torch.testing.assert_close(dense(inputs), masked(inputs))
