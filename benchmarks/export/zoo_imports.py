"""Which networks of ``zoo.txt`` come back from a file, and whether their channels are grouped as in the source.

    python -m benchmarks.export.zoo_imports --out runs/zoo_imports.jsonl

exports sixty networks with a free batch by each of PyTorch's exporters (``torch.export``, ONNX by ``dynamo=True`` and
the older exporter of ONNX), reads each file by `nni_topo.from_file`, and compares the outputs with the network's at
another batch size, and the groups with the network's: the widths of the layers of each group. A line per network and
exporter goes to the file; the same command goes on where it was stopped. ``--only`` takes the beginnings of names.
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
        return {name: value[torch.arange(count) % len(value)] for name, value in named.items()}

    return of_samples(2), of_samples(3)


def exported(model: nn.Module, call: dict[str, Tensor], exporter: str, folder: str) -> Any:
    """Export a network with a free batch; return the program or the file."""
    axes = {name: {0: "batch"} for name in call}
    hidden = io.StringIO()
    with redirect_stderr(hidden), redirect_stdout(hidden), torch.no_grad():
        if exporter == "older":
            path = f"{folder}/older.onnx"
            torch.onnx.export(
                model, (), path, kwargs=call, dynamo=False, input_names=list(call), dynamic_axes=axes
            )  # fmt: skip
            return path
        batch = torch.export.Dim("batch")
        shapes = {name: {0: batch} for name in call}
        program = torch.export.export(model, (), call, dynamic_shapes=shapes)
        if exporter == "export":
            return program
        path = f"{folder}/dynamo.onnx"
        torch.onnx.export(program, dynamo=True, verbose=False).save(path, external_data=False)  # type: ignore[union-attr]
        return path


def groups_of(model: nn.Module, call: dict[str, Tensor], name: str) -> list[tuple[int, ...]]:
    """Return the widths of the layers of each group, ascending."""
    groups = nni_topo.dependency_groups(model, call, asked_of(name))
    coupled: dict[Any, list[int]] = defaultdict(list)
    for place, entry in enumerate(groups):
        layer = model.get_submodule(entry["op_names"][0])
        if isinstance(layer, PRUNED):
            coupled[entry.get("dependency_group_id", place)].append(width(layer))
    return sorted(tuple(sorted(widths)) for widths in coupled.values())


def measure(name: str, options: dict[str, str], exporter: str) -> dict[str, Any]:
    """Export one network, read the file and compare."""
    model, inputs = build(name, options)
    call, other = calls_of(model, inputs)
    record: dict[str, Any] = {"name": name, "exporter": exporter}
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = exported(model, call, exporter, folder)
        except Exception as error:  # exporters fail in as many ways as there are networks
            return record | {"outcome": "not exported", "why": type(error).__name__}
        try:
            network = nni_topo.from_file(file)
        except nni_topo.errors.NniTopoError as error:
            return record | {"outcome": "refused", "why": " ".join(str(error).split())[:300]}
    with torch.no_grad():
        expected, actual = (
            [leaf for leaf in tree_leaves(net(**other)) if isinstance(leaf, Tensor)] for net in (model, network)
        )
    pairs = list(zip(expected, actual, strict=False))
    error = max(float((one - two).abs().max() / one.abs().max().clamp_min(1e-12)) for one, two in pairs)
    record |= {"error": error, "outcome": "equal" if error < 1e-3 and len(expected) == len(actual) else "differs"}
    of_source, of_file = (groups_of(net, call, name) for net in (model, network))
    record |= {"groups": len(of_source), "same_groups": of_source == of_file}
    if of_source != of_file:
        missing, added = Counter(of_source) - Counter(of_file), Counter(of_file) - Counter(of_source)
        record["why"] = (
            f"of the source alone {sorted(missing.elements())[:6]}, of the file {sorted(added.elements())[:6]}"
        )
    return record


def table(records: list[dict[str, Any]]) -> str:
    """Return the counts by exporter, and what isn't as from the source."""
    lines = [
        "| file | networks | exported | imported and equal | groups as from the source |",
        "|---|---:|---:|---:|---:|",
    ]
    for exporter, title in EXPORTERS.items():
        rows = [each for each in records if each["model"].endswith(f" {exporter}")]
        written = [each for each in rows if each.get("outcome") != "not exported"]
        equal = [each for each in written if each.get("outcome") == "equal"]
        counts = [len(rows), len(written), len(equal), sum(bool(each.get("same_groups")) for each in equal)]
        lines.append(f"| {title} | " + " | ".join(map(str, counts)) + " |")
    others = [
        f"- {each['model']}: {each.get('outcome', each['status'])}; {each.get('why', '')}".rstrip("; ")
        for each in records
        if each.get("outcome") != "not exported" and not each.get("same_groups")
    ]
    return "\n".join([*lines, "", *others])


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names")
    options = parser.parse_args()
    done, sizes = read_lines(options.out), dict(entries())
    jobs = [
        (f"{name} {exporter}", functools.partial(measure, name, sizes[name], exporter))
        for name in NETWORKS
        if name.startswith(tuple(options.only))
        for exporter in EXPORTERS
        if f"{name} {exporter}" not in done
    ]
    for record in run_each(jobs, memory=12, timeout=600):
        append_line(options.out, record)
        print(record, flush=True)
    print(table(list(read_lines(options.out).values())))


if __name__ == "__main__":
    main()
