"""Other selections from the functional cloud of `TopologicalPruner`, which T7 of HYPOTHESES.md compares with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nni_topo import TopologicalPruner
from nni_topo.clustering import partition
from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.clouds.functional import ChannelReader, FunctionalCollector
from nni_topo.pruners.hooks import PruningContext
from nni_topo.pruners.selection import Clouds, SelectionMetric
from nni_topo.pruners.units import KeptBlocks, PruningUnit


class UnweightedCollector(FunctionalCollector):
    """The functional cloud without the norms of the weights that read each channel."""

    def readers(self, unit: PruningUnit, flow: ChannelFlow, context: PruningContext) -> list[ChannelReader]:
        """Return the layers that read a unit, each channel with strength one."""
        found = super().readers(unit, flow, context)
        return [replace(reader, strength=torch.ones_like(reader.strength)) for reader in found]


@dataclass(kw_only=True, eq=False)
class CloudMetric(SelectionMetric):
    """Keeps the blocks of each cloud that ``rule`` chooses from its points without the origin."""

    rule: Any
    seed: int

    def choose(self, context: PruningContext, clouds: Clouds, rows: dict[str, int]) -> KeptBlocks:
        """Choose from one cloud after the other."""
        kept = {}
        for unit in context.units:
            chosen = []
            for cloud in clouds(unit.name):
                mask = np.zeros(cloud.size, dtype=np.bool_)
                mask[self.rule(cloud.points, rows[unit.name], self.seed)] = True
                chosen.append(mask)
            kept[unit.name] = np.concatenate(chosen)
        return kept


def largest(points: NDArray[np.float64], keep: int, seed: int) -> NDArray[np.intp]:
    """Return the points farthest from the origin."""
    return np.argsort(-np.square(points).sum(1), kind="stable")[:keep]


def nearest_to_means(points: NDArray[np.float64], keep: int, seed: int) -> NDArray[np.intp]:
    """Return of each k-means cluster the point nearest to its mean; of fewer clusters also the largest other points."""
    labels = partition(points, keep, seed=seed)
    found = []
    for label in range(int(labels.max()) + 1):
        (members,) = np.nonzero(labels == label)
        off = np.square(points[members] - points[members].mean(0)).sum(1)
        found.append(int(members[off.argmin()]))
    # Silent channels are one point, and clouds with many of them have fewer clusters than channels that stay.
    others = [index for index in largest(points, len(points), seed).tolist() if index not in found]
    return np.array(found + others[: keep - len(found)])


class _CloudPruner(StructuredPruner):
    """Keeps the channels of the functional cloud that its rule chooses."""

    rule: Any

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Any = None,
        existed_wrappers: Any = None,
        *,
        calibration: Iterable[Any],
        seed: int = 0,
    ) -> None:
        self.calibration, self.seed = calibration, seed
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            collector=FunctionalCollector(calibration),
            calculator=CloudMetric(rule=self.rule, seed=seed, origin=False),
        )


class LargestPruner(_CloudPruner):
    """Keep the channels with the largest contributions."""

    rule = staticmethod(largest)


class MeansPruner(_CloudPruner):
    """Keep the channel nearest to the mean of each k-means cluster of contributions."""

    rule = staticmethod(nearest_to_means)


class UnweightedPruner(TopologicalPruner):
    """Cover the activations that enter the next layers, however strongly they are read."""

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Any = None,
        existed_wrappers: Any = None,
        *,
        calibration: Iterable[Any],
        seed: int = 0,
    ) -> None:
        super().__init__(
            model, config_list, evaluator, existed_wrappers, cloud=UnweightedCollector(calibration), seed=seed
        )
        self.calibration = calibration
