"""Accuracy and loss of classifiers, and whether a model fits a data set."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nni_topo.errors import DataError
from nni_topo.network.runtime.arguments import COMPUTING, DEVICE
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.network.runtime.inputs import fitting
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.public import public
from nni_topo.rules import NONE, checked
from nni_topo.zoo.data import DataBundle
from nni_topo.zoo.labelled import LabelledImages, batches, labels_of

_EVALUATION = {"model": COMPUTING, "device": DEVICE | NONE}
_BATCH = 512


@public(model=COMPUTING)
def check_model(model: nn.Module, data: DataBundle) -> None:
    """Run a model on one image; raise DataError unless it takes the data set's images and has one logit per class."""
    image, label = data.train[:1]
    shape = tuple(image.shape[1:])
    try:
        with evaluation_mode(model), torch.no_grad():
            logits = model(image.to(device_of(model)))
    except RuntimeError as error:
        raise DataError(f"the model must take images of shape {shape}, got: {error} ({data.name})") from error
    expected = (*label.shape, data.num_classes)
    if not isinstance(logits, Tensor) or logits.shape != expected:
        got = tuple(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"the model must have {data.num_classes} outputs, one per class, got {got} ({data.name})")


def by_label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits as ``(labels, classes)`` and labels as ``(labels,)``; in text every position has a label."""
    return logits.flatten(0, -2), labels.flatten()


def bits(loss: float) -> float:
    """Convert a mean cross entropy from nats to bits per label, for text of bytes bits per byte."""
    return loss / math.log(2.0)


@checked(**_EVALUATION)
def evaluate(model: nn.Module, dataset: LabelledImages, *, device: str | torch.device | None = None) -> float:
    """Return the accuracy of a classifier in [0, 1]: the fraction of samples whose label has the largest logit.

    ``dataset`` has images ``[n, in_channels, h, w]`` and labels ``[n]``, n at least 1, each below the number of the
    model's outputs (else a DataError). The model is moved to ``device`` (None: it stays), and runs in evaluation mode.
    """
    return loss_and_accuracy(model, dataset, device=device)[1]


@public(**_EVALUATION)
def loss_and_accuracy(
    model: nn.Module, dataset: LabelledImages, *, device: str | torch.device | None = None
) -> tuple[float, float]:
    """Return the mean cross entropy in nats, and the accuracy; parameters and errors as in :func:`evaluate`."""
    if len(dataset) == 0:
        raise DataError("a data set must hold at least one image to be evaluated on, got 0 (dataset)")
    device = device_of(model) if device is None else device
    model.to(device)
    totals = torch.zeros(2, dtype=torch.float64)
    with evaluation_mode(model), torch.no_grad(), fitting(0, "dataset"):
        rows = torch.arange(len(dataset)).split(min(_BATCH, len(dataset)))
        for images, labels in batches(dataset, rows, torch.device(device)):
            logits, labels = by_label(model(images).float(), labels)
            if int(labels.max()) >= logits.shape[1]:
                raise DataError(f"labels must be below the model's {logits.shape[1]} outputs, got {int(labels.max())}")
            loss, hits = cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()
            totals += torch.stack([loss, hits]).cpu().double()
    loss, hits = (totals / labels_of(dataset).numel()).tolist()
    return loss, hits
