from __future__ import annotations

import pytest
import torch
from every_sample import compensation
from torch import nn

from nni_topo.network.speedup.analysis import Analysis
from nni_topo.recovery.networks import build_networks, plan_of
from nni_topo.recovery.replay import touched_nodes
from nni_topo.speedup import to_dense


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8, bias=False), nn.LayerNorm(8), nn.GroupNorm(2, 8)], ids=["no bias", "layer", "group"]
)
def test_norms_count_removed_channels_as_in_the_dense_model(norm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), norm, nn.Linear(8, 3)).double().eval()
    inputs = torch.randn(80, 5, dtype=torch.float64)
    masks = {"0": {"weight": torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.float64)[:, None]}}
    found = compensation(net, masks, [inputs])
    expected, dense = net(inputs).detach(), to_dense(found.model, inputs[:2], masks, check=False)(inputs).detach()
    variance = (expected - expected.mean(0)).square().sum()
    last = found.report.layers[-1]
    assert float((dense - expected).square().sum() / variance) == pytest.approx(last.error_after, rel=1e-6)
    assert last.error_after < last.error_before


def test_a_batch_norm_without_parameters_is_solved_through():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 2),
    ).double().eval()  # fmt: skip
    net[2].running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        net[0].weight[3], net[0].bias[3] = 2.0 * net[0].weight[0], 2.0 * net[0].bias[0]
    images = torch.randn(40, 3, 2, 2, dtype=torch.float64)
    masks = {"0": {"weight": torch.tensor([1.0, 1, 1, 0], dtype=torch.float64)[:, None, None, None]}}
    found = compensation(net, masks, [images])
    assert found.report.layers[0].layer == "1"
    dense = to_dense(found.model, images[:2], masks)
    torch.testing.assert_close(dense(images), net(images), rtol=1e-6, atol=1e-6)


class Tied(nn.Module):
    """A layer with a frozen bias, two of one weight, and batch norms."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.second, self.third, self.fourth = (nn.Linear(6, 6) for _ in range(3))
        self.fourth.weight = self.third.weight
        self.first.bias.requires_grad_(False)

    def forward(self, values):
        return self.fourth(self.third(self.second(self.norm(self.first(values)))))


def test_the_pruned_network_has_tensors_of_its_own_and_the_unpruned_one_those_of_the_model():
    torch.manual_seed(0)
    model = Tied().eval()
    mask = (torch.arange(6) < 4).float()
    networks = build_networks(
        Analysis(model, ((torch.randn(3, 4),), {})), {"first": {"weight": mask[:, None].expand(6, 4)}}
    )
    own = dict(model.named_parameters(remove_duplicate=False))
    pruned = dict(networks.pruned.named_parameters(remove_duplicate=False))
    unpruned = dict(networks.unpruned.named_parameters(remove_duplicate=False))
    assert own.keys() == pruned.keys() == unpruned.keys()
    for name, parameter in own.items():
        assert unpruned[name].data_ptr() == parameter.data_ptr()
        assert pruned[name].requires_grad == parameter.requires_grad
        assert pruned[name].data_ptr() not in {each.data_ptr() for each in own.values()}
    assert len({each.data_ptr() for each in pruned.values()}) == len(pruned)
    assert not pruned["first.weight"][4:].any()
    assert torch.equal(pruned["first.weight"][:4], model.first.weight[:4])
    assert torch.equal(pruned["fourth.weight"], model.third.weight)
    result = dict(networks.result.named_parameters(remove_duplicate=False))
    assert result["fourth.weight"] is result["third.weight"]
    for name, parameter in result.items():
        assert torch.equal(parameter, own[name])
        assert parameter is not own[name]


class Doubled(nn.Linear):
    """A layer that computes twice its weight."""

    def forward(self, input):  # noqa: A002
        return nn.functional.linear(input, 2.0 * self.weight, self.bias)


def test_layers_that_compute_their_weight_become_plain_where_they_are_solved():
    torch.manual_seed(0)
    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 6), Doubled(6, 5), nn.Linear(5, 2)).eval()
    mask = (torch.arange(6) < 4).float()
    networks = build_networks(
        Analysis(model, ((torch.randn(3, 4),), {})), {"1": {"weight": mask[:, None].expand(6, 4)}}
    )
    assert networks.folded == {"0", "2"}
    plan_of(networks, touched_nodes(networks.unpruned, networks.pruned))
    assert [type(layer) for layer in networks.result] == [Doubled, nn.Linear, nn.Linear, nn.Linear]
    torch.testing.assert_close(networks.result[2].weight, 2.0 * model[2].weight)
