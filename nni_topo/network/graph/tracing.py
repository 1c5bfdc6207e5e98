"""The graph of a model, found by running it (`trace`), and the sizes at which its layers run (`layer_sizes`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_topo.errors import ConfigError, SpeedupError, raised
from nni_topo.network.attention.heads import Attention, Given, find_attention, open_attention
from nni_topo.network.attention.unfused.multihead import is_unfused, mixing_called
from nni_topo.network.graph.nodes import RANDOM, ShapeNoting
from nni_topo.network.graph.recording import made_tensors_dropped, record
from nni_topo.network.graph.submodules import by_parts, is_in_parts, part_arguments
from nni_topo.network.layers.derived import LayerSizes, call_of, check_covers_kernel, has_own_forward, inner_of
from nni_topo.network.layers.kinds import CONVOLUTIONS, RECURRENT, WEIGHTED, is_scripted
from nni_topo.network.runtime.comparison import difference, same_program
from nni_topo.network.runtime.copies import detached_copy, evaluation_mode, left_alone
from nni_topo.network.runtime.hooks import called, watched
from nni_topo.network.runtime.inputs import (
    MODEL_ERRORS,
    Call,
    batch_size,
    bind_arguments,
    described,
    let_go,
    returned_tensors,
    tensors_of,
)
from nni_topo.network.runtime.memory import out_of_memory
from nni_topo.network.runtime.switches import (
    as_written,
    drawn_since,
    random_state_kept,
    random_states,
    torch_random_kept,
)

_logger = logging.getLogger(__name__)

_FEW = 2  # samples on which a model is recorded; one alone is what some forwards squeeze away


@dataclass(frozen=True)
class Recording:
    """The graph of a model, on its own leaf modules, and what recording it showed."""

    graph_module: torch.fx.GraphModule
    """with shapes in ``node.meta["tensor_meta"]``"""
    args: tuple[Any, ...]
    """the values of its placeholders"""
    reads_values: bool
    """whether the forward made Python's numbers of tensors' values, so that other weights may give another graph"""
    compared: tuple[tuple[int, int], ...] = ()
    """sizes of inputs or of what is made of them that the forward compared with numbers, and these numbers"""


@as_written()
def trace(model: torch.nn.Module, inputs: Call) -> Recording:
    """Record a model in evaluation mode, which is changed by it, on a call; part by part if need be."""
    for name, module in model.named_modules():
        if is_scripted(module):
            raise ConfigError(
                f"a model must have no modules that torch.jit has compiled, got one ({name}); put the module there "
                "that torch.jit was given"
            )
    try:
        return _trace_whole(model, inputs)
    except SpeedupError as error:
        let_go(error)
        _check_runs(model, inputs)
        try:
            with torch.no_grad(), random_state_kept():
                graph_module, args, reads_values = by_parts(model, inputs, _trace_whole)
                ShapeNoting(graph_module).run(*args)
        except Exception as inner:  # parts fail in as many ways as a model is written
            if out_of_memory(inner):
                raise
            raise error from None
        if not args:
            raise
        _logger.info("%s is followed part by part: %s", type(model).__name__, error)
        return Recording(graph_module, args, reads_values)


def _check_runs(model: torch.nn.Module, call: Call) -> None:
    """Raise if the model itself can't be run on a call."""
    # A recorder that fails may leave its own things in what it runs.
    copied = detached_copy(model, light=True)
    try:
        with torch.no_grad(), random_state_kept():
            copied(*call[0], **call[1])
    except Exception as error:  # a model fails in as many ways as it is written
        if out_of_memory(error):
            raise
        raise ConfigError(
            f"example_inputs must fit the model: {type(model).__name__} can't be run on {described(call)} in "
            f"evaluation mode, got {raised(error)} (example_inputs)"
        ) from error


def _trace_whole(model: torch.nn.Module, call: Call) -> Recording:
    """Record a model on the first few samples of a call where these show all of it, else on the call."""
    named = bind_arguments(model, call)
    samples = batch_size(named)
    if samples > 2 * _FEW:  # a recorder's memory grows with the number of samples
        few: dict[str, Any] = tree_map_only(
            torch.Tensor, lambda each: each[:_FEW] if each.dim() and len(each) == samples else each, named
        )
        try:
            recording = _trace_on(few, named, model, call)
        except SpeedupError as error:  # a forward may ask for a number of samples, or do something else with so few
            _logger.debug("%s can't be recorded on a few samples", type(model).__name__, exc_info=True)
            let_go(error)
        else:
            # Values that decide something are those of all samples.
            if not recording.reads_values:
                return recording
    return _trace_on(named, named, model, call)


def _trace_on(shown: dict[str, Any], named: dict[str, Any], model: torch.nn.Module, call: Call) -> Recording:
    """Record a model on some arguments, and check what the graph computes on all samples of a call."""
    attention = _AttentionCalls(find_attention(model))
    try:
        with torch.no_grad(), random_state_kept():
            with torch_random_kept(), attention.noted(model):
                recorded = record(model, shown)
            graph_module, expected = recorded.graph_module, recorded.outputs
            if shown is not named:
                with torch_random_kept(), made_tensors_dropped(model):
                    expected = model(*call[0], **call[1])
            open_attention(graph_module, attention.given)
            args = _placed(graph_module.graph, named)
            with made_tensors_dropped(model):  # the graph draws what the model drew
                actual = _RandomNoting(graph_module).run(*args)
            _check_same(expected, actual, model)
        return Recording(graph_module, args, recorded.reads_values, recorded.compared)
    except Exception as error:  # a model fails in as many ways as it is written
        if out_of_memory(error):
            raise
        _logger.debug("%s can't be recorded", type(model).__name__, exc_info=True)
        raise SpeedupError(
            f"a model must be traceable to be made dense, got {type(model).__name__}: {raised(error)}; see docs/faq.md"
        ) from error


class _RandomNoting(ShapeNoting):
    """Note the shapes of what a graph's nodes give, and which draw random numbers."""

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run a node, and note whether it draws random numbers."""
        states = random_states()
        found = super().run_node(n)
        if n.op in ("call_function", "call_method", "call_module") and drawn_since(states):
            n.meta[RANDOM] = True
        return found


def arguments(graph: torch.fx.Graph, model: torch.nn.Module, call: Call) -> tuple[Any, ...]:
    """List the values of a graph's placeholders, given a call of its model."""
    if is_in_parts(graph):
        # A copy, for a model may note something at its first run, as detectors' pooling does.
        return part_arguments(graph, detached_copy(model, light=True), call)
    return _placed(graph, bind_arguments(model, call))


def _placed(graph: torch.fx.Graph, named: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(named.get(str(node.target)) for node in graph.nodes if node.op == "placeholder")


@dataclass
class _AttentionCalls:
    """What enters and leaves attention while a model runs."""

    found: dict[str, Attention]
    given: dict[str, Given] = field(default_factory=dict)
    _calls: dict[str, Call] = field(default_factory=dict)
    _entered: dict[str, Any] = field(default_factory=dict)  # what enters a layer first in the latest call of attention

    @contextmanager
    def noted(self, model: torch.nn.Module) -> Iterator[None]:
        """Note it within the block."""
        entering, leaving = [], []
        with ExitStack() as stack:
            for name, attention in self.found.items():
                part = model.get_submodule(name)
                stack.enter_context(called(part, partial(self._note_call, attention)))
                leaving.append((part, partial(self._note, part, attention)))
                layers = attention.layers
                entering += [(model.get_submodule(layer), partial(self._note_entering, layer)) for layer in layers]
            stack.enter_context(watched(entering, leaving))
            yield

    def _note_entering(self, layer: str, value: Any) -> None:
        self._entered.setdefault(layer, value)

    def _note_call(self, attention: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[attention.name] = args, kwargs
        for layer in attention.layers:
            self._entered.pop(layer, None)

    def _note(self, module: torch.nn.Module, attention: Attention, _: Any, output: Any) -> None:
        """Note whether attention gives several values, and which of its arguments linear layers read as they are."""
        args, kwargs = self._calls[attention.name]
        places, reads = dict[Any, Any](enumerate(args)) | kwargs, dict[str, list[int | str]]()
        for layer in attention.layers:
            if isinstance(module, torch.nn.MultiheadAttention):
                reads[layer] = [at if at < len(args) else name for at, name in enumerate(("query", "key", "value"))]
            elif is_unfused(module):
                reads[layer] = [*places][:1]
            else:
                reads[layer] = _read_of(self._entered.get(layer), places)
                if reads[layer] and layer != attention.context[0]:
                    reads[layer] += [name for name in attention.also if places.get(name) is not None]
        is_same = self.given.get(attention.name, (False, reads))[1] == reads
        self.given[attention.name] = isinstance(output, tuple), reads if is_same and all(reads.values()) else {}


def _read_of(entered: Any, places: dict[Any, Any]) -> list[int | str]:
    """List the arguments of attention of which a layer reads one, or the sum of two: positions are added within.

    They may be transposed, with the samples in another dimension. Empty if it reads something else.
    """
    for at, value in places.items():
        if value is not None and value is entered:
            return [at]
    if not isinstance(entered, Tensor):
        return []
    given = [(at, value) for at, value in places.items() if isinstance(value, Tensor) and value.is_floating_point()]
    given = [(at, value) for at, value in given if value.dim() == entered.dim() and value.shape[-1] > 1]
    with torch._C.DisableTorchFunction():  # the recorder is at work
        for at, value in given:
            if any(torch.equal(each, entered) for each in _orders(value)):
                return [at]
        for place, (at, value) in enumerate(given):
            for other, added in given[place + 1 :]:
                for one, two in zip(_orders(value), _orders(added), strict=True):
                    is_fitting = one.shape[-1] == two.shape[-1] and one.shape == entered.shape
                    if is_fitting and two.shape[-2] in (1, one.shape[-2]) and torch.equal(one + two, entered):
                        return [at, other]
    return []


def _orders(value: Tensor) -> list[Tensor]:
    """Return a tensor of three dimensions or more, and the same with its first two dimensions exchanged."""
    return [value, value.transpose(0, 1)] if value.dim() > 2 else [value]


def _check_same(expected: Any, actual: Any, model: torch.nn.Module) -> None:
    """Raise unless the graph computes the model's outputs on the example inputs."""
    pairs = returned_tensors(expected), returned_tensors(actual)
    most = same_program((*pairs[0], *model.parameters()))
    same = len(pairs[0]) == len(pairs[1]) and all(
        # Results that are all but zero may differ by as much as they are large.
        a.shape == b.shape and (torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) or difference(a, b) <= most)
        for a, b in zip(*pairs, strict=True)
    )
    if not same:
        raise SpeedupError(f"a graph must compute what its model does, got other outputs ({type(model).__name__})")


def layer_sizes(model: nn.Module, call: Call) -> LayerSizes:
    """Note the shapes at which convolutions and linear layers run; ConfigError if the call doesn't fit the model."""
    sizes: LayerSizes = {}

    def note(name: str, entered: Any, out: Any) -> None:
        if not isinstance(entered, Tensor):
            return  # rows of several lengths, packed
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            leaving: Any = (*entered.shape[:-1], 3 * entered.shape[-1])  # queries, keys and values
        else:
            leaving = tensors_of(out)[0].shape
        if inner_of(module) is not None:
            # The output of its convolution counts, not what it computes after that.
            call = call_of(module, entered)
            if isinstance(module, nn.Linear):
                leaving = (*entered.shape[:-1], module.out_features)
            else:
                leaving = (len(entered), module.out_channels, *call.output_size)
        pair = tuple(entered.shape), tuple(leaving)
        if isinstance(module, nn.RNNBase) and not module.batch_first and entered.dim() == 3:
            # The batch first, as in all other layers.
            pair = (pair[0][1::-1] + pair[0][2:], pair[1][1::-1] + pair[1][2:])
        sizes.setdefault(name, []).append(pair)

    def check(name: str, module: nn.Module, entered: Any) -> None:
        if isinstance(entered, Tensor):  # what isn't one the layer itself refuses
            check_covers_kernel(name, call_of(module, entered))

    checks, notes = list[Any](), list[Any]()
    for name, module in model.named_modules():
        if isinstance(module, (*WEIGHTED, *RECURRENT, nn.MultiheadAttention)):
            notes.append((module, partial(note, name)))
            # A derived class may change its input before it convolves, and take smaller ones.
            if isinstance(module, CONVOLUTIONS) and not has_own_forward(module):
                checks.append((module, partial(check, name, module)))
    with left_alone(model), watched(checks, notes), evaluation_mode(model), mixing_called(model), torch.no_grad():
        try:
            model(*call[0], **call[1])
        except MODEL_ERRORS as error:
            raise ConfigError(f"example_inputs must be ones that the model runs on, got: {error} (forward)") from error
    return sizes
