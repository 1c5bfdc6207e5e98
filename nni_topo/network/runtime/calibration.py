"""Calibration data: batches of inputs that are read once, checked, and kept for every later pass."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.inputs import (
    batch_size,
    check_inputs,
    inputs_of,
    lists_of_samples,
    take_samples,
    tensors_of,
)
from nni_topo.network.runtime.memory import free_memory
from nni_topo.network.runtime.progress import bar
from nni_topo.rules import FLAG, NONE, whole

HELD_OUT = 8
"""Every eighth sample is held out."""

_MEMORY = 2 * 2**30
_MOST_BATCHES = 1_000  # of an iterable without a length, unless `max_batches` is given
_FREE_SHARE = 0.5  # largest share of the free memory, and of the free disk space, for batches


class Calibration(Sequence[Any]):
    """Batches of inputs that are read once: every pass over them yields the same samples in the same order.

    A ``DataLoader`` that shuffles or augments yields other batches in each pass, and a generator can be read only once.
    All functions of the package that take batches make a ``Calibration`` of them first. Make one yourself to use the
    same samples in several calls.

    Parameters
    ----------
    batches : iterable
        Batches of inputs, prepared as in training. A batch is a tensor or an array; or a mapping of the model's keyword
        arguments; or a tuple or list whose first entry is the input (a tensor, such a mapping, or a tuple of positional
        arguments) and whose other entries, such as labels, are ignored. So a model of two inputs takes
        ``((images, vectors),)`` or ``{"images": images, "vectors": vectors}``; ``(images, vectors)`` are images with
        their labels, unless ``forward`` requires two arguments: then they are its inputs, and a third entry is the
        labels. Entries of a mapping are ignored if the model has no argument of their name. If ``forward`` has one
        required parameter, no ``**kwargs`` and no parameter named like a key of the mapping, the mapping itself is the
        argument. Floats are cast to the type of the model's parameters. Images as bytes, with channels last or without
        a batch dimension are an error.
    memory_bytes : int, default=2 * 2**30
        Memory for batches, in bytes, at least 0; at most half of the free memory is used. Further batches are written
        to temporary files. The batches of a list or tuple aren't copied.
    max_batches : int, optional
        Number of batches to read, at least 1. By default all are read, but an iterable without a length, such as a
        generator or a loader of a stream, must end within 1,000 batches.
    groups : sequence of int or str, optional
        For each sample, in order, its source, such as the photo of a crop or the speaker of a recording. Samples of one
        group aren't independent, so a group is held out as a whole. By default each sample is a group of its own. The
        report of :func:`nni_topo.shrink` then has figures on new groups, and on new samples of the other groups.
        Samples with equal inputs are always held out together, and so are their groups.
        Batches of lists of samples, as for detectors, can't have groups.
    hold_out : bool, default=True
        Whether :func:`nni_topo.compensate` and :func:`nni_topo.remove_blocks` leave out every eighth sample, or every
        eighth group, on which :func:`nni_topo.distill` then evaluates. Parts that :meth:`split` returned are used in
        full.

    Raises
    ------
    ConfigError
        If ``batches`` isn't an iterable of batches, ``memory_bytes`` isn't an integer of at least 0, ``max_batches``
        isn't one of at least 1, or ``groups`` isn't a sequence of integers or strings.
    DataError
        When the batches are first used: if ``batches`` is empty, if a batch holds no inputs, if inputs are NaN or
        infinite, if the batches don't fit into the memory and half of the free disk space together, if an iterable
        without a length yields more than 1,000 and ``max_batches`` isn't given, or if the number of ``groups`` isn't
        the number of samples.

    Notes
    -----
    Batches are read when they are first used, not when the object is made.

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

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        memory_bytes: int = _MEMORY,
        max_batches: int | None = None,
        groups: Sequence[int | str] | Tensor | None = None,
        hold_out: bool = True,
    ) -> None:
        whole(0, 2**63 - 1).check("memory_bytes", memory_bytes, "Calibration")
        (whole(1) | NONE).check("max_batches", max_batches, "Calibration")
        FLAG.check("hold_out", hold_out, "Calibration")
        _check_iterable(batches, "calibration")
        labels: Any = groups.tolist() if isinstance(groups, (Tensor, np.ndarray)) else groups
        is_sequence = isinstance(labels, Sequence) and not isinstance(labels, (str, bytes))
        if groups is not None and not (is_sequence and all(isinstance(label, (int, str)) for label in labels)):
            got = type(groups).__name__
            raise ConfigError(f"groups must be a sequence of integers or strings, got {got} (groups)")
        self.name = "calibration"
        """Name of the batches in messages."""
        # By argument of the model, the argument that the unpruned network gets instead: a block after pruned
        # blocks has other inputs than the same block of the unpruned network.
        self.instead: Mapping[str, str] = {}
        self.why_whole = ""
        """Why batches must stay whole, because the model doesn't run on parts of them; empty if it does."""
        self._holds_out = hold_out
        self._memory_bytes, self._max_batches = memory_bytes, max_batches
        self._labels: Sequence[int | str] | None = labels  # group of each sample
        self.has_sources = groups is not None
        """Whether groups were passed, which say which samples come from one source."""
        self._source: Iterable[Any] | None = batches
        self._kept: Sequence[Any] = ()
        self._sizes: tuple[int, ...] = ()
        self._given_as: Sequence[int] | None = None  # in a part of other data: numbers of the batches there

    @classmethod
    def of(cls, batches: Iterable[Any], name: str = "calibration") -> Calibration:
        """Return batches as calibration data; a ``Calibration`` is returned itself."""
        if isinstance(batches, Calibration):
            return batches
        _check_iterable(batches, name)
        calibration = cls(batches)
        calibration.name = name
        return calibration

    def with_arguments(self, count: int) -> Calibration:
        """Return the data for a model that requires ``count`` arguments.

        If each batch starts with ``count`` tensors, these are its inputs, and the entries after them are its targets.
        """

        def lists_them(batch: Any) -> bool:
            entries = batch[:count] if isinstance(batch, (tuple, list)) else ()
            return len(entries) == count and all(isinstance(argument, Tensor) for argument in entries)

        if count < 2 or not all(map(lists_them, self)):
            return self
        batches = self._batches
        views = _Views(len(batches), lambda at: (tuple(batches[at][:count]), *batches[at][count:]))
        calibration = self._of_read(views, self.sizes, self._labels)
        for index, batch in enumerate(calibration):
            check_inputs(batch, index, self.name)
        return calibration

    def with_batches(self, batches: Sequence[Any]) -> Calibration:
        """Return the same samples, in the same batches, as other objects, such as tensors on another device."""
        return self._of_read(batches, self.sizes, self._labels)

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
        # Batches that were read never change, and a copy of batches not yet read would be read in another order.
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of samples of each batch."""
        _ = self._batches  # reads them
        return self._sizes

    def given_as(self, index: int) -> int:
        """Return the number that a batch has in the data as given; this may be a part of them."""
        if self._given_as is None:
            return index
        return self._given_as[index]

    @property
    def samples(self) -> int:
        """The number of samples in all batches."""
        return sum(self.sizes)

    @property
    def groups(self) -> Tensor | None:
        """Group number of each sample, int64 (samples,); None if each sample is a group of its own.

        Equal inputs are one group.
        """
        if self._labels is not None or self._has_equal_inputs:
            return self._numbers
        return None

    @property
    def _has_equal_inputs(self) -> bool:
        """Whether samples without groups are held out together because their inputs are equal."""
        return self._labels is None and not self.is_whole and len(self._numbers.unique()) < self.samples

    @cached_property
    def _numbers(self) -> Tensor:
        """Number of what is held out together: of each sample, its group or its whole batch, int64 (samples,).

        Equal inputs are always held out together.
        """
        batches = np.repeat(np.arange(len(self)), self.sizes)
        partitions: list[Any] = [range(self.samples) if self._labels is None else self._labels]
        if len(partitions[0]) != self.samples:
            raise DataError(
                f"groups must have one entry for each of {self.samples} samples, got {len(partitions[0])} (groups)"
            )
        if self.is_whole:
            # The groups of a batch stay together, also with those of other batches.
            partitions.append(batches.tolist())
        if self.is_whole and not self.holds_lists:
            # Rows of such a batch may be parts of one sample, such as the nodes of a graph, and are often equal.
            digest_of_batch = [tuple(row) for row in self._by_batch(self.digests)]
            partitions.append([digest_of_batch[batch] for batch in batches])
        else:
            partitions.append(self.digests)
        return _joined_parts(partitions)

    def _by_batch(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """Split values of all samples into those of each batch."""
        ends = np.cumsum(self.sizes).tolist()
        return [values[end - size : end] for end, size in zip(ends, self.sizes, strict=True)]

    def split(self) -> tuple[Calibration, Calibration | None]:
        """Split off every eighth sample, or every eighth group of samples.

        Returns
        -------
        learned : Calibration
            The samples to solve on.
        held_out : Calibration or None
            Every eighth sample, to evaluate the solution on; None for fewer than eight samples. Every eighth batch, and
            at least one of two or more, if batches hold lists of samples, as for detectors, or the model runs on whole
            batches only. If samples have groups, every eighth group, and at least one of two or more.
        """
        learned, held_out = self.in_parts(self._every(HELD_OUT))
        return learned or self, held_out

    @property
    def learned(self) -> Calibration:
        """The samples to solve on: the first part of :meth:`split`, or all if none are held out."""
        if self._holds_out:
            return self.split()[0]
        return self

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """A digest of the inputs of each sample, which identifies the sample."""
        digests: list[bytes] = []
        for batch, size in zip(self, self.sizes, strict=True):
            inputs = inputs_of(batch, name=self.name)
            columns: list[Any] = lists_of_samples(inputs)
            # Moved as a whole: one transfer from the device.
            columns = columns or [tensor.cpu() for tensor in tensors_of(inputs) if tensor.dim() and len(tensor) == size]
            for sample in zip(range(size), *columns, strict=True):
                digest = hashlib.blake2b(digest_size=8)
                for tensor in tensors_of(sample):
                    digest.update(repr(tuple(tensor.shape)).encode())
                    if tensor.is_floating_point():
                        tensor = tensor + 0.0  # -0.0 equals 0.0, but has other bytes
                    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
                digests.append(digest.digest())
        return tuple(digests)

    def held_out(self, every: int) -> Tensor:
        """Mark every ``every``-th sample, or all of every ``every``-th group, also within batches: bool (samples,)."""
        if self.is_whole and self._labels is None:
            return torch.arange(self.samples) % every == every - 1
        return self._marks(self._every(every)) == 1

    @property
    def withheld(self) -> Tensor:
        """Mark the samples that :meth:`split` holds out, bool (samples,)."""
        return self._marks(self._every(HELD_OUT)) == 1

    @property
    def units(self) -> Tensor:
        """Number of what is held out together: of each sample, its group or its whole batch, int64 (samples,)."""
        return self._numbers

    @property
    def least_to_hold_out(self) -> str:
        """How much data there must be to hold any out, in words."""
        if self.is_whole:
            return "two batches, because the model runs on whole batches only"
        return f"{HELD_OUT} samples"

    @property
    def unit(self) -> str:
        """What is held out together, in words: samples, different samples if some are equal, or groups of samples."""
        if self._has_equal_inputs:
            return "different samples"
        if self._labels is None:
            return "samples"
        return "groups of samples"

    @property
    def counted(self) -> str:
        """How much data there is, in the unit of `least_to_hold_out`."""
        if self._has_equal_inputs:
            return f"{self.samples} with {len(self._numbers.unique())} different inputs"
        return str(len(self) if self.is_whole else self.samples)

    def as_whole_batches(self, why: str) -> Calibration:
        """Return the same data as batches that stay whole, for this reason."""
        data = self._of_read(self._batches, self.sizes, self._labels)
        data.why_whole = why
        return data

    def _every(self, every: int) -> list[int]:
        """Return the pattern that puts every ``every``-th sample, or group of samples, into part 1, others into 0."""
        if self._labels is not None or self.is_whole:
            # Of fewer groups or batches the last one is held out, unless it is the only one.
            every = min(every, max(2, len(self._numbers.unique())))
        return [0] * (every - 1) + [1]

    @property
    def judging_pattern(self) -> list[int]:
        """The pattern for `in_parts` that splits what :meth:`split` holds out: into part 1, which judges, and part 2.

        It needs eight samples, or three groups or whole batches; with fewer it is the pattern of :meth:`split`.
        """
        units = len(self._numbers.unique())
        if units < (HELD_OUT if self._labels is None and not self.is_whole else 3):
            return self._every(HELD_OUT)
        length = min(2 * HELD_OUT, units)
        pattern = [0] * length
        pattern[length // 2 - 1], pattern[-1] = 1, 2
        return pattern

    def _marks(self, pattern: Sequence[int]) -> Tensor:
        """Return the part of each sample by a pattern, int64 (samples,)."""
        return torch.tensor(pattern)[self._numbers % len(pattern)]

    def in_parts(self, pattern: Sequence[int]) -> tuple[Calibration | None, ...]:
        """Split the samples, or the groups of samples, into parts, in their order; None for a part without samples.

        ``pattern``: the part of each sample, from 0, such as ``(0, 0, 1)``, repeated. It assigns whole batches if these
        can't be cut.
        """
        return tuple(self._part(pattern, part) for part in range(max(pattern) + 1))

    @cached_property
    def holds_lists(self) -> bool:
        """Whether batches hold lists of samples, as detectors take them."""
        return any(lists_of_samples(inputs_of(batch)) for batch in self)

    @property
    def is_whole(self) -> bool:
        """Whether batches aren't divided into samples."""
        return bool(self.why_whole) or self.holds_lists

    def new_samples(self, every: int) -> tuple[Calibration, Calibration | None]:
        """Split off every ``every``-th sample of the groups that have several; None if that is none.

        Every group keeps samples, and samples with equal inputs stay together. Whole batches aren't cut.
        """
        if self.is_whole:
            return self, None
        pairs = sorted(dict.fromkeys(zip(self._numbers.tolist(), self.digests, strict=True)), key=lambda pair: pair[0])
        sizes = Counter(number for number, _ in pairs)
        several = [digest for number, digest in pairs if sizes[number] > 1]
        chosen = set(several[every - 1 :: every])
        marks = torch.tensor([digest in chosen for digest in self.digests])
        if chosen:
            return (self.marked(~marks), self.marked(marks))
        return (self, None)

    def _part(self, pattern: Sequence[int], part: int) -> Calibration | None:
        """Return one part of `in_parts`; None if it has no samples."""
        if self.holds_lists and self._labels is not None:
            raise ConfigError(
                f"batches whose samples have groups must be tensors of samples, got lists of samples ({self.name})"
            )
        subset = self.marked(self._marks(pattern) == part)
        subset._holds_out = False
        if len(subset):
            return subset
        return None

    def marked(self, marks: Tensor) -> Calibration:
        """Return the samples that are marked, bool (samples,), in their batches; of whole batches those with a mark."""
        rows: list[tuple[int, Tensor | None]] = []
        for index, batch_marks in enumerate(marks.split(self.sizes)):
            if bool(batch_marks.any()):
                indices = None if self.is_whole else batch_marks.nonzero().flatten()
                rows.append((index, indices))
        return self._subset(rows)

    def chosen(self, samples: Tensor) -> Calibration:
        """Return samples by their ascending indices, int64 (count,), in batches of the largest batch size.

        If batches have inputs of different shapes, the samples stay in their batches. Where batches stay whole, those
        are returned that hold one of the samples.
        """
        subset = self.marked(torch.isin(torch.arange(self.samples), samples))
        if self.is_whole:
            return subset
        inputs = [inputs_of(batch, index, self.name) for index, batch in enumerate(subset)]

        def join(*leaves: Any) -> Any:
            has_samples = isinstance(leaves[0], Tensor) and leaves[0].dim() > 0
            if has_samples:
                return torch.cat(leaves)
            return leaves[0]

        try:
            joined = tree_map(join, *inputs)
        except (ValueError, RuntimeError):  # their shapes differ
            return subset
        places = torch.arange(len(samples)).split(max(self.sizes))
        return self._of_read([(take_samples(joined, place),) for place in places], [*map(len, places)], subset._labels)

    def _subset(self, rows: Sequence[tuple[int, Tensor | None]]) -> Calibration:
        """Return samples, given by batch and indices within the batch (None: all), without copying them."""
        labels: list[int] | None = None
        if (groups := self.groups) is not None:
            by_batch = groups.split(self._sizes)
            labels = []
            for index, indices in rows:
                batch_labels = by_batch[index]
                if indices is not None:
                    batch_labels = batch_labels[indices]
                labels += batch_labels.tolist()
        batches = self._batches

        def make(at: int) -> Any:
            index, indices = rows[at]
            if indices is None:
                return batches[index]
            return take_samples(batches[index], indices)

        sizes = [self._sizes[index] if indices is None else len(indices) for index, indices in rows]
        subset = self._of_read(_Views(len(rows), make), sizes, labels)
        subset._given_as = [self.given_as(index) for index, _ in rows]
        digests = list[bytes]()
        digests_by_batch = self._by_batch(self.digests)
        for index, indices in rows:
            if indices is None:
                digests += digests_by_batch[index]
            else:
                digests += [digests_by_batch[index][at] for at in indices.tolist()]
        subset.digests = tuple(digests)
        return subset

    def _of_read(self, batches: Sequence[Any], sizes: Sequence[int], labels: Any) -> Calibration:
        """Return batches that were read and checked as calibration data with the name and settings of this one."""
        calibration = Calibration((), groups=labels)
        calibration.name, calibration.instead, calibration.why_whole = self.name, self.instead, self.why_whole
        calibration._holds_out, calibration.has_sources = self._holds_out, self.has_sources
        calibration._source, calibration._kept, calibration._sizes = None, batches, tuple(sizes)
        return calibration

    @property
    def _batches(self) -> Sequence[Any]:
        """The batches, which are read when they are first used."""
        if self._source is not None:
            self._read(self._source)
            self._source = None
        return self._kept

    def _read(self, source: Iterable[Any]) -> None:
        """Read, check and keep all batches."""
        in_memory = isinstance(source, (list, tuple))  # the caller holds these batches anyway
        try:
            length: int | None = len(source)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):  # a DataLoader raises TypeError if its data set is a stream
            length = None
        total, most = length, self._max_batches
        if most is not None:
            source = itertools.islice(source, most)
            total = most if length is None else min(length, most)
        # A loader of a stream may yield more batches than its length.
        limit = max(length or 0, _MOST_BATCHES) if most is None else most
        store = BatchStore(self._memory_bytes)
        batches: list[Any] = []
        sizes: list[int] = []
        for index, batch in enumerate(bar(self.name, None, iter(source), total=total)):
            if index == limit:
                got = f"{index} batches so far ({store.nbytes / 2**30:.2f} GiB) and more"
                raise DataError(f"{self.name} must have an end, a length or a limit, got {got}: {_CURE} ({self.name})")
            batch = _plain(batch)
            check_inputs(batch, index, self.name)
            inputs = inputs_of(batch, index, self.name)
            lists = lists_of_samples(inputs)  # such as images
            sizes.append(len(lists[0]) if lists else batch_size(inputs))
            if in_memory:
                batches.append(batch)
                continue
            # A copy: a generator may fill the same tensor again for its next batch.
            copied: Any = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), batch)
            # All further batches are assumed to be as large as this one.
            coming = 1 if length is None or total is None else max(1, total - index)
            if not store.has_room(nbytes_of(copied) * coming):
                count = f"{index + 1} of {'?' if total is None else total} batches"
                got = f"{count}, {nbytes_of(copied) / 2**20:.1f} MiB each"
                raise DataError(f"{self.name} must fit into {store.limit}, got {got}: {_CURE} ({self.name})")
            store.append(copied)
        if not sizes:
            raise DataError(
                f"{self.name} must hold at least one batch, got none: a generator gives its batches "
                f"once, and a DataLoader with drop_last=True leaves out what doesn't fill a batch ({self.name})"
            )
        self._kept = batches if in_memory else store
        self._sizes = tuple(sizes)


def _joined_parts(partitions: Sequence[Sequence[Any]]) -> Tensor:
    """Return the finest partition whose parts hold parts of all partitions whole: int64 (samples,).

    Each partition is a label for each sample. The parts are numbered in the order of their first samples.
    """
    rows: list[np.ndarray] = []
    count = 0
    for labels in partitions:
        numbers: dict[Any, int] = {}
        rows.append(count + np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64))
        count += len(numbers)
    ends = np.concatenate([np.stack([rows[0], row]) for row in rows[1:]], axis=1)
    edges = coo_array((np.ones(ends.shape[1], dtype=bool), (ends[0], ends[1])), shape=(count, count))
    parts = connected_components(edges, directed=False)[1][rows[0]]
    _, first, inverse = np.unique(parts, return_index=True, return_inverse=True)
    return torch.from_numpy(np.argsort(np.argsort(first))[inverse].astype(np.int64))


def _check_iterable(batches: Any, name: str) -> None:
    """Raise ConfigError for a single tensor, array, text or mapping, or for anything that isn't iterable."""
    is_one = isinstance(batches, (Tensor, np.ndarray, str, bytes, Mapping))
    if is_one or not isinstance(batches, Iterable):
        got = type(batches).__name__
        if isinstance(batches, (Tensor, np.ndarray)):
            got = f"one {got} of shape {tuple(batches.shape)}"
        raise ConfigError(
            f"{name} must be an iterable of batches, e.g. a list of tensors or a DataLoader, got {got} ({name})"
        )


_CURE = "say how many batches are read, e.g. nni_topo.Calibration(batches, max_batches=16)"


def _plain(batch: Any) -> Any:
    """Return a batch with arrays as tensors, and mappings as dicts: PyTorch's trees know no other mappings."""
    if isinstance(batch, Mapping):
        return {key: _plain(value) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_plain(value) for value in batch)
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "fiub":
        # PyTorch supports no negative strides, other byte orders or read-only memory.
        native = batch.astype(batch.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.require(native, requirements=["C", "W"]))
    return batch


class BatchStore(Sequence[Any]):
    """Batches of tensors: in memory while they fit, then in files, which are deleted with the store."""

    def __init__(self, memory_bytes: int = _MEMORY) -> None:
        self._memory = min(memory_bytes, int(_FREE_SHARE * free_memory()))
        self._disk = int(_FREE_SHARE * shutil.disk_usage(tempfile.gettempdir()).free)
        self._folder: Path | None = None
        self._batches: list[Any] = []
        self.nbytes = 0

    @property
    def limit(self) -> str:
        """The memory and disk space that batches may take, in words."""
        return f"{self._memory / 2**30:.2f} GiB of memory and {self._disk / 2**30:.2f} GiB of disk"

    def has_room(self, nbytes: int) -> bool:
        """Tell whether ``nbytes`` more bytes fit."""
        return self.nbytes + nbytes <= self._memory + self._disk

    def append(self, batch: Any) -> None:
        """Add a batch."""
        self.nbytes += nbytes_of(batch)
        if self.nbytes <= self._memory:
            self._batches.append(batch)
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="nni_topo-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{len(self._batches)}.pt"
        torch.save(batch, path)
        self._batches.append(path)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        batch = self._batches[index]
        if not isinstance(batch, Path):
            return batch
        # Memory-mapped: tensors are read only when they are used.
        return torch.load(batch, weights_only=False, mmap=True)


def nbytes_of(tree: Any) -> int:
    """Return the number of bytes of all tensors in nested containers."""
    return sum(tensor.nbytes for tensor in tensors_of(tree))


class _Views(Sequence[Any]):
    """Batches that are made from other batches each time they are used."""

    def __init__(self, count: int, make: Callable[[int], Any]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return self._make(range(self._count)[index])
