"""What pruning gains on a GPU, and what selecting, reconstructing and distilling cost there and on the CPU.

Networks are untrained and images are random: neither times nor agreement need more, and nothing is downloaded. Tables:

- half the MACs of ResNet-50 and ViT-B/16 (224x224) removed by NNI's L1 and FPGM, by Torch-Pruning and by `shrink`
  without distillation: the share of MACs and parameters that is left, and the seconds;
- milliseconds of a forward pass of all these networks and of the unpruned one, measured in turns, by number format,
  memory layout and batch size, and compiled;
- a LLaMA with random weights that ``shrink_pretrained`` prunes block by block: seconds and memory of the GPU;
- milliseconds of both networks without a third of every layer, by the number of which widths are multiples, and of
  single layers by their width;
- selecting, reconstructing and distilling as multiples of a pass over the data, as ``bench_seconds.py`` has them;
- seconds of selecting filters by several pruners with the network on the CPU and on the device, and the share of mask
  entries that agree;
- seconds of reconstructing weights on the CPU and on the device, and how far apart the outputs are.

The search over subsets of a cloud has no GPU form: it runs on the CPU wherever the network lies. What runs on the
device are passes through the network, covariances, and the populations of ``genetic_weight``.

    make cuda
    python -m benchmarks.speed.bench_cuda --out cuda.json
    python -m benchmarks.speed.bench_cuda --device cpu --quick
    python -m benchmarks.speed.bench_cuda --into benchmarks/records/cuda.json benchmarks/results/gpu.md
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import nni_topo
from benchmarks.speed import bench_seconds
from benchmarks.tables import with_tables
from benchmarks.transformers import bench_streaming
from nni_topo import zoo
from nni_topo.network.runtime.reports import markdown_table
from nni_topo.runs.provenance import provenance
from nni_topo.runs.run import resolve_device
from nni_topo.runs.widths import inner_layers
from nni_topo.studies.baselines import PREFIX, cut

Row = dict[str, Any]
SOURCE = "benchmarks/speed/bench_cuda.py"
SHARE = 0.5
FORMATS: dict[str, tuple[torch.dtype, torch.memory_format]] = {
    "float32": (torch.float32, torch.contiguous_format),
    "float16": (torch.float16, torch.contiguous_format),
    "float16, channels last": (torch.float16, torch.channels_last),
}
UNPRUNED = "unpruned"
OURS: dict[str, dict[str, Any]] = {
    "shrink": {"budget": {"flops": SHARE}},
    "shrink, any width": {"budget": {"flops": SHARE}, "round_to": 1},
    "shrink, multiples of 32": {"budget": {"flops": SHARE}, "round_to": 32},
    "shrink, MLPs alone": {"budget": {"flops": SHARE}, "layers": ".mlp.0"},
    "shrink, half the time": {"budget": {"latency": SHARE}},
    "shrink, half the time, blocks too": {"budget": {"latency": SHARE}, "depth": True},
}
COMPILED = ("shrink", "shrink, multiples of 32", "shrink, half the time, blocks too")
UNIFORM = ("l1", "fpgm", PREFIX)
SELECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "l1": ("l1", {}),
    "fpgm": ("fpgm", {}),
    "cluster": ("cluster", {"calibration": True}),
    "topological, greedy": ("topological", {"solver": "greedy"}),
    "reconstruction": ("reconstruction", {"calibration": True}),
    "genetic_weight": ("genetic_weight", {"validation": True, "search": {"population_size": 20, "generations": 3}}),
}
MULTIPLES = (None, 8, 16, 32, 64)
CALLS = 15  # of a layer, between two looks at the clock
# A layer by its width, the shape of its input by images and width, and widths, the full one last.
LAYERS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int, int], tuple[int, ...]], tuple[int, ...]]] = {
    "Linear(768, width)": (
        lambda width: nn.Linear(768, width),
        lambda images, width: (197 * images, 768),
        (504, 510, 511, 512, 514, 516, 520, 768),
    ),
    "Linear(width, 3072)": (
        lambda width: nn.Linear(width, 3072),
        lambda images, width: (197 * images, width),
        (504, 510, 511, 512, 514, 516, 520, 768),
    ),
    "Conv2d(width, width, 1)": (
        lambda width: nn.Conv2d(width, width, 1, bias=False),
        lambda images, width: (images, width, 28, 28),
        (248, 252, 256, 341, 352, 508, 512),
    ),
    "Conv2d(width, width, 3)": (
        lambda width: nn.Conv2d(width, width, 3, padding=1, bias=False),
        lambda images, width: (images, width, 28, 28),
        (128, 136, 144, 160, 172, 176, 192, 248, 252, 256),
    ),
}
SINGLE_WEIGHTS = "lenet300"  # for the pruner whose genes are the single weights


class Bench:
    """The options, the rows so far, and when the time is up."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.quick, self.device = options.quick, resolve_device(options.device)
        self.ends = time.perf_counter() + options.limit
        self.large = ("small_cnn",) if self.quick else ("resnet50", "vit_b_16")
        self.side = 32 if self.quick else 224
        self.large_images, self.split = (8, 4) if self.quick else (256, 32)
        self.batches = (2,) if self.quick else (1, 64)
        self.formats = ("float32",) if self.quick else tuple(FORMATS)
        self.small = ("small_cnn",) if self.quick else ("vgg16", "resnet56")
        self.small_images = 16 if self.quick else 512
        # A budget of time is measured for seconds.
        self.ways = options.ways or ((*UNIFORM, "shrink") if self.quick else (*UNIFORM, *OURS))
        self.runs = 2 if self.quick else 30
        self.passes = () if self.quick else ("pitch", "minilm", "resnet50")
        self.streamed = () if self.quick else ((2048, 4, 64, 0), (4096, 2, 64, 0))
        self.left_out: list[str] = []
        self.rounded: dict[str, dict[str, nn.Module]] = {}
        self._pruned: dict[str, dict[str, nn.Module]] = {}
        self._ratios: dict[tuple[str, str], float] = {}

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

    def of(self, name: str) -> dict[str, nn.Module]:
        """Return the dense networks so far of a network, by the way that pruned them; the unpruned one is the first."""
        if name not in self._pruned:
            torch.manual_seed(0)
            is_small = name in zoo.list_models()
            model = small_net(name) if is_small else getattr(torchvision.models, name)(weights=None)
            bench_seconds.settle_norms(model, self.images)
            self._pruned[name] = {UNPRUNED: model.to(self.device)}
        return self._pruned[name]

    @functools.cached_property
    def images(self) -> list[Tensor]:
        """Return the calibration images of the large networks, on the CPU, as a DataLoader gives them."""
        generator = torch.Generator().manual_seed(0)
        return list(torch.randn(self.large_images, 3, self.side, self.side, generator=generator).split(self.split))

    def ratio(self, name: str, way: str) -> float:
        """Return the ``sparse_ratio`` at which SHARE of the MACs is left, the same for L1 and FPGM."""
        key = name, way if way == PREFIX else "l1"
        if key not in self._ratios:
            model, example = self.of(name)[UNPRUNED], self.images[0][:1].to(self.device)
            macs, low, high = zoo.count_macs(model, example), 0.0, 1.0
            for _ in range(6):
                middle = (low + high) / 2
                left = zoo.count_macs(uniformly_pruned(key[1], model, example, middle), example)
                low, high = (middle, high) if left > SHARE * macs else (low, middle)
            self._ratios[key] = low
        return self._ratios[key]


def pruned_rows(bench: Bench) -> list[Row]:
    return [
        row
        for name in bench.large
        for way in bench.ways
        if "layers" not in OURS.get(way, {}) or name.startswith("vit")
        for row in bench.row(f"{name}, {way}", lambda n=name, w=way: pruned(bench, n, w))
    ]


def pruned(bench: Bench, name: str, way: str) -> Row:
    """Prune a large network on the device; keep the dense network for the table of times."""
    nets = bench.of(name)
    model, example = nets[UNPRUNED], bench.images[0][:1].to(bench.device)
    found: Row = {}

    def step(label: str, work: Callable[[], Any]) -> Any:
        found[f"{label}_seconds"], result = bench_seconds.timed(bench.device, work)
        return result

    if way in OURS:
        shrink = functools.partial(nni_topo.shrink, model, bench.images, distill=False, progress=False)
        knobs = dict(OURS[way])
        if "layers" in knobs:
            knobs["layers"] = [layer for layer, _ in model.named_modules() if layer.endswith(knobs["layers"])]
        nets[way] = step("whole", lambda: shrink(**knobs))
    elif way == PREFIX:
        # it removes the channels itself
        ratio = bench.ratio(name, way)
        nets[way] = step("select", lambda: uniformly_pruned(way, model, example, ratio))
    else:
        ratio = bench.ratio(name, way)
        masks = step("select", lambda: uniform_masks(way, model, example, ratio))
        nets[way] = step("dense", lambda: nni_topo.to_dense(model, example, masks))
    with torch.no_grad():
        nets[way](example)
    sizes = {
        "macs": zoo.count_macs(nets[way], example) / zoo.count_macs(model, example),
        "params": zoo.count_params(nets[way]) / zoo.count_params(model),
    }
    return {**sizes, **found}


def uniformly_pruned(way: str, model: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    """Return the dense network without the same share of every layer."""
    if way != PREFIX:
        return nni_topo.to_dense(model, example, uniform_masks(way, model, example, ratio))
    layers = inner_layers(model, example)
    if any(isinstance(model.get_submodule(layer), nn.MultiheadAttention) for layer in layers):
        # torchvision's ViT doesn't run with another width than its own, which Torch-Pruning would change
        layers = [layer for layer in layers if layer.endswith("mlp.0")]
    return cut(way, model, example, dict.fromkeys(layers, ratio))[0]


def uniform_masks(name: str, model: nn.Module, example: Tensor, ratio: float) -> Any:
    config = [{"op_names": inner_layers(model, example), "sparse_ratio": ratio}]
    pruner = nni_topo.create_pruner(name, model, nni_topo.dependency_groups(model, example, config))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


def eager_rows(bench: Bench) -> list[Row]:
    kinds = itertools.product(bench.formats, bench.batches)
    return latency_rows(bench, kinds, lambda nets: nets, "")


def compiled_rows(bench: Bench) -> list[Row]:
    # Compiling a network takes longer than all of its eager rows, so not all of them are compiled.
    kinds = [] if bench.quick else [("float16, channels last", batch) for batch in reversed(bench.batches)]
    return latency_rows(bench, kinds, _compiled, ", compiled")


def _compiled(nets: dict[str, nn.Module]) -> dict[str, nn.Module]:
    torch.compiler.reset()
    # With CUDA graphs, so that the time of a small batch isn't that of launching kernels.
    chosen = {name: nets[name] for name in (UNPRUNED, *COMPILED) if name in nets}
    return {name: torch.compile(model, dynamic=False, mode="reduce-overhead") for name, model in chosen.items()}


def latency_rows(
    bench: Bench,
    kinds: Iterable[tuple[str, int]],
    ready: Callable[[dict[str, nn.Module]], dict[str, nn.Module]],
    label: str,
) -> list[Row]:
    rows = []
    for (kind, batch), name in itertools.product(kinds, bench.large):
        if "channels last" in kind and name.startswith("vit") and not label:
            continue  # it has one convolution
        title = f"{name}, {kind}, batch {batch}{label}"
        rows += bench.row(title, lambda n=name, k=kind, b=batch: latency_row(bench, n, k, b, ready))
    return rows


def latency_row(bench: Bench, name: str, kind: str, batch: int, ready: Callable[..., dict[str, nn.Module]]) -> Row:
    return {f"{way} ms": ms for way, ms in timed_in_turns(bench, bench.of(name), kind, batch, ready).items()}


def timed_in_turns(
    bench: Bench,
    nets: dict[str, nn.Module],
    kind: str,
    batch: int,
    ready: Callable[[dict[str, nn.Module]], dict[str, nn.Module]] = lambda nets: nets,
) -> dict[str, float]:
    dtype, layout = FORMATS[kind]
    place: dict[str, Any] = {"device": bench.device, "dtype": dtype, "memory_format": layout}
    made = ready({way: copy.deepcopy(net).to(**place) for way, net in nets.items()})
    inputs = bench.images[0][:1].expand(batch, -1, -1, -1).to(**place)
    return zoo.latencies(made, inputs, runs=bench.runs, threads=torch.get_num_threads())


def multiple_rows(bench: Bench) -> list[Row]:
    """Time networks that lose a third of every layer by L1 and keep multiples of some number of channels."""
    rows = []
    for name, (kind, batch) in itertools.product(bench.large, itertools.product(bench.formats, bench.batches)):
        rows += bench.row(f"{name}, {kind}, batch {batch}", functools.partial(_multiples, bench, name, kind, batch))
    return rows


def _multiples(bench: Bench, name: str, kind: str, batch: int) -> Row:
    if name not in bench.rounded:
        model, example = bench.of(name)[UNPRUNED], bench.images[0][:1].to(bench.device)
        masks = uniform_masks("l1", model, example, 0.33)
        nets = {str(unit or "any"): nni_topo.to_dense(model, example, masks, round_to=unit) for unit in MULTIPLES}
        bench.rounded[name] = {UNPRUNED: model, **nets}
    nets = bench.rounded[name]
    example, whole = bench.images[0][:1].to(bench.device), zoo.count_macs
    macs = {way: whole(net, example) / whole(nets[UNPRUNED], example) for way, net in nets.items()}
    found = timed_in_turns(bench, nets, kind, batch)
    return {f"{way} ms": ms for way, ms in found.items()} | {f"{way} macs": share for way, share in macs.items()}


def width_rows(bench: Bench) -> list[Row]:
    """Time single layers over numbers of channels."""
    return [
        row
        for layer, kind in itertools.product(LAYERS, bench.formats)
        for row in bench.row(f"{layer}, {kind}", functools.partial(_widths, bench, layer, kind))
    ]


def _widths(bench: Bench, layer: str, kind: str) -> Row:
    make, shape, widths = LAYERS[layer]
    dtype, layout = FORMATS[kind]
    found = {}
    for width in widths[-1:] if bench.quick else widths:
        module = make(width).to(bench.device, dtype)
        inputs = torch.randn(shape(bench.batches[-1], width), device=bench.device, dtype=dtype)
        if inputs.dim() == 4:
            module, inputs = module.to(memory_format=layout), inputs.contiguous(memory_format=layout)
        with torch.no_grad():
            calls = 1 if bench.quick else CALLS
            run = functools.partial(_repeated, module, inputs, calls)
            run()
            # the least of three: what else the machine does only adds to a time
            seconds = min(bench_seconds.timed(bench.device, run)[0] for _ in range(3))
        found[f"{width} ms"] = 1000.0 * seconds / calls
    return found


def _repeated(module: nn.Module, inputs: Tensor, calls: int) -> None:
    for _ in range(calls):
        module(inputs)


def pass_rows(bench: Bench) -> list[Row]:
    return [
        row
        for name in bench.passes
        for row in bench.row(name, lambda n=name: dict(bench_seconds.measure(n, bench.device)))
    ]


def streaming_rows(bench: Bench) -> list[Row]:
    return [
        row for case in bench.streamed for row in bench.row(_title_of(case), functools.partial(_streamed, bench, case))
    ]


def _streamed(bench: Bench, case: tuple[int, int, int, int]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        found = bench_streaming.measured(Path(folder), *case, device=str(bench.device))
    wanted = ("params", "block_params", "seconds_a_block", "device_peak_mib", "peak_mib", "distance")
    return {name: found[name] for name in wanted if name in found}


def _title_of(case: tuple[int, int, int, int]) -> str:
    width, blocks, samples, steps = case
    return f"width {width}, {blocks} blocks, {samples} samples, {steps} steps of distillation"


def selection_rows(bench: Bench) -> list[Row]:
    rows = []
    for label, (name, knobs) in SELECTED.items():
        models = (SINGLE_WEIGHTS,) if name == "genetic_weight" else bench.small
        for model in models:
            rows += bench.row(f"{label}, {model}", lambda n=name, k=knobs, m=model: selected(bench, n, k, m))
    return rows


def small_net(name: str) -> nn.Module:
    return zoo.create_model(name, num_classes=10, in_channels=3, image_size=32, seed=0).eval()


def small_images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def create(name: str, victim: nn.Module, knobs: dict[str, Any]) -> Any:
    example = small_images(2)
    config: list[dict[str, Any]] = [{"op_names": inner_layers(victim, example), "sparse_ratio": SHARE}]
    if nni_topo.pruner_info(name).structured:
        config = nni_topo.dependency_groups(victim, example, config)
    return nni_topo.create_pruner(name, victim, config, **knobs)


def selected(bench: Bench, name: str, knobs: dict[str, Any], model: str) -> Row:
    """Select on the CPU and on the device; the share of equal mask entries."""
    batches = list(small_images(bench.small_images).split(64))
    data = {"calibration": batches, "validation": [(batch, torch.arange(len(batch)) % 10) for batch in batches]}
    given = {knob: data.get(knob, value) for knob, value in knobs.items()}
    if bench.quick and "search" in given:
        given["search"] = {"population_size": 4, "generations": 1}
    seconds, masks = {}, {}
    for place in places(bench):
        pruner = create(name, small_net(model).to(place), given)
        seconds[place.type], (_, found) = bench_seconds.timed(place, pruner.compress)
        masks[place.type] = torch.cat([m.cpu().flatten() for t in found.values() for m in t.values() if m is not None])
    return {**ratio_of(bench, seconds), "masks_agree": agreement(list(masks.values()))}


def reconstruction_rows(bench: Bench) -> list[Row]:
    methods = ("reconstruct",) if bench.quick else ("reconstruct", "pair")
    return [
        row
        for name, method in itertools.product(bench.small, methods)
        for row in bench.row(f"{method}, {name}", lambda n=name, m=method: reconstructed(bench, n, m))
    ]


def reconstructed(bench: Bench, name: str, method: Any) -> Row:
    """Reconstruct on the CPU and on the device; the outputs' largest difference, relative to the largest output."""
    _, masks = create("l1", small_net(name), {}).compress()
    batches, seconds, outputs = list(small_images(bench.small_images).split(64)), {}, []
    for place in places(bench):
        model = small_net(name).to(place)
        seconds[place.type], done = bench_seconds.timed(
            place, lambda m=model: nni_topo.compensate(m, masks, batches, method=method)
        )
        with torch.no_grad():
            outputs.append(done(small_images(32).to(place)).cpu())
    apart = float((outputs[0] - outputs[-1]).abs().max() / outputs[0].abs().max())
    return {**ratio_of(bench, seconds), "outputs_apart": apart}


def places(bench: Bench) -> list[torch.device]:
    """Return the CPU and the device; once where they are the same."""
    return list(dict.fromkeys([torch.device("cpu"), bench.device]))


def ratio_of(bench: Bench, seconds: dict[str, float]) -> Row:
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
    return {**facts, "threads": torch.get_num_threads(), "tf32": torch.backends.cuda.matmul.allow_tf32}


def page_tables(documents: list[Row]) -> str:
    """Return the tables of some runs, under a heading each."""
    return "\n\n".join(
        f"### {document['machine']['device']}, commit {document['revision']}\n\n"
        + "\n\n".join([*([document["note"]] if "note" in document else []), *by_way(document), *tables(document)])
        for document in documents
    )


def by_way(document: Row) -> list[str]:
    """Return the times of the largest batch, eager and compiled, with a row for each way to prune."""
    rows = [row for part in ("latency", "compiled") for row in document.get(part, [])]
    batches = [int(batch[1]) for row in rows if (batch := re.search(r"batch (\d+)", row["row"]))]
    large = {row["row"]: row for row in rows if f"batch {max(batches)}" in row["row"]}
    if not large:
        return []
    ways = dict.fromkeys(name for row in large.values() for name in row if name.endswith(" ms"))
    cells = ([way.removesuffix(" ms"), *(_cell(row.get(way)) for row in large.values())] for way in ways)
    titles = [title.replace(f", batch {max(batches)}", "") for title in large]
    head = f"**milliseconds for {max(batches)} images by way**\n\n"
    return [head + markdown_table(["way", *titles], cells)]


def tables(document: Row) -> Iterator[str]:
    """Yield the tables of a document, each part's with its title, with a column for every figure of their rows."""
    for title in PARTS:
        for number, rows in enumerate(_alike(document.get(title, []))):
            columns = list(dict.fromkeys(column for row in rows for column in row))
            cells = ([_cell(row.get(column, "")) for column in columns] for row in rows)
            head = f"**{title}**\n\n" if number == 0 else ""
            yield head + markdown_table([column.replace("_", " ") for column in columns], cells)


def _alike(rows: list[Row]) -> Iterator[list[Row]]:
    """Yield runs of rows that share at least half of their columns."""
    run: list[Row] = []
    for row in rows:
        if run and 2 * len(row.keys() & run[-1].keys()) < len(row):
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _cell(value: Any) -> str:
    if value is None:
        return "not run"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


PARTS = {
    "pruned to half the MACs": pruned_rows,
    "latency": eager_rows,
    "compiled": compiled_rows,
    "multiples of channels": multiple_rows,
    "widths of a layer": width_rows,
    "passes": pass_rows,
    "block by block": streaming_rows,
    "selection": selection_rows,
    "reconstruction": reconstruction_rows,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=330.0, help="seconds after which no further row is begun")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch on the CPU")
    parser.add_argument("--quick", action="store_true", help="a tiny net and few images, to see that it runs")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--ways", nargs="+", choices=(*UNIFORM, *OURS), metavar="WAY", help="to prune (default: all)")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--into", nargs=2, type=Path, metavar=("RECORDS", "PAGE"), help="page whose tables are replaced"
    )
    options = parser.parse_args(arguments)
    if options.into is not None:
        records, page = options.into
        made = page_tables(json.loads(records.read_text(encoding="utf-8")))
        page.write_text(with_tables(page.read_text(encoding="utf-8"), SOURCE, made), encoding="utf-8")
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        bench = Bench(options)
        document: Row = {"machine": machine(bench), "revision": provenance()["revision"]}
        print(", ".join(f"{name} {value}" for name, value in document["machine"].items()), end="\n\n")
        for title in options.parts:
            document[title] = PARTS[title](bench)
            document["left_out"] = bench.left_out
            print("\n\n".join(tables({title: document[title]})), end="\n\n", flush=True)
            if options.out:
                # after each part, so that a run that is stopped keeps what it has measured
                options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    finally:
        torch.set_num_threads(threads)
    if bench.left_out:
        print(f"not run within {options.limit:g} s: {'; '.join(bench.left_out)}")


if __name__ == "__main__":
    main()
