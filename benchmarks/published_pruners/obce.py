"""OBCE (later PBCE): neurons of a transformer whose outputs merge early into one component are removed.

From the papers: a neuron's outputs over a corpus are a point cloud, whose zeroth persistent homology is computed; the
radius at which its components have all merged says how important the neuron is. In each layer the neurons above a
percentile of these radii stay, the first quartile or more severe ones, and those below go.

Our reading: a point is what the neuron puts out for one input, with a coordinate per token; of a convolution per place
of its map. Outputs are those after the activation that follows the layer. The radius is half the largest finite death
time of H0, the longest edge of the minimum spanning tree; its half gives the same order. In coupled layers, as along
the residual stream, the members' values are averaged, as for all pruners.

References
----------
.. [1] Balderas, Lastra and Benitez, "Can persistent homology whiten Transformer-based black-box models? A case study on
   BERT compression", 2023, https://arxiv.org/abs/2312.10702
.. [2] Balderas, Lastra and Benitez, "A Green AI Methodology Based on Persistent Homology for Compressing BERT",
   Applied Sciences 15(1), 390, 2025, https://doi.org/10.3390/app15010390: it says that the neurons above the
   percentile are retained.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from numpy.typing import NDArray
from torch import nn

from nni_topo.pruners.base import StructuredPruner
from nni_topo.pruners.checks import pruner_arguments
from nni_topo.rules import whole
from nni_topo.topology import h0_deaths, pairwise_distances
from published_pruners.maps import FirstMaps, MapCollector, ScoreMetric, calibration_of_pruner


def merge_distance(points: NDArray[np.float64]) -> float:
    """Return the distance at which a cloud, ``(n, d)`` with at least two points, has merged into one component."""
    return float(h0_deaths(pairwise_distances(points))[0])


class ObcePruner(StructuredPruner):
    """Prune the neurons whose outputs merge into one component at the smallest distance.

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
        Batches of inputs.
    images : int, default=256
        How many inputs are looked at, the first ones, at least 2; work grows with their square.
    """

    @pruner_arguments(images=whole(2))
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        images: int = 256,
    ) -> None:
        self.calibration = calibration_of_pruner(calibration, model, evaluator, type(self).__name__)
        self.images = images
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            collector=MapCollector(self.calibration, partial(FirstMaps, images=images, score=merge_distance)),
            calculator=ScoreMetric(),
        )
