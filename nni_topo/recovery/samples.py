"""One step of a compensation: samples are taken at a layer, it is solved, and the solution is applied."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional

from nni_topo.errors import ConfigError, DataError
from nni_topo.maths.least_squares.normal import Fit, NormalEquations
from nni_topo.maths.least_squares.windows import Windows, windows_pay
from nni_topo.network.graph.nodes import tensor_shape
from nni_topo.network.layers.derived import InnerCall, call_of, has_own_forward
from nni_topo.network.layers.kinds import TRANSPOSED
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import with_whole_batches
from nni_topo.network.runtime.memory import check_memory, free_memory_of
from nni_topo.network.runtime.modules import device_of
from nni_topo.recovery.plan import Solvable
from nni_topo.recovery.replay import Replay, Values


def position_count(module: nn.Module, shape: Sequence[int]) -> int:
    """Return the number of positions in each entry of a layer's output of this shape."""
    return math.prod(shape[1:-1] if isinstance(module, nn.Linear) else shape[2:])


def input_rows(module: Any, inputs: Tensor, columns: Tensor, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a layer's inputs at flat output positions (n, p): (groups, n * p, d * kernel elements).

    ``columns`` (groups, d) are the input channels, ``shape`` is the shape of the layer's output.
    """
    # In the order of the layer's weight by output: channels and then kernel.
    groups, is_own, positions = columns.shape[0], has_own_forward(module), positions.to(inputs.device)
    if isinstance(module, nn.Linear):
        return _chosen(call_of(module, inputs).entering if is_own else inputs, positions, columns)
    entries = torch.arange(len(inputs), device=inputs.device)[:, None]
    dims = len(module.kernel_size)
    # (n, channels, *output size, *kernel size): the values that a convolution adds up for each output position.
    if is_own:  # its forward takes all channels, and may do anything before it convolves
        call = call_of(module, inputs)
        call = replace(call, entering=call.entering[:, columns.flatten()])
    else:
        call = call_of(module, inputs[:, columns.flatten()])
    if isinstance(module, TRANSPOSED):
        windows = _transposed_windows(call, call.output_size if is_own else shape[2:])
    else:
        windows = call.windows()
    # As torch.unravel_index does, which would load SymPy.
    places, quotient = list[Tensor](), positions
    for size in reversed(windows.shape[2 : 2 + dims]):
        places.insert(0, quotient % size)
        quotient = quotient // size
    at: tuple[Any, ...] = (entries, slice(None), *places)
    rows = windows[at].flatten(0, 1)
    if isinstance(module, TRANSPOSED):
        # A transposed convolution applies its kernel from the last tap on.
        rows = rows.flip(tuple(range(2, 2 + dims)))
    return rows.reshape(len(rows), groups, -1).transpose(0, 1)


def input_windows(module: Any, inputs: Tensor, columns: Tensor) -> Windows:
    """Return the inputs of a one-dimensional convolution with stride 1 at all positions, as `input_rows` does."""
    call, (groups, channels) = call_of(module, inputs[:, columns.flatten()]), columns.shape
    sequences = call.padded.double().unflatten(1, (groups, channels)).transpose(0, 1)
    return Windows(sequences, call.kernel[0], call.dilation[0])


def are_windows_summed(module: Any, columns: Tensor, sampled: int, entries: int, positions: int) -> bool:
    """Tell whether a layer's inputs are summed as windows at all positions of its ``entries``.

    That takes less work than about ``sampled`` rows only in one-dimensional convolutions with long kernels.
    """
    if not isinstance(module, nn.Conv1d) or module.stride != (1,) or has_own_forward(module):
        return False
    groups, channels = columns.shape
    return windows_pay(module.kernel_size[0], channels, len(module.weight) // groups, entries, positions, sampled)


def output_rows(module: nn.Module, outputs: Tensor, rows: Tensor, positions: Tensor | None) -> Tensor:
    """Return a layer's outputs at flat positions (n, p), None: all, of channels (groups, o): (groups, n * p, o)."""
    last = outputs if isinstance(module, nn.Linear) else outputs.movedim(1, -1)
    return _chosen(last, positions, rows)


def _chosen(values: Tensor, positions: Tensor | None, channels: Tensor) -> Tensor:
    """Return values (n, ..., channels) at flat positions (n, p), of some channels (groups, c): (groups, n * p, c)."""
    flat = values.reshape(len(values), -1, values.shape[-1])
    # All positions in order need no indexing, nor do all channels.
    if positions is not None and positions.shape[1] < flat.shape[1]:
        flat = flat[torch.arange(len(flat), device=flat.device)[:, None], positions.to(flat.device)]
    flat = flat.flatten(0, 1)
    everything = torch.arange(flat.shape[1], device=channels.device)
    return flat[None] if torch.equal(channels[0], everything) else flat[:, channels].transpose(0, 1)


def draw_positions(count: int, entries: int, n_positions: int, generator: torch.Generator) -> Tensor:
    """Draw positions (entries, min(n_positions, count)), ascending, one from each of ``n_positions`` equal ranges."""
    if n_positions >= count:
        return torch.arange(count).expand(entries, count)
    jitter = torch.rand(entries, n_positions, generator=generator, dtype=torch.float64)
    edges = torch.arange(n_positions + 1, dtype=torch.float64) * count / n_positions
    low, high = edges[:-1].ceil(), edges[1:].ceil()
    return (low + (jitter * (high - low)).floor()).long()


def draw_unpadded(
    count: int, entries: int, n_positions: int, generator: torch.Generator, real: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Draw positions, about ``n_positions`` of them real, and return them with marks of the real ones.

    Both are (entries, positions). Positions are drawn as by `draw_positions`. ``real`` marks the positions that aren't
    padding, bool (entries, count). If it is None or has another shape, all are real, and the marks are None.
    """
    if real is None or real.shape != (entries, count):
        return draw_positions(count, entries, n_positions, generator), None
    share = max(float(real.double().mean()), 1 / count)
    positions = draw_positions(count, entries, math.ceil(n_positions / share), generator).to(real.device)
    return positions, real.gather(1, positions)


def _transposed_windows(call: InnerCall, size: Sequence[int]) -> Tensor:
    """Return a view ``(n, channels, *output size, *kernel size)``: the values that each output position sums.

    Taps without an input get zeros: a transposed convolution is a convolution of its input with ``stride -
    1`` zeros between the pixels.
    """
    inputs = call.entering
    apart = [(length - 1) * stride + 1 for length, stride in zip(inputs.shape[2:], call.stride, strict=True)]
    windows = inputs.new_zeros(*inputs.shape[:2], *apart)
    pixels: Any = (..., *(slice(None, None, stride) for stride in call.stride))
    windows[pixels] = inputs
    around: list[int] = []
    for length, output_length, kernel, dilation, (padding, _) in zip(
        apart, size, call.kernel, call.dilation, call.padding, strict=True
    ):
        reach = dilation * (kernel - 1)
        before = reach - padding
        # The last dimension comes first, as in `pad`; negative numbers cut off.
        around = [before, output_length + reach - before - length, *around]
    windows = functional.pad(windows, around)
    for dim, (kernel, dilation) in enumerate(zip(call.kernel, call.dilation, strict=True), start=2):
        windows = windows.unfold(dim, dilation * (kernel - 1) + 1, 1)[..., ::dilation]
    return windows


def samples_to_solve_on(model: nn.Module, calibration: Calibration) -> Calibration:
    """Return the samples that may be solved on: all but those on which distillation judges."""
    learned = calibration.learned
    return with_whole_batches(model, calibration).learned if learned is not calibration else calibration


Samples = tuple[Tensor | Windows, Tensor, Tensor]

HELD_OUT_ENTRIES = 5
"""One of this many entries is held out to choose the ridge."""
_LEAST_SAMPLES = 16384
_SAMPLES_PER_UNKNOWN = 16
_CHUNK = 2**23
_COPIES = 4  # of products, or of samples, at most
_CURE = "method='recalibrate' takes none; a layer that reads fewer channels takes less"


class Task(ABC):
    """One layer that is changed to make up for pruned channels."""

    refines = False  # whether it has the same inputs as the task before, so that their products are reused
    layer: Solvable
    watched: list[Node]  # whose values are sampled
    place: Node  # where the error is measured

    @property
    @abstractmethod
    def unknowns(self) -> int:
        """Number of inputs of each equation, which determines memory and the number of samples."""

    @property
    def fitted(self) -> int:
        """Numbers fitted for each output without the constant; fewer than inputs if these share a number."""
        return self.unknowns

    @property
    def label(self) -> str:
        """Name of the place where the error is measured."""
        return self.place.name

    @abstractmethod
    def extent(self, unpruned: Values) -> tuple[int, int]:
        """Return how many entries a batch has here, and how many positions each entry."""

    @abstractmethod
    def samples(self, unpruned: Values, pruned: Values, part: slice, positions: Tensor | None) -> Samples:
        """Return inputs, residuals and references at positions (entries, p), ``(groups, samples, ...)``.

        Positions are None if `sums_windows`.
        """

    def sums_windows(self, sampled: int, entries: int, positions: int) -> bool:
        """Tell whether `samples` can take all positions of all entries with less work than about ``sampled`` rows."""
        return False

    @abstractmethod
    def fit(self, learned: NormalEquations, held: NormalEquations, ridge: float | None) -> Fit:
        """Solve from the sums of the samples to learn from and of those held out."""

    @abstractmethod
    def apply(self, net: Any, found: Fit) -> None:
        """Put a solution into a network."""


class Sampler:
    """Streams the samples of tasks into normal equations."""

    # A layer with more than ``max(16384, 16 * unknowns)`` positions over all images is sampled at about that many,
    # evenly spread over images and positions, drawn for each batch from the seed and the number of images before it.
    # Padding isn't sampled.

    def __init__(
        self,
        replay: Replay,
        sizes: tuple[int, ...],
        seed: int,
        held_out: Tensor,
    ) -> None:
        self.replay = replay
        self.sizes = sizes
        self.held_out = held_out  # which samples are held out, bool (samples,)
        self.seed = seed
        self.images = sum(sizes)
        self._known: tuple[NormalEquations, NormalEquations] | None = None

    def check_room(self, tasks: Sequence[Task]) -> None:
        """Raise DataError if a task's sums and factors don't fit into memory."""
        for task in tasks:
            purpose = f"least squares of {task.unknowns} unknowns"
            check_memory(self._needed(task), purpose, _CURE, task.layer.name)

    def memory_beside(self, tasks: Sequence[Task]) -> int:
        """Return the bytes that networks' values may take: a quarter of the memory left by the largest task."""
        free = free_memory_of(device_of(self.replay.model))
        most = max((self._needed(task) for task in tasks), default=0)
        return max(0, free - most) // 4

    def _needed(self, task: Task) -> int:
        """Return the bytes of a task's sums and factors."""
        shape, groups = tensor_shape(task.place) or (), len(task.layer.columns)
        # If there are fewer samples than unknowns, the samples themselves are kept.
        positions = position_count(self.replay.model.get_submodule(task.layer.name), shape)
        samples = min(self.images * positions, task.unknowns)
        return 8 * _COPIES * groups * task.unknowns * samples

    def collect(self, task: Task, settled: int) -> tuple[NormalEquations, NormalEquations] | None:
        """Run the networks and return the sums of the samples to learn from and of those held out.

        DataError if any isn't finite. None if the two networks have different numbers of samples at the task's place,
        for example because a router of experts decides which samples get there: they can't be matched.
        """
        # A task that refines the one before has the same positions, so that the products of inputs are the same.
        previous_sums = self._known if task.refines else None
        self._known = None
        learned, held_out = (NormalEquations(sums) for sums in previous_sums or (None, None))
        first = 0  # samples before this batch
        for size, (unpruned, pruned) in zip(self.sizes, self.replay.run(settled, task.watched), strict=True):
            if len(unpruned[task.place]) != len(pruned[task.place]):
                return None
            entries, count = task.extent(unpruned)
            if entries % size:  # entries that aren't samples, such as places of a sequence
                is_held_out = (torch.arange(entries) + first) % HELD_OUT_ENTRIES == HELD_OUT_ENTRIES - 1
            else:  # a layer may cut each sample into several entries, such as windows
                is_held_out = self.held_out[first : first + size].repeat_interleave(entries // size)
            sampled, real = max(_LEAST_SAMPLES, _SAMPLES_PER_UNKNOWN * task.unknowns), self.replay.unpadded()
            positions, stay, width = None, None, count
            if real is not None or not task.sums_windows(sampled, entries * self.images // size, count):
                generator = torch.Generator().manual_seed(self.seed + first)
                n_positions = int(sampled * (size / self.images) / entries) + 1
                positions, stay = draw_unpadded(count, entries, n_positions, generator, real)
                width = positions.shape[1] * task.unknowns
            # Entries whose patches fit into memory together.
            step = max(1, _CHUNK // max(width * len(task.layer.columns), 1))
            for begin in range(0, entries, step):
                part = slice(begin, begin + step)
                samples = task.samples(unpruned, pruned, part, None if positions is None else positions[part])
                device, count_here = samples[1].device, samples[1].shape[1]
                marks = is_held_out[part].to(device)
                marks = marks.repeat_interleave(count_here // len(marks))
                stays = torch.ones_like(marks)
                if stay is not None:
                    stays = stay[part].flatten().to(device)
                    stays = stays.repeat_interleave(count_here // len(stays))
                for equations, rows in ((learned, stays & ~marks), (held_out, stays & marks)):
                    if bool(rows.any()):
                        inputs, residuals, references = samples
                        inputs = inputs.of_rows(rows) if isinstance(inputs, Windows) else inputs[:, rows]
                        equations.add(inputs, residuals[:, rows], references[:, rows])
            first += size
        if not (learned.is_finite() and held_out.is_finite()):
            raise DataError(f"activations must be finite, got NaN or infinity ({task.layer.name})")
        self._known = learned, held_out
        return learned, held_out


def check_ridge(ridge: Any) -> None:
    """Raise ConfigError unless a ridge is "auto" or a finite number of at least 0."""
    is_number = isinstance(ridge, (int, float)) and not isinstance(ridge, bool)
    if ridge != "auto" and not (is_number and 0.0 <= ridge < math.inf):
        raise ConfigError(f"ridge must be 'auto' or a finite number of at least 0, got {ridge!r} (ridge)")
