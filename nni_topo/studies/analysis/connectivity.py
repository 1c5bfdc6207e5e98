"""Find outputs and channels that no path of kept weights reaches, for masks of single weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import RenderableType
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError, unknown_name
from nni_topo.network.layers.derived import fold
from nni_topo.network.layers.kinds import CONVOLUTIONS, NORMALIZING, by_channel
from nni_topo.network.runtime.arguments import INPUTS, MASKS, MODEL
from nni_topo.network.runtime.copies import detached_copy, evaluation_mode
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import tensors_of
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.runs.provenance import Record
from nni_topo.runs.run import Start
from nni_topo.studies.analysis.pruned import CONNECTIONS, PointsStudy, PrunersStudy, share_kept, study_masks
from nni_topo.studies.study import Names, Tell
from nni_topo.studies.tables import table_of

_SHRINKING = (nn.Softshrink, nn.Hardshrink, nn.Threshold)
_LAYERS = (nn.Linear, *CONVOLUTIONS)


@dataclass(frozen=True)
class Connectivity:
    """The parts of a model that kept weights still connect."""

    outputs: float  # share of the model's outputs that a path of kept weights reaches from its inputs, in [0, 1]
    reached: dict[str, float]  # by layer, the share of its output channels that such a path reaches
    connected: dict[str, float]  # by masked layer, the share of its input and output channels that keep a weight

    @property
    def channels(self) -> float:
        """The lowest of the layers' shares of connected channels; 1 without masks."""
        return min(self.connected.values(), default=1.0)


@public(model=MODEL, example_inputs=INPUTS, masks=MASKS)
def connectivity(model: nn.Module, example_inputs: Any, masks: Mapping[str, Mapping[str, Tensor]]) -> Connectivity:
    """Follow the kept weights from a model's inputs to its outputs.

    Parameters
    ----------
    model : torch.nn.Module
        The model without NNI's wrappers; it isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Its inputs; the first dimension is the batch. Only their shapes matter.
    masks : mapping of str to mapping of str to Tensor
        NNI's masks; layers that aren't named keep all weights.

    Returns
    -------
    Connectivity

    Raises
    ------
    ConfigError
        If the masks name a layer that doesn't exist, the model doesn't run on the inputs, or the output for zeros isn't
        zero, for example because of a sigmoid: then reached outputs can't be distinguished.
    DataError
        If a mask doesn't have its weight's shape.

    Notes
    -----
    A copy of the model runs on ones. In the copy every kept weight is a positive constant, biases are zero, other
    vectors are one, and norms and shrinking activations are removed. With activations like ReLU, a value is then
    positive if a path of kept weights reaches it, and zero otherwise.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> mask = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    >>> found = connectivity(model, torch.ones(1, 2), {"0": {"weight": mask}, "2": {"weight": mask.flip(0)}})
    >>> found.outputs, found.reached, found.channels
    (0.5, {'0': 0.5, '2': 0.5}, 0.75)
    """
    modules = dict(model.named_modules())
    for name in masks:
        if name not in modules:
            raise unknown_name("a layer of masks", name, modules, "connectivity")
    flow = _flow_model(model, masks)
    args, kwargs = call_arguments(example_inputs, model)
    reached: dict[str, float] = {}

    def note(name: str, module: nn.Module, _: Tensor, output: Tensor) -> None:
        reached[name] = float((by_channel(module, output) > 0).any(1).double().mean())

    with evaluation_mode(flow), torch.no_grad():
        if any(bool((out != 0).any()) for out in _outputs(flow, args, kwargs, 0.0)):
            raise ConfigError("connectivity needs a model that maps zeros to zeros without biases, got other outputs")
        layers = [(name, module) for name, module in flow.named_modules() if isinstance(module, _LAYERS)]
        with watched(leaving=[(module, partial(note, name, module)) for name, module in layers]):
            outputs = _outputs(flow, args, kwargs, 1.0)
    is_reached = torch.cat([(out > 0).any(0).flatten() for out in outputs])
    connected = {}
    for name, layer_masks in masks.items():
        if "weight" not in layer_masks:
            continue
        is_kept = layer_masks["weight"].ne(0)
        kernels = is_kept.flatten(2).any(2) if is_kept.dim() > 2 else is_kept
        groups = int(getattr(flow.get_submodule(name), "groups", 1))
        entering = kernels.reshape(groups, -1, kernels.shape[1]).any(1).flatten()
        connected[name] = float(torch.cat([kernels.any(1), entering]).double().mean())
    return Connectivity(float(is_reached.double().mean()), reached, connected)


@dataclass(frozen=True)
class ConnectivityStudy(PointsStudy):
    """All points, with shares in [0, 1]; shares of channels are the lowest share of a layer."""

    stem = "connectivity"


@dataclass(frozen=True, kw_only=True)
class AnalyzeConnectivity(PrunersStudy[ConnectivityStudy]):
    """Measure which channels and outputs of pruned networks are still connected, by pruner."""

    pruners: Names = (CONNECTIONS, "level")  # registered names; connections: random single weights
    ratios: tuple[float, ...] = (0.5, 0.9, 0.95, 0.99)  # of every layer, in [0, 1)

    def find(self, tell: Tell) -> ConnectivityStudy:
        start = self.start()
        return ConnectivityStudy(self.points(start, tell), start.accuracy)

    def point(self, start: Start, name: str, ratio: float) -> Record:
        masks = study_masks(name, start, ratio, self.calibration)
        findings = connectivity(start.net, start.example, masks)
        return {
            "kept": share_kept(masks),
            "outputs": findings.outputs,
            "channels": findings.channels,
            "channels_reached": min(findings.reached.values()),
            "accuracy": start.tested(masked_model(start.net, start.example, masks)),
        }

    def show(self, findings: ConnectivityStudy) -> Iterator[RenderableType]:
        columns = {
            "pruner": "{pruner}",
            "ratio": "{ratio:g}",
            "weights kept %": "{kept:.1%}",
            "outputs reached %": "{outputs:.1%}",
            "channels connected %": "{channels:.1%}",
            "channels reached %": "{channels_reached:.1%}",
            "accuracy %": "{accuracy:.1%}",
        }
        yield table_of(f"connectivity of {self.model}", findings.means().to_dict("records"), columns)


def _flow_model(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
    """Return a copy in double precision with positive constants for kept weights, and without biases and norms."""
    flow: nn.Module = detached_copy(model)
    flow.double()
    for name, module in list(flow.named_modules()):
        if isinstance(module, (*NORMALIZING, *_SHRINKING)):
            flow.set_submodule(name, nn.Identity())
            continue
        fold(module)  # a parametrized weight can't be set to the constant below
        for parameter, values in module.named_parameters(recurse=False):
            mask = masks.get(name, {}).get(parameter)
            if mask is not None and mask.shape != values.shape:
                raise DataError(f"a mask must have its weight's shape, got {tuple(mask.shape)} ({name}.{parameter})")
            is_kept = torch.ones_like(values) if mask is None else mask.to(values).ne(0).to(values)
            if values.dim() > 1:
                flow_values = is_kept / max(1.0, float(is_kept.sum()) / len(is_kept))
            elif parameter.startswith("bias"):
                flow_values = torch.zeros_like(values)
            else:
                flow_values = torch.ones_like(values)
            values.data.copy_(flow_values)
    return flow


def _outputs(model: nn.Module, args: Any, kwargs: Any, value: float) -> list[Tensor]:
    """Run a model with all floating-point inputs filled with a value."""

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.full_like(leaf, value, dtype=torch.float64)
        return leaf

    call = torch.utils._pytree.tree_map(fill, (args, kwargs))
    try:
        return tensors_of(model(*call[0], **call[1]))
    except (RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
        raise ConfigError(f"example_inputs must be ones that the model runs on, got: {error} (forward)") from error
