"""Models with modules that ``torch.jit`` has compiled are refused, and the error names the module."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError


@pytest.mark.parametrize("way", ["script", "trace"])
def test_a_module_that_is_compiled_is_named(way):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = nn.Conv2d(8, 8, 3).eval()
        inner = torch.jit.script(inner) if way == "script" else torch.jit.trace(inner, torch.randn(1, 8, 8, 8))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), inner, nn.Conv2d(8, 4, 1)).eval()
    images, words = torch.randn(4, 3, 8, 8), r"no modules that torch.jit has compiled, got one \(1\)"
    with pytest.raises(ConfigError, match=words):
        nni_topo.dependency_groups(model, images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    with pytest.raises(ConfigError, match=words):
        nni_topo.to_dense(model, images, {"0": {"weight": torch.ones(8, 3, 1, 1)}})
