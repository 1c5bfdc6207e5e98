"""What a network remembers of the file that it was imported from, so that it can be exported in the same form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, dtype, nn

OWN_BATCHES = (2, 3)
"""Batch sizes for a file that takes any."""
NAMELESS = "axis_"
"""Beginning of the names of free axes that have none in the file."""
_KEY = "imported_file"
_MULTIPLES = (1, 8, 16, 32, 64)  # a file may take only sizes that are multiples of one of these


@dataclass(frozen=True)
class FileInput:
    """An input of a file; ``shape`` has a size for a fixed axis and a name for a free one."""

    name: str
    argument: str  # name of the parameter of the network's forward
    dtype: dtype
    shape: tuple[int | str, ...]

    @property
    def free(self) -> dict[int, str]:
        """Names of the free axes."""
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str)}


@dataclass(frozen=True)
class FileFacts:
    """The interface of a file."""

    kind: str  # "onnx" or "torch.export"
    inputs: tuple[FileInput, ...]
    outputs: tuple[str, ...]  # names, of ONNX alone
    opset: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    example: tuple[Tensor, ...] = ()  # inputs on which the file was compared with the network
    settings: tuple[str, ...] = ()  # inputs whose value in the example chose a branch of the file


def file_facts(model: nn.Module) -> FileFacts | None:
    """Return what a network remembers of its file; None for any other network."""
    meta: Any = getattr(model, "meta", None)
    return meta.get(_KEY) if isinstance(meta, dict) else None


def set_file_facts(model: Any, facts: FileFacts) -> None:
    """Let a network remember its file: PyTorch copies the ``meta`` of a GraphModule with it."""
    model.meta[_KEY] = facts


def few_samples(inputs: Sequence[FileInput], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return two samples if the file takes any number of them."""
    if not all(0 in each.free for each in inputs):
        return list(tensors)
    return [tensor[torch.arange(OWN_BATCHES[0], device=tensor.device) % len(tensor)] for tensor in tensors]


def of_other_sizes(
    inputs: Sequence[FileInput], tensors: Sequence[Tensor], runs: Callable[[list[Tensor]], Any]
) -> list[Tensor] | None:
    """Return inputs of other sizes in all free axes on which a file or network runs.

    If it takes no other sizes there, only the batches differ. None if it takes no other batch either. ``runs`` runs it.
    """
    sizes = dict[str, int]()
    for tensor, each in zip(tensors, inputs, strict=True):
        sizes |= {name: tensor.shape[axis] for axis, name in each.free.items()}
    batches = {each.free[0] for each in inputs if 0 in each.free}
    # Axes without a name in the file that are as long as the batch may hold the samples, as those of a state do.
    batches |= {name for name, size in sizes.items() if name.startswith(NAMELESS) and size in map(sizes.get, batches)}
    others = [name for name in sizes if name not in batches]
    other_batch = {name: next(size for size in OWN_BATCHES if size != sizes[name]) for name in batches}
    for multiple in (*(_MULTIPLES if others else ()), *((None,) if batches else ())):
        changed = sizes | other_batch
        if multiple is not None:  # different steps, to detect a network that confuses height and width
            changed |= {name: (sizes[name] // multiple + step) * multiple for step, name in enumerate(others, 1)}
        resized = list[Tensor]()
        for tensor, each in zip(tensors, inputs, strict=True):
            for axis, name in each.free.items():
                index = torch.arange(changed[name], device=tensor.device) % tensor.shape[axis]
                tensor = tensor.index_select(axis, index)
            resized.append(tensor)
        try:
            runs(resized)
        except Exception:  # it doesn't take these sizes
            continue
        return resized
    return None
