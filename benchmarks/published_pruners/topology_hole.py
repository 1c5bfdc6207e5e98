"""TopologyHole: filters whose feature maps have many holes are removed.

From the paper: the maps are those after a convolution and its ReLU; a filter's TopologyHole is the average over input
images; within a layer filters with a high TopologyHole are removed, and the network is fine-tuned.

Our reading, since the paper's own counting rule isn't in what can be read of it: a place of a map is active if it is
above zero. The active places are closed squares, and the map's TopologyHole is the number of loops in their union, the
first Betti number of the cubical complex: the regions of silent places that active ones enclose. Silent places are
neighbours if they share a side, and what reaches the edge of the map is no hole. Where no ReLU follows, "above zero"
is all the same. The paper prunes convolutions alone: layers without maps in two dimensions, such as linear ones, are
ranked by the L1 norm of their weights.

References
----------
.. [1] Xu, Chen, Su and Xie, "Towards efficient filter pruning via topology", Journal of Real-Time Image Processing 19,
   2022, https://doi.org/10.1007/s11554-022-01209-z
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from nni_topo.network.runtime.calibration import Calibration
from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.checks import pruner_arguments
from nni_topo.pruners.clouds.moments import check_finite
from nni_topo.pruners.clouds.weight import WeightCollector
from nni_topo.pruners.hooks import Data, PruningContext
from nni_topo.pruners.units import PruningUnit
from published_pruners.maps import MapCollector, Measure, ScoreMetric, calibration_of_pruner

# Neighbours share a side within a map; maps beside each other don't touch.
_SIDES = np.zeros((3, 3, 3), dtype=np.bool_)
_SIDES[1] = [[False, True, False], [True, True, True], [False, True, False]]


def count_holes(active: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Count the holes of maps.

    Parameters
    ----------
    active : ndarray of bool, shape (n, height, width)
        Which places of each map are active.

    Returns
    -------
    ndarray of int64, shape (n,)
        The first Betti number of the union of each map's active squares.
    """
    # By Alexander duality: the silent regions around the active ones, but the one outside.
    silent = np.pad(~active, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    regions, count = ndimage.label(silent, structure=_SIDES)
    owner = np.zeros(count + 1, dtype=np.int64)
    owner[regions] = np.arange(len(active))[:, None, None]
    return np.bincount(owner[1:], minlength=len(active)) - 1


class HoleCount(Measure):
    """Mean number of holes of each channel's maps; nothing where maps have no two dimensions."""

    def __init__(self, layer: str) -> None:
        self.has_maps = True
        self._layer = layer
        self._holes = torch.zeros(0, dtype=torch.float64)
        self._samples = 0

    def add(self, maps: Tensor) -> None:
        """Count the holes of maps ``(channels, samples, height, width)``."""
        if maps.dim() != 4:
            self.has_maps = False
            return
        check_finite(maps, self._layer)
        active = (maps > 0).cpu().numpy()
        holes = torch.from_numpy(count_holes(active.reshape(-1, *active.shape[2:])))
        total = holes.reshape(active.shape[:2]).sum(1).double()
        self._holes = total if self._samples == 0 else self._holes + total
        self._samples += active.shape[1]

    def scores(self) -> Tensor:
        """Return the mean number of holes of each channel, negative."""
        return -self._holes / self._samples


class HoleCollector(MapCollector):
    """Scores channels with maps by their holes, all others by the L1 norm of their weights."""

    def __init__(self, calibration: Calibration | None) -> None:
        super().__init__(calibration, HoleCount)

    def collect(self, context: PruningContext) -> Data:
        """Return scores ``(blocks, 1)``, float64 on the CPU."""
        counts = self.measured(context)
        weights = WeightCollector().collect(context)

        def points(_: PruningUnit, module: str, target: str) -> Tensor:
            if counts[module].has_maps:
                return self.by_block(counts[module].scores(), context, module, target)
            return weights[module][target].abs().sum(1, keepdim=True)

        return context.collected(points)


class TopologyHolePruner(StructuredPruner):
    """Prune the filters whose feature maps have most holes.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune.
    config_list : list of dict
        NNI's config_list.
    evaluator : nni.compression.utils.Evaluator or None, default=None
        Serves where there is no ``calibration``; needed for scheduled pruning.
    existed_wrappers : dict or None, default=None
        Used by ``from_compressor``.
    calibration : iterable or None, default=None
        Batches of inputs. All count.
    """

    @pruner_arguments()
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        calibration: Iterable[Any] | None = None,
    ) -> None:
        self.calibration = calibration_of_pruner(calibration, model, evaluator, type(self).__name__)
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            collector=HoleCollector(self.calibration),
            calculator=ScoreMetric(),
        )
