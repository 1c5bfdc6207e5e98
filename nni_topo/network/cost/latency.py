"""Estimate a network's time at any widths by interpolation in a table of layers timed at a few widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nni_topo.disk import path_of, read_json, reading, write_json
from nni_topo.errors import DataError
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.network.cost.measure import count_params, measure_seconds, median_of, memory_kept, now, thread_count
from nni_topo.network.layers.derived import has_own_forward, head, is_followed
from nni_topo.network.layers.kinds import (
    RECURRENT,
    WEIGHTED,
    is_depthwise,
    weight_of,
    with_plain_weights,
)
from nni_topo.network.layers.slicing import cut
from nni_topo.network.runtime.arguments import INPUTS, MODEL
from nni_topo.network.runtime.copies import detached_copy, evaluation_mode, unwrapped_copy
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import Call, batch_size, first_of_samples
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.rules import whole

_SHARES = (0.25, 0.5, 0.75)  # timed widths, as shares of a layer's full width
_RUNS = 5  # timed runs of a layer; one more before them warms up
_WHOLE = (nn.MultiheadAttention, *RECURRENT)  # only timed at full width


@dataclass(frozen=True)
class LayerLatency:
    """Seconds of one layer at several widths.

    Attributes
    ----------
    entering : tuple of int
        Input channels, ascending; a single entry if they follow the output channels (depth-wise convolutions).
    leaving : tuple of int
        Output channels, ascending.
    seconds : tuple of tuple of float
        Shape ``(len(entering), len(leaving))``, at least 0.
    activation : float
        Number of elements of the layer's output at full width, per batch. The time between layers is assumed to be
        proportional to the elements of all layers' outputs.
    """

    entering: tuple[int, ...]
    leaving: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    activation: float

    def __post_init__(self) -> None:
        for name in ("entering", "leaving"):
            widths = getattr(self, name)
            if not widths or list(widths) != sorted(set(widths)) or widths[0] < 1:
                raise DataError(f"widths must be ascending and at least 1, got {widths} ({name})")
        if len(self.seconds) != len(self.entering) or any(len(row) != len(self.leaving) for row in self.seconds):
            shape = f"({len(self.entering)}, {len(self.leaving)})"
            raise DataError(f"seconds must have the shape {shape}, got rows of {[*map(len, self.seconds)]} (seconds)")
        if not all(math.isfinite(value) and value >= 0.0 for row in self.seconds for value in row):
            raise DataError(f"seconds must be finite and at least 0, got {self.seconds} (seconds)")

    def at(self, entering: int, leaving: int) -> float:
        """Return the seconds at two widths, interpolated linearly; outside of the table, the nearest entry's."""
        by_entering = [float(np.interp(leaving, self.leaving, row)) for row in self.seconds]
        return float(np.interp(entering, self.entering, by_entering))


@dataclass(frozen=True, repr=False)
class LatencyTable:
    """Seconds of a network's layers at several widths, and seconds between the layers.

    Parameters
    ----------
    layers : mapping of str to LayerLatency
        Convolutions and linear layers by name.
    rest : float, default=0.0
        Seconds of everything else at full width, at least 0; assumed to be proportional to the elements of the layers'
        outputs.
    batch_size, threads : int, default=1
        The batch size and the number of threads of the measurement, for the record.

    Examples
    --------
    >>> layer = LayerLatency((1, 8), (1, 8), ((0.0, 1.0), (1.0, 9.0)), activation=8.0)
    >>> LatencyTable({"0": layer})({"0": (8, 4)})
    4.428571428571429
    """

    layers: Mapping[str, LayerLatency]
    rest: float = 0.0
    batch_size: int = 1
    threads: int = 1

    def __repr__(self) -> str:
        seconds = sum(layer.seconds[-1][-1] for layer in self.layers.values()) + self.rest
        timed = f"a batch of {self.batch_size} on {self.threads} thread{'s' * (self.threads != 1)}"
        return f"{type(self).__name__}({len(self.layers)} layers, {1000.0 * seconds:.4g} ms for {timed})"

    def __call__(self, widths: Mapping[str, tuple[int, int]]) -> float:
        """Return the seconds of the network at given widths.

        Parameters
        ----------
        widths : mapping of str to (int, int)
            Input and output channels by layer; layers that aren't in the table take no time.

        Returns
        -------
        float
            Seconds per batch.
        """
        seconds = 0.0
        full_elements = 0.0
        elements = 0.0
        for name, (entering, leaving) in widths.items():
            if name not in self.layers:
                continue
            layer = self.layers[name]
            seconds += layer.at(entering, leaving)
            full_elements += layer.activation
            elements += layer.activation * leaving / layer.leaving[-1]
        share = elements / full_elements if full_elements else 1.0
        return float(seconds + self.rest * share)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        write_json(path_of(path), asdict(self), sort=False)

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table from JSON.

        Raises
        ------
        DataError
            If the file is missing or holds no latency table.
        """
        path = Path(path)
        with reading(path, "a latency table"):
            content = read_json(path)
            layers = {
                name: LayerLatency(
                    tuple(layer["entering"]),
                    tuple(layer["leaving"]),
                    tuple(tuple(row) for row in layer["seconds"]),
                    float(layer["activation"]),
                )
                for name, layer in content.pop("layers").items()
            }
            return cls(layers, **content)


@public(model=MODEL, example_inputs=INPUTS, threads=whole(1))
def measure_latency(model: nn.Module, example_inputs: Any, *, threads: int = 1) -> LatencyTable:
    """Time each layer of a network at a few widths: one channel, a quarter, a half, three quarters and all.

    Parameters
    ----------
    model : torch.nn.Module
        The model, wrapped by NNI or not. It isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model, batch first: one tensor, positional or keyword arguments. Their batch size is timed.
    threads : int, default=1
        PyTorch's threads during the timing, at least 1; the former number is restored.

    Returns
    -------
    LatencyTable
        The seconds of each layer by width, and the seconds between the layers.

    Raises
    ------
    ConfigError
        If an argument is out of its range, or the inputs don't fit the model.

    Notes
    -----
    For each width a copy of the layer is cut to it and run alone, on ones, at the size of the layer's inputs in the
    model; the median of five runs counts. Equal layers are timed once. A layer that is called several times
    counts each call. A wider layer never gets a smaller time than a narrower one: the table holds the running maximum.
    The time between the layers is the time of a pass of the model minus the time inside its layers.

    ``nn.MultiheadAttention`` and recurrent layers are only timed at full width; their time is assumed to be
    proportional to input channels times output channels. The output projection of attention is timed separately, so
    its share of the weights is subtracted from the time of attention.
    """
    analysis = Analysis.on(model, example_inputs)
    called = {name: model.get_submodule(name) for name in analysis.sizes}
    modules = {name: module for name, module in called.items() if isinstance(module, WEIGHTED)}
    wholes = {name: module for name, module in called.items() if isinstance(module, _WHOLE)}
    elements = {}  # by layer, the number of output elements
    for name, calls in analysis.sizes.items():
        elements[name] = float(sum(math.prod(outputs) for _, outputs in calls))
    grids: dict[Any, _Grid] = {}
    layers: dict[str, LayerLatency] = {}
    with thread_count(threads), torch.no_grad(), evaluation_mode(model), memory_kept(first_of_samples(analysis.call)):
        inner = {id(part) for outer_module in wholes.values() for part in outer_module.modules()}
        outer = {name: module for name, module in modules.items() if id(module) not in inner}
        outside_seconds, inside = _pass_times(model, {**outer, **wholes}, analysis.call)
        for name, module in modules.items():
            of_calls = []
            for inputs, _ in analysis.sizes[name]:
                # A class's own forward may depend on any attribute: no other layer counts as equal.
                unique_name = name if has_own_forward(module) else ""
                key = type(module), module.extra_repr(), unique_name, inputs
                if key not in grids:
                    grids[key] = _timed_grid(module, inputs)
                of_calls.append(grids[key])
            entering, leaving, _ = of_calls[0]
            seconds = sum((grid for _, _, grid in of_calls), np.zeros((len(entering), len(leaving))))
            layers[name] = LayerLatency(entering, leaving, tuple(map(tuple, seconds.tolist())), elements[name])
    widths = NetworkCost(analysis).widths({}) if wholes else {}
    for name, outer_layer in wholes.items():
        if name in widths:
            # Inner layers are timed separately. The rest is estimated by the share of weights, because a difference of
            # two measured times may be zero or negative on a busy machine.
            inner_ids = {id(part) for part in outer_layer.modules()}
            of_inner = sum(count_params(part) for part in modules.values() if id(part) in inner_ids)
            alone = inside[name] * (1.0 - of_inner / count_params(outer_layer))
            full_input, full_output = widths[name]
            reads, makes = ((1, full) if full > 1 else (1,) for full in widths[name])
            times = tuple(
                tuple(alone * entering_width * leaving_width / (full_input * full_output) for leaving_width in makes)
                for entering_width in reads
            )
            layers[name] = LayerLatency(reads, makes, times, elements[name])
    return LatencyTable(layers, outside_seconds, batch_size=batch_size(analysis.call), threads=threads)


def _pass_times(model: nn.Module, layers: Mapping[str, nn.Module], call: Call) -> tuple[float, dict[str, float]]:
    """Return the median seconds that a pass spends outside of layers, and within each. No layer may call another."""
    entered, first = 0.0, first_of_samples(call)
    inside = {name: list[float]() for name in layers}  # the seconds in each pass

    def enter(entering: Any) -> None:
        nonlocal entered
        entered = now(first)

    def leave(name: str, _: Any, output: Any) -> None:
        inside[name][-1] += now(first) - entered

    starts = [(layer, enter) for layer in layers.values()]
    ends = [(layer, partial(leave, name)) for name, layer in layers.items()]
    outside = list[float]()
    with watched(starts, ends):
        for _ in range(_RUNS + 1):
            for seconds in inside.values():
                seconds.append(0.0)
            start = now(first)
            model(*call[0], **call[1])
            outside.append(now(first) - start - sum(seconds[-1] for seconds in inside.values()))
    return median_of(outside), {name: median_of(seconds) for name, seconds in inside.items()}


_Grid = tuple[tuple[int, ...], tuple[int, ...], NDArray[np.float64]]
"""Input and output channels of a layer, and its median seconds, (input, output)."""


def _timed_grid(module: Any, size: tuple[int, ...]) -> _Grid:
    """Time copies of a layer, up to its convolution or product, at several widths; ``size``: of its input."""
    plain: Any = with_plain_weights(unwrapped_copy(module))
    weight, depthwise = weight_of(plain), is_depthwise(module)
    if isinstance(module, nn.Linear):
        dim, groups, full_input, full_output = len(size) - 1, 1, module.in_features, module.out_features
    else:
        dim, groups, full_input, full_output = 1, module.groups, module.in_channels, module.out_channels
    # The input of a depth-wise convolution follows its output.
    entering = (full_input,) if depthwise else _widths(full_input, groups)
    leaving = _widths(full_output, full_output // full_input if depthwise else groups)
    seconds = np.empty((len(entering), len(leaving)))
    for i, incoming in enumerate(entering):
        for j, outgoing in enumerate(leaving):
            layer: Any = detached_copy(plain)
            if is_followed(layer):
                layer = head(layer)
            if depthwise:
                width = outgoing * full_input // full_output
                inputs, outputs = torch.arange(width), torch.arange(outgoing)
            else:
                width = incoming
                inputs = _first_of_groups(groups, full_input, incoming)
                outputs = _first_of_groups(groups, full_output, outgoing)
            cut("", layer, inputs.to(weight.device), outputs.to(weight.device))
            ones = torch.ones((*size[:dim], width, *size[dim + 1 :]), device=weight.device, dtype=weight.dtype)
            seconds[i, j] = median_of([measure_seconds(partial(layer, ones), ones) for _ in range(_RUNS + 1)])
    return entering, leaving, np.maximum.accumulate(np.maximum.accumulate(seconds, axis=0), axis=1)


def _widths(full: int, unit: int) -> tuple[int, ...]:
    """Return multiples of ``unit`` near shares of the full width, with the smallest and the full one, ascending."""
    widths = {unit, full}
    for share in _SHARES:
        widths.add(unit * max(1, round(share * full / unit)))
    return tuple(sorted(widths))


def _first_of_groups(groups: int, full: int, width: int) -> Tensor:
    """Return the first channels of every group, equally many of each: int64, shape (width,)."""
    starts = torch.arange(groups) * (full // groups)
    return (starts[:, None] + torch.arange(width // groups)).flatten()
