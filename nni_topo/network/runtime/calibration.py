"""Calibration data: batches of inputs that are read in one pass, checked, and kept for all that looks at them."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from tqdm import tqdm

from nni_topo.errors import ConfigError, DataError, free_memory, whole
from nni_topo.network.runtime.inputs import batch_size, check_inputs, inputs_of, taken, tensors_of

HELD_OUT = 8
"""Every so many samples one is held out."""

_MEMORY = 2 * 2**30
_MOST_BATCHES = 10_000  # of an iterable without a length, which may have no end
_FREE_SHARE = 0.5  # of free memory, and of free disk space, that is taken at most


class Calibration(Sequence[Any]):
    """Batches of inputs, read once: every look at them sees the same samples in the same order.

    A shuffling or augmenting ``DataLoader`` gives other batches in each pass, and a generator gives one pass alone. All
    functions of the package that take batches make a ``Calibration`` of them first. Make one yourself where several
    calls shall see the same samples.

    Parameters
    ----------
    batches : iterable
        Batches of inputs. A batch is a tensor; or a mapping of the model's keyword arguments; or a tuple or list whose
        first entry is the input (a tensor, such a mapping, or a tuple of positional arguments) and whose other entries,
        such as labels, aren't looked at. So a model of two inputs takes ``((images, vectors),)`` or
        ``{"images": images, "vectors": vectors}``, while ``(images, vectors)`` are images with their labels. Entries
        of a mapping that the model has no argument for are left out. Where ``forward`` has one required parameter,
        takes no ``**kwargs``, and has no parameter called like a key of the mapping, the mapping is its argument.
    memory_bytes : int, default=2 * 2**30
        Memory for batches, in bytes, at least 0; what is beyond it, or beyond half of what is free, lies in files in
        the folder for temporary files. The batches of a list or tuple stay where they are.
    name : str, default="calibration"
        What messages call the batches.

    Raises
    ------
    ConfigError
        If ``batches`` isn't an iterable of batches, or ``memory_bytes`` isn't such a number.

    Notes
    -----
    Batches are read at the first look. A DataError is raised then if there is none, if one holds no inputs, if inputs
    are NaN or infinite, or if the batches don't fit into memory and half of the free disk space together. An iterable
    without a length, which may have no end, may give 10,000 batches.

    Examples
    --------
    >>> import torch
    >>> from torch.utils.data import DataLoader
    >>> loader = DataLoader(torch.arange(8.0), batch_size=4, shuffle=True)
    >>> calibration = Calibration(loader)
    >>> bool(torch.equal(torch.cat(list(calibration)), torch.cat(list(calibration))))
    True
    >>> calibration.samples
    8
    """

    def __init__(self, batches: Iterable[Any], *, memory_bytes: int = _MEMORY, name: str = "calibration") -> None:
        whole(0, 2**63 - 1).check("memory_bytes", memory_bytes, "Calibration")
        if isinstance(batches, (Tensor, np.ndarray)):
            kind = "tensor" if isinstance(batches, Tensor) else "array"
            got = f"one {kind} of shape {tuple(batches.shape)}"
            raise ConfigError(f"{name} must be an iterable of batches, e.g. a list of tensors, got {got} ({name})")
        if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
            raise ConfigError(f"{name} must be an iterable of batches, got {type(batches).__name__} ({name})")
        self.name = name
        self._memory_bytes = memory_bytes
        self._source: Iterable[Any] | None = batches
        self._kept: Sequence[Any] = ()
        self._sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, batches: Iterable[Any], name: str = "calibration") -> Calibration:
        """Return batches as calibration data; those that are such already, as they are."""
        return batches if isinstance(batches, Calibration) else cls(batches, name=name)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._batches[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __repr__(self) -> str:
        state = "not read yet" if self._source is not None else f"{len(self._sizes)} batches, {self.samples} samples"
        return f"{type(self).__name__}({state})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Calibration:
        # Nothing changes what was read, and a copy of what wasn't would be read in another order.
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many samples each batch holds."""
        return self._sizes if self._batches else ()

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return sum(self.sizes)

    def split(self) -> tuple[Calibration, Calibration | None]:
        """Return the samples to solve on, and every eighth, held out to judge by; None where there aren't eight.

        Where a batch holds lists of samples, as those of detectors do, every eighth batch is held out instead.
        """
        can_be_cut = all(_can_be_cut(inputs_of(batch)) for batch in self)
        learned: list[tuple[int, Tensor | None]] = []  # a batch's number, and which of its samples; None: all
        held: list[tuple[int, Tensor | None]] = []
        first = 0  # number of the batch's first sample among all
        for index, size in enumerate(self.sizes):
            if can_be_cut:
                is_held = torch.arange(first, first + size) % HELD_OUT == HELD_OUT - 1
                for rows, chosen in ((learned, ~is_held), (held, is_held)):
                    if bool(chosen.any()):
                        rows.append((index, chosen.nonzero().flatten()))
            else:
                (held if index % HELD_OUT == HELD_OUT - 1 else learned).append((index, None))
            first += size
        return self._part(learned), self._part(held) if held else None

    def _part(self, rows: list[tuple[int, Tensor | None]]) -> Calibration:
        part = Calibration((), name=self.name)
        part._source = None
        part._kept = _Part(self._batches, rows)
        part._sizes = tuple(self._sizes[index] if chosen is None else len(chosen) for index, chosen in rows)
        return part

    @property
    def _batches(self) -> Sequence[Any]:
        """The batches; at the first look they are read."""
        if self._source is not None:
            self._read(self._source)
            self._source = None
        return self._kept

    def _read(self, source: Iterable[Any]) -> None:
        """Read, check and keep all batches."""
        is_lasting = isinstance(source, (list, tuple))
        length = _length(source)
        store = BatchStore(self._memory_bytes)
        batches: list[Any] = []
        sizes: list[int] = []
        for index, batch in enumerate(bar(self.name, None, source, total=length)):
            batch = _plain(batch)
            check_inputs(batch, index, self.name)
            sizes.append(_samples_in(inputs_of(batch, index, self.name)))
            if is_lasting:
                batches.append(batch)
                continue
            if length is None and index >= _MOST_BATCHES:
                got = f"{index} batches of {store.nbytes / 2**30:.2f} GiB so far, and more"
                raise DataError(f"{self.name} must have an end, or a length, got {got}: {_CURE} ({self.name})")
            # A generator may fill the same tensor again for its next batch.
            own: Any = tree_map_only(Tensor, lambda each: each.detach().clone(), batch)
            expected = 0 if length is None else nbytes_of(own) * (length - index)
            if not store.has_room(max(nbytes_of(own), expected)):
                count = f"{index + 1} of {'?' if length is None else length} batches"
                got = f"{count}, {nbytes_of(own) / 2**20:.1f} MiB each"
                raise DataError(f"{self.name} must fit into {store.limit}, got {got}: {_CURE} ({self.name})")
            store.append(own)
        if not sizes:
            raise DataError(f"{self.name} must hold at least one batch, got none (was a generator used twice?)")
        self._kept, self._sizes = batches if is_lasting else store, tuple(sizes)


def calibration_of(batches: Iterable[Any] | None) -> Calibration | None:
    """Return the calibration data of a pruner, if it was given any."""
    return None if batches is None else Calibration.of(batches)


_CURE = "take fewer batches, e.g. list(itertools.islice(batches, 16))"


def _length(source: Iterable[Any]) -> int | None:
    """Return how many batches an iterable says that it has; None: it doesn't say."""
    try:
        return len(source)  # type: ignore[arg-type]
    except TypeError:  # so says the loader of a data set that is a stream, too
        return None


def _plain(batch: Any) -> Any:
    """Return a batch with dicts in the place of other mappings, such as what tokenizers give: trees of PyTorch's."""
    if isinstance(batch, Mapping):
        return {key: _plain(value) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_plain(value) for value in batch)
    return batch


def _can_be_cut(inputs: Any) -> bool:
    """Say whether the first dimension of tensors has the samples; detectors take lists of images instead."""
    return not any(isinstance(value, (tuple, list)) and tensors_of(value) for value in _values(inputs))


def _values(inputs: Any) -> Iterable[Any]:
    """Return the arguments that a batch's inputs are, but for a single tensor."""
    if isinstance(inputs, Mapping):
        return inputs.values()
    return inputs if isinstance(inputs, (tuple, list)) else ()


_TENSOR = object()  # stands for a tensor that lies in a file


@dataclass(frozen=True)
class _Filed:
    """A batch whose tensors lie in a file."""

    path: Path
    leaves: list[Any]
    spec: Any

    def read(self) -> Any:
        """Return the batch; its tensors are mapped into memory, and read where they are used."""
        tensors = iter(torch.load(self.path, weights_only=True, mmap=True))
        return tree_unflatten([next(tensors) if each is _TENSOR else each for each in self.leaves], self.spec)


class BatchStore(Sequence[Any]):
    """Nested containers of tensors: in memory as far as there is room, the others in files that go with the store."""

    def __init__(self, memory_bytes: int = _MEMORY) -> None:
        self._memory = min(memory_bytes, int(_FREE_SHARE * free_memory()))
        self._disk = int(_FREE_SHARE * shutil.disk_usage(tempfile.gettempdir()).free)
        self._folder: Path | None = None
        self._batches: list[Any] = []
        self.nbytes = 0

    @property
    def limit(self) -> str:
        """What there is room for, in words."""
        return f"{self._memory / 2**30:.2f} GiB of memory and {self._disk / 2**30:.2f} GiB of disk"

    def has_room(self, nbytes: int) -> bool:
        """Say whether so many bytes more can be kept."""
        return self.nbytes + nbytes <= self._memory + self._disk

    def append(self, batch: Any) -> None:
        """Keep one more."""
        self.nbytes += nbytes_of(batch)
        if self.nbytes <= self._memory:
            self._batches.append(batch)
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="nni_topo-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        leaves, spec = tree_flatten(batch)
        path = self._folder / f"{len(self._batches)}.pt"
        torch.save([leaf for leaf in leaves if isinstance(leaf, Tensor)], path)
        self._batches.append(_Filed(path, [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        batch = self._batches[index]
        return batch.read() if isinstance(batch, _Filed) else batch


def nbytes_of(tree: Any) -> int:
    """Return the bytes of all tensors in nested containers."""
    return sum(each.nbytes for each in tensors_of(tree))


def _samples_in(inputs: Any) -> int:
    """Return how many samples a batch's inputs hold, also where they are a list of images."""
    if _can_be_cut(inputs):
        return batch_size(inputs)
    return next(len(value) for value in _values(inputs) if isinstance(value, (tuple, list)) and tensors_of(value))


class _Part(Sequence[Any]):
    """Some samples of some batches, cut out where they are looked at."""

    def __init__(self, batches: Sequence[Any], rows: list[tuple[int, Tensor | None]]) -> None:
        self._batches, self._rows = batches, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        number, chosen = self._rows[index]
        batch = self._batches[number]
        return batch if chosen is None else taken(batch, chosen)


_PATIENCE = 5.0


def bar(
    what: str, progress: bool | None, items: Iterable[Any] | None = None, *, total: int | None = None, done: int = 0
) -> tqdm[Any]:
    """Return tqdm's bar: at once if ``progress``; None: where five seconds don't do, in a terminal; False: never."""
    # tqdm itself takes None for a bar in a terminal alone
    hidden, patience = (None, _PATIENCE) if progress is None else (not progress, 0.0)
    return tqdm(items, desc=what, total=total, initial=done, disable=hidden, delay=patience)
