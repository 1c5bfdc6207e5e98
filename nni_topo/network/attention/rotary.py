"""Rotary positions: queries and keys whose channels turn in pairs, by their place times a frequency of the pair [1]_.

Channels ``j`` and ``j + size / 2`` of each head are a pair, as in the decoders of Transformers, and the frequencies are
a buffer named ``inv_freq``: of an attention module, or one that all modules share. A pair is pruned with
its frequency, so from all heads that share it.

References
----------
.. [1] J. Su et al., "RoFormer: enhanced transformer with rotary position embedding", https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nni_topo.network.attention.heads import Attention

_NAME = "inv_freq"
_CHANGING = ("dynamic", "longrope")  # kinds of Transformers, which compute their frequencies anew for longer texts


def find_frequencies(model: nn.Module, known: Mapping[str, Attention]) -> dict[str, str | None]:
    """Find, by name of attention modules, the buffer of their frequencies; None: how their positions turn isn't known.

    Those without rotary positions aren't among them.
    """
    tables = [name for name, _ in model.named_buffers() if name.rpartition(".")[2] == _NAME]
    inside = {table: name for table in tables for name in known if table.startswith(f"{name}.")}
    found: dict[str, str | None] = {}
    for name, attention in known.items():
        own = [table for table in tables if inside.get(table) == name] or [t for t in tables if t not in inside]
        if own:
            fits = len(own) == 1 and 2 * model.get_buffer(own[0]).numel() == attention.head_size
            found[name] = own[0] if fits and not _changes(model, own[0]) else None
    return found


def by_table(tables: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Return the attention modules that share each buffer of frequencies."""
    found = defaultdict(list)
    for name, table in tables.items():
        if table is not None:
            found[table].append(name)
    return dict(found)


def pairs_of(kept: np.ndarray) -> np.ndarray | None:
    """Return the kept pairs, bool (pairs,), given the kept channels (heads, channels); None unless they form pairs."""
    halves = np.concatenate(np.split(kept, 2, axis=1))
    return halves[0] if (halves == halves[0]).all() else None


def keep_frequencies(model: nn.Module, table: str, pairs: np.ndarray) -> None:
    """Keep the frequencies of some pairs in a buffer, in place."""
    module: Any = model.get_submodule(table.rpartition(".")[0])
    old = model.get_buffer(table)
    kept = old[torch.from_numpy(pairs).to(old.device)].clone()
    # Transformers also keeps the original frequencies as an attribute.
    for values in (module._buffers, vars(module)):
        for key, value in list(values.items()):
            if isinstance(value, Tensor) and value.shape == old.shape:
                values[key] = kept


def _changes(model: nn.Module, table: str) -> bool:
    return getattr(model.get_submodule(table.rpartition(".")[0]), "rope_type", None) in _CHANGING
