from __future__ import annotations

import itertools

import pytest
import torch
from nni.compression.pruning import FPGMPruner, L1NormPruner, L2NormPruner
from partly_tied_nets import NETS, Block, make
from speedup_nets import masks_of
from torch import nn

import nni_topo
from nni_topo import to_dense
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.speedup import dependency_groups

IMAGES = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
PRUNERS = {
    "l1": lambda model, config: nni_topo.MatrixPruner(model, config, norm=1),
    "random": lambda model, config: nni_topo.RandomPruner(model, config, seed=3),
    "topological": nni_topo.TopologicalPruner,
    "NNI's l1": L1NormPruner,
    "NNI's l2": L2NormPruner,
    "NNI's fpgm": FPGMPruner,
}


def convolutions(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def gone(model, dense):
    """The share of the convolutions' channels that a dense model lacks."""
    whole, left = (sum(each.out_channels for each in convolutions(net).values()) for net in (model, dense))
    return 1 - left / whole


def rows(masks):
    """The masks as lists, which compare; NNI's mask of a bias that isn't there is None."""
    return {
        name: {target: mask if mask is None else mask.tolist() for target, mask in targets.items()}
        for name, targets in masks.items()
    }


@pytest.mark.parametrize(("name", "pruner"), list(itertools.product(NETS, PRUNERS)))
@pytest.mark.quick_every(5)
def test_half_of_the_channels_go_and_the_dense_model_computes_the_same(name, pruner, caplog):
    model = make(name)
    groups = dependency_groups(model, IMAGES, HALF)
    assert groups.ties
    masks = masks_of(PRUNERS[pruner](model, groups))
    dense = to_dense(model, IMAGES, masks)
    assert gone(model, dense) == 0.5
    # Each layer loses its half, as asked for, and none of its masked channels came back.
    assert all(each.out_channels * 2 == whole.out_channels for each, whole in zip(
        convolutions(dense).values(), convolutions(model).values(), strict=True
    ))  # fmt: skip
    assert not dense.report.kept
    assert not caplog.records
    with torch.no_grad():
        torch.testing.assert_close(
            dense(IMAGES), masked_model(model, IMAGES, masks).eval()(IMAGES), rtol=1e-12, atol=1e-12
        )
    assert rows(masks) == rows(masks_of(PRUNERS[pruner](model, dependency_groups(model, IMAGES, HALF))))


def test_ties_say_which_channels_go_together():
    ties = dependency_groups(make("SplitResidual"), IMAGES, HALF).ties
    assert ties.keys() == {"expand.conv", "inner.0.1.conv", "inner.1.1.conv"}
    assert len(set(ties["expand.conv"])) == 32
    assert ties["expand.conv"][16:] == ties["inner.0.1.conv"] == ties["inner.1.1.conv"]
    ghosts = dependency_groups(make("Ghosts"), IMAGES, HALF).ties
    assert ghosts["stem.conv"][:8] == ghosts["stem.conv"][8:] == ghosts["same.1.primary.conv"]


def test_a_layer_that_is_left_out_ties_nothing():
    config = [{**HALF[0], "exclude_op_names": ["expand.conv"]}]
    assert dependency_groups(make("SplitResidual"), IMAGES, config).ties == {}


def test_channels_with_the_highest_mean_score_over_all_layers_stay():
    model = make("SplitResidual")
    masks = masks_of(nni_topo.MatrixPruner(model, dependency_groups(model, IMAGES, HALF), norm=1))
    weights = {name: each.weight.detach().flatten(1).abs() for name, each in convolutions(model).items()}
    wide = weights["expand.conv"].sum(1)
    # The pruner's score of a group is the norm over both of its layers, and counts for each of them.
    narrow = torch.cat([weights["inner.0.1.conv"], weights["inner.1.1.conv"]], dim=1).sum(1)
    own, shared = wide[:16], (wide[16:] + 2 * narrow) / 3
    kept = masks["expand.conv"]["weight"][:, 0, 0, 0].bool()
    expected = torch.cat([own.topk(8).indices, 16 + shared.topk(8).indices])
    assert kept.nonzero().flatten().tolist() == sorted(expected.tolist())


@pytest.mark.parametrize(
    ("name", "budget"),
    [("SplitResidual", {"flops": 0.4}), ("Hierarchical", {"params": 0.3}), ("Ghosts", {"flops": 0.4})],
)
@pytest.mark.quick_every(4)
def test_a_budget_counts_what_will_be_left(name, budget):
    model = make(name)
    config = dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"]}])
    pruner = nni_topo.RandomPruner(model, config, budget=budget, example_inputs=IMAGES)
    dense = to_dense(model, IMAGES, masks_of(pruner))
    whole, left = (NetworkCost.on(net, IMAGES)({}) for net in (model, dense))
    shares = {"flops": left.macs / whole.macs, "params": left.params / whole.params}
    ((kind, asked),) = budget.items()
    assert pruner.planner.outcome.left == pytest.approx(shares[kind], rel=1e-12)
    assert shares[kind] == pytest.approx(asked, abs=0.03)


class GroupedSplit(nn.Module):
    """A split layer whose shared half enters a grouped convolution, so that its blocks lose equally many."""

    def __init__(self):
        super().__init__()
        self.half = 12
        self.expand, self.inner, self.join = Block(3, 24), Block(12, 12, 3, groups=3), Block(24, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        one, other = self.expand(x).split(self.half, dim=1)
        return self.head(self.join(torch.cat([one, other + self.inner(other)], dim=1)).mean((2, 3)))


@pytest.mark.parametrize("seed", range(2))
def test_blocks_of_grouped_convolutions_lose_equally_many(seed):
    torch.manual_seed(0)
    model = GroupedSplit().double().eval()
    dense = to_dense(
        model, IMAGES, masks_of(nni_topo.RandomPruner(model, dependency_groups(model, IMAGES, HALF), seed=seed))
    )
    assert {name: each.out_channels for name, each in convolutions(dense).items()} == {
        "expand.conv": 12, "inner.conv": 6, "join.conv": 4
    }  # fmt: skip
    assert dense.inner.conv.groups == 3


def test_layers_that_are_asked_for_different_ratios_lose_no_more_than_that(caplog):
    model = make("SplitResidual")
    config = [
        {"op_names": ["expand.conv"], "sparse_ratio": 0.25},
        {"op_names": ["inner.0.1.conv", "inner.1.1.conv"], "sparse_ratio": 0.75},
    ]
    dense = to_dense(model, IMAGES, masks_of(nni_topo.RandomPruner(model, dependency_groups(model, IMAGES, config))))
    # The halves of the wide layer keep equally many of its 24, so 12 of the shared ones stay where 4 were asked for.
    assert dense.expand.conv.out_channels == 24
    assert dense.inner[0][1].conv.out_channels == 12
    assert not dense.report.kept
    assert "more channels are kept in inner.0.1.conv.weight+inner.1.1.conv.weight 12 of 16 instead of 4" in caplog.text


class Gated(nn.Module):
    """Half of a layer's channels are multiplied with the other half, as in gated MLPs."""

    def __init__(self):
        super().__init__()
        self.enter, self.both, self.leave, self.head = (
            nn.Linear(*sizes) for sizes in ((6, 8), (8, 24), (12, 8), (8, 3))
        )

    def forward(self, x):
        gate, values = self.both(self.enter(x)).chunk(2, dim=-1)
        return self.head(self.leave(torch.nn.functional.silu(gate) * values))


@pytest.mark.parametrize(("shape", "pruner"), [((4, 6), "l1"), ((2, 4, 5, 6), "random"), ((4, 6), "NNI's l1")])
def test_both_halves_of_a_gated_layer_go_alike_of_states_in_any_shape(shape, pruner):
    torch.manual_seed(0)
    model, states = Gated().eval(), torch.randn(*shape)
    groups = dependency_groups(model, states, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    masks = masks_of(PRUNERS[pruner](model, groups))
    gate, values = masks["both"]["weight"].amax(1).chunk(2)
    assert torch.equal(gate, values)
    dense = to_dense(model, states, masks)
    assert (dense.both.in_features, dense.both.out_features, dense.leave.in_features) == (4, 12, 6)
    torch.testing.assert_close(dense(states), masked_model(model, states, masks)(states))


class Skipped(nn.Module):
    """As in a VNet: half of the channels are added to those of a skip connection that the input is added to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.up = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        skip = (self.first(x) + torch.cat([x] * 8, 1)).relu()
        joined = torch.cat([self.inner(skip).relu(), skip], 1)
        return self.out((self.up(joined) + joined).relu())


class Picked(nn.Module):
    """Four of the channels are picked by number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other, self.last = nn.Linear(3, 12), nn.Linear(3, 12), nn.Linear(12, 2)

    def forward(self, x):
        z = (self.first(x) + self.other(x)).relu()
        return self.last(z) + z[:, 3:7].sum(1, keepdim=True)


@pytest.mark.parametrize("seed", range(2))
def test_channels_that_have_to_stay_are_never_masked(seed):
    images = torch.randn(2, 1, 6, 6)
    model = Skipped().eval()
    groups = dependency_groups(model, images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=seed))
    assert masks["up"]["bias"][8:].all()  # those of the skip connection
    assert [int(masks[name]["bias"].sum()) for name in ("inner", "up")] == [4, 12]
    assert not to_dense(model, images, masks).report.kept
    model, rows_in = Picked().eval(), torch.randn(4, 3)
    groups = dependency_groups(model, rows_in, [{"op_names": ["first", "other"], "sparse_ratio": 0.75}])
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=seed))
    staying = {i for i, number in enumerate(groups.ties["first"]) if number < 0}
    assert staying
    assert staying <= set(masks["first"]["bias"].nonzero().flatten().tolist())
    assert torch.equal(masks["first"]["bias"], masks["other"]["bias"])
    assert not to_dense(model, rows_in, masks).report.kept
