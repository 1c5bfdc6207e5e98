"""What runs in training alone, as a second head of scores does: how it hangs on what evaluation mode computes.

A model is traced in evaluation mode. Where that doesn't reach all of its parameters, it is traced once more, with the
modules around these in training mode, and what leads to them is put into the graph. Then their channels are followed
like all others, and whatever reads a layer loses what the layer loses.
"""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from nni_topo.errors import SpeedupError
from nni_topo.network.graph.nodes import IN_TRAINING, RANDOM, TRAINED_OUTPUT, is_of_forward
from nni_topo.network.graph.submodules import is_in_parts
from nni_topo.network.layers import with_heads
from nni_topo.network.runtime import Call, called, detached_copy, out_of_memory, random_state_kept

_logger = logging.getLogger(__name__)


def unused_parameters(model: nn.Module, graph: Graph) -> list[str]:
    """Name the parameters of a model that no node of its graph computes with."""
    used = set[int]()
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        found = _attribute(model, str(node.target))
        used.update(id(each) for each in (found.parameters() if isinstance(found, nn.Module) else [found]))
    return [name for name, each in model.named_parameters() if id(each) not in used]


def add_training(
    model: nn.Module, graph_module: GraphModule, unused: list[str], call: Call, trace: Callable[[nn.Module, Call], Any]
) -> tuple[GraphModule, str, bool]:
    """Put what a model runs in training alone into its graph of evaluation mode, which leaves some parameters unused.

    The model, in evaluation mode, isn't changed. What is put in has ``IN_TRAINING`` in its meta. Where training mode
    can't be followed, the graph comes back as it is, with words that say so. Also tells whether training mode reads
    values, by `trace`, which returns a `Recording`.
    """
    try:
        # A copy of weights too, for a forward may write into them in training.
        trained = detached_copy(model)
        for name in unused:
            parts = name.split(".")[:-1]
            for length in range(len(parts) + 1):
                # Not what lies beside them, as dropout and batch norms, which don't say where data goes.
                around = trained.get_submodule(".".join(parts[:length]))
                around.training = around.training or not _computes_otherwise(around)
        recording = trace(trained, call)
        other = recording.graph_module
        if is_in_parts(graph_module.graph) or is_in_parts(other.graph):
            raise SpeedupError("what runs in training alone is followed where a tracer follows all of a model")
        return _merged(graph_module, other, unused), "", recording.reads_values
    except Exception as error:  # a forward in training fails in as many ways as it is written
        if out_of_memory(error):
            raise
        evaluated(graph_module.graph)
        graph_module.recompile()
        _logger.debug("%s can't be followed in training mode", type(model).__name__, exc_info=True)
        owners = _not_run(model, call, unused)
        if not owners:
            return graph_module, "", False
        missed = (
            "these modules run in training mode alone, which couldn't be traced, so channels that they read may be "
            f"missing: {', '.join(owners)}"
        )
        return graph_module, missed, False


def evaluated(graph: Graph) -> Graph:
    """Take out of a graph what runs in training alone."""
    for node in reversed(graph.nodes):
        if node.meta.get(IN_TRAINING):
            graph.erase_node(node)
    return graph


def _computes_otherwise(module: nn.Module) -> bool:
    """Tell whether a module computes something else in training mode, and goes no other way."""
    return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


class Steps(nn.Module):
    """A graph to be run node by node, so that PyTorch prints nothing where it fails."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__()
        self._modules = graph_module._modules
        self._runs = Interpreter(graph_module)
        self._runs.extra_traceback = False

    def forward(self, *args: Any) -> Any:
        """Run the graph on its placeholders' values."""
        return self._runs.run(*args)


def _attribute(model: nn.Module, name: str) -> Any:
    """Return what a model holds under a name; None where that is a constant of its tracer's."""
    try:
        return attrgetter(name)(model)
    except AttributeError:
        return None


def _not_run(model: nn.Module, call: Call, parameters: list[str]) -> list[str]:
    """Name the modules that hold some parameters and don't run in evaluation mode."""
    ran = set[str]()
    copied = detached_copy(model, light=True).eval()
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    with ExitStack() as stack, torch.no_grad(), random_state_kept():
        for owner in owners:
            stack.enter_context(called(copied.get_submodule(owner), partial(_note, ran, owner)))
        copied(*call[0], **call[1])
    return [owner for owner in owners if owner not in ran]


def _note(ran: set[str], owner: str, _: tuple[Any, ...], __: dict[str, Any]) -> None:
    ran.add(owner)


def _merged(graph_module: GraphModule, other: GraphModule, unused: list[str]) -> GraphModule:
    """Put what leads to some parameters, and what follows from them, from a graph of training mode into another."""
    wanted, outputs = _around(other, unused)
    if not wanted:
        return graph_module  # no mode reaches them
    graph = graph_module.graph
    order = {node: place for place, node in enumerate(graph.nodes)}
    # A node that has the same in both graphs: the first in the one is the first in the other.
    waiting = defaultdict[tuple[Any, ...], deque[Node]](deque)
    for node in graph.nodes:
        waiting[_key(node, node.args, node.kwargs)].append(node)
    known, cursor, reached = dict[Node, Node](), next(iter(graph.nodes)), -1
    for node in other.graph.nodes:
        if node.op == "output" or not all(each in known for each in node.all_input_nodes):
            continue
        _in_evaluation(node)
        args, kwargs = (map_arg(each, known.__getitem__) for each in (node.args, node.kwargs))
        alike = waiting[_key(node, args, kwargs)]
        if alike and not _is_another_constant(node, graph_module, other):
            known[node] = alike.popleft()
            if order[known[node]] > reached:
                cursor, reached = known[node], order[known[node]]
        elif node in wanted:
            if node.op == "placeholder":
                raise SpeedupError(f"both modes must be given the same, got {node.target} in training alone")
            # Where it runs in the model, for what follows may write into what it reads.
            with graph.inserting_after(cursor):
                known[node] = cursor = graph.node_copy(node, known.__getitem__)
            cursor.meta[IN_TRAINING] = True
            cursor.meta[TRAINED_OUTPUT] = node in outputs
            _bring(cursor, graph_module, other)
    graph_module.recompile()
    return with_heads(graph_module)


def _around(other: GraphModule, unused: list[str]) -> tuple[set[Node], set[Node]]:
    """Find the nodes of a graph that lead to some parameters or follow from them, and which the model puts out."""
    names, after = set(unused), set[Node]()
    for node in other.graph.nodes:
        name = str(node.target)
        is_first = node.op == "get_attr" and name in names
        if node.op in ("call_module", "get_attr") and not is_first:
            is_first = any(each.startswith(f"{name}.") for each in names)
        if is_first or not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    outputs = set[Node]()
    for node in reversed(other.graph.nodes):
        # What only holds tensors together, as a named tuple does, isn't what the network computes.
        if node.op == "output" or (node in outputs and isinstance(node.target, type)):
            outputs.update(node.all_input_nodes)
            outputs.discard(node)
            after.discard(node)
    outputs &= after
    wanted, open_ = set(after), list(after)
    while open_:
        for parent in open_.pop().all_input_nodes:
            if parent not in wanted:
                wanted.add(parent)
                open_.append(parent)
    return wanted, outputs


def _key(node: Node, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Write down what a node computes; other nodes are in it by their names."""
    return node.op, node.target, repr(args if node.op != "placeholder" else ()), repr(kwargs)


def _in_evaluation(node: Node) -> None:
    """Let a function that is told the mode compute what it does in evaluation mode, as modules do."""
    if node.op != "call_function":
        return
    try:
        signature = inspect.signature(node.target)  # type: ignore[arg-type]
        given = signature.bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # of PyTorch's own some have none
        return
    if given.arguments.get("training") is True:
        given.arguments["training"] = False
        node.args, node.kwargs = given.args, given.kwargs
        node.meta.pop(RANDOM, None)


def _is_another_constant(node: Node, graph_module: GraphModule, other: GraphModule) -> bool:
    """Tell whether a node stands for a constant of its tracer's that isn't that of the same name in another graph."""
    one, two = (_attribute(each, str(node.target)) for each in (graph_module, other))
    return is_of_forward(node) and not (one.shape == two.shape and torch.equal(one, two))


def _bring(node: Node, graph_module: GraphModule, other: GraphModule) -> None:
    """Give a graph's module what one of its nodes, which was another's, computes with."""
    if node.op not in ("call_module", "get_attr"):
        return
    held = _attribute(other, str(node.target))
    if _attribute(graph_module, str(node.target)) is not None and isinstance(held, nn.Module):
        return
    place, _, name = str(node.target).rpartition(".")
    if isinstance(held, nn.Module):
        graph_module.add_submodule(str(node.target), held)
        return
    while not isinstance(held, nn.Parameter) and hasattr(graph_module, name) and not place:
        name = f"{name}_in_training"
        node.target = name
    if place and _attribute(graph_module, place) is None:
        graph_module.add_submodule(place, nn.Module())
    owner = graph_module.get_submodule(place)
    if isinstance(held, nn.Parameter):
        owner.register_parameter(name, held)
    else:
        owner.register_buffer(name, held, persistent=False)
