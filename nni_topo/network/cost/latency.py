"""What a network takes in time at widths that nobody has built: a table of measured layers, and interpolation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nni_topo.disk import path_of, read_json, reading, write_json
from nni_topo.errors import ConfigError, DataError, checked
from nni_topo.network.cost.measure import memory_kept, now, thread_count
from nni_topo.network.layers import (
    CONVOLUTIONS,
    TRANSPOSED,
    WEIGHTED,
    cut,
    has_own_forward,
    head,
    inner_of,
    is_depthwise,
    is_followed,
    output_channels,
    weight_of,
)
from nni_topo.network.runtime import (
    INPUTS,
    MODEL,
    Call,
    batch_size,
    evaluation_mode,
    leaves_models_alone,
    tensors_of,
    unwrapped_copy,
    watched,
)
from nni_topo.network.speedup import Network

FloatArray = NDArray[np.float64]
_SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class LayerLatency:
    """Seconds of one layer over its widths.

    Attributes
    ----------
    entering : tuple of int
        Input channels, ascending; a single entry if they follow the output channels (depth-wise convolutions).
    leaving : tuple of int
        Output channels, ascending.
    seconds : tuple of tuple of float
        Shape ``(len(entering), len(leaving))``, at least 0.
    activation : float
        Elements that the layer puts out at full width, per batch: the weight with which its output channels count for
        what happens between layers.
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
            raise DataError(f"a layer needs {len(self.entering)} by {len(self.leaving)} seconds, got others (seconds)")
        if not all(math.isfinite(value) and value >= 0.0 for row in self.seconds for value in row):
            raise DataError("seconds must be finite and at least 0, got others (seconds)")

    def at(self, entering: int, leaving: int) -> float:
        """Interpolate linearly in both widths; beyond the table its nearest entry counts."""
        by_entering = [float(np.interp(leaving, self.leaving, row)) for row in self.seconds]
        return float(np.interp(entering, self.entering, by_entering))


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of a network's layers over their widths, and of what happens between them.

    Parameters
    ----------
    layers : mapping of str to LayerLatency
        Convolutions and linear layers by name.
    rest : float, default=0.0
        Seconds of everything else at full width, at least 0; it shrinks with the elements that the layers put out.
    batch_size, threads : int, default=1
        What it was measured with; kept for the record.

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

    def __call__(self, widths: Mapping[str, tuple[int, int]]) -> float:
        """Return the seconds of the network at given widths.

        Parameters
        ----------
        widths : mapping of str to (int, int)
            Input and output channels that are left, by layer; layers that aren't in the table cost nothing.

        Returns
        -------
        float
            Seconds per batch.
        """
        known = {name: pair for name, pair in widths.items() if name in self.layers}
        layers = sum(self.layers[name].at(*pair) for name, pair in known.items())
        whole = sum(self.layers[name].activation for name in known)
        left = sum(self.layers[n].activation * out / self.layers[n].leaving[-1] for n, (_, out) in known.items())
        return float(layers + self.rest * (left / whole if whole else 1.0))

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


@checked(model=MODEL, example_inputs=INPUTS)
@leaves_models_alone
def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    shares: Sequence[float] = _SHARES,
    repeats: int = 5,
    threads: int = 1,
) -> LatencyTable:
    """Time the layers of a network at a few widths each.

    Parameters
    ----------
    model : torch.nn.Module
        The model, wrapped by NNI or not; it isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model; their first dimension is the batch that is timed.
    shares : sequence of float, default=(0.25, 0.5, 0.75, 1.0)
        Widths of inputs and outputs as shares of the layer's own, in (0, 1]; one channel and the full width are always
        timed.
    repeats : int, default=5
        Runs per width, of which the median counts, at least 1.
    threads : int, default=1
        PyTorch's threads while timing, at least 1; put back afterwards.

    Returns
    -------
    LatencyTable

    Raises
    ------
    ConfigError
        If a knob is out of range.

    Notes
    -----
    Every width is a fresh layer of the same kind, run alone on random inputs of the size that the model gives it; equal
    layers are timed once. A wider layer is never entered as a faster one: the running maximum counts. What the model
    does between its layers is a whole pass less the time inside them. A layer that is called several times counts each
    call.
    """
    if repeats < 1 or threads < 1 or not len(shares) or not all(0.0 < share <= 1.0 for share in shares):
        raise ConfigError(
            f"repeats and threads must be at least 1 and shares in (0, 1], got {repeats}, {threads} and {shares} "
            "(measure_latency)"
        )
    network = Network.on(model, example_inputs)
    called = {name: model.get_submodule(name) for name in network.sizes}
    modules = {name: module for name, module in called.items() if isinstance(module, WEIGHTED)}
    timed: dict[Any, FloatArray] = {}
    layers: dict[str, LayerLatency] = {}
    with thread_count(threads), torch.no_grad(), evaluation_mode(model), memory_kept(tensors_of(network.call)[0]):
        rest = _between(model, modules.values(), network.call, repeats)
        for name in modules:
            found = network.sizes[name]
            entering, leaving = _grid(modules[name], shares)
            seconds = np.zeros((len(entering), len(leaving)))
            for inputs, _ in found:
                # What a class with a forward of its own does may hang on anything that it holds.
                own = name if has_own_forward(modules[name]) else ""
                key = (type(modules[name]), modules[name].extra_repr(), own, inputs, entering, leaving)
                if key not in timed:
                    timed[key] = _timed_grid(modules[name], inputs, entering, leaving, repeats)
                seconds += timed[key]
            elements = float(sum(np.prod(outputs) for _, outputs in found))
            layers[name] = LayerLatency(entering, leaving, tuple(map(tuple, seconds.tolist())), elements)
    return LatencyTable(layers, rest, batch_size=batch_size(network.call), threads=threads)


def _between(model: nn.Module, modules: Iterable[nn.Module], call: Call, repeats: int) -> float:
    """Return the seconds that a pass spends between layers, which aren't entered from one another."""
    entered = inside = 0.0

    def enter(entering: Tensor) -> None:
        nonlocal entered
        entered = now(entering)

    def leave(_: Tensor, output: Tensor) -> None:
        nonlocal inside
        inside += now(output) - entered

    first = tensors_of(call)[0]
    rests = []
    layers = list(modules)
    with watched([(layer, enter) for layer in layers], [(layer, leave) for layer in layers]):
        for _ in range(repeats + 1):  # the first warms up
            inside, start = 0.0, now(first)
            model(*call[0], **call[1])
            rests.append(now(first) - start - inside)
    return max(0.0, statistics.median(rests[1:]))


def _timed_grid(
    module: nn.Module, size: tuple[int, ...], entering: tuple[int, ...], leaving: tuple[int, ...], repeats: int
) -> FloatArray:
    """Return the median seconds of layers like one, shape ``(len(entering), len(leaving))``, never falling."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    dim = len(size) - 1 if isinstance(module, nn.Linear) else 1
    seconds = np.empty((len(entering), len(leaving)))
    for i, incoming in enumerate(entering):
        for j, outgoing in enumerate(leaving):
            layer, width = _like(module, incoming, outgoing)
            layer.to(weight.device, weight.dtype)
            inputs = torch.ones((*size[:dim], width, *size[dim + 1 :]), device=weight.device, dtype=weight.dtype)
            times = []
            for _ in range(repeats + 1):
                start = now(inputs)
                layer(inputs)
                times.append(now(inputs) - start)
            # The time spent waiting for a core, which doesn't count, is told less exactly than time itself.
            seconds[i, j] = max(0.0, statistics.median(times[1:]))
    return np.maximum.accumulate(np.maximum.accumulate(seconds, axis=0), axis=1)


def _grid(module: nn.Module, shares: Sequence[float]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the widths at which a layer is timed."""
    if isinstance(module, nn.Linear):
        return _steps(module.in_features, 1, shares), _steps(module.out_features, 1, shares)
    conv: Any = module
    if is_depthwise(conv):
        return (conv.in_channels,), _steps(conv.out_channels, conv.out_channels // conv.in_channels, shares)
    return _steps(conv.in_channels, conv.groups, shares), _steps(conv.out_channels, conv.groups, shares)


def _steps(full: int, unit: int, shares: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted({unit, full, *(unit * max(1, round(share * full / unit)) for share in shares)}))


def _cut_to(module: Any, entering: int, leaving: int) -> tuple[nn.Module, int]:
    """Return a layer up to its convolution or product, cut to widths as it would be, and the width of its input."""
    layer: Any = unwrapped_copy(module)
    if is_followed(layer):
        layer = head(layer)
    groups = getattr(module, "groups", 1)
    whole = [module.in_features if isinstance(module, nn.Linear) else module.in_channels, output_channels(module) or 0]
    if is_depthwise(module):
        entering = leaving * whole[0] // whole[1]
        ins, outs = torch.arange(entering), torch.arange(leaving)
    else:
        ins, outs = (
            (torch.arange(groups)[:, None] * (full // groups) + torch.arange(width // groups)).flatten()
            for full, width in zip(whole, (entering, leaving), strict=True)
        )
    device = weight_of(module).device
    cut("", layer, ins.to(device), outs.to(device))
    return layer, entering


def _like(module: nn.Module, entering: int, leaving: int) -> tuple[nn.Module, int]:
    """Return a layer of the same kind at other widths, and the width of its input."""
    conv: Any = module
    if isinstance(module, nn.Linear) and inner_of(module) is None:
        return nn.Linear(entering, leaving, bias=module.bias is not None), entering
    groups = getattr(conv, "groups", 1)
    if inner_of(module) is not None:
        return _cut_to(conv, entering, leaving)
    if is_depthwise(conv):
        groups = entering = leaving * conv.in_channels // conv.out_channels
    more = {"output_padding": conv.output_padding} if isinstance(module, TRANSPOSED) else {}
    kind = next(kind for kind in (*CONVOLUTIONS, *TRANSPOSED) if isinstance(module, kind))
    layer = kind(
        entering,
        leaving,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        **more,
    )
    return layer, entering
