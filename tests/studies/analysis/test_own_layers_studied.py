"""Studies and criteria take layers with a forward of their own by what they compute."""

from __future__ import annotations

import pytest
import torch
from own_layers import Alike, Mirrored, Rectified, Standardized
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.network.layers.derived import head
from nni_topo.pruners.energy import chirp_response_energy
from nni_topo.studies.analysis.bounds.propagation import error_bound
from nni_topo.studies.analysis.connectivity import connectivity
from nni_topo.studies.analysis.magnitude import with_sparse_linears


def test_a_bound_refuses_layers_with_a_forward_of_their_own():
    inputs = torch.randn(2, 2, 6, 6)
    with pytest.raises(ConfigError, match="PyTorch's own layers, got Standardized"):
        error_bound(*(nn.Sequential(nn.Conv2d(2, 2, 1), Standardized(2, 3, 3)) for _ in range(2)), inputs)


def test_only_plain_linear_layers_multiply_by_sparse_matrices():
    model, x = nn.Sequential(Rectified(4, 3), nn.Linear(3, 2)), torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(with_sparse_linears(model)(x), model(x))


def test_paths_lead_through_computed_weights():
    model = nn.Sequential(Standardized(2, 2, 1, bias=False), nn.ReLU(), Standardized(2, 1, 1, bias=False))
    mask = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 2, 1, 1)
    found = connectivity(model, torch.ones(1, 2, 3, 3), {"0": {"weight": mask}})
    assert (found.outputs, found.reached["0"]) == (1.0, 0.5)


@pytest.mark.parametrize("kind", [Alike, Mirrored, Standardized])
def test_a_filters_energy_is_that_of_its_own_answer(kind):
    torch.manual_seed(0)
    layer, plane = kind(3, 4, 3, 2, bias=False), torch.randn(9, 9, dtype=torch.float64)
    layer = layer.double()
    weight = layer.weight
    with torch.no_grad():
        answers = head(layer)(plane.expand(1, 3, 9, 9))
        if kind is Standardized:
            weight = nn.functional.batch_norm(weight.reshape(1, 4, -1), None, None, training=True, eps=1e-6)
            weight = weight.reshape_as(layer.weight)
        energy = chirp_response_energy(layer, weight, None, plane[None])
    torch.testing.assert_close(energy, answers[0].square().mean((1, 2)))
