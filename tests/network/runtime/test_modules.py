"""What kind of module something is."""

from __future__ import annotations

import torch
from torch import nn

from nni_topo.network.runtime.modules import has_compiled


def test_compiled_parts_are_found_wherever_they_are():
    plain, inside, as_forward = (nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    assert not has_compiled(plain)
    inside[0].compile(backend="eager")
    assert has_compiled(inside)
    as_forward[0].forward = torch.compile(as_forward[0].forward, backend="eager")
    assert has_compiled(as_forward)
    assert has_compiled(nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager")))
