"""What every pruner keeps of small trained networks, and what every recovery makes of it: whether a change is exact.

``python tools/selected.py record FILE`` computes it with the code that is imported. ``compare OLD NEW`` says where
masks differ, and how far weights do, as a share of the largest of their layer; the exit status is 1 where masks differ,
or weights by more than 1e-9. The golden record draws its masks at random, so it can't see a change of selection. Both
files must come from one machine: training and sums round differently on others. To compare with another commit, record
in a checkout of it: ``PYTHONPATH=CHECKOUT python tools/selected.py record FILE``.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nni_topo import zoo
from nni_topo.errors import NniTopoError
from nni_topo.pruners.registry import list_pruners, pruner_info
from nni_topo.recovery import list_recoveries
from nni_topo.runs.choices import CompensationChoice, DataChoice, ModelChoice, PrunerChoice, Target
from nni_topo.runs.run import Start, made_dense, prune_to_ratios, trained
from nni_topo.runs.widths import inner_layers

NETWORKS = ("lenet300", "small_cnn", "resnet20", "vit_small")
RECOVERED = ("l1", "reconstruction")
DEAR = ("genetic_weight",)  # minutes for one network of these: the first alone
RATIO, IMAGES, EXACT = 0.5, 256, 1e-9


def selected(start: Start, name: str) -> dict[str, Tensor]:
    """Return the masks of a pruner at half of every layer, and the weights after every recovery for some pruners."""
    needs = any(need.startswith("calibration") for need in pruner_info(name).needs)
    choice = PrunerChoice(name, calibration=IMAGES if needs else 0)
    ratios = dict.fromkeys(inner_layers(start.net, start.example), RATIO)
    done = prune_to_ratios(start, choice, Target("ratio", RATIO), ratios)
    tensors = {
        f"masks/{layer}.{part}": mask.bool().cpu()
        for layer, parts in done.masks.items()
        for part, mask in parts.items()
        if mask is not None
    }
    for method in list_recoveries() if name in RECOVERED else ():
        dense, _ = made_dense(start, done.masks, CompensationChoice(IMAGES, method), progress=False)
        tensors |= {f"{method}/{key}": value.detach().cpu() for key, value in dense.state_dict().items()}
    return tensors


def record(file: Path) -> None:
    """Write masks and weights of all networks and pruners."""
    content: dict[str, Any] = {}
    for network in NETWORKS:
        recipe = zoo.Recipe(epochs=2, batch_size=64, lr=0.01)
        start = trained(ModelChoice(network), DataChoice("digits", limit=512), recipe=recipe, progress=False)
        for name in list_pruners():
            if name in DEAR and network != NETWORKS[0]:
                continue
            try:
                content[f"{network}/{name}"] = selected(start, name)
            except NniTopoError as error:
                content[f"{network}/{name}"] = type(error).__name__
            print(network, name, flush=True)
    torch.save(content, file)


def compare(old: Path, new: Path) -> int:
    """Print the differences of two files; 1 if there is one that isn't rounding."""
    before, after = (torch.load(path, weights_only=True) for path in (old, new))
    is_other, farthest = False, 0.0
    for place in sorted(before.keys() | after.keys()):
        one, other = before.get(place), after.get(place)
        if not (isinstance(one, dict) and isinstance(other, dict)):
            if one != other:
                is_other = True
                print(f"{place}: {_outcome(one)}, now {_outcome(other)}")
            continue
        for name in sorted(one.keys() | other.keys()):
            found = _difference(one.get(name), other.get(name))
            farthest = max(farthest, found)
            if found > EXACT:
                is_other = True
                print(f"{place}/{name}: differs by {found:.2g}")
    print(f"{len(before)} selections; largest difference {farthest:.2g}")
    return int(is_other)


def _outcome(value: Any) -> str:
    return "masks" if isinstance(value, dict) else str(value)


def _difference(one: Tensor | None, other: Tensor | None) -> float:
    """Return 0 to 1: the share of masks that differ, or a weight's difference as a share of the largest weight."""
    if one is None or other is None or one.shape != other.shape:
        return 1.0
    if not one.is_floating_point():
        return float((one != other).double().mean())
    largest = float(one.abs().max()) if one.numel() else 0.0
    return (
        min(1.0, float((one.double() - other.double()).abs().max()) / largest) if largest else float(bool(other.any()))
    )


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("record").add_argument("file", type=Path)
    comparing = verbs.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.verb == "record":
        logging.disable(logging.WARNING)
        record(options.file)
        return 0
    return compare(options.old, options.new)


if __name__ == "__main__":
    sys.exit(main())
