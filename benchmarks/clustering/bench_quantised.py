"""Quantisation after sub-clustering: accuracy and size with weights of few bits, unpruned and pruned.

    python -m benchmarks.clustering.bench_quantised --data-dir FASHION_MNIST --out DIR

Networks are trained and pruned as in ``bench_subcluster.py``, with the same folder of checkpoints, and fine-tuned for
the epochs that they have there. Weights are then rounded, a step per row of a layer's matrix; INT8 is an ONNX file of
``nni_topo.export``, run by onnxruntime. Each network is a line of DIR/quantised.jsonl, which a second run leaves out.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nni_topo
from benchmarks.clustering.bench_subcluster import NETS, Bench
from nni_topo import zoo
from nni_topo.clustering import Growth
from nni_topo.studies.tables import interval, markdown_table, show_accuracies

BITS = (8, 4, 3, 2)
FLOAT_BITS = 32
INT8_IMAGES = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="digits, mnist or fashion-mnist (default)")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--nets", nargs="*", default=["lenet300", "lenet5"], choices=list(NETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.out, options.data_dir, options.data)
    file = options.out / "quantised.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name in options.nets:
        for seed in range(options.seeds):
            if not any((record["net"], record["seed"]) == (name, seed) for record in records):
                records.append(measured(bench, name, seed))
                with file.open("a") as lines:
                    lines.write(json.dumps(records[-1]) + "\n")
    print(markdown_table(*table([record for record in records if record["net"] in options.nets]), text_columns=2))


def measured(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    """Prune and fine-tune a network, round its weights and the unpruned one's, and measure both."""
    model, data, before = bench.trained(name, seed)
    pruned = fine_tuned(bench, name, seed)
    record: dict[str, Any] = {"net": name, "seed": seed}
    for label, net in (("unpruned", model), ("pruned", pruned)):
        rows = {"32": {"bits": stored_bits(net, FLOAT_BITS), "accuracy": zoo.evaluate(net, data.test)}}
        for bits in BITS:
            accuracy = zoo.evaluate(rounded(net, bits), data.test)
            rows[str(bits)] = {"bits": stored_bits(net, bits), "accuracy": accuracy}
        for kind, images in (("ONNX", None), ("ONNX, INT8", data.train.tensors[0][:INT8_IMAGES])):
            batches = None if images is None else list(images.split(128))
            path = bench.out / f"{name}-{label}.onnx"
            done = nni_topo.export(net, path, data.test.tensors[0][:2], int8=batches)
            rows[kind] = {"bits": 8 * done.size, "accuracy": file_accuracy(path, data.test)}
        record[label] = rows
    print(name, seed, f"{100 * before:.1f} %, pruned {100 * record['pruned']['32']['accuracy']:.1f} %", flush=True)
    return record


def fine_tuned(bench: Bench, name: str, seed: int) -> nn.Module:
    """Return a network after sub-clustering with the text's settings and fine-tuning."""
    model, data, _ = bench.trained(name, seed)
    net = NETS[name]
    images = list(data.train.tensors[0][: net.calibration].split(128))
    pruner = nni_topo.SubclusterPruner(
        copy.deepcopy(model),
        [{"op_names": net.layers(model, data)}],
        calibration=images,
        energy=net.energy,
        growth=Growth(initial_ratio=net.initial),
        seed=seed,
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(model, images[0][:2], masks)
    zoo.train(dense, data, bench.recipe(name, True), seed=seed)
    return dense.eval()


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """Return a copy whose weights take ``2 ** bits - 1`` values a row, symmetric about zero; biases stay."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        if parameter.dim() > 1:
            parameter.data = rounded_rows(parameter.data, bits)
    return copied


def rounded_rows(weight: Tensor, bits: int) -> Tensor:
    """Round to the nearest multiple of the row's largest |w| over ``2 ** (bits - 1) - 1``; rows of zeros stay."""
    rows = weight.flatten(1)
    steps = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    steps = torch.where(steps > 0, steps, torch.ones_like(steps))
    return ((rows / steps).round() * steps).reshape(weight.shape)


def stored_bits(model: nn.Module, bits: int) -> int:
    """Return the bits of all parameters: weights as rounded, a 32-bit step per row, and 32 bits for everything else."""
    total = 0
    for parameter in model.parameters():
        few = parameter.dim() > 1 and bits < FLOAT_BITS
        total += parameter.numel() * bits + len(parameter) * FLOAT_BITS if few else parameter.numel() * FLOAT_BITS
    return total


def file_accuracy(path: Path, images: TensorDataset) -> float:
    """Return the accuracy of an ONNX file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    inputs, labels = images.tensors
    found = [session.run(None, {name: batch.numpy()})[0].argmax(1) for batch in inputs.split(250)]
    return float((np.concatenate(found) == labels.numpy()).mean())


def table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return a row per network and precision: sizes and accuracies, means and intervals over seeds."""
    head = ["net", "weights", "unpruned: times smaller", "accuracy %", "pruned: times smaller", "accuracy %"]
    head += ["lost by rounding: unpruned", "pruned"]
    rows = []
    for net in dict.fromkeys(record["net"] for record in records):
        runs = [record for record in records if record["net"] == net]
        for kind in runs[0]["unpruned"]:
            # files are compared with the unpruned network's file, rounded weights with its parameters
            unit = "ONNX" if kind.startswith("ONNX") else "32"
            row = [net, f"{kind} bits" if kind.isdigit() else kind]
            for label in ("unpruned", "pruned"):
                sizes = [run["unpruned"][unit]["bits"] / run[label][kind]["bits"] for run in runs]
                row += [f"{np.mean(sizes):.1f}", show_accuracies([run[label][kind]["accuracy"] for run in runs])]
            for label in ("unpruned", "pruned"):
                lost = [run[label][unit]["accuracy"] - run[label][kind]["accuracy"] for run in runs]
                row.append("" if kind == unit else interval(lost).show(100))
            rows.append(row)
    return head, rows


if __name__ == "__main__":
    main()
