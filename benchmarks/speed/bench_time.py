"""Whether smaller networks are faster: times of twelve networks with half of their MACs, and with half of their time.

    python -m benchmarks.speed.bench_time --out runs/time

shrinks networks of new weights by norm, without recovery, for times don't depend on weights: to half of their MACs with
any widths, to half of them by the defaults of `shrink`, to half of the time in PyTorch and to half of the time in
onnxruntime. Afterwards each network is timed anew, in turns with the unpruned one, on one thread, in PyTorch and as a
file of `nni_topo.export` in onnxruntime: the median share of up to thirty rounds, at least fifteen, and its 95 %
interval. A process for each network; a line per way to make it smaller goes to ``time.jsonl``, and the same command
goes on where it was stopped.

    python -m benchmarks.speed.bench_time --heap

shows why passes are timed with the memory that they free kept: ResNet-20 and one of half its widths, beside different
blocks that lie on the heap, as glibc has it and kept.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import resource
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.networks.zoo_build import run_each
from nni_topo import zoo
from nni_topo.network.cost.measure import TimedPair, memory_kept, now, timed_pair
from nni_topo.network.io.exporting import as_run_by
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table

SHARE = 0.5
WAYS: dict[str, dict[str, Any]] = {
    "any widths": {"budget": {"flops": SHARE}, "round_to": 1},
    "default": {"budget": {"flops": SHARE}},
    "time in PyTorch": {"budget": {"latency": SHARE}},
    "time in onnxruntime": {"budget": {"latency": SHARE, "runtime": "onnxruntime"}},
}
RUNTIMES = {"pytorch": "PyTorch", "onnxruntime": "onnxruntime"}
SECONDS = 30.0  # of a comparison, after which it ends with eight rounds or more
MEMORY, TIMEOUT = 12.0, 1800.0  # gibibytes and processor's seconds of a network


def images(count: int, channels: int, side: int) -> Tensor:
    """Return random images."""
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def tokens(count: int, length: int) -> dict[str, Tensor]:
    """Return random texts."""
    return {"input_ids": torch.randint(1000, (count, length), generator=torch.Generator().manual_seed(0))}


def of_torchvision(name: str, side: int, batch: int) -> tuple[nn.Module, Any]:
    """Make one of torchvision's networks, and its input."""
    import torchvision

    return getattr(torchvision.models, name)(num_classes=10), images(batch, 3, side)


def vit_s() -> tuple[nn.Module, Any]:
    """Make a ViT-S/16 for images of 112 pixels."""
    import timm

    return timm.create_model("vit_small_patch16_224", img_size=112, num_classes=10), images(4, 3, 112)


def bert() -> tuple[nn.Module, Any]:
    """Make a BERT of the size of MiniLM-L6."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertModel(BertConfig(vocab_size=1000, **sizes)), tokens(4, 64)


def gpt2() -> tuple[nn.Module, Any]:
    """Make a GPT-2 of the width of the smallest one, with a third of its layers."""
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=1000, n_layer=4, use_cache=False)), tokens(2, 64)


def unet() -> tuple[nn.Module, Any]:
    """Make a U-Net whose encoder is a ResNet-18."""
    import segmentation_models_pytorch

    return segmentation_models_pytorch.Unet("resnet18", encoder_weights=None, classes=4), images(2, 3, 64)


def of_zoo(name: str, channels: int, side: int, batch: int) -> tuple[nn.Module, Any]:
    """Make one of the package's own networks, and its input."""
    net = zoo.create_model(name, num_classes=10, in_channels=channels, image_size=side, seed=0)
    return net, images(batch, channels, side)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ResNet-18, 64 x 64": partial(of_torchvision, "resnet18", 64, 4),
    "ResNet-20, 28 x 28": partial(of_zoo, "resnet20", 1, 28, 16),
    "ResNet-50, 64 x 64": partial(of_torchvision, "resnet50", 64, 4),
    "MobileNetV2, 64 x 64": partial(of_torchvision, "mobilenet_v2", 64, 16),
    "EfficientNet-B0, 64 x 64": partial(of_torchvision, "efficientnet_b0", 64, 16),
    "ConvNeXt-T, 64 x 64": partial(of_torchvision, "convnext_tiny", 64, 4),
    "VGG-16, 32 x 32": partial(of_zoo, "vgg16", 3, 32, 4),
    "ViT-S/16, 112 x 112": vit_s,
    "Swin-T, 64 x 64": partial(of_torchvision, "swin_t", 64, 4),
    "BERT, 6 layers of 384, 64 tokens": bert,
    "GPT-2, 4 layers of 768, 64 tokens": gpt2,
    "U-Net of a ResNet-18, 64 x 64": unet,
}


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--heap", action="store_true", help="what the heap does to one pair of networks")
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--quick", action="store_true", help="ResNet-20 with half of its MACs by the defaults alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.heap:
        _print_heaps(32)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "time.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    jobs = []
    for name in ["ResNet-20, 28 x 28"] if options.quick else options.only:
        ways = ["default"] if options.quick else list(WAYS)
        missing = [way for way in ways if (name, way) not in done]
        if missing:
            jobs.append((name, functools.partial(measure, name, missing, path)))
    for record in run_each(jobs, memory=MEMORY, timeout=TIMEOUT):
        print(record, flush=True)
    print(table(read_records(path)))


def measure(name: str, ways: list[str], path: Path) -> dict[str, Any]:
    """Make a network smaller in several ways, and write a line for each."""
    torch.manual_seed(0)
    net, inputs = NETWORKS[name]()
    net.eval()
    count = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
    one = {key: value[:1] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[:1]
    macs = zoo.count_macs(net, one)
    for way in ways:
        began = resource.getrusage(resource.RUSAGE_SELF)
        knobs = {"pruner": "l1", "compensate": None, "distill": False, "progress": False}
        small = nni_topo.shrink(net, [inputs], **WAYS[way], **knobs).eval()
        ended = resource.getrusage(resource.RUSAGE_SELF)
        report: Any = small.report
        record: dict[str, Any] = {"key": (name, way), "batch": count, "macs": macs}
        record["left"] = zoo.count_macs(small, one) / macs
        record["told"] = str(report.budget)
        record["seconds"] = ended.ru_utime - began.ru_utime  # of the whole call
        record["multiples"] = sum(row.after % 4 == 0 for row in report.layers.rows) / len(report.layers.rows)
        for runtime in RUNTIMES:
            before, after = as_run_by(runtime, [net, small], inputs)
            record[runtime] = _as_record(timed_pair(before, after, inputs, seconds=SECONDS))
        record["load"] = os.getloadavg()[0]  # of the machine, this process included
        append_record(path, record | provenance())
    return {"ways": len(ways)}


def _as_record(pair: TimedPair) -> dict[str, Any]:
    return {"unpruned_ms": pair.unpruned_ms, "ms": pair.ms, "share": pair.share, "rounds": pair.rounds}


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each network: its share of the time in each runtime, by the way in which it was made smaller."""
    found = {tuple(record["key"]): record for record in records}
    rows = []
    for name in NETWORKS:
        own = {way: found[name, way] for way in WAYS if (name, way) in found}
        if not own:
            continue
        first = next(iter(own.values()))
        cells = [name, str(first["batch"]), f"{first['macs'] / 1e6:.0f}"]
        for runtime, title in RUNTIMES.items():
            cells.append(f"{statistics.median(each[runtime]['unpruned_ms'][0] for each in own.values()):.1f}")
            ways = ("any widths", "default", f"time in {title}")
            cells += [_share(own[way][runtime]["share"]) if way in own else "not run" for way in ways]
        kept = [f"{own[way]['left']:.2f}" if way in own else "" for way in WAYS]
        rows.append([*cells, ", ".join(kept)])
    head = ["network", "batch", "MACs, millions"]
    for title in RUNTIMES.values():
        head += [f"{title}: unpruned ms", "half the MACs, any widths", "half the MACs, default", "half the time"]
    return markdown_table([*head, "MACs kept, in this order"], rows)


def _share(share: list[float]) -> str:
    """Return a share of the time with the half width of its interval."""
    median, low, high = share
    return f"{median:.3f} ± {(high - low) / 2:.3f}"


def _print_heaps(batch: int, passes: int = 20) -> None:
    """Print medians of a pass of two networks, and how many pages the system handed out for it."""
    inputs = torch.randn(batch, 3, 32, 32)
    make = partial(zoo.create_model, "resnet20", num_classes=10, in_channels=3, image_size=32)
    nets = [make(width=width).eval() for width in (1.0, 0.5)]
    generator, rows = random.Random(0), []
    for name in ("glibc's",) * 5 + ("kept",) * 5:
        alive = [bytearray(generator.randrange(1_000, 300_000)) for _ in range(2_000)]
        del alive[:: generator.choice((1, 2, 3))]
        with memory_kept(inputs) if name == "kept" else nullcontext(), torch.inference_mode():
            found = [_passes(net, inputs, passes) for net in nets]
        (whole, _), (half, _) = found
        cells = [f"{1000.0 * seconds:.1f} ({pages})" for seconds, pages in found]
        rows.append([name, *cells, f"{half / whole:.2f}"])
    print(markdown_table(["memory", "whole: ms (pages)", "half its widths: ms (pages)", "share"], rows))


def _passes(net: nn.Module, inputs: Tensor, count: int) -> tuple[float, int]:
    """Return the median seconds, and pages, of a pass after some that warm up."""
    taken = []
    for _ in range(count):
        pages, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, now(inputs)
        net(inputs)
        taken.append((now(inputs) - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages))
    seconds, pages = zip(*taken[count // 4 :], strict=True)
    return statistics.median(seconds), int(statistics.median(pages))


if __name__ == "__main__":
    main()
