"""The point clouds by name, as the ``collector`` knob of a pruner takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from nni_topo.errors import ConfigError, unknown_name
from nni_topo.pruners.clouds.coupled import CoupledWeightCollector
from nni_topo.pruners.clouds.folded import FoldedWeightCollector
from nni_topo.pruners.clouds.functional import FunctionalCollector
from nni_topo.pruners.clouds.gradient import GradientCollector
from nni_topo.pruners.clouds.weight import ActivationCollector, Preprocess, WeightCollector
from nni_topo.pruners.hooks import DataCollector

_TRACED: dict[str, Callable[..., DataCollector]] = {
    "coupled": CoupledWeightCollector,
    "folded": FoldedWeightCollector,
}
_MEASURED: dict[str, Callable[..., DataCollector]] = {
    "activation": ActivationCollector,
    "functional": FunctionalCollector,
    "gradient": GradientCollector,
}
CLOUDS = ("auto", "weight", *_TRACED, *_MEASURED)
"""Names of clouds."""


def make_collector(
    collector: str | DataCollector,
    *,
    calibration: Iterable[Any] | None = None,
    example_inputs: Any = None,
    evaluator: Any = None,
    preprocess: Preprocess = "none",
) -> DataCollector:
    """Return a collector by the name of its cloud.

    Parameters
    ----------
    collector : str or DataCollector
        ``"weight"``, ``"folded"``, ``"coupled"``, ``"activation"``, ``"functional"`` or ``"gradient"``; ``"auto"`` is
        ``"functional"`` if there is calibration data, else ``"weight"``. A collector is returned as it is.
    calibration : iterable or None, default=None
        Batches; the gradient cloud needs ``(inputs, targets)``.
    example_inputs : Any, default=None
        Inputs of the model, for the folded and the coupled cloud.
    evaluator : nni.compression.utils.Evaluator or None, default=None
        Serves the activation and the gradient cloud instead of calibration data.
    preprocess : {"none", "center", "standardize", "unit"}, default="none"
        See :class:`~nni_topo.hooks.WeightCollector`.

    Returns
    -------
    DataCollector

    Raises
    ------
    ConfigError
        If the name is unknown, or what the cloud needs isn't given.
    DataError
        If the gradient cloud's calibration data has no targets.
    """
    if isinstance(collector, DataCollector):
        return collector
    if collector == "auto":
        collector = "weight" if calibration is None else "functional"
    if collector == "weight":
        return WeightCollector(preprocess=preprocess)
    if collector in _TRACED:
        if example_inputs is None:
            raise ConfigError(f"collector {collector!r} needs example_inputs, got none (example_inputs)")
        return _TRACED[collector](example_inputs, preprocess=preprocess)
    if collector not in _MEASURED:
        raise unknown_name("collector", str(collector), CLOUDS)
    if calibration is None and collector == "functional":
        raise ConfigError("collector 'functional' needs calibration data, got none (calibration)")
    if calibration is None and evaluator is None and collector == "gradient":
        raise ConfigError("collector 'gradient' needs calibration data or an evaluator, got neither (calibration)")
    return _MEASURED[collector](calibration, preprocess=preprocess)
