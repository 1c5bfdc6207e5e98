"""The graph of a model that can't be traced as a whole: the graphs of its largest submodules that can be, joined.

Where the output of one submodule is the input of another, and nothing else computes with it, the graph connects the
two. The code between them (boxes chosen by value, loops over images) isn't traced: a submodule's output that enters it
has to keep its shape, as the output of a model has.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from nni_topo.network.graph.nodes import on_modules
from nni_topo.network.graph.traced_int import TracedInt
from nni_topo.network.layers.derived import with_heads
from nni_topo.network.runtime.copies import detached_copy, evaluation_mode
from nni_topo.network.runtime.hooks import called, watched
from nni_topo.network.runtime.inputs import Call, bind_arguments, tensors_of
from nni_topo.network.runtime.memory import out_of_memory
from nni_topo.network.runtime.modules import is_transformed
from nni_topo.network.runtime.switches import random_state_kept

_Place = tuple[str, int]  # a module's name, and which of its calls
_Part = tuple[Graph, tuple[Any, ...]]  # with its placeholders' values
_PART = "nni_topo_part"  # in a placeholder's meta: a module's name, which call, which argument, which of its tensors
_UNPACKING = (iter, next, len, list, tuple, dict, zip, enumerate, reversed, operator.getitem)
_ASKED = {"shape", "size", "dim", "ndim", "dtype", "device", "is_cuda", "requires_grad", "is_floating_point"}


def by_parts(
    model: nn.Module, call: Call, trace: Callable[[nn.Module, Call], Any]
) -> tuple[GraphModule, tuple[Any, ...], bool]:
    """Trace the largest parts of a model that can be traced, once for each of their calls, in the order of these.

    ``trace``: returns a `Recording`. Also tells whether any part reads values.
    """
    untouched = detached_copy(model, light=True)  # a tracer that fails may leave its own things in what it runs
    reads_values = False

    def traced(module: nn.Module, part_call: Call) -> _Part:
        nonlocal reads_values
        recording = trace(module, part_call)
        reads_values |= recording.reads_values
        return recording.graph_module.graph, recording.args

    parts, names = dict[_Place, _Part](), set[str]()
    for name, number, part in _traced(model, "", _seen(model, call), traced):
        parts[name, number] = part
        names.add(name)
    run, joined = _Run(untouched, call, names), _Joined()
    for place in run.order:
        joined.add(place, *parts[place], run)
    return *joined.finished(model), reads_values


def is_in_parts(graph: Graph) -> bool:
    """Tell whether a graph was put together of parts."""
    return any(_PART in node.meta for node in graph.nodes)


def part_arguments(graph: Graph, model: nn.Module, call: Call) -> tuple[Any, ...]:
    """Run a model and list the arguments of its parts, for a graph's placeholders."""
    places = [node.meta[_PART] for node in graph.nodes if node.op == "placeholder"]
    seen = _seen(model, call, {place[0] for place in places})
    found = []
    for name, number, at, index in places:
        value = bind_arguments(model.get_submodule(name), seen[name][number]).get(at)
        found.append(value if index is None else tensors_of(value)[index])
    return tuple(found)


class _Run(TorchFunctionMode):
    """One run of a model: what enters and leaves its parts, and the tensors that go from one to another unchanged."""

    def __init__(self, model: nn.Module, call: Call, names: set[str]) -> None:
        super().__init__()
        self.order: list[_Place] = []
        self.entering: dict[_Place, dict[str, Any]] = {}
        self.leaving: dict[_Place, Any] = {}
        self._open: list[_Place] = []
        self._used: dict[int, Tensor] = {}  # by identity, which no tensor leaves to another as long as it is held
        with ExitStack() as stack, evaluation_mode(model), torch.no_grad(), random_state_kept():
            for name in names:
                part = model.get_submodule(name)
                stack.enter_context(called(part, partial(self._enter, name, part)))
                stack.enter_context(watched(leaving=[(part, self._leave)]))
            with self:
                self._use(model(*call[0], **call[1]))
        given = {id(each) for each in tensors_of(list(self.leaving.values()))}
        got = {id(each) for each in tensors_of(list(self.entering.values()))}
        self.handed_on = (given & got) - self._used.keys()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note what the model computes with outside its parts, of which it may ask sizes and the like."""
        name = getattr(func, "__name__", "")
        if not self._open and (func.__self__.__name__ if name == "__get__" else name) not in _ASKED:
            self._use((args, kwargs))
        return func(*args, **(kwargs or {}))

    def _use(self, tree: Any) -> None:
        self._used |= {id(each): each for each in tensors_of(tree)}

    def _enter(self, name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = name, sum(each == name for each, _ in self.order)
        self.entering[place] = bind_arguments(part, (args, kwargs))
        self.order.append(place)
        self._open.append(place)

    def _leave(self, _: Any, output: Any) -> None:
        self.leaving[self._open.pop()] = output


class _Joined:
    """The graphs of parts, one after the other."""

    def __init__(self) -> None:
        self._graph = Graph()
        self._args: list[Any] = []
        self._outputs: list[Any] = []
        self._given: dict[int, Node] = {}  # by the identity of a tensor that only goes from part to part

    def add(self, place: _Place, part: Graph, args: tuple[Any, ...], run: _Run) -> None:
        """Add the graph of a part's call; where an argument isn't given, what the tracer took in its place."""
        known, taken = dict[Node, Any](), iter(args)
        for node in part.nodes:
            if node.op == "placeholder":
                at, value = str(node.target), next(taken)
                known[node] = self._entered(node.name, (*place, at), run.entering[place].get(at, value))
            elif node.op == "output":
                for each, tensor in _pairs(node.args[0], run.leaving[place]):
                    if id(tensor) in run.handed_on and isinstance(known[each], Node):
                        self._given[id(tensor)], known[each] = known[each], None
                self._outputs.append(map_arg(node.args[0], known.__getitem__))
            else:
                known[node] = self._copied(node, place[0], known)

    def finished(self, model: nn.Module) -> tuple[GraphModule, tuple[Any, ...]]:
        """Return the whole graph, and its placeholders' values."""
        self._graph.output(tuple(self._outputs))
        return with_heads(on_modules(model, self._graph, type(model).__name__)), tuple(self._args)

    def _entered(self, label: str, place: tuple[str, int, str], value: Any) -> Any:
        """Return the node of what enters a part; for a container, the node of each tensor in it."""
        numbers = itertools.count()

        def node_of(tensor: Tensor, index: int | None) -> Node:
            return self._given.get(id(tensor)) or self._placeholder(label, (*place, index), tensor)

        if isinstance(value, Tensor):
            return node_of(value, None)
        if isinstance(value, (tuple, list, Mapping)) and tensors_of(value):
            return tree_map_only(Tensor, lambda tensor: node_of(tensor, next(numbers)), value)
        return self._placeholder(label, (*place, None), value)

    def _placeholder(self, label: str, place: tuple[Any, ...], value: Any) -> Node:
        node = self._graph.placeholder(f"{label}_{len(self._args)}")
        node.meta[_PART] = place
        self._args.append(value)
        return node

    def _copied(self, node: Node, name: str, known: dict[Node, Any]) -> Any:
        """Copy a node; what only takes containers apart is done at once."""
        inner = [known[each] for each in node.all_input_nodes]
        if inner and not isinstance(inner[0], Node) and (node.target in _UNPACKING or node.op == "call_method"):
            args: Any = map_arg(node.args, known.__getitem__)
            kwargs: Any = map_arg(node.kwargs, known.__getitem__)
            function: Any = getattr(type(args[0]), str(node.target)) if node.op == "call_method" else node.target
            return function(*args, **kwargs)
        copied = self._graph.node_copy(node, known.__getitem__)
        # a part's graph names modules, and attributes that hold sizes, as the part does
        copied.args, copied.kwargs = map_aggregate(
            (copied.args, copied.kwargs), lambda leaf: leaf.within(name) if isinstance(leaf, TracedInt) else leaf
        )
        stack = [f"{name}.{each}".strip(".") for each in ("", *(node.meta.get("nn_module_stack") or {}))]
        copied.meta["nn_module_stack"] = {each: (each, nn.Module) for each in stack if each}
        if node.op in ("call_module", "get_attr"):
            copied.target = f"{name}.{node.target}".rstrip(".")
        return copied


def _seen(model: nn.Module, call: Call, names: Iterable[str] | None = None) -> dict[str, list[Call]]:
    """Record what modules are called on: these, or all."""
    seen: dict[str, list[Call]] = {}
    with ExitStack() as stack, evaluation_mode(model), torch.no_grad(), random_state_kept():
        modules = dict(model.named_modules())
        for name in modules if names is None else names:
            stack.enter_context(called(modules[name], partial(_note, seen.setdefault(name, []))))
        model(*call[0], **call[1])
    return seen


def _note(calls: list[Call], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls.append((args, kwargs))


def _traced(
    module: nn.Module, prefix: str, seen: dict[str, list[Call]], trace: Callable[[nn.Module, Call], _Part]
) -> Iterator[tuple[str, int, _Part]]:
    """Yield the parts of a module: name, number of the call, graph with arguments."""
    for own, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        name, found = prefix + own, list[tuple[str, int, _Part]]()
        if any(map(is_transformed, tensors_of(seen.get(name, [])))):
            # Under torch.vmap a module is called on one sample in place of all, a tensor that is gone after the call.
            yield from _traced(child, f"{name}.", seen, trace)
            continue
        is_leaf = next(child.children(), None) is None
        try:
            for number, call in enumerate(seen.get(name, [])):
                found.append((name, number, _leaf(child, call) if is_leaf else trace(child, call)))
        except Exception as error:  # a tracer fails in as many ways as a model is written
            if out_of_memory(error):
                raise
            found = []
        yield from found or _traced(child, f"{name}.", seen, trace)


def _leaf(module: nn.Module, call: Call) -> _Part:
    """Make the graph of one call of one module."""
    graph, named = Graph(), bind_arguments(module, call)
    given: dict[str, Any] = {name: graph.placeholder(name) for name in named}
    args = tuple(given.pop(name) for name in list(named)[: len(call[0])])
    graph.output(graph.call_module("", args, given))
    return graph, tuple(named.values())


def _pairs(written: Any, given: Any) -> Iterator[tuple[Node, Tensor]]:
    """Yield the nodes of what a graph puts out, each with the tensor it stands for."""
    if isinstance(written, Node) and isinstance(given, Tensor):
        yield written, given
    elif isinstance(written, (tuple, list)):
        # What is recorded gives its tensors one after the other, whatever they lie in.
        for one, other in zip(written, given if isinstance(given, (tuple, list)) else tensors_of(given), strict=False):
            yield from _pairs(one, other)
