"""Images made from a trained network alone: they reproduce the running statistics of its batch norms [1]_.

Pixels follow the gradient until the inputs of every batch norm have the mean and the variance of its running
statistics, and each image of a classifier belongs to one class. Compensation and distillation use them in place of real
images.

References
----------
.. [1] H. Yin, P. Molchanov, J. M. Alvarez, Z. Li, A. Mallya, D. Hoiem, N. K. Jha and J. Kautz, "Dreaming to distill:
   data-free knowledge transfer via DeepInversion", https://arxiv.org/abs/1912.08795
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from nni_topo.errors import ConfigError
from nni_topo.network.runtime.arguments import INPUTS, MODEL, check_model
from nni_topo.network.runtime.copies import detached_copy, evaluating
from nni_topo.network.runtime.fits import call_arguments, check_fits
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import tensors_of
from nni_topo.network.runtime.progress import bar
from nni_topo.network.runtime.public import public
from nni_topo.rules import SEED, whole

_RATE = 0.1
_CLASSES = 0.1  # weight of the classification loss; the loss of the statistics has weight 1
_ROUGHNESS = 0.01  # weight of squared differences between neighbouring pixels
_LEAST_VARIANCE = 1e-6


@public(model=MODEL, example_inputs=INPUTS, count=whole(1), steps=whole(1), batch_size=whole(2), seed=SEED)
def synthetic_images(
    model: nn.Module,
    example_inputs: Any,
    *,
    count: int = 256,
    steps: int = 150,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool | None = None,
) -> list[Tensor]:
    """Make images from a trained network alone, as calibration data if no images are available.

    Parameters
    ----------
    model : torch.nn.Module
        The trained network, which takes one floating tensor (n, channels, height, width). It isn't changed.
    example_inputs : Tensor, tuple or dict
        Inputs of the right shape; their values don't matter.
    count : int, default=256
        Images, at least 1.
    steps : int, default=150
        Gradient steps, at least 1.
    batch_size : int, default=128
        Images that are optimized together to reproduce the statistics, at least 2.
    seed : int, default=0
        Seed of the initial noise.
    progress : bool or None, default=None
        Show on standard error how far it is: in a terminal a bar, elsewhere a line every half minute. None: after
        five seconds.

    Returns
    -------
    list of Tensor
        Batches (n, channels, height, width), on the model's device.

    Raises
    ------
    ConfigError
        If a knob can't be used or the model doesn't take one image tensor.
    DataError
        If ``example_inputs`` don't fit the model.
    SpeedupError
        If the model is still wrapped.

    Notes
    -----
    Images start as noise whose spectrum falls with the frequency, as in photographs. If the network has no batch norms,
    only the classes and the smoothness term change them, and their standard deviation stays near 1, as in the noise.

    References
    ----------
    .. [1] Yin et al., "Dreaming to distill", https://arxiv.org/abs/1912.08795

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    >>> [tuple(batch.shape) for batch in synthetic_images(model, torch.zeros(1, 1, 8, 8), count=6, steps=2)]
    [(6, 1, 8, 8)]
    """
    check_model(model)
    call = call_arguments(example_inputs, model)
    tensors = tensors_of(call)
    if len(tensors) != 1 or tensors[0].dim() != 4 or not tensors[0].is_floating_point():
        raise ConfigError(
            f"a model must take one floating tensor (n, channels, height, width), got {len(tensors)} of shapes "
            f"{[tuple(tensor.shape) for tensor in tensors]} (example_inputs)"
        )
    check_fits(model, call, "example_inputs")
    network = evaluating(detached_copy(model))
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(tensors[0].shape[1:])
    shown = bar("images", progress, total=-(-count // batch_size) * steps)
    with shown, torch.enable_grad():
        return [
            _shaped(network, _noise((len(part), *shape), generator).to(tensors[0]), steps, shown)
            for part in torch.arange(count).split(batch_size)
        ]


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw images of mean 0 and variance 1 whose amplitudes fall as 1 / frequency."""
    spectrum = torch.fft.rfft2(torch.randn(shape, generator=generator))
    *_, height, width = shape
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1.0 / max(height, width))
    images: Tensor = torch.fft.irfft2(spectrum / frequency, s=(height, width))
    return images / images.std()


def _shaped(network: nn.Module, images: Tensor, steps: int, shown: Any) -> Tensor:
    """Optimize images for the running statistics of the batch norms, the classes and smoothness."""
    images = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    norms: list[Any] = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    away: list[Tensor] = []

    def looking(norm: Any) -> Callable[[Tensor], None]:
        return lambda entering: away.append(_distance(norm, entering))

    with watched([(norm, looking(norm)) for norm in norms]):
        for _ in range(steps):
            optimizer.zero_grad()
            outputs = network(images)
            loss = _ROUGHNESS * torch.stack([images.diff(dim=dim).square().mean() for dim in (2, 3)]).sum()
            if away:
                loss = loss + torch.stack(away).mean()
            if isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.shape[1] > 1:
                classes = torch.arange(len(outputs), device=outputs.device) % outputs.shape[1]
                loss = loss + _CLASSES * cross_entropy(outputs, classes)
            loss.backward()
            optimizer.step()
            schedule.step()
            away.clear()
            shown.update()
    return images.detach()


def _distance(norm: Any, entering: Tensor) -> Tensor:
    """Return the distance between the statistics of a batch norm's input and its running statistics."""
    dims = [dim for dim in range(entering.dim()) if dim != 1]
    variance, mean = torch.var_mean(entering, dims, correction=0)
    expected_variance = norm.running_var + _LEAST_VARIANCE
    ratio = ((variance + _LEAST_VARIANCE) / expected_variance).log()
    distance: Tensor = ((mean - norm.running_mean).square() / expected_variance + ratio.square()).mean()
    return distance
