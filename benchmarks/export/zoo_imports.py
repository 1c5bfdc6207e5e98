"""Which networks of ``zoo.txt`` come back from a file, and whether their channels are grouped as in the source.

    python -m benchmarks.export.zoo_imports --out runs/zoo_imports.jsonl

exports sixty networks with a free batch by each of PyTorch's exporters (``torch.export``, ONNX by ``dynamo=True`` and
the older exporter of ONNX), reads each file by `nni_topo.from_file`, and compares the outputs with the network's at
another batch size, and the groups with the network's: the widths of the layers of each group, in the order in which
layers and groups run first. A line per network and exporter goes to the file; the same command goes on where it was
stopped. ``--only`` takes the beginnings of names, ``--turn N`` a third of the networks, and ``--against`` the file of
an earlier run, whose good lines must be good again.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import io
import tempfile
from collections import Counter, defaultdict
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import nni_topo
from benchmarks.networks.zoo_build import append_line, asked_of, build, entries, read_lines, run_each
from benchmarks.networks.zoo_reference import PRUNED, width

EXPORTERS = {"export": "`torch.export`", "dynamo": "ONNX, `dynamo=True`", "older": "ONNX, the older exporter"}
# Chosen by family before the first run; the order is that of the runs.
NETWORKS = """own/unet own/conv1d own/conv3d own/group_norm_3d own/instance_norm own/squeeze_excite own/lstm own/gru
own/shared own/pixel_shuffle own/sliced own/written own/multihead_attention own/own_attention own/channel_shuffle
own/layer_scale own/words own/fixed_view torchvision/squeezenet1_1 torchvision/shufflenet_v2_x0_5 torchvision/mnasnet0_5
torchvision/mobilenet_v2 torchvision/mobilenet_v3_small torchvision/regnet_y_400mf torchvision/resnet18
transformers/bert transformers/roberta transformers/distilbert transformers/electra transformers/albert
transformers/mpnet transformers/t5 transformers/bart transformers/gpt2 transformers/gptj transformers/opt
transformers/llama transformers/mistral transformers/qwen2 transformers/phi transformers/falcon transformers/vit
transformers/deit transformers/beit transformers/dinov2 transformers/clip_vision transformers/clip_text
transformers/swin transformers/segformer transformers/convnext transformers/poolformer transformers/resnet
transformers/wav2vec2 transformers/whisper torchvision/efficientnet_b0 torchvision/densenet121
torchvision/convnext_tiny torchvision/swin_t torchvision/vit_b_32 segmentation/lraspp_mobilenet_v3_large""".split()  # noqa: SIM905


def calls_of(model: nn.Module, inputs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the inputs of a network by the names of its arguments, at two batch sizes."""
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, dict) else (inputs, {})
    args = args if isinstance(args, tuple) else (args,)
    named = {**inspect.signature(model.forward).bind(*args, **kwargs).arguments}
    named = {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def of_samples(count: int) -> dict[str, Tensor]:
        return {
            name: value[torch.arange(count) % len(value)] if value.dim() else value for name, value in named.items()
        }

    return of_samples(2), of_samples(3)


def exported(model: nn.Module, call: dict[str, Tensor], exporter: str, folder: str) -> Any:
    """Export a network with a free batch; return the program or the file."""
    axes = {name: {0: "batch"} for name, value in call.items() if value.dim()}
    hidden = io.StringIO()
    with redirect_stderr(hidden), redirect_stdout(hidden), torch.no_grad():
        if exporter == "older":
            path = f"{folder}/older.onnx"
            torch.onnx.export(
                model, (), path, kwargs=call, dynamo=False, input_names=list(call), dynamic_axes=axes
            )  # fmt: skip
            return path
        batch = torch.export.Dim("batch")
        shapes = {name: {0: batch} if value.dim() else None for name, value in call.items()}
        program = torch.export.export(model, (), call, dynamic_shapes=shapes)
        if exporter == "export":
            return program
        path = f"{folder}/dynamo.onnx"
        torch.onnx.export(program, dynamo=True, verbose=False).save(path, external_data=False)  # type: ignore[union-attr]
        return path


def groups_of(model: nn.Module, call: dict[str, Tensor], name: str) -> list[tuple[int, ...]]:
    """Return the widths of the layers of each group, in the order in which layers run first."""
    order = dict[str, int]()

    def note(path: str, *_: Any) -> None:
        order.setdefault(path, len(order))

    handles = [
        module.register_forward_pre_hook(functools.partial(note, path)) for path, module in model.named_modules()
    ]
    with torch.no_grad():
        model(**call)
    for handle in handles:
        handle.remove()
    coupled: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for place, entry in enumerate(nni_topo.dependency_groups(model, call, asked_of(name))):
        path = entry["op_names"][0]
        layer = model.get_submodule(path)
        if isinstance(layer, PRUNED):
            coupled[entry.get("dependency_group_id", place)].append((order.get(path, len(order)), width(layer)))
    return [tuple(size for _, size in layers) for layers in sorted(sorted(layers) for layers in coupled.values())]


def measure(name: str, options: dict[str, str]) -> dict[str, Any]:
    """Export one network by each exporter, read the files and compare."""
    model, inputs = build(name, options)
    call, other = calls_of(model, inputs)
    of_source = groups_of(model, call, name)
    with torch.no_grad():
        expected = [leaf for leaf in tree_leaves(model(**other)) if isinstance(leaf, Tensor)]
    rows = []
    for exporter in EXPORTERS:
        row: dict[str, Any] = {"name": name, "exporter": exporter, "groups": len(of_source)}
        try:
            row |= compared(model, name, exporter, (call, other), expected, of_source)
        except Exception as error:  # of any of the steps, for any of the networks
            row |= {"outcome": type(error).__name__, "why": " ".join(str(error).split())[:300]}
        rows.append(row)
    return {"rows": rows}


def compared(
    model: nn.Module,
    name: str,
    exporter: str,
    calls: tuple[dict[str, Tensor], dict[str, Tensor]],
    expected: list[Tensor],
    of_source: list[tuple[int, ...]],
) -> dict[str, Any]:
    """Export a network, read the file, and compare its outputs and groups with the network's."""
    call, other = calls
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = exported(model, call, exporter, folder)
        except Exception as error:  # exporters fail in as many ways as there are networks
            return {"outcome": "not exported", "why": type(error).__name__}
        try:
            network = nni_topo.from_file(file)
        except nni_topo.errors.NniTopoError as error:
            return {"outcome": "refused", "why": " ".join(str(error).split())[:300]}
    with torch.no_grad():
        actual = [leaf for leaf in tree_leaves(network(**other)) if isinstance(leaf, Tensor)]
    pairs = zip(expected, actual, strict=False)
    error = max(float((one - two).abs().max() / one.abs().max().clamp_min(1e-12)) for one, two in pairs)
    is_equal = error < 1e-3 and len(expected) == len(actual)
    of_file = groups_of(network, call, name)
    missing, added = Counter(of_source) - Counter(of_file), Counter(of_file) - Counter(of_source)
    row = {
        "error": error,
        "outcome": "equal" if is_equal else "differs",
        "same_groups": not missing and not added,
        "same_order": of_source == of_file,
    }
    if missing or added:
        row["why"] = f"of the source alone {sorted(missing.elements())[:6]}, of the file {sorted(added.elements())[:6]}"
    elif of_source != of_file:
        row["why"] = "the same groups in another order"
    return row


def is_good(record: dict[str, Any]) -> bool:
    """Tell whether a file gives the network and the groups of its source, or couldn't be made."""
    outcome = record.get("outcome")
    return outcome == "not exported" or (outcome == "equal" and bool(record.get("same_groups")))


def table(records: list[dict[str, Any]]) -> str:
    """Return the counts by exporter, and what isn't as from the source."""
    lines = [
        "| file | networks | exported | imported and equal | groups as from the source | in the same order |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for exporter, title in EXPORTERS.items():
        rows = [each for each in records if each["model"].endswith(f" {exporter}")]
        written = [each for each in rows if each.get("outcome") != "not exported"]
        equal = [each for each in written if each.get("outcome") == "equal"]
        alike = [sum(bool(each.get(key)) for each in equal) for key in ("same_groups", "same_order")]
        counts = [len(rows), len(written), len(equal), *alike]
        lines.append(f"| {title} | " + " | ".join(map(str, counts)) + " |")
    others = [
        f"- {each['model']}: {each.get('outcome', each['status'])}; {each.get('why', '')}".rstrip("; ")
        for each in records
        if each.get("outcome") != "not exported" and not each.get("same_order")
    ]
    return "\n".join([*lines, "", *others])


def main() -> int:
    """Parse the command line, run what is missing and print the table; 1 if a good line isn't good again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names")
    parser.add_argument("--turn", type=int, help="a third of the networks, which changes with the number")
    parser.add_argument("--against", type=Path, help="an earlier file of such lines")
    options = parser.parse_args()
    done, sizes = read_lines(options.out), dict(entries())
    names = [name for name in NETWORKS if name.startswith(tuple(options.only))]
    names = names if options.turn is None else names[options.turn % 3 :: 3]
    jobs = [
        (name, functools.partial(measure, name, sizes[name]))
        for name in names
        if any(f"{name} {exporter}" not in done for exporter in EXPORTERS)
    ]
    for record in run_each(jobs, memory=12, timeout=900):
        rows = record.pop("rows", None) or [{"exporter": exporter} for exporter in EXPORTERS]
        for row in rows:
            line = record | row | {"model": f"{record['model']} {row['exporter']}"}
            append_line(options.out, line)
            print(line, flush=True)
    records = read_lines(options.out)
    print(table(list(records.values())))
    before = {} if options.against is None else read_lines(options.against)
    worse = [name for name, record in records.items() if name in before and is_good(before[name]) > is_good(record)]
    print(*(f"worse than before: {name}" for name in worse), sep="\n")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
