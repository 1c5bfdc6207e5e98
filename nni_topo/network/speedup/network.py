"""What is found out about a model by running or tracing it: once, and remembered for all who ask."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.passes.shape_prop import ShapeProp

from nni_topo.errors import NniTopoError, SpeedupError, raised
from nni_topo.network.attention import Attention, find_attention, has_own_forward, take_own_width
from nni_topo.network.channels import ChannelFlow, rules_registered
from nni_topo.network.graph import (
    arguments,
    layer_sizes,
    on_modules,
    trace,
)
from nni_topo.network.layers import CONVOLUTIONS, TRANSPOSED, LayerSizes, Size, adopt, is_scripted, spatial, with_heads
from nni_topo.network.runtime import (
    SOLVED_ON,
    Call,
    as_written,
    call_arguments,
    evaluating,
    out_of_memory,
    put_parameters,
    random_state_kept,
    running_call,
    unwrapped_copy,
)
from nni_topo.network.speedup.sizes import Compared, second_call
from nni_topo.network.speedup.training_only import read_in_training, unused_tensors
from nni_topo.sharing import first_names

_logger = logging.getLogger(__name__)
T = TypeVar("T")
Traced = tuple[Callable[..., GraphModule], ChannelFlow]


@dataclass(frozen=True)
class _Known:
    """What is remembered of a recording."""

    assembled: Callable[..., GraphModule]
    flow: ChannelFlow
    reads_values: bool
    draws_others: bool
    compared: Compared


# By model, the call of a public function in which it was last looked at, its structure then and what was found out.
# Nothing here holds a weight, or the model itself, which would never be freed.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[object, str, dict[Any, Any]]] = WeakKeyDictionary()
_PLAIN = frozenset({bool, int, float, str, type(None)})
_OWN = frozenset(vars(nn.Module())) | {"_nni_wrapper", "forward"}


class Network:
    """A model, wrapped by NNI or not, and a call of it; all answers are those of the unwrapped model in evaluation."""

    # An answer holds within one call of a public function, for a forward depends on more than can be written down: on
    # globals, on classes, on what closures hold. Within a call it holds for a structure: modules, shapes, devices and
    # plain attributes, not weights. That is looked at anew by each question, so that a model that was cut since is
    # traced again. A graph that reads values may depend on weights and is kept no longer than this question lasts.
    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model = model
        self.call = call
        self._own: dict[Any, Any] = {}  # what isn't kept, by question and structure
        self._call: object | None = None  # the public function's in which `_own` was found
        self._second: Network | None = None
        self._asked: str | None = None  # the structure, while a question is answered, which may ask others

    @classmethod
    def on(cls, model: nn.Module, example_inputs: Any) -> Network:
        """Take a model with example inputs, whatever container they come in."""
        return cls(model, call_arguments(example_inputs, model))

    @property
    def flow(self) -> ChannelFlow:
        """How channels go through the network; its modules are without values."""
        return self.traced()[1]

    @property
    def sizes(self) -> LayerSizes:
        """Shapes of what enters and leaves each layer, by call."""
        return self.remember("sizes", lambda: layer_sizes(self.model, self.call))

    @property
    def attention(self) -> dict[str, Attention]:
        """The attention modules of the model, by name."""
        return find_attention(self.model)

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
        return bool(self._recorded().compared) or self.flow.mixes_places

    @property
    def second(self) -> Network | None:
        """The same model on inputs of another size; None if no other is found that it takes and can be traced on."""
        call = self.remember("second size", self._second_call)
        if call is None:
            return None
        if self._second is None or self._second.call is not call:
            self._second = Network(self.model, call)
        return self._second

    def _second_call(self) -> Call | None:
        copied: nn.Module = evaluating(unwrapped_copy(self.model, light=True))
        call = second_call(copied, self.call, self._recorded().compared)
        if call is not None:
            try:
                Network(self.model, call).traced()
            except NniTopoError as error:
                _logger.debug("%s can't be traced at another size: %s", type(self.model).__name__, error)
                return None
        return call

    def graph(self, model: nn.Module, call: Call | None = None) -> tuple[GraphModule, tuple[Any, ...]]:
        """Put the graph on the modules of a model of this structure and run it on a call, by default its own."""
        graph_module = self.traced()[0](model)
        args = arguments(graph_module.graph, model, call or self.call)
        with torch.no_grad(), random_state_kept(), as_written():
            ShapeProp(graph_module).propagate(*args)
        return graph_module, args

    def traced(self) -> Traced:
        """Return what puts the graph on the modules of a model of this structure, and how channels go through it."""
        recorded = self._recorded()
        return recorded.assembled, recorded.flow

    @property
    def draws_others(self) -> bool:
        """Whether the forward draws random numbers of Python's or NumPy's, so that only parts of it are followed."""
        return self._recorded().draws_others

    def _recorded(self) -> _Known:
        return self.remember("traced", self._trace, kept=lambda recorded: not recorded.reads_values)

    def _trace(self) -> _Known:
        # A forward that gives what its layers put out the width of its input is traced as one that doesn't, if it can
        # be rewritten so that it takes that width nowhere.
        found = self._traced_with({})
        own_widths, modules = dict[str, int](), dict(unwrapped_copy(self.model, light=True).named_modules())
        foreign = found.flow.foreign_widths()
        for name, (dim, by_kept, _) in foreign.items():
            if name not in modules or has_own_forward(modules[name]):
                continue
            # Where else it takes the width, channels have to be as many, which those that stay can't be in any case.
            if take_own_width(modules[name], dim, wholly=not by_kept):
                own_widths[name] = dim
        while own_widths:
            rewritten = self._traced_with(own_widths)
            left = set[str]()
            for name, (_, by_kept, times) in rewritten.flow.foreign_widths().items():
                # Where it is still taken in fewer places, those of other layers, their channels are as many.
                if name in own_widths and by_kept >= foreign[name].by_kept and times >= foreign[name].times:
                    left.add(name)
            if not left:
                return rewritten
            own_widths = {name: dim for name, dim in own_widths.items() if name not in left}
        return found

    def _traced_with(self, own_widths: dict[str, int]) -> _Known:
        """Trace the model with the forwards of some modules rewritten; see `take_own_width`."""

        def copied() -> nn.Module:
            model: nn.Module = evaluating(unwrapped_copy(self.model, light=True))
            for name, dim in own_widths.items():
                take_own_width(model.get_submodule(name), dim)
            adopt(model)
            return model

        model = copied()
        recording = trace(model, self.call)
        graph_module, reads_values = recording.graph_module, recording.reads_values
        read, missed = dict[str, Any](), ""
        if unused := unused_tensors(model, graph_module.graph):
            # What was traced may hold things of its tracer's.
            read, missed = read_in_training(copied(), unused, self.call)
        try:
            flow = ChannelFlow(graph_module, recording.args, read, missed)
        except Exception as error:  # a forward may do with tensors what no rule has seen yet
            if isinstance(error, NniTopoError) or out_of_memory(error):
                raise
            raise SpeedupError(
                "the channels of a model must be followed to be removed, "
                f"got {raised(error)} ({type(self.model).__name__})"
            ) from error
        flow.own_widths = own_widths
        graph = copy.deepcopy(graph_module.graph)
        held = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        # What the forward makes by itself the tracer keeps in the copy; all else is the model's, whatever it holds now.
        constants = {name: attrgetter(name)(graph_module) for name in held if not _has(self.model, name)}
        put_parameters(graph_module, lambda _, parameter: parameter.to("meta"))
        graph_module.to("meta")
        return _Known(
            partial(_assembled, graph, constants), flow, reads_values, recording.draws_others, recording.compared
        )

    def remember(self, question: str, find: Callable[[], T], kept: Callable[[T], bool] = lambda _: True) -> T:
        """Answer a question about the model as it is: with what was found before, or with what is found now.

        ``kept``: whether an answer holds for all models of this structure, so that other networks may have it. Such an
        answer mustn't hold the model, or a tensor of it.
        """
        structure, key = self._asked or _structure(self.model), (question, _shown(self.call))
        call = running_call()
        if call is not self._call:
            self._own.clear()
            self._call = call
        if (call, structure) != _KNOWN.get(self.model, (None, ""))[:2]:
            _KNOWN[self.model] = call, structure, {}
        answers = _KNOWN[self.model][2]
        own = (structure, *key)
        found: T
        if key in answers:
            found = answers[key]
        elif own in self._own:
            found = self._own[own]
        else:
            before, self._asked = self._asked, structure
            try:
                found = find()
            finally:
                self._asked = before
            is_kept = call is not None and kept(found)
            (answers if is_kept else self._own)[key if is_kept else own] = found
        return found


def _assembled(graph: Graph, constants: dict[str, Any], model: nn.Module) -> GraphModule:
    graph = copy.deepcopy(graph)
    targets = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    parts = {name: constants[name].clone() if name in constants else attrgetter(name)(model) for name in targets}
    assembled: GraphModule = evaluating(with_heads(on_modules(parts, graph, type(model).__name__)))
    return assembled


def _has(model: nn.Module, name: str) -> bool:
    try:
        attrgetter(name)(model)
    except AttributeError:
        return False
    return True


def share_answers(model: nn.Module, copied: nn.Module) -> None:
    """Let what is known of a model be known of a copy of it too."""
    if model in _KNOWN:
        _KNOWN[copied] = _KNOWN[model]


def _structure(model: nn.Module) -> str:
    """Write down all of a model that a trace may depend on, whether NNI has wrapped it or not."""
    # Before an operator had a rule, another answer was found.
    lines, places = [f"rules {rules_registered()}", f"shared {first_names(model)}"], dict[int, int]()
    for name, module in model.named_modules(remove_duplicate=False):
        if is_scripted(module):
            shapes = [tuple(each.shape) for each in (*module.parameters(), *module.buffers())]
            lines.append(f"{name} {places.setdefault(id(module), len(places))} {module.original_name} {shapes}")
        elif "_nni_wrapper" not in name.split("."):
            # A wrapper makes a plain attribute of a parameter.
            own = {**vars(module), **module._parameters, **module._buffers}
            plain = {key: own[key] for key in sorted(own.keys() - _OWN - {SOLVED_ON}) if own[key] is not None}
            place = places.setdefault(id(module), len(places))
            lines.append(f"{name} {place} {type(module)!r} {_replacements(module)} {_shown(plain)}")
    return "\n".join(lines)


def _replacements(module: nn.Module) -> str:
    """Write down hooks, and a forward in place of the class's own, but for NNI's, which calls that."""
    own = vars(module).get("forward")
    same = own is None or "_nni_wrapper" in module._modules or getattr(own, "__func__", None) is type(module).forward
    return repr([*module._forward_pre_hooks.values(), *module._forward_hooks.values(), *([] if same else [own])])


def _shown(value: Any, depth: int = 3) -> str:
    """Write a value down, tensors by shape and place, other objects by what they hold."""
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, Tensor):
        # A number in a buffer may be a switch; what has more entries is computed with, not looked at.
        number = value.tolist() if value.numel() == 1 and not value.is_meta else ""
        return f"{tuple(value.shape)} {value.dtype} {value.device} {number}"
    if isinstance(value, dict):
        return str({repr(key): _shown(each, depth - 1) for key, each in value.items()}) if depth else repr(value)
    if isinstance(value, (tuple, list)):
        return str([_shown(each, depth - 1) for each in value]) if depth else repr(value)
    if isinstance(value, nn.Module):
        return repr(type(value))
    if callable(value) or not hasattr(value, "__dict__") or not depth:
        return repr(value)
    return f"{type(value)} {_shown(vars(value), depth - 1)}"
