"""What a model costs: multiply-accumulates, parameters, milliseconds."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nni_topo.errors import ConfigError
from nni_topo.network.inputs import call_arguments, tensors_of
from nni_topo.network.modes import evaluation_mode
from nni_topo.network.transformers import fast_paths_off

Inputs = Tensor | tuple[Tensor, ...]


def count_params(model: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once; buffers aren't counted.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    int
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Inputs) -> int:
    """Return the multiply-accumulates of one sample: convolutions, linear layers, matrix products, attention.

    Parameters
    ----------
    model : nn.Module
        Run once in evaluation mode, then put back into the modes it was in.
    example_inputs : Tensor or tuple of Tensor
        Inputs of the model, batch first; only the first sample is used.

    Returns
    -------
    int
        Half of what PyTorch's ``FlopCounterMode`` counts, which is 2 per multiply-accumulate. Biases, norms,
        activations, pooling and recurrent layers count 0.

    Notes
    -----
    Fused attention kernels are switched off for the run: depending on the PyTorch version, the counter
    doesn't see inside them.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton

    inputs = tuple(tensor[:1] for tensor in _as_tuple(example_inputs))
    counter = FlopCounterMode(display=False)
    with evaluation_mode(model), fast_paths_off(), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        model(*inputs)
    return int(counter.get_total_flops()) // 2


def latency_ms(model: nn.Module, example_inputs: Inputs, *, runs: int = 30, warmup: int = 5, threads: int = 1) -> float:
    """Return the median time of one forward pass.

    Parameters
    ----------
    model : nn.Module
        Timed in evaluation mode, without gradients.
    example_inputs : Tensor or tuple of Tensor
        Inputs of the model, on its device; the batch size is theirs.
    runs : int, default=30
        Timed passes, at least 1.
    warmup : int, default=5
        Passes before them that aren't timed, at least 0.
    threads : int, default=1
        PyTorch's threads during the timing, at least 1; the former number is restored.

    Returns
    -------
    float
        Milliseconds.

    Raises
    ------
    ConfigError
        If a number is out of its range.
    """
    return latencies({"model": model}, example_inputs, runs=runs, warmup=warmup, threads=threads)["model"]


def latencies(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    runs: int = 30,
    warmup: int = 5,
    threads: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """Return the median times of several models, measured in turns.

    In every round each model runs once, in random order, so that a machine that slows down for a while slows
    all of them and the ratios hold.

    Parameters
    ----------
    models : mapping of str to nn.Module
        Models by name; all take the same inputs.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs, on the models' device; the batch size is theirs.
    runs, warmup, threads : int
        As in :func:`latency_ms`; ``runs`` and ``warmup`` are rounds.
    seed : int, default=0
        Of the order within the rounds.

    Returns
    -------
    dict of str to float
        Milliseconds by name.

    Raises
    ------
    ConfigError
        If a number is out of its range.
    """
    for knob, value, least in (("runs", runs, 1), ("warmup", warmup, 0), ("threads", threads, 1)):
        if value < least:
            raise ConfigError(f"{knob} must be at least {least}, got {value} (latencies)")
    args, kwargs = call_arguments(example_inputs)
    first = tensors_of((args, kwargs))[0]
    order, generator = list(models), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in models}
    with evaluation_mode(*models.values()), thread_count(threads), torch.inference_mode():
        for turn in range(warmup + runs):
            generator.shuffle(order)
            for name in order:
                start = now(first)
                models[name](*args, **kwargs)
                if turn >= warmup:
                    times[name].append(now(first) - start)
    return {name: 1000.0 * statistics.median(values) for name, values in times.items()}


def now(tensor: Tensor) -> float:
    """Seconds on a clock; on a GPU when its work is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _as_tuple(example_inputs: Inputs) -> tuple[Tensor, ...]:
    return (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Let PyTorch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
