"""What each pruner makes of each key of a config_list, beside NNI's own pruner: the table of docs/config_list.md.

``python tests/config_keys.py`` (with the checkout in PYTHONPATH) writes the table; a test holds the page
against it.
"""

from __future__ import annotations

import logging
import warnings
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
FILTERS = {"op_names": ["first", "second"], "sparse_ratio": 0.5}
BLOCK_OF_TWO = {"granularity": [2, -1, -1, -1]}
# The key as the page names it, the config_list, and what is compared with NNI's pruner: the number of kept elements
# of every target, their total (where layers are ranked together), or nothing where scores have another unit.
CASES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "`sparse_ratio`": ([FILTERS], "targets"),
    "`sparse_threshold`": ([{"op_names": ["first", "second"], "sparse_threshold": 0.4}], "nothing"),
    "`min_sparse_ratio` above the ratio": ([{**FILTERS, "sparse_ratio": 0.25, "min_sparse_ratio": 0.5}], "targets"),
    "`max_sparse_ratio` below the ratio": ([{**FILTERS, "max_sparse_ratio": 0.25}], "targets"),
    "`global_group_id`": ([{**FILTERS, "global_group_id": "all"}], "total"),
    "`dependency_group_id`": ([{**FILTERS, "dependency_group_id": "pair"}], "targets"),
    "`internal_metric_block`": (
        [{**FILTERS, "sparse_ratio": 0.25, "dependency_group_id": "pair", "internal_metric_block": 4}],
        "targets",
    ),
    '`granularity` `"out_channel"`': ([{**FILTERS, "granularity": "out_channel"}], "targets"),
    "blocks of output channels, `[2, -1, -1, -1]`": (
        [{"op_names": ["first", "second"], "sparse_ratio": 0.5, "target_settings": {"weight": BLOCK_OF_TWO}}],
        "targets",
    ),
    '`granularity` `"in_channel"`': ([{**FILTERS, "granularity": "in_channel", "target_names": ["weight"]}], "targets"),
    "single kernels, `[1, 1, -1, -1]`": (
        [{**FILTERS, "granularity": [1, 1, -1, -1], "target_names": ["weight"]}],
        "targets",
    ),
    "single weights, `[1, 1]`": (
        [{"op_names": ["third"], "sparse_ratio": 0.5, "granularity": [1, 1], "target_names": ["weight"]}],
        "targets",
    ),
    '`granularity` `"per_channel"`': ([{**FILTERS, "granularity": "per_channel"}], "targets"),
    '`target_names` `["weight"]`': ([{**FILTERS, "target_names": ["weight"]}], "targets"),
    "a bias with a ratio of its own": (
        [{"op_names": ["first"], "target_settings": {"weight": {"sparse_ratio": 0.5}, "bias": {"sparse_ratio": 0.25}}}],
        "targets",
    ),
    "a bias with a threshold of its own": (
        [
            {
                "op_names": ["first"],
                "target_settings": {"weight": {"sparse_ratio": 0.5}, "bias": {"sparse_threshold": 0.1}},
            }
        ],
        "nothing",
    ),
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


def plain() -> Plain:
    """Return the network, with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Plain()


def knobs_of(name: str) -> dict[str, Any]:
    """Return what a pruner needs on this network, and settings with which its searches end at once."""
    info = PRUNERS.info(name)
    knobs = toy_knobs(info.knobs(), info.needs)
    if name == "perera2022":
        knobs["search"] = {"population_size": 4, "generations": 2}
    if name == "genetic_weight":
        knobs |= {"evaluate": accuracy, "search": {"population_size": 4, "generations": 2}}
    return knobs


def accuracy(model: nn.Module) -> float:
    """Return a figure that is higher the more alike a pruned and an unpruned network answer."""
    images = toy_images()
    with torch.no_grad():
        return -float((model(images) - plain()(images)).square().mean())


def kept(name: str, config_list: list[dict[str, Any]]) -> dict[str, int]:
    """Prune by name; return how many elements of every target are kept.

    NNI's own pruners are made without this package's checks, so that they say what NNI does.
    """
    info, model = PRUNERS.info(name), plain()
    if info.origin == "nni_topo":
        pruner = nni_topo.create_pruner(name, model, config_list, **knobs_of(name))
    else:
        pruner = info.load()(model, config_list)
    _, masks = pruner.compress()
    return {
        f"{layer}.{target}": int(mask.expand_as(getattr(getattr(plain(), layer), target)).sum())
        for layer, targets in masks.items()
        for target, mask in targets.items()
        if mask is not None
    }


def outcome(name: str, case: str) -> tuple[str, str]:
    """Return what a pruner makes of a key, ``"yes"``, ``"own"`` or ``"no"``, and the rule that an error names."""
    config_list, compared = CASES[case]
    try:
        found = kept(name, config_list)
    except NniTopoError as error:
        return "no", str(error).split(", got ")[0]
    reference = "l1" if PRUNERS.info(name).structured else "level"
    try:
        expected = kept(reference, config_list)
    except Exception:  # whatever NNI raises, it doesn't take the key
        return "own", ""
    if compared == "targets" and found == expected:
        return "yes", ""
    if compared == "total" and sum(found.values()) == sum(expected.values()):
        return "yes", ""
    return "own", ""


def table() -> str:
    """Run every cell, and return the table and the errors below it."""
    errors: dict[str, int] = {}
    lines = ["| key | " + " | ".join(f"`{name}`" for name in OWN) + " |", "|---" * (len(OWN) + 1) + "|"]
    for case in CASES:
        cells = []
        for name in OWN:
            said, error = outcome(name, case)
            if said == "no":
                said = f"no ({errors.setdefault(error, len(errors) + 1)})"
            cells.append(said)
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {error}" for error, number in errors.items())])


def written() -> str:
    """Return the table that stands in the page."""
    return PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")
