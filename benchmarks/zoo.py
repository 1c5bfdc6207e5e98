"""Ask for half of the channels of every layer of every network in ``zoo.txt``, and see what comes out.

For each: `dependency_groups` for all convolutions, linear and recurrent layers at 0.5, random masks, `to_dense` without
its own check, then the comparison with a reference that shares no code with it: the original network in double
precision, in which hooks zero the outputs of the channels that are gone, or the weights of the units. Which these are
is read off the dense network's weights alone, whose values are found among the original's.

One process a network, with a limit on its memory and its processor's time, which all seconds are; a line per finished
network, so that a stopped run goes on where it was. Prints the table as Markdown. With ``--rivals`` NNI's own
``ModelSpeedup`` gets the same masks, and Torch-Pruning the same layers and ratio.

    python benchmarks/zoo.py --out runs/zoo.jsonl
    python benchmarks/zoo.py --out runs/zoo.jsonl --only torchvision/resnet18 --timeout 600
    python benchmarks/zoo.py --out runs/zoo.jsonl --rivals
    python benchmarks/zoo.py --out runs/zoo.jsonl --table
"""

from __future__ import annotations

import argparse
import copy
import importlib
import logging
import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
import zoo_nets
import zoo_transformers
from nni.compression.speedup import ModelSpeedup
from torch import Tensor, nn
from zoo_reference import DETECTING, PRUNED, difference, run, width, zeroed_outputs, zeroing

import nni_topo
from nni_topo import zoo
from nni_topo.network.runtime.copying import detached_copy
from nni_topo.runs.records import append_record, read_records
from nni_topo.runs.rivals import KINDS, PREFIX, cut

LIST = Path(__file__).with_name("zoo.txt")
CONVOLUTIONS = [f"{kind}{d}d" for kind in ("Conv", "ConvTranspose") for d in (1, 2, 3)]
ASKED = [
    {"op_types": [*CONVOLUTIONS, "Linear", "LSTM", "GRU", "RNN"], "sparse_ratio": 0.5}
]  # classes derived from them too


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


def rival(make: Callable[[], nn.Module], model: nn.Module, inputs: Any) -> dict[str, Any]:
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


def measure(name: str, options: dict[str, str], *, rivals: bool = False) -> dict[str, Any]:
    """Prune one network and compare."""
    model, inputs = build(name, options)
    record: dict[str, Any] = {"parameters": zoo.count_params(model)}
    start = time.process_time()
    asked = copy.deepcopy(ASKED)
    if name.startswith("transformers/"):  # whose widths begin in embeddings
        asked[0]["op_types"].append("Embedding")
    groups = nni_topo.dependency_groups(model, inputs, asked)
    record["groups_cpu_seconds"] = time.process_time() - start
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNED)}
    heads = [layer for layer, why in groups.skipped.items() if "output" in why]
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
    if rivals:
        whole = detached_copy(model)
        ratios = {name: 0.5 for name, module in layers.items() if name not in heads and isinstance(module, KINDS)}
        record["nni"] = rival(lambda: ModelSpeedup(detached_copy(model), inputs, masks).speedup_model(), whole, inputs)
        record["torch_pruning"] = rival(lambda: cut(PREFIX, model, inputs, ratios)[0], whole, inputs)
    gone, norms = zeroing(model, dense)
    chosen = sum(width(layers[entry["op_names"][0]]) for entry in groups if entry["op_names"][0] in layers)
    record |= {
        "chosen": chosen,
        "gone": sum(width(layers[name]) - width(dense.get_submodule(name)) for name in gone),
        "kept": {row.name: row.reason for row in dense.report.kept},
        "dense_parameters": zoo.count_params(dense),
    }
    model, dense = model.double(), dense.double()
    inputs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    with torch.no_grad():
        actual = run(dense, inputs)
        record["change"] = difference(run(model, inputs), actual)
    record["difference"] = difference(zeroed_outputs(model, gone | norms, inputs), actual)
    if isinstance(inputs, Tensor):
        record["macs"], record["dense_macs"] = zoo.count_macs(model, inputs), zoo.count_macs(dense, inputs)
    return record


def entries() -> list[tuple[str, dict[str, str]]]:
    lines = [line.partition("#")[0].split() for line in LIST.read_text(encoding="utf-8").splitlines()]
    return [(line[0], dict(option.split("=") for option in line[1:])) for line in lines if line]


def one(name: str, limits: tuple[float, float], sender: Connection, rivals: bool) -> None:
    """Measure one network in this process, within gibibytes and seconds of the processor, and send the record."""
    resource.setrlimit(resource.RLIMIT_AS, (int(limits[0] * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(limits[1]),) * 2)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    start = time.process_time()
    try:
        record = {"status": "ok", **measure(name, dict(entries())[name], rivals=rivals)}
    except MemoryError:
        record = {"status": "out of memory"}
    except Exception as error:  # the row says so
        short = " ".join(str(error).split())[:300]
        record = {"status": "out of memory" if "allocate memory" in short else f"{type(error).__name__}: {short}"}
    record["cpu_seconds"] = time.process_time() - start
    record["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sender.send(record)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="lines of finished networks")
    parser.add_argument("--only", nargs="*", help="names of zoo.txt, default all")
    parser.add_argument("--timeout", type=float, default=120.0, help="processor seconds a network, default 120")
    parser.add_argument("--memory", type=float, default=10.0, help="gibibytes a process, default 10")
    parser.add_argument("--rivals", action="store_true", help="also NNI's ModelSpeedup and Torch-Pruning")
    parser.add_argument("--table", action="store_true", help="print the table of what is finished")
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done = _records(options.out)
    for name, _ in entries():
        if options.table or name in done or (options.only and name not in options.only):
            continue
        append_record(options.out, _measured(name, options))
    _print(_records(options.out))


def _measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    # Forked: PyTorch and NNI take longer to import than a small network to prune.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=one, args=(name, (options.memory, options.timeout), sender, options.rivals))
    process.start()
    sender.close()
    try:
        record = receiver.recv()
    except EOFError:
        process.join()
        record = {
            "status": f"ended by signal {-(process.exitcode or 0)}: more than {options.timeout:g} s, or its memory"
        }
    process.kill()
    process.join()
    return {"model": name, **record}


def _records(path: Path) -> dict[str, dict[str, Any]]:
    return {record["model"]: record for record in read_records(path)}


def _print(records: dict[str, dict[str, Any]]) -> None:
    others = {"nni": "NNI", "torch_pruning": "Torch-Pruning"}
    others = others if any("nni" in record for record in records.values()) else {}
    titles = ["network", "channels gone", "equal to", "layers left whole", "parameters left", "MACs left", "CPU s"]
    titles += [f"{title}: gone, s" for title in others.values()]
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
    print("\nLayers left whole, and those that keep some masked channels, by reason:\n")
    for name, record in records.items():
        whole = Counter(_brief(why) for why in record.get("skipped", {}).values())
        some = Counter(f"in part, {_brief(why)}" for why in record.get("kept", {}).values())
        if whole or some:
            print(f"* {name}: " + "; ".join(f"{count} {why}" for why, count in (*whole.most_common(), *some.items())))


def _other(record: dict[str, Any], key: str) -> str:
    """Write what a rival made of a network: the share of the channels asked for that is gone, and seconds."""
    found = record.get(key, {})
    told = f"{found['gone'] / max(record['asked'], 1):.2f}, {found['cpu_seconds']:.1f}" if "gone" in found else ""
    return told if found.get("status", "ok") == "ok" else ", ".join(filter(None, [found["status"], told]))


def _brief(why: str) -> str:
    """Leave the places out of reasons, and of what is shared the names."""
    return "; ".join(dict.fromkeys(part.split(" (")[0].split(" with ")[0] for part in why.split("; ")))


if __name__ == "__main__":
    main()
