"""Betti numbers of filters: filters that transform the data into a space with large Betti numbers are removed.

From the paper, as far as it can be read (its abstract): the Betti numbers are those of the space into which a filter of
a trained network transforms the training samples; in each layer the filters with large ones are removed (above 300
there), and the others stay.

Our reading: the space of a filter is the cloud of its outputs, a point per input with the places of its map after the
activation as coordinates. Betti numbers are those of the cloud's Vietoris-Rips complex at one scale, and a filter
counts by the sum of the zeroth and the first, its components and its loops. The scale is half of the mean distance
between the cloud's points, so that a filter and a multiple of it count the same. A filter that puts out the same for
all inputs has one component and no loop, the least that there is, and so it is kept. Linear layers are treated alike:
a neuron's outputs are points on a line, which has no loops.

References
----------
.. [1] Kochar, Vengalil and Sinha, "Using Topological Framework for the Design of Activation Function and Model Pruning
   in Deep Neural Networks", 2021, https://arxiv.org/abs/2109.01572
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
from nni_topo.rules import number, whole
from nni_topo.topology import h0_deaths, pairwise_distances, rips_diagram
from published_pruners.maps import FirstMaps, MapCollector, ScoreMetric, calibration_of_pruner

_ROUNDING = 1e-9  # edges that are longer than the scale by no more than this share of it belong to the complex


def betti_numbers(points: NDArray[np.float64], scale: float) -> tuple[int, int]:
    """Return the zeroth and the first Betti number of a cloud's Vietoris-Rips complex at a scale.

    Parameters
    ----------
    points : ndarray of float64, shape (n, d)
        The cloud.
    scale : float
        Length of the longest edges of the complex, at least 0.
    """
    return _betti_numbers(pairwise_distances(points), scale, is_line=points.shape[1] == 1)


def betti_score(points: NDArray[np.float64], scale: float) -> float:
    """Return a cloud's sum of Betti numbers, negative, at a share of the mean distance between two of its points."""
    distances = pairwise_distances(points)
    mean = distances.sum() / (len(points) * (len(points) - 1))
    return -float(sum(_betti_numbers(distances, scale * mean, is_line=points.shape[1] == 1)))


def _betti_numbers(distances: NDArray[np.float64], scale: float, *, is_line: bool) -> tuple[int, int]:
    longest = scale * (1.0 + _ROUNDING)
    components = 1 + int((h0_deaths(distances) > longest).sum())
    if is_line:
        return components, 0
    loops = rips_diagram(distances=distances, dimension=1)
    return components, int(((loops[:, 0] <= longest) & (loops[:, 1] > longest)).sum())


class FilterBettiPruner(StructuredPruner):
    """Prune the filters whose outputs form a space with large Betti numbers.

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
        How many inputs are looked at, the first ones, at least 2; work grows with their square and more.
    scale : float, default=0.5
        Scale of the complex, as a share of the mean distance between a cloud's points.
    """

    @pruner_arguments(images=whole(2), scale=number(0.0, closed="neither"))
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        images: int = 256,
        scale: float = 0.5,
    ) -> None:
        self.calibration = calibration_of_pruner(calibration, model, evaluator, type(self).__name__)
        self.images = images
        self.scale = scale
        score = partial(betti_score, scale=scale)
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            collector=MapCollector(self.calibration, partial(FirstMaps, images=images, score=score)),
            calculator=ScoreMetric(),
        )
