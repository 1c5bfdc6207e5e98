"""What each pruner makes of each key of a config_list, beside NNI's own pruner: the table of docs/config_list.md.

``python tests/config_keys.py`` (with the checkout in PYTHONPATH) writes the table; a test holds the page
against it.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo
from nni_topo.errors import NniTopoError
from nni_topo.pruners.registry import PRUNERS
from nni_topo.pruners.testing import toy_images, toy_knobs

PAGE = Path(__file__).parents[1] / "docs" / "config_list.md"
BEGIN, END = "<!-- pruners and keys: begin -->", "<!-- pruners and keys: end -->"
OWN = [info.name for info in PRUNERS.table.values() if info.origin == "nni_topo"]
CALIBRATED = "topological, calibration"
COLUMNS = [OWN[0], CALIBRATED, *OWN[1:]]
SEEDS = (0, 1)
BOTH = {"op_names": ["first", "second"]}
WEIGHT = ["weight"]
Entries = list[dict[str, Any]]


def both(ratio: float = 0.5, **keys: Any) -> Entries:
    """Return a config_list of one entry, for both convolutions."""
    return [{**BOTH, "sparse_ratio": ratio, **keys}]


def convolutions(**keys: Any) -> Entries:
    """Return a config_list of one entry, for layers by their type."""
    return [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, **keys}]


def one_limited(ratio: float, key: str, limit: float) -> Entries:
    """Return a global group of two layers, the first of which has a limit."""
    group = {"sparse_ratio": ratio, "global_group_id": "all"}
    return [{"op_names": ["first"], **group, key: limit}, {"op_names": ["second"], **group}]


def with_bias(**bias: float) -> Entries:
    """Return a config_list of a layer whose bias has a setting of its own."""
    return [{"op_names": ["first"], "target_settings": {"weight": {"sparse_ratio": 0.5}, "bias": bias}}]


# The key as the page names it, and config_lists that use it.
CASES: dict[str, list[Entries]] = {
    "`op_names`": [both()],
    "`op_types`": [convolutions()],
    "`op_types` beside `op_names`": [convolutions(op_names=["first", "third"])],
    "`op_names_re`": [[{"op_names_re": ["fi.*", "sec"], "sparse_ratio": 0.5}]],
    "`exclude_op_names`": [convolutions(exclude_op_names=["second"])],
    "`exclude_op_types`": [[{"op_names": ["first", "third"], "exclude_op_types": ["Linear"], "sparse_ratio": 0.5}]],
    "`exclude_op_names_re`": [convolutions(exclude_op_names_re=["sec.*"])],
    "`sparse_ratio`": [both(ratio) for ratio in (0.25, 0.4, 0.5, 0.75)],
    "`sparse_threshold`": [[{**BOTH, "sparse_threshold": 0.4}]],
    "`sparse_ratio` beside `sparse_threshold`": [both(sparse_threshold=0.4)],
    "`min_sparse_ratio` above the ratio": [both(0.25, min_sparse_ratio=limit) for limit in (0.5, 0.75)],
    "`min_sparse_ratio` beside `sparse_threshold`": [
        [{**BOTH, "sparse_threshold": 1e-9, "min_sparse_ratio": limit}] for limit in (0.5, 0.75)
    ],
    "`min_sparse_ratio` of all in a `global_group_id`": [both(0.25, min_sparse_ratio=0.5, global_group_id="all")],
    "`min_sparse_ratio` of one in a `global_group_id`": [one_limited(0.25, "min_sparse_ratio", 0.75)],
    "`min_sparse_ratio` in a `dependency_group_id`": [both(0.25, min_sparse_ratio=0.5, dependency_group_id="pair")],
    "`max_sparse_ratio` below the ratio": [both(max_sparse_ratio=limit) for limit in (0.25, 0.4)],
    "`max_sparse_ratio` beside `sparse_threshold`": [
        [{**BOTH, "sparse_threshold": 0.999, "min_sparse_ratio": 0.25, "max_sparse_ratio": 0.25}]
    ],
    "`max_sparse_ratio` of all in a `global_group_id`": [both(max_sparse_ratio=0.25, global_group_id="all")],
    "`max_sparse_ratio` of one in a `global_group_id`": [one_limited(0.5, "max_sparse_ratio", 0.25)],
    "`max_sparse_ratio` in a `dependency_group_id`": [both(max_sparse_ratio=0.25, dependency_group_id="pair")],
    "`global_group_id`": [both(global_group_id="all")],
    "`dependency_group_id`": [both(dependency_group_id="pair")],
    "`internal_metric_block`": [both(0.25, dependency_group_id="pair", internal_metric_block=4)],
    '`granularity` `"out_channel"`': [both(granularity="out_channel")],
    "blocks of output channels, `[2, -1, -1, -1]`": [
        both(target_settings={"weight": {"granularity": [2, -1, -1, -1]}})
    ],
    '`granularity` `"in_channel"`': [both(granularity="in_channel", target_names=WEIGHT)],
    "single kernels, `[1, 1, -1, -1]`": [both(granularity=[1, 1, -1, -1], target_names=WEIGHT)],
    "single weights, `[1, 1]`": [
        [{"op_names": ["third"], "sparse_ratio": 0.5, "granularity": [1, 1], "target_names": WEIGHT}]
    ],
    '`granularity` `"per_channel"`': [both(granularity="per_channel")],
    '`target_names` `["weight"]`': [both(target_names=WEIGHT)],
    '`target_names` `["bias"]`': [both(target_names=["bias"])],
    '`target_names` with `"_input_0"`': [both(target_names=["weight", "_input_0"])],
    "a bias with a ratio of its own": [with_bias(sparse_ratio=0.25)],
    "a bias with a threshold of its own": [with_bias(sparse_threshold=0.1)],
}
# What is compared with NNI's pruner: the number of kept elements of every target, but for these keys which layers get
# masks, the total (where layers are ranked together), or nothing where scores have another unit.
COMPARED = {
    **{case: "layers" for case in CASES if case.startswith(("`op_", "`exclude_op_"))},
    "`global_group_id`": "total",
    "`sparse_threshold`": "nothing",
    "a bias with a threshold of its own": "nothing",
}


class Plain(nn.Module):
    """Two convolutions of 16 filters, a layer of 16 neurons and a head; 3x8x8 images, four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(n, 3, 8, 8)`` to logits ``(n, 4)``."""
        features = torch.relu(self.second(torch.relu(self.first(images))))
        return self.head(torch.relu(self.third(features.mean((2, 3)))))


def plain(seed: int = 0) -> Plain:
    """Return the network, with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Plain()


def knobs_of(column: str, seed: int = 0) -> dict[str, Any]:
    """Return what a pruner needs on this network, and settings with which its searches end at once."""
    if column == CALIBRATED:
        return {"calibration": [toy_images()]}
    info = PRUNERS.info(column, "keys")
    knobs = toy_knobs(info.knobs(), info.needs)
    if column == "subcluster":
        # The toy's settings leave all to the ratio; the defaults let the clusters decide.
        knobs = {"calibration": knobs["calibration"]}
    if column == "perera2022":
        knobs["search"] = {"population_size": 4, "generations": 2}
    if column == "genetic_weight":
        knobs |= {"evaluate": likeness(seed), "search": {"population_size": 4, "generations": 2}}
    return knobs


def likeness(seed: int) -> Callable[[nn.Module], float]:
    """Return a function that is higher the more alike a pruned and an unpruned network answer."""
    images = toy_images()

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return -float((model(images) - plain(seed)(images)).square().mean())

    return evaluate


def kept(column: str, config_list: Entries, seed: int = 0) -> dict[str, int]:
    """Prune as a column says; return how many elements of every target are kept.

    NNI's own pruners are made without this package's checks, so that they say what NNI does.
    """
    name = column.split(",")[0]
    info, model = PRUNERS.info(name, "keys"), plain(seed)
    if info.origin == "nni_topo":
        pruner = nni_topo.create_pruner(name, model, config_list, **knobs_of(column, seed))
    else:
        pruner = info.load()(model, config_list)
    _, masks = pruner.compress()
    return {
        f"{layer}.{target}": int(mask.expand_as(getattr(getattr(plain(), layer), target)).sum())
        for layer, targets in masks.items()
        for target, mask in targets.items()
        if mask is not None
    }


@functools.cache
def expected(reference: str, case: str, index: int, seed: int) -> dict[str, int] | None:
    """Return what NNI's pruner keeps; None where it doesn't take the key."""
    try:
        return kept(reference, CASES[case][index], seed)
    except Exception:  # whatever NNI raises
        return None


def layers(counts: dict[str, int]) -> set[str]:
    """Return the layers of some targets."""
    return {target.split(".")[0] for target in counts}


def outcome(column: str, case: str) -> tuple[str, str]:
    """Return what a pruner makes of a key, ``"yes"``, ``"own"`` or ``"no"``, and the message of an error.

    It is ``"yes"`` if all config_lists of the key on all networks end as with NNI's pruner.
    """
    config_lists, compared = CASES[case], COMPARED.get(case, "targets")
    reference = "l1" if PRUNERS.info(column.split(",")[0], "keys").structured else "level"
    agrees = compared != "nothing"
    for seed in SEEDS:
        for index, config_list in enumerate(config_lists):
            try:
                found = kept(column, config_list, seed)
            except NniTopoError as error:
                return "no", str(error)
            wanted = expected(reference, case, index, seed)
            if wanted is None:
                agrees = False
            elif compared == "total":
                agrees = agrees and sum(found.values()) == sum(wanted.values())
            elif compared == "layers":
                agrees = agrees and layers(found) == layers(wanted)
            else:
                agrees = agrees and found == wanted
    return ("yes" if agrees else "own"), ""


def table() -> str:
    """Run every cell, and return the table and the errors below it."""
    # By rule: what an error says it got differs from key to key.
    numbers: dict[str, int] = {}
    messages: list[str] = []
    lines = ["| key | " + " | ".join(f"`{name}`" for name in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines[0] = lines[0].replace(f"`{CALIBRATED}`", "`topological` with `calibration`")
    for case in CASES:
        cells = []
        for column in COLUMNS:
            said, message = outcome(column, case)
            if said == "no":
                rule = message.split(", got ")[0]
                if rule not in numbers:
                    messages.append(message)
                    numbers[rule] = len(messages)
                said = f"no ({numbers[rule]})"
            cells.append(said)
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {message}" for number, message in enumerate(messages, 1))])


def written() -> str:
    """Return the table that stands in the page."""
    return PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")
