"""Prune a layer of 16,384 neurons by every pruner: seconds and peak memory, or the words of what refuses it.

One process a pruner, on one thread; ``--memory`` is the limit that it has, in GiB, as a smaller machine would set it.

    python benchmarks/speed/bench_limits.py
    python benchmarks/speed/bench_limits.py topological reconstruction --neurons 4096
    python benchmarks/speed/bench_limits.py topological --memory 3
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import nni_topo
from nni_topo.errors import NniTopoError

FEATURES, IMAGES, CLASSES = 256, 512, 16


def knobs(images: Tensor) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return a line's name, the pruner's, and its knobs."""
    batches = list(images.split(128))
    labelled = [(images, torch.arange(len(images)) % CLASSES)]
    return {
        **{name: (name, {}) for name in ("random", "level", "l1", "fpgm", "matrix", "topological_magnitude")},
        "energy": ("energy", {"example_inputs": images[:2]}),
        "topological": ("topological", {}),
        "topological, searched": ("topological", {"solver": {"generations": 2, "population_size": 10}}),
        "topological, functional": ("topological", {"calibration": batches}),
        "reconstruction": ("reconstruction", {"calibration": batches}),
        **{f"cluster, {each}": ("cluster", {"calibration": batches, "algorithm": each}) for each in ("kmeans", "ward")},
        "cluster, spectral": ("cluster", {"calibration": batches, "algorithm": "spectral"}),
        "subcluster": ("subcluster", {"calibration": batches}),
        "genetic_weight": ("genetic_weight", {"validation": labelled, "search": {"generations": 1}}),
    }


def one(name: str, neurons: int, memory: float, sender: Connection) -> None:
    """Prune in this process, then compensate where neurons went, and send seconds, GiB, and what came of it."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(IMAGES, FEATURES)
    model = nn.Sequential(nn.Linear(FEATURES, neurons), nn.ReLU(), nn.Linear(neurons, CLASSES))
    pruner_name, given = knobs(images)[name]
    process = psutil.Process()
    if memory:
        size = process.memory_info().vms + int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    before, began = process.memory_info().rss, time.perf_counter()
    try:
        pruner = nni_topo.create_pruner(pruner_name, model, [{"op_names": ["0"], "sparse_ratio": 0.5}], **given)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        came = f"{float(masks['0']['weight'].mean()):.2f} left"
    except NniTopoError as error:
        came = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    sender.send((time.perf_counter() - began, time.process_time(), peak / 2**30, came))


def main() -> None:
    """Print a row a pruner."""
    known = list(knobs(torch.zeros(1, FEATURES)))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pruners", nargs="*", help=f"of {'; '.join(known)}; default all")
    parser.add_argument("--neurons", type=int, default=16_384)
    parser.add_argument("--memory", type=float, default=0.0, help="GiB that a process may take, default all")
    options = parser.parse_args()
    print("| pruner | seconds | of the processor | GiB more | what came of it |\n|---|---:|---:|---:|---|", flush=True)
    context = multiprocessing.get_context("fork")
    for name in options.pruners or known:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=one, args=(name, options.neurons, options.memory, sender))
        process.start()
        sender.close()
        try:
            seconds, used, peak, came = receiver.recv()
            print(f"| {name} | {seconds:.0f} | {used:.0f} | {peak:.1f} | {came} |", flush=True)
        except EOFError:
            process.join()
            print(f"| {name} | | | | ended by {process.exitcode} |", flush=True)
        process.join()


if __name__ == "__main__":
    main()
