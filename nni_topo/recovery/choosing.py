"""A few images that represent many, by the features that the network computes of them.

The cost of images, in weight reconstruction and in distillation, grows with their number, and of two that look alike to
the network the second one adds little. So the images are points, by their features, and each chosen image represents a
cluster.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.errors import DataError
from nni_topo.maths.clustering import partition
from nni_topo.maths.ties import first_smallest
from nni_topo.network.runtime.arguments import BATCHES, MODEL
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.network.runtime.fits import check_samples_first, structure_call
from nni_topo.network.runtime.hooks import batches_of, watched
from nni_topo.network.runtime.inputs import batch_size, calls, fitting, real_positions_of
from nni_topo.network.runtime.progress import bar
from nni_topo.network.runtime.public import public
from nni_topo.recovery.outputs import Outputs, logits_of, read_outputs
from nni_topo.rules import NONE, SEED, taking, whole


@public(
    pool=BATCHES,
    model=MODEL,
    count=whole(1),
    outputs=taking("output", "inputs") | NONE,
    seed=SEED,
)
def choose_images(
    pool: Iterable[Any] | Evaluator,
    model: nn.Module,
    count: int,
    *,
    outputs: Outputs | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Calibration:
    """Choose a few images that stand for all of a pool, to calibrate with.

    Parameters
    ----------
    pool : iterable or nni.compression.utils.Evaluator
        Batches of inputs, or of ``(inputs, ...)``; labels aren't looked at. See :class:`nni_topo.Calibration`.
    model : torch.nn.Module
        The trained network. It isn't changed.
    count : int
        How many images, from 1 to the number in the pool.
    outputs : callable, optional
        The features: a function of what the model returns and of its inputs, as for :func:`nni_topo.distill`. By
        default what enters the last linear layer, where what that layer gives is the model's output, as in
        classifiers; else the model's outputs. Positions of a feature map or of a sequence are averaged, padding apart.
    seed : int, default=0
        Of the clusters' first centres.
    progress : bool or None, default=None
        Show on standard error how far it is: in a terminal a bar, elsewhere a line every half minute. None: after
        five seconds.

    Returns
    -------
    Calibration
        The chosen images, in batches as large as the pool's. Where the pool's batches have other shapes, the images
        keep their batches and their order.

    Raises
    ------
    ConfigError
        If the count isn't an integer of at least 1, or ``outputs`` isn't a function.
    DataError
        If the pool can't be used or has fewer images, or features aren't finite or have other numbers by image.

    See Also
    --------
    nni_topo.shrink, nni_topo.compensate, nni_topo.distill : what the images are for.

    Notes
    -----
    One pass over the pool. There are as many clusters of the features, by k-means, as images are asked for. Of each the
    image is taken that is nearest to its mean, in the order in which the clusters first appear in the pool. With 16 and
    32 images of 5,000 that gave more accuracy after weight reconstruction than random images; with 128 there is nothing
    to gain.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> pool = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.0], [9.0, 5.0]])
    >>> few = choose_images([pool], nn.Identity(), 2)
    >>> [batch[0].tolist() for batch in few]
    [[[0.5, 0.0], [9.0, 5.0]]]
    """
    calibration = batches_of(pool, model, "pool")
    structure_call(model, calibration)  # an error that says what to change
    check_samples_first(model, calibration)
    features = _features(model, calibration, outputs, progress)
    if count > len(features):
        raise DataError(f"the pool must hold at least as many images as are to be chosen, {count}, got {len(features)}")
    points = features.numpy()
    labels = partition(points, count, seed=seed)
    found: list[int] = []
    for label in range(int(labels.max()) + 1):
        (members,) = np.nonzero(labels == label)
        off = np.square(points[members] - points[members].mean(axis=0)).sum(axis=1)
        scale = float(np.square(points[members]).sum(axis=1).max())
        found.append(int(members[first_smallest(off, scale)]))
    # Of equal images there are fewer clusters than asked for.
    others = np.setdiff1d(np.arange(len(points)), found)
    nearest = np.array([*found, *others[: count - len(found)]], dtype=np.intp)
    return calibration.chosen(torch.from_numpy(nearest))


def _features(model: nn.Module, pool: Calibration, outputs: Outputs | None, progress: bool | None) -> Tensor:
    """Return the features of all images, float64 (images, features), on the CPU."""
    found: list[Tensor] = []
    last: list[tuple[Tensor, Any]] = []  # what entered the layer that ran last, and what it gave
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]

    def note(entered: Tensor, given: Any) -> None:
        last[:] = [(entered.detach(), given)]

    with evaluation_mode(model), torch.no_grad(), watched(leaving=[(module, note) for module in linear]):
        for index, call in enumerate(bar("choosing images", progress, calls(model, pool))):
            last.clear()
            with fitting(index, pool.name):
                result = model(*call[0], **call[1])
            answer = result if isinstance(result, Tensor) else logits_of(result)
            is_classifier = outputs is None and bool(last) and last[0][1] is answer
            tensors = [last[0][0]] if is_classifier else read_outputs(result, call, batch_size(call), outputs)[0]
            real = real_positions_of(model, call)
            found.append(torch.cat([_by_sample(each, real) for each in tensors], dim=1))
    widths = sorted({each.shape[1] for each in found})
    if len(widths) > 1:
        raise DataError(f"features must be as many for each image, got {widths}: outputs= can average them (outputs)")
    features = torch.cat(found)
    if not bool(features.isfinite().all()):
        raise DataError("features must be finite, got NaN or infinity (outputs)")
    return features


def _by_sample(tensor: Tensor, real: Tensor | None) -> Tensor:
    """Return features (samples, ...) with their positions averaged: float64 (samples, features), on the CPU."""
    values = tensor.detach().double().cpu()
    if values.dim() == 1:
        return values[:, None]
    if values.dim() == 2:
        return values
    if values.dim() == 3:  # (samples, positions, features), as of transformers
        if real is not None and real.shape == values.shape[:2]:
            weights = real.double().cpu()[:, :, None]
            return (values * weights).sum(1) / weights.sum(1).clamp_min(1.0)
        return values.mean(1)
    return values.flatten(2).mean(2)
