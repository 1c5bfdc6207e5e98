"""Training of classifiers, on data in memory or in files.

All randomness (order, augmentation, dropout) comes from one seed; the global generators aren't changed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.layers.memory_format import inputs_laid_out, lay_back, lay_out
from nni_topo.network.runtime.arguments import COMPUTING, DEVICE, TENSOR
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.precision import computing_in
from nni_topo.network.runtime.progress import bar, quiet_if_asked
from nni_topo.network.runtime.switches import seed_torch, torch_random_kept
from nni_topo.rules import NONE, checked, number
from nni_topo.zoo.data import DataBundle
from nni_topo.zoo.evaluation import by_label, check_model, evaluate
from nni_topo.zoo.labelled import batches, held_on
from nni_topo.zoo.recipes import Augmentation, Recipe


@dataclass(frozen=True)
class EpochLog:
    """One epoch; loss and training accuracy are averages during the epoch, while the weights changed."""

    epoch: int  # from 1
    loss: float  # mean over the epoch
    accuracy: float  # on the training images, in [0, 1]
    validation_accuracy: float | None  # in [0, 1], after the epoch; None without a validation set
    lr: float  # learning rate of the last step
    seconds: float  # wall time, validation included
    training_seconds: float  # wall time without validation


@dataclass(frozen=True)
class TrainingLog:
    """Record of a training, by epoch; fewer epochs than in the recipe if ``until`` ended the training."""

    epochs: tuple[EpochLog, ...]

    @property
    def seconds(self) -> float:
        """Wall time of all epochs."""
        return sum(epoch.seconds for epoch in self.epochs)


@quiet_if_asked
@checked(model=COMPUTING, device=DEVICE | NONE, until=number(0, 1, "right") | NONE)
def train(
    model: nn.Module,
    data: DataBundle,
    recipe: Recipe,
    *,
    seed: int,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    callback: Callable[[EpochLog], None] | None = None,
    until: float | None = None,
) -> TrainingLog:
    """Train a classifier in place.

    Parameters
    ----------
    model : nn.Module
        Maps images ``[n, in_channels, h, w]`` to logits ``[n, num_classes]``. It is moved to ``device``, and in
        evaluation mode afterwards.
    data : DataBundle
        Its training images are used for training, its validation images only for measurements.
    recipe : Recipe
        Optimizer, schedule, epochs and augmentation.
    seed : int
        Seed of the order of the images, of augmentation and of dropout. On one machine it determines the result.
    device : str, torch.device or None, default=None
        Device for training; a training set in memory is moved there completely. None: the model's device.
    progress : bool or None, default=None
        Show progress on standard error: in a terminal a bar, otherwise a line every half minute. None: only after
        five seconds.
    callback : callable or None, default=None
        Called with the :class:`EpochLog` after every epoch, with the model in evaluation mode. An exception
        that it raises ends the training.
    until : float or None, default=None
        Validation accuracy in (0, 1]; training ends after the first epoch that reaches it. The learning rate follows
        the recipe as if all its epochs were run. None: all epochs.

    Returns
    -------
    TrainingLog

    Raises
    ------
    DataError
        If the model doesn't fit the data.
    ConfigError
        If the loss stops being finite, or ``until`` is given without validation images.
    """
    if until is not None and not len(data.validation):
        raise ConfigError(f"until needs validation images, got {until} without any (train)")
    device = device_of(model) if device is None else torch.device(device)
    check_model(model.to(device), data)
    images = held_on(data.train, device)
    black = data.black.to(device)
    steps = math.ceil(len(images) / recipe.batch_size)  # per epoch
    kind, knobs = recipe.optimizing()
    optimizer = kind([parameter for parameter in model.parameters() if parameter.requires_grad], **knobs)
    generator = torch.Generator().manual_seed(seed)
    logs: list[EpochLog] = []
    with (
        torch_random_kept(),
        _channels_last(model, data.train[0][0][None].to(device)),
        bar("training", progress, total=recipe.epochs) as shown,
    ):
        seed_torch(seed)
        for epoch in range(1, recipe.epochs + 1):
            start = time.perf_counter()
            model.train()
            totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss and hits
            chosen = torch.randperm(len(images), generator=generator).tensor_split(steps)
            for step, (inputs, labels) in enumerate(batches(images, chosen, device)):
                optimizer.param_groups[0]["lr"] = recipe.rate(((epoch - 1) * steps + step) / (recipe.epochs * steps))
                count = len(inputs)
                if inputs.dim() == 4:  # images, not rows of text
                    inputs = augmented(inputs, recipe.augmentation, black, generator)
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                with computing_in(recipe.precision, device):
                    logits = model(inputs).float()
                logits, labels = by_label(logits, labels)
                loss = cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                totals += count * torch.stack([loss.detach(), (logits.argmax(1) == labels).double().mean()])
            mean_loss, hits = (totals / len(images)).tolist()
            if not math.isfinite(mean_loss):
                raise ConfigError(f"lr must keep the loss finite, got {mean_loss} at lr={recipe.lr} (epoch {epoch})")
            training_seconds = time.perf_counter() - start
            model.eval()
            accuracy = evaluate(model, data.validation, device=device) if len(data.validation) else None
            rate = optimizer.param_groups[0]["lr"]
            log = EpochLog(epoch, mean_loss, hits, accuracy, rate, time.perf_counter() - start, training_seconds)
            logs.append(log)
            shown.set_postfix_str(f"loss {mean_loss:.3f}, accuracy {100 * hits:.1f} %", refresh=False)
            shown.update()
            if callback is not None:
                callback(log)
            if until is not None and accuracy is not None and accuracy >= until:
                break
    return TrainingLog(tuple(logs))


@checked(images=TENSOR, black=TENSOR)
def augmented(
    images: Tensor, augmentation: Augmentation, black: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Shift and mirror images (n, c, h, w) at random, by ``generator`` or else PyTorch's global generator.

    ``black``, shape (c,) or one value, fills the borders.
    """
    if augmentation == "none":
        return images
    if images.dim() != 4 or black.numel() not in (1, images.shape[1]):
        got = f"{tuple(images.shape)} and {tuple(black.shape)}"
        raise DataError(f"images must be (n, c, h, w) and black (c,), got {got} (augmented)")
    images = shifted(images, black, generator)
    if augmentation == "crop-flip":
        flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(flip.to(images.device), images.flip(3), images)
    return images


def shifted(images: Tensor, black: Tensor, generator: torch.Generator | None) -> Tensor:
    """Shift every image separately by up to an eighth of its side; ``black``, shape (c,), fills the border."""
    count, _, height, width = images.shape
    reach = max(1, width // 8)
    shift = black.view(1, -1, 1, 1)
    padded = pad(images - shift, (reach, reach, reach, reach)) + shift
    corner = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator).to(images.device)
    rows = corner[0] + torch.arange(height, device=images.device)
    columns = corner[1] + torch.arange(width, device=images.device)
    image = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@contextmanager
def _channels_last(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Within the block, use the channels-last format, which CPUs convolve faster; afterwards restore and call eval."""
    lay_out(model, (images,), {})
    try:
        with inputs_laid_out(model):
            yield
    finally:
        lay_back(model)
        model.eval()
