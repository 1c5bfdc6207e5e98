"""The functional cloud: the effect of a neuron's outputs on the layers that read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import Node

from nni_topo.context import context, leaving_out
from nni_topo.errors import LayerError, listed
from nni_topo.network.attention.unfused.multihead import mixing_called
from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.channels.rules import operation_name
from nni_topo.network.layers.derived import weight_used
from nni_topo.network.layers.kinds import WEIGHTED, by_channel, is_depthwise, weight_of
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import run, structure_call, structure_of
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import Call, calls, tensors_of
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.clouds.moments import ChannelMoments, points_of_gram
from nni_topo.pruners.hooks import Data, DataCollector, PruningContext
from nni_topo.pruners.units import PruningUnit, output_blocks
from nni_topo.rules import checked

IntArray = NDArray[np.int64]


class FunctionalCollector(DataCollector):
    """The functional cloud: a neuron's outputs where they are read, weighted by how strongly they are read.

    A neuron's coordinates are its values at the input of each next layer (after batch norm, activation and pooling),
    minus their mean, which the reading layer's bias can take over, times the norm of the weights that read them. So a
    neuron that is constant, or that is read with zero weights, lies at the origin, and two neurons are near each other
    if one can replace the other. The coordinates of an attention head are what it adds to the residual stream.

    Parameters
    ----------
    calibration : iterable
        Batches of inputs, or of ``(inputs, ...)``. They are read once, see :class:`nni_topo.Calibration`.

    Notes
    -----
    Only inner products are summed up, batch by batch: memory is independent of the number of samples, and the cloud is
    returned as ``n`` points in ``n`` dimensions with the same distances. The members of a dependency group make the
    same channels: the first one gets the joint cloud, the others an empty one.
    """

    @checked()
    def __init__(self, calibration: Iterable[Any]) -> None:
        self.calibration = Calibration.of(calibration)

    def check(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        """Raise ConfigError for layers that no layer reads."""
        check_read(model, modules, structure_call(model, self.calibration))

    def collect(self, context: PruningContext) -> Data:
        """Return float64 clouds ``(blocks, blocks)``, and ``(blocks, 0)`` for a group's other members."""
        # check() has run the first batch already.
        call = structure_of(context.model, next(calls(context.model, self.calibration)))
        flow = Analysis(context.model, call, context.facts).flow
        readers = {unit.name: self.readers(unit, flow, context) for unit in context.units}
        moments = {name: [ChannelMoments(name) for _ in unit_readers] for name, unit_readers in readers.items()}
        pairs = [pair for name in readers for pair in zip(readers[name], moments[name], strict=True)]
        looks = [(reader.module, partial(reader.record, moment)) for reader, moment in pairs]
        with mixing_called(context.model), watched(looks):
            run(context.model, self.calibration)
        joint = {}
        for unit in context.units:
            unit_pairs = zip(readers[unit.name], moments[unit.name], strict=True)
            grams = [reader.gram(moment.gram()) for reader, moment in unit_pairs]
            # Coordinates from several readers stand side by side, so their inner products add up.
            joint[unit.name] = points_of_gram(torch.stack(grams).sum(0))

        # The members make the same channels, so a cloud for each member would count them several times.
        def points(unit: PruningUnit, module: str, target: str) -> Tensor:
            cloud = joint[unit.name]
            return cloud if (module, target) == unit.members[0] else cloud[:, :0]

        return context.collected(points)

    def readers(self, unit: PruningUnit, flow: ChannelFlow, context: PruningContext) -> list[ChannelReader]:
        """Return the layers that read a unit, with how strongly they read each channel."""
        return readers_of(unit, flow, context)


@dataclass(frozen=True)
class ChannelReader:
    """A layer that reads a unit: where each channel enters, ``(channels, places)``, and how strongly it's read.

    Channels that enter in fewer places than others are padded with places of -1 and strength 0.
    """

    module: nn.Module
    places: IntArray
    strength: Tensor
    mixes: bool = False  # a channel is an attention head, and the layer sums up its inputs from the head

    def record(self, moments: ChannelMoments, entering: Tensor) -> None:
        """Add an input of the layer to running sums."""
        rows = by_channel(self.module, entering)
        if self.mixes:
            moments.add(rows[torch.from_numpy(self.places.ravel()).to(rows.device)])
            return
        # ``(channels, places, samples)``: after a flattening a linear layer reads a channel in several places.
        moments.add(rows[torch.from_numpy(self.places).to(rows.device)], self.strength.to(rows.device))

    def gram(self, gram: Tensor) -> Tensor:
        """Return inner products of channels ``(channels, channels)``, given the sums of :meth:`record`."""
        if not self.mixes:
            return gram
        weight = weight_used(self.module).detach().double().cpu()[:, torch.from_numpy(self.places.ravel())]
        inner: Tensor = (gram * (weight.T @ weight)).view(*self.places.shape, *self.places.shape).sum((1, 3))
        return inner


def readers_of(
    unit: PruningUnit, flow: ChannelFlow, context: PruningContext, *, order: float = 2.0
) -> list[ChannelReader]:
    """Return the layers that read a unit, with norms of this order as strengths; ConfigError if none reads it."""
    lead, target = unit.members[0]
    outputs = output_blocks(context.target_spaces[lead][target], "channels that are scored by the next layer")
    together = np.sort(flow.units(lead)) if lead in flow.layers else None
    if together is not None and outputs.shape[1] > together.shape[1]:
        raise LayerError(
            f"a block must hold only coupled channels, got blocks of {outputs.shape[1]} channels, but coupled sets of "
            f"{together.shape[1]} ({unit.name}); round_to keeps multiples of channels",
            [lead],
        )
    if together is None and lead not in flow.layers:
        raise LayerError(
            "a layer that is scored by the next one must run on the first batch, got one that doesn't, such as an "
            f"expert that a router gives nothing: put another batch first, or leave the layer out ({unit.name})",
            [lead],
        )
    if together is None or not np.array_equal(together, outputs):
        raise LayerError(
            f"coupled channels must be in one dependency group, as dependency_groups makes them ({unit.name})",
            [lead],
        )
    reading = _reading_layers(lead, flow, dict(context.model.named_modules()))
    if not reading:
        raise unread_error([unit.name], flow)
    mixes = lead in flow.heads and not flow.heads[lead].recurrent
    return [ChannelReader(module, places, read_strength(module, places, order), mixes) for module, places in reading]


def check_read(
    model: nn.Module, modules: Iterable[str], call: Call, kinds: tuple[type[nn.Module], ...] = (nn.Module,)
) -> None:
    """Raise ConfigError, with their names, for layers with channels that no layer of these kinds reads."""
    flow = Analysis(model, call, context().facts).flow
    by_name = dict(model.named_modules())
    makes_channels = set(flow.layers) - set(flow.output_projections())
    unread = [name for name in modules if name in makes_channels and not _reading_layers(name, flow, by_name, kinds)]
    giving_output = [name for name in unread if flow.reaches_output(name)]
    if giving_output:
        raise LayerError(
            "channels of the layer that gives the model's output can't be removed, got "
            f"{listed(giving_output)}: {leaving_out('it')} ({listed(giving_output)})",
            giving_output,
        )
    if unread:
        raise unread_error(unread, flow)


def unread_error(names: list[str], flow: ChannelFlow) -> LayerError:
    """Return the error for layers that no linear layer or convolution reads: what reads them, and advice."""
    readers = listed(list(dict.fromkeys(reader for name in names for reader in _other_readers(name, flow)))) or "none"
    return LayerError(
        "the channels of a pruned layer are scored by the linear layers and convolutions that read all of them, got "
        f"{readers}: {leaving_out('the pruned layer')}, or take a pruner that looks "
        f"at the layer's own weights, such as TopologicalPruner(cloud='weight') ({', '.join(names)})",
        names,
    )


def _other_readers(name: str, flow: ChannelFlow) -> Iterator[str]:
    """Yield in words the operations that take a layer's channels and give none of them."""
    channels = set(flow.group_ids(flow.unit_channel_ids(name)).ravel().tolist()) - {FIXED}

    def has_channels(node: Node) -> bool:
        entries = [flow.group_ids(ids.numpy()) for ids in tensors_of(flow.ids[node.name])]
        return any(not channels.isdisjoint(np.unique(ids).tolist()) for ids in entries)

    for node in flow.traced.graph.nodes:
        if has_channels(node) or not any(map(has_channels, node.all_input_nodes)):
            continue
        if node.op == "output":
            yield "the model's output"
        elif node.op == "call_module":
            yield f"{type(flow.traced.get_submodule(str(node.target))).__name__} ({node.target})"
        else:
            parameters = [str(parent.target) for parent in node.all_input_nodes if parent.op == "get_attr"]
            name_of_node = operation_name(node)
            if parameters:
                name_of_node += f" with the parameter {listed(parameters)}"
            yield name_of_node


def _reading_layers(
    name: str, flow: ChannelFlow, modules: dict[str, nn.Module], kinds: tuple[type[nn.Module], ...] = (nn.Module,)
) -> list[tuple[nn.Module, IntArray]]:
    """Return the layers of these kinds that read a layer's channels, and where each channel enters.

    If any layers read every channel in equally many places, these alone are returned. Else the layers that read some
    channels, as after a split, if together they read all channels that can be removed.
    """
    channels = flow.group_ids(flow.unit_channel_ids(name))
    alike, partial_readers = list[tuple[nn.Module, IntArray]](), list[tuple[nn.Module, IntArray]]()
    for layer in flow.layers:
        module = modules[layer]
        # A depthwise convolution passes each channel on separately: the layer after it reads the channels.
        if isinstance(module, kinds) and not is_depthwise(module):
            places = _places(channels, flow.entering_group_ids(layer))
            if not places.size:
                continue
            if (places < 0).any():
                partial_readers.append((module, places))
            else:
                alike.append((module, places))
    if alike or name in flow.heads or not partial_readers:
        return alike
    is_read = np.any([(places >= 0).any(1) for _, places in partial_readers], axis=0)
    if not is_read[channels != FIXED].all():
        return []
    return partial_readers


def _places(channels: IntArray, entering: IntArray) -> IntArray:
    """Return the input positions of each channel, ``(channels, places)``, padded with -1."""
    order = np.argsort(entering, kind="stable")
    first, end = (np.searchsorted(entering[order], channels, side) for side in ("left", "right"))
    # All channels that can't be removed, and constants, have the id FIXED.
    counts = np.where(channels == FIXED, 0, end - first)
    steps = np.arange(counts.max(initial=0))
    return np.where(steps < counts[:, None], np.append(order, -1)[np.minimum(first[:, None] + steps, len(order))], -1)


def read_strength(module: nn.Module, places: IntArray, order: float = 2.0) -> Tensor:
    """Return norms, float64 on the CPU, shape of ``places``, of the weights that read these input channels."""
    weight = weight_used(module) if isinstance(module, WEIGHTED) else weight_of(module)
    weight = weight.detach().double()
    groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False):
        # Its weight has the input channels first, whatever the groups.
        norms = torch.linalg.vector_norm(weight.flatten(1), order, dim=1)
    else:
        # Input channel j of group g is column j of the g-th segment of rows.
        by_group = weight.reshape(groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
        norms = torch.linalg.vector_norm(by_group, order, dim=(1, 3)).reshape(-1)
    strength: Tensor = norms[torch.from_numpy(places).to(norms.device)].cpu()
    return strength.masked_fill(torch.from_numpy(places < 0), 0.0)
