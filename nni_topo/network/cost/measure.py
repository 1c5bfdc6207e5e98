"""What models take on this machine: multiply-accumulates, parameters, time, throughput and memory, in several modes."""

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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nni_topo.errors import ConfigError, checked, unknown_name
from nni_topo.network.runtime import (
    COMPUTING,
    INPUTS,
    NETWORK,
    SHAPES,
    arguments_of,
    call_arguments,
    detached_copy,
    evaluation_mode,
    fast_paths_off,
    fitting,
    leaves_models_alone,
    taken,
    tensors_of,
)

_LEAST_ROUNDS = 8
_BLOCK, _BLOCKS = 120 * 2**10, 8192  # bytes below what glibc maps alone, and how many
_SCHEDULED = "/proc/thread-self/schedstat"  # Linux: nanoseconds with a core and waiting for one, and slices


MODES = ("plain", "channels_last", "bf16", "compile")


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
    args, kwargs = arguments_of(example_inputs, next(iter(models.values())))
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


@dataclass(frozen=True)
class ModeCost:
    """One network in one mode.

    Attributes
    ----------
    network, mode : str
    macs, params : int
        Multiply-accumulates of one sample, and parameters.
    latency_ms : float
        Median time of one batch; NaN if it can't run in this mode.
    throughput : float
        Samples a second.
    peak_bytes : int
        Parameters, buffers and the most that a pass held besides, inputs not counted.
    failed : str
        Why it can't run in this mode; empty if it can.
    """

    network: str
    mode: str
    macs: int
    params: int
    latency_ms: float
    throughput: float
    peak_bytes: int
    failed: str = ""


@checked(example_inputs=INPUTS)
@leaves_models_alone
def profile(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    modes: Sequence[str] = ("plain",),
    runs: int = 30,
    warmup: int = 5,
    threads: int = 1,
    seed: int = 0,
) -> list[ModeCost]:
    """Measure networks beside each other, those of a mode in turns.

    Parameters
    ----------
    models : mapping of str to torch.nn.Module
        Networks by name, on one device; they aren't changed.
    example_inputs : Tensor or tuple of Tensor
        Inputs of all of them, on their device; the batch size is theirs.
    modes : sequence of str, default=("plain",)
        Of ``"plain"``, ``"channels_last"``, ``"bf16"`` (weights and inputs) and ``"compile"`` (``torch.compile``).
    runs, warmup, threads, seed : int
        As in :func:`latencies`.

    Returns
    -------
    list of ModeCost
        By mode, within it by network. Where one network can't run in a mode, none is measured in it.

    Raises
    ------
    ConfigError
        If a mode is unknown or a number is out of its range.
    """
    unknown = next((mode for mode in modes if mode not in MODES), None)
    if unknown is not None:
        raise unknown_name("mode", unknown, MODES)
    if not models:
        raise ConfigError("a profile needs a network, got none (models)")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    costs = {name: (count_macs(model, inputs), count_params(model)) for name, model in models.items()}
    found = []
    for mode in modes:
        given = {name: _in_mode(detached_copy(model), mode) for name, model in models.items()}
        entering = tuple(_in_mode(each, mode) for each in inputs)
        peaks, times, failed = dict.fromkeys(models, 0), dict.fromkeys(models, float("nan")), ""
        try:
            peaks = {name: _peak(model, entering) for name, model in given.items()}
            run = {name: torch.compile(model) for name, model in given.items()} if mode == "compile" else given
            times = latencies(run, entering, runs=runs, warmup=warmup, threads=threads, seed=seed)  # type: ignore[arg-type]
        except (RuntimeError, NotImplementedError) as error:  # no compiler, an operation without bf16
            failed = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        found += [
            ModeCost(name, mode, *costs[name], times[name], 1000 * len(inputs[0]) / times[name], peaks[name], failed)
            for name in models
        ]
    return found


def _in_mode(value: Any, mode: str) -> Any:
    """Put a network or an input into the form of a mode."""
    if mode == "bf16" and (isinstance(value, nn.Module) or value.is_floating_point()):
        return value.to(torch.bfloat16)
    if mode == "channels_last" and (isinstance(value, nn.Module) or value.dim() == 4):
        return value.to(memory_format=torch.channels_last)
    return value


def _peak(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Measure the bytes of a network and the most that a pass holds besides."""
    own = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
    with evaluation_mode(model), torch.inference_mode():
        model(*inputs)  # what is made once, such as workspaces, is none of the pass's
        if inputs[0].is_cuda:
            torch.cuda.reset_peak_memory_stats(inputs[0].device)
            before = torch.cuda.memory_allocated(inputs[0].device)
            model(*inputs)
            return own + torch.cuda.max_memory_allocated(inputs[0].device) - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as watch:
            model(*inputs)
    held = most = 0
    events = watch.profiler.kineto_results.events()
    for event in sorted((each for each in events if each.name() == "[memory]"), key=lambda each: each.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return own + most
