"""Measure models on this machine: multiply-accumulates, parameters, time, throughput and memory."""

from __future__ import annotations

import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from nni_topo.errors import ConfigError, out_of_memory
from nni_topo.network.layers.kinds import RECURRENT, recurrent_products
from nni_topo.network.runtime.arguments import INPUTS, NETWORK, SHAPES
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.network.runtime.inputs import (
    Call,
    arguments_of,
    batch_size,
    first_of_samples,
    fitting,
    lists_of_samples,
    take_samples,
    tensors_of,
)
from nni_topo.network.runtime.public import Running, public
from nni_topo.network.runtime.switches import as_written
from nni_topo.rules import all_of, checked, whole

_WARMUP_ROUNDS = 5  # untimed rounds before the timed ones
_LEAST_ROUNDS = 8  # of a comparison of times
_PRECISION = 0.015  # sufficient half width of a median's 95 % interval, as a share of the median
_PAIRED_ROUNDS = 30  # of the times in a report, if they don't take too long
# Blocks that `memory_kept` allocates: the bytes of each, which glibc takes from the heap, and their number.
_BLOCK, _BLOCKS = 120 * 2**10, 8192

_NETWORKS = all_of(NETWORK, Mapping, 1)


@checked(model=NETWORK)
def count_params(model: nn.Module) -> int:
    """Return the number of parameters of a model.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    int
        Number of entries of all parameters. Shared parameters count once; buffers don't count.
    """
    return sum(parameter.numel() for parameter in model.parameters())


@public(model=NETWORK, example_inputs=SHAPES)
def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Return the multiply-accumulates of one sample.

    Convolutions, linear and recurrent layers, matrix products and attention count.

    Parameters
    ----------
    model : nn.Module
        Run once in evaluation mode. The modes of its modules are restored afterwards.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model, batch first: one tensor, positional or keyword arguments. Only the first sample is used;
        if the model doesn't run on a single sample, the mean over all samples is returned.

    Returns
    -------
    int
        Half of the count of PyTorch's ``FlopCounterMode``, which is 2 per multiply-accumulate. Recurrent layers, which
        it doesn't count, add one for each weight and step. Biases, norms, activations and pooling count 0.
    """
    call = call_arguments(example_inputs, model)
    with fitting(0, "example_inputs", call):
        _, samples, counted = counted_run(model, call)
    return counted.all // samples


@dataclass
class CountedMacs:
    """Multiply-accumulates of a run: all of them, and by name those within some modules."""

    all: int = 0
    within: dict[str, int] = field(default_factory=dict)


def counted_run(model: nn.Module, call: Call, names: Iterable[str] = ()) -> tuple[Call, int, CountedMacs]:
    """Count a model's multiply-accumulates for the first sample of a call; for all if it doesn't run on a single one.

    Returns the call that it ran on, its number of samples and the counts. ``names``: as in `counting_macs`. Side
    effects on the model aren't undone.
    """

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> CountedMacs:
        with evaluation_mode(model), as_written(), torch.no_grad(), counting_macs(model, names) as counted:
            model(*args, **kwargs)
        return counted

    # Fails if the forward needs a fixed number of samples, or takes a list of images, which can't be cut.
    first: Call = take_samples(call, torch.arange(1))
    try:
        return first, 1, run(*first)
    except Exception as error:
        if out_of_memory(error):
            raise
    lists = lists_of_samples([*call[0], *call[1].values()])
    samples = len(lists[0]) if lists else batch_size(call)
    return call, samples, run(*call)


class _Counter(TorchDispatchMode):
    """Counts operations as PyTorch's ``FlopCounterMode`` does, but neither tracks modules nor loads a compiler."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # with True the first call loads torch._dynamo and SymPy, which takes more than a second

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # loads Triton

        self.total, self._formulas = 0, flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.higher_order.cond:
            raise ConfigError("a forward whose MACs are counted must branch by if, got torch.cond (count_macs)")
        if isinstance(func, torch._ops.HigherOrderOperator):
            return NotImplemented
        formula = self._formulas.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out


@contextmanager
def counting_macs(model: nn.Module, names: Iterable[str] = ()) -> Iterator[CountedMacs]:
    """Count multiply-accumulates within the block, in total and within named modules; complete after the block.

    Fused attention kernels are switched off, because the counters of some PyTorch versions miss them.
    """
    counter, counts = _Counter(), CountedMacs()
    extra = 0  # twice the products of recurrent layers, minus what the counter counted of them
    entered = list[int]()  # for each running call, the count before it

    def now() -> int:
        return counter.total + extra

    def enter(*_: Any) -> None:
        entered.append(now())

    def leave_recurrent(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        nonlocal extra
        (rows, *_) = tensors_of((args, kwargs))  # the data of a packed sequence
        products = 2 * recurrent_products(module) * (rows.numel() // rows.shape[-1])
        extra += products - (now() - entered.pop())

    def leave(name: str, *_: Any) -> None:
        counts.within[name] = counts.within.get(name, 0) + (now() - entered.pop()) // 2

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, RECURRENT):
                hooks.enter_context(module.register_forward_pre_hook(enter))
                hooks.enter_context(module.register_forward_hook(leave_recurrent, with_kwargs=True))
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(enter, prepend=True))
            hooks.enter_context(module.register_forward_hook(partial(leave, name)))
        with sdpa_kernel(SDPBackend.MATH), counter:
            yield counts
    counts.all = now() // 2


@public(Running(as_compiled=True), models=_NETWORKS, example_inputs=INPUTS, runs=whole(1), threads=whole(1))
def latencies(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    runs: int = 30,
    threads: int = 1,
) -> dict[str, float]:
    """Return the median times of several models that are measured in turns.

    In every round each model runs once, in random order: if the machine slows down for a while, it slows all models,
    and the ratios of their times hold. With one thread on the CPU, the time that the thread waits for a core doesn't
    count (on Linux, which measures it); time that the model itself waits counts.

    Parameters
    ----------
    models : mapping of str to nn.Module
        Models by name that take the same inputs. They are timed in evaluation mode, without gradients.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs, on the models' device, batch first. Their batch size is timed.
    runs : int, default=30
        Timed rounds, at least 1; a few untimed ones come before them.
    threads : int, default=1
        PyTorch's threads during the timing, at least 1; the former number is restored.

    Returns
    -------
    dict of str to float
        Milliseconds by name.

    Raises
    ------
    ConfigError
        If a number is out of its range, or ``models`` is empty.
    """
    count = _WARMUP_ROUNDS + runs
    rounds = _rounds(models, example_inputs, threads, lambda done: len(done) == count)[_WARMUP_ROUNDS:]
    medians = {}
    for place, name in enumerate(models):
        medians[name] = 1000.0 * statistics.median(seconds[place] for seconds in rounds)
    return medians


def time_shares(
    models: Sequence[nn.Module],
    whole: nn.Module,
    example_inputs: Any,
    wanted: float | None = None,
    *,
    seconds: float = 10.0,
) -> list[tuple[float, float]]:
    """Return each model's median share of the unpruned network's time, and the half width of its 95 % interval.

    The half width is a share of the median. Rounds are run, at least eight, until it is at most 1.5 % or ``seconds``
    have passed. A model whose share is far from ``wanted`` is measured less exactly: to a fifth of the distance. Models
    run on one thread.
    """
    shares = [(math.nan, math.inf)] * len(models)

    def is_known(done: list[tuple[float, ...]]) -> bool:
        nonlocal shares
        rounds = done[1:]  # the first warms up
        is_over = sum(map(sum, rounds)) > seconds
        # The medians are looked at only when the number of rounds has doubled: looking after every round would stop at
        # an interval that is narrow by chance.
        has_doubled = len(rounds).bit_count() == 1
        if len(rounds) < _LEAST_ROUNDS or not (has_doubled or is_over):
            return False
        shares = []
        for place in range(len(models)):
            median, low, high = _median([times[place] / times[-1] for times in rounds])
            shares.append((median, (high - low) / (2.0 * median)))
        if is_over:
            return True
        for median, half_width in shares:
            distance = 0.0 if wanted is None else abs(median - wanted) / median
            if half_width > max(_PRECISION, distance / 5.0):
                return False
        return True

    named = {f"model {place}": model for place, model in enumerate(models)}
    _rounds({**named, "whole": whole}, example_inputs, 1, is_known)
    return shares


def _median(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of some values, and its 95 % interval."""
    ordered = sorted(values)
    # The number of values below the true median is binomial; 0.98 * sqrt(n) are 1.96 of its standard deviations.
    low = int(len(ordered) / 2.0 - 0.98 * math.sqrt(len(ordered)))
    return statistics.median(ordered), ordered[low], ordered[-1 - low]


@dataclass(frozen=True)
class TimedPair:
    """The times of an unpruned and a smaller network, measured in turns; ``repr`` is a sentence.

    Attributes
    ----------
    unpruned_ms, ms : tuple of float
        Median milliseconds of one batch of the unpruned and of the smaller network, and the ends of its 95 % interval.
    share : tuple of float
        Median of the smaller network's share of the unpruned one's time in the same round, and its 95 % interval.
    samples : int
        Samples in the batch.
    rounds : int
        Timed rounds; both networks run once in each.
    device : str
        Device, such as ``"cpu"`` (one thread).
    runtime : str
        ``"pytorch"`` or ``"onnxruntime"``.
    """

    unpruned_ms: tuple[float, float, float]
    ms: tuple[float, float, float]
    share: tuple[float, float, float]
    samples: int
    rounds: int
    device: str
    runtime: str = "pytorch"

    def __repr__(self) -> str:
        median, low, high = self.share
        place = "one thread of the CPU" if self.device == "cpu" else self.device
        place += " in onnxruntime" if self.runtime == "onnxruntime" else ""
        count = "a single sample" if self.samples == 1 else f"a batch of {self.samples} samples"
        return (
            f"{count} takes {self.ms[0]:.3g} ms, unpruned {self.unpruned_ms[0]:.3g} ms, on {place}: {median:.3g} "
            f"({low:.3g}-{high:.3g}) of the time, where both run in turns; medians of {self.rounds} rounds with 95 % "
            "intervals"
        )


def timed_pair(unpruned: nn.Module, smaller: nn.Module, example_inputs: Any, seconds: float = 10.0) -> TimedPair:
    """Time two networks in turns on one thread: 30 rounds, or at least eight if they take longer than ``seconds``."""

    def is_enough(done: list[tuple[float, ...]]) -> bool:
        count = len(done) - 1  # the first warms up
        return count >= _LEAST_ROUNDS and (count >= _PAIRED_ROUNDS or sum(map(sum, done)) > seconds)

    rounds = _rounds({"unpruned": unpruned, "smaller": smaller}, example_inputs, 1, is_enough)[1:]
    call = arguments_of(example_inputs, unpruned)
    return TimedPair(
        unpruned_ms=_median([1000.0 * before for before, _ in rounds]),
        ms=_median([1000.0 * after for _, after in rounds]),
        share=_median([after / before for before, after in rounds]),
        samples=batch_size(call),
        rounds=len(rounds),
        device=str(first_of_samples(call).device),
    )


def _rounds(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    threads: int,
    enough: Callable[[list[tuple[float, ...]]], bool],
) -> list[tuple[float, ...]]:
    """Return the seconds of each model by round, each round in random order, until ``enough`` is true."""
    args, kwargs = arguments_of(example_inputs, next(iter(models.values())))
    first = first_of_samples((args, kwargs))
    order, generator = list(models), random.Random(0)
    rounds: list[tuple[float, ...]] = []
    with (
        evaluation_mode(*models.values()),
        thread_count(threads),
        torch.inference_mode(),
        memory_kept(first),
        fitting(0, "example_inputs", (args, kwargs)),
    ):
        while not enough(rounds):
            generator.shuffle(order)
            seconds = {}
            for name in order:
                seconds[name] = measure_seconds(partial(models[name], *args, **kwargs), first)
            rounds.append(tuple(seconds[name] for name in models))
    return rounds


def measure_seconds(run: Callable[[], object], tensor: Tensor) -> float:
    """Return the seconds that ``run`` takes; ``tensor``: one on the device that it works on."""
    began, start = time.perf_counter(), now(tensor)
    run()
    seconds = now(tensor) - start
    # On a busy machine more time may be counted as spent waiting for a core than a short run took.
    if seconds > 0.0:
        return seconds
    return time.perf_counter() - began


def median_of(seconds: Sequence[float]) -> float:
    """Return the median of times, at least 0; the first one was a warm-up and doesn't count."""
    # `now` leaves out the time spent waiting for a core, which the system measures less exactly.
    return max(0.0, statistics.median(seconds[1:]))


def now(tensor: Tensor) -> float:
    """Return the seconds of a clock for timing work on a tensor's device.

    On a GPU the clock is read when all work there is done. With one thread on the CPU it doesn't count the time that
    the thread waits for a core.
    """
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    if tensor.device.type == "cpu" and torch.get_num_threads() == 1:
        return time.perf_counter() - _seconds_waiting()
    return time.perf_counter()


@contextmanager
def memory_kept(tensor: Tensor) -> Iterator[None]:
    """Keep freed memory in the process, if a tensor is on the CPU, so that timed passes don't pay for page faults.

    Otherwise glibc returns some of it to the system. How much depends by chance on what the heap holds, and fetching it
    again takes up to a third of a pass. This reserves 1 GB of addresses; only addresses in use take memory.
    """
    if not (sys.platform == "linux" and tensor.device.type == "cpu"):
        yield
        return
    # glibc only returns the end of the heap. While the last block is held, the freed blocks before it aren't its end.
    # NumPy's arrays lie on the same heap as tensors, and allocating them takes two thirds of the time.
    *room, last = (np.empty(_BLOCK, dtype=np.uint8) for _ in range(_BLOCKS))
    del room
    yield
    del last


def _seconds_waiting() -> float:
    """Return the seconds for which this thread has waited for a core; 0 on systems that don't measure it."""
    try:
        # Linux: nanoseconds that the thread ran, nanoseconds that it waited for a core, and number of time slices
        file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        try:
            return int(os.read(file, 100).split()[1]) / 1e9
        finally:
            os.close(file)
    except (OSError, IndexError, ValueError):
        return 0.0


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Set PyTorch's number of threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Profiled:
    """The cost of one network.

    Attributes
    ----------
    network : str
        The name of the network.
    macs, params : int
        Multiply-accumulates of one sample, and number of parameters.
    latency_ms : float
        Median time of one batch in milliseconds.
    throughput : float
        Samples a second.
    peak_bytes : int
        Bytes of parameters and buffers, plus the most that a pass holds besides; inputs don't count.
    """

    network: str
    macs: int
    params: int
    latency_ms: float
    throughput: float
    peak_bytes: int


@public(Running(as_compiled=True), models=_NETWORKS, example_inputs=INPUTS, runs=whole(1), threads=whole(1))
def profile(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    runs: int = 30,
    threads: int = 1,
) -> list[Profiled]:
    """Measure several networks, which are timed in turns.

    Parameters
    ----------
    models : mapping of str to torch.nn.Module
        Networks by name, on one device. They aren't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of all networks, on their device, batch first. Their batch size is measured.
    runs, threads : int, default=30, 1
        As in :func:`latencies`.

    Returns
    -------
    list of Profiled
        One for each network, in the order of ``models``.

    Raises
    ------
    ConfigError
        If a number is out of its range.
    """
    times = latencies(models, example_inputs, runs=runs, threads=threads)
    profiles = []
    for name, model in models.items():
        call = arguments_of(example_inputs, model)
        macs, params, peak = count_macs(model, example_inputs), count_params(model), _peak_bytes(model, call)
        profiles.append(Profiled(name, macs, params, times[name], 1000 * batch_size(call) / times[name], peak))
    return profiles


def _peak_bytes(model: nn.Module, call: Call) -> int:
    """Return the bytes of a network's parameters and buffers, plus the most bytes that a pass holds besides."""
    stored = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    (args, kwargs), device = call, first_of_samples(call).device
    with evaluation_mode(model), torch.inference_mode():
        model(*args, **kwargs)  # a first pass allocates memory that is kept, such as workspaces; it isn't counted
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            model(*args, **kwargs)
            return stored + torch.cuda.max_memory_allocated(device) - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as watch:
            model(*args, **kwargs)
    events = [event for event in watch.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()  # negative where memory is freed
        most = max(most, allocated)
    return stored + most
