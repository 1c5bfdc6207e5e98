"""Timing the layers of a network at a few widths, for a latency table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.network.inputs import Call, call_arguments, tensors_of
from nni_topo.network.latency import LatencyTable, LayerLatency
from nni_topo.network.layers import CONVOLUTIONS, TRANSPOSED, is_depthwise
from nni_topo.network.modes import evaluation_mode

FloatArray = NDArray[np.float64]
_SHARES = (0.25, 0.5, 0.75, 1.0)
_LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
_Sizes = tuple[tuple[int, ...], tuple[int, ...]]


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
    if repeats < 1 or threads < 1 or not shares or not all(0.0 < share <= 1.0 for share in shares):
        raise ConfigError(
            f"repeats and threads must be at least 1 and shares in (0, 1], got {repeats}, {threads} and {shares} "
            "(measure_latency)"
        )
    call = call_arguments(example_inputs, model)
    modules: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, _LAYERS)
    }
    timed: dict[Any, FloatArray] = {}
    layers: dict[str, LayerLatency] = {}
    with _threads(threads), torch.no_grad(), evaluation_mode(model):
        sizes, rest = _observed(model, modules, call, repeats)
        for name, found in sizes.items():
            entering, leaving = _grid(modules[name], shares)
            seconds = np.zeros((len(entering), len(leaving)))
            for inputs, _ in found:
                key = (type(modules[name]), modules[name].extra_repr(), inputs, entering, leaving)
                if key not in timed:
                    timed[key] = _timed_grid(modules[name], inputs, entering, leaving, repeats)
                seconds += timed[key]
            elements = float(sum(np.prod(outputs) for _, outputs in found))
            layers[name] = LayerLatency(entering, leaving, tuple(map(tuple, seconds.tolist())), elements)
    return LatencyTable(layers, rest, batch_size=len(tensors_of(call)[0]), threads=threads)


def _observed(
    model: nn.Module, modules: dict[str, nn.Module], call: Call, repeats: int
) -> tuple[dict[str, list[_Sizes]], float]:
    """Return the input and output sizes of every call of every layer, and the seconds spent between layers."""
    sizes: dict[str, list[_Sizes]] = {}
    entered: dict[str, float] = {}
    inside = 0.0

    def enter(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            entered[name] = _now(inputs[0])

        return note

    def leave(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal inside
            inside += _now(output) - entered[name]
            sizes.setdefault(name, []).append((tuple(inputs[0].shape), tuple(output.shape)))

        return note

    handles = [module.register_forward_pre_hook(enter(name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(leave(name)) for name, module in modules.items()]
    first = tensors_of(call)[0]
    rests = []
    try:
        for _ in range(repeats + 1):  # the first warms up
            sizes.clear()
            inside, start = 0.0, _now(first)
            model(*call[0], **call[1])
            rests.append(_now(first) - start - inside)
    finally:
        for handle in handles:
            handle.remove()
    return sizes, max(0.0, statistics.median(rests[1:]))


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
                start = _now(inputs)
                layer(inputs)
                times.append(_now(inputs) - start)
            seconds[i, j] = statistics.median(times[1:])
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


def _like(module: nn.Module, entering: int, leaving: int) -> tuple[nn.Module, int]:
    """Return a layer of the same kind at other widths, and the width of its input."""
    conv: Any = module
    if isinstance(module, nn.Linear):
        return nn.Linear(entering, leaving, bias=module.bias is not None), entering
    groups = conv.groups
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


def _now(tensor: Tensor) -> float:
    """Seconds on a clock; on a GPU after its work is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
