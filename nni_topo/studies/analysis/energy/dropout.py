"""Dropout at test time: how accuracy depends on the dropout rate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.runtime.public import public
from nni_topo.rules import all_of, number
from nni_topo.studies.analysis.energy.study import EvaluateQuality, Quality, quality_of

RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class ActiveDropout(nn.Module):
    """Dropout that is active in evaluation mode, with its own seed; kept values are divided by ``1 - rate``."""

    def __init__(self, rate: float, seed: int) -> None:
        super().__init__()
        self.rate = rate
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, values: Tensor) -> Tensor:
        """Set random values of a tensor of any shape to zero."""
        is_kept = torch.rand(values.shape, generator=self._generator).to(values.device) >= self.rate
        return values * is_kept / (1.0 - self.rate)


def with_dropout(model: nn.Module, rate: float, seed: int) -> nn.Module:
    """Return a copy whose dropout layers are active at test time, all with one rate; ConfigError if it has none."""
    model = copy.deepcopy(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    if not names:
        raise ConfigError(f"a model must have a torch.nn.Dropout, got none ({type(model).__name__})")
    for index, name in enumerate(names):
        model.set_submodule(name, ActiveDropout(rate, seed + index))
    return model


@public(rates=all_of(number(0, 1, "left"), Sequence))
def study_dropout(
    models: Mapping[str, Callable[[], nn.Module]],
    evaluate: EvaluateQuality,
    *,
    rates: Sequence[float] = RATES,
    seed: int = 0,
) -> dict[str, dict[float, Quality]]:
    """Evaluate models under every dropout rate at test time.

    Source: Janjic, MSc thesis, University of Manitoba, 2018, section 5.2.1, table 5.3 and figures 5.17 and 5.18.

    Parameters
    ----------
    models : mapping of str to callable
        Functions that return a model, by name; one model is built at a time.
    evaluate : callable
        Maps a model to its :class:`~nni_topo.analysis.Quality`.
    rates : sequence of float, default=(0.0, 0.1, ..., 0.9)
        Each in [0, 1).
    seed : int, default=0
        Seed of the dropped values, the same for every model.

    Returns
    -------
    dict of str to dict of float to Quality
        By name and rate.
    """
    qualities = {}
    for name, build in models.items():
        model: nn.Module = detached_copy(build())
        qualities[name] = {rate: quality_of(evaluate, with_dropout(model, rate, seed)) for rate in rates}
    return qualities
