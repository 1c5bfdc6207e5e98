"""A dry run: prune random channels, then compare the masked and the smaller network node by node.

This checks on the whole model what the rules state about single operations: that each runs on fewer channels, and that
its result for the kept channels doesn't depend on the pruned ones.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from nni_topo.errors import SpeedupError, out_of_memory, raised
from nni_topo.network.attention.heads import attend
from nni_topo.network.channels import reasons
from nni_topo.network.channels.constraints import Shares, chosen_of, shares
from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.channels.reasons import Reason
from nni_topo.network.channels.rules import has_property
from nni_topo.network.graph.nodes import RANDOM, UNSHOWN, plain_name, tensor_shape
from nni_topo.network.graph.traced_int import CHECKS, ON_NUMBERS, attribute_sizes_in, counted_by, resized
from nni_topo.network.graph.tracing import arguments
from nni_topo.network.layers.kinds import is_recurrent
from nni_topo.network.runtime.comparison import SAME_CHANNELS, difference
from nni_topo.network.runtime.copies import (
    attributes_put_back,
    detached_copy,
    evaluating,
    put_parameters,
    to_precision,
    unwrapped_copy,
)
from nni_topo.network.runtime.inputs import (
    Call,
    batch_size,
    call_in_precision,
    first_samples,
    random_like,
    tensors_of,
)
from nni_topo.network.runtime.progress import bar
from nni_topo.network.runtime.switches import DrawnInOrder, as_written, random_state_kept, seed_torch
from nni_topo.network.speedup.leaving_out import leave_out_of
from nni_topo.network.speedup.reconcile import grow, keep_read
from nni_topo.network.speedup.replace import Cutter, kept_slices

if TYPE_CHECKING:
    from nni_topo.network.speedup.analysis import Analysis

_SIDES = (33, 64)  # pixels of small images; strides halve 33 to 17, 9, 5, 3 and 2
_MOST_COLOURS = 64  # channels of images
_ROUNDS = 24  # each finds about half of the remaining unprunable channels

_DRAWS = 5  # attempts with other random weights and inputs if the network fails
_SHARES = (0.5, 0.25) * 4  # of channels that are kept, for each attempt to change what a forward's checks give


@as_written()
def find_unprunable(analysis: Analysis) -> dict[int, Reason]:
    """Return the unprunable channels that a dry run finds: the reason, by group id."""
    flow = analysis.flow
    for seed in range(_DRAWS):
        try:
            unprunable = _find_with_seed(analysis, seed)
        except Exception as error:  # a network may raise anything on random weights and inputs
            if out_of_memory(error):
                raise
            # Others may work: an expert, for example, isn't called if the router gives it no token.
            reason = reasons.dry_run_failed(of=raised(error))
            continue
        if unprunable is not None:
            return unprunable
        reason = reasons.never_settled()  # the last rounds still found channels, so more may be left
        break
    return dict.fromkeys(np.concatenate([flow.group_ids_of(name) for name in flow.layers]).tolist(), reason)


def _find_with_seed(analysis: Analysis, seed: int) -> dict[int, Reason] | None:
    """Return the unprunable channels that dry runs find on random weights and inputs; None if the last find some."""
    flow, unprunable = analysis.flow, dict[int, Reason]()
    drawing = np.random.default_rng(0)
    with random_state_kept(), torch.no_grad():
        seed_torch(seed)
        full, entering = _randomized(analysis)
        # Some numbers, such as lengths, can't be drawn: the last attempt takes the model's own inputs.
        drawn = entering if seed == _DRAWS - 1 else random_like(entering, torch.Generator().manual_seed(seed))
        args = call_in_precision(drawn, torch.float32)[0]
        halves = shares(flow, {name: layer.channels - layer.channels // 2 for name, layer in flow.layers.items()})
        few, by_shape, clean = first_samples((args, {})), dict[str, Call](), set[bool]()
        for call in (*(_cropped(few, side) for side in _SIDES), few, (args, {})):
            by_shape.setdefault(str([tensor.shape for tensor in tensors_of(call)]), call)
        calls = list(by_shape.values())
        for variant in analysis.variants:
            is_size = batch_size(variant.call) == batch_size(analysis.call)
            reason = reasons.depends_on_size() if is_size else reasons.depends_on_samples()
            unprunable.update(dict.fromkeys(_differing(flow, variant.flow).tolist(), reason))
        for (line, _), variant in analysis.by_values.items():
            unprunable.update(dict.fromkeys(_differing(flow, variant.flow).tolist(), reasons.depends_on_values(line)))
        _hold_checked(flow, unprunable)
        for turn in range(_ROUNDS):
            # Alternate: prune part of every block, as pruners do; prune some whole blocks, as masks may.
            in_parts = bool(flow.blocks) and turn % 2 == 0
            is_kept = _draw(flow, unprunable, drawing, halves if in_parts else {}, in_parts=in_parts)
            new_reasons = _find_on(calls, _DryRun(flow, is_kept, full))
            unprunable.update(new_reasons)
            if new_reasons:
                clean.clear()
            else:
                clean.add(in_parts)
            if clean == {bool(flow.blocks), False}:
                return unprunable
    return None


def _hold_checked(flow: ChannelFlow, unprunable: dict[int, Reason]) -> None:
    """Add the channels whose number decides what a forward's comparisons and remainders give; no network runs.

    ``unprunable``: the reason, by group id. A single dry run may miss them: half of all numbers are even.
    """
    checks = {node: _numbers_before(node) for node in flow.traced.graph.nodes if node.target in CHECKS}
    for node, numbers in list(checks.items()):
        # The ids of a layer's weight don't show its width: the dry run reads it from the smaller layer.
        is_of_weight = any(parent.op == "get_attr" for number in numbers for parent in number.all_input_nodes)
        if is_of_weight or UNSHOWN not in node.meta or not _counted_channels(flow, [*numbers, node]):
            del checks[node]
    drawing = np.random.default_rng(1)
    if not checks:
        return
    for kept_share in _SHARES:
        is_kept = _draw(flow, unprunable, drawing, {}, in_parts=False, kept_share=kept_share)
        sizes = flow.sizes_kept(is_kept)
        for check, numbers in checks.items():
            full, small = dict[Node, Any](), dict[Node, Any]()
            for node in (*numbers, check):
                if node.target == "size":
                    tensor, dim = cast("tuple[Node, int]", node.args)
                    ids, shape = flow.ids[tensor.name], tensor_shape(tensor) or ()
                    full[node], small[node] = shape[dim], len(kept_slices(ids, shape, flow, is_kept)[dim])
                else:
                    function: Any = node.target
                    full[node] = function(*map_arg(node.args, full.__getitem__))
                    small[node] = function(*resized(map_arg(node.args, small.__getitem__), sizes))
            if full[check] != small[check]:
                pruned = [group_id for group_id in _counted_channels(flow, [*numbers, check]) if not is_kept[group_id]]
                unprunable.update(dict.fromkeys(pruned, reasons.number_made(check)))


def _numbers_before(node: Node) -> list[Node]:
    """List the nodes of the numbers from which a node computes a number, in the order of the graph."""
    numbers = dict[Node, None]()
    if node.target not in CHECKS and node.target not in ON_NUMBERS:
        return []
    for parent in node.all_input_nodes:
        numbers.update(dict.fromkeys([*_numbers_before(parent), parent]))
    return list(numbers)


def _counted_channels(flow: ChannelFlow, numbers: Iterable[Node]) -> list[int]:
    """List the channels that numbers count, as sizes of tensors or in attributes: group ids."""
    group_ids = set[int]()
    for node in numbers:
        channels = counted_by(node, flow.ids)
        if channels is not None:
            group_ids.update(flow.group_ids(channels).tolist())
        for size in attribute_sizes_in(node.args):
            for place in size.places:
                group_ids.update(flow.counted_in(place))
    return sorted(group_ids - {FIXED})


def _differing(flow: ChannelFlow, other_flow: ChannelFlow) -> np.ndarray:
    """Return the channels whose coupling differs at a second size: group ids of ``flow``, int, (groups,).

    ``flow``, ``other_flow``: the channel flow at both sizes. The coupling of a channel is the same if the same channels
    must be removed with it and the same layers read it.
    """
    pairs = [
        (flow.group_ids_of(name), other_flow.group_ids_of(name)) for name in flow.layers if name in other_flow.layers
    ]
    for name, parameter in flow.free_parameters.items():
        same = other_flow.free_parameters.get(name)
        if same is not None and same.channels == parameter.channels:
            pairs.append((flow.group_ids(parameter.ids), other_flow.group_ids(same.ids)))
    read_elsewhere = [np.zeros(0, dtype=np.int64)]  # group ids of ``other_flow``
    for name in other_flow.readers:
        entering = flow.entering_group_ids(name), other_flow.entering_group_ids(name)
        if len(entering[0]) == len(entering[1]):
            pairs.append(entering)
        else:  # usually a layer that doesn't run at the first size
            read_elsewhere.append(entering[1])
    distinct_pairs = np.unique(np.concatenate([np.stack(pair, 1) for pair in pairs]), axis=0)
    first_ids, second_ids = distinct_pairs.T
    times_one, times_other = np.bincount(first_ids), np.bincount(second_ids)
    differs = (times_one[first_ids] > 1) | (times_other[second_ids] > 1) | (second_ids == FIXED)
    differs |= np.isin(second_ids, other_flow.at_output) & ~np.isin(first_ids, flow.at_output)
    differs |= np.isin(second_ids, np.concatenate(read_elsewhere))
    return np.setdiff1d(first_ids[differs], FIXED)


def _find_on(calls: list[Call], dry_run: _DryRun) -> dict[int, Reason]:
    """Return the unprunable channels that a dry run finds, by group id, and why.

    ``calls``: inputs of the network, small ones first. Inputs on which it fails or finds an unprunable channel are
    removed from the list, except the last one, whose result is returned.
    """
    while len(calls) > 1:
        try:
            if not dry_run.run(calls[0][0]):
                return {}
        except Exception as error:  # fixed sizes in the graph may not fit
            if out_of_memory(error):
                raise
        del calls[0]
    return dry_run.run(calls[0][0])


def _cropped(call: Call, side: int) -> Call:
    """Crop the first two images to ``side`` pixels; return the call unchanged unless all tensors are images."""
    if any(tensor.dim() != 4 for tensor in tensors_of(call)):
        return call

    def crop(images: Tensor) -> Tensor:
        # Tensors with many channels are assumed to be features, whose size may have to match another input's.
        if images.shape[1] < _MOST_COLOURS:
            return images[:2, :, :side, :side]
        return images

    small: Call = tree_map_only(Tensor, crop, call)
    return small


class _RandomNumbers:
    """Random weights from one shared buffer, because drawing them all takes longer than running the network."""

    _DRAWN = 262_147  # a prime, so that no two rows of a layer hold the same numbers
    _APART = 4096  # layers start at different offsets

    def __init__(self, draw: Callable[..., Tensor]) -> None:
        self._drawn = draw(self._DRAWN, device="cpu")
        self._scaled: dict[tuple[torch.device, float], Tensor] = {}
        self._start = 0

    def like(self, weight: Tensor, scale: float, shift: float = 0.0) -> Tensor:
        """Return single-precision numbers ``scale * drawn + shift`` in the shape of a weight."""
        key, count = (weight.device, scale), weight.numel() + self._APART
        if key not in self._scaled or self._scaled[key].numel() < count:
            scaled = (self._drawn[:count] * scale + shift).to(weight.device)
            self._scaled[key] = scaled.repeat(-(-count // scaled.numel()))
        # An even offset: only there can the numbers be viewed as complex.
        self._start = (self._start + 102) % self._APART
        return self._scaled[key][self._start : self._start + weight.numel()].view(weight.shape)


def _randomized(analysis: Analysis) -> tuple[GraphModule, Call]:
    """Return the graph of a model with random weights, in single precision, and the values of its placeholders."""
    # With these weights, nothing is zero or cancels by chance.
    drawn: nn.Module = evaluating(unwrapped_copy(analysis.model, light=True))
    normal, uniform = _RandomNumbers(torch.randn), _RandomNumbers(torch.rand)

    def real(old: Tensor) -> Tensor:
        fan = old[0].numel() if old.dim() > 1 else 0
        if fan:
            return normal.like(old, fan**-0.5)
        return uniform.like(old, 1.0, 0.5)

    def weights(old: Tensor) -> Tensor:
        if old.is_complex():
            return torch.complex(real(old.real), real(old.imag))
        return real(old)

    put_parameters(drawn, weights)
    full = analysis.trace.assembled(to_precision(drawn, torch.float32))

    def single(value: Any) -> Any:
        if value is torch.float64:
            return torch.float32
        if value is torch.complex128:
            return torch.complex64
        return value

    # Convert dtypes that are arguments in the graph.
    for node in full.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, single), map_aggregate(node.kwargs, single)
    full.recompile()
    to_precision(full, torch.float32)
    return full, (arguments(full.graph, analysis.model, analysis.call), {})


def _draw(
    flow: ChannelFlow,
    unprunable: dict[int, Reason],
    drawing: np.random.Generator,
    halves: Shares,
    *,
    in_parts: bool,
    kept_share: float = 0.5,
) -> np.ndarray:
    """Draw which channels are kept, bool, by group id: by default about half of the prunable ones.

    Every layer keeps at least one output channel and one input channel.
    """
    is_kept: np.ndarray = drawing.random(flow.size) < kept_share
    if in_parts:
        for blocks in flow.blocks:
            for block in blocks.all:
                group_ids = flow.group_ids(block)
                is_kept[group_ids] = False
                is_kept[drawing.permutation(group_ids)[: (len(group_ids) + 1) // 2]] = True
    for name, share in halves.items():
        is_kept[flow.group_ids_of(name)] = chosen_of(
            share.segments, share.counts, drawing.permutation(len(share.segments))
        )
    # A parameter or buffer that no layer's channels are tied to is never cut.
    is_of_layer = np.zeros(flow.size, dtype=np.bool_)
    for name in flow.layers:
        is_of_layer[flow.group_ids_of(name)] = True
    is_kept |= ~is_of_layer
    is_kept[[FIXED, *flow.at_output, *unprunable]] = True
    for name in flow.layers:
        group_ids = flow.group_ids_of(name)
        is_kept[group_ids[0]] |= not is_kept[group_ids].any()
        # With few heads, all may be kept, which would test nothing. ``in_parts``: blocks already lose equally many.
        if not in_parts and is_kept[group_ids].all():
            prunable = np.setdiff1d(group_ids, [FIXED, *flow.at_output, *unprunable])
            is_kept[prunable[1:2]] = False
    worth = drawing.random(len(is_kept))
    keep_read(flow, is_kept, lambda: worth)
    grow(flow, is_kept, lambda: worth, 1, set())
    return is_kept


def _is_place_unread(node: Node) -> bool:
    """Tell whether nothing reads at which place along a dimension a maximum or minimum was found."""
    if plain_name(node) not in ("max", "min"):
        return False
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


class _DryRun:
    """Run the masked and the smaller network node by node, and compare them."""

    def __init__(self, flow: ChannelFlow, is_kept: np.ndarray, full: GraphModule) -> None:
        self.flow, self.is_kept, self.full = flow, is_kept, full
        self._sizes, self._averaged = flow.sizes_kept(is_kept), flow.averaged
        modules = nn.Module()
        vars(modules).update({key: value for key, value in vars(full).items() if key != "_graph"})
        # Cutting replaces the tensors that it makes smaller, so both networks may share the others.
        self.small: nn.Module = detached_copy(modules, light=True, shared=modules.buffers())
        cutter, self._uncut = Cutter(self.small, flow, is_kept), dict[int, Reason]()
        try:
            cutter.cut()
        except SpeedupError as error:
            self._uncut = dict.fromkeys(self._removed_at(cutter.at), reasons.cutting_failed(cutter.at, of=str(error)))
        self._order = cutter.order

    def run(self, args: tuple[Any, ...]) -> dict[int, Reason]:
        """Return the unprunable channels, by group id, and why."""
        if self._uncut:
            return self._uncut
        # A layer may leave something for its next call, such as the last frames of a film. The model's own forward,
        # which clears it, doesn't run here.
        with attributes_put_back(self.full), attributes_put_back(self.small):
            return self._compared(args)

    def _compared(self, args: tuple[Any, ...]) -> dict[int, Reason]:
        """Run both networks, and return the unprunable channels, by group id, and why."""
        self._found: dict[int, Reason] = {}
        self._left_out: dict[str, nn.Module] = {}  # by name, copies of the large network's modules: see `_full_module`
        self._values: dict[Node, tuple[Any, Any]] = {}  # a node's outputs in both networks
        # By node and parent node, the pruned channels that enter with nonzero values.
        self._arriving: dict[Node, dict[Node, np.ndarray]] = {}
        self._args, inputs = args, iter(args)
        last_reader = dict[Node, Node]()
        for node in self.full.graph.nodes:
            last_reader.update(dict.fromkeys(node.all_input_nodes, node))
        done_after: dict[Node, list[Node]] = defaultdict(list)
        for parent, node in last_reader.items():
            done_after[node].append(parent)
        for node in bar("dry run", None, self.full.graph.nodes):
            if node.op == "placeholder":
                value = next(inputs)
                self._values[node] = (
                    tree_map_only(Tensor, Tensor.clone, value),
                    tree_map_only(Tensor, Tensor.clone, value),
                )
            elif node.op != "output":
                self._step(node)
            for parent in done_after[node]:
                del self._values[parent]
        return self._found

    def _step(self, node: Node) -> None:
        if node.op == "get_attr":
            # Its size is compared where it is used: a reader may need only its dtype or device.
            full = self._called(node, self.full, 0)
            self._values[node] = self._masked(node, full), self._called(node, self.small, 1)
            return
        entering = {parent: self._nonzero(parent) for parent in self._tensors_before(node)}
        arriving = any(map(len, entering.values()))
        if arriving:
            self._arriving[node] = entering
        reads_others = node.name in self.flow.guessed and self._reads_others(node)
        full = self._masked(node, self._called(node, self.full, 0))
        expected = self._cut(node, full)
        reason: Reason | None = None
        try:
            actual = self._called(node, self.small, 1)
            # Compare only attention's first output; attention weights are compared where a node reads them.
            outputs = [tree_flatten(outcome)[0] for outcome in (expected, actual)]
            if self._is_attention(node):
                outputs = [leaves[:1] for leaves in outputs]
            for at, (expected_tensor, actual_tensor) in enumerate(zip(*outputs, strict=True)):
                if not isinstance(expected_tensor, Tensor) or (at == 1 and _is_place_unread(node)):
                    continue
                if expected_tensor.shape != actual_tensor.shape:
                    reason = reasons.fixed_sizes(node)
                elif node.name not in self._averaged and difference(expected_tensor, actual_tensor) > SAME_CHANNELS:
                    reason = reasons.result_depends(node)
                if reason:
                    break
        except Exception as error:  # an operation may raise anything
            if out_of_memory(error):
                raise
            actual, reason = None, reasons.fixed_sizes(node, error)
        if not reason and UNSHOWN in node.meta and full != actual:
            reason = reasons.number_made(node)  # the dense model's forward would compute another number
        if not reason and (reads_others or (arriving and node.name in self.flow.summed)):
            reason = reasons.result_depends(node)  # even if only a little with these numbers
        # A single selected channel may be used only for its size: its readers show that, unless the model returns it.
        ids, is_returned = self.flow.ids.get(node.name), any(user.op == "output" for user in node.users)
        is_picked = has_property(node, "picks_one") and isinstance(ids, Tensor) and ids.numel() == 1
        is_picked = is_picked and not is_returned
        if reason and not (reason.kind == "result_depends" and is_picked):
            self._blame(node, entering, reason)
            actual = tree_map_only(Tensor, Tensor.clone, expected)
        self._values[node] = full, actual

    def _reads_others(self, node: Node) -> bool:
        """Tell whether a node's result for the kept channels depends on the pruned ones.

        Pruned channels are set to NaN, which reaches every result that reads them, however small their influence.
        """
        poisoned = dict[Node, Any]()
        for parent in node.all_input_nodes:
            leaves, spec = tree_flatten(self._values[parent][0])
            all_ids = tree_flatten(self.flow.ids[parent.name])[0]
            pairs = list[tuple[Any, Any]]()
            if len(all_ids) == len(leaves):
                pairs = list(zip(leaves, all_ids, strict=True))
            for at, (value, ids) in enumerate(pairs):
                if isinstance(value, Tensor):
                    leaves[at] = value.clone()
                    takes_nan = value.layout == torch.strided and (value.is_floating_point() or value.is_complex())
                    if isinstance(ids, Tensor) and takes_nan and ids.dim() == value.dim():
                        pruned = ~self._stays(ids).to(value.device)
                        leaves[at].masked_fill_(pruned.expand(value.shape), torch.nan)
            poisoned[parent] = tree_unflatten(leaves, spec)
        # Clones, because the node may change its inputs in place.
        plain = {parent: tree_map_only(Tensor, Tensor.clone, self._values[parent][0]) for parent in poisoned}
        outputs = list[list[Tensor]]()
        try:
            module = self._full_module(node.target) if node.op == "call_module" else nn.Module()
            for values in (plain, poisoned):
                with attributes_put_back(module):
                    outputs.append(tensors_of(self._cut(node, self._called(node, self.full, 0, values=values))))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # rejects NaN: only compared
            if out_of_memory(error):
                raise
            return False
        for before, after in zip(*outputs, strict=True):
            if after.layout != torch.strided:
                before, after = before.to_dense(), after.to_dense()
            if bool((after.isnan() & ~before.isnan()).any()):
                return True
        return False

    def _called(
        self,
        node: Node,
        module: nn.Module,
        network: int,
        values: dict[Node, Any] | None = None,
    ) -> Any:
        """Compute a node's output in one of the networks.

        ``values``: outputs of its parent nodes to use instead of this network's.
        """
        if node.op == "get_attr":
            return attrgetter(str(node.target))(module)
        entering = values or {parent: self._values[parent][network] for parent in node.all_input_nodes}
        node_arguments: Any = map_arg((node.args, node.kwargs), entering.__getitem__)
        args, kwargs = node_arguments
        if network:
            args, kwargs = resized(node_arguments, self._sizes)
        with random_state_kept() if RANDOM in node.meta else nullcontext(), DrawnInOrder():
            if RANDOM in node.meta:
                seed_torch(0)  # both draw the same numbers
            if node.op == "call_module":
                layer = module.get_submodule(str(node.target)) if network else self._full_module(node.target)
                return layer(*args, **kwargs)
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        # Uninitialized memory differs between the two networks.
        if has_property(node, "is_unset"):
            return value.zero_()
        return value

    def _full_module(self, target: Any) -> nn.Module:
        """Return a module of the large network, the same one in all its calls: it may leave something for the next."""
        name = str(target)
        if name not in self._left_out:
            self._left_out[name] = self._without_removed(name, self.full.get_submodule(name))
        return self._left_out[name]

    def _without_removed(self, name: str, layer: nn.Module) -> nn.Module:
        """Return a copy of a module that computes without removed channels; or the module itself if none is removed."""
        kept_inputs = torch.from_numpy(np.asarray(self.is_kept[self.flow.entering_group_ids(name)]))
        pruned = ~kept_inputs
        if name in self.flow.layers:
            pruned = torch.from_numpy(~self.is_kept[self.flow.group_ids_of(name)])
        if kept_inputs.all() and not pruned.any():
            return layer
        layer = copy.copy(layer)
        layer._parameters = dict(layer._parameters)
        layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs = OrderedDict(), OrderedDict()
        leave_out_of(layer, kept_inputs, self.flow, name)
        if is_recurrent(layer):  # other units read the pruned units
            layer = copy.deepcopy(layer)
            for parameter in layer.parameters():
                parameter[pruned.to(parameter.device)] = 0
        return layer

    def _masked(self, node: Node, value: Any) -> Any:
        """Zero the pruned channels in a node's output, if it is a layer, parameter or attention."""
        if self._is_attention(node):
            (context, *further_outputs), spec = tree_flatten(value)
            pruned = ~self._stays(tree_flatten(self.flow.ids[node.name])[0][0]).to(context.device)
            return tree_unflatten([context.masked_fill(pruned.expand(context.shape), 0), *further_outputs], spec)
        if node.op not in ("call_module", "get_attr") or not isinstance(value, Tensor):
            return value
        sources = self.flow.layers if node.op == "call_module" else self.flow.free_parameters
        if str(node.target) not in sources:
            return value
        return value.masked_fill(~self._stays(self.flow.ids[node.name]).to(value.device).expand(value.shape), 0)

    def _stays(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.is_kept[self.flow.group_ids(ids.numpy())]))

    def _cut(self, node: Node, value: Any) -> Any:
        """Remove pruned channels from a node's output tensors."""
        if self._order is not None and node.name in self._order.reordered:
            return self._order.select(node, value)
        leaves, spec = tree_flatten(value)
        all_ids = tree_flatten(self.flow.ids[node.name])[0]
        if len(all_ids) != len(leaves):
            return value
        cut = []
        for leaf, ids in zip(leaves, all_ids, strict=True):
            if isinstance(leaf, Tensor) and isinstance(ids, Tensor):
                for d, indices in enumerate(kept_slices(ids, tuple(leaf.shape), self.flow, self.is_kept)):
                    if len(indices) < leaf.shape[d]:
                        leaf = leaf.index_select(d, indices.to(leaf.device))
            cut.append(leaf)
        return tree_unflatten(cut, spec)

    def _is_attention(self, node: Node) -> bool:
        attention = self.flow.attention.get(str(node.target)) if node.op == "call_module" else None
        return node.target is attend or not (attention is None or attention.recurrent)

    def _tensors_before(self, node: Node) -> list[Node]:
        """List the nodes whose tensors a node reads, directly or through sizes computed from them."""
        sources, waiting = dict[Node, None](), list(node.all_input_nodes)
        while waiting:
            parent = waiting.pop()
            if any(isinstance(leaf, Tensor) for leaf in tree_flatten(self.flow.ids.get(parent.name))[0]):
                sources[parent] = None
                continue
            is_plain = False  # the size of a dimension that holds no channels
            if parent.target == "size" and len(parent.args) == 2:
                measured, dim = cast("tuple[Node, int]", parent.args)
                ids = self.flow.ids[measured.name]
                is_plain = isinstance(ids, Tensor) and ids.shape[dim] == 1
            if not is_plain:
                waiting += parent.all_input_nodes
        return list(sources)

    def _nonzero(self, node: Node) -> np.ndarray:
        """List the pruned channels of a node's output whose values aren't zero."""
        full = self._values.get(node, (None,))[0]
        channel_ids = [np.zeros(0, dtype=np.int64)]
        for value, ids in zip(tree_flatten(full)[0], tree_flatten(self.flow.ids[node.name])[0], strict=False):
            if not (isinstance(value, Tensor) and isinstance(ids, Tensor) and value.dim() == ids.dim()):
                continue
            if value.layout != torch.strided:
                value = value.to_dense()
            pruned = ~self._stays(ids)
            if bool(pruned.any()) and value.numel():
                alike = [d for d, size in enumerate(ids.shape) if size == 1]
                nonzero = value != 0
                if alike:
                    nonzero = nonzero.amax(alike, keepdim=True)
                alive = pruned & nonzero.cpu()
                if bool(alive.any()):
                    channel_ids.append(np.unique(ids[alive].numpy()))
        return np.concatenate(channel_ids)

    def _blame(self, node: Node, entering: dict[Node, np.ndarray], reason: Reason) -> None:
        """Mark the channels that caused a difference: nonzero pruned inputs, else the heads', else all inputs'.

        If no pruned channel enters, a layer's own output channels are marked; for another node, the nearest pruned
        channels before it, because sizes computed from these may be wrong.
        """
        alive = np.concatenate([*entering.values(), np.zeros(0, dtype=np.int64)])
        group_ids = np.zeros(0, dtype=np.int64)
        if not len(alive) and self._is_attention(node):
            # Attention's input layers are cut to fit its input, so blame the heads first.
            holder: Any = node.args[0] if node.target is attend else node
            attention = self.flow.attention[str(holder.target)]
            group_ids = np.unique(np.concatenate([self.flow.group_ids_of(layer) for layer in attention.channels]))
        if node.target in CHECKS:
            group_ids = np.array(_counted_channels(self.flow, [*_numbers_before(node), node]), dtype=np.int64)
        if self.is_kept[group_ids].all():
            ids = [alive] if len(alive) else self._ids_of(entering)
            group_ids = np.unique(self.flow.group_ids(np.concatenate([*ids, np.zeros(0, dtype=np.int64)])))
        if not self.is_kept[group_ids].all():
            blamed = group_ids[group_ids > FIXED].tolist()
        elif str(node.target) in self.flow.layers:
            # Such as a layer with additional parameters, which aren't cut with its weight.
            blamed = self._removed_at(str(node.target))
        else:
            blamed, level, seen = list[int](), list(node.all_input_nodes), set[Node]()
            while level and not blamed:
                seen.update(level)
                blamed = self._pruned([self.flow.group_ids(ids) for ids in self._ids_of(level)])
                before = dict[Node, None]()
                for parent in level:
                    before.update(dict.fromkeys(source for source in parent.all_input_nodes if source not in seen))
                level = list(before)
            blamed = blamed or self._removed()
        if len(alive) and reason.kind == "result_depends":
            reason = reasons.nonzero_values(node, self._source(node))
        for group_id in blamed:
            self._found.setdefault(group_id, reason)

    def _ids_of(self, nodes: Iterable[Node]) -> list[np.ndarray]:
        """List the channel ids of nodes' output tensors."""
        return [ids.numpy().ravel() for node in nodes for ids in tensors_of(self.flow.ids.get(node.name))]

    def _source(self, reader: Node) -> Node:
        """Find the operation that turns pruned channels from zero into the values that enter a node."""
        source = reader
        while True:
            before = source
            for parent, channels in self._arriving.get(before, {}).items():
                if len(channels) and parent.op not in ("get_attr", "placeholder"):
                    source = parent
                    break
            if source is before:
                return source

    def _removed_at(self, name: str) -> list[int]:
        """List the pruned channels that enter or leave a module; if none do, all pruned channels of the network."""
        leaving = []
        if name in self.flow.layers:
            leaving = [self.flow.group_ids_of(name)]
        return self._pruned([*leaving, self.flow.entering_group_ids(name)]) or self._removed()

    def _removed(self) -> list[int]:
        return self._pruned([self.flow.group_ids_of(name) for name in self.flow.layers])

    def _pruned(self, group_ids: list[np.ndarray]) -> list[int]:
        distinct_ids = np.unique(np.concatenate([*group_ids, np.zeros(0, dtype=np.int64)]))
        pruned: list[int] = distinct_ids[~self.is_kept[distinct_ids]].tolist()
        return pruned
