"""Which networks of ``zoo.txt`` can be scripted, traced and exported, unpruned and with half of their channels.

    python -m benchmarks.export.zoo_exports --out runs/zoo_exports.jsonl

tries each way on the network and on its dense network of half of the channels (random masks): ``torch.jit.script``,
``torch.fx.symbolic_trace``, ``torch.export``, and the ONNX exporter that scripts, with a free number of samples and
with free sides of images. A way works if what comes out computes the same, in onnxruntime at another number of samples
and other sides. A line per network goes to the file; the same command goes on where it was stopped. ``--only`` takes
the beginnings of names.
"""

from __future__ import annotations

import argparse
import functools
import io
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.networks.zoo_build import append_line, asked_of, build, entries, read_lines, run_each

WAYS = {
    "script": "`torch.jit.script`",
    "fx": "`torch.fx`",
    "export": "`torch.export`",
    "samples": "ONNX, free samples",
    "sides": "ONNX, free sides",
}
LONGEST = 60  # seconds that a way may take


class FirstOutput(nn.Module):
    """A network of one input that gives the first tensor of its output alone, which ONNX can name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the first tensor."""
        return first_tensor(self.model(x))


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor in an output."""
    found: Tensor = next(each for each in torch.utils._pytree.tree_leaves(output) if isinstance(each, Tensor))
    return found


def by_onnx(model: nn.Module, x: Tensor, other: Tensor, free: dict[int, str]) -> bool:
    """Export with free sizes, and compare in onnxruntime at another size."""
    stream = io.BytesIO()
    torch.onnx.export(
        FirstOutput(model).eval(), (x,), stream, dynamo=False, input_names=["x"], output_names=["y"],
        dynamic_axes={"x": free, "y": {0: "samples"}},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": other.cpu().numpy()})
    return is_near(torch.from_numpy(found), first_tensor(model(other)))


def is_near(found: Tensor, wanted: Tensor) -> bool:
    """Tell whether outputs agree to a thousandth of the largest."""
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= 1e-3 * wanted.abs().max() + 1e-5)


def ways_that_work(model: nn.Module, inputs: Any) -> dict[str, bool]:
    """Try each way on a network."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    args = inputs if isinstance(inputs, tuple) else args
    with torch.no_grad():
        wanted = first_tensor(model(*args, **kwargs))
    tried: dict[str, Callable[[], bool]] = {
        "script": lambda: is_near(first_tensor(torch.jit.script(model)(*args, **kwargs)), wanted),
        "fx": lambda: is_near(first_tensor(torch.fx.symbolic_trace(model)(*args, **kwargs)), wanted),
        "export": lambda: is_near(
            first_tensor(torch.export.export(model, args, kwargs).module()(*args, **kwargs)), wanted
        ),
    }
    if len(args) == 1 and isinstance(args[0], Tensor) and args[0].is_floating_point():
        (x,) = args
        tried["samples"] = lambda: by_onnx(model, x, torch.cat([x, x, x]), {0: "samples"})
        if x.dim() == 4:
            larger = torch.rand(2, x.shape[1], x.shape[2] + 32, x.shape[3] + 64)
            tried["sides"] = lambda: by_onnx(model, x, larger, {0: "samples", 2: "height", 3: "width"})
    works = {}
    for way, attempt in tried.items():
        signal.alarm(LONGEST)
        try:
            with torch.no_grad():
                works[way] = attempt()
        except Exception:  # exporters fail in as many ways as there are networks
            works[way] = False
        finally:
            signal.alarm(0)
    return works


def measure(name: str, options: dict[str, str]) -> dict[str, Any]:
    """Try all ways on a network, unpruned and dense."""
    signal.signal(signal.SIGALRM, _too_long)
    model, inputs = build(name, options)
    groups = nni_topo.dependency_groups(model, inputs, asked_of(name))
    pruner = nni_topo.RandomPruner(model, groups, seed=0)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(model, inputs, masks, check=False)
    return {"unpruned": ways_that_work(model, inputs), "dense": ways_that_work(dense, inputs)}


def _too_long(*_: Any) -> None:
    raise TimeoutError


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names")
    options = parser.parse_args()
    done = read_lines(options.out)
    jobs = [
        (name, functools.partial(measure, name, sizes))
        for name, sizes in entries()
        if name.startswith(tuple(options.only)) and name not in done
    ]
    for record in run_each(jobs, memory=12, timeout=900):
        append_line(options.out, record)
        print(record, flush=True)
    print(table(list(read_lines(options.out).values())))


def table(records: list[dict[str, Any]]) -> str:
    """Return for each way on how many networks it works unpruned, and on how many of those dense."""
    ran = [record for record in records if record["status"] == "ok"]
    lines = ["| way | networks | works unpruned | works dense, of these | dense alone |", "|---|---:|---:|---:|---:|"]
    for way, title in WAYS.items():
        pairs = [(each["unpruned"][way], each["dense"].get(way, False)) for each in ran if way in each["unpruned"]]
        counts = [len(pairs), sum(one for one, _ in pairs), sum(one and other for one, other in pairs)]
        counts.append(sum(other and not one for one, other in pairs))
        lines.append(f"| {title} | " + " | ".join(map(str, counts)) + " |")
    lost = [
        each["model"]
        for each in ran
        if any(each["unpruned"][way] and not each["dense"].get(way) for way in WAYS if way in each["unpruned"])
    ]
    return "\n".join([*lines, "", f"Works unpruned and not dense: {', '.join(lost) or 'none'}."])


if __name__ == "__main__":
    main()
