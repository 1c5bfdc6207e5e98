"""The networks of ``zoo.txt``: make one with its input, run a job for each in a process of its own, keep the records.

Nothing here imports a module of nni_topo but the package itself, so that it works with any version of it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.networks import zoo_nets, zoo_transformers

LIST = Path(__file__).parents[1] / "zoo" / "zoo.txt"
CONVOLUTIONS = [f"{kind}{d}d" for kind in ("Conv", "ConvTranspose") for d in (1, 2, 3)]
# An op_types entry selects classes derived from these too.
ASKED = [{"op_types": [*CONVOLUTIONS, "Linear", "LSTM", "GRU", "RNN"], "sparse_ratio": 0.5}]


def entries() -> list[tuple[str, dict[str, str]]]:
    """List the networks of ``zoo.txt``: name and options of each, in the order of the file."""
    lines = [line.partition("#")[0].split() for line in LIST.read_text(encoding="utf-8").splitlines()]
    return [(line[0], dict(option.split("=") for option in line[1:])) for line in lines if line]


def asked_of(name: str) -> list[dict[str, Any]]:
    """Return the config_list for a network: half of the channels of every layer."""
    kinds = list(ASKED[0]["op_types"])
    if name.startswith("transformers/"):  # whose widths begin in embeddings
        kinds.append("Embedding")
    return [{**ASKED[0], "op_types": kinds}]


def build(name: str, options: dict[str, str]) -> tuple[nn.Module, Any]:
    """Make a network and an input; ``size`` is that of the images, ``blocks`` how many a stage of a RegNet keeps.

    Other options go to the network's class.
    """
    family, _, kind = name.partition("/")
    if family == "own":
        return zoo_nets.make(kind)
    torch.manual_seed(0)
    if family == "transformers":
        model, inputs = zoo_transformers.make(kind)
        return zoo_nets.lively(model), inputs
    size = int(options.get("size", 64))
    knobs: dict[str, Any] = {
        key: int(value) for key, value in options.items() if key not in ("size", "frames", "blocks")
    }
    if family == "yolo":  # AGPL, as it is asked for by name and imported
        tasks = importlib.import_module("ultralytics.nn.tasks")
        detector: nn.Module = tasks.DetectionModel(f"{kind}.yaml", verbose=False)
        return zoo_nets.lively(detector.eval()), torch.rand(1, 3, size, size)
    if family == "timm":
        timm = importlib.import_module("timm")
        model: nn.Module = timm.create_model(kind, pretrained=False, **knobs)
    elif "num_layers" in knobs:
        model = torchvision.models.VisionTransformer(image_size=size, **knobs)
    else:
        module = {"detection": torchvision.models.detection, "video": torchvision.models.video}.get(family)
        module = torchvision.models.segmentation if family == "segmentation" else module or torchvision.models
        knobs |= {"weights_backbone": None} if family in ("detection", "segmentation") else {}
        knobs |= {"init_weights": False} if kind in ("googlenet", "inception_v3") else {}
        knobs |= {"image_size": size} if kind.startswith("vit_") else {}
        knobs |= {"input_size": (size, size)} if kind.startswith("maxvit") else {}
        model = getattr(module, kind)(weights=None, **knobs)
        for stage in model.trunk_output if "blocks" in options else ():
            del stage[int(options["blocks"]) :]
    model = zoo_nets.lively(model.eval())
    if hasattr(model, "roi_heads"):
        model.roi_heads.score_thresh = 0.0  # else no box is sure enough to be looked at for its mask
    if family == "video":
        return model, torch.randn(1, 3, int(options.get("frames", 8)), size, size)
    return model, ([torch.rand(3, size, size)],) if family == "detection" else torch.randn(1, 3, size, size)


def run_each(
    jobs: Iterable[tuple[str, Callable[[], dict[str, Any]]]], *, memory: float, timeout: float, at_once: int = 1
) -> Iterator[dict[str, Any]]:
    """Run each job in a process of its own and yield its record, with the job's name under "model".

    Parameters
    ----------
    jobs : iterable of (str, callable)
        The name of a network, and what makes its record.
    memory, timeout : float
        Limits of one process: gibibytes, and seconds of the processor.
    at_once : int, default=1
        How many processes run at a time.
    """
    # Forked: PyTorch and NNI take longer to import than a small network to prune.
    context = multiprocessing.get_context("fork")
    waiting = iter(jobs)
    running: dict[Any, tuple[str, Any]] = {}
    while True:
        for name, job in itertools.islice(waiting, at_once - len(running)):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send_record, args=(job, memory, timeout, sender))
            process.start()
            sender.close()
            running[receiver] = (name, process)
        if not running:
            return
        for receiver in multiprocessing.connection.wait(list(running)):
            name, process = running.pop(receiver)
            try:
                record = receiver.recv()
            except EOFError:
                process.join()
                signal = -(process.exitcode or 0)
                record = {"status": f"ended by signal {signal}: more than {timeout:g} s, or its memory"}
            process.kill()
            process.join()
            yield {"model": name, **record}


def _send_record(job: Callable[[], dict[str, Any]], memory: float, timeout: float, sender: Connection) -> None:
    """Run a job in this process, within gibibytes and seconds of the processor, and send its record."""
    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(timeout),) * 2)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    start = time.process_time()
    try:
        record = {"status": "ok", **job()}
    except MemoryError:
        record = {"status": "out of memory"}
    except Exception as error:  # the record says so
        short = " ".join(str(error).split())[:300]
        record = {"status": "out of memory" if "allocate memory" in short else f"{type(error).__name__}: {short}"}
    record["cpu_seconds"] = time.process_time() - start
    record["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sender.send(record)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a file of JSON lines, in place of a line that a crash cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b""
    with path.open("ab") as stream:
        stream.truncate(before.rfind(b"\n") + 1)
        stream.write(json.dumps(record).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Read a file of JSON lines: by network its last record. A line that a crash cut short is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return {record["model"]: record for record in records}


def brief(reason: str) -> str:
    """Leave the places out of a reason, and the names of what is shared."""
    return "; ".join(dict.fromkeys(part.split(" (")[0].split(" with ")[0] for part in reason.split("; ")))
