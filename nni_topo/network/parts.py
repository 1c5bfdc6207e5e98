"""A model that no tracer follows as a whole, as the graph of those of its parts that one follows.

What lies between the parts (boxes that are chosen by value, loops over images) isn't looked at: what a part gives has
to keep its shape, as the output of a whole model has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from nni_topo.network.capture import called
from nni_topo.network.inputs import Call, bind_arguments, out_of_memory
from nni_topo.network.modes import evaluation_mode, random_state_kept
from nni_topo.network.transformers import UnfoldingTracer

Trace = Callable[[nn.Module, Call], tuple[GraphModule, tuple[Any, ...]]]
_PART = "nni_topo_part"  # in a placeholder's meta: a module's name, which of its calls, which of the arguments


def by_parts(model: nn.Module, call: Call, trace: Trace) -> tuple[GraphModule, tuple[Any, ...]]:
    """Trace the largest parts of a model that can be traced, once for each of their calls, side by side."""
    seen, graph, args, outputs = _seen(model, call), Graph(tracer_cls=UnfoldingTracer), list[Any](), list[Any]()
    for name, number, part, values in _traced(model, "", seen, trace):
        known: dict[Node, Any] = {}
        for node in part.nodes:
            if node.op == "output":
                outputs.append(map_arg(node.args[0], known.__getitem__))
            elif node.op == "placeholder":
                known[node] = graph.placeholder(f"{node.name}_{len(args)}")
                known[node].meta[_PART] = (name, number, str(node.target))
                args.append(next(values))
            else:
                known[node] = copied = graph.node_copy(node, known.__getitem__)
                if node.op in ("call_module", "get_attr"):
                    copied.target = f"{name}.{node.target}".rstrip(".")
    graph.output(tuple(outputs))
    return GraphModule(model, graph, type(model).__name__), tuple(args)


def is_in_parts(graph: Graph) -> bool:
    """Tell whether a graph is one of parts."""
    return any(_PART in node.meta for node in graph.nodes)


def part_arguments(graph: Graph, model: nn.Module, call: Call) -> tuple[Any, ...]:
    """Run a model and list what enters its parts, for a graph's placeholders."""
    seen = _seen(model, call)
    places = [node.meta[_PART] for node in graph.nodes if node.op == "placeholder"]
    return tuple(bind_arguments(model.get_submodule(name), seen[name][number]).get(at) for name, number, at in places)


def _seen(model: nn.Module, call: Call) -> dict[str, list[Call]]:
    """Record what every module is called on."""
    seen: dict[str, list[Call]] = {}
    with ExitStack() as stack, evaluation_mode(model), torch.no_grad(), random_state_kept():
        for name, module in model.named_modules():
            stack.enter_context(called(module, partial(_note, seen.setdefault(name, []))))
        model(*call[0], **call[1])
    return seen


def _note(calls: list[Call], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls.append((args, kwargs))


def _traced(
    module: nn.Module, prefix: str, seen: dict[str, list[Call]], trace: Trace
) -> Iterator[tuple[str, int, Graph, Iterator[Any]]]:
    """Yield the parts of a module: name, number of the call, graph and arguments."""
    for own, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        name, found = prefix + own, list[tuple[str, int, Graph, Iterator[Any]]]()
        try:
            for number, call in enumerate(seen.get(name, [])):
                graph, args = _leaf(child, call) if _is_leaf(child) else _of(trace(child, call))
                found.append((name, number, graph, iter(args)))
        except Exception as error:  # a tracer fails in as many ways as a model is written
            if out_of_memory(error):
                raise
            found = []
        yield from found or _traced(child, f"{name}.", seen, trace)


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _of(traced: tuple[GraphModule, tuple[Any, ...]]) -> tuple[Graph, tuple[Any, ...]]:
    return traced[0].graph, traced[1]


def _leaf(module: nn.Module, call: Call) -> tuple[Graph, tuple[Any, ...]]:
    """Make the graph of one call of one module."""
    graph, named = Graph(), bind_arguments(module, call)
    given: dict[str, Any] = {name: graph.placeholder(name) for name in named}
    args = tuple(given.pop(name) for name in list(named)[: len(call[0])])
    graph.output(graph.call_module("", args, given))
    return graph, tuple(named.values())
