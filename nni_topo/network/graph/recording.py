"""Record the graph of a model while it runs: every call of a PyTorch module or function becomes a node.

The forward runs on real values, so it may be any Python code; the graph has its branches and loops as they ran. Only
the number of samples isn't fixed: the model also runs on twice the samples, and the graph computes the numbers and
constants that differ. If the model fails on twice the samples, their number is fixed, too.
"""

from __future__ import annotations

import logging
import math
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from nni_topo.errors import SpeedupError
from nni_topo.network.attention.heads import is_attention
from nni_topo.network.graph.caches import release, without_caches
from nni_topo.network.graph.nodes import (
    AS_NUMBERS,
    LINE,
    RECORDED,
    UNSHOWN,
    UNUSED,
    forward_line,
    leaves_of,
    on_modules,
    plain_name,
)
from nni_topo.network.graph.traced_int import (
    Check,
    Notes,
    TracedInt,
    UnclearPlaces,
    UnshownSizes,
    attributes_traced,
    forget_places,
    plain,
)
from nni_topo.network.layers.derived import HEAD, is_followed, is_inner, with_heads
from nni_topo.network.layers.kinds import is_one
from nni_topo.network.runtime.copies import attributes_put_back, forget_evaluated
from nni_topo.network.runtime.fits import LISTS
from nni_topo.network.runtime.inputs import (
    batch_size,
    call_by_name,
    check_inputs_last,
    first_of_samples,
    let_go,
    returned_tensors,
    tensors_of,
)
from nni_topo.network.runtime.modules import is_transformed
from nni_topo.network.runtime.results import STORED, STORED_WITHIN, Results, stored_tensors
from nni_topo.network.runtime.switches import torch_random_kept

_logger = logging.getLogger(__name__)
_PLAIN = (
    *(int, float, complex, bool, str, type(None), type(...)),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)
_SIZED = {"reshape", "split", "split_with_sizes", "unflatten", "view"}  # take sizes that must fit the tensor
# Methods and properties of a tensor that return a number without reading its values.
_ABOUT_TENSORS = {
    *("__get__", "__hash__", "__len__", "data_ptr", "dim", "element_size", "get_device", "is_complex", "is_conj"),
    *("is_contiguous", "is_floating_point", "is_inference", "is_neg", "is_same_size", "is_signed", "ndimension"),
    *("nelement", "numel", "size", "storage_offset", "stride"),
}


Decision = tuple[str, bool | float]
"""A line of a forward that reads one value of a tensor, and what its first reading gives instead."""
_EXTREME = 1e30  # on either side of any threshold
TURNED: ContextVar[Decision | None] = ContextVar("turned", default=None)  # so that the forward takes another branch


class _Decisions:
    """The values that a forward reads, with which it may decide on a branch; one of them may be replaced."""

    def __init__(self) -> None:
        self.others = dict[Decision, None]()
        self._turned = TURNED.get()
        self._turned_reading: tuple[Any, ...] | None = None  # the reading to which it belongs
        self._readings = set[tuple[Any, ...]]()

    def decided(self, reading: tuple[Any, ...], value: bool | float) -> bool | float:
        """Note that the forward reads a value; return it, or what stands for it.

        ``reading``: the function and the ids of its tensors.
        """
        line = forward_line()
        if reading not in self._readings:
            self._readings.add(reading)
            alternatives: tuple[bool | float, ...] = (_EXTREME, -_EXTREME)
            if isinstance(value, bool):
                alternatives = (not value,)
            self.others.update(dict.fromkeys((line, alternative) for alternative in alternatives))
        if self._turned is None or line != self._turned[0]:
            # The same value may decide elsewhere, too. A loop would never end.
            if self._turned is not None and reading == self._turned_reading:
                return self._turned[1]
            return value
        if self._turned_reading is not None:
            return value
        self._turned_reading = reading
        return self._turned[1]


Noted = tuple[str, list[tuple[int, ...]]]
"""The name of a function, and the shapes of its tensors: those that parameters have a part in, and its results."""


class _Calls(TorchFunctionMode):
    """Notes which functions a model calls on its parameters, and on what is computed from them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.noted: list[Noted] = []
        self._decisions = _Decisions()
        self._weighted: dict[int, Tensor] = {
            id(parameter): parameter for parameter in model.parameters()
        }  # kept, so that ids stay

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and note the call."""
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        tensors = [leaf for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor)]
        if isinstance(out, (bool, float)) and name not in _ABOUT_TENSORS:
            return self._decisions.decided((name, *map(id, tensors)), out)
        weighted, results = [tensor for tensor in tensors if id(tensor) in self._weighted], tensors_of(out)
        if weighted and results:
            self._weighted |= {id(tensor): tensor for tensor in results}
            self.noted.append((name, [tuple(tensor.shape) for tensor in (*weighted, *results)]))
        return out


def calls_on_weights(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Noted] | None:
    """Return the functions that a model calls, in its present mode, on parameters and what is computed from them.

    None if it fails.
    """
    calls = _Calls(model)
    try:
        with torch.no_grad(), torch_random_kept(), calls:
            model(*call[0], **call[1])
    except Exception as error:  # a forward may raise anything
        let_go(error)
        return None
    return calls.noted


@dataclass(frozen=True)
class Recorded:
    """A recorded graph, and what two runs of the model showed."""

    graph_module: GraphModule
    outputs: Any  # of the first run
    reads_values: bool  # whether Python code read values of tensors, so that other weights may give another graph
    compared: tuple[Check, ...]  # comparisons of sizes with numbers by ``<`` or ``>``
    decisions: tuple[Decision, ...]  # values with which the forward may take another branch
    of_samples: tuple[Check, ...]  # checks of a multiple of the number of samples: function, factor, other number


def record(model: nn.Module, named: dict[str, Any]) -> Recorded:
    """Record a call of a model in its present mode. The model may be changed."""
    attributes: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in attributes if config is not None}.values()
    for config in configs:
        if getattr(config, "use_cache", None) and not any(getattr(m, "_is_stateful", False) for m in model.modules()):
            config.use_cache = False
    implementations = {id(config): getattr(config, "_attn_implementation", None) for config in configs}
    switched = [config for config in configs if implementations[id(config)] not in (None, "eager")]
    # Eager attention always makes masks, not only if this batch needs one.
    for config in switched:
        config._attn_implementation = "eager"
    recorded = partial(_recorded, model, named)
    try:
        return without_caches(recorded, model)
    except Exception as error:  # a forward may raise anything
        if not switched and not isinstance(error, SpeedupError):
            raise
        let_go(error)
    # Some models can't be switched to eager attention after their construction. And some fail once because of values
    # that they kept from a run on other inputs (a detector's anchors, by size).
    for config in switched:
        config._attn_implementation = implementations[id(config)]
    return without_caches(partial(recorded, again=True), model)


def _recorded(model: nn.Module, named: dict[str, Any], notes: Notes, *, again: bool = False) -> Recorded:
    samples = batch_size(named)
    doubled = tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() and len(t) == samples else t, named)
    # Found before the recording, because some modules are called on other values to find out.
    followed = {id(module) for module in model.modules() if is_followed(module)}
    leaves = {id(module) for module in model.modules() if _is_leaf(module)}
    with attributes_traced(model) as unclear:
        forget_evaluated(model)
        # The forward fills its caches in both runs, so that both show how. But if it fails with what a run on other
        # inputs has left, it is recorded with what these runs leave.
        with nullcontext() if again else attributes_put_back(model):
            first = _Recorder(model, followed, leaves, named, notes, unclear)
        unclear.note_unwritten()
        release(notes.sizes(), model, notes.spaces)
        second = _recorder_of_twice(model, followed, leaves, doubled, notes, unclear)
        if second is not None:
            _follow_samples(first, second, samples)
        unclear.note_divided(first.graph)
        forget_places(first.graph, unclear)
    # Numbers in the graph hold these, which hold tensors: free them.
    unclear.computed.clear()
    unclear.write_check = None
    for node in reversed(first.graph.nodes):
        if node.users or node in first.read or node.op in ("placeholder", "output"):
            continue
        # Its output isn't used, but the dense model runs it, too. So modules, operations on several tensors and
        # operations that take sizes stay in the graph, because their arguments must fit.
        entering = [parent for parent in node.all_input_nodes if parent not in first.numbers]
        if node.op == "call_module" or len(entering) > 1 or plain_name(node) in _SIZED:
            continue
        # An operation that takes a tensor and nothing else, such as zeros_like, runs whatever the tensor's width is.
        if plain_name(node) not in ("getitem", "size") and len(node.args) > 1:
            for parent in node.all_input_nodes:
                parent.meta[UNUSED] = True
        first.graph.erase_node(node)
    used = {str(node.target) for node in first.graph.nodes if node.op == "get_attr"}
    for name, tensor in first.constants.items():
        if name in used:
            model.register_buffer(name, tensor, persistent=False)
    graph_module = with_heads(on_modules(model, first.graph, type(model).__name__))
    reads_values = first.reads_values or (second is not None and second.reads_values)
    return Recorded(
        graph_module, first.outputs, reads_values, first.compared, tuple(first._decisions.others), first.of_samples
    )


def _recorder_of_twice(
    model: nn.Module,
    followed: set[int],
    leaves: set[int],
    doubled: dict[str, Any],
    notes: Notes,
    unclear: UnclearPlaces,
) -> _Recorder | None:
    """Record a model on twice the samples; None if it fails on them: then the graph is for one number of samples.

    Lists of samples (a detector's images) aren't doubled: if the model fails on them, this raises.
    """
    try:
        forget_evaluated(model)
        return _Recorder(model, followed, leaves, doubled, notes, unclear)
    except SpeedupError:
        raise
    except Exception as error:  # a forward may raise anything
        if any(tensors_of(argument) and not isinstance(argument, Tensor) for argument in doubled.values()):
            raise
        _logger.info("%s is recorded for this number of samples alone: %s", type(model).__name__, error)
        let_go(error)
    return None


@contextmanager
def made_tensors_dropped(model: nn.Module) -> Iterator[None]:
    """Remove the tensors that modules register within the block, so that the next run makes its own."""
    before = [
        (table, {name: tensor is None for name, tensor in table.items()})
        for module in model.modules()
        for table in (module._buffers, module._parameters)
    ]
    try:
        yield
    finally:
        for table, empty in before:
            for name in list(table):
                if name not in empty:
                    del table[name]
                elif empty[name]:
                    table[name] = None


class _ArgumentsNoted(TorchFunctionMode):
    """Notes by id the tensors that functions get within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = set[int]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function."""
        self.ids.update(id(leaf) for leaf in leaves_of((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


class _Recorder(TorchFunctionMode):
    """Records one run of a model."""

    def __init__(
        self,
        model: nn.Module,
        followed: set[int],
        leaves: set[int],
        named: dict[str, Any],
        notes: Notes,
        unclear: UnclearPlaces,
    ) -> None:
        super().__init__()
        self.graph = Graph()
        self.constants: dict[str, Tensor] = {}
        self.reads_values = False
        self.reads_integers = False  # such as the length of the longest sequence
        self._decisions = _Decisions()
        self.read = set[Node]()  # nodes that stay in the graph because Python code read or stored their values
        self.numbers = set[Node]()  # nodes of tensors' sizes, and of numbers computed from them
        self.checks = set[Node]()  # nodes of comparisons and remainders, and of the numbers that only they read
        unclear.write_check = self._write_check
        self._recurrent = {name for name, module in model.named_modules() if isinstance(module, nn.RNNBase)}
        self._followed = followed  # by id, modules that are one node up to the function that they call
        self._leaves = leaves  # by id, modules that are one node
        self._own = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self._unshown = UnshownSizes(self._write_check, self._own)
        self._inner = UnshownSizes(self._write_check, self._own)  # in modules that are one node, which the dry run runs
        self._nodes: dict[int, Node] = {}
        self._within: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # tensors computed in modules that are one node
        self._views: dict[int, tuple[Tensor, Any]] = {}  # by id, parts of tensors: the whole tensor, and the index
        self._alive: list[Any] = []  # keeps tensors, so that no other gets the id of a freed one
        self._stack: list[str] = []  # names of the modules that are running and recorded, the innermost last
        self._inside = 0  # if not 0, a module or function that is one node is running
        self._ran = set[str]()  # names of the modules that ran
        self._chosen = self._picked = False  # whether a value was used as an index; whether values decided a size
        self._deciding = set[str]()  # modules whose forward has read a value, as an `if` does
        self._given: tuple[Any, Any] = (), {}  # the arguments of a module that is one node, before its own hooks
        self._before: tuple[str, Any, Any] | None = None  # a followed layer that hasn't called its function yet
        for name, value in named.items():
            if tensors_of(value):
                self._enter(value, self.graph.placeholder(name))
        self.entry = self._nodes[id(first_of_samples(named))]  # its first size is the number of samples
        args, kwargs = call_by_name(model, named)
        buffers = dict(model.named_buffers()).keys()
        with made_tensors_dropped(model):
            with self._calls_seen(model), notes.running(), self:
                self.outputs = tree_map_only(TracedInt, plain, model(*args, **kwargs))
            check_inputs_last(named, model)
            self._note_stored(stored_tensors(model, buffers), partial(model, *args, **kwargs))
        self._check_choice(model)
        if self._picked and any(
            tensors_of(argument) and not isinstance(argument, Tensor) for argument in named.values()
        ):
            raise SpeedupError("a model that picks from lists by value (a detector, boxes) is followed part by part")
        for size in {id(unshown): unshown for unshown in self._unshown}.values():
            node = tensor = self._argument(size)
            while "nn_module_stack" not in tensor.meta and tensor.all_input_nodes:
                tensor = tensor.all_input_nodes[0]
            node.meta |= {"nn_module_stack": tensor.meta.get("nn_module_stack"), UNSHOWN: True}
            self.read.add(node)
        output_nodes = tuple(self._node(output) for output in returned_tensors(self.outputs))
        self.graph.output(output_nodes[0] if isinstance(self.outputs, Tensor) else output_nodes)
        self.compared = tuple(dict.fromkeys(self._unshown.compared))
        samples, of_samples = batch_size(named), dict[Check, None]()
        for function, size, number in self._unshown.of_samples:
            if size % samples == 0:
                of_samples[function, size // samples, number] = None
        self.of_samples = tuple(of_samples)
        self._nodes.clear()
        self._alive.clear()
        self._unshown.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, and record the call."""
        kwargs = kwargs or {}
        self._keep_written(func, args)
        out = func(*args, **kwargs)
        if not self._inside and args and _is_part(out, args[0]):
            index = _index_of_part(func, args[1:], kwargs)
            if index is not None:
                self._views[id(out)] = args[0], index
                self._alive.append(out)
        if self._before and is_inner(func):
            # Up to here the layer is one node; its further operations are recorded.
            (name, layer_args, named), self._before, self._inside = self._before, None, 0
            self._write("call_module", name, layer_args, named, out)
            self._nodes[id(out)].meta[HEAD] = True
            return out
        leaves = leaves_of((args, kwargs))
        if self._inside and self._stack and any(id(x) in self._nodes or id(x) in self._within for x in leaves):
            self._within |= {id(tensor): (weakref.ref(tensor), self._stack[-1]) for tensor in tensors_of(out)}
        if self._inside or not any(self._is_followed(leaf) for leaf in leaves):
            if self._inside and len(leaves) and id(leaves[0]) in self._nodes and id(leaves[0]) not in self._own:
                out = self._measured(func, args, kwargs, out)  # a module that is one node may check its input's width
            # No node shows what is computed here from an attribute's number.
            for leaf in leaves:
                if isinstance(leaf, TracedInt):
                    leaf.note_other_use()
            return out
        if isinstance(out, (bool, int, float, complex, list, np.ndarray)) and not tensors_of(out):
            name = getattr(func, "__name__", "")
            self._chosen |= name == "__index__"
            if name not in _ABOUT_TENSORS:
                self.reads_values = True
                self.reads_integers |= type(out) is int
                self._deciding.add(self._stack[-1] if self._stack else "")
                read = [self._nodes[id(leaf)] for leaf in leaves if id(leaf) in self._nodes]
                self.read.update(read)
                if isinstance(out, (list, np.ndarray)):
                    for node in read:
                        node.meta[AS_NUMBERS] = True
                elif isinstance(out, (bool, float)):
                    out = self._decisions.decided(
                        (name, *(id(leaf) for leaf in leaves if isinstance(leaf, Tensor))), out
                    )
        if getattr(func, "__name__", "") == "__setitem__" and self._is_put_back(*args):
            return out
        written = kwargs.get("out")
        self._write(*_operation(func, args), {key: value for key, value in kwargs.items() if key != "out"}, out)
        if written is None and args and _is_written(func) and (out is None or out is args[0]):
            written = args[0]
        self._write_whole(written)
        return self._measured(func, args, kwargs, out)

    def _is_put_back(self, tensor: Any, index: Any, value: Any) -> bool:
        """Tell whether Python puts a part into the tensor that it is a view of, as the end of ``states[1:] += 1``."""
        source, place = self._views.get(id(value), (None, None))
        return source is tensor and place is index

    def _write_whole(self, part: Any) -> None:
        """Record that the tensor changes a part of which was written in place, as by ``states[1:].mul_(2)``."""
        while id(part) in self._views:
            tensor, index = self._views[id(part)]
            self._write("call_function", operator.setitem, (tensor, index, part), {}, tensor)
            part = tensor

    def _keep_written(self, func: Any, args: tuple[Any, ...]) -> None:
        """Record a constant before a recorded tensor is written into it, as by ``keep &= mask``."""
        if self._inside or not _is_written(func) or not args or not isinstance(args[0], Tensor):
            return
        if any(self._is_followed(argument) for argument in leaves_of(args[1:])):
            tensor = args[0]
            while not self._is_followed(tensor):
                self._node(tensor)
                tensor = self._views.get(id(tensor), (tensor,))[0]

    def _note_stored(self, stored: Results, run_again: Callable[[], Any]) -> None:
        """Mark the nodes whose values the forward has left in attributes for other code.

        A single number has no channels. A table of positions, say, is computed from parameters or sizes, and not from
        the inputs' values. A tensor that the next run reads is a cache of the forward's own, or its state.
        """
        computed = set[Node]()  # from the inputs' values
        if stored:
            for node in self.graph.nodes:
                if node.op == "placeholder" or not (node in self.numbers or computed.isdisjoint(node.all_input_nodes)):
                    computed.add(node)
        leftovers = Results()
        for name, tensor in stored:
            reference = self._within.get(id(tensor), (None, ""))[0]
            is_within = id(tensor) not in self._nodes and reference is not None and reference() is tensor
            if tensor.dim() and (is_within or self._nodes.get(id(tensor)) in computed):
                leftovers.append((name, tensor))
        arguments = _ArgumentsNoted()
        if leftovers:
            with torch_random_kept(), arguments:
                run_again()
        for name, tensor in leftovers:
            giver = self._nodes.get(id(tensor))
            if id(tensor) in arguments.ids:
                continue
            if giver is not None:
                giver.meta.setdefault(STORED, name)
                self.read.add(giver)
                continue
            module = self._within[id(tensor)][1]
            for call in self.graph.nodes:
                if call.op == "call_module" and call.target == module:
                    call.meta.setdefault(STORED_WITHIN, {})[name] = tuple(tensor.shape)

    def _check_choice(self, model: nn.Module) -> None:
        """Raise if a value chose some modules of a list and left others out, which the graph can't show."""
        if not (self._chosen or self._deciding):
            return
        for name, module in model.named_modules():
            if not isinstance(module, LISTS):
                continue
            # Lists have no forward, so the module around the outermost list chooses.
            owner = name.rpartition(".")[0]
            while owner and isinstance(model.get_submodule(owner), LISTS):
                owner = owner.rpartition(".")[0]
            inner = [(f"{name}.{key}".lstrip("."), child) for key, child in module.named_children()]
            ran = [child_name in self._ran for child_name, child in inner if next(child.parameters(), None) is not None]
            if (self._chosen or owner in self._deciding) and any(ran) and not all(ran):
                raise SpeedupError(
                    f"example inputs must reach every data-dependent branch, got modules that didn't run ({name})"
                )

    def _is_followed(self, value: Any) -> bool:
        """Tell whether a value is a tensor in the graph, or a size of one."""
        if isinstance(value, Tensor):
            return id(value) in self._nodes or id(value) in self._own
        return isinstance(value, TracedInt) and value.source is not None and not value.factors

    def _measured(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Turn sizes that a model reads from a tensor into `TracedInt`; return other outputs unchanged."""
        name = getattr(func, "__name__", "")
        of_shape = name == "__get__" and getattr(func.__self__, "__name__", "") == "shape"
        names = ("size", "numel", "nelement", "__len__")
        if not (of_shape or name in names) or not self._is_followed(args[0]):
            return out
        unshown = self._inner if self._inside else self._unshown
        if name == "__len__":  # always a plain integer, so that its use isn't known
            if args[0].dim() > 1:
                unshown.append(TracedInt.of_tensor(out, args[0], 0, unshown))
            return out
        if name in names[1:]:
            sizes = [TracedInt.of_tensor(size, args[0], d, unshown) for d, size in enumerate(args[0].shape)]
            return math.prod(sizes)
        if isinstance(out, int):
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return TracedInt.of_tensor(out, args[0], dim, unshown)
        return torch.Size([TracedInt.of_tensor(size, args[0], d, unshown) for d, size in enumerate(out)])

    @contextmanager
    def _calls_seen(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in model.named_modules():
                if name:
                    # Around all other hooks, because these are part of the module.
                    before, after = partial(self._enter_module, name), partial(self._leave_module, name)
                    stack.enter_context(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
                    stack.enter_context(module.register_forward_hook(after, with_kwargs=True, always_call=True))
            stack.enter_context(_functions_replaced(model))
            token = _RUNNING.set(self)
            stack.callback(_RUNNING.reset, token)
            yield

    def _enter_module(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inside:
            return
        self._stack.append(name)
        self._ran.add(name)
        if isinstance(module, nn.RNNBase) and isinstance(next(iter((*args, *kwargs.values())), None), PackedSequence):
            self._leaves.discard(id(module))  # a graph can't hold packed sequences: their tensors are recorded
        self._given = args, kwargs
        if id(module) in self._followed:
            self._before = name, args, kwargs
        self._inside += id(module) in self._leaves or self._before is not None

    def _leave_module(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        if not self._stack or self._stack[-1] != name:
            return  # within a leaf
        self._inside, self._before = 0, None
        if id(module) in self._leaves:
            self._write("call_module", name, *self._given, out)
        self._stack.pop()

    def length(self, value: Any) -> int:
        """Return the length of a value: of a tensor in the graph, as a size that is followed."""
        if self._inside or not (isinstance(value, Tensor) and self._is_followed(value) and value.dim()):
            return len(value)
        return value.shape[0]

    def call_as_one_node(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function and record it as one node."""
        self._inside += 1
        try:
            out = function(*args, **kwargs)
        finally:
            self._inside -= 1
        if isinstance(out, Tensor) and not self._inside:
            tensor_arguments = {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
            bound = {key: value for key, value in kwargs.items() if key not in tensor_arguments}
            self._write("call_function", _Bound(function, *args, **bound), (), tensor_arguments, out)
        return out

    def _write(self, op: str, target: Any, args: Any, kwargs: Any, out: Any) -> None:
        picks = op != "call_module" and _picks(target, args)
        self._picked |= picks
        self.reads_values |= picks  # the output's size depends on values
        if target is operator.setitem:
            # A graph has no in-place writes: from here on, a new node stands for the tensor.
            op, target, out = "call_function", put, args[0]
        if not tensors_of(out):
            return
        node = self.graph.create_node(
            op, target, *(map_aggregate(container, self._argument) for container in (args, kwargs))
        )
        node.meta["nn_module_stack"] = {name: (name, nn.Module) for name in self._stack}
        node.meta[LINE] = forward_line()
        self._enter(out, node)

    def _write_check(self, check: Check) -> bool:
        """Add a comparison or remainder of sizes to the graph; return False if it can't hold what is computed."""
        function, *operands = check
        if self._inside and not _is_width_checked(check):
            return False  # the dry run runs the module, and with it this check
        if self._stack and self._stack[-1] in self._recurrent:
            return False  # PyTorch's own check of a width that the dense layer has, too
        node = self.graph.call_function(function, tuple(map(self._argument, operands)))
        node.meta |= {"nn_module_stack": {name: (name, nn.Module) for name in self._stack}, LINE: forward_line()}
        if not self._inside:
            node.meta[UNSHOWN] = True
        self.read.add(node)
        waiting = [node]
        for number in waiting:
            waiting += [parent for parent in number.all_input_nodes if parent in self.numbers]
        self.checks.update(waiting)
        return True

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, TracedInt):
            value.written = True
            if value.source is None:
                return value.copied()  # the forward may keep the number itself
            origin, dim_or_operands = value.source
            if isinstance(origin, Tensor):
                number = self.graph.call_method("size", (self._node(origin), dim_or_operands))
            else:
                number = self.graph.call_function(origin, tuple(map(self._argument, dim_or_operands)))
            self.numbers.add(number)
            return number
        if isinstance(value, np.generic):
            value = value.item()  # such as a size that a converter has read from a file
        if isinstance(value, np.ndarray) and value.dtype.kind in "bi":  # an index
            return self._node(torch.tensor(value.tolist(), device="cpu"))
        if not isinstance(value, _PLAIN):
            raise SpeedupError(f"arguments of recorded operations must be tensors or plain, got {type(value).__name__}")
        return value

    def _enter(self, value: Any, node: Node) -> None:
        """Note the value of a node; for a container, such as an LSTM's states, each tensor in it."""
        if isinstance(value, Tensor):
            self._keep(value, node)
            return
        for key, member in value.items() if isinstance(value, Mapping) else enumerate(value):
            if tensors_of(member):
                self._enter(member, self.graph.call_function(operator.getitem, (node, key)))

    def _node(self, tensor: Tensor) -> Node:
        if id(tensor) not in self._nodes:
            name = self._own.get(id(tensor))
            if name is None:
                if is_transformed(tensor):
                    raise SpeedupError("what runs under torch.vmap or torch.func can't be recorded")
                name = f"{RECORDED}_{len(self.constants)}"
                self.constants[name] = tensor.detach().clone()
            self._keep(tensor, self.graph.create_node("get_attr", name))
        return self._nodes[id(tensor)]

    def _keep(self, tensor: Tensor, node: Node) -> None:
        self._alive.append(tensor)
        self._nodes[id(tensor)] = node


_RUNNING: ContextVar[_Recorder | None] = ContextVar("running", default=None)  # the recorder of this thread


@contextmanager
def _functions_replaced(model: nn.Module) -> Iterator[None]:
    """Record functions that make attention masks as one node each, and follow lengths and what was compiled.

    Within the block, wrappers that use this thread's recorder replace them in the modules that define the layers.
    """
    before: list[tuple[dict[str, Any], str, Callable[..., Any] | None]] = []
    for name in {type(module).__module__ for module in model.modules()}:
        # The module of a class made by exec, for example, isn't imported.
        space = vars(sys.modules[name]) if name in sys.modules else {}
        for key, function in list(space.items()):
            # What torch.jit.script has compiled shows nothing of what it does: its Python code does the same.
            written = getattr(function, "_torchdynamo_inline", None)
            if isinstance(function, torch.jit.ScriptFunction) and written is not None:
                before.append((space, key, function))
                space[key] = written
                continue
            if key.startswith("create_") and key.endswith("_mask") and callable(function):
                before.append((space, key, function))
                space[key] = partial(_call_whole, function)
        if "len" not in space:  # Python makes the result of its own function a plain integer
            before.append((space, "len", None))
            space["len"] = _length
    try:
        yield
    finally:
        for space, key, function in before:
            if function is None:
                del space[key]
            else:
                space[key] = function


def _length(value: Any) -> int:
    recorder = _RUNNING.get()
    if recorder is None:
        return len(value)
    return recorder.length(value)


def _call_whole(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    recorder = _RUNNING.get()
    if recorder is None:
        return function(*args, **kwargs)
    return recorder.call_as_one_node(function, args, kwargs)


class _Bound(partial[Any]):
    """A function that makes an attention mask, bound to arguments that a graph can't hold."""

    makes_mask = True

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.__name__, self.__module__ = function.__name__, __name__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bound) and self.func is other.func

    def __hash__(self) -> int:
        return hash(self.func)


def put(tensor: Tensor, place: Any, value: Any) -> Tensor:
    """Return a copy of a tensor in which a part has other values."""
    copied = tensor.clone()
    copied[place] = value
    return copied


def _is_leaf(module: nn.Module) -> bool:
    """Tell whether a module is one node: PyTorch's modules, attention, and layers and norms of other classes."""
    # The modules that compute a parametrized layer's weight are part of the layer.
    added = {"_nni_wrapper", "parametrizations"} if is_parametrized(module) else {"_nni_wrapper"}
    inner = [name for name, _ in module.named_children() if name not in added]
    is_plain = type(module).__module__.startswith("torch.nn") and not inner
    return is_plain or is_attention(module) or is_one(module)


def _is_written(func: Any) -> bool:
    """Tell whether a function writes into its first argument."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or name.endswith("_") != name.endswith("__")


def _is_part(value: Any, tensor: Any) -> bool:
    """Tell whether what is written into a value is written into a tensor, too: it is a view of the tensor."""
    if not (isinstance(value, Tensor) and isinstance(tensor, Tensor)) or value._base is None:
        return False
    if tensor._base is None:
        return value._base is tensor
    return value._base is tensor._base


def _index_of_part(func: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Return the index of the part that a function takes of a tensor; None for other functions."""
    name = getattr(func, "__name__", "")
    if name == "__getitem__":
        return arguments[0]
    if name != "narrow":
        return None
    dim, start, length = (*arguments, *(named[key] for key in ("dim", "start", "length")[len(arguments) :]))
    if dim < 0 or isinstance(start, Tensor):
        return None
    return (*[slice(None)] * dim, slice(start, start + length))


def _picks(target: Any, args: Any) -> bool:
    """Tell whether the size of an operation's output depends on values."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name == "getitem":
        return any(tensor.dtype == torch.bool for tensor in tensors_of(args[1:]))
    return name in ("nonzero", "masked_select", "unique", "nms") or (name == "where" and len(args) == 1)


def _operation(func: Any, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """Return a function call as a graph holds it, op, target and arguments, without in-place changes."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)
    if getattr(Tensor, name, None) not in (func, getattr(func, "__wrapped__", func)):  # ``**`` is a wrapped `pow`
        return "call_function", func, args
    plain = name.strip("_")
    if name == plain or not name.startswith("__"):
        # `requires_grad` is a property, which can't be called; `requires_grad_` is a method.
        return "call_method", plain if callable(getattr(Tensor, plain, None)) else name, args
    if plain[0] in "ri":  # from the right, as in ``1 - x``, or in place
        called = plain[1:] if hasattr(operator, plain[1:]) else f"{plain[1:]}_"  # ``and_``, ``or_``
        if hasattr(operator, called):
            return "call_function", getattr(operator, called), args[::-1] if plain[0] == "r" else args
    return "call_function", getattr(operator, plain, func), args


def _is_width_checked(check: Check) -> bool:
    """Tell whether a check compares an attribute for equality with the size of a tensor."""
    function, *operands = check
    attributes = [isinstance(operand, TracedInt) and operand.place is not None for operand in operands]
    return function in (operator.eq, operator.ne) and any(attributes) and not all(attributes)


def _follow_samples(first: _Recorder, second: _Recorder, samples: int) -> None:
    """Compute numbers that differ between the runs on n and 2n samples from the number of samples."""
    graph, nodes = first.graph, [node for node in first.graph.nodes if node not in first.checks]
    second_nodes = [node for node in second.graph.nodes if node not in second.checks]
    same = len(nodes) == len(second_nodes) and all(
        first_node.op == second_node.op and (first_node.target == second_node.target or first_node.op == "get_attr")
        for first_node, second_node in zip(nodes, second_nodes, strict=False)
    )
    if not same and first.of_samples:
        return  # the forward has decided by the number of samples: the graph is for this number alone
    if not same:
        raise SpeedupError("a model that is recorded must do the same whatever the number of samples, got two graphs")
    last = [node for node in nodes if node.op == "placeholder" or node is first.entry][-1]
    with graph.inserting_after(last):
        size = graph.call_method("size", (first.entry, 0))
    for first_node, second_node in zip(nodes, second_nodes, strict=True):
        name = str(first_node.target)
        if first_node.op == "get_attr" and name in first.constants:
            constant, twin = first.constants[name], second.constants[str(second_node.target)]
            if constant.shape != twin.shape:
                with graph.inserting_after(first_node):
                    following = _following(graph, first_node, first.constants, twin, size)
                first_node.replace_all_uses_with(following, lambda user, following=following: user is not following)
            continue
        with graph.inserting_before(first_node):
            counted = {
                "args": _replace_counts(graph, first_node.args, second_node.args, size, samples, first.reads_integers)
            }
            counted["kwargs"] = _replace_counts(
                graph, first_node.kwargs, second_node.kwargs, size, samples, first.reads_integers
            )
        first_node.args, first_node.kwargs = counted["args"], counted["kwargs"]
    if not size.users:
        graph.erase_node(size)


def _following(graph: Graph, node: Node, constants: dict[str, Tensor], twin: Tensor, size: Node) -> Node:
    """Return a node that extends a constant to any number of samples; ``twin``: its value for twice as many."""
    name = str(node.target)
    constant = constants[name]
    # It may number the samples, as in ``states[torch.arange(samples), last]``.
    if constant.shape and all(
        torch.equal(tensor, torch.arange(len(tensor), device=tensor.device)) for tensor in (constant, twin)
    ):
        return graph.call_function(torch.arange, (size,), {"device": constant.device})
    if not torch.equal(constant[:1].expand(twin.shape), twin):
        raise SpeedupError("a constant of a model must not depend on the number of samples, got one that does")
    constants[name] = constant[:1].clone()
    return graph.call_method("expand", (node, size, *[-1] * (constant.dim() - 1)))


def _replace_counts(graph: Graph, first: Any, second: Any, size: Node, samples: int, reads_integers: bool) -> Any:
    """Replace the integers that differ by multiples of the number of samples.

    ``reads_integers``: the forward reads integers from tensors, such as the length of the longest sequence. So one that
    differs otherwise stays.
    """
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return type(first)(
            [_replace_counts(graph, a, b, size, samples, reads_integers) for a, b in zip(first, second, strict=True)]
        )
    if isinstance(first, dict):
        return {
            key: _replace_counts(graph, value, second[key], size, samples, reads_integers)
            for key, value in first.items()
        }
    if isinstance(first, slice):
        ends = [(getattr(first, key), getattr(second, key)) for key in ("start", "stop", "step")]
        return slice(*(_replace_counts(graph, a, b, size, samples, reads_integers) for a, b in ends))
    if type(first) is not int or first == second:
        return first
    if second != 2 * first or first % samples:
        if reads_integers:
            return first
        raise SpeedupError(f"a number in a model must be fixed or a multiple of the samples, got {first} and {second}")
    if first == samples:
        return size
    return graph.call_function(operator.mul, (size, first // samples))
