"""Modules that run in training mode only, such as auxiliary heads: how they are connected to the rest of a model.

A model is traced in evaluation mode. If some of its parameters aren't used there, it is traced a second time, with the
modules that hold these parameters in training mode, and the operations that lead to them are added to the graph. Then
their channels are followed like all others: a layer that runs in training mode only loses the input channels that the
layers before it lose.
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
from nni_topo.network.runtime import Call, called, detached_copy, evaluating, out_of_memory, random_state_kept

_logger = logging.getLogger(__name__)


def unused_tensors(model: nn.Module, graph: Graph) -> list[str]:
    """List the parameters and floating buffers of a model that no node of its graph uses, by name."""
    used = set[int]()
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        found = _attribute(model, str(node.target))
        if isinstance(found, nn.Module):
            used.update(id(tensor) for tensor in (*found.parameters(), *found.buffers()))
        else:
            used.add(id(found))
    # A number, and what counts or masks, has no channels.
    held = [(name, each) for name, each in model.named_buffers() if each.dim() and each.is_floating_point()]
    return [name for name, each in (*model.named_parameters(), *held) if id(each) not in used]


def add_training(
    model: nn.Module, graph_module: GraphModule, unused: list[str], call: Call, trace: Callable[[nn.Module, Call], Any]
) -> tuple[GraphModule, str, bool]:
    """Add the operations that a model runs in training mode only to its graph of evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        The model, in evaluation mode. It isn't changed.
    graph_module : torch.fx.GraphModule
        Its graph in evaluation mode, which is changed.
    unused : list of str
        The parameters that this graph doesn't use.
    call : Call
        Arguments of the model.
    trace : callable
        Traces a model on a call and returns a `Recording`.

    Returns
    -------
    graph_module : torch.fx.GraphModule
        The graph. Nodes that were added have ``IN_TRAINING`` in their meta. If training mode can't be followed, the
        graph of evaluation mode.
    missed : str
        Which modules couldn't be followed, as a note for the user; empty if all could.
    reads_values : bool
        Whether the forward reads the values of tensors in training mode.
    """
    try:
        # The copy has weights of its own, because a forward may write into them in training mode.
        trained = detached_copy(model)
        for name in unused:
            owners = name.split(".")[:-1]
            for length in range(len(owners) + 1):
                # Only the modules that contain the parameter: dropout and batch norms beside it would compute something
                # else in training mode, and don't decide where data goes.
                owner = trained.get_submodule(".".join(owners[:length]))
                owner.training = owner.training or not _only_computes_otherwise(owner)
        recording = trace(trained, call)
        other = recording.graph_module
        if is_in_parts(graph_module.graph) or is_in_parts(other.graph):
            raise SpeedupError("a model must be traced as a whole to follow training mode, got one traced in parts")
        return _merged(graph_module, other, unused), "", recording.reads_values
    except Exception as error:  # a user's forward may raise anything
        if out_of_memory(error):
            raise
        evaluated(graph_module.graph)
        graph_module.recompile()
        _logger.debug("%s can't be followed in training mode", type(model).__name__, exc_info=True)
        not_run = _not_run(model, call, unused)
        if not not_run:
            return graph_module, "", False
        missed = (
            "these modules run in training mode only, which couldn't be traced, so channels that they read may be "
            f"missing: {', '.join(not_run)}"
        )
        return graph_module, missed, False


def evaluated(graph: Graph) -> Graph:
    """Remove the nodes of a graph that run in training mode only."""
    for node in reversed(graph.nodes):
        if node.meta.get(IN_TRAINING):
            graph.erase_node(node)
    return graph


def _only_computes_otherwise(module: nn.Module) -> bool:
    """Tell whether training mode changes what a module computes, but not which modules run: a layer of PyTorch's."""
    return type(module).__module__.startswith("torch.nn.modules.") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


class Steps(nn.Module):
    """A graph as a module that runs it node by node; PyTorch prints nothing if a node fails."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__()
        self._modules = graph_module._modules
        self._runs = Interpreter(graph_module)
        self._runs.extra_traceback = False

    def forward(self, *args: Any) -> Any:
        """Run the graph. ``args``: the values of its placeholders."""
        return self._runs.run(*args)


def _attribute(model: nn.Module, name: str) -> Any:
    """Look up an attribute of a model; None if it has none, as for constants that only the tracer knows."""
    try:
        return attrgetter(name)(model)
    except AttributeError:
        return None


def _not_run(model: nn.Module, call: Call, parameters: list[str]) -> list[str]:
    """List the modules that hold these parameters and don't run in evaluation mode."""
    ran = set[str]()
    copied = evaluating(detached_copy(model, light=True))
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    with ExitStack() as stack, torch.no_grad(), random_state_kept():
        for owner in owners:
            stack.enter_context(called(copied.get_submodule(owner), partial(_note_call, ran, owner)))
        copied(*call[0], **call[1])
    return [owner for owner in owners if owner not in ran]


def _note_call(ran: set[str], owner: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ran.add(owner)


def _merged(graph_module: GraphModule, other: GraphModule, unused: list[str]) -> GraphModule:
    """Copy the nodes around some parameters from a graph of training mode into the graph of evaluation mode."""
    wanted, outputs = _around(other, unused)
    if not wanted:
        return graph_module  # training mode doesn't use the parameters either
    graph = graph_module.graph
    position = {node: index for index, node in enumerate(graph.nodes)}
    # Nodes that compute the same are matched in order: the first in one graph to the first in the other.
    unmatched = defaultdict[tuple[Any, ...], deque[Node]](deque)
    for node in graph.nodes:
        unmatched[_key(node, node.args, node.kwargs)].append(node)
    matches = dict[Node, Node]()  # by node of training mode, the node of the merged graph
    cursor, reached = next(iter(graph.nodes)), -1  # the node to insert after, and the last position that was matched
    for node in other.graph.nodes:
        if node.op == "output" or not all(parent in matches for parent in node.all_input_nodes):
            continue
        _set_to_evaluation(node)
        args, kwargs = map_arg((node.args, node.kwargs), matches.__getitem__)
        alike = unmatched[_key(node, args, kwargs)]
        if alike and not _is_another_constant(node, graph_module, other):
            matches[node] = alike.popleft()
            if position[matches[node]] > reached:
                cursor, reached = matches[node], position[matches[node]]
        elif node in wanted:
            if node.op == "placeholder":
                raise SpeedupError(f"both modes must have the same arguments, got {node.target} in training mode only")
            # The copy keeps its place in the order of the forward, because later nodes may write into its inputs.
            with graph.inserting_after(cursor):
                matches[node] = cursor = graph.node_copy(node, matches.__getitem__)
            cursor.meta[IN_TRAINING] = True
            cursor.meta[TRAINED_OUTPUT] = node in outputs
            _add_attribute(cursor, graph_module, other)
    graph_module.recompile()
    return with_heads(graph_module)


def _around(other: GraphModule, unused: list[str]) -> tuple[set[Node], set[Node]]:
    """Find the nodes of a graph that use some parameters, lead to such nodes or follow from them.

    Nodes that meet no input, as where the weights of one layer follow those of another, aren't among these: they say
    nothing about where channels go.

    Returns these nodes, and those of them whose values the model returns.
    """
    names, after, met = set(unused), set[Node](), _met_by_inputs(other.graph)
    for node in other.graph.nodes:
        if node not in met:
            continue
        name = str(node.target)
        uses_parameter = node.op == "get_attr" and name in names
        if node.op in ("call_module", "get_attr") and not uses_parameter:
            uses_parameter = any(each.startswith(f"{name}.") for each in names)
        if uses_parameter or not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    outputs = set[Node]()
    for node in reversed(other.graph.nodes):
        # A container of outputs, such as a named tuple, is no output itself: its tensors are.
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


def _met_by_inputs(graph: Graph) -> set[Node]:
    """Find the nodes of a graph that depend on an input, or whose values meet one or the output later."""
    entered = set[Node]()
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or not entered.isdisjoint(node.all_input_nodes):
            entered.add(node)
    met = set(entered)
    for node in reversed(graph.nodes):
        if not met.isdisjoint(node.users):
            met.add(node)
    return met


def _key(node: Node, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Return what a node computes, as a key by which nodes of two graphs are compared; other nodes are named in it."""
    return node.op, node.target, repr(args), repr(kwargs)


def _set_to_evaluation(node: Node) -> None:
    """Set the argument ``training`` of a function to False, as modules of both graphs are in evaluation mode."""
    if node.op != "call_function":
        return
    try:
        signature = inspect.signature(node.target)  # type: ignore[arg-type]
        given = signature.bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # some functions of PyTorch's have no signature
        return
    if given.arguments.get("training") is True:
        given.arguments["training"] = False
        node.args, node.kwargs = given.args, given.kwargs
        node.meta.pop(RANDOM, None)


def _is_another_constant(node: Node, graph_module: GraphModule, other: GraphModule) -> bool:
    """Tell whether a node is a constant of the forward whose value differs from that of the same name in evaluation."""
    if not is_of_forward(node):
        return False
    in_evaluation = _attribute(graph_module, str(node.target))
    in_training = _attribute(other, str(node.target))
    return not (in_evaluation.shape == in_training.shape and torch.equal(in_evaluation, in_training))


def _add_attribute(node: Node, graph_module: GraphModule, other: GraphModule) -> None:
    """Give a graph module the module, parameter or constant that a node copied from another graph uses."""
    if node.op not in ("call_module", "get_attr"):
        return
    held = _attribute(other, str(node.target))
    if _attribute(graph_module, str(node.target)) is not None and isinstance(held, nn.Module):
        return
    owner_name, _, name = str(node.target).rpartition(".")
    if isinstance(held, nn.Module):
        graph_module.add_submodule(str(node.target), held)
        return
    while not isinstance(held, nn.Parameter) and hasattr(graph_module, name) and not owner_name:
        name = f"{name}_in_training"
        node.target = name
    if owner_name and _attribute(graph_module, owner_name) is None:
        graph_module.add_submodule(owner_name, nn.Module())
    owner = graph_module.get_submodule(owner_name)
    if isinstance(held, nn.Parameter):
        owner.register_parameter(name, held)
    else:
        owner.register_buffer(name, held, persistent=False)
