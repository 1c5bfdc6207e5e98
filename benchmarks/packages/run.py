"""Make every class of the list smaller, by half of its multiply-accumulates, as a user does it: ``make packages``.

    python -m benchmarks.packages.run --out runs/packages.jsonl
    python -m benchmarks.packages.run --out runs/packages.jsonl --only monai timm/resnet.test_resnet --again

Each class is built with random weights and goes through ``nni_topo.shrink(model, batches, {"flops": 0.5})`` with its
default layers, groups and checks. Two things differ from the default call. The channels are drawn at random, by a
pruner that takes the budget in the same way as the default one, because selecting by reconstruction takes longer and
decides nothing here. And weights are neither reconstructed nor distilled: then the smaller network must equal the
masked one.

For each class a line of JSON says: whether it runs or is refused, with the error; how many channels of the default
layers can go, and of the requested ones how many went, with the reasons of those that stay; the share of the MACs that
is left, and that of one head, group or channel where it costs most; the largest difference between the dense and the
masked network, relative to the largest output, for other values, another batch and another size, as far as the unpruned
network takes them (in double precision and with the same choices among equal values where a plain run differs); and
whether the smaller network is written and read by the class's own ``save_pretrained`` and ``from_pretrained``, and by
``nni_topo.save`` and ``nni_topo.load``.

A class has a process of its own with a limit on its memory and its processor's time. Classes whose line is already in
the file are skipped, so a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import nni_topo
import nni_topo.runs.shrink
from benchmarks.networks.zoo_build import append_line, read_lines, run_each
from benchmarks.networks.zoo_nets import lively
from benchmarks.networks.zoo_reference import difference
from benchmarks.packages.classes import PACKAGES, listed
from benchmarks.packages.examples import Inputs, Listed
from benchmarks.packages.report import EQUAL
from nni_topo.errors import ConfigError, NniTopoError
from nni_topo.network.runtime.choices import ChoicesNoted, ChoicesRepeated
from nni_topo.network.runtime.copies import in_double
from nni_topo.network.runtime.switches import DrawnInOrder
from nni_topo.runs.provenance import provenance

SHARE = 0.5
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase)


class Recorded(nni_topo.RandomPruner):
    """A pruner that draws channels, and leaves the masks for the comparison."""

    masks: ClassVar[dict[str, Any]] = {}

    def compress(self, *args: Any, **knobs: Any) -> Any:
        """Make the masks."""
        wrapped, masks = super().compress(*args, **knobs)
        Recorded.masks = masks
        return wrapped, masks

    def masks_for(self, budget: Any) -> Any:
        """Make the masks for a budget."""
        Recorded.masks = super().masks_for(budget)
        return Recorded.masks


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Call a network without gradients, with the same random numbers every time."""
    torch.manual_seed(0)
    inputs = tree_map_only(Tensor, torch.clone, inputs)  # a forward may change them
    with torch.no_grad(), DrawnInOrder():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def redrawn(inputs: Inputs, seed: int) -> Inputs:
    """Return inputs of the same shapes with other floating-point numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(values: Tensor) -> Tensor:
        if not values.is_floating_point() or values.is_sparse or values.unique().numel() <= 2:
            return values  # a mask of zeros and ones stays one
        return values + 0.3 * values.std() * torch.randn(values.shape, generator=generator).to(values)

    changed: Inputs = tree_map_only(Tensor, draw, inputs)
    return changed


def resized(inputs: Inputs, size: int, new: int, first: bool) -> Inputs:
    """Return inputs in which every dimension of a size has another: the first one of tensors, or one of the others."""

    def resize(values: Any) -> Any:
        if not isinstance(values, Tensor) or values.is_sparse:
            return values
        for d in range(values.dim()):
            if values.shape[d] == size and (d == 0) == first:
                places = torch.arange(new) * size // new
                values = values.index_select(d, places)
        return values

    changed: Inputs = tree_map(resize, inputs)
    return changed


def other_inputs(model: nn.Module, inputs: Inputs) -> dict[str, Inputs]:
    """Return the inputs for the comparison: another batch and, if the network takes it, another size."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    others: dict[str, Inputs] = {"other values": redrawn(inputs, 7)}
    batch = len(tensors[0])
    sizes = sorted({size for tensor in tensors for size in tensor.shape[1:] if size > 3}, reverse=True)
    tried = [("batch", batch, batch + 1, True), *(("size", size, size * 2, False) for size in sizes)]
    tried += [("size", size, size * 3 // 4, False) for size in sizes]
    for what, size, new, first in tried:
        if what in others:
            continue
        changed = redrawn(resized(inputs, size, new, first), 8)
        try:
            outputs = run(model, changed)
        except Exception:  # a network may take one size alone
            continue
        if all(bool(leaf.isfinite().all()) for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)):
            others[what] = changed
    return others


def largest_step(model: nn.Module, inputs: Inputs, masks: dict[str, Any]) -> float:
    """Return the share of the MACs that one head, group or channel takes where it takes most.

    The unit of a layer is the greatest common divisor of the runs of equal entries in its mask. Layers with the same
    mask lose their channels together.
    """
    macs: dict[str, float] = {}
    named = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}

    def count(module: nn.Module, args: Any, output: Any, name: str) -> None:
        while isinstance(output, tuple):  # a packed sequence is one too
            output = output[0]
        if isinstance(module, nn.RNNBase):
            weights = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
            macs[name] = macs.get(name, 0.0) + weights * output.numel() / output.shape[-1]
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            macs[name] = macs.get(name, 0.0) + module.weight[0].numel() * args[0].numel()
        else:
            macs[name] = macs.get(name, 0.0) + module.weight[0].numel() * output.numel()

    hooks = [
        module.register_forward_hook(functools.partial(count, name=name), with_kwargs=False)
        for name, module in named.items()
    ]
    try:
        run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    steps: dict[tuple[Any, ...], float] = {}
    for name, targets in masks.items():
        mask = targets.get("weight")
        module = named.get(name)
        if isinstance(module, nn.RNNBase) and name in macs:  # a unit of one layer, its gates and what reads it
            steps[(name,)] = 2 * macs[name] / (module.hidden_size * module.num_layers)
            continue
        if mask is None or module is None or name not in macs:
            continue
        mask = mask.expand_as(module.weight)
        d = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
        rows = mask.movedim(d, 0).flatten(1).any(1).tolist()
        unit = math.gcd(*(len(list(run_of_rows)) for _, run_of_rows in groupby(rows)))
        steps[tuple(rows)] = steps.get(tuple(rows), 0.0) + macs[name] * unit / len(rows)
    total = sum(macs.values())
    return max(steps.values(), default=0.0) / total if total else 0.0


def saved(model: nn.Module, small: nn.Module, fresh: Any, inputs: Inputs, folder: Path) -> dict[str, str]:
    """Write and read a network by its class's own means and by ours: "yes" or why not, by means."""
    expected = run(small, inputs)

    def outcome(read: Any) -> str:
        try:
            again = read()
            off = difference(expected, run(again.eval(), inputs))
        except Exception as error:  # of any kind, by code of other packages
            return " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return "yes" if off <= 1e-4 else f"outputs differ by {off:.2g}"

    def ours() -> Any:
        nni_topo.save(small, folder / "small.safetensors")
        try:
            return nni_topo.load(folder / "small.safetensors", fresh())
        except ConfigError:  # weights that another tensor was computed from
            return nni_topo.load(folder / "small.safetensors", nni_topo.as_torch_layers(fresh()))

    def own() -> Any:
        if type(model).__module__.startswith("transformers."):
            nni_topo.save_pretrained(small, folder / "own")
        else:
            small.save_pretrained(str(folder / "own"))
        return type(model).from_pretrained(str(folder / "own"))

    means = {"nni_topo": outcome(ours)}
    if hasattr(model, "save_pretrained") and hasattr(type(model), "from_pretrained"):
        means["own"] = outcome(own)
    return means


def apart(masked: nn.Module, small: nn.Module, inputs: Inputs) -> tuple[float, float]:
    """Return by how much a dense network differs from the masked one: in the end, and in a plain run.

    If they differ in a plain run, they are run in double precision, where the rounding of a deep network with random
    weights isn't seen, and the dense one repeats the masked one's choices among equal values, such as the scores of
    boxes.
    """
    plain = difference(run(masked, inputs), run(small, inputs))
    if plain <= EQUAL:
        return plain, plain
    pair: tuple[Any, Any] = masked, small
    try:
        pair = in_double(masked).eval(), in_double(small).eval()
        inputs_then = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
        run(pair[0], inputs_then)
    except Exception:  # a forward may make its own tensors in single precision
        pair, inputs_then = (masked, small), inputs
    with ChoicesNoted() as noted:
        expected = run(pair[0], inputs_then)
    with ChoicesRepeated(noted.choices):
        actual = run(pair[1], inputs_then)
    return difference(expected, actual), plain


def measure(one: Listed) -> dict[str, Any]:
    """Make one class smaller, and say what came of it."""

    def fresh() -> tuple[nn.Module, Inputs]:
        torch.manual_seed(0)
        network, inputs = one.build()
        return network.eval(), inputs

    record: dict[str, Any] = {}
    try:
        model, inputs = fresh()
        run(model, inputs)
        lively(model)
        run(model, inputs)
    except Exception as error:  # what the package or its example needs isn't here
        return record | {"outcome": "not built", "error": short(error)}
    record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    batches = [(redrawn(inputs, seed),) for seed in range(4)]  # in a tuple: several arguments aren't inputs and labels
    pruner = f"{Recorded.__module__}:{Recorded.__qualname__}"
    try:
        small = nni_topo.shrink(model, batches, {"flops": SHARE}, pruner=pruner, compensate=None, distill=False)
    except Exception as error:  # anything else than an error of the package is a fault of the package
        kind = "refused" if isinstance(error, NniTopoError) else "raw error"
        return record | {"outcome": kind, "error": short(error)}
    report: Any = small.report
    rows = report.layers.rows
    before = {row.name: row.before for row in rows}
    record |= {
        "outcome": "runs",
        "left": report.budget.left,
        "why": report.budget.why,
        "requested": sum(row.before - row.asked for row in rows),
        "removed": sum(row.before - row.after for row in rows),
        "kept": {row.name: row.reason for row in report.layers.kept},
        "whole": {name: str(why) for name, why in report.whole.items()},
        "channels": {name: before[name] for name in report.whole if name in before} | {"all": sum(before.values())},
        "undescribed": report.undescribed,
    }
    if not tree_leaves(Recorded.masks):
        return record
    record["step"] = largest_step(nni_topo.as_torch_layers(model), inputs, Recorded.masks)
    try:
        whole = nni_topo.as_torch_layers(model)  # whose masks these are
        masked = nni_topo.masked_model(whole, inputs, Recorded.masks, reconcile=True).eval()
        small.eval()
        others = other_inputs(model, inputs)
        found = {what: apart(masked, small, x) for what, x in others.items()}
        record["differences"] = {what: off for what, (off, _) in found.items()}
        record["plain differences"] = {what: plain for what, (off, plain) in found.items() if plain > off}
        record["change"] = difference(run(model, inputs), run(masked, inputs))
    except Exception as error:  # a difference in structure, or a size that the smaller network doesn't take
        record["differences"] = {short(error): math.inf}
    with tempfile.TemporaryDirectory() as folder:
        record["saved"] = saved(model, small, lambda: fresh()[0], inputs, Path(folder))
    return record


def short(error: BaseException) -> str:
    """Return an error's kind and text in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the classes whose line is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="lines of finished classes")
    parser.add_argument("--only", nargs="*", help="packages, or classes as package/class; default all")
    parser.add_argument("--again", action="store_true", help="run also classes whose line is in the file")
    parser.add_argument("--timeout", type=float, default=120.0, help="processor seconds a class, default 120")
    parser.add_argument("--memory", type=float, default=12.0, help="gibibytes a process, default 12")
    parser.add_argument("--at-once", type=int, default=1, help="processes at once, default 1")
    options = parser.parse_args(arguments)
    done = {} if options.again else read_lines(options.out)
    commit = provenance()["revision"]
    for package in PACKAGES:
        jobs = []
        for one in listed(package):
            name = f"{package}/{one.name}"
            if name not in done and (not options.only or package in options.only or name in options.only):
                jobs.append((name, functools.partial(measure, one)))
        gc.collect()
        gc.freeze()  # else every collection in a forked process goes through all that was imported
        for record in run_each(jobs, memory=options.memory, timeout=options.timeout, at_once=options.at_once):
            append_line(options.out, {**record, "commit": commit})
            print(record["model"], record["status"], record.get("outcome", ""), flush=True)


if __name__ == "__main__":
    main()
