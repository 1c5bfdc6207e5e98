"""What a model costs: multiply-accumulates, parameters, milliseconds."""

from __future__ import annotations

import ctypes
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nni_topo.errors import ConfigError, checked
from nni_topo.network.attention import fast_paths_off
from nni_topo.network.runtime import (
    COMPUTING,
    INPUTS,
    NETWORK,
    SHAPES,
    call_arguments,
    evaluation_mode,
    fitting,
    leaves_models_alone,
    taken,
    tensors_of,
)

_LEAST_ROUNDS = 8
_BLOCK, _BLOCKS = 120 * 2**10, 8192  # bytes below what glibc maps alone, and how many
_SCHEDULED = "/proc/thread-self/schedstat"  # Linux: nanoseconds with a core and waiting for one, and slices


@checked(model=NETWORK)
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


@checked(model=NETWORK, example_inputs=SHAPES)
@leaves_models_alone
def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Return the multiply-accumulates of one sample: convolutions, linear layers, matrix products, attention.

    Parameters
    ----------
    model : nn.Module
        Run once in evaluation mode, then put back into the modes it was in.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model, batch first: one tensor, positional or keyword arguments. Only the first sample is used.

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

    call = call_arguments(example_inputs, model)
    args, kwargs = taken(call, torch.arange(1))
    counter = FlopCounterMode(display=False)
    with (
        evaluation_mode(model),
        fast_paths_off(),
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
        fitting(0, "example_inputs"),
        counter,
    ):
        model(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


@checked(model=COMPUTING, example_inputs=INPUTS)
def latency_ms(model: nn.Module, example_inputs: Any, *, runs: int = 30, warmup: int = 5, threads: int = 1) -> float:
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


@checked(example_inputs=INPUTS)
@leaves_models_alone
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
    all of them and the ratios hold. The time that one thread on the CPU waits for a core doesn't count, where the
    system tells it (Linux); what a model itself waits for does. What a pass frees the next one uses, as with caching
    allocators: glibc hands some of it back, how much depends on the process, and may take a third longer (Linux).

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
    rounds = _rounds(models, example_inputs, threads, seed, lambda done: len(done) == warmup + runs)[warmup:]
    return {name: 1000.0 * statistics.median(own) for name, own in zip(models, zip(*rounds, strict=True), strict=True)}


def time_shares(
    models: Sequence[nn.Module],
    whole: nn.Module,
    example_inputs: Any,
    wanted: float | None = None,
    *,
    precision: float = 0.015,
    seconds: float = 10.0,
) -> list[tuple[float, float]]:
    """Return the share of a whole network's time that each model takes on one thread, and how far off that may be.

    A share is the median over rounds in which each runs once, for what slows a machine down slows all. Rounds go on
    until each median's 95 % interval is within a ``precision`` of it, or took so many ``seconds``; eight at least. What
    is far from the share that is ``wanted`` need be known to a fifth of the way only.
    """
    found = [(math.nan, math.inf)] * len(models)

    def is_known(done: list[tuple[float, ...]]) -> bool:
        nonlocal found
        count, is_over = len(done) - 1, sum(map(sum, done[1:])) > seconds  # the first warms up
        # looked at whenever there are twice as many: who looks each time stops at a sample that is close by chance
        if count < _LEAST_ROUNDS or (count & (count - 1) and not is_over):
            return False
        found = [_median_share(own, done[1:]) for own in range(len(models))]
        away = [0.0 if wanted is None else abs(median - wanted) / median for median, _ in found]
        return is_over or all(off <= max(precision, far / 5.0) for (_, off), far in zip(found, away, strict=True))

    named = {f"model {place}": model for place, model in enumerate(models)}
    _rounds({**named, "whole": whole}, example_inputs, 1, 0, is_known)
    return found


def _median_share(own: int, rounds: list[tuple[float, ...]]) -> tuple[float, float]:
    """Return the median share of the last one's time, and half of its 95 % interval as a share of it."""
    shares = sorted(times[own] / times[-1] for times in rounds)
    median, low = statistics.median(shares), int(len(shares) / 2.0 - 0.98 * math.sqrt(len(shares)))
    return median, (shares[-1 - low] - shares[low]) / (2.0 * median)


def _rounds(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    threads: int,
    seed: int,
    enough: Callable[[list[tuple[float, ...]]], bool],
) -> list[tuple[float, ...]]:
    """Return the seconds of each model, round by round, each round in a random order, until there are enough."""
    args, kwargs = call_arguments(example_inputs)
    first = tensors_of((args, kwargs))[0]
    order, generator = list(models), random.Random(seed)
    rounds: list[tuple[float, ...]] = []
    with (
        evaluation_mode(*models.values()),
        thread_count(threads),
        torch.inference_mode(),
        memory_kept(first),
        fitting(0, "example_inputs"),
    ):
        while not enough(rounds):
            generator.shuffle(order)
            taken = {}
            for name in order:
                start = now(first)
                models[name](*args, **kwargs)
                taken[name] = now(first) - start
            rounds.append(tuple(taken[name] for name in models))
    return rounds


def now(tensor: Tensor) -> float:
    """Seconds on a clock; on a GPU when its work is done, of one thread on the CPU without its waits for a core."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    alone = tensor.device.type == "cpu" and torch.get_num_threads() == 1
    return time.perf_counter() - (_without_core() if alone else 0.0)


@contextmanager
def memory_kept(tensor: Tensor) -> Iterator[None]:
    """Let passes beside a tensor on the CPU use the memory that they free once more, as caching allocators do.

    What glibc gives back to the system instead depends on what lies on the heap by chance, and pages that are handed
    out anew take up to a third of a pass. Of what is held, 1 GB of addresses, only what is used takes memory.
    """
    if not (sys.platform == "linux" and tensor.device.type == "cpu"):
        yield
        return
    # Only the end of the heap is given back: the last block keeps the room of the others from being that.
    *room, last = (torch.empty(_BLOCK, dtype=torch.uint8) for _ in range(_BLOCKS))
    del room
    try:
        yield
    finally:
        del last
        with suppress(AttributeError):  # of glibc alone
            ctypes.CDLL(None).malloc_trim(0)


def _without_core() -> float:
    """Return for how long this thread was ready to run while others had the cores; 0 where the system doesn't tell."""
    try:
        file = os.open(_SCHEDULED, os.O_RDONLY)
        try:
            return int(os.read(file, 100).split()[1]) / 1e9
        finally:
            os.close(file)
    except (OSError, IndexError, ValueError):
        return 0.0


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Let PyTorch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
