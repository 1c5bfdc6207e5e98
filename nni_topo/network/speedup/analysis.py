"""How a model uses channels, found by tracing and running it; each fact is computed once and stored."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only

from nni_topo.errors import NniTopoError, SpeedupError, out_of_memory, raised
from nni_topo.network.attention.unfused.own_width import has_own_forward, take_own_width
from nni_topo.network.channels import reasons
from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.channels.reasons import Reason
from nni_topo.network.graph.nodes import RANDOM, ShapeNoting, on_modules
from nni_topo.network.graph.recording import TURNED, Decision, calls_on_weights
from nni_topo.network.graph.traced_int import Check
from nni_topo.network.graph.tracing import arguments, is_in_parts, layer_sizes, trace
from nni_topo.network.layers.derived import LayerSizes, Size, adopt, spatial, with_heads
from nni_topo.network.layers.kinds import CONVOLUTIONS, TRANSPOSED
from nni_topo.network.layers.norms import channel_dim
from nni_topo.network.runtime.copies import detached_copy, evaluating, put_parameters, unwrapped_copy
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.network.runtime.inputs import Call, batch_size, first_samples, take_samples, tensors_of
from nni_topo.network.runtime.products import ProductsReused
from nni_topo.network.runtime.results import hands_over_more_in_training, mode_readers, put_in_training
from nni_topo.network.runtime.switches import DropoutOff, as_written, random_state_kept
from nni_topo.network.speedup.dry_run import find_unprunable

_logger = logging.getLogger(__name__)
_COMPARED = (TreeSpec, tuple, bool, int, float, str)  # other objects are compared by identity
_SMALL = 64  # positions, allowed for any input
_DECISIONS = 16  # at most so many other values of tensors are tried
_MULTIPLES = (8, 16, 32)  # divisors that networks require of image sides


@dataclass(frozen=True)
class Trace:
    """A model's graph and channel flow, without the model's weights."""

    assembled: Callable[..., GraphModule]  # puts the graph on the modules of a model
    flow: ChannelFlow  # its modules hold no values
    reads_values: bool  # whether the forward depends on values of tensors, as in a branch
    compared: tuple[Check, ...]  # comparisons of a size, such as an image's height, with a number
    decisions: tuple[Decision, ...]  # values with which the forward may take another branch
    of_samples: tuple[Check, ...]  # checks of a multiple of the number of samples: function, factor, other number
    reads_mode: bool  # whether the forward reads a module's mode, so that it may do something else in training mode


class Facts:
    """Facts about a model on inputs of given shapes, without weights.

    They are passed on with the model, or with a copy that has other weights, so that nothing is computed twice. They
    don't hold for inputs of other shapes, or for other values if the forward depends on values.
    """

    def __init__(self) -> None:
        self.inputs: list[Any] = []  # shapes, types and devices of tensors, and all other values
        self.values: list[Tensor] = []  # of the tensors, if the forward depends on these
        self.trace: Trace | None = None
        self.sizes: LayerSizes | None = None
        self.unprunable: dict[int, Reason] | None = None
        self.second: Facts | None = None  # on inputs of another size
        self.second_call: Call | None = None
        self.is_second_known = False
        self.by_samples: list[tuple[Call, Facts]] | None = None  # with other numbers of samples
        self.by_values: dict[Decision, Facts] | None = None  # with other branches than the values decide on

    def fits(self, call: Call) -> bool:
        """Tell whether the facts hold for a call; empty facts fit any call."""
        if not self.inputs:
            return True
        inputs, values = _described(call), tensors_of(call)
        if len(inputs) != len(self.inputs):
            return False
        for leaf, stored in zip(inputs, self.inputs, strict=True):
            can_be_equal = type(leaf) is type(stored) and isinstance(leaf, _COMPARED)
            if leaf is not stored and not (can_be_equal and leaf == stored):
                return False
        return all(
            torch.equal(tensor, stored_tensor) for tensor, stored_tensor in zip(values, self.values, strict=False)
        )

    def __reduce__(self) -> Any:
        return Facts, ()  # a copy, or another process, starts without facts


class Analysis:
    """Facts about a model on a call, in evaluation mode and without NNI's wrappers, computed when first needed.

    Parameters
    ----------
    model : torch.nn.Module
        The model. It isn't changed. Only its weights may change between two uses.
    call : Call
        Arguments of the model.
    facts : Facts or None, default=None
        Known facts; used if they fit the call.
    """

    def __init__(self, model: nn.Module, call: Call, facts: Facts | None = None) -> None:
        self.model = model
        self.call = call
        self.facts = facts if facts is not None and facts.fits(call) else Facts()
        self.facts.inputs = _described(call)

    @classmethod
    def on(cls, model: nn.Module, example_inputs: Any, facts: Facts | None = None) -> Analysis:
        """Analyse a model on example inputs in any container."""
        return cls(model, call_arguments(example_inputs, model), facts)

    def of(self, model: nn.Module) -> Analysis:
        """Return an analysis with the same facts, for a copy of the model that has other weights."""
        return Analysis(model, self.call, self.facts)

    @property
    def flow(self) -> ChannelFlow:
        """The channel flow of the network; its modules hold no values."""
        return self.trace.flow

    @property
    def trace(self) -> Trace:
        """The graph of the model."""
        if self.facts.trace is None:
            self.facts.trace = _trace(self.model, self.call)
            if self.facts.trace.reads_values:
                self.facts.values = [tensor.clone() for tensor in tensors_of(self.call)]
        return self.facts.trace

    @property
    def sizes(self) -> LayerSizes:
        """Input and output shapes of each layer, by call."""
        if self.facts.sizes is None:
            self.facts.sizes = layer_sizes(self.model, self.call)
        return self.facts.sizes

    @property
    def unprunable(self) -> dict[int, Reason]:
        """Channels that a dry run finds unprunable although nothing pins them: by group id, the reason."""
        if self.facts.unprunable is None:
            self.facts.unprunable = find_unprunable(self)
        return self.facts.unprunable

    @property
    def planes(self) -> dict[str, tuple[Size, Size]]:
        """Input and output sizes, in pixels, of each convolution, transposed or not, at its first call."""
        planes = dict[str, tuple[Size, Size]]()
        for name, calls in self.sizes.items():
            module = self.model.get_submodule(name)
            if isinstance(module, CONVOLUTIONS + TRANSPOSED):
                entering, leaving = calls[0]
                planes[name] = spatial(module, entering), spatial(module, leaving)
        return planes

    @property
    def depends_on_size(self) -> bool:
        """Whether the forward compares sizes with numbers or joins channels with positions.

        Then channels may be coupled differently at another size.
        """
        return bool(self.trace.compared) or self.flow.mixes_places

    @property
    def second(self) -> Analysis | None:
        """The analysis on inputs of another size; None if the model runs on none that was tried, or can't be traced."""
        stored = self.facts
        if not stored.is_second_known:
            copied: nn.Module = evaluating(unwrapped_copy(self.model, light=True))
            call = _second_call(copied, self.call, self.trace.compared)
            if call is not None and (facts := self._facts_on(call)) is not None:
                stored.second, stored.second_call = facts, call
            stored.is_second_known = True
        if stored.second_call is None:
            return None
        return Analysis(self.model, stored.second_call, stored.second)

    @property
    def by_samples(self) -> list[Analysis]:
        """Analyses with other numbers of samples, with which the forward takes other branches than on this call."""
        stored = self.facts
        if stored.by_samples is None:
            stored.by_samples = []
            for call in _calls_by_samples(self.model, self.call, self.trace.of_samples):
                if (facts := self._facts_on(call)) is not None:
                    stored.by_samples.append((call, facts))
        return [Analysis(self.model, call, facts) for call, facts in stored.by_samples]

    @property
    def variants(self) -> list[Analysis]:
        """The analyses on inputs of other sizes, if what holds may depend on these."""
        second = self.second if self.depends_on_size else None
        if second is None:
            return self.by_samples
        return [second, *self.by_samples]

    @property
    def by_values(self) -> dict[Decision, Analysis]:
        """Analyses of other branches than the ones on which the values of tensors decide, as far as they can be run."""
        stored, few = self.facts, first_samples(self.call)
        if stored.by_values is None:
            stored.by_values = {}
            decisions = self.trace.decisions[:_DECISIONS]
            copied: nn.Module = evaluating(unwrapped_copy(self.model, light=True)) if decisions else self.model
            products = ProductsReused()
            with products:
                usual = calls_on_weights(copied, few) if decisions else None
            for decision in decisions:
                token = TURNED.set(decision)
                try:
                    with products:
                        # A branch that only warns, or makes a mask, calls the same functions.
                        is_usual = bool(usual) and calls_on_weights(copied, few) == usual
                    facts = None if is_usual else self._facts_on(few)
                finally:
                    TURNED.reset(token)
                if facts is not None:
                    stored.by_values[decision] = facts
        return {decision: Analysis(self.model, few, facts) for decision, facts in stored.by_values.items()}

    def _facts_on(self, call: Call) -> Facts | None:
        """Return facts about the model on another call; None if it can't be traced there."""
        analysis = Analysis(self.model, call)
        try:
            _ = analysis.trace
        except NniTopoError as error:
            _logger.debug("%s can't be traced at another size: %s", type(self.model).__name__, error)
            return None
        return analysis.facts

    def graph(self, model: nn.Module, call: Call | None = None) -> tuple[GraphModule, tuple[Any, ...]]:
        """Put the graph on the modules of a model with this structure, and run it, by default on the analysed call."""
        graph_module = self.trace.assembled(model)
        args = arguments(graph_module.graph, model, call or self.call)
        with torch.no_grad(), random_state_kept(), as_written():
            ShapeNoting(graph_module).run(*args)
        return graph_module, args


def _trace(model: nn.Module, call: Call) -> Trace:
    """Trace a model.

    Some forwards reshape the output of their layers to the width of the forward's input. If such a forward can be
    rewritten without that width, the rewritten one is traced.
    """
    plain_trace = _traced_with(model, call, {})
    foreign = plain_trace.flow.foreign_widths()
    if not foreign:
        return plain_trace
    own_widths, modules = dict[str, int](), dict(unwrapped_copy(model, light=True).named_modules())
    for name, (dim, by_kept, _) in foreign.items():
        if name not in modules or has_own_forward(modules[name]):
            continue
        # A forward that also computes with the width needs as many reshaped channels as inputs, so it isn't rewritten,
        # unless the reshaped channels can't be removed.
        if take_own_width(modules[name], dim, wholly=not by_kept):
            own_widths[name] = dim
    while own_widths:
        rewritten = _traced_with(model, call, own_widths)
        dropped = set[str]()
        for name, (_, by_kept, times) in rewritten.flow.foreign_widths().items():
            # If fewer reshapes take the width than before, the rest reshape other layers with as many channels.
            if name in own_widths and by_kept >= foreign[name].by_kept and times >= foreign[name].times:
                dropped.add(name)
        if not dropped:
            return rewritten
        own_widths = {name: dim for name, dim in own_widths.items() if name not in dropped}
    return plain_trace


def _traced_with(original: nn.Module, call: Call, own_widths: dict[str, int]) -> Trace:
    """Trace a model with the forwards of some modules rewritten; see `take_own_width`."""

    def copied() -> nn.Module:
        model: nn.Module = evaluating(unwrapped_copy(original, light=True))
        for name, dim in own_widths.items():
            take_own_width(model.get_submodule(name), dim)
        adopt(model)
        for module in model.modules():
            channel_dim(module)  # runs the module, so call it before recording
        return model

    model, products = copied(), ProductsReused()
    with mode_readers(model) as readers, products:
        recording = trace(model, call)
    graph_module = recording.graph_module
    # New copies, because the traced one may hold objects of the tracer.
    unused, kept_for_training = unused_tensors(model, graph_module.graph), list[tuple[str, np.ndarray, Reason]]()
    is_turned = TURNED.get() is not None  # of another branch only the couplings are needed
    if not is_turned and (unused or (readers and hands_over_more_in_training(copied(), call, products))):
        kept_for_training = _kept_for_training(copied(), unused, call)
    try:
        flow = ChannelFlow(graph_module, recording.args, kept_for_training)
    except Exception as error:  # a forward may do what no rule covers yet
        if isinstance(error, NniTopoError) or out_of_memory(error):
            raise
        raise SpeedupError(
            f"the channels of a model must be followed to be removed, got {raised(error)} ({type(original).__name__})"
        ) from error
    flow.own_widths = own_widths
    graph = copy.deepcopy(graph_module.graph)
    targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    # Store the tensors that the forward makes itself. All others are read from the model when the graph is assembled.
    constants = dict[str, Any]()
    for name in targets:
        try:
            attrgetter(name)(original)
        except AttributeError:
            constants[name] = attrgetter(name)(graph_module)
    put_parameters(graph_module, lambda parameter: parameter.to("meta"))
    graph_module.to("meta")
    assembled = partial(_assembled, graph, constants)
    compared = recording.compared + flow.compared_sizes()
    return Trace(
        assembled,
        flow,
        recording.reads_values,
        compared,
        recording.decisions,
        recording.of_samples,
        reads_mode=bool(readers),
    )


def _assembled(graph: Graph, constants: dict[str, Any], model: nn.Module) -> GraphModule:
    graph = copy.deepcopy(graph)
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    parts = dict[str, Any]()
    for name in targets:
        if name in constants:
            parts[name] = constants[name].clone()
        else:
            parts[name] = attrgetter(name)(model)
    assembled: GraphModule = evaluating(with_heads(on_modules(parts, graph, type(model).__name__)))
    return assembled


def _described(call: Call) -> list[Any]:
    """List what a trace depends on in a call: containers, tensors' shapes, types and devices, and all other values."""
    leaves, structure = tree_flatten(call)
    description: list[Any] = [structure]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf = leaf.shape, leaf.dtype, leaf.device
        description.append(leaf)
    return description


def _second_call(model: nn.Module, call: Call, compared: tuple[Check, ...]) -> Call | None:
    """Return inputs of another size that a model runs on, with two samples if it takes these; None if none is found.

    Dimensions of equal size, such as height and width, or the lengths of tokens and their mask, change together. First,
    sizes with which the forward's comparisons of sizes with numbers give something else are tried, then the size plus
    one, then the next multiples of 8, 16 and 32. ``model`` is a copy in evaluation mode.
    """
    few = first_samples(call)
    for start in (few, call) if few is not call else (call,):
        resized = start
        for size in sorted({size for tensor in tensors_of(start) for size in tensor.shape[1:]}, reverse=True):
            for new_size in _other_sizes(size, compared):
                tried = _resized(resized, size, new_size)
                if _runs_on(model, tried):
                    resized = tried
                    break
        if resized is not start:
            return resized
    return None


def _calls_by_samples(model: nn.Module, call: Call, of_samples: tuple[Check, ...]) -> list[Call]:
    """Return calls that a model runs on, with the fewest samples with which a comparison gives something else."""
    calls = dict[int, Call]()
    samples, copied = batch_size(call), None
    for function, factor, number in of_samples:
        expected = bool(function(factor * samples, number))
        if any(bool(function(factor * count, number)) != expected for count in calls):
            continue
        if copied is None:
            copied = evaluating(unwrapped_copy(model, light=True))
        for n_samples in range(1, max(3 * samples, _SMALL) + 1):  # many more samples might not fit into memory
            if bool(function(factor * n_samples, number)) == expected:
                continue
            tried = take_samples(call, torch.arange(n_samples) % samples)
            if _runs_on(copied, tried):
                calls[n_samples] = tried
            break
    return list(calls.values())


def _runs_on(model: nn.Module, call: Call) -> bool:
    """Tell whether a model runs on a call."""
    args, kwargs = tree_map_only(Tensor, Tensor.clone, call)
    try:
        with torch.no_grad(), random_state_kept():
            model(*args, **kwargs)
    except Exception:  # a model may raise anything on other sizes, or run out of memory
        return False
    return True


def _other_sizes(size: int, compared: tuple[Check, ...]) -> Iterator[int]:
    """Yield the sizes to try instead of ``size``, each once."""
    sizes = list[int]()
    for function, compared_size, number in compared:
        # The compared size may be a feature map's, which grows with the input.
        threshold = size * number / compared_size if compared_size > 0 else 0
        candidates = [int(threshold)]
        for multiple in (32, 16, 8, 1):
            candidates.append(int(threshold - 1e-9) // multiple * multiple)
            candidates.append((int(threshold) // multiple + 1) * multiple)
        for candidate in candidates:
            # Much larger inputs might not fit into memory.
            if not 0 < candidate <= max(3 * size, _SMALL):
                continue
            if bool(function(compared_size * candidate // size, number)) != bool(function(compared_size, number)):
                sizes.append(candidate)
    sizes += [size + 1, *((size // multiple + 1) * multiple for multiple in _MULTIPLES)]
    for other_size in dict.fromkeys(sizes):
        if other_size != size:
            yield other_size


def _resized(call: Call, size: int, new_size: int) -> Call:
    """Resize all dimensions of one size except the first; if they grow, the values repeat."""

    def resize(tensor: Tensor) -> Tensor:
        for d in range(1, tensor.dim()):
            if tensor.shape[d] == size:
                tensor = tensor.index_select(d, torch.arange(new_size, device=tensor.device) % size)
        return tensor

    resized: Call = tree_map_only(Tensor, resize, call)
    return resized


def unused_tensors(model: nn.Module, graph: Graph) -> list[str]:
    """List the parameters and floating buffers of a model that no node of its graph uses, by name."""
    used = set[int]()
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        try:
            value = attrgetter(str(node.target))(model)
        except AttributeError:  # a constant that only the tracer knows
            continue
        if isinstance(value, nn.Module):
            used.update(id(tensor) for tensor in (*value.parameters(), *value.buffers()))
        else:
            used.add(id(value))
    # Scalars, counters and masks have no channels.
    float_buffers = [
        (name, buffer) for name, buffer in model.named_buffers() if buffer.dim() and buffer.is_floating_point()
    ]
    return [name for name, tensor in (*model.named_parameters(), *float_buffers) if id(tensor) not in used]


def _kept_for_training(model: nn.Module, unused: list[str], call: Call) -> list[tuple[str, np.ndarray, Reason]]:
    """Find the channels that are needed in training mode only: by modules such as auxiliary heads, or by the caller.

    The model, in evaluation mode, is traced a second time in training mode; if that fails, with no other modules in
    training mode than those that contain ``unused`` parameters, which the first graph doesn't use. Returns layers, each
    with the channels to keep, bool, (channels,), and why; none if the model can't be traced in training mode.
    """
    flow: ChannelFlow | None = None
    owners = {name[:end] for name in unused for end, letter in enumerate(name) if letter == "."} | {""}
    for names in (None, owners) if unused else (None,):
        try:
            # The copy has weights of its own, because a forward may write into them in training mode.
            trained = detached_copy(model)
            put_in_training(trained, names)
            with DropoutOff():
                recording = trace(trained, call)
            graph = recording.graph_module.graph
            if is_in_parts(graph):
                raise SpeedupError("a model must be traced as a whole to follow training mode, got one traced in parts")
            for node in graph.nodes:
                node.meta.pop(RANDOM, None)  # of dropout; channels that are random in evaluation mode are kept anyway
            flow = ChannelFlow(recording.graph_module, recording.args)
            break
        except Exception as error:  # a user's forward may raise anything
            if out_of_memory(error):
                raise
            _logger.debug("%s can't be followed in training mode", type(model).__name__, exc_info=True)
    if flow is None:
        return []
    # The nodes that depend on an input, or whose values are later combined with such a node or returned.
    reached = set[Node]()
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    for node in reversed(graph.nodes):
        if not reached.isdisjoint(node.users):
            reached.add(node)
    readers = dict[int, str]()  # by group id, the module that reads the channel
    for node in graph.nodes:
        name = str(node.target)
        if node.op not in ("call_module", "get_attr") or node not in reached:
            continue
        if not any(tensor == name or tensor.startswith(f"{name}.") for tensor in unused):
            continue
        for user in (node,) if node.op == "call_module" else node.users:
            for tensor in (*user.all_input_nodes, user):  # channels coupled with a module's output are kept, too
                for ids in tensors_of(flow.ids[tensor.name]):
                    for group in np.unique(flow.group_ids(ids.numpy().ravel())).tolist():
                        readers.setdefault(group, name)
    readers.pop(FIXED, None)
    channels_to_keep = list[tuple[str, np.ndarray, Reason]]()
    for layer in flow.layers:
        groups = flow.group_ids_of(layer)
        read = [readers[group] for group in groups.tolist() if group in readers]
        if read:
            channels_to_keep.append((layer, np.isin(groups, list(readers)), reasons.training_reader(read[0])))
        if (groups == FIXED).any():
            channels_to_keep.append((layer, groups == FIXED, flow.why_pinned(layer)[0]))
        channels_to_keep.append((layer, np.isin(groups, flow.at_output), reasons.training_output()))
    return channels_to_keep
