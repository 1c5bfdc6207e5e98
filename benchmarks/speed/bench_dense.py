"""What dependency groups and a dense network cost, beside NNI's own ``ModelSpeedup`` and Torch-Pruning's whole pruning.

    python benchmarks/speed/bench_dense.py resnet50:128 vgg16:32 swin_t:224 vit_b_16:224 --out runs/dense.jsonl

A net of torchvision's and the side of its images (``vgg16:32`` is the zoo's own), or ``bert:32``, Transformers' BERT
and the length of its text: half of all convolutions and linear layers but the output's, by NNI's ``L1NormPruner``. Each
tool runs in processes of its own, in turns, and does its whole work twice: the first time in a process pays for what is
loaded then. Seconds are the processor's, on one thread, memory is what the process holds more than before at most. A
line a process goes to the file; the table has the least of all.

    python benchmarks/speed/bench_dense.py --out benchmarks/records/dense.jsonl --into benchmarks/results/speed.md

writes the table of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.tables import with_tables
from nni_topo.studies.tables import markdown_table

TOOLS = ("ours", "unchecked", "nni", "torch-pruning")  # unchecked: ours without its comparison with the masked network


def measure(net: str, tool: str) -> dict[str, Any]:
    """Time one tool on one network, in this process."""
    import torch
    import torchvision
    from nni.compression.pruning import L1NormPruner
    from nni.compression.speedup import ModelSpeedup

    import nni_topo
    from nni_topo import zoo
    from nni_topo.studies.baselines import KINDS, PREFIX, cut

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    name, size = net.split(":")
    heads: dict[str, int] = {}
    inputs: Any = torch.randn(1, 3, int(size), int(size))
    if name == "vgg16":
        model = zoo.create_model(name, num_classes=10, in_channels=3, image_size=int(size), seed=0)
    elif name == "bert":
        from transformers import BertConfig, BertModel

        model, inputs = BertModel(BertConfig()), torch.randint(0, 1000, (1, int(size)))
        asking = [n for n, _ in model.named_modules() if n.endswith((".query", ".key", ".value"))]
        heads = dict.fromkeys(asking, model.config.num_attention_heads)
    else:
        model = getattr(torchvision.models, name)(weights=None)
    model.eval()
    record: dict[str, Any] = {"net": net, "tool": tool}
    with torch.no_grad():
        timed(record, "forward", lambda: model(inputs))
    asked = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]
    layers = {n: module for n, module in model.named_modules() if isinstance(module, KINDS)}
    ratios = dict.fromkeys(list(layers)[:-1], 0.5)

    def selected(groups: Any) -> Any:
        pruner = L1NormPruner(model, groups)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        return masks

    def all_steps(again: str = "") -> None:
        gc.collect()  # of what was loaded before: one collection takes as long as a small network's dense step
        if tool == "torch-pruning":
            timed(record, f"whole{again}", lambda: cut(f"{PREFIX}-l1", model, inputs, ratios, heads))
            return
        groups = timed(record, f"groups{again}", lambda: nni_topo.dependency_groups(model, inputs, asked))
        masks = timed(record, f"select{again}", lambda: selected(groups))
        if tool == "nni":
            timed(record, f"dense{again}", lambda: ModelSpeedup(model, inputs, masks).speedup_model())
            return
        check = tool == "ours"
        timed(record, f"dense{again}", lambda: nni_topo.to_dense(model, inputs, masks, groups=groups, check=check))
        record[f"whole{again}"] = sum(record[f"{step}{again}"] for step in ("groups", "select", "dense"))

    all_steps()
    if tool != "nni":  # which changes the model
        all_steps(" again")
    return record


def timed(record: dict[str, Any], step: str, work: Callable[[], Any]) -> Any:
    """Note a step's seconds and the gibibytes that it takes more at most, as Linux counts them."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, start = _peak(), time.process_time()
    found = work()
    record[step], record[f"{step} GiB"] = time.process_time() - start, _peak() - before
    return found


def _peak() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def _send(net: str, tool: str, sender: Connection) -> None:
    try:
        sender.send(measure(net, tool))
    except Exception as error:  # the table says so
        sender.send({"net": net, "tool": tool, "failed": f"{type(error).__name__}: {str(error)[:80]}"})


def measured(net: str, tool: str) -> dict[str, Any]:
    """Measure in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(net, tool, sender))
    process.start()
    sender.close()
    try:
        record: dict[str, Any] = receiver.recv()
    except EOFError:
        record = {"net": net, "tool": tool, "failed": "its process ended"}
    process.join()
    return record


def table(records: list[dict[str, Any]]) -> str:
    """Return the least of all runs as Markdown."""
    head = ["net", "forward s", "groups s", "dense s", "unchecked s", "NNI's s", "NNI's / unchecked"]
    head += ["GiB", "NNI's GiB", "unchecked, whole s", "Torch-Pruning's s", "ratio", "ratio, again", "checked, again"]
    rows = []
    for net in dict.fromkeys(record["net"] for record in records):

        def least(tool: str, key: str, net: str = net) -> float:
            runs = [each for each in records if (each["net"], each["tool"]) == (net, tool)]
            return min((each[key] for each in runs if key in each), default=float("nan"))

        ours, unchecked, nni, other = TOOLS
        cells = [
            least(ours, "forward"), least(ours, "groups"), least(ours, "dense"), least(unchecked, "dense"),
            least(nni, "dense"), least(nni, "dense") / least(unchecked, "dense"), least(ours, "dense GiB"),
            least(nni, "dense GiB"), least(unchecked, "whole"), least(other, "whole"),
            least(unchecked, "whole") / least(other, "whole"),
            least(unchecked, "whole again") / least(other, "whole again"),
            least(ours, "whole again") / least(other, "whole again"),
        ]  # fmt: skip
        rows.append([net, *("" if cell != cell else f"{cell:.2f}" for cell in cells)])
    failed = {f"{each['net']}, {each['tool']}: {each['failed']}" for each in records if "failed" in each}
    return "\n\n".join([markdown_table(head, rows), *sorted(failed)])


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", help="NET:SIDE; none: the table of what is there")
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS, help="default: all")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each tool, in turns, default 2")
    parser.add_argument("--out", type=Path, required=True, help="lines of finished processes")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page whose table is replaced")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for net in options.nets:
        for tool in list(options.tools) * options.repeats:
            record = measured(net, tool)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    shown = table([json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()])
    if options.into is None:
        print(shown)
    else:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(with_tables(page, "benchmarks/speed/bench_dense.py", shown), encoding="utf-8")


if __name__ == "__main__":
    main()
