"""The graph of a model, found by running it (`trace`), and the sizes at which its layers run (`layer_sizes`).

If a model can't be recorded as a whole, the graphs of its largest submodules that can be recorded are joined. If the
output of one submodule is the input of another, and nothing else computes with it, the graph connects the two. The code
between them (boxes chosen by value, loops over images) isn't traced: a submodule's output that enters it has to keep
its shape, as a model's output has to.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from nni_topo.errors import ConfigError, SpeedupError, out_of_memory, raised
from nni_topo.network.attention.heads import Attention, Given, find_attention, open_attention
from nni_topo.network.attention.unfused.multihead import is_unfused, mixing_called
from nni_topo.network.graph.nodes import RANDOM, ShapeNoting, on_modules
from nni_topo.network.graph.recording import TURNED, Decision, made_tensors_dropped, record
from nni_topo.network.graph.traced_int import Check, TracedInt
from nni_topo.network.layers.derived import (
    LayerSizes,
    call_of,
    check_covers_kernel,
    has_own_forward,
    inner_of,
    with_heads,
)
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
from nni_topo.network.runtime.modules import is_transformed
from nni_topo.network.runtime.results import STORED, STORED_WITHIN
from nni_topo.network.runtime.switches import (
    as_written,
    drawn_since,
    random_state_kept,
    random_states,
    torch_random_kept,
)

_logger = logging.getLogger(__name__)

_FEW = 2  # samples on which a model is recorded; some forwards squeeze away a dimension of length 1
_PART = "nni_topo_part"  # in a placeholder's meta: a module's name, the index of a call, argument, index of a tensor
_WHY = "nni_topo_why_in_parts"  # in the same meta: the error for which the whole model isn't recorded
_Place = tuple[str, int]  # a module's name, and the index of one of its calls
_Part = tuple[Graph, tuple[Any, ...], bool]  # with its placeholders' values, and whether it reads values


@dataclass(frozen=True)
class Recording:
    """The graph of a model, on its own leaf modules, and what recording it showed."""

    graph_module: GraphModule
    """with shapes in ``node.meta["tensor_meta"]``"""
    args: tuple[Any, ...]
    """the values of its placeholders"""
    reads_values: bool
    """whether Python code read values of tensors, so that other weights may give another graph"""
    compared: tuple[Check, ...] = ()
    """comparisons by ``<`` or ``>`` of sizes of inputs or later tensors with numbers"""
    decisions: tuple[Decision, ...] = ()
    """values that stand for ones that the forward reads, with which it may take another branch"""
    of_samples: tuple[Check, ...] = ()
    """checks of a multiple of the number of samples: the function, the factor, and the other number"""


@as_written()
def trace(model: nn.Module, inputs: Call) -> Recording:
    """Record a call of a model in its present mode, part by part if need be. The model may be changed."""
    for name, module in model.named_modules():
        if is_scripted(module):
            raise ConfigError(
                f"a model must have no modules that torch.jit has compiled, got one ({name}); replace it by the "
                "module that was given to torch.jit"
            )
    try:
        return _trace_whole(model, inputs)
    except SpeedupError as error:
        let_go(error)
        if TURNED.get() is not None:
            raise  # the other branch may be an error of the user's
        _check_runs(model, inputs)
        try:
            with torch.no_grad(), random_state_kept():
                recording = _by_parts(model, inputs)
                ShapeNoting(recording.graph_module).run(*recording.args)
        except Exception as inner:  # a forward may raise anything
            if out_of_memory(inner):
                raise
            raise error from None
        if not recording.args:
            raise
        for node in recording.graph_module.graph.nodes:
            if node.op == "placeholder":
                node.meta[_WHY] = raised(error.__cause__ or error)
        _logger.info("%s is followed part by part: %s", type(model).__name__, error)
        return recording


def _check_runs(model: nn.Module, call: Call) -> None:
    """Raise if the model itself can't be run on a call."""
    # A failed recording may have changed the model.
    copied = detached_copy(model, light=True)
    try:
        with torch.no_grad(), random_state_kept():
            copied(*call[0], **call[1])
    except Exception as error:  # a forward may raise anything
        if out_of_memory(error):
            raise
        raise ConfigError(
            f"example_inputs must fit the model: {type(model).__name__} can't be run on {described(call)} in "
            f"evaluation mode, got {raised(error)} (example_inputs)"
        ) from error


def _trace_whole(model: nn.Module, call: Call) -> Recording:
    """Record a model on the first few samples of a call if they are enough, else on all samples."""
    named = bind_arguments(model, call)
    samples = batch_size(named)
    if samples > 2 * _FEW:  # a recorder's memory grows with the number of samples
        few: dict[str, Any] = tree_map_only(
            torch.Tensor, lambda tensor: tensor[:_FEW] if tensor.dim() and len(tensor) == samples else tensor, named
        )
        try:
            recording = _trace_on(few, named, model, call)
        except SpeedupError as error:  # a forward may need more samples, or do something else with so few
            _logger.debug("%s can't be recorded on a few samples", type(model).__name__, exc_info=True)
            let_go(error)
        else:
            # If values decide something, the values of all samples count.
            if not recording.reads_values:
                return recording
    return _trace_on(named, named, model, call)


def _trace_on(shown: dict[str, Any], named: dict[str, Any], model: nn.Module, call: Call) -> Recording:
    """Record a model on some arguments, and check the graph's outputs on all samples of a call."""
    try:
        with torch.no_grad(), random_state_kept():
            with torch_random_kept(), _attention_noted(model) as attention_reads:
                recorded = record(model, shown)
            graph_module, expected = recorded.graph_module, recorded.outputs
            if shown is not named:
                with torch_random_kept(), made_tensors_dropped(model):
                    expected = model(*call[0], **call[1])
            open_attention(graph_module, attention_reads)
            args = _placed(graph_module.graph, named)
            with made_tensors_dropped(model):  # the graph draws the same random numbers as the model
                actual = _RandomNoting(graph_module).run(*args)
            _check_same(expected, actual, model)
        return Recording(
            graph_module, args, recorded.reads_values, recorded.compared, recorded.decisions, recorded.of_samples
        )
    except Exception as error:  # a forward may raise anything
        if out_of_memory(error) or isinstance(error, ConfigError):
            raise
        _logger.debug("%s can't be recorded", type(model).__name__, exc_info=True)
        raise SpeedupError(
            f"a model must be traceable to be made dense, got {type(model).__name__}: {raised(error)}; see docs/faq.md"
        ) from error


class _RandomNoting(ShapeNoting):
    """Note the output shapes of a graph's nodes, and which nodes draw random numbers."""

    def run_node(self, n: Node) -> Any:
        """Run a node, and note whether it draws random numbers."""
        states = random_states()
        outputs = super().run_node(n)
        if n.op in ("call_function", "call_method", "call_module") and drawn_since(states):
            n.meta[RANDOM] = True
        return outputs


def arguments(graph: Graph, model: nn.Module, call: Call) -> tuple[Any, ...]:
    """List the values of a graph's placeholders, given a call of its model."""
    if not is_in_parts(graph):
        return _placed(graph, bind_arguments(model, call))
    places = [node.meta[_PART] for node in graph.nodes if node.op == "placeholder"]
    # A copy, because a model may store something in its first run, as detectors' pooling does.
    copied = detached_copy(model, light=True)
    seen = _seen(copied, call, {name for name, *_ in places})
    values = []
    for name, number, at, index in places:
        value = bind_arguments(copied.get_submodule(name), seen[name][number]).get(at)
        if index is not None:
            value = tensors_of(value)[index]
        values.append(value)
    return tuple(values)


def is_in_parts(graph: Graph) -> bool:
    """Tell whether a graph was joined from parts."""
    return any(_PART in node.meta for node in graph.nodes)


def why_in_parts(graph: Graph) -> str:
    """Return the error for which a graph was joined from parts; empty if it wasn't."""
    return next((str(node.meta[_WHY]) for node in graph.nodes if _WHY in node.meta), "")


def _placed(graph: Graph, named: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(named.get(str(node.target)) for node in graph.nodes if node.op == "placeholder")


@contextmanager
def _attention_noted(model: nn.Module) -> Iterator[dict[str, Given]]:
    """Note which arguments the layers of attention read, and whether it returns a tuple, for runs within the block."""
    attention_reads = dict[str, Given]()
    calls = dict[str, Call]()
    entered = dict[str, Any]()  # by layer, its first input in the latest call of attention

    def note_call(attention: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[attention.name] = args, kwargs
        for layer in attention.layers:
            entered.pop(layer, None)

    def note_entering(layer: str, value: Any) -> None:
        entered.setdefault(layer, value)

    def note(module: nn.Module, attention: Attention, _: Any, output: Any) -> None:
        args, kwargs = calls[attention.name]
        places, reads = dict[Any, Any](enumerate(args)) | kwargs, dict[str, list[int | str]]()
        for layer in attention.layers:
            if isinstance(module, nn.MultiheadAttention):
                reads[layer] = [at if at < len(args) else name for at, name in enumerate(("query", "key", "value"))]
            elif is_unfused(module):
                reads[layer] = [*places][:1]
            else:
                reads[layer] = _read_of(entered.get(layer), places)
                if reads[layer] and layer != attention.context[0]:
                    reads[layer] += [name for name in attention.also if places.get(name) is not None]
        is_same = attention_reads.get(attention.name, (False, reads))[1] == reads
        if not (is_same and all(reads.values())):
            reads = {}
        attention_reads[attention.name] = isinstance(output, tuple), reads

    entering, leaving = [], []
    with ExitStack() as stack:
        for name, attention in find_attention(model).items():
            part = model.get_submodule(name)
            stack.enter_context(called(part, partial(note_call, attention)))
            leaving.append((part, partial(note, part, attention)))
            entering += [(model.get_submodule(layer), partial(note_entering, layer)) for layer in attention.layers]
        stack.enter_context(watched(entering, leaving))
        yield attention_reads


def _read_of(entered: Any, places: dict[Any, Any]) -> list[int | str]:
    """List the arguments of attention that a layer reads: one, transposed or not, or two as a sum; else none."""
    for at, value in places.items():
        if value is not None and value is entered:
            return [at]
    if not isinstance(entered, Tensor):
        return []
    candidates = [
        (at, value) for at, value in places.items() if isinstance(value, Tensor) and value.is_floating_point()
    ]
    candidates = [(at, value) for at, value in candidates if value.dim() == entered.dim() and value.shape[-1] > 1]
    with torch._C.DisableTorchFunction():  # not to be recorded
        for at, value in candidates:
            if any(torch.equal(order, entered) for order in _orders(value)):
                return [at]
        for place, (at, value) in enumerate(candidates):
            for second_at, added in candidates[place + 1 :]:
                for first, second in zip(_orders(value), _orders(added), strict=True):
                    is_fitting = first.shape[-1] == second.shape[-1] and first.shape == entered.shape
                    if is_fitting and second.shape[-2] in (1, first.shape[-2]) and torch.equal(first + second, entered):
                        return [at, second_at]
    return []


def _orders(value: Tensor) -> list[Tensor]:
    """Return a tensor, and if it has three dimensions or more, also with its first two dimensions exchanged."""
    if value.dim() > 2:
        return [value, value.transpose(0, 1)]
    return [value]


def _check_same(expected: Any, actual: Any, model: nn.Module) -> None:
    """Raise unless the graph computes the model's outputs on the example inputs."""
    pairs = returned_tensors(expected), returned_tensors(actual)
    most = same_program((*pairs[0], *model.parameters()))
    same = len(pairs[0]) == len(pairs[1]) and all(
        # Outputs close to zero may differ by as much as their own size.
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
            return  # a packed sequence
        module: Any = model.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            leaving: Any = (*entered.shape[:-1], 3 * entered.shape[-1])  # queries, keys and values
        else:
            leaving = tensors_of(out)[0].shape
        if inner_of(module) is not None:
            # The output of the inner convolution or linear layer counts, not what the class computes after it.
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
        if isinstance(entered, Tensor):  # the layer itself raises on anything else
            check_covers_kernel(name, call_of(module, entered))

    checks, notes = list[Any](), list[Any]()
    for name, module in model.named_modules():
        if isinstance(module, (*WEIGHTED, *RECURRENT, nn.MultiheadAttention)):
            notes.append((module, partial(note, name)))
            # A derived class may pad its input before it convolves, so that it accepts smaller inputs.
            if isinstance(module, CONVOLUTIONS) and not has_own_forward(module):
                checks.append((module, partial(check, name, module)))
    with left_alone(model), watched(checks, notes), evaluation_mode(model), mixing_called(model), torch.no_grad():
        try:
            model(*call[0], **call[1])
        except MODEL_ERRORS as error:
            raise ConfigError(f"example_inputs must be ones that the model runs on, got: {error} (forward)") from error
    return sizes


# Part by part.

_ASKED = {"shape", "size", "dim", "ndim", "dtype", "device", "is_cuda", "requires_grad", "is_floating_point"}


def _by_parts(model: nn.Module, call: Call) -> Recording:
    """Record the largest parts of a model that can be recorded, once for each call, in the order of the calls."""
    untouched = detached_copy(model, light=True)  # a failed recording may change what it runs
    parts = {(name, number): part for name, number, part in _parts_of(model, "", _seen(model, call))}
    run, joined = _Run(untouched, call, {name for name, _ in parts}), _Joined()
    for place in run.order:
        graph, args, _ = parts[place]
        joined.add(place, graph, args, run)
    return Recording(*joined.finished(model), any(reads_values for *_, reads_values in parts.values()))


class _Run(TorchFunctionMode):
    """One run of a model: inputs and outputs of its parts, and the tensors that go from one to another unchanged."""

    def __init__(self, model: nn.Module, call: Call, names: set[str]) -> None:
        super().__init__()
        self.order: list[_Place] = []
        self.entering: dict[_Place, dict[str, Any]] = {}
        self.leaving: dict[_Place, Any] = {}
        self._open: list[_Place] = []
        self._used: dict[int, Tensor] = {}  # by id; while a tensor is held, no other gets its id
        with ExitStack() as stack, evaluation_mode(model), torch.no_grad(), random_state_kept():
            for name in names:
                part = model.get_submodule(name)
                stack.enter_context(called(part, partial(self._enter, name, part)))
                stack.enter_context(watched(leaving=[(part, self._leave)]))
            with self:
                self._use(model(*call[0], **call[1]))
        leaving_ids = {id(tensor) for tensor in tensors_of(list(self.leaving.values()))}
        entering_ids = {id(tensor) for tensor in tensors_of(list(self.entering.values()))}
        self.handed_on = (leaving_ids & entering_ids) - self._used.keys()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the tensors with which the model computes outside its parts; reading their sizes doesn't count."""
        name = getattr(func, "__name__", "")
        if name == "__get__" and not self._open:
            name = func.__self__.__name__
        if not self._open and name not in _ASKED:
            self._use((args, kwargs))
        return func(*args, **(kwargs or {}))

    def _use(self, tree: Any) -> None:
        self._used |= {id(tensor): tensor for tensor in tensors_of(tree)}

    def _enter(self, name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place = name, sum(part_name == name for part_name, _ in self.order)
        self.entering[place] = bind_arguments(part, (args, kwargs))
        self.order.append(place)
        self._open.append(place)

    def _leave(self, _: Any, output: Any) -> None:
        self.leaving[self._open.pop()] = output


class _Joined:
    """Joins the graphs of parts, one after the other."""

    def __init__(self) -> None:
        self._graph = Graph()
        self._args: list[Any] = []
        self._outputs: list[Any] = []
        self._given: dict[int, Node] = {}  # by id of a tensor that only goes from part to part

    def add(self, place: _Place, part: Graph, args: tuple[Any, ...], run: _Run) -> None:
        """Add the graph of a part's call. An argument that wasn't given has the value that the tracer took."""
        values, defaults = dict[Node, Any](), iter(args)
        for node in part.nodes:
            if node.op == "placeholder":
                at, value = str(node.target), next(defaults)
                values[node] = self._entered(node.name, (*place, at), run.entering[place].get(at, value))
            elif node.op == "output":
                for output_node, tensor in _pairs(node.args[0], run.leaving[place]):
                    if id(tensor) in run.handed_on and isinstance(values[output_node], Node):
                        self._given[id(tensor)], values[output_node] = values[output_node], None
                self._outputs.append(map_arg(node.args[0], values.__getitem__))
            else:
                values[node] = self._copied(node, place[0], values)

    def finished(self, model: nn.Module) -> tuple[GraphModule, tuple[Any, ...]]:
        """Return the whole graph, and its placeholders' values."""
        self._graph.output(tuple(self._outputs))
        return with_heads(on_modules(model, self._graph, type(model).__name__)), tuple(self._args)

    def _entered(self, label: str, place: tuple[str, int, str], value: Any) -> Any:
        """Return the node of a part's argument; for a container, the node of each tensor in it."""
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

    def _copied(self, node: Node, name: str, values: dict[Node, Any]) -> Any:
        """Copy a node; an item of a known container is looked up instead."""
        if node.target is operator.getitem and not isinstance(values[node.all_input_nodes[0]], Node):
            container, key = node.args
            return values[container][key]  # type: ignore[index]
        copied = self._graph.node_copy(node, values.__getitem__)
        # In a part's graph, names of modules and places of attributes are relative to the part.
        copied.args, copied.kwargs = map_aggregate(
            (copied.args, copied.kwargs), lambda leaf: leaf.within(name) if isinstance(leaf, TracedInt) else leaf
        )
        if STORED in copied.meta:
            copied.meta[STORED] = f"{name}.{copied.meta[STORED]}"
        within = copied.meta.get(STORED_WITHIN, {})
        copied.meta[STORED_WITHIN] = {f"{name}.{attribute}": sizes for attribute, sizes in within.items()}
        if "reads" in copied.meta:  # by the names of attention's layers
            copied.meta["reads"] = {f"{name}.{layer}": places for layer, places in copied.meta["reads"].items()}
        stack = [f"{name}.{module_name}".strip(".") for module_name in ("", *(node.meta.get("nn_module_stack") or {}))]
        copied.meta["nn_module_stack"] = {path: (path, nn.Module) for path in stack if path}
        if node.op in ("call_module", "get_attr"):
            copied.target = f"{name}.{node.target}".rstrip(".")
        return copied


def _seen(model: nn.Module, call: Call, names: Iterable[str] | None = None) -> dict[str, list[Call]]:
    """Return, by name, the calls of modules: of ``names``, or of all modules."""
    seen: dict[str, list[Call]] = {}
    with ExitStack() as stack, evaluation_mode(model), torch.no_grad(), random_state_kept():
        modules = dict(model.named_modules())
        for name in modules if names is None else names:
            calls = seen.setdefault(name, [])
            stack.enter_context(called(modules[name], lambda *seen_call, calls=calls: calls.append(seen_call)))
        model(*call[0], **call[1])
    return seen


def _parts_of(module: nn.Module, prefix: str, seen: dict[str, list[Call]]) -> Iterator[tuple[str, int, _Part]]:
    """Yield the parts of a module: name, number of the call, graph with arguments."""
    for child_name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        name, parts = prefix + child_name, list[tuple[str, int, _Part]]()
        if any(map(is_transformed, tensors_of(seen.get(name, [])))):
            # Under torch.vmap a module gets one sample in place of all, as a tensor that is invalid after the call.
            yield from _parts_of(child, f"{name}.", seen)
            continue
        is_leaf = next(child.children(), None) is None
        try:
            for number, call in enumerate(seen.get(name, [])):
                part = _leaf(child, call) if is_leaf else _part(child, call)
                parts.append((name, number, part))
        except Exception as error:  # a forward may raise anything
            if out_of_memory(error):
                raise
            parts = []
        yield from parts or _parts_of(child, f"{name}.", seen)


def _part(module: nn.Module, call: Call) -> _Part:
    recording = _trace_whole(module, call)
    return recording.graph_module.graph, recording.args, recording.reads_values


def _leaf(module: nn.Module, call: Call) -> _Part:
    """Make the graph of one call of one module."""
    graph, named = Graph(), bind_arguments(module, call)
    placeholders: dict[str, Any] = {name: graph.placeholder(name) for name in named}
    args = tuple(placeholders.pop(name) for name in list(named)[: len(call[0])])
    graph.output(graph.call_module("", args, placeholders))
    return graph, tuple(named.values()), False


def _pairs(written: Any, values: Any) -> Iterator[tuple[Node, Tensor]]:
    """Yield the output nodes of a graph, each with the tensor it stands for."""
    if isinstance(written, Node) and isinstance(values, Tensor):
        yield written, values
    elif isinstance(written, (tuple, list)):
        # A recorded graph returns its tensors as a flat tuple, whatever containers the model returns.
        if not isinstance(values, (tuple, list)):
            values = tensors_of(values)
        for node, value in zip(written, values, strict=False):
            yield from _pairs(node, value)
