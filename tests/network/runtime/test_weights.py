"""Random weights and weights in double precision."""

from __future__ import annotations

import pytest
import torch

from nni_topo.network.runtime.weights import RandomWeights


def test_random_weights_differ_from_row_to_row_and_from_layer_to_layer():
    numbers = RandomWeights(torch.randn, torch.Generator().manual_seed(0))
    one, other = (numbers.like(torch.empty(700, 512, 1, 1), 0.1) for _ in range(2))
    rows = torch.cat([one, other]).flatten(1)
    assert len(rows.unique(dim=0)) == 1400
    assert not bool((one == other).any())
    assert float(one.std()) == pytest.approx(0.1, rel=0.01)
