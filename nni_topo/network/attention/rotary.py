"""Rotary positions: queries and keys whose channels turn in pairs, by their place times a frequency of the pair [1]_.

The frequencies are a buffer named ``inv_freq``: of an attention module, or one that all modules share. Heads under
rotary positions keep their size, for fewer heads are better and faster than narrower ones.

References
----------
.. [1] J. Su et al., "RoFormer: enhanced transformer with rotary position embedding", https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

_NAME = "inv_freq"


def under_rotary_positions(model: nn.Module, names: Collection[str]) -> set[str]:
    """Return which of a model's attention modules have rotary positions."""
    tables = [name for name, _ in model.named_buffers() if name.rpartition(".")[2] == _NAME]
    owners = {name for name in names if any(table.startswith(f"{name}.") for table in tables)}
    shared = [table for table in tables if not any(table.startswith(f"{name}.") for name in names)]
    return set(names) if shared else owners
