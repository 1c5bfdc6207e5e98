"""One step of a compensation: what is sampled at a layer, how it is solved, and where the solution goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from nni_topo.errors import DataError
from nni_topo.recovery.normal import Fit, NormalEquations
from nni_topo.recovery.patches import draw_positions
from nni_topo.recovery.plan import Solvable
from nni_topo.recovery.replay import Replay, Values

Samples = tuple[Tensor, Tensor, Tensor]

_HELD_OUT = 5
_LEAST_SAMPLES = 16384
_SAMPLES_PER_UNKNOWN = 16
_CHUNK = 2**23


class Task(ABC):
    """One layer that is changed to make up for pruned channels.

    Attributes
    ----------
    layer : Solvable
        The layer.
    watched : list of Node
        Nodes whose values are sampled.
    place : Node
        Where the error is measured.
    refines : bool
        It has the same inputs as the task before.
    """

    refines = False
    layer: Solvable
    watched: list[Node]
    place: Node

    @property
    @abstractmethod
    def unknowns(self) -> int:
        """Inputs of each equation."""

    @property
    def label(self) -> str:
        """Where the error is measured, in words."""
        return self.place.name

    @abstractmethod
    def extent(self, original: Values) -> tuple[int, int]:
        """Return how many entries a batch has here, and how many positions each entry."""

    @abstractmethod
    def samples(self, original: Values, pruned: Values, part: slice, positions: Tensor) -> Samples:
        """Return inputs, residuals and references at some positions of some entries, ``(groups, samples, ...)``."""

    @abstractmethod
    def fit(self, learned: NormalEquations, held: NormalEquations, ridge: float | None) -> Fit:
        """Solve from the sums of the samples to learn from and of those held out."""

    @abstractmethod
    def apply(self, net: Any, found: Fit) -> None:
        """Put a solution into a network."""


class Sampler:
    """Streams the samples of tasks into normal equations.

    A layer with more than ``max(16384, 16 * unknowns)`` positions over all images is sampled at about so many, evenly
    spread over images and positions, drawn from a seed. Every fifth entry is held out.

    Parameters
    ----------
    replay : Replay
        The two networks.
    sizes : sequence of int
        Images in each batch.
    seed : int
        For the positions.
    """

    def __init__(self, replay: Replay, sizes: Sequence[int], seed: int) -> None:
        self.replay = replay
        self.sizes = sizes
        self.seed = seed
        self._known: tuple[NormalEquations, NormalEquations] | None = None

    def collect(self, task: Task, settled: int) -> tuple[NormalEquations, NormalEquations]:
        """Return the sums of the samples to learn from and of those held out.

        A task that refines the one before has the same positions, so that the products of inputs are the same.

        Raises
        ------
        DataError
            If a batch doesn't fit the model, or activations aren't finite.
        """
        learned, held = NormalEquations(), NormalEquations()
        generator = torch.Generator().manual_seed(self.seed)
        known = self._known if task.refines and self.replay.is_repeatable else None
        self._known = None
        seen = 0
        for index, (original, pruned) in enumerate(self.replay.run(settled, task.watched)):
            entries, count = task.extent(original)
            positions = draw_positions(count, entries, self._wanted(task, index, entries), generator)
            for part in _parts(entries, positions.shape[1] * task.unknowns * len(task.layer.columns)):
                samples = task.samples(original, pruned, part, positions[part])
                marks = (torch.arange(seen, seen + entries)[part] + 1) % _HELD_OUT == 0
                rows = marks.repeat_interleave(samples[0].shape[1] // len(marks)).to(samples[0].device)
                _add(learned, samples, ~rows, products=known is None)
                _add(held, samples, rows, products=known is None)
            seen += entries
        for mine, other in zip((learned, held), known or (), strict=False):
            mine.sums |= {name: total for name, total in other.sums.items() if name == "xx"}
        if not (learned.is_finite() and held.is_finite()):
            raise DataError(f"activations must be finite, got NaN or infinity ({task.layer.name})")
        self._known = learned, held
        return learned, held

    def _wanted(self, task: Task, index: int, entries: int) -> int:
        """Positions per entry of a batch."""
        samples = max(_LEAST_SAMPLES, _SAMPLES_PER_UNKNOWN * task.unknowns)
        share = self.sizes[index] / sum(self.sizes)
        return int(samples * share / entries) + 1


def _add(equations: NormalEquations, samples: Samples, rows: Tensor, *, products: bool) -> None:
    if bool(rows.any()):
        inputs, residuals, references = (values[:, rows] for values in samples)
        equations.add(inputs, residuals, references, products=products)


def _parts(entries: int, size: int) -> Iterator[slice]:
    """Cut entries of a size into slices that fit into memory together with their patches."""
    step = max(1, _CHUNK // max(size, 1))
    for first in range(0, entries, step):
        yield slice(first, first + step)
