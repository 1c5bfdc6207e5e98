"""What a model does with channels, found by tracing and running it: each answer once, for all who ask."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils._pytree import TreeSpec, tree_flatten

from nni_topo.errors import NniTopoError, SpeedupError, raised
from nni_topo.network.attention.unfused.own_width import has_own_forward, take_own_width
from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.reasons import Reason
from nni_topo.network.graph.nodes import ShapeNoting, on_modules
from nni_topo.network.graph.tracing import arguments, layer_sizes, trace
from nni_topo.network.layers.derived import LayerSizes, Size, adopt, spatial, with_heads
from nni_topo.network.layers.kinds import CONVOLUTIONS, TRANSPOSED
from nni_topo.network.layers.norms import channel_dim
from nni_topo.network.runtime.copies import evaluating, unwrapped_copy
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.network.runtime.inputs import Call, tensors_of
from nni_topo.network.runtime.memory import out_of_memory
from nni_topo.network.runtime.switches import as_written, random_state_kept
from nni_topo.network.runtime.weights import put_parameters
from nni_topo.network.speedup.dry_run import find_unprunable
from nni_topo.network.speedup.sizes import Compared, second_call
from nni_topo.network.speedup.training_only import read_in_training, unused_tensors

_logger = logging.getLogger(__name__)
_COMPARED = (TreeSpec, tuple, bool, int, float, str)  # of other objects only the same one is equal


@dataclass(frozen=True)
class Trace:
    """A model's graph and how channels go through it, without the model's weights."""

    assembled: Callable[..., GraphModule]  # puts the graph on the modules of a model
    flow: ChannelFlow  # its modules are without values
    reads_values: bool  # values of tensors decided what the forward did
    compared: Compared


class Facts:
    """What was found about a model on inputs of some shapes. It holds no weights.

    It is handed on together with the model, or with a copy of it that has other weights, so that nothing is found out
    twice. It says nothing of inputs of other shapes, nor of other values where values decide what the forward does.
    """

    def __init__(self) -> None:
        self.inputs: list[Any] = []  # shapes, types and devices of tensors, and all other values
        self.values: list[Tensor] = []  # of the tensors, where these decide what the forward does
        self.trace: Trace | None = None
        self.sizes: LayerSizes | None = None
        self.unprunable: dict[int, Reason] | None = None
        self.second: Facts | None = None  # on inputs of another size
        self.second_call: Call | None = None
        self.is_second_known = False

    def fits(self, call: Call) -> bool:
        """Tell whether the facts hold for a call; empty facts fit any call."""
        if not self.inputs:
            return True
        inputs, values = _described(call), tensors_of(call)
        if len(inputs) != len(self.inputs):
            return False
        for one, other in zip(inputs, self.inputs, strict=True):
            can_be_equal = type(one) is type(other) and isinstance(one, _COMPARED)
            if one is not other and not (can_be_equal and one == other):
                return False
        return all(torch.equal(one, other) for one, other in zip(values, self.values, strict=False))

    def __reduce__(self) -> Any:
        return Facts, ()  # a copy, or another process, finds out anew


class Analysis:
    """What is known of a model, wrapped by NNI or not, on a call; it is that of the unwrapped model in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        The model. It isn't changed. Between two questions only its weights may change.
    call : Call
        Arguments of the model.
    facts : Facts or None, default=None
        What is known of it already; used if it fits the call.
    """

    def __init__(self, model: nn.Module, call: Call, facts: Facts | None = None) -> None:
        self.model = model
        self.call = call
        self.facts = facts if facts is not None and facts.fits(call) else Facts()
        self.facts.inputs = _described(call)

    @classmethod
    def on(cls, model: nn.Module, example_inputs: Any, facts: Facts | None = None) -> Analysis:
        """Take a model with example inputs, whatever container they come in."""
        return cls(model, call_arguments(example_inputs, model), facts)

    def of(self, model: nn.Module) -> Analysis:
        """Return the analysis of a copy of the model that has other weights."""
        return Analysis(model, self.call, self.facts)

    @property
    def flow(self) -> ChannelFlow:
        """How channels go through the network; its modules are without values."""
        return self.trace.flow

    @property
    def trace(self) -> Trace:
        """The graph of the model."""
        if self.facts.trace is None:
            self.facts.trace = _trace(self.model, self.call)
            if self.facts.trace.reads_values:
                self.facts.values = [each.clone() for each in tensors_of(self.call)]
        return self.facts.trace

    @property
    def sizes(self) -> LayerSizes:
        """Shapes of what enters and leaves each layer, by call."""
        if self.facts.sizes is None:
            self.facts.sizes = layer_sizes(self.model, self.call)
        return self.facts.sizes

    @property
    def unprunable(self) -> dict[int, Reason]:
        """The channels that a dry run finds to be unprunable although nothing pins them: by group id, the reason."""
        if self.facts.unprunable is None:
            self.facts.unprunable = find_unprunable(self)
        return self.facts.unprunable

    @property
    def planes(self) -> dict[str, tuple[Size, Size]]:
        """Sizes in pixels of what enters and leaves each convolution, transposed or not, at its first call."""
        found = dict[str, tuple[Size, Size]]()
        for name, calls in self.sizes.items():
            module = self.model.get_submodule(name)
            if isinstance(module, CONVOLUTIONS + TRANSPOSED):
                entering, leaving = calls[0]
                found[name] = spatial(module, entering), spatial(module, leaving)
        return found

    @property
    def depends_on_size(self) -> bool:
        """Whether the forward compares sizes with numbers or joins channels with places.

        Then the coupling of channels may not be the same at another size.
        """
        return bool(self.trace.compared) or self.flow.mixes_places

    @property
    def second(self) -> Analysis | None:
        """The same model on inputs of another size; None if there is none that it takes and can be traced on."""
        known = self.facts
        if not known.is_second_known:
            copied: nn.Module = evaluating(unwrapped_copy(self.model, light=True))
            call = second_call(copied, self.call, self.trace.compared)
            if call is not None:
                other = Analysis(self.model, call)
                try:
                    _ = other.trace
                except NniTopoError as error:
                    _logger.debug("%s can't be traced at another size: %s", type(self.model).__name__, error)
                else:
                    known.second, known.second_call = other.facts, call
            known.is_second_known = True
        return None if known.second_call is None else Analysis(self.model, known.second_call, known.second)

    def graph(self, model: nn.Module, call: Call | None = None) -> tuple[GraphModule, tuple[Any, ...]]:
        """Put the graph on the modules of a model of this structure and run it on a call, by default its own."""
        graph_module = self.trace.assembled(model)
        args = arguments(graph_module.graph, model, call or self.call)
        with torch.no_grad(), random_state_kept(), as_written():
            ShapeNoting(graph_module).run(*args)
        return graph_module, args


def _trace(model: nn.Module, call: Call) -> Trace:
    """Trace a model.

    A forward that gives what its layers put out the width of its input is traced as one that doesn't, if it can be
    rewritten so that it takes that width nowhere.
    """
    found = _traced_with(model, call, {})
    foreign = found.flow.foreign_widths()
    if not foreign:
        return found
    own_widths, modules = dict[str, int](), dict(unwrapped_copy(model, light=True).named_modules())
    for name, (dim, by_kept, _) in foreign.items():
        if name not in modules or has_own_forward(modules[name]):
            continue
        # Where else it takes the width, channels have to be as many, which those that stay can't be in any case.
        if take_own_width(modules[name], dim, wholly=not by_kept):
            own_widths[name] = dim
    while own_widths:
        rewritten = _traced_with(model, call, own_widths)
        left = set[str]()
        for name, (_, by_kept, times) in rewritten.flow.foreign_widths().items():
            # Where it is still taken in fewer places, those of other layers, their channels are as many.
            if name in own_widths and by_kept >= foreign[name].by_kept and times >= foreign[name].times:
                left.add(name)
        if not left:
            return rewritten
        own_widths = {name: dim for name, dim in own_widths.items() if name not in left}
    return found


def _traced_with(original: nn.Module, call: Call, own_widths: dict[str, int]) -> Trace:
    """Trace a model with the forwards of some modules rewritten; see `take_own_width`."""

    def copied() -> nn.Module:
        model: nn.Module = evaluating(unwrapped_copy(original, light=True))
        for name, dim in own_widths.items():
            take_own_width(model.get_submodule(name), dim)
        adopt(model)
        for module in model.modules():
            channel_dim(module)  # which runs it: not while the model is recorded
        return model

    model = copied()
    recording = trace(model, call)
    graph_module = recording.graph_module
    read = dict[str, Any]()
    if unused := unused_tensors(model, graph_module.graph):
        # What was traced may hold things of its tracer's.
        read = read_in_training(copied(), unused, call)
    try:
        flow = ChannelFlow(graph_module, recording.args, read)
    except Exception as error:  # a forward may do with tensors what no rule has seen yet
        if isinstance(error, NniTopoError) or out_of_memory(error):
            raise
        raise SpeedupError(
            f"the channels of a model must be followed to be removed, got {raised(error)} ({type(original).__name__})"
        ) from error
    flow.own_widths = own_widths
    graph = copy.deepcopy(graph_module.graph)
    held = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    # What the forward makes by itself the tracer keeps in the copy; all else is the model's, whatever it holds now.
    constants = dict[str, Any]()
    for name in held:
        try:
            attrgetter(name)(original)
        except AttributeError:
            constants[name] = attrgetter(name)(graph_module)
    put_parameters(graph_module, lambda _, parameter: parameter.to("meta"))
    graph_module.to("meta")
    assembled = partial(_assembled, graph, constants)
    return Trace(assembled, flow, recording.reads_values, recording.compared)


def _assembled(graph: Graph, constants: dict[str, Any], model: nn.Module) -> GraphModule:
    graph = copy.deepcopy(graph)
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    parts = {name: constants[name].clone() if name in constants else attrgetter(name)(model) for name in targets}
    assembled: GraphModule = evaluating(with_heads(on_modules(parts, graph, type(model).__name__)))
    return assembled


def _described(call: Call) -> list[Any]:
    """List what a trace depends on in a call: containers, shapes and types of tensors, and all other values."""
    leaves, structure = tree_flatten(call)
    shapes = [(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return [structure, *shapes]
