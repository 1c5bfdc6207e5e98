"""The graph of a model by running it: what its modules and PyTorch's functions do with tensors is written down.

Python decides on real values here, so that a model may be written in any way; what it decides is the graph's for good.
Only the number of samples isn't: the model runs twice, and numbers and constants that differ follow it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from nni_topo.errors import SpeedupError
from nni_topo.network.attention import is_attention
from nni_topo.network.graph.graph_module import on_modules
from nni_topo.network.graph.nodes import RECORDED
from nni_topo.network.layers import HEAD, is_followed, is_inner, is_one, is_scripted, with_heads
from nni_topo.network.runtime import out_of_memory, tensors_of

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout, type(...))


def record(model: nn.Module, named: dict[str, Any]) -> GraphModule:
    """Record a model, in evaluation mode and changed by it, on a call's arguments by name."""
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in held if config is not None}.values()
    for config in configs:
        if getattr(config, "use_cache", None):  # as models of Transformers have it
            config.use_cache = False
    told = {id(config): getattr(config, "_attn_implementation", None) for config in configs}
    others = [config for config in configs if told[id(config)] not in (None, "eager")]
    if others:
        # So masks are always made, not only where this batch needs one; not all models can be told that any more.
        for config in others:
            config._attn_implementation = "eager"
        try:
            return _recorded(model, named)
        except Exception as error:  # a model fails in as many ways as it is written
            for config in others:
                config._attn_implementation = told[id(config)]
            try:
                return _recorded(model, named)
            except Exception:
                # This way takes less memory. Where it fails too, for whatever reason, memory is what is missing.
                if out_of_memory(error):
                    raise error from None
                raise
    return _recorded(model, named)


def _recorded(model: nn.Module, named: dict[str, Any]) -> GraphModule:
    try:
        return _recorded_twice(model, named)
    except SpeedupError:
        # What a model has kept from its last run (a detector's anchors, by size) is that of other inputs now.
        return _recorded_twice(model, named)


def _recorded_twice(model: nn.Module, named: dict[str, Any]) -> GraphModule:
    first = _Recorder(model, named)
    samples = len(tensors_of(named)[0])
    doubled = tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() and len(t) == samples else t, named)
    _follow_samples(first, _Recorder(model, doubled), samples)
    for name, tensor in first.constants.items():
        model.register_buffer(name, tensor, persistent=False)
    return with_heads(on_modules(model, first.graph, type(model).__name__))


class _Recorder(TorchFunctionMode):
    """One run of a model, written down."""

    def __init__(self, model: nn.Module, named: dict[str, Any]) -> None:
        super().__init__()
        self.graph = Graph()
        self.constants: dict[str, Tensor] = {}
        self._places = {id(module): name for name, module in model.named_modules()}
        self._own = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self._nodes: dict[int, Node] = {}
        self._alive: list[Any] = []  # a tensor that is gone would leave its identity to another one
        self._stack: list[str] = []
        self._inside = 0
        self._ran = set[str]()  # modules
        self._chosen = self._picked = False  # whether a value has been an index, and how much there is was up to values
        self._followed = {id(module) for module in model.modules() if is_followed(module)}
        self._before: tuple[str, Any, Any] | None = None  # a followed layer that hasn't called its function yet
        self._leaves = {id(module) for module in model.modules() if _is_leaf(module)}  # tried out before, on others
        for name, value in named.items():
            if tensors_of(value):
                self._enter(value, self.graph.placeholder(name))
        self.entry = self._nodes[id(tensors_of(named)[0])]  # whose size is the number of samples
        with self._calls_seen(model), self:
            outputs = model(**named)
        self._check_choice(model)
        if self._picked and any(tensors_of(each) and not isinstance(each, Tensor) for each in named.values()):
            raise SpeedupError("what picks among lists by value (a detector, of its boxes) is followed part by part")
        found = tuple(self._node(each) for each in tensors_of(outputs))
        self.graph.output(found[0] if isinstance(outputs, Tensor) else found)
        self._nodes.clear()
        self._alive.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute what a function gives and write it down."""
        kwargs = kwargs or {}
        self._chosen |= getattr(func, "__name__", "") == "__index__" and id(args[0]) in self._nodes
        out = func(*args, **kwargs)
        if self._before and is_inner(func):
            # Up to here the layer is one node; what it does with this is followed.
            (name, given, named), self._before, self._inside = self._before, None, 0
            self._write("call_module", name, given, named, out)
            self._nodes[id(out)].meta[HEAD] = True
            return out
        if not self._inside and any(self._is_followed(each) for each in tree_leaves((args, kwargs))):
            self._write(*_operation(func, args), kwargs, out)
            out = self._measured(func, args, kwargs, out)
        return out

    def _check_choice(self, model: nn.Module) -> None:
        """Raise if a value has chosen among modules of a list, and left some out, which the graph wouldn't know of."""
        for name, module in model.named_modules() if self._chosen else ():
            inner = [(f"{name}.{key}".lstrip("."), each) for key, each in module.named_children()]
            ran = [own in self._ran for own, each in inner if next(each.parameters(), None) is not None]
            if isinstance(module, nn.ModuleList) and any(ran) and not all(ran):
                raise SpeedupError(f"of modules that are chosen by value all must run, got some that don't ({name})")

    def _is_followed(self, value: Any) -> bool:
        """Tell whether a value is a tensor of the graph's, or a size of one, as a tensor may be made of."""
        return isinstance(value, _Size) or id(value) in self._nodes or id(value) in self._own

    def _measured(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Let the sizes that a model asks a tensor for say whose they are."""
        name = getattr(func, "__name__", "")
        of_shape = name == "__get__" and getattr(func.__self__, "__name__", "") == "shape"
        if not (of_shape or name == "size") or id(args[0]) not in self._nodes:
            return out
        if isinstance(out, int):
            return _Size(out).of(args[0], args[1] if len(args) > 1 else kwargs["dim"])
        return torch.Size([_Size(size).of(args[0], d) for d, size in enumerate(out)])

    @contextmanager
    def _calls_seen(self, model: nn.Module) -> Iterator[None]:
        plain = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = self._places.get(id(module))
            if self._inside or not name:
                return plain(module, *args, **kwargs)
            self._stack.append(name)
            self._ran.add(name)
            if id(module) in self._followed:
                self._before = name, args, kwargs
            self._inside += id(module) in self._leaves or self._before is not None
            try:
                out = plain(module, *args, **kwargs)
            finally:
                self._inside = 0
            if id(module) in self._leaves:
                self._write("call_module", name, args, kwargs, out)
            self._stack.pop()
            return out

        masks = [
            (space, key, function)
            for space in {id(each): each for each in map(_namespace, model.modules())}.values()
            for key, function in space.items()
            if key.startswith("create_") and key.endswith("_mask") and callable(function)
        ]
        nn.Module.__call__ = call  # type: ignore[method-assign]
        for space, key, function in masks:
            space[key] = self._whole(function)
        try:
            yield
        finally:
            nn.Module.__call__ = plain  # type: ignore[method-assign]
            for space, key, function in masks:
                space[key] = function

    def _whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Write a function down as one node."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside += 1
            try:
                out = function(*args, **kwargs)
            finally:
                self._inside -= 1
            if isinstance(out, Tensor) and not self._inside:
                given = {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
                rest = {key: value for key, value in kwargs.items() if key not in given}
                self._write("call_function", _Bound(function, args, rest), (), given, out)
            return out

        return call

    def _write(self, op: str, target: Any, args: Any, kwargs: Any, out: Any) -> None:
        self._picked |= _picks(target, args)
        if target is operator.setitem:
            # In a graph nothing is written in place: what was the tensor is another one from here on.
            op, target, out = "call_function", put, args[0]
        if not tensors_of(out):
            return
        node = self.graph.create_node(op, target, *(map_aggregate(each, self._argument) for each in (args, kwargs)))
        node.meta["nn_module_stack"] = {name: (name, nn.Module) for name in self._stack}
        if isinstance(out, Tensor):
            self._keep(out, node)
            return
        for at, each in enumerate(out):
            if isinstance(each, Tensor):
                self._keep(each, self.graph.call_function(operator.getitem, (node, at)))

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, _Size):
            first, given = value.source
            if isinstance(first, Tensor):
                return self.graph.call_method("size", (self._node(first), given))
            return self.graph.call_function(first, tuple(map(self._argument, given)))
        if not isinstance(value, _PLAIN):
            raise SpeedupError(f"arguments of what is recorded must be tensors or plain, got {type(value).__name__}")
        return value

    def _enter(self, value: Any, node: Node) -> None:
        """Note an argument; of a container, each tensor in it."""
        if isinstance(value, Tensor):
            self._keep(value, node)
            return
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            if tensors_of(each):
                self._enter(each, self.graph.call_function(operator.getitem, (node, key)))

    def _node(self, tensor: Tensor) -> Node:
        if id(tensor) not in self._nodes:
            name = self._own.get(id(tensor))
            if name is None:
                name = f"{RECORDED}_{len(self.constants)}"
                self.constants[name] = tensor.detach().clone()
            self._keep(tensor, self.graph.create_node("get_attr", name))
        return self._nodes[id(tensor)]

    def _keep(self, tensor: Tensor, node: Node) -> None:
        self._alive.append(tensor)
        self._nodes[id(tensor)] = node


class _Size(int):
    """A tensor's size along a dimension, or what is computed of such."""

    source: tuple[Any, ...]  # the tensor and the dimension, or a function and what it gets

    def of(self, *source: Any) -> _Size:
        """Note where it comes from."""
        self.source = source
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """Be copied as a number, without the tensor."""
        return int, (int(self),)

    def _computed(self, function: Callable[..., int], *given: Any) -> Any:
        if not all(isinstance(each, int) for each in given):
            return NotImplemented
        return _Size(function(*map(int, given))).of(function, given)


for _function in (operator.mul, operator.add, operator.sub, operator.floordiv):
    _name = _function.__name__
    setattr(_Size, f"__{_name}__", lambda self, other, function=_function: self._computed(function, self, other))
    setattr(_Size, f"__r{_name}__", lambda self, other, function=_function: self._computed(function, other, self))


class _Bound:
    """A function that makes a mask, with those of its arguments that no graph can hold."""

    makes_mask = True

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.__name__, self.__module__ = function.__name__, __name__

    def __call__(self, **kwargs: Any) -> Any:
        return self.function(*self.args, **self.kwargs, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bound) and self.function is other.function

    def __hash__(self) -> int:
        return hash(self.function)


def put(tensor: Tensor, place: Any, value: Any) -> Tensor:
    """Return a copy of a tensor in which a part has other values."""
    copied = tensor.clone()
    copied[place] = value
    return copied


def _is_leaf(module: nn.Module) -> bool:
    """Tell whether a module is one node: one of PyTorch's own, attention, or a layer or norm of another's making."""
    inner = [name for name, _ in module.named_children() if name != "_nni_wrapper"]
    own = type(module).__module__.startswith("torch.nn") and not inner
    return own or is_scripted(module) or is_attention(module) or is_one(module)


def _picks(target: Any, args: Any) -> bool:
    """Tell whether an operation gives as much as values say."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name == "getitem":
        return any(each.dtype == torch.bool for each in tensors_of(args[1:]))
    return name in ("nonzero", "masked_select", "unique", "nms") or (name == "where" and len(args) == 1)


def _namespace(module: nn.Module) -> dict[str, Any]:
    return vars(sys.modules[type(module).__module__])


def _operation(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Write a call of PyTorch's as a graph does, and without working in place."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if getattr(Tensor, name, None) is not func:
        return "call_function", func, args
    plain = name.strip("_")
    if name == plain or not name.startswith("__"):
        return "call_method", plain if hasattr(Tensor, plain) else name, args
    if plain[0] == "r" and hasattr(operator, plain[1:]) and not hasattr(operator, plain):
        return "call_function", getattr(operator, plain[1:]), args[::-1]
    if plain[0] == "i" and hasattr(operator, plain[1:]) and plain != "invert":
        return "call_function", getattr(operator, plain[1:]), args
    return "call_function", getattr(operator, plain, func), args


def _follow_samples(first: _Recorder, second: _Recorder, samples: int) -> None:
    """Let what differs between runs of so many samples and of twice as many follow their number."""
    graph, nodes = first.graph, list(first.graph.nodes)
    others = list(second.graph.nodes)
    same = len(nodes) == len(others) and all(
        one.op == other.op and (one.target == other.target or one.op == "get_attr")
        for one, other in zip(nodes, others, strict=False)
    )
    if not same:
        raise SpeedupError("a model that is recorded must do the same whatever the number of samples, got two graphs")
    last = [node for node in nodes if node.op == "placeholder" or node is first.entry][-1]
    with graph.inserting_after(last):
        size = graph.call_method("size", (first.entry, 0))
    for one, other in zip(nodes, others, strict=True):
        name = str(one.target)
        if one.op == "get_attr" and name in first.constants:
            constant, twin = first.constants[name], second.constants[str(other.target)]
            if constant.shape != twin.shape:
                with graph.inserting_after(one):
                    following = _following(graph, one, first.constants, twin, size)
                one.replace_all_uses_with(following, lambda user, following=following: user is not following)
            continue
        with graph.inserting_before(one):
            counted = {"args": _counted(graph, one.args, other.args, size, samples)}
            counted["kwargs"] = _counted(graph, one.kwargs, other.kwargs, size, samples)
        one.args, one.kwargs = counted["args"], counted["kwargs"]
    if not size.users:
        graph.erase_node(size)


def _following(graph: Graph, one: Node, constants: dict[str, Tensor], twin: Tensor, size: Node) -> Node:
    """Make of a constant one for any number of samples, given what it is for twice as many."""
    name = str(one.target)
    constant = constants[name]
    if constant.shape and all(_numbers_samples(each) for each in (constant, twin)):
        return graph.call_function(torch.arange, (size,), {"device": constant.device})
    if not torch.equal(constant[:1].expand(twin.shape), twin):
        raise SpeedupError("a constant of a model must not depend on the number of samples, got one that does")
    constants[name] = constant[:1].clone()
    return graph.call_method("expand", (one, size, *[-1] * (constant.dim() - 1)))


def _numbers_samples(constant: Tensor) -> bool:
    """Tell whether a constant numbers rows, as ``states[torch.arange(samples), last]`` takes a place of each."""
    return torch.equal(constant, torch.arange(len(constant), device=constant.device))


def _counted(graph: Graph, one: Any, other: Any, size: Node, samples: int) -> Any:
    """Put multiples of the number of samples in place of the integers that differ."""
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return type(one)([_counted(graph, a, b, size, samples) for a, b in zip(one, other, strict=True)])
    if isinstance(one, dict):
        return {key: _counted(graph, each, other[key], size, samples) for key, each in one.items()}
    if isinstance(one, slice):
        ends = [(getattr(one, key), getattr(other, key)) for key in ("start", "stop", "step")]
        return slice(*(_counted(graph, a, b, size, samples) for a, b in ends))
    if type(one) is not int or one == other:
        return one
    if other != 2 * one or one % samples:
        raise SpeedupError(f"a number in a model must be a multiple of the number of samples, got {one} and {other}")
    return size if one == samples else graph.call_function(operator.mul, (size, one // samples))
