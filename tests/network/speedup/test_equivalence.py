"""What counts as the same output of a dense and a masked model."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from speedup_nets import Shared, chain, filter_mask
from torch import nn

from nni_topo import create_pruner, dependency_groups, to_dense
from nni_topo.errors import SpeedupError
from nni_topo.network.speedup.equivalence import check_equal
from nni_topo.speedup import masked_model

NAN, INF = float("nan"), float("inf")


class Constant(nn.Module):
    """Puts out the same numbers, in double precision, whatever goes in."""

    def __init__(self, values):
        super().__init__()
        self.register_buffer("values", torch.tensor(values, dtype=torch.float64))

    def forward(self, x):
        return self.values


def check(expected, actual):
    check_equal(Constant(expected), Constant(actual), ((torch.zeros(1, 2),), {}), {})


@pytest.mark.parametrize("values", [[1.0, -2.0], [NAN, 1.0], [INF, -INF, 1.0], [0.0, 0.0], []])
def test_equal_outputs_pass(values):
    check(values, list(values))


@pytest.mark.parametrize("largest", [-1000.0, 1e-6])
def test_the_tolerance_is_a_share_of_the_largest_output(largest):
    size = abs(largest)
    check([largest, 0.0], [largest, 0.9e-4 * size])
    for wrong in (1.1e-4 * size, -1.1e-4 * size):
        with pytest.raises(SpeedupError, match="what the masked one does"):
            check([largest, 0.0], [largest, wrong])
    with pytest.raises(SpeedupError, match=r"must not change: .* got \[\(3,\)\] instead of \[\(2,\)\]"):
        check([1.0, 2.0], [1.0, 2.0, 3.0])


class Noting(nn.Linear):
    """Notes the precision it computes in; ``off``: how far it is off by rounding, in single precision."""

    seen: ClassVar[list[torch.dtype]] = []

    def __init__(self, off=0.0):
        super().__init__(3, 2)
        self.off = off
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        self.seen.append(x.dtype)
        return super().forward(x) * (1 + self.off * (x.dtype == torch.float32))


@pytest.mark.parametrize(("off", "last"), [(0.0, torch.float32), (5e-5, torch.float64)])
def test_single_precision_is_enough_where_what_it_shows_is_far_below_the_tolerance(off, last):
    Noting.seen.clear()
    check_equal(Noting(), Noting(off), ((torch.ones(2, 3),), {}), {})
    assert Noting.seen[:2] == [torch.float32] * 2
    assert Noting.seen[-2:] == [last] * 2


def test_half_precision_is_never_enough():
    Noting.seen.clear()
    model = Noting().to(torch.bfloat16)
    check_equal(model, model, ((torch.ones(2, 3, dtype=torch.bfloat16),), {}), {})
    assert Noting.seen == [torch.float64] * 2


def test_a_model_that_draws_numbers_is_compared_on_the_same_ones():
    class Drawing(nn.Module):
        """Sees some of the places, chosen at random, as masked autoencoders do."""

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x):
            return self.body(x[:, torch.rand(x.shape[1]).argsort()[:3]])

    torch.manual_seed(0)
    model, states = Drawing().eval(), torch.randn(2, 20, 4)
    groups = dependency_groups(model, states, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    assert to_dense(model, states, masks).body[0].out_features == 4


class Best(nn.Module):
    """Returns, of two equal scores, the one that is larger by rounding; the other one has another sign."""

    def __init__(self, factor, off=0.0):
        super().__init__()
        self.factor, self.off = factor, off
        self.layer = nn.Linear(4, 16)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        scores = self.layer(x)
        scores = torch.stack([scores, scores * self.factor / self.factor + self.off], -1)
        signs = torch.where(scores.argmax(-1) == 0, 1.0, -1.0)
        return scores[..., 0] * signs


def test_a_choice_among_equal_values_is_no_difference():
    first, second = Best(3.0), Best(7.0)
    second.load_state_dict(first.state_dict())
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert (first(x) - second(x)).abs().max() > 0.1
    check_equal(first, second, ((x,), {}), {})
    wrong = Best(3.0, 1e-3)
    wrong.load_state_dict(first.state_dict())
    with pytest.raises(SpeedupError, match="what the masked one does"):
        check_equal(first, wrong, ((x,), {}), {})


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def changed(model, reference):
    """The rows of each parameter that differ from the model's; these have to be zero."""
    rows = {}
    for name, old in model.named_parameters():
        new = reference.get_parameter(name)
        different = (old != new).flatten(1).any(1) if old.dim() > 1 else old != new
        assert not new[different].any()
        if different.any():
            rows[name] = different.nonzero().flatten().tolist()
    return rows


def test_a_batch_norm_goes_with_its_convolution_and_nothing_else():
    model = chain()
    reference = masked_model(model, IMAGES, {"0": filter_mask(model[0], [1, 6])})
    assert changed(model, reference) == {name: [1, 6] for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert torch.equal(reference[1].running_mean, model[1].running_mean)


def test_a_shared_norm_is_silenced_only_where_every_call_gets_zeros():
    model = Shared()
    one = masked_model(model, IMAGES, {"stem": filter_mask(model.stem, [0, 1])})
    assert set(changed(model, one)) == {"stem.weight", "stem.bias"}
    masks = {"stem": filter_mask(model.stem, [0, 1]), "twice": filter_mask(model.twice, [1, 2])}
    assert changed(model, masked_model(model, IMAGES, masks))["norm.bias"] == [1]


@pytest.mark.parametrize("norm", [nn.ReLU(), nn.LayerNorm(6)], ids=["layers alone", "norm"])
@torch.no_grad()
def test_a_masked_model_is_trained_written_and_made_dense(norm, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 6), norm, nn.Linear(6, 2)).eval(), torch.randn(4, 3)
    masks = {"0": filter_mask(model[0], [0, 2, 4])}
    masked = masked_model(model, x, masks)
    masked[2].bias += 1.0
    torch.save(masked, tmp_path / "masked.pt")
    again = torch.load(tmp_path / "masked.pt", weights_only=False)
    assert torch.equal(again(x), masked(x))
    dense = to_dense(masked, x, masks)
    assert dense[0].out_features == 3
    torch.testing.assert_close(dense(x), masked(x))


class WithLengths(nn.Module):
    """It takes lengths as shares of the longest sequence, which have to be larger than zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x, lengths):
        if not bool((lengths > 0).all()):
            raise ValueError("lengths")
        places = torch.arange(x.shape[1]) < (lengths * x.shape[1]).round()[:, None]
        return self.two((self.one(x) * places[..., None]).relu())


def test_numbers_that_cannot_be_drawn_are_those_of_the_example():
    model, call = WithLengths().eval(), (torch.randn(2, 6, 3), torch.tensor([1.0, 0.5]))
    groups = dependency_groups(model, call, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    masks = create_pruner("random", copy.deepcopy(model), groups).compress()[1]
    dense, masked = to_dense(model, call, masks), masked_model(model, call, masks)
    assert (dense.one.out_features, dense.two.in_features) == (4, 4)
    other = torch.randn(3, 8, 3), torch.tensor([1.0, 0.75, 0.25])
    torch.testing.assert_close(dense(*other), masked(*other))
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.two.bias += 1
    with pytest.raises(SpeedupError, match="a dense model must compute what the masked one does"):
        check_equal(masked, broken, (call, {}), {})
