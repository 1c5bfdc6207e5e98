"""Bytes and time of sparse weights: dense files, compressed files, coordinate and row formats."""

from __future__ import annotations

import gzip
import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.network.layers.derived import has_own_forward
from nni_topo.network.runtime.copies import detached_copy


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of a model's state on disk, by format; masked weights must be zeros."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    dense = _saved(state)
    # Weights of two and more dimensions become matrices (out, rest), with 64-bit indices except for csr32.
    coordinates = {name: _matrix(value).to_sparse_coo().coalesce() for name, value in state.items() if value.dim() > 1}
    rows = {name: _csr(_matrix(value)) for name, value in state.items() if value.dim() > 1}
    # Clones, because the indices may be views of larger storages, which would be written in full.
    parts = {name: (m.crow_indices().clone(), m.col_indices().clone(), m.values().clone()) for name, m in rows.items()}
    short = {name: (crow.int(), columns.int(), values) for name, (crow, columns, values) in parts.items()}
    return {
        "dense": len(dense),
        "gzip": len(gzip.compress(dense, 6)),
        "coo": len(_saved({**state, **{name: (m.indices(), m.values()) for name, m in coordinates.items()}})),
        "csr": len(_saved({**state, **parts})),
        "csr32": len(_saved({**state, **short})),
    }


class SparseLinear(nn.Module):
    """A linear layer that multiplies by a sparse matrix in row format, without the given layer's zeros."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.rows = _csr(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(n, in)`` to ``(n, out)``."""
        outputs: Tensor = (self.rows @ inputs.T).T
        return outputs if self.bias is None else outputs + self.bias


def with_sparse_linears(model: nn.Module) -> nn.Module:
    """Return a copy whose linear layers multiply by sparse matrices; convolutions have no such kernel in PyTorch."""
    model = detached_copy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not has_own_forward(module):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, SparseLinear(module))
    return model


def _matrix(value: Tensor) -> Tensor:
    return value.flatten(1)


def _csr(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return matrix.to_sparse_csr()


def _saved(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()
