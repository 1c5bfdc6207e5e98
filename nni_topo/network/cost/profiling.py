"""What networks take on this machine: time, throughput, memory, multiply-accumulates, parameters, in several modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError, checked, unknown_name
from nni_topo.network.cost.measure import count_macs, count_params, latencies
from nni_topo.network.runtime import INPUTS, detached_copy, evaluation_mode, leaves_models_alone

MODES = ("plain", "channels_last", "bf16", "compile")


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
