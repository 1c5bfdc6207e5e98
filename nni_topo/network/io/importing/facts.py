"""What a network remembers of the file that it was imported from, so that it can be exported in the same form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, dtype, nn

from nni_topo.errors import ConfigError, DataError, hint_of
from nni_topo.network.runtime.calibration import Calibration

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


def as_call(file_inputs: Sequence[FileInput], inputs: Any, place: str) -> list[Tensor]:
    """Return inputs as tensors in the file's order; an error if they aren't the file's."""
    names = [each.name for each in file_inputs]
    if isinstance(inputs, Mapping):
        arguments = {each.argument: each.name for each in file_inputs}
        by_name = {arguments.get(str(name), str(name)): value for name, value in inputs.items()}
        for name in by_name:
            if name not in names:
                raise ConfigError(f"inputs must be the file's, got {name!r}; {hint_of(name, names)} ({place})")
        missing = [name for name in names if name not in by_name]
        if missing:
            raise ConfigError(f"inputs must be all of the file's, got none for {missing[0]!r} ({place})")
        values = [by_name[name] for name in names]
    else:
        # A batch of (inputs, labels) begins with the inputs.
        values = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
        if len(values) < len(names):
            raise ConfigError(f"inputs must be all of the file's, {', '.join(names)}, got {len(values)} ({place})")
        values = values[: len(names)]
    tensors = list[Tensor]()
    for value, each in zip(values, file_inputs, strict=True):
        if not isinstance(value, (Tensor, np.ndarray)):
            kind = type(value).__name__
            raise DataError(f"inputs must be tensors or arrays, got {kind} (input {each.name!r}, {place})")
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        if tensor.dtype != each.dtype:
            raise DataError(
                f"inputs must have the file's type {str(each.dtype)[6:]}, got {str(tensor.dtype)[6:]} "
                f"(input {each.name!r}, {place})"
            )
        fits = tensor.dim() == len(each.shape) and all(
            # A file with a batch of one may become a network that takes any.
            isinstance(size, str) or size == actual or axis == 0
            for axis, (size, actual) in enumerate(zip(each.shape, tensor.shape, strict=False))
        )
        if not fits:
            shape = ", ".join(map(str, each.shape))
            raise DataError(
                f"inputs must have the file's shape ({shape}), got {tuple(tensor.shape)} (input {each.name!r}, {place})"
            )
        tensors.append(tensor.detach())
    return tensors


def batches_as_in_file(file_inputs: Sequence[FileInput], images: Any, name: str) -> tuple[list[list[Tensor]], Any]:
    """Return batches as tensors in the file's order, and as its network takes them; what isn't batches, unchanged."""
    if not isinstance(images, Iterable) or isinstance(images, (str, Mapping)):
        return [], images
    calls = [as_call(file_inputs, batch, f"batch {place} of {name}") for place, batch in enumerate(images)]
    arguments = [each.argument for each in file_inputs]
    batches = [call[0] if len(call) == 1 else dict(zip(arguments, call, strict=True)) for call in calls]
    return calls, images.with_batches(batches) if isinstance(images, Calibration) else batches


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
