"""Models in which one tensor or module stands in several places, made dense, against their layers on their own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from attention_nets import HEADS, SIZE, WIDTH, Fused, head_masks, same
from speedup_nets import filter_mask, l1_masks
from tied_nets import (
    Bottleneck,
    LanguageModel,
    Mirrored,
    TiedConvolutions,
    TiedNorms,
    TwoBlocks,
    TwoNames,
    TwoStreams,
    zeroed,
)
from torch import nn
from torch.nn import functional

from nni_topo import RandomPruner, to_dense
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.io.checkpoint import load, save
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.sharing import find_ties
from nni_topo.speedup import dependency_groups, masked_model

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))


def check(make, inputs, masks, tmp_path):
    """Make dense, compare with zeroed channels in a model without ties, save, load; the model given stays."""
    model = make().eval()
    before, ties = copy.deepcopy(model.state_dict()), find_ties(model)
    dense = to_dense(model, inputs, masks)
    assert find_ties(model) == ties
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = zeroed(make(), masks)(inputs)
    assert (dense(inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    save(dense, tmp_path / "dense.pt")
    built = load(tmp_path / "dense.pt", make()).eval()
    assert torch.equal(built(inputs), dense(inputs))
    assert find_ties(built) == find_ties(dense)
    return dense


def test_layers_of_one_weight_lose_the_same_channels_and_stay_tied(tmp_path):
    model = TiedConvolutions()
    masks = {name: filter_mask(model.get_submodule(name), [1, 4]) for name in ("stem", "one", "two")}
    dense = check(TiedConvolutions, IMAGES, masks, tmp_path)
    assert dense.one.weight.shape == (4, 4, 3, 3)
    assert dense.one.weight is dense.two.weight
    assert dense.one.bias is dense.two.bias
    assert dense.report.notes == ()


def test_layers_of_one_weight_that_lose_other_filters_lose_the_common_ones():
    model = TiedConvolutions().eval()
    masks = {"stem": filter_mask(model.stem, [0, 1]), "one": filter_mask(model.one, [0, 2])}
    masks["two"] = filter_mask(model.two, [0, 5])
    dense = to_dense(model, IMAGES, masks)
    assert dense.one.weight.shape == (5, 5, 3, 3)
    assert dense.one.weight is dense.two.weight
    common = {name: filter_mask(model.get_submodule(name), [0]) for name in ("stem", "one", "two")}
    expected = zeroed(TiedConvolutions(), common)(IMAGES)
    assert (dense(IMAGES) - expected).abs().max() <= 1e-5 * expected.abs().max()


def coupled(flow, one, other):
    """Whether two layers can only lose the same output channels."""
    return bool((flow.group_ids_of(one) == flow.group_ids_of(other)).all())


def test_convolutions_and_their_mirror_images_are_coupled():
    flow = Analysis.on(Mirrored().eval(), IMAGES).flow
    assert coupled(flow, "outer", "opening")
    assert bool((flow.group_ids_of("inner") == flow.entering_group_ids("opening")).all())
    assert bool((flow.group_ids_of("outer") == flow.entering_group_ids("last")).all())
    assert flow.reaches_output("last")


def test_columns_of_an_embedding_are_coupled_with_what_the_head_of_its_weight_reads():
    flow = Analysis.on(Bottleneck().eval(), TOKENS).flow
    assert coupled(flow, "e", "down")
    assert flow.reaches_output("o")


def test_layers_beside_one_whose_weight_stays_are_told_both_places_of_the_weight():
    everything = [{"op_types": ["Linear", "Embedding"], "sparse_ratio": 0.5}]
    model = TwoStreams().eval()
    skipped = dependency_groups(model, TOKENS, everything).skipped
    why = "write.weight is the same parameter as read.weight, where these channels stay"
    assert skipped["write"] == skipped["down2"] == why
    assert skipped["read"] == skipped["down"] == "it gives the model's output"
    model.write.weight = nn.Parameter(model.write.weight.detach().clone())
    assert set(dependency_groups(model, TOKENS, everything).skipped) == {"read", "down", "head"}


def test_single_weights_of_one_of_two_places():
    model = TiedConvolutions().eval()
    mask = torch.ones_like(model.one.weight)
    mask[0, :, 1] = 0
    masks = {"one": {"weight": mask}}
    for made in (masked_model(model, IMAGES, masks), to_dense(model, IMAGES, masks)):
        assert made.two.weight.count_nonzero() == made.two.weight.numel()
        assert torch.equal(made(IMAGES), zeroed(TiedConvolutions(), masks)(IMAGES))
    assert made.report.notes == ("no longer shared, because their values differ now: one.weight, two.weight",)


@pytest.mark.parametrize(("make", "pruner"), [(TiedConvolutions, "l1"), (TiedNorms, "random"), (TwoNames, "random")])
def test_pruner_to_dense_model(tmp_path, make, pruner):
    config = dependency_groups(
        make(), IMAGES, [{"op_types": ["Conv2d"], "exclude_op_names": ["tail"], "sparse_ratio": 0.5}]
    )
    masks = l1_masks(make(), config) if pruner == "l1" else RandomPruner(make(), config).compress()[1]
    dense = check_norms(make, masks, tmp_path)
    assert sum(p.numel() for p in dense.parameters()) < 0.6 * sum(p.numel() for p in make().parameters())


def check_norms(make, masks, tmp_path):
    """Compare with the masked model: batch norms go with their channels."""
    model = make().eval()
    dense = to_dense(model, IMAGES, masks)
    save(dense, tmp_path / "dense.pt")
    built = load(tmp_path / "dense.pt", make()).eval()
    assert torch.equal(built(IMAGES), dense(IMAGES))
    expected = masked_model(model, IMAGES, masks)(IMAGES)
    assert (built(IMAGES) - expected).abs().max() <= 1e-5 * expected.abs().max()
    return dense


def test_embedding_and_head_cut_together_stay_tied(tmp_path):
    model = LanguageModel()
    model.rotation = nn.Identity()

    def make():
        return copy.deepcopy(model)

    columns = torch.ones_like(model.e.weight)
    columns[:, [2, 6]] = 0
    masks = {"e": {"weight": columns}, "down": filter_mask(model.down, [2, 6])}
    dense = to_dense(model.eval(), TOKENS, masks)
    assert dense.o.weight is dense.e.weight
    assert dense.o.weight.shape == (11, 6)
    save(dense, tmp_path / "dense.pt")
    built = load(tmp_path / "dense.pt", make)
    assert built.o.weight is built.e.weight
    assert torch.equal(built(TOKENS), dense(TOKENS))


class Unjoined(nn.Module):
    """A language model whose head is a product with its embedding, joined by no residual connection."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.e, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, tokens):
        return functional.linear(torch.relu(self.down(torch.relu(self.up(self.e(tokens))))), self.e.weight)


def test_an_embedding_that_the_forward_multiplies_with_loses_columns_with_what_it_is_multiplied_with(tmp_path):
    model = Unjoined()
    columns = torch.ones_like(model.e.weight)
    columns[:, [2, 6]] = 0
    masks = {"e": {"weight": columns}, "down": filter_mask(model.down, [2, 6]), "up": filter_mask(model.up, [0])}
    dense = to_dense(model.eval(), TOKENS, masks)
    assert (dense.e.embedding_dim, dense.down.out_features, dense.up.out_features) == (6, 6, 11)
    expected = masked_model(model, TOKENS, masks)(TOKENS)
    assert (dense(TOKENS) - expected).abs().max() <= 1e-5 * expected.abs().max()
    only = to_dense(model, TOKENS, {"down": masks["down"]})
    assert (only.e.embedding_dim, only.down.out_features) == (8, 8)


def test_a_module_under_two_names(tmp_path):
    masks = {"first": filter_mask(TwoNames().first, [1]), "stem": filter_mask(TwoNames().stem, [1])}
    dense = check(TwoNames, IMAGES, masks, tmp_path)
    assert dense.first is dense.second
    dense = check(TwoBlocks, torch.rand(2, 6), {"second.0": filter_mask(TwoBlocks().second[0], [1, 2])}, tmp_path)
    assert dense.first is dense.second
    assert dense.first[0].out_features == 8


class SharedBetween(nn.Module):
    """One module after two convolutions, of equal widths or not."""

    def __init__(self, between: nn.Module, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.between = nn.Conv2d(3, 8, 3), between
        self.body, self.tail = nn.Conv2d(8, width, 3), nn.Conv2d(width, 4, 1)

    def forward(self, images):
        inner = torch.relu(self.between(self.stem(images)))
        return self.tail(torch.relu(self.between(self.body(inner))))


UNSHARED = [{"op_types": ["Conv2d"], "exclude_op_names": ["tail"], "sparse_ratio": 0.5}]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, of a number of features that isn't the input's
@pytest.mark.parametrize("between", [nn.PReLU(init=0.1), nn.InstanceNorm2d(8)])
def test_a_module_that_holds_no_number_for_each_channel_couples_no_layers(between, tmp_path):
    def make():
        return SharedBetween(copy.deepcopy(between), 12)

    groups = dependency_groups(make(), IMAGES, UNSHARED)
    assert [entry.get("dependency_group_id") for entry in groups] == [None, None]
    masks = {"stem": filter_mask(make().stem, [0, 5]), "body": filter_mask(make().body, [1, 2, 6])}
    dense = check(make, IMAGES, masks, tmp_path)
    assert (dense.stem.out_channels, dense.body.out_channels) == (6, 9)


def test_a_module_that_is_called_on_other_numbers_of_channels_keeps_them_all():
    model = SharedBetween(nn.GroupNorm(1, 8, affine=False), 12).eval()
    groups = dependency_groups(model, IMAGES, UNSHARED)
    reason = "between is called on different numbers of channels"
    assert (list(groups), groups.skipped) == ([], {"stem": reason, "body": reason})
    masks = {"stem": filter_mask(model.stem, [0, 5]), "body": filter_mask(model.body, [1, 2])}
    dense = to_dense(model, IMAGES, masks)
    assert (dense.stem.out_channels, dense.body.out_channels) == (8, 12)
    assert {row.name: row.reason for row in dense.report.kept} == {"stem": reason, "body": reason}


class BiasedByHead(Fused):
    """Attention that gets a bias for each head: (samples, heads, 1, places) or (samples * heads, 1, places)."""

    def forward(self, x, bias):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) + bias.reshape(len(x), -1, 1, x.shape[1])
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Biasing(nn.Module):
    """A layer makes the biases of the heads, as that of T5's first block or ALiBi's."""

    def __init__(self, is_by_sample):
        super().__init__()
        self.bias, self.attention, self.is_by_sample = nn.Linear(WIDTH, HEADS), BiasedByHead(), is_by_sample

    def forward(self, x):
        bias = self.bias(x).transpose(1, 2)[:, :, None]
        return self.attention(x, bias if self.is_by_sample else bias.flatten(0, 1))


@pytest.mark.parametrize("is_by_sample", [True, False])
@torch.no_grad()
@pytest.mark.slow
def test_a_layer_that_makes_biases_of_heads_loses_channels_with_them(is_by_sample):
    torch.manual_seed(0)
    model, inputs = Biasing(is_by_sample).eval(), torch.randn(2, 5, WIDTH)
    flow = Analysis.on(model, inputs).flow
    first_of_heads = flow.group_ids_of("attention.qkv")[[0, 3, 6, 9]]
    assert flow.group_ids_of("bias").tolist() == first_of_heads.tolist()
    assert (first_of_heads != FIXED).all()
    kept = torch.tensor([1.0, 0, 0, 1])
    masks = head_masks(model, [0, 3])
    masks["bias"] = {"weight": kept[:, None].expand(HEADS, WIDTH).clone(), "bias": kept}
    dense = to_dense(model, inputs, masks)
    assert (dense.bias.out_features, dense.attention.proj.in_features) == (2, 2 * SIZE)
    same(dense, masked_model(model, inputs, masks), inputs)


class Doubled(Fused):
    """Attention whose layers read something else than what enters."""

    def forward(self, x):
        return super().forward(2 * x)


@torch.no_grad()
def test_attention_that_changes_what_enters_needs_all_channels_and_loses_heads():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, WIDTH), Doubled(), nn.Linear(WIDTH, 3)).eval()
    inputs = torch.randn(2, 4, 5)
    flow = Analysis.on(model, inputs).flow
    assert [reason.kind for reason in flow.why_pinned("0")] == ["needs_all_channels"]
    entering = flow.entering_channel_ids("1.qkv")
    assert entering.tolist() == [FIXED] * WIDTH
    assert entering.dtype == np.int64
    masks = head_masks(model, [1, 2])
    dense = to_dense(model, inputs, masks)
    assert (dense[1].qkv.in_features, dense[1].qkv.out_features) == (WIDTH, 6 * SIZE)
    same(dense, masked_model(model, inputs, masks), inputs)


class SharedFilters(nn.Module):
    """Two convolutions of one weight, each behind a layer of its own."""

    def __init__(self, groups, entering):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, entering[0], 1), nn.Conv2d(3, entering[1], 1)
        self.one, self.two = (nn.Conv2d(*each, 8, 1, groups=of) for each, of in zip(zip(entering), groups, strict=True))
        self.two.weight = self.one.weight
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        return self.last(torch.cat([self.one(self.a(x)).relu(), self.two(self.b(x)).relu()], 1))


def test_a_convolution_without_groups_keeps_what_one_of_its_weight_with_groups_reads():
    flow = Analysis.on(SharedFilters((2, 1), (4, 2)).eval(), IMAGES).flow
    assert flow.group_ids_of("two").tolist() == [FIXED] * 8
    assert flow.group_ids_of("b").tolist() == [FIXED] * 2
    assert {reason.kind for reason in flow.why_pinned("two")} == {"shared_weight"}
