"""The graph of a model: ``torch.fx.symbolic_trace`` where it works, else NNI's concrete tracer."""

from __future__ import annotations

import inspect
import logging
import random
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.fx
from torch.fx.passes.shape_prop import ShapeProp

from nni_topo.errors import ConfigError, SpeedupError
from nni_topo.network.attention import Attention, Given, find_attention, is_stepwise, open_attention
from nni_topo.network.graph.checking import Calls, Comparison
from nni_topo.network.graph.graph_module import on_modules
from nni_topo.network.graph.recording import record
from nni_topo.network.graph.submodules import by_parts, is_in_parts, part_arguments
from nni_topo.network.graph.traced_int import trace_written
from nni_topo.network.graph.unfolding import UnfoldingTracer
from nni_topo.network.layers import is_one, with_heads
from nni_topo.network.runtime import (
    Call,
    bind_arguments,
    called,
    detached_copy,
    fast_paths_off,
    out_of_memory,
    random_state_kept,
    tensors_of,
    torch_random_kept,
    watched,
)

_logger = logging.getLogger(__name__)

DRAWS_OTHERS = "nni_topo_draws_others"  # in the meta of a graph of parts: whether random numbers are why it is one


class _OtherNumbersError(SpeedupError):
    """A forward draws random numbers that no graph draws: Python's, or NumPy's."""


@fast_paths_off()
def trace(model: torch.nn.Module, call: Call) -> tuple[torch.fx.GraphModule, tuple[Any, ...]]:
    """Trace a model in evaluation mode: a graph on its own leaf modules, with shapes, and its placeholders' values."""
    try:
        return _trace_whole(model, call)
    except SpeedupError as error:
        _check_runs(model, call)
        try:
            with torch.no_grad(), random_state_kept():
                graph_module, args = by_parts(model, call, _trace_whole)
                ShapeProp(graph_module).propagate(*args)
        except Exception as inner:  # parts fail in as many ways as a model is written
            if out_of_memory(inner):
                raise
            raise error from None
        if not args:
            raise
        _logger.info("%s is followed part by part: %s", type(model).__name__, error)
        graph_module.meta[DRAWS_OTHERS] = isinstance(error, _OtherNumbersError)
        return graph_module, args


def _check_runs(model: torch.nn.Module, call: Call) -> None:
    """Raise if a model can't be run on a call, for which no tracer is to blame."""
    # A tracer that fails may leave its own things in what it runs.
    copied = detached_copy(model, light=True)
    try:
        with torch.no_grad(), random_state_kept():
            copied(*call[0], **call[1])
    except Exception as error:  # a model fails in as many ways as it is written
        if out_of_memory(error):
            raise
        given = ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in tensors_of(call))
        raise ConfigError(
            f"example_inputs must fit the model: {type(model).__name__} can't be run on {given} in evaluation mode, "
            f"got {type(error).__name__}: {error} (example_inputs)"
        ) from error


def _trace_whole(model: torch.nn.Module, call: Call) -> tuple[torch.fx.GraphModule, tuple[Any, ...]]:
    named = bind_arguments(model, call)
    reasons, is_noise = [], False
    found = find_attention(model)
    # NNI's tracer goes into attention, and some norms.
    for tracer in (_symbolic, _recorded, _concrete):
        try:
            # The model is run, and may draw numbers.
            with torch.no_grad(), random_state_kept():
                with torch_random_kept():
                    graph_module, args = tracer(model, named)
                given, entered, calls_of = dict[str, Given](), dict[str, Any](), dict[str, Call]()
                layers = {layer for each in found.values() for layer in each.channels}
                enters = [(model.get_submodule(layer), partial(_note_entering, entered, layer)) for layer in layers]
                inner = [(model.get_submodule(name), each) for name, each in found.items()]
                leaves = [(part, partial(_note, given, entered, calls_of, part, each)) for part, each in inner]
                calls, others = Calls(model), _other_states()
                with ExitStack() as stack:
                    for part, each in inner:
                        stack.enter_context(called(part, partial(_note_call, calls_of, entered, each)))
                    stack.enter_context(watched(enters, leaves + calls.leaving()))
                    # So that the graph draws what the model drew. What a tracer has noted of Python's numbers or
                    # NumPy's isn't drawn again, so that it differs from what the model draws now.
                    stack.enter_context(torch_random_kept())
                    expected = model(*call[0], **call[1])
                is_drawn = others != _other_states()
                open_attention(graph_module, given)
                _check_same(expected, Comparison(graph_module, calls).propagate(*args), model, is_drawn=is_drawn)
            return graph_module, args
        except Exception as error:  # a tracer fails in as many ways as a model is written
            if out_of_memory(error):
                raise
            _logger.debug("%s can't trace %s", tracer.__name__, type(model).__name__, exc_info=True)
            is_noise |= isinstance(error, _OtherNumbersError)
            reasons.append(f"{tracer.__name__.strip('_')}: {type(error).__name__}: {error}")
    if is_noise:
        raise _OtherNumbersError(
            "random numbers in a forward must be PyTorch's for a graph to draw them too, "
            f"got some of Python's or NumPy's ({type(model).__name__})"
        )
    raise SpeedupError(
        "a model must be traceable to be made dense, "
        f"got {type(model).__name__}, for which all tracers fail ({'; '.join(reasons)}); see docs/faq.md"
    )


def _symbolic(model: torch.nn.Module, named: dict[str, Any]) -> tuple[torch.fx.GraphModule, tuple[Any, ...]]:
    """Trace without running, optional arguments that aren't given frozen at their defaults."""
    parameters = inspect.signature(model.forward).parameters
    frozen = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in named and parameter.default is not inspect.Parameter.empty
    }
    tracer = UnfoldingTracer()
    graph = trace_written(model, partial(tracer.trace, model, frozen or None))
    graph_module, count = with_heads(on_modules(model, graph, type(model).__name__)), len(graph.nodes)
    for node in reversed(graph_module.graph.nodes):
        if not node.users and "_assert" in str(node.target):
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    nodes = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for (name, parameter), node in zip(parameters.items(), nodes, strict=True):
        if name in frozen or (parameter.kind == parameter.VAR_KEYWORD and not node.users):
            graph_module.graph.erase_node(node)
    if len(graph_module.graph.nodes) < count:  # its code takes as long to write as the graph to trace
        graph_module.recompile()
    return graph_module, tuple(named.values())


def _recorded(model: torch.nn.Module, named: dict[str, Any]) -> tuple[torch.fx.GraphModule, tuple[Any, ...]]:
    """Write down what a run does, which leaves Python's decisions to Python."""
    graph_module = record(model, named)
    return graph_module, _placed(graph_module.graph, named)


def _concrete(model: torch.nn.Module, named: dict[str, Any]) -> tuple[torch.fx.GraphModule, tuple[Any, ...]]:
    """Trace by running, as NNI does by default."""
    from nni.common.concrete_trace_utils import concrete_trace

    ones = {type(module) for module in model.modules() if is_one(module)}
    graph_module = concrete_trace(model, dict(named), leaf_module=tuple(ones))
    if hasattr(graph_module, "_module_constants"):
        raise SpeedupError("layers must be the model's, got some that its forward makes")
    return graph_module, _placed(graph_module.graph, named)


def by_running(graph: torch.fx.Graph) -> bool:
    """Tell whether a graph was found by running its model, so that it may depend on values."""
    return graph._tracer_cls is not UnfoldingTracer


def arguments(graph: torch.fx.Graph, model: torch.nn.Module, call: Call) -> tuple[Any, ...]:
    """List the values of a graph's placeholders, given a call of its model."""
    if is_in_parts(graph):
        # A copy, for a model may note something at its first run, as detectors' pooling does.
        return part_arguments(graph, detached_copy(model, light=True), call)
    named = bind_arguments(model, call)
    return _placed(graph, named) if by_running(graph) else tuple(named.values())


def _placed(graph: torch.fx.Graph, named: dict[str, Any]) -> tuple[Any, ...]:
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    return tuple(named.get(str(node.target), node.args[0] if node.args else None) for node in nodes)


def _note_entering(entered: dict[str, Any], layer: str, value: Any) -> None:
    entered.setdefault(layer, value)  # what enters first in each call of attention


def _note_call(
    calls: dict[str, Call],
    entered: dict[str, Any],
    attention: Attention,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    calls[attention.name] = args, kwargs
    for layer in attention.channels:
        entered.pop(layer, None)


def _note(
    given: dict[str, Given],
    entered: dict[str, Any],
    calls: dict[str, Call],
    module: torch.nn.Module,
    attention: Attention,
    _: Any,
    output: Any,
) -> None:
    """Note whether attention gives several values, and which of its arguments linear layers read as they are."""
    args, kwargs = calls[attention.name]
    places, reads = dict[Any, Any](enumerate(args)) | kwargs, dict[str, list[int | str]]()
    for layer in attention.channels:
        if isinstance(module, torch.nn.MultiheadAttention):
            reads[layer] = [at if at < len(args) else name for at, name in enumerate(("query", "key", "value"))]
        elif is_stepwise(module):
            reads[layer] = [*places][:1]
        else:
            reads[layer] = [at for at, value in places.items() if value is not None and value is entered.get(layer)][:1]
            if reads[layer] and layer != attention.context[0]:
                reads[layer] += [name for name in attention.also if places.get(name) is not None]
    is_same = given.get(attention.name, (False, reads))[1] == reads
    given[attention.name] = isinstance(output, tuple), reads if is_same and all(reads.values()) else {}


def _other_states() -> str:
    """Write down the states of Python's and NumPy's random generators."""
    state: Any = np.random.get_state()
    _, keys, *place = state
    return f"{hash(random.getstate())} {hash(keys.tobytes())} {place}"


def _check_same(expected: Any, actual: Any, model: torch.nn.Module, *, is_drawn: bool) -> None:
    """Raise unless the graph computes the model's outputs on the example inputs."""
    pairs = tensors_of(expected), tensors_of(actual)
    same = len(pairs[0]) == len(pairs[1]) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(*pairs, strict=True)
    )
    if not same:
        kind = _OtherNumbersError if is_drawn else SpeedupError
        raise kind(f"a graph must compute what its model does, got other outputs ({type(model).__name__})")
