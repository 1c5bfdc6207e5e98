"""What holds at one size of the inputs must hold at others: couplings that depend on it aren't used."""

import pytest
import torch
from speedup_nets import l1_masks, same_output
from torch import nn

import nni_topo
from nni_topo.errors import SpeedupError


class Mixed(nn.Module):
    """Views (places, channels) as (channels, height, width)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.a(x).relu()
        return self.o(x + self.b(x).flatten(2).transpose(1, 2).reshape(x.shape))


def _groups(model, inputs, kinds=("Conv2d", "Linear")):
    torch.manual_seed(0)
    return nni_topo.dependency_groups(model.eval(), inputs, [{"op_types": [*kinds], "sparse_ratio": 0.5}])


def _half_masked(model, *layers):
    masks = {}
    for name in layers:
        weight = model.get_submodule(name).weight
        rows = (torch.arange(len(weight)) % 2).float()
        masks[name] = {"weight": rows.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)}
    return masks


def test_channels_that_are_coupled_with_others_at_another_size_stay():
    groups = _groups(Mixed(), torch.randn(2, 3, 2, 2))
    assert not groups
    assert {reason.kind for name in "ab" for reason in groups.reasons[name]} == {"depends_on_size"}
    model = Mixed().eval()
    # At 2 by 2 places these channels are coupled with one another alone.
    masks = {"a": {"weight": (torch.arange(16) % 4 != 1).float().view(-1, 1, 1, 1)}}
    masks["b"] = {"weight": (torch.arange(16) // 4 != 1).float().view(-1, 1, 1, 1)}
    with pytest.raises(SpeedupError, match="size"):
        nni_topo.to_dense(model, torch.randn(2, 3, 2, 2), masks)


def test_the_report_names_the_second_size_or_says_that_there_is_none():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)).eval()
    x = torch.randn(2, 1, 8, 8)
    assert "only this size was checked" in nni_topo.to_dense(model, x, _half_masked(model, "0")).report.checked
    model.insert(2, nn.AdaptiveAvgPool2d(2))
    model[4] = nn.Linear(32, 3)
    checked = nni_topo.to_dense(model.eval(), x, _half_masked(model, "0")).report.checked
    assert "(1, 8, 8)" in checked
    assert "(1, 9, 9)" in checked
    plain = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)).eval()
    checked = nni_topo.to_dense(plain, x, _half_masked(plain, "0")).report.checked
    assert checked.startswith("random inputs of shape (1, 8, 8)")
    assert "alone" not in checked


class Branching(nn.Module):
    """Does something else if a condition on its images holds: adds the first features again, or returns from them."""

    def __init__(self, condition, is_early):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.o = (nn.Conv2d(n, 16, 1) for n in (3, 16, 16, 16))
        self.early, self.condition, self.is_early = nn.Conv2d(16, 16, 1), condition, is_early

    def forward(self, x):
        y = self.a(x).relu()
        holds = self.condition(x)
        if holds and self.is_early:
            return self.early(y)
        z = self.b(y).relu()
        return self.o(self.c(z + y if holds else z).relu())


BY_SAMPLES = {
    "one": lambda x: x.shape[0] == 1,
    "length": lambda x: len(x) > 4,
    "twice": lambda x: 2 * x.size(0) >= 14,
    "remainder": lambda x: x.shape[0] % 5 == 0,
}


@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("name", BY_SAMPLES)
@pytest.mark.parametrize(("is_early", "kept"), [(False, {"a", "b"}), (True, {"a"})])
def test_layers_that_a_branch_on_the_number_of_samples_concerns_stay_and_the_others_go(name, samples, is_early, kept):
    model, images = Branching(BY_SAMPLES[name], is_early).eval(), torch.randn(samples, 3, 6, 6)
    groups = _groups(model, images)
    assert {name for name, found in groups.reasons.items() if found[0].kind == "depends_on_samples"} == kept
    masks = l1_masks(model, groups)
    dense = nni_topo.to_dense(model, images, masks)
    assert {name: getattr(dense, name).out_channels for name in "abc"} == {
        name: 16 if name in kept else 8 for name in "abc"
    }
    for count in (1, 2, 3, 5, 8):
        same_output(dense, nni_topo.masked_model(model, images, masks), torch.randn(count, 3, 5, 7))


@pytest.mark.parametrize("samples", [2, 3])
def test_a_branch_that_splits_a_batch_and_twice_the_batch_is_followed(samples):
    model, images = Branching(lambda x: x.shape[0] > samples, is_early=False).eval(), torch.randn(samples, 3, 6, 6)
    assert [entry["op_names"] for entry in _groups(model, images)] == [["c"]]


BY_VALUES = {
    "any": lambda x: (x > 50).any(),
    "mean": lambda x: x.mean() > 20,
    "item": lambda x: x.max().item() > 30,
    "float": lambda x: float(x.abs().sum()) > 1e6,
    "nonzero": lambda x: torch.is_nonzero((x > 50).sum()),
    "isnan": lambda x: torch.isnan(x).any(),
    "equal": lambda x: torch.equal(x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("name", BY_VALUES)
@pytest.mark.parametrize(("is_early", "kept"), [(False, {"a", "b"}), (True, {"a"})])
def test_layers_that_a_branch_on_values_concerns_are_not_offered_and_the_others_go(name, is_early, kept):
    model, images = Branching(BY_VALUES[name], is_early).eval(), torch.randn(2, 3, 6, 6)
    groups = _groups(model, images)
    assert {name for name, found in groups.reasons.items() if found[0].kind == "depends_on_values"} == kept
    masks = l1_masks(model, groups)
    dense = nni_topo.to_dense(model, images, masks)
    assert {name: getattr(dense, name).out_channels for name in "abc"} == {
        name: 16 if name in kept else 8 for name in "abc"
    }
    for others in (torch.randn(3, 3, 5, 7), torch.full((2, 3, 5, 7), 100.0), torch.zeros(2, 3, 5, 7)):
        same_output(dense, nni_topo.masked_model(model, images, masks), others)


def test_a_branch_that_raises_keeps_no_channels():
    def check(x):
        if not torch.isfinite(x).all():
            raise ValueError("images must be finite")

    model, images = Branching(check, is_early=False).eval(), torch.randn(2, 3, 6, 6)
    assert [entry["op_names"] for entry in _groups(model, images)] == [["a"], ["b"], ["c"]]


class Tabled(nn.Module):
    """Adds a table to its features: a buffer at the size it was made for, else one made anew for their width."""

    def __init__(self, places):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.places = places
        self.register_buffer("table", self.made(places, 16))

    @staticmethod
    def made(places, width):
        return torch.outer(torch.arange(places), 1.0 / (1 + torch.arange(width))).sin()

    def forward(self, x):
        y = self.a(x)
        is_same = x.shape[1] == self.places if self.places < 8 else self.table.shape[0] == x.shape[1]
        y = y + (self.table if is_same else self.made(x.shape[1], self.table.shape[1]))
        return self.o(self.b(y.relu()).relu())


@pytest.mark.parametrize("places", [6, 8])  # compared with an attribute, or with the size of the table
def test_a_table_that_is_made_from_a_width_at_another_size_keeps_its_channels(places):
    model, x = Tabled(places).eval(), torch.randn(2, places, 3)
    groups = _groups(model, x)
    assert {reason.kind for reason in groups.reasons["a"]} == {"depends_on_size"}
    masks = l1_masks(model, groups)
    dense = nni_topo.to_dense(model, x, masks)
    assert (dense.a.out_features, dense.b.out_features) == (16, 8)
    for other in (x, torch.randn(3, 2 * places + 1, 3)):
        same_output(dense, nni_topo.masked_model(model, x, masks), other)
