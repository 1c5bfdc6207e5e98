"""Studies of one trained network under several pruners, ratios and seeds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.speedup.dependency import dependency_groups
from nni_topo.pruners.hooks import Masks
from nni_topo.pruners.registry import PRUNERS, pruner_info
from nni_topo.rules import check_knobs, whole
from nni_topo.runs.choices import PrunerChoice, Target
from nni_topo.runs.provenance import Record
from nni_topo.runs.run import Start, prune
from nni_topo.runs.widths import inner_layers
from nni_topo.studies.study import Findings, FindingsType, Names, Tell, TrainedStudy

# name in place of a pruner's: masks of random single weights
CONNECTIONS = "connections"


@dataclass(frozen=True)
class PointsStudy(Findings):
    """One record (point) per pruned network, and the unpruned network's test accuracy in [0, 1]."""

    points: list[Record]
    accuracy: float

    def means(self) -> pd.DataFrame:
        """Return means over seeds by ``pruner`` and ``ratio``, in the order of the points."""
        frame = pd.DataFrame(self.points).drop(columns="seed")
        return frame.groupby(["pruner", "ratio"], sort=False, as_index=False).mean()


@dataclass(frozen=True, kw_only=True)
class PrunersStudy(TrainedStudy[FindingsType]):
    """A study of one trained network under several pruners, ratios and seeds."""

    pruners: Names = (CONNECTIONS, "level", "random", "cluster", "subcluster")  # connections: random single weights
    ratios: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # of every layer, in [0, 1)
    seeds: int = 1  # number of seeds of each pruner, at least 1
    calibration: int = 512  # training images for pruners that need calibration data, at least 1

    def check(self) -> None:
        if not self.pruners or not self.ratios:
            raise ConfigError(f"a study needs at least one pruner and one ratio, got none ({self.place})")
        for name in self.pruners:
            if name != CONNECTIONS:
                PRUNERS.info(name, "pruners")
        for ratio in self.ratios:
            Target("ratio", ratio)
        check_knobs(self.place, vars(self), {"seeds": whole(1), "calibration": whole(1)})

    def points(self, start: Start, tell: Tell) -> list[Record]:
        """Return one point per pruner, ratio and seed."""
        measured = replace(start, known_accuracy=start.accuracy)  # measured once, not in every run
        records = []
        for name in self.pruners:
            for ratio, seed in itertools.product(self.ratios, self.seeds_of(name)):
                run = {"pruner": name, "ratio": ratio, "seed": seed}
                records.append({**run, **self.point(replace(measured, seed=seed), name, ratio)})
                tell(f"{name} at {ratio:g}, seed {seed}")
        return records

    def seeds_of(self, name: str) -> range:
        repeats = self.seeds if name == CONNECTIONS or "seed" in pruner_info(name).knobs() else 1
        return range(self.seed, self.seed + repeats)

    def point(self, start: Start, name: str, ratio: float) -> Record:
        raise NotImplementedError


def study_masks(name: str, start: Start, ratio: float, calibration: int) -> Masks:
    """Return masks by a registered pruner or ``"connections"``, at a ratio in [0, 1) of every layer but the output."""
    layers = inner_layers(start.net, start.example)
    if name == CONNECTIONS:
        generator = torch.Generator().manual_seed(start.seed)
        masks: Masks = {}
        for layer in layers:
            weight: Any = start.net.get_submodule(layer).weight
            mask = torch.ones(weight.numel())
            mask[torch.randperm(len(mask), generator=generator)[: int(ratio * len(mask))]] = 0.0
            masks[layer] = {"weight": mask.reshape(weight.shape).to(weight.device)}
        return masks
    info, knobs, config = pruner_info(name), {}, {"op_names": layers, "sparse_ratio": ratio}
    if name == "subcluster":  # it chooses the number of neurons itself, starting from the share 1 - ratio
        knobs = {"growth": {"initial_ratio": max(1.0 - ratio, 1e-9)}}
        del config["sparse_ratio"]
    config_list = [config]
    if info.structured:
        config_list = dependency_groups(start.net, start.example, config_list)
    if "calibration" not in info.knobs():
        calibration = 0
    choice = PrunerChoice(name, knobs=knobs, calibration=calibration)
    return prune(start, choice, config_list).masks


def share_kept(masks: Masks) -> float:
    """Return the kept share of the masked layers' weights, in [0, 1]."""
    weights = [targets["weight"] for targets in masks.values() if targets.get("weight") is not None]
    if not weights:
        raise DataError("a pruner must mask weights to be studied, got no mask (masks)")
    return sum(float(mask.sum()) for mask in weights) / sum(mask.numel() for mask in weights)
