"""What pruning gains on a GPU, and what choosing and compensating cost there and on the CPU.

Nets are untrained and images are random: neither times nor agreement need more, and nothing is downloaded. Tables:

- milliseconds of a forward pass before and after half of every layer is gone, in turns, by batch size, number format
  and memory layout, run as it is and, last, compiled;
- seconds to choose filters by several pruners with the net on the CPU and on the device, and the share of mask entries
  that agree;
- seconds to compensate here and there, and how far the outputs of the two are apart.

The search over subsets of a cloud has no GPU form: its kernels run on the CPU wherever the net lies. What runs on the
device are passes through the net, covariances, and the populations of ``genetic_weight``.

    make cuda
    python benchmarks/bench_cuda.py --out cuda.json
    python benchmarks/bench_cuda.py --device cpu --quick
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo
from nni_topo import zoo
from nni_topo.runs.run import resolve_device
from nni_topo.runs.widths import inner_layers

Row = dict[str, Any]
FORMATS: dict[str, tuple[torch.dtype, torch.memory_format]] = {
    "float32": (torch.float32, torch.contiguous_format),
    "float32, channels last": (torch.float32, torch.channels_last),
    "bfloat16": (torch.bfloat16, torch.contiguous_format),
    "bfloat16, channels last": (torch.bfloat16, torch.channels_last),
}
CHOSEN: dict[str, tuple[str, dict[str, Any]]] = {
    "l1": ("l1", {}),
    "fpgm": ("fpgm", {}),
    "cluster": ("cluster", {"calibration": True}),
    "topological, greedy": ("topological", {"solver": "greedy"}),
    "reconstruction": ("reconstruction", {"calibration": True}),
    "genetic_weight": ("genetic_weight", {"validation": True, "search": {"population_size": 20, "generations": 3}}),
}
SINGLE_WEIGHTS = "lenet300"  # for the pruner whose genes are the single weights


class Bench:
    """The options, the rows so far, and when the time is up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.quick, self.device = options.quick, resolve_device(options.device)
        self.ends = time.perf_counter() + options.limit
        self.models = ("small_cnn",) if self.quick else ("vgg16", "resnet56")
        self.batches = (2,) if self.quick else (1, 16, 256, 1024)
        self.images = 16 if self.quick else 512
        self.runs = 2 if self.quick else 30
        # Compiling a net takes longer than all of its eager rows.
        self.compiled = () if self.quick else (("float32", 256), ("bfloat16, channels last", 256))
        self.left_out: list[str] = []

    def row(self, name: str, measure: Callable[[], Row]) -> list[Row]:
        """Measure a row; none once the time is up, and an error instead of figures where there are none."""
        if time.perf_counter() > self.ends:
            self.left_out.append(name)
            return []
        try:
            found = measure()
        except Exception as error:
            # a missing compiler or too little memory costs a row, not the table
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        return [{"row": name, **found}]


def net(name: str) -> nn.Module:
    return zoo.create_model(name, num_classes=10, in_channels=3, image_size=32, seed=0).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def halved(model: nn.Module) -> nn.Module:
    """Return a net with half of every inner layer, by L1 norm, made dense."""
    victim, example = copy.deepcopy(model), images(2)
    _, masks = create("l1", victim, example, {}).compress()
    return nni_topo.to_dense(copy.deepcopy(model), example, masks)


def create(name: str, victim: nn.Module, example: Tensor, knobs: dict[str, Any]) -> Any:
    config: list[dict[str, Any]] = [{"op_names": inner_layers(victim, example), "sparse_ratio": 0.5}]
    if nni_topo.pruner_info(name).structured:
        config = nni_topo.dependency_groups(victim, example, config)
    return nni_topo.create_pruner(name, victim, config, **knobs)


def eager_rows(bench: Bench) -> list[Row]:
    return latency_rows(bench, itertools.product(FORMATS, bench.batches), compiled=False)


def compiled_rows(bench: Bench) -> list[Row]:
    return latency_rows(bench, bench.compiled, compiled=True)


def latency_rows(bench: Bench, kinds: Iterable[tuple[str, int]], *, compiled: bool) -> list[Row]:
    rows, kinds = [], list(kinds)
    for name in bench.models if kinds else ():
        pair = {"before": net(name), "after": halved(net(name))}
        for kind, batch in kinds:
            label = f"{name}, {kind}, batch {batch}{', compiled' if compiled else ''}"
            rows += bench.row(label, lambda p=pair, k=kind, b=batch: latencies(bench, p, k, b, compiled))
    return rows


def latencies(bench: Bench, pair: dict[str, nn.Module], kind: str, batch: int, compiled: bool) -> Row:
    dtype, layout = FORMATS[kind]
    place = {"device": bench.device, "dtype": dtype, "memory_format": layout}
    nets = {name: copy.deepcopy(model).to(**place) for name, model in pair.items()}
    if compiled:
        torch.compiler.reset()
        nets = {name: torch.compile(model, dynamic=False) for name, model in nets.items()}
    found = zoo.latencies(nets, images(batch).to(**place), runs=bench.runs, threads=torch.get_num_threads())
    return {**{f"{name}_ms": ms for name, ms in found.items()}, "times_faster": found["before"] / found["after"]}


def choice_rows(bench: Bench) -> list[Row]:
    rows = []
    for label, (name, knobs) in CHOSEN.items():
        models = (SINGLE_WEIGHTS,) if name == "genetic_weight" else bench.models
        for model in models:
            rows += bench.row(f"{label}, {model}", lambda n=name, k=knobs, m=model: chosen(bench, n, k, m))
    return rows


def chosen(bench: Bench, name: str, knobs: dict[str, Any], model: str) -> Row:
    """Choose on the CPU and on the device; the share of equal mask entries."""
    batches = list(images(bench.images).split(64))
    data = {"calibration": batches, "validation": [(batch, torch.arange(len(batch)) % 10) for batch in batches]}
    given = {knob: data.get(knob, value) for knob, value in knobs.items()}
    if bench.quick and "search" in given:
        given["search"] = {"population_size": 4, "generations": 1}
    seconds, masks = {}, {}
    for place in places(bench):
        pruner = create(name, net(model).to(place), images(2), given)
        seconds[place.type], (_, found) = timed(place, pruner.compress)
        masks[place.type] = torch.cat([m.cpu().flatten() for t in found.values() for m in t.values() if m is not None])
    return {**figures(bench, seconds), "masks_agree": agreement(list(masks.values()))}


def compensation_rows(bench: Bench) -> list[Row]:
    methods = ("reconstruct",) if bench.quick else ("reconstruct", "channel", "pair")
    return [
        row
        for name, method in itertools.product(bench.models, methods)
        for row in bench.row(f"{method}, {name}", lambda n=name, m=method: compensated(bench, n, m))
    ]


def compensated(bench: Bench, name: str, method: Any) -> Row:
    """Compensate on the CPU and on the device; the outputs' largest difference, relative to the largest output."""
    victim = net(name)
    _, masks = create("l1", victim, images(2), {}).compress()
    batches, seconds, outputs = list(images(bench.images).split(64)), {}, []
    for place in places(bench):
        model = net(name).to(place)
        seconds[place.type], done = timed(place, lambda m=model: nni_topo.compensate(m, masks, batches, method=method))
        with torch.no_grad():
            outputs.append(done(images(32).to(place)).cpu())
    apart = float((outputs[0] - outputs[-1]).abs().max() / outputs[0].abs().max())
    return {**figures(bench, seconds), "outputs_apart": apart}


def places(bench: Bench) -> list[torch.device]:
    """Return the CPU and the device; once where they are the same."""
    return list(dict.fromkeys([torch.device("cpu"), bench.device]))


def timed(place: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter() - began, result


def figures(bench: Bench, seconds: dict[str, float]) -> Row:
    ratio = {"cpu_over_device": seconds["cpu"] / seconds[bench.device.type]}
    return {**{f"{place}_seconds": value for place, value in seconds.items()}, **ratio}


def agreement(masks: list[Tensor]) -> float:
    return float((masks[0] == masks[-1]).double().mean())


def machine(bench: Bench) -> Row:
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else platform.processor() or "CPU"
    facts = {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    return {**facts, "threads": torch.get_num_threads(), "tf32": torch.backends.cudnn.allow_tf32}


def markdown(title: str, rows: list[Row]) -> str:
    """Return rows as a table, with a column for every figure that any row has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"**{title}**", "", f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(row.get(c, '')) for c in columns)} |" for row in rows), ""])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


PARTS = {"latency": eager_rows, "choice": choice_rows, "compensation": compensation_rows, "compiled": compiled_rows}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=330.0, help="seconds after which no further row is begun")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch on the CPU")
    parser.add_argument("--quick", action="store_true", help="a tiny net and few images, to see that it runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        bench = Bench(options)
        document: Row = {"machine": machine(bench)}
        print(", ".join(f"{name} {value}" for name, value in document["machine"].items()), end="\n\n")
        for title, part in PARTS.items():
            document[title] = part(bench)
            if document[title]:
                print(markdown(title, document[title]), flush=True)
    finally:
        torch.set_num_threads(threads)
    document["left_out"] = bench.left_out
    if bench.left_out:
        print(f"not run within {options.limit:g} s: {'; '.join(bench.left_out)}")
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
