"""Models with modules that ``torch.jit`` has compiled are refused, and the error names the module."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def scripted(module: nn.Module) -> nn.Module:
    return torch.jit.script(module)


def traced(module: nn.Module) -> nn.Module:
    return torch.jit.trace(module, torch.randn(1, 8, 8, 8))


@pytest.mark.parametrize("compiled", [scripted, traced])
def test_a_module_that_is_compiled_is_named(compiled):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = compiled(nn.Conv2d(8, 8, 3).eval())
    model = nn.Sequential(nn.Conv2d(3, 8, 1), inner, nn.Conv2d(8, 4, 1)).eval()
    with pytest.raises(ConfigError, match=r"no modules that torch.jit has compiled, got one \(1\)"):
        nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    with pytest.raises(ConfigError, match=r"no modules that torch.jit has compiled, got one \(1\)"):
        nni_topo.to_dense(model, IMAGES, {"0": {"weight": torch.ones(8, 3, 1, 1)}})
