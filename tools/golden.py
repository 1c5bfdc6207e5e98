"""Record what the package makes of every network of ``zoo.txt``, and compare two such records.

A change of structure must not change a result. ``record`` writes one JSON line a network:

- what `dependency_groups` returns for half of the channels of every layer: entries, skipped layers with the reasons,
  ties and shares;
- of the dense network after random masks: the shape of every parameter and buffer, how many channels each layer has
  and had, the layers that kept masked channels, parameter count and MACs, and a few numbers that describe each output,
  computed in double precision;
- what differs in the user's model after groups, pruning, ``to_dense`` and an interruption of each; of small networks
  also after `compensate`, `distill`, `shrink` and `export`: nothing, if all is right;
- the seconds of the processor that `dependency_groups` and `to_dense` took;
- the same few numbers of the inputs and of the original weights, so that nobody compares two different networks.

``layers`` lists by network which layers could lose channels in one record and can't in another, with the reasons, and
how many channels stay though they are masked. ``check`` holds a record against ``tools/must_go.txt``.

``compare`` prints every difference from a reference and ends with exit status 1 if there is one. Names, integers and
shapes must be equal, outputs equal within 1e-5, times at most 10 % longer in the median and at most 1.5 times for any
network. Only networks that take 0.2 s in the reference count for the times, since below that noise decides. On a
machine with other busy processes the same code may take 1.5 times as long, so record both sides side by side, or
compare ``--without-times``. Reasons are compared by layer; that a text changed is printed, and counts as a difference
with ``--reasons`` alone.

Only public names of the package are used, so that the same file records an old checkout and a new one:

    PYTHONPATH=CHECKOUT:. python tools/golden.py record --out new.jsonl --quick
    python -m tools.golden compare tools/golden/zoo.jsonl.gz new.jsonl
    python -m tools.golden layers tools/golden/zoo.jsonl.gz new.jsonl
    python -m tools.golden check new.jsonl
    python -m tools.golden pack new.jsonl tools/golden/zoo.jsonl.gz
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gzip
import importlib.metadata
import importlib.util
import json
import math
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import nni_topo
from benchmarks.networks.zoo_build import append_line, asked_of, brief, build, entries, read_lines, run_each
from benchmarks.networks.zoo_reference import run
from nni_topo import zoo
from nni_topo.errors import NniTopoError
from nni_topo.testing import snapshot
from tools.must_go import channels_left, read_table

Record = dict[str, Any]
OWN = [name for name, _ in entries() if name.startswith("own/")]
# Every family, and what only a few networks have: shuffles, windows, attention of several kinds, detectors, parts.
QUICK = [
    *OWN,
    "transformers/bert",
    "transformers/albert",
    "transformers/deberta_v3",
    "transformers/t5",
    "transformers/gpt2",
    "transformers/llama",
    "transformers/mixtral",
    "transformers/swin",
    "transformers/clip_vision",
    "transformers/whisper",
    "torchvision/squeezenet1_0",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/resnet18",
    "torchvision/densenet121",
    "torchvision/swin_t",
    "torchvision/swin_v2_t",
    "torchvision/convnext_tiny",
    "torchvision/vit_b_32",
    "segmentation/lraspp_mobilenet_v3_large",
    "video/r3d_18",
    "detection/ssdlite320_mobilenet_v3_large",
    "timm/lcnet_050",
    "timm/ecaresnet26t",
    "yolo/yolov8n",
]
PACKAGES = {"timm": "timm", "transformers": "transformers", "yolo": "ultralytics"}  # else torchvision
NOT_INSTALLED = "package not installed"
OUTPUT_TOLERANCE = 1e-5
OTHER_WEIGHTS = "not the same network or input"
LEAST_SECONDS, MEDIAN_RATIO, LARGEST_RATIO = 0.2, 1.10, 1.5
SMALL = 1_000_000  # parameters of a network with which every function is tried for changes of the user's model
REPEATS, REPEATED_BELOW = 2, 1.5  # a network that takes fewer seconds is timed so often, and the least time counts


# --- recording


def package_of(name: str) -> str:
    """Name the package that a network of ``zoo.txt`` comes from."""
    return PACKAGES.get(name.partition("/")[0], "torchvision")


def numbers_of(tensor: Tensor) -> list[Any]:
    """Describe a tensor: shape, sum, sum of absolute values, norm, random projection, count of NaN and infinities."""
    values = tensor.detach().double().reshape(-1).numpy()
    finite = np.isfinite(values)
    values = np.where(finite, values, 0.0)
    projection = np.random.default_rng(0).standard_normal(len(values))
    described = (values.sum(), np.abs(values).sum(), np.sqrt(values @ values), values @ projection)
    return [list(tensor.shape), *(float(number) for number in described), int((~finite).sum())]


def numbers_of_all(tree: Any) -> list[list[Any]]:
    """Describe every tensor in nested containers."""
    return [numbers_of(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def weights_of(model: nn.Module) -> list[float]:
    """Describe a network's parameters and buffers: how many numbers, their sum and the sum of absolute values."""
    tensors = [tensor.detach().double() for tensor in (*model.parameters(), *model.buffers())]
    total = sum(float(tensor.sum()) for tensor in tensors)
    absolute = sum(float(tensor.abs().sum()) for tensor in tensors)
    return [sum(tensor.numel() for tensor in tensors), total, absolute]


def shapes_of(model: nn.Module) -> dict[str, str]:
    """Return the shape of every parameter and buffer, by name, as in "64x3x7x7"; of a single number "1"."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: "x".join(str(size) for size in tensor.shape) or "1" for name, tensor in named}


def as_ranges(numbers: Iterable[int]) -> str:
    """Write integers in a short way: "0:4 9*3" for 0 1 2 3 4 9 9 9."""
    values = list(numbers)
    words = []
    start = 0
    while start < len(values):
        end = start + 1
        step = values[end] - values[start] if end < len(values) else None
        if step in (0, 1):
            while end < len(values) and values[end] - values[end - 1] == step:
                end += 1
        first, last, count = values[start], values[end - 1], end - start
        words.append(str(first) if count == 1 else f"{first}*{count}" if step == 0 else f"{first}:{last}")
        start = end
    return " ".join(words)


def renumbered(ties: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Number tied channels by where they occur first, since only which numbers are equal means anything."""
    known: dict[int, int] = {}
    found = {}
    for name in sorted(ties):
        found[name] = as_ranges(known.setdefault(number, len(known)) for number in ties[name])
    return found


def share_of(share: Any) -> list[Any]:
    """Return a share as [channels asked for, segment of each channel, channels that stay of each segment]."""
    asked, segments, counts = dataclasses.astuple(share) if dataclasses.is_dataclass(share) else share
    return [asked, as_ranges(segments), list(counts)]


def pruned(model: nn.Module, inputs: Any, name: str) -> tuple[Any, nn.Module | None, list[float]]:
    """Return the groups, the dense network after random masks, and the processor's seconds that each of both took."""
    torch.manual_seed(0)
    start = time.process_time()
    groups = nni_topo.dependency_groups(model, inputs, asked_of(name))
    seconds = [time.process_time() - start]
    if not groups:
        return groups, None, [*seconds, 0.0]
    pruner = nni_topo.RandomPruner(model, groups, seed=0)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    torch.manual_seed(0)
    start = time.process_time()
    dense = nni_topo.to_dense(model, inputs, masks, check=False)
    seconds.append(time.process_time() - start)
    return groups, dense, seconds


@contextlib.contextmanager
def forwards_counted(last: int | None = None) -> Iterator[list[int]]:
    """Count the calls of modules within a block; the one numbered ``last`` is interrupted as by Ctrl-C."""
    count = [0]

    def hook(module: nn.Module, args: Any) -> None:
        count[0] += 1
        if count[0] == last:
            raise KeyboardInterrupt

    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def changes(name: str, options: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return what differs in a user's model after functions and after an interruption of each, and what was refused."""
    model, inputs = build(name, options)
    draw, found, refused = random.Random(name), list[str](), list[str]()
    groups, masks = nni_topo.dependency_groups(model, inputs, asked_of(name)), dict[str, Any]()

    def pruning() -> None:
        pruner = nni_topo.TopologicalPruner(model, groups, example_inputs=inputs)
        try:
            masks.update(pruner.compress()[1])
        finally:
            pruner.unwrap_model()

    verbs: dict[str, Callable[[], object]] = {
        "dependency_groups": lambda: nni_topo.dependency_groups(model, inputs, asked_of(name)),
        "pruning": pruning,
        "to_dense": lambda: nni_topo.to_dense(model, inputs, masks),
    }
    if not groups:
        del verbs["pruning"], verbs["to_dense"]
    elif sum(parameter.numel() for parameter in model.parameters()) <= SMALL:
        verbs |= {
            "compensate": lambda: nni_topo.compensate(model, masks, [inputs]),
            "distill": lambda: nni_topo.distill(nni_topo.to_dense(model, inputs, masks), model, [inputs], steps=1),
            "shrink": lambda: nni_topo.shrink(model, [inputs], {"flops": 0.7}, distill=False, round_to=1),
            "export": lambda: nni_topo.export(model, Path(folder) / "net.pt2", inputs, "torch.export"),
        }
    with tempfile.TemporaryDirectory() as folder:
        for verb, call in verbs.items():
            last, before = None, snapshot(model)
            for what in (verb, f"{verb}, interrupted"):
                with forwards_counted(last) as count:
                    try:
                        call()
                    except NniTopoError as error:
                        refused.append(f"{what}: {brief(str(error))}")
                    except KeyboardInterrupt:
                        if last is None:
                            raise
                after = snapshot(model)
                found += [f"{what}: {part}" for part, value in before.items() if after[part] != value]
                if not count[0]:
                    break
                last, before = draw.randint(1, count[0]), after
    return found, refused


def measure(name: str, options: dict[str, str], *, timed: bool = True) -> Record:
    """Record one network."""
    model, inputs = build(name, options)
    versions = {package: importlib.metadata.version(package) for package in dict.fromkeys(["torch", package_of(name)])}
    record: Record = {
        "versions": versions,
        "inputs": numbers_of_all(inputs),
        "weights": weights_of(model),
    }
    groups, dense, seconds = pruned(model, inputs, name)
    shapes = shapes_of(model if dense is None else dense)
    sizes = {key: [int(size) for size in shape.split("x")] for key, shape in shapes.items()}
    record |= {
        "channels": channels_left(model, sizes, asked_of(name)[0]["op_types"]),
        "entries": [dict(entry) for entry in groups],
        "skipped": dict(groups.skipped),
        "named": sorted(groups.named),
        "ties": renumbered(groups.ties),
        "shares": {layer: share_of(share) for layer, share in groups.shares.items()},
    }
    if dense is not None:
        report: Any = dense.report
        record |= {
            "shapes": shapes,
            "kept": {row.name: row.reason for row in report.kept},
            "kept_counts": {row.name: row.kept for row in report.kept},
            "stale": dict(report.stale),
            "notes": list(report.notes),
            "parameters": sum(parameter.numel() for parameter in dense.parameters()),
        }
        dense = dense.double()
        doubled = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
        with torch.no_grad():
            record["outputs"] = numbers_of_all(run(dense, doubled))
        if isinstance(doubled, Tensor):
            record["macs"] = zoo.count_macs(dense, doubled)
    del model, dense, groups
    if timed and sum(seconds) < REPEATED_BELOW:
        for _ in range(REPEATS - 1):
            again = pruned(*build(name, options), name)[2]
            seconds = [min(both) for both in zip(seconds, again, strict=True)]
    record["seconds"] = [round(each, 4) for each in seconds]
    if timed:
        record["changed"], record["refused"] = changes(name, options)
    return record


def record_networks(options: argparse.Namespace) -> None:
    """Record the networks that a file lacks: quick ones first, detectors and videos, which take longest, last."""
    print(f"nni_topo: {Path(nni_topo.__file__).parent}", flush=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of PyTorch's, about what the networks are made of
    listed = dict(entries())
    chosen = [name for name in listed if not options.only or name in options.only]
    if options.quick:
        chosen = [name for name in chosen if name in QUICK]
    if unknown := set(options.only or ()) - listed.keys():
        raise SystemExit(f"--only takes names of zoo.txt, got {', '.join(sorted(unknown))}")
    places = {name: place for place, name in enumerate(listed)}
    chosen.sort(key=lambda name: (name not in QUICK, name.startswith(("detection/", "video/")), places[name]))
    done = {name for name, record in read_lines(options.out).items() if record["status"] != NOT_INSTALLED}
    jobs = []
    for name in chosen:
        if name in done:
            continue
        if importlib.util.find_spec(package_of(name)) is None:
            append_line(options.out, {"model": name, "status": NOT_INSTALLED})
            print(f"{name}: {NOT_INSTALLED}", flush=True)
            continue
        jobs.append((name, functools.partial(measure, name, listed[name])))
    # What is imported or compiled at the first call counts for no network.
    measure("own/unet", {}, timed=False)
    start = time.monotonic()
    for record in run_each(jobs, memory=options.memory, timeout=options.timeout, at_once=options.jobs):
        append_line(options.out, record)
        taken = " + ".join(f"{each:.2f}" for each in record.get("seconds", ()))
        print(f"{record['model']}: {record['status']} {taken} (all {record.get('cpu_seconds', 0):.1f} s)", flush=True)
    print(f"{len(jobs)} networks in {time.monotonic() - start:.0f} s")


# --- comparing


def read_records(path: Path) -> dict[str, Record]:
    """Read the records of a file, packed or not, by network."""
    if path.suffix != ".gz":
        return read_lines(path)
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        records = [json.loads(line) for line in stream]
    return {record["model"]: record for record in records}


def different_keys(what: str, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Say which names only one of two mappings holds, and which values differ."""
    found = [f"{what}: {name} is missing, it was {expected[name]}" for name in expected if name not in actual]
    found += [f"{what}: {name} is new: {actual[name]}" for name in actual if name not in expected]
    for name in expected:
        if name in actual and expected[name] != actual[name]:
            found.append(f"{what}: {name} was {expected[name]}, is {actual[name]}")
    return found


def different_entries(expected: list[Record], actual: list[Record]) -> list[str]:
    """Say which entries of a config_list differ: by layer, then in their order."""
    by_layer = [{", ".join(entry["op_names"]): entry for entry in each} for each in (expected, actual)]
    if found := different_keys("entries", *by_layer):
        return found
    if expected != actual:
        return [f"entries: the order was {list(by_layer[0])}, is {list(by_layer[1])}"]
    return []


def different_numbers(what: str, expected: list[list[Any]], actual: list[list[Any]]) -> list[str]:
    """Say which tensors differ, as `numbers_of` describes them, by more than the tolerance."""
    if len(expected) != len(actual):
        return [f"{what}: were {len(expected)} tensors, are {len(actual)}"]
    found = []
    for place, (one, other) in enumerate(zip(expected, actual, strict=True)):
        if one[0] != other[0] or one[5] != other[5]:
            found.append(f"{what}: tensor {place} was {one[0]} with {one[5]} not finite, is {other[0]} with {other[5]}")
            continue
        _, _, absolute, norm, _, _ = one
        scales = {"sum": absolute, "absolute sum": absolute, "norm": norm, "projection": norm}
        for (kind, scale), before, after in zip(scales.items(), one[1:5], other[1:5], strict=True):
            if not abs(after - before) <= OUTPUT_TOLERANCE * scale:
                relative = abs(after - before) / scale if scale else math.inf
                found.append(
                    f"{what}: tensor {place} differs by {relative:.1e} in its {kind}: was {before}, is {after}"
                )
                break
    return found


def differences(expected: Record, actual: Record, *, reasons: bool = False) -> list[str]:
    """List how a network's record differs from the reference, but for the times.

    Parameters
    ----------
    expected, actual : dict
        Records of one network.
    reasons : bool, default=False
        Whether another text of a reason is a difference; without it only other layers are.
    """
    statuses = [record["status"] for record in (expected, actual)]
    if statuses[0] != statuses[1]:
        # Of an error the class counts, for its text may be worded anew.
        if reasons or statuses[0].partition(":")[0] != statuses[1].partition(":")[0]:
            return [f"status: was {statuses[0]}, is {statuses[1]}"]
        return []
    if statuses[0] != "ok":
        return []
    (count, total, absolute), weights = expected["weights"], actual["weights"]
    same_weights = count == weights[0] and all(
        abs(after - before) <= OUTPUT_TOLERANCE * absolute
        for before, after in zip((total, absolute), weights[1:], strict=True)
    )
    others = different_numbers("inputs", expected["inputs"], actual["inputs"])
    if not same_weights:
        others.append(f"weights: were {expected['weights']}, are {weights}")
    if others:
        return [f"{OTHER_WEIGHTS}, so nothing else is compared: {'; '.join(others)}"]
    found = different_entries(expected["entries"], actual["entries"])
    for key in ("skipped", "kept"):
        before, after = expected.get(key, {}), actual.get(key, {})
        if not reasons:
            before, after = dict.fromkeys(before, "listed"), dict.fromkeys(after, "listed")
        found += different_keys(key, before, after)
    for key in ("ties", "shares", "channels", "shapes", "kept_counts", "stale"):
        found += different_keys(key, expected.get(key, {}), actual.get(key, {}))
    for key in ("named", "parameters", "macs", *(["notes"] if reasons else [])):
        if expected.get(key) != actual.get(key):
            found.append(f"{key}: was {expected.get(key)}, is {actual.get(key)}")
    found += [f"the user's model has changed: {each}" for each in actual.get("changed", ())]
    if len(expected.get("notes", ())) != len(actual.get("notes", ())):
        found.append(f"notes: were {expected.get('notes')}, are {actual.get('notes')}")
    return found + different_numbers("outputs", expected.get("outputs", []), actual.get("outputs", []))


def changed_texts(expected: Record, actual: Record) -> list[tuple[str, str]]:
    """List the pairs of an old and a new reason, of the layers that both records hold; places are left out."""
    found = []
    for key in ("skipped", "kept"):
        before, after = expected.get(key, {}), actual.get(key, {})
        changed = [layer for layer in before if layer in after and before[layer] != after[layer]]
        found += [(brief(before[layer]), brief(after[layer])) for layer in changed]
    before_notes, after_notes = expected.get("notes", []), actual.get("notes", [])
    if len(before_notes) == len(after_notes):
        pairs = zip(before_notes, after_notes, strict=True)
        found += [(brief(before), brief(after)) for before, after in pairs if before != after]
    return found


def different_times(expected: Mapping[str, Record], actual: Mapping[str, Record]) -> list[str]:
    """Compare the times of the networks that both files hold; print the medians, and list what is over the limits."""
    ratios, by_step = {}, []
    for name in expected.keys() & actual.keys():
        if expected[name]["status"] != "ok" or actual[name]["status"] != "ok":
            continue
        before, after = expected[name]["seconds"], actual[name]["seconds"]
        if sum(before) >= LEAST_SECONDS:
            ratios[name] = sum(after) / sum(before)
            by_step.append([new / old for old, new in zip(before, after, strict=True) if old > 0])
    if not ratios:
        print(f"times: no network takes {LEAST_SECONDS} s, so none is compared")
        return []
    median = statistics.median(ratios.values())
    steps = [[step[place] for step in by_step if len(step) > place] for place in range(2)]
    shown = [f"{statistics.median(step):.2f}" if step else "none" for step in steps]
    print(
        f"times: median ratio {median:.2f} of {len(ratios)} networks that take {LEAST_SECONDS} s or more "
        f"(groups {shown[0]}, dense {shown[1]}), largest {max(ratios.values()):.2f}"
    )
    found = [f"times: the median ratio is {median:.2f}, more than {MEDIAN_RATIO}"] if median > MEDIAN_RATIO else []
    for name, ratio in sorted(ratios.items(), key=lambda pair: -pair[1]):
        if ratio > LARGEST_RATIO:
            before, after = (sum(each[name]["seconds"]) for each in (expected, actual))
            found.append(f"{name}: times: {ratio:.2f} times as long: was {before:.2f} s, is {after:.2f} s")
    return found


def compare(options: argparse.Namespace) -> int:
    """Print all differences of two files; return the exit status."""
    reference, records = read_records(options.reference), read_records(options.file)
    if options.only:
        records = {name: record for name, record in records.items() if name in options.only}
    missing = [name for name, record in records.items() if record["status"] == NOT_INSTALLED]
    unknown = [name for name in records if name not in reference or reference[name]["status"] == NOT_INSTALLED]
    shared = [name for name in records if name not in missing and name not in unknown]
    found, texts, versions = [], Counter[tuple[str, str]](), Counter[str]()
    for name in shared:
        expected, actual = reference[name], records[name]
        found += [f"{name}: {each}" for each in differences(expected, actual, reasons=options.reasons)]
        texts.update(changed_texts(expected, actual))
        for package, version in expected.get("versions", {}).items():
            other = actual.get("versions", {}).get(package, version)
            if other != version:
                versions[f"{package} was {version}, is {other}"] += 1
    for (before, after), count in texts.most_common():
        print(f"reason worded anew, {count} times: {before!r} -> {after!r}")
    for text, count in versions.items():
        print(f"another version, {count} networks: {text}")
    if not options.without_times:
        found += different_times(reference, {name: records[name] for name in shared})
    for line in found:
        print(line)
    if missing:
        print(f"not compared, {NOT_INSTALLED}: {', '.join(missing)}")
    if unknown:
        print(f"not compared, not in the reference: {', '.join(unknown)}")
    print(f"{len(found)} differences in {len(shared)} of the {len(reference)} networks of the reference")
    return 1 if found or not shared else 0


def prunable(record: Record) -> dict[str, str]:
    """Say of each layer of a record whether it can lose channels: "can go", with what stays, or the reason."""
    layers = {layer: f"stays: {reason}" for layer, reason in record.get("skipped", {}).items()}
    for layer in (name for entry in record.get("entries", ()) for name in entry["op_names"]):
        count = record.get("kept_counts", {}).get(layer)
        layers[layer] = "can go"
        if count is not None:
            layers[layer] += f" but for {count} masked channels: {record['kept'][layer]}"
    return layers


def list_layers(options: argparse.Namespace) -> None:
    """Print the layers that one of two records can prune and the other can't, by network."""
    old, new = read_records(options.reference), read_records(options.file)
    counts, shared = Counter[str](), [network for network in old if network in new]
    for network in shared:
        before, after = prunable(old[network]), prunable(new[network])
        for layer in sorted(before.keys() | after.keys()):
            pair = before.get(layer, "no such layer"), after.get(layer, "no such layer")
            kinds = [text.partition(":")[0] for text in pair]
            counts["layers that can go then"] += kinds[0].startswith("can")
            counts["layers that can go now"] += kinds[1].startswith("can")
            if kinds[0] != kinds[1]:
                print(f"{network}: {layer}: {pair[0]} -> {pair[1]}")
        sizes = old[network].get("parameters"), new[network].get("parameters")
        if sizes[0] != sizes[1]:
            print(f"{network}: parameters of the dense network: {sizes[0]} -> {sizes[1]}")
    print(f"{len(shared)} networks; {', '.join(f'{text}: {count}' for text, count in counts.items())}")


def check(options: argparse.Namespace) -> int:
    """Print what stays in a record that must go; return the exit status."""
    rows, records = read_table(), read_records(options.file)
    found = [f"{name}: {text}" for name, record in records.items() for text in rows[name].problems(record["channels"])]
    print("\n".join([*found, f"{len(found)} problems in {len(records)} networks"]))
    return 1 if found else 0


def pack(options: argparse.Namespace) -> None:
    """Write the records of a file compressed, in the order of ``zoo.txt``; the same records give the same bytes."""
    records = read_records(options.file)
    names = [name for name, _ in entries() if name in records]
    left_out = ("peak_gigabytes", "cpu_seconds")  # differ from run to run, and nobody compares them
    lines = []
    for name in names:
        kept = {key: value for key, value in records[name].items() if key not in left_out}
        lines.append(json.dumps(kept, separators=(",", ":")) + "\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(gzip.compress("".join(lines).encode(), 9, mtime=0))
    print(f"{len(names)} networks, {options.out.stat().st_size} bytes")


def main(arguments: list[str] | None = None) -> int:
    """Record, compare or pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record", help="record the networks that a file lacks")
    recording.add_argument("--out", type=Path, required=True, help="lines of finished networks")
    recording.add_argument("--only", nargs="*", help="names of zoo.txt, default all")
    recording.add_argument("--quick", action="store_true", help=f"{len(QUICK)} networks of all families, in a minute")
    recording.add_argument("--jobs", type=int, default=1, help="processes at a time, default 1")
    recording.add_argument("--timeout", type=float, default=600.0, help="processor seconds a network, default 600")
    recording.add_argument("--memory", type=float, default=14.0, help="gibibytes a process, default 14")
    comparing = verbs.add_parser("compare", help="print every difference of two files")
    comparing.add_argument("reference", type=Path)
    comparing.add_argument("file", type=Path)
    comparing.add_argument("--only", nargs="*", help="names of zoo.txt, default all that FILE holds")
    comparing.add_argument("--reasons", action="store_true", help="other texts of reasons are differences too")
    comparing.add_argument("--without-times", action="store_true", help="compare no times, as on another machine")
    listing = verbs.add_parser("layers", help="list the layers that only one of two files can prune")
    listing.add_argument("reference", type=Path)
    listing.add_argument("file", type=Path)
    checking = verbs.add_parser("check", help="print what stays that must go")
    checking.add_argument("file", type=Path)
    packing = verbs.add_parser("pack", help="compress a file for the repository")
    packing.add_argument("file", type=Path)
    packing.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    if options.verb == "compare":
        return compare(options)
    if options.verb == "check":
        return check(options)
    if options.verb == "pack":
        pack(options)
    elif options.verb == "layers":
        list_layers(options)
    else:
        record_networks(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
