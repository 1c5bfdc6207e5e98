"""Ask for half of the channels of every layer of every network in ``zoo.txt``, and see what comes out.

For each: `dependency_groups` for all convolutions, linear and recurrent layers at 0.5, random masks, `to_dense` without
its own check, then the comparison with a reference that shares no code with it: the original network in double
precision, in which hooks zero the outputs of the channels that are gone, or the weights of the units. Which these are
is read off the dense network's weights alone, whose values are found among the original's.

One process a network, with a limit on its memory and its processor's time, which all seconds are; a line per finished
network, so that a stopped run goes on where it was. Prints the table as Markdown. With ``--baselines`` NNI's own
``ModelSpeedup`` gets the same masks, and Torch-Pruning the same layers and ratio.

    python -m benchmarks.zoo.zoo --out runs/zoo.jsonl
    python -m benchmarks.zoo.zoo --out runs/zoo.jsonl --only torchvision/resnet18 --timeout 600
    python -m benchmarks.zoo.zoo --out runs/zoo.jsonl --baselines
    python -m benchmarks.zoo.zoo --out runs/zoo.jsonl --table
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nni.compression.speedup import ModelSpeedup
from torch import Tensor, nn

import nni_topo
from benchmarks.networks.zoo_build import ASKED as ASKED
from benchmarks.networks.zoo_build import append_line, asked_of, brief, build, entries, read_lines, run_each
from benchmarks.networks.zoo_reference import DETECTING, PRUNED, difference, run, width, zeroed_outputs, zeroing
from nni_topo import zoo
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.studies.baselines import KINDS, PREFIX, cut


def made_by_other(make: Callable[[], nn.Module], model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Let another make the dense network: how many channels are gone, and its seconds; or how it fails."""
    start = time.process_time()
    try:
        dense = make()
        taken = time.process_time() - start
        with torch.no_grad():
            shapes = [torch.utils._pytree.tree_map_only(Tensor, np.shape, run(each, inputs)) for each in (model, dense)]
    except Exception as error:  # it fails in as many ways as there are networks
        return {"status": type(error).__name__}
    layers = [
        (module, dense.get_submodule(name)) for name, module in model.named_modules() if isinstance(module, PRUNED)
    ]
    gone = sum(width(whole) - width(left) for whole, left in layers)
    return {"status": "ok" if shapes[0] == shapes[1] else "another output", "gone": gone, "cpu_seconds": taken}


def measure(name: str, options: dict[str, str], *, baselines: bool = False) -> dict[str, Any]:
    """Prune one network and compare."""
    model, inputs = build(name, options)
    record: dict[str, Any] = {"parameters": zoo.count_params(model)}
    start = time.process_time()
    groups = nni_topo.dependency_groups(model, inputs, asked_of(name))
    record["groups_cpu_seconds"] = time.process_time() - start
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNED)}
    heads = [layer for layer, why in groups.reasons.items() if any(each.kind == "model_output" for each in why)]
    # A stream that the model returns counts as asked for, where what adds to it loses heads.
    by_column = set[str]()
    for entry in groups:
        (layer,) = entry["op_names"]
        if isinstance(layers.get(layer), nn.Linear) and entry.get("granularity", [0])[0] == -1:
            by_column.add(layer)
    heads = [each for each in heads if not by_column & {*nni_topo.explain(model, inputs, each).coupled}]
    if name.startswith("detection/"):
        heads += [layer for layer in groups.skipped if layer.startswith(tuple(f"{each}." for each in DETECTING))]
    record["layers"] = len(layers)
    record["asked"] = sum(width(module) for name, module in layers.items() if name not in heads)
    record["skipped"] = {name: why for name, why in groups.skipped.items() if name not in heads}
    if not groups:
        return record | {"gone": 0, "difference": 0.0}
    pruner = nni_topo.RandomPruner(model, groups, seed=0)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    start = time.process_time()
    dense = nni_topo.to_dense(model, inputs, masks, check=False)
    record["dense_cpu_seconds"] = time.process_time() - start
    if baselines:
        whole = detached_copy(model)
        ratios = {name: 0.5 for name, module in layers.items() if name not in heads and isinstance(module, KINDS)}
        record["nni"] = made_by_other(
            lambda: ModelSpeedup(detached_copy(model), inputs, masks).speedup_model(), whole, inputs
        )
        record["torch_pruning"] = made_by_other(lambda: cut(PREFIX, model, inputs, ratios)[0], whole, inputs)
    given = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    with torch.no_grad():
        whole_outputs = run(detached_copy(model).double(), given)
    gone, norms = zeroing(model, dense)
    chosen = sum(width(layers[entry["op_names"][0]]) for entry in groups if entry["op_names"][0] in layers)
    record |= {
        "chosen": chosen,
        "gone": sum(width(layers[name]) - width(dense.get_submodule(name)) for name in gone),
        "kept": {row.name: row.reason for row in dense.report.kept},
        "dense_parameters": zoo.count_params(dense),
    }
    model, dense, inputs = model.double(), dense.double(), given
    with torch.no_grad():
        actual = run(dense, inputs)
        record["change"] = difference(whole_outputs, actual)
    record["difference"] = difference(zeroed_outputs(model, dense, gone | norms, inputs), actual)
    if isinstance(inputs, Tensor):
        record["macs"], record["dense_macs"] = zoo.count_macs(model, inputs), zoo.count_macs(dense, inputs)
    return record


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="lines of finished networks")
    parser.add_argument("--only", nargs="*", help="names of zoo.txt, default all")
    parser.add_argument("--timeout", type=float, default=120.0, help="processor seconds a network, default 120")
    parser.add_argument("--memory", type=float, default=10.0, help="gibibytes a process, default 10")
    parser.add_argument("--baselines", action="store_true", help="also NNI's ModelSpeedup and Torch-Pruning")
    parser.add_argument("--table", action="store_true", help="print the table of what is finished")
    options = parser.parse_args(arguments)
    done = read_lines(options.out)
    jobs = []
    for name, sizes in entries():
        if not (options.table or name in done or (options.only and name not in options.only)):
            jobs.append((name, functools.partial(measure, name, sizes, baselines=options.baselines)))
    for record in run_each(jobs, memory=options.memory, timeout=options.timeout):
        append_line(options.out, record)
    _print(read_lines(options.out))


def _print(records: dict[str, dict[str, Any]]) -> None:
    others = {"nni": "NNI", "torch_pruning": "Torch-Pruning"}
    others = others if any("nni" in record for record in records.values()) else {}
    titles = ["network", "channels removed", "equal to", "unpruned layers", "parameters kept", "MACs kept", "CPU s"]
    titles += [f"{title}: removed, s" for title in others.values()]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name, record in records.items():
        if record["status"] != "ok":
            print(f"| {name} | {record['status']} |{' |' * (len(titles) - 2)}")
            continue
        parameters = record.get("dense_parameters", record["parameters"]) / record["parameters"]
        taken = [record.get(key) for key in ("groups_cpu_seconds", "dense_cpu_seconds")]
        seconds = f"{sum(filter(None, taken)):.1f}" if any(taken) else ""
        macs = f"{record['dense_macs'] / record['macs']:.2f}" if record.get("macs") else ""
        print(
            f"| {name} | {record['gone'] / max(record['asked'], 1):.2f} | {record['difference']:.0e} | "
            f"{len(record['skipped'])} of {record['layers']} | {parameters:.2f} | {macs} | "
            f"{seconds} |" + "".join(f" {_other(record, key)} |" for key in others)
        )
    print("\nLayers that aren't pruned, and layers that keep some masked channels, by reason:\n")
    for name, record in records.items():
        whole = Counter(brief(why) for why in record.get("skipped", {}).values())
        some = Counter(f"in part, {brief(why)}" for why in record.get("kept", {}).values())
        if whole or some:
            print(f"* {name}: " + "; ".join(f"{count} {why}" for why, count in (*whole.most_common(), *some.items())))


def _other(record: dict[str, Any], key: str) -> str:
    """Write what a baseline made of a network: the share of the channels asked for that is gone, and seconds."""
    found = record.get(key, {})
    told = f"{found['gone'] / max(record['asked'], 1):.2f}, {found['cpu_seconds']:.1f}" if "gone" in found else ""
    return told if found.get("status", "ok") == "ok" else ", ".join(filter(None, [found["status"], told]))


if __name__ == "__main__":
    main()
