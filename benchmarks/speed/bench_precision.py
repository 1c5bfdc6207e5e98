"""How long a gradient step of distillation takes in bfloat16, as a share of one in single precision.

    python -m benchmarks.speed.bench_precision --out runs/precision
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI python -m benchmarks.speed.bench_precision --out runs/precision \
        --name "no bfloat16"

prunes half of the channels of networks of new weights and distils them, with batches of 64: the time of a step is that
of twelve less that of two, over ten. Both precisions take turns; a line per network goes to ``precision.jsonl``, with
the ratios of all turns. The second command forbids instructions for bfloat16, as if the processor had none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import nni_topo
from benchmarks.speed.bench_seconds import settle_norms
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

FEW, MANY, BATCH = 2, 12, 64
PRECISIONS = ("float32", "bfloat16")


def vit() -> tuple[nn.Module, Any]:
    """Build a ViT of four blocks for images of 64 pixels in patches of 8."""
    sizes = {"num_layers": 4, "num_heads": 6, "hidden_dim": 192, "mlp_dim": 768}
    net = torchvision.models.VisionTransformer(image_size=64, patch_size=8, **sizes)
    nn.init.normal_(net.heads.head.weight, std=0.02)  # new ones are zero, and there would be nothing to learn
    return net, torch.randn(192, 3, 64, 64)


def bert() -> tuple[nn.Module, Any]:
    """Build a BERT of four blocks, each as wide as MiniLM's, for 32 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "num_hidden_layers": 4}
    config = BertConfig(vocab_size=8000, num_labels=10, **sizes)
    tokens = torch.randint(0, 8000, (192, 32))
    return BertForSequenceClassification(config), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


NETS: dict[str, tuple[str, Callable[[], tuple[nn.Module, Any]]]] = {
    "vit": ("ViT, 64 x 64", vit),
    "bert": ("BERT, 32 tokens", bert),
}


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="bfloat16", help="of the processor's instructions, for the table")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "precision.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    for name in options.nets:
        if (name, options.name) not in done:
            append_record(path, {"key": (name, options.name), **_timed(name, options.turns), **provenance()})
    print(table(read_records(path)))


def _timed(name: str, turns: int) -> dict[str, Any]:
    """Return the milliseconds of a step in both precisions, turn by turn."""
    torch.manual_seed(0)
    net, inputs = NETS[name][1]()
    batches = _batches(inputs)
    settle_norms(net, batches)
    example = next(iter(batches))
    layers = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(net, example, layers)
    pruner = nni_topo.create_pruner("l1", net, list(groups))
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    small = nni_topo.to_dense(net, example, masks)

    def seconds(steps: int, precision: str) -> float:
        began = time.process_time()
        knobs = {"steps": steps, "lr": 1e-5, "blend": False, "precision": precision}
        done = nni_topo.distillation(small, net, batches, held_out=batches[:1], progress=False, **knobs)
        if done.steps != steps:
            raise SystemExit(f"{steps} steps must be taken, got {done.steps} ({name}, {precision})")
        return time.process_time() - began

    found: dict[str, list[float]] = {each: [] for each in PRECISIONS}
    for turn in range(turns + 1):
        for precision in PRECISIONS:
            step = (seconds(MANY, precision) - seconds(FEW, precision)) / (MANY - FEW)
            if turn:  # first calls load libraries and choose programs
                found[precision].append(1e3 * step)
    return {"milliseconds": found}


def _batches(inputs: Any) -> list[Any]:
    """Cut inputs into batches."""
    if isinstance(inputs, dict):
        parts = [each.split(BATCH) for each in inputs.values()]
        return [dict(zip(inputs, batch, strict=True)) for batch in zip(*parts, strict=True)]
    return list(inputs.split(BATCH))


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each network: milliseconds in single precision, and how many times as fast bfloat16 is."""
    names = list(dict.fromkeys(record["key"][1] for record in records))
    found = {tuple(record["key"]): record["milliseconds"] for record in records}
    rows = []
    for net, (title, _) in NETS.items():
        if (net, names[0]) not in found:
            continue
        row = [title, interval(found[net, names[0]]["float32"]).show()]
        for name in names:
            times = found.get((net, name))
            row.append("" if times is None else _ratio(times))
        rows.append(row)
    head = ["network", "step in single precision, ms", *(f"times as fast in bfloat16: {name}" for name in names)]
    return markdown_table(head, rows)


def _ratio(times: dict[str, list[float]]) -> str:
    """Return how many times as fast steps in bfloat16 are, paired by turn."""
    pairs = zip(times["float32"], times["bfloat16"], strict=True)
    return interval([single / half for single, half in pairs]).show(digits=2)


if __name__ == "__main__":
    main()
