"""Networks that shuffle and split their channels lose what they are asked for, whatever their widths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nni.compression.pruning import L1NormPruner
from speedup_nets import filter_mask, masks_of, same_output, shuffled
from torch import nn

import nni_topo
from nni_topo.network.channels.constraints import DenseOrder, stays_in_place
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.network.speedup.reconcile import check_masks, union

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PRUNERS = {
    "random": lambda model, config: nni_topo.RandomPruner(model, config, seed=1),
    "l1": lambda model, config: nni_topo.MatrixPruner(model, config, norm=1),
    "topological": nni_topo.TopologicalPruner,
}


def pruned(model, ratio, pruner=PRUNERS["random"]):
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": ratio}])
    masks = masks_of(pruner(model, groups))
    return groups, masks, nni_topo.to_dense(model, IMAGES, masks)


def widths(model):
    return [each.out_channels for each in model.modules() if isinstance(each, nn.Conv2d)]


@pytest.mark.parametrize(
    ("half", "units", "ratio", "pruner"),
    [
        (16, 3, 0.5, "random"),
        pytest.param(14, 3, 0.5, "l1", marks=pytest.mark.slow),
        pytest.param(29, 4, 0.5, "topological", marks=pytest.mark.slow),
        pytest.param(22, 3, 0.25, "random", marks=pytest.mark.slow),
    ],
)
def test_each_layer_loses_what_it_is_asked_for(half, units, ratio, pruner):
    model = shuffled(half, units)
    groups, masks, dense = pruned(model, ratio, PRUNERS[pruner])
    assert groups.skipped == {}
    assert widths(dense) == [width - int(width * ratio) for width in widths(model)]
    assert not dense.report.kept
    with torch.no_grad():
        found = dense(IMAGES)
        torch.testing.assert_close(found, masked_model(model, IMAGES, masks)(IMAGES), rtol=1e-12, atol=1e-12)
        assert (found - model(IMAGES)).abs().max() > 1e-3


def test_an_order_that_begins_with_another_one_is_the_same():
    flow = Analysis.on(shuffled(8, 3), IMAGES).trace.flow
    generator, before = np.random.default_rng(0), None
    for turn in range(12):
        # Half of the channels of all layers go, or those of one layer more.
        is_kept = generator.random(flow.size) < 0.5 if turn % 4 == 0 else before.is_kept.copy()
        is_kept[flow.group_ids_of([*flow.layers][turn % len(flow.layers)])[turn % 3 :: 2]] = False
        is_kept[[0, *flow.at_output]] = True
        fresh, before = DenseOrder(flow, is_kept), DenseOrder(flow, is_kept, before)
        for name, ids in fresh.ids.items():
            torch.testing.assert_close(before.ids[name], ids, rtol=0, atol=0)
        assert before.entering.keys() == fresh.entering.keys()
        assert all(np.array_equal(before.entering[name], ids) for name, ids in fresh.entering.items())
        assert (before.failed, before.reordered) == (fresh.failed, fresh.reordered)


def test_where_a_number_cant_be_a_few_more_stay(caplog):
    # A third of six channels that lie together in the whole model would lie in other places than any of these.
    model = shuffled(6, 4)
    groups, masks, dense = pruned(model, 0.5)
    assert groups.skipped == {}
    left = union(model, Analysis.on(model, IMAGES).flow, check_masks(model, masks))
    assert stays_in_place(Analysis.on(model, IMAGES).flow, left)
    assert not dense.report.kept
    inner = [unit.branch[5].out_channels for unit in dense[1:5]]
    assert inner == [groups.shares[f"{place}.branch.5"].counts and sum(groups.shares[f"{place}.branch.5"].counts)
                     for place in range(1, 5)]  # fmt: skip
    assert inner[0] > 3
    assert "more channels are kept in 1.branch.5.weight" in caplog.text


def test_channels_with_the_highest_scores_of_each_stretch_stay():
    model = shuffled(14, 3)
    groups, masks, _ = pruned(model, 0.5, PRUNERS["l1"])
    share = groups.shares["1.branch.5"]
    norms = model[1].branch[5].weight.detach().abs().sum((1, 2, 3)).numpy()
    kept = masks["1.branch.5"]["weight"][:, 0, 0, 0].bool().numpy()
    assert sum(share.counts) == share.asked == 7
    for segment, count in enumerate(share.counts):
        own = np.flatnonzero(np.array(share.segments) == segment)
        assert own[kept[own]].tolist() == sorted(own[np.argsort(-norms[own])[:count]].tolist())


def test_a_ratio_that_shares_were_not_made_for_is_met_by_blocks():
    model = shuffled(16, 2)
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    others = groups.with_entries({**entry, "sparse_ratio": 0.25} for entry in groups)
    assert others.shares == groups.shares
    masks = masks_of(nni_topo.RandomPruner(model, others, seed=1))
    assert widths(nni_topo.to_dense(model, IMAGES, masks))[1:] == [12] * 7 + [9]


def test_masks_of_nnis_own_pruners_never_put_channels_astray():
    model = shuffled(14, 3)
    _, _, dense = pruned(model, 0.5, L1NormPruner)  # compared by `to_dense`
    assert sum(widths(dense)) < sum(widths(model))


class Turned(nn.Module):
    """Shuffles eight channels in two rows of four, so that 0 4 1 5 come before 2 6 3 7, and reads them in some way."""

    def __init__(self, way):
        super().__init__()
        self.first, self.way, self.norm = nn.Conv2d(3, 8, 1), way, nn.BatchNorm2d(8)
        width, groups = (4, 1) if way in ("chunk", "slice") else (8, 2 if way == "groups" else 1)
        self.one, self.two = (nn.Conv2d(width, 4, 1, groups=groups) for _ in range(2))

    def forward(self, x):
        turned = self.first(x).view(2, 2, -1, 8, 8).transpose(1, 2).flatten(1, 2)
        if self.way in ("chunk", "joined"):
            one, two = turned.chunk(2, 1)
            if self.way == "joined":
                one = two = torch.cat([two.relu(), one], 1)
        elif self.way == "slice":
            half = turned.shape[1] // 2
            one, two = turned[:, :half], turned[:, half:]
        else:
            one = two = self.norm(turned)
        return self.one(one) + self.two(two)


@pytest.mark.parametrize("way", ["chunk", "joined", "slice", "norm"])
def test_kept_channels_of_a_shuffle_are_in_the_half_that_they_were_in(way):
    torch.manual_seed(0)
    flow = Analysis.on(Turned(way).eval(), IMAGES.float()).flow
    cases = [
        ([1, 2, 5, 6], True),  # 1 5 | 2 6
        ([1, 3, 4, 7], True),  # 1 4 | 3 7, where 4 came before 1
        ([0, 1, 2, 3, 4, 5, 6, 7], True),
        ([1, 2, 3, 5, 6, 7], way == "norm"),  # 1 5 2 | 6 3 7: those of the first half come first
        ([2, 3, 4, 5], way == "norm"),  # 2 4 | 3 5
        ([0, 1, 2, 3, 4, 5, 6], False),  # these make no two rows
    ]
    for kept, expected in cases:
        left = flow.kept_groups({"first": np.isin(np.arange(8), kept)})
        assert stays_in_place(flow, left) is expected, kept
        assert stays_in_place(flow, left, ["first"]) is expected, kept
        assert stays_in_place(flow, left, ["two"]), kept  # of which none is shuffled


@pytest.mark.parametrize(
    ("kept", "round_to", "expected"),
    [
        ([1, 2, 5, 6], None, 4),  # 1 5 | 2 6, in place
        ([4, 5, 6, 7], None, 8),  # a row of the view can't go as a whole: 4 6 | 5 7 would be chunked
        ([1, 2, 5, 6], 3, 8),  # 1 2 3 5 6 7 would be rounded: 1 5 2 | 6 3 7, of which 2 was in the second half
    ],
)
def test_channels_come_back_until_a_dense_shuffle_moves_them_to_the_halves_they_were_in(kept, round_to, expected):
    torch.manual_seed(0)
    model = Turned("chunk").eval()
    with torch.no_grad():
        model.first.weight[[3, 7]] += 10  # rounding restores these
    masks = {"first": filter_mask(model.first, set(range(8)) - set(kept))}
    dense = nni_topo.to_dense(model, IMAGES.float(), masks, round_to=round_to)
    assert dense.first.out_channels == expected
    left = masks if expected == 4 else {}
    same_output(dense, masked_model(model, IMAGES.float(), left), IMAGES.float() - 3)


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (3, [4, 4, 4, 5, 5, 4, 4, 5, 6]),  # masks keep four of seven; a fifth comes back where channels are shuffled
        (1, [4, 4, 4, 7, 7, 4, 4, 7, 6]),  # no smaller number is in place
    ],
)
def test_uneven_pieces_keep_few_channels_where_these_are_in_place(seed, expected):
    # Of seven channels of each half a shuffle puts four into one piece of the chunk and three into the other.
    model = shuffled(7, 2).eval()
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name in list(Analysis.on(model, IMAGES).flow.layers)[:-1]:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            order = torch.randperm(layer.out_channels, generator=generator).tolist()
            masks[name] = filter_mask(layer, order[: layer.out_channels // 2])
    dense = nni_topo.to_dense(model, IMAGES, masks)
    assert widths(dense) == expected
    same_output(dense, masked_model(model, IMAGES, masks, reconcile=True), IMAGES[:1])


def test_shuffled_channels_that_a_grouped_convolution_reads_stay():
    torch.manual_seed(0)
    model = Turned("groups").eval()
    groups = nni_topo.dependency_groups(model, IMAGES.float(), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert "channels can't be followed (one: Conv2d)" in groups.skipped["first"]
