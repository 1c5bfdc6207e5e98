"""Operators that a user registers: layers around them lose channels exactly; tests/reliability has PyTorch's."""

from __future__ import annotations

import pytest
import torch
from speedup_nets import masks_of
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
ASKED = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class Between(nn.Module):
    """A function of what layers give, ``a`` (and ``c``) 3 to 8 channels, read by ``last``."""

    def __init__(self, between, last):
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.last, self.between = last, between

    def forward(self, x):
        return self.last(self.between(self, x))


def pruned(net):
    """Cut half of all channels that can go; the dense network and the groups."""
    config_list = nni_topo.dependency_groups(net, IMAGES, ASKED)
    if not config_list:
        return net, config_list
    masks = masks_of(nni_topo.RandomPruner(net, config_list, seed=0))
    with torch.no_grad():
        expected = nni_topo.masked_model(net, IMAGES, masks).eval()(IMAGES)
        dense = nni_topo.to_dense(net, IMAGES, masks, check=True)
        torch.testing.assert_close(dense.eval()(IMAGES), expected, rtol=1e-4, atol=1e-5)
    return dense, config_list


class Opaque(torch.autograd.Function):
    """What tracers can't look into: it leaves PyTorch in between."""

    @staticmethod
    def forward(ctx, *images):
        found = sum(torch.from_numpy(each.detach().numpy() * 2) for each in images)
        return found


def through(operator, *, two=False):
    def between(self, x):
        return operator(self.a(x), self.c(x)) if two else operator(self.a(x))

    return Between(between, nn.Conv2d(8, 4, 1)).eval()


def test_channels_follow_a_function_of_ones_own():
    own = nni_topo.register_operator(lambda images: Opaque.apply(images), "follow")
    net = through(own)
    dense, _ = pruned(net)
    assert dense.a.out_channels == dense.last.in_channels == 4


def test_two_tensors_are_coupled_in_a_function_of_ones_own():
    own = nni_topo.register_operator(lambda one, other: Opaque.apply(one, other), "couple")
    dense, config_list = pruned(through(own, two=True))
    assert dense.a.out_channels == dense.c.out_channels == dense.last.in_channels == 4
    assert len({config["dependency_group_id"] for config in config_list if "dependency_group_id" in config}) == 1


def test_a_wrong_rule_is_found_by_the_dry_run():
    def mean_over_channels(images):
        return Opaque.apply(images) - Opaque.apply(images).mean(1, keepdim=True)

    own = nni_topo.register_operator(mean_over_channels, "follow")
    found = nni_topo.dependency_groups(through(own), IMAGES, ASKED)
    assert "mean_over_channels" in found.skipped["a"]


class Longest(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return images * (images.abs() >= images.abs().amax(1, keepdim=True))


def test_a_rule_is_right_where_zeros_are_as_good_as_nothing():
    own = nni_topo.register_operator(lambda images: Longest.apply(images), lambda call: call.ids[0])
    dense, _ = pruned(through(own))
    assert dense.a.out_channels == dense.last.in_channels == 4


def test_channels_stay_where_a_rule_says_so_and_the_first_answer_does_not_outlast_a_rule():
    @torch.library.custom_op("nni_topo_tests::reversed", mutates_args=())
    def backwards(images: torch.Tensor) -> torch.Tensor:
        return images.flip(1).contiguous()

    net = through(backwards)
    assert "a" in nni_topo.dependency_groups(net, IMAGES, ASKED).skipped
    nni_topo.register_operator(backwards, lambda call: call.ids[0].flip(1))
    assert "a" not in nni_topo.dependency_groups(net, IMAGES, ASKED).skipped
    dense, _ = pruned(net)
    assert dense.a.out_channels == 4

    @torch.library.custom_op("nni_topo_tests::doubled", mutates_args=())
    def doubled(images: torch.Tensor) -> torch.Tensor:
        return images * 2

    nni_topo.register_operator(doubled, "keep")
    assert "a" in nni_topo.dependency_groups(through(doubled), IMAGES, ASKED).skipped


def test_a_rule_must_return_ids_of_the_outputs_shape():
    own = nni_topo.register_operator(lambda images: Opaque.apply(images), lambda call: call.ids[0].sum(1))
    with pytest.raises(ConfigError, match=r"rule must return channel ids, int64, of the output's shape .*got"):
        nni_topo.dependency_groups(through(own), IMAGES, ASKED)


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images):
        return -images


def between(function):
    """A network that calls a function between two convolutions."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.last(function(self.first(x)))

    return Net().eval(), torch.rand(2, 3, 4, 4)


def test_the_apply_of_an_autograd_function_is_registered_itself():
    model, images = between(nni_topo.register_operator(Negated.apply, "follow"))
    groups = nni_topo.dependency_groups(model, images, [{"op_names": ["first"], "sparse_ratio": 0.5}])
    assert groups.skipped == {}
    _, masks = (pruner := nni_topo.RandomPruner(model, groups, seed=0)).compress()
    pruner.unwrap_model()
    assert nni_topo.to_dense(model, images, masks).first.out_channels == 4


def test_a_function_has_one_rule_and_a_class_none():
    def doubled(images):
        return 2 * images

    seen = nni_topo.register_operator(doubled, "follow")
    for again in (doubled, seen, "cat", torch.cat, torch.Tensor.add_):
        with pytest.raises(ConfigError, match="operator must be one without a rule"):
            nni_topo.register_operator(again, "keep")
    with pytest.raises(ConfigError, match="got the class Negated"):
        nni_topo.register_operator(Negated, "keep")


def test_reasons_name_what_is_registered_with_its_line():
    def mixed(images):
        return images - images.mean(1, keepdim=True)

    for user_rule, dim, text in (
        ("keep", 1, "registered to keep all channels"),
        ("follow", 7, "doesn't fit these shapes"),
    ):
        model, images = between(nni_topo.register_operator(lambda x: mixed(x), user_rule, dim=dim))
        told = str(nni_topo.explain(model, images, "first"))
        assert text in told
        assert "test_operators.py:" in told
        assert "no rule says" not in told


def test_a_rule_that_fails_is_named():
    def reversed_(images):
        return images.flip(1)

    model, images = between(nni_topo.register_operator(reversed_, lambda call: call.ids[1]))
    with pytest.raises(ConfigError, match=r"rule must return channel ids .* IndexError.*reversed_"):
        nni_topo.dependency_groups(model, images, [{"op_names": ["first"], "sparse_ratio": 0.5}])


IMPOSSIBLE = {
    "a dim that no tensor has": ({"dim": 9}, r"dim must be an integer from -8 to 7, got 9"),
    "a dim beside keep": ({"rule": "keep", "dim": 2}, "with the rule 'follow' or 'couple' only, got 2 with 'keep'"),
    "a rule of two arguments": ({"rule": lambda call, ids: ids}, "must take one argument, the call of the operator"),
    "an unknown name": ({"operator": "cumsun"}, "function or method of PyTorch's, got 'cumsun'.*did you mean .*cumsum"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_can_not_work_in_any_model_is_refused_when_it_is_registered(case):
    given, words = IMPOSSIBLE[case]
    with pytest.raises(ConfigError, match=words):
        nni_topo.register_operator(**{"operator": lambda images: images, **given})
