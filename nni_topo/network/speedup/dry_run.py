"""A dry run: random channels go, and the network with them at zero runs beside the one without them, node by node.

What the rules for single operations say about channels is thereby checked on every operation of the model, whatever it
is: that it runs on fewer channels at all, and that what it makes of those kept doesn't depend on those pruned.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from nni_topo.errors import SpeedupError
from nni_topo.network.attention import PrunedMultiheadAttention, attend
from nni_topo.network.channels import FIXED, ChannelFlow, Reason, Shares, chosen_of, has_property, reasons, shares
from nni_topo.network.graph import RANDOM, arguments, resized
from nni_topo.network.layers import is_normalizing, is_recurrent, per_channel_names
from nni_topo.network.runtime import (
    SAME_CHANNELS,
    Call,
    RandomWeights,
    Variation,
    cast_floats,
    detached_copy,
    difference,
    fast_paths_off,
    out_of_memory,
    put_parameters,
    random_like,
    random_state_kept,
    shrunk,
    tensors_of,
    together,
    unwrapped_copy,
    variations_of,
    varied,
)
from nni_topo.network.speedup.constant_channels import ConstantContribution, constant_contribution
from nni_topo.network.speedup.network import Network
from nni_topo.network.speedup.reconcile import grow, keep_read
from nni_topo.network.speedup.replace import DenseSpeedup, kept_slices

_SINGLE = {torch.float64: torch.float32}
_SIDES = (33, 64)  # pixels of images in one batch; strides halve 33 to 17, 9, 5, 3 and 2
_ROUNDS = 24  # each finds about half of the channels that can't go and weren't found yet


_ROWS = 64  # that a layer reads at once, from which on its weights take less long to compare than to use
_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
_MULTIHEAD = (nn.MultiheadAttention, PrunedMultiheadAttention)


def unprunable(network: Network) -> dict[int, Reason]:
    """Return the channels that a dense model can't do without although none is pinned: by group id, the reason."""
    return network.remember("unprunable", lambda: _find_unprunable(network))


@fast_paths_off()
def _find_unprunable(network: Network) -> dict[int, Reason]:
    (assembled, flow), held = network.traced(), dict[int, Reason]()
    drawing = np.random.default_rng(0)
    with random_state_kept(), torch.no_grad():
        torch.manual_seed(0)
        full = assembled(_with_random_weights(network.model))
        entering: Call = (arguments(full.graph, network.model, network.call), {})
        args = cast_floats(random_like(entering, torch.Generator().manual_seed(0)), torch.float32)[0]
        halves = shares(flow, {name: layer.channels - layer.channels // 2 for name, layer in flow.layers.items()})
        inputs, clean = _Inputs(args), set[bool]()
        for turn in range(_ROUNDS):
            # Blocks lose a part of each, as pruners choose; and some as a whole, as masks may say.
            in_parts = bool(flow.blocks) and turn % 2 == 0
            left = _draw(flow, held, drawing, halves if in_parts else {}, in_parts=in_parts)
            try:
                found = inputs.find(_DryRun(flow, left, full))
            except Exception as error:  # with these weights and inputs a network may fail, in as many ways as it does
                if out_of_memory(error):
                    raise
                return _all_held(flow, reasons.dry_run_failed(error))
            held.update(found)
            clean = set() if found else clean | {in_parts}
            if clean == {bool(flow.blocks), False}:
                return held
    # It didn't come to rest: nothing is sure.
    return _all_held(flow, reasons.never_settled())


def _all_held(flow: ChannelFlow, reason: Reason) -> dict[int, Reason]:
    group_ids = np.concatenate([flow.group_ids_of(name) for name in flow.layers])
    return dict.fromkeys(group_ids.tolist(), reason)


class _Inputs:
    """The random inputs that a dry run runs on, small ones as long as these will do.

    They come in several scales and shifted, as small inputs and large ones ask different things of an operation: all in
    one batch, if the network takes that.
    """

    def __init__(self, args: tuple[Any, ...]) -> None:
        self._variations = variations_of((args, {}))
        self._alone = _different([shrunk((args, {})), (args, {})])
        batches = (
            [together((shrunk((args, {}), side)), self._variations) for side in _SIDES] if self._variations else []
        )
        batches += [together((args, {}), self._variations)] if self._variations else []
        self._batches = _different([each for each in batches if each is not None])
        self._is_clean = True  # whether nothing was found yet

    def find(self, dry_run: _DryRun) -> dict[int, Reason]:
        """Return the channels that can't go, and why."""
        if self._is_clean and self._in_one_batch(dry_run):
            return {}
        self._is_clean = False
        found = self._by_itself(dry_run)
        if found or not self._variations or self._in_one_batch(dry_run):
            return found
        for variation in self._variations:
            found |= self._varied(dry_run, variation)
        return found

    def _in_one_batch(self, dry_run: _DryRun) -> bool:
        """Tell whether nothing is found at any scale; False too if that can't be told of one batch."""
        while self._batches:
            try:
                return not dry_run.run(self._batches[0][0], blocks=1 + len(self._variations))
            except Exception:  # sizes may be written into the graph; or memory is short, which inputs alone will show
                del self._batches[0]
        return False

    def _by_itself(self, dry_run: _DryRun) -> dict[int, Reason]:
        """Return what is found on the inputs as they are; of these keep the small ones while they find nothing."""
        while len(self._alone) > 1:
            try:
                if not dry_run.run(self._alone[0][0]):
                    return {}
            except Exception as error:  # sizes may be written into the graph
                if out_of_memory(error):
                    raise
            del self._alone[0]
        return dry_run.run(self._alone[0][0])

    def _varied(self, dry_run: _DryRun, variation: Variation) -> dict[int, Reason]:
        """Return what is found on other inputs, in double precision too: rounding grows with what is computed."""
        args = varied(self._alone[0], variation)
        try:
            found = dry_run.run(args[0], is_varied=True)
        except Exception as error:  # a network needn't take all that is a number
            if out_of_memory(error):
                raise
            return {}
        if not found:
            return {}
        try:
            return dry_run.doubled().run(cast_floats(args, torch.float64)[0], is_varied=True)
        except Exception as error:  # a type may be written into the network
            if out_of_memory(error):
                raise
            return found


def _different(calls: list[Call]) -> list[Call]:
    """Leave out calls whose tensors have the shapes of those before."""
    found: dict[str, Call] = {}
    for call in calls:
        found.setdefault(str([each.shape for each in tensors_of(call)]), call)
    return list(found.values())


def _with_random_weights(model: nn.Module) -> nn.Module:
    """Copy a model with weights under which nothing is zero or cancels by itself."""
    drawn = unwrapped_copy(model, light=True).eval()
    normal, uniform = RandomWeights(torch.randn), RandomWeights(torch.rand)

    def weights(_: str, old: Tensor) -> Tensor:
        fan = old[0].numel() if old.dim() > 1 else 0
        return normal.like(old, fan**-0.5) if fan else uniform.like(old, 1.0, 0.5)

    put_parameters(drawn, weights)
    return drawn.float()


def _draw(
    flow: ChannelFlow, held: dict[int, Reason], drawing: np.random.Generator, halves: Shares, *, in_parts: bool
) -> np.ndarray:
    """Draw which channels stay, by representative: about half of those that can go.

    Of every layer at least one stays, and of what enters any.
    """
    left: np.ndarray = drawing.random(flow.size) < 0.5
    for block in (block for blocks in flow.blocks for side in blocks.sides for block in side if in_parts):
        group_ids = flow.group_ids(block)
        left[group_ids] = False
        left[drawing.permutation(group_ids)[: (len(group_ids) + 1) // 2]] = True
    for name, share in halves.items():
        left[flow.group_ids_of(name)] = chosen_of(
            share.stretches, share.counts, drawing.permutation(len(share.stretches))
        )
    left[[FIXED, *flow.at_output, *held]] = True
    for name in flow.layers:
        group_ids = flow.group_ids_of(name)
        left[group_ids[0]] |= not left[group_ids].any()
    worth = drawing.random(len(left))
    keep_read(flow, left, lambda: worth)
    grow(flow, left, lambda: worth, 1, set())
    return left


def _taken(value: Tensor, d: int, places: Tensor) -> Tensor:
    """Take some places of a dimension."""
    if d < max(value.dim() - 1, 2):
        return value.index_select(d, places)
    # Of the last of more than two dimensions PyTorch takes entries one by one.
    taken: Tensor = value.flatten(0, -2).index_select(1, places).unflatten(0, value.shape[:-1])
    return taken


def _is_zero(value: Tensor, gone: Tensor) -> bool:
    """Tell whether what is gone of a tensor is zero, where that is quick to say: of one dimension."""
    dims = [d for d in range(gone.dim()) if gone.shape[d] > 1]
    if len(dims) != 1 or gone.shape[dims[0]] != value.shape[dims[0]] or value.dtype not in (*_SINGLE, torch.float32):
        return False
    low, high = value.index_select(dims[0], gone.flatten().nonzero().flatten().to(value.device)).aminmax()
    return float(low) == 0 == float(high)


class _DryRun:
    """One run of both networks."""

    def __init__(self, flow: ChannelFlow, left: np.ndarray, full: GraphModule, *, is_double: bool = False) -> None:
        self.flow, self.left, self.full = flow, left, full
        self._is_double = is_double
        self._sizes = flow.sizes_kept(left)
        modules = nn.Module()
        vars(modules).update({key: value for key, value in vars(full).items() if key != "_graph"})
        # Cutting puts new tensors in place of those it makes smaller, so both networks may share the others.
        self.small: nn.Module = detached_copy(modules, light=True, shared=modules.buffers())
        speedup, self._uncut = DenseSpeedup(self.small, flow, left), dict[int, Reason]()
        try:
            speedup.speedup_model()
        except SpeedupError as error:
            self._uncut = dict.fromkeys(self._removed_at(speedup.at), reasons.cutting_failed(speedup.at, error))
        self._order = speedup.order

    def doubled(self) -> _DryRun:
        """Return the same dry run in double precision."""
        return _DryRun(self.flow, self.left, copy.deepcopy(self.full).double(), is_double=True)

    def run(self, args: tuple[Any, ...], *, blocks: int = 1, is_varied: bool = False) -> dict[int, Reason]:
        """Return the channels that can't go, by representative, and why.

        ``blocks``: how many inputs there are in the batch, each of which counts by itself; of one of these, and of one
        that ``is_varied``, what isn't finite isn't compared.
        """
        self._blocks, self._is_varied = blocks, is_varied
        if self._uncut:
            return self._uncut
        self._found: dict[int, Reason] = {}
        self._values: dict[Node, tuple[Any, Any]] = {}  # what a node gives in both networks
        self._args, inputs = args, iter(args)
        readers = {parent: node for node in self.full.graph.nodes for parent in node.all_input_nodes}
        last: dict[Node, list[Node]] = defaultdict(list)
        for parent, node in readers.items():
            last[node].append(parent)
        for node in self.full.graph.nodes:
            if node.op == "placeholder":
                value = next(inputs)
                self._values[node] = tuple(tree_map_only(Tensor, Tensor.clone, value) for _ in range(2))
            elif node.op != "output":
                self._step(node)
            for parent in last[node]:
                del self._values[parent]
        return self._found

    def _step(self, node: Node) -> None:
        if node.op == "get_attr":
            # Whether it fits shows where it is used, which may be for its type or device alone.
            whole = self._called(node, self.full, 0)
            self._values[node] = self._masked(node, whole, None), self._called(node, self.small, 1)
            return
        entering = {parent: self._nonzero(parent) for parent in self._tensors_before(node)}
        arriving = any(map(len, entering.values()))
        if not arriving and (once := self._once(node)):
            self._values[node] = once
            return
        needless = self._needless(node) if arriving else None
        reads_others = node.name in self.flow.guessed and self._reads_others(node)
        whole = self._masked(node, self._called(node, self.full, 0, needless), self._first_input(node))
        expected = self._cut(node, whole)
        try:
            actual = self._called(node, self.small, 1)
            # Of attention the first: how much each head heeds what is known of the heads alone.
            first = slice(1 if self._is_attention(node) else None)
            reason = self._compare(node, *(tree_flatten(each)[0][first] for each in (expected, actual)))
        except Exception as error:  # an operation fails in as many ways as there are operations
            if out_of_memory(error):
                raise
            actual, reason = None, reasons.fixed_sizes(node, error)
        if not reason and (reads_others or (arriving and node.name in self.flow.summed)):
            reason = reasons.result_depends(node)  # though not by much with these numbers
        # One channel that is picked may be looked at for its sizes alone: who reads it tells.
        if reason and not (reason.kind == "result_depends" and self._is_picked(node)):
            self._blame(node, entering, reason)
            actual = tree_map_only(Tensor, Tensor.clone, expected)
        self._values[node] = whole, actual

    def _reads_others(self, node: Node) -> bool:
        """Tell whether what a node gives for the channels left has to do with those removed.

        These get NaN, which shows wherever they are read, however little their numbers would matter.
        """
        poisoned = dict[Node, Any]()
        for parent in node.all_input_nodes:
            leaves, spec = tree_flatten(self._values[parent][0])
            numbers = tree_flatten(self.flow.numbers[parent.name])[0]
            if len(numbers) == len(leaves):
                leaves = [self._poisoned(*pair) for pair in zip(leaves, numbers, strict=True)]
            poisoned[parent] = tree_unflatten(leaves, spec)
        plain = {parent: tree_map_only(Tensor, Tensor.clone, self._values[parent][0]) for parent in poisoned}
        try:
            given = [self._cut(node, self._called(node, self.full, 0, values=values)) for values in (plain, poisoned)]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # what takes no NaN is compared alone
            if out_of_memory(error):
                raise
            return False
        pairs = zip(*map(tensors_of, given), strict=True)
        return any(bool((poisoned.isnan() & ~plain.isnan()).any()) for plain, poisoned in pairs)

    def _poisoned(self, value: Any, numbers: Any) -> Any:
        """Copy a tensor, with NaN in place of removed channels."""
        if not isinstance(value, Tensor):
            return value
        if not (isinstance(numbers, Tensor) and value.is_floating_point() and numbers.dim() == value.dim()):
            return value.clone()
        return value.masked_fill(~self._stays(numbers).to(value.device).expand(value.shape), torch.nan)

    def _once(self, node: Node) -> tuple[Any, Any] | None:
        """Run a layer in the small network alone, whose removed channels are zeros in the whole one."""
        if self._order is not None:
            return None
        stays = exact_channels(node, self.full, self.small, self.flow, self.left, self._values)
        if stays is None:
            return None
        given = self._called(node, self.small, 1)
        (small, *others), spec = tree_flatten(given)
        places = stays.nonzero().flatten().to(small.device)
        whole = small.new_zeros(*small.shape[:-1], len(stays)).index_copy_(-1, places, small)
        return tree_unflatten([whole, *others], spec), given

    def _called(
        self,
        node: Node,
        module: nn.Module,
        which: int,
        needless: Tensor | None = None,
        values: dict[Node, Any] | None = None,
    ) -> Any:
        """Compute what a node gives in one of the networks, without channels that needn't enter it.

        ``values``: what the nodes before it give, if not what they gave in this network.
        """
        if RANDOM not in node.meta:
            return self._computed(node, module, which, needless, values)
        with random_state_kept():  # both draw the same numbers
            torch.manual_seed(0)
            return self._computed(node, module, which, needless, values)

    def _computed(
        self, node: Node, module: nn.Module, which: int, needless: Tensor | None, values: dict[Node, Any] | None
    ) -> Any:
        if node.op == "get_attr":
            value: Any = module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return value
        entering = values or {parent: self._values[parent][which] for parent in node.all_input_nodes}
        given: Any = map_arg((node.args, node.kwargs), entering.__getitem__)
        args, kwargs = resized(given, self._sizes) if which else given
        # Of a model in double precision; here all is single.
        if not self._is_double and torch.float64 in (*node.args, *node.kwargs.values()):
            args, kwargs = tree_map_only(torch.dtype, lambda each: _SINGLE.get(each, each), (args, kwargs))
        if needless is not None:
            first, *others = args
            args = (first.masked_fill(needless.to(first.device), 0), *others)
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            return (layer if which else self._silenced(str(node.target), layer))(*args, **kwargs)
        method = getattr(args[0], str(node.target)) if node.op == "call_method" else None
        value = node.target(*args, **kwargs) if method is None else method(*args[1:], **kwargs)  # type: ignore[operator]
        # What isn't written to yet holds anything, and not the same in both.
        return value.zero_() if has_property(node, "is_unset") else value

    def _silenced(self, name: str, layer: nn.Module) -> nn.Module:
        """Return a recurrent layer without the units that are gone, which others of it read; any other as it is."""
        if not is_recurrent(layer):
            return layer
        gone, layer = torch.from_numpy(~self.left[self.flow.group_ids_of(name)]), copy.deepcopy(layer)
        for parameter in layer.parameters():
            parameter[gone.to(parameter.device)] = 0
        return layer

    def _needless(self, node: Node) -> Tensor | None:
        """Tell which channels needn't enter a layer, for else brings it what they do; broadcasts to what enters."""
        name = str(node.target)
        found = self._brought.channels(name) if name in self.flow.all_layers else None
        layer: Any = self.full.get_submodule(name) if found is not None else None
        return None if found is None else found.view(-1, *[1] * (layer.weight.dim() - 2))

    @cached_property
    def _brought(self) -> ConstantContribution:
        return constant_contribution(self.full, self.flow, self.left, (self._args, {}))

    def _first_input(self, node: Node) -> Any:
        parents = node.all_input_nodes
        return self._values[parents[0]][0] if parents else None

    def _masked(self, node: Node, value: Any, entering: Any) -> Any:
        """Zero removed channels of layers and parameters, and what a norm makes of those that arrive as zeros."""
        if self._is_attention(node):
            (context, *others), spec = tree_flatten(value)
            gone = ~self._stays(tree_flatten(self.flow.numbers[node.name])[0][0]).to(context.device)
            return tree_unflatten([context.masked_fill(gone.expand(context.shape), 0), *others], spec)
        if node.op not in ("call_module", "get_attr") or not isinstance(value, Tensor):
            return value
        gone, name = ~self._stays(self.flow.numbers[node.name]).to(value.device).expand(value.shape), str(node.target)
        if name in (self.flow.layers if node.op == "call_module" else self.flow.own):
            return value.masked_fill(gone, 0)
        module = self.full.get_submodule(name) if node.op == "call_module" else None
        # One without parameters has none that could be masked.
        if module is not None and is_normalizing(module) and per_channel_names(module):
            return value.masked_fill(gone & (entering == 0), 0)
        return value

    def _stays(self, numbers: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.left[self.flow.group_ids(numbers.numpy())]))

    def _cut(self, node: Node, value: Any) -> Any:
        """Take removed channels out of the tensors that a node gives."""
        if self._order is not None and node.name in self._order.reordered:
            return self._order.select(node, value)
        leaves, spec = tree_flatten(value)
        numbers = tree_flatten(self.flow.numbers[node.name])[0]
        if len(numbers) != len(leaves):
            return value
        return tree_unflatten([self._slice(*pair) for pair in zip(leaves, numbers, strict=True)], spec)

    def _slice(self, value: Any, numbers: Any) -> Any:
        if not isinstance(value, Tensor) or not isinstance(numbers, Tensor):
            return value
        for d, kept in enumerate(kept_slices(numbers, tuple(value.shape), self.flow, self.left)):
            value = _taken(value, d, kept.to(value.device)) if len(kept) < value.shape[d] else value
        return value

    def _is_attention(self, node: Node) -> bool:
        known = self.flow.attention.get(str(node.target)) if node.op == "call_module" else None
        return node.target is attend or not (known is None or known.recurrent)

    def _compare(self, node: Node, expected: list[Any], actual: list[Any]) -> Reason | None:
        for wanted, given in zip(expected, actual, strict=True):
            if isinstance(wanted, Tensor):
                if wanted.shape != given.shape:
                    return reasons.fixed_sizes(node)
                # What has no samples in its first dimension is measured as one.
                blocks = self._blocks if wanted.dim() > 1 and len(wanted) % self._blocks == 0 else 1
                if_finite = self._is_varied or blocks > 1
                pairs = zip(wanted.chunk(blocks), given.chunk(blocks), strict=True) if blocks > 1 else [(wanted, given)]
                if any(difference(*pair, if_finite=if_finite) > SAME_CHANNELS for pair in pairs):
                    return reasons.result_depends(node)
        return None

    def _is_picked(self, node: Node) -> bool:
        numbers = self.flow.numbers[node.name]
        return has_property(node, "picks_one") and isinstance(numbers, Tensor) and numbers.numel() == 1

    def _tensors_before(self, node: Node) -> list[Node]:
        """List the nodes whose tensors a node works on, by way of sizes too."""
        found, waiting = dict[Node, None](), list(node.all_input_nodes)
        while waiting:
            parent = waiting.pop()
            numbers = self.flow.numbers.get(parent.name)
            if any(isinstance(leaf, Tensor) for leaf in tree_flatten(numbers)[0]):
                found[parent] = None
            elif not self._is_plain_size(parent):
                waiting += parent.all_input_nodes
        return list(found)

    def _is_plain_size(self, node: Node) -> bool:
        """Tell whether a node is how long a dimension is that holds no channels."""
        if node.target != "size" or len(node.args) != 2:
            return False
        parent, dim = cast("tuple[Node, int]", node.args)
        numbers = self.flow.numbers[parent.name]
        return isinstance(numbers, Tensor) and numbers.shape[dim] == 1

    def _nonzero(self, node: Node) -> np.ndarray:
        """List the removed channels that a node gives as values that aren't zero."""
        whole = self._values.get(node, (None,))[0]
        found = [np.zeros(0, dtype=np.int64)]
        for value, numbers in zip(tree_flatten(whole)[0], tree_flatten(self.flow.numbers[node.name])[0], strict=False):
            if not (isinstance(value, Tensor) and isinstance(numbers, Tensor) and value.dim() == numbers.dim()):
                continue
            gone = ~self._stays(numbers)
            if bool(gone.any()) and value.numel() and not _is_zero(value, gone):
                alike = [d for d, size in enumerate(numbers.shape) if size == 1]
                value = value.abs() if value.is_complex() else value
                ends = [getattr(value, end)(alike, keepdim=True) if alike else value for end in ("amin", "amax")]
                alive = gone & ((ends[0] != 0) | (ends[1] != 0)).cpu()
                found += [np.unique(numbers[alive].numpy())] if bool(alive.any()) else []
        return np.concatenate(found)

    def _blame(self, node: Node, entering: dict[Node, np.ndarray], reason: Reason) -> None:
        """Hold the channels that are to blame: those that arrive as values, else all that arrive, else the heads."""
        alive = np.concatenate([*entering.values(), np.zeros(0, dtype=np.int64)])
        numbers = [
            leaf.numpy().ravel() for parent in entering for leaf in tree_flatten(self.flow.numbers[parent.name])[0]
            if isinstance(leaf, Tensor)
        ]  # fmt: skip
        group_ids = np.unique(self.flow.group_ids(alive if len(alive) else np.concatenate([*numbers, alive])))
        if self.left[group_ids].all() and self._is_attention(node):
            holder: Any = node.args[0] if node.target is attend else node
            attention = self.flow.attention[str(holder.target)]
            group_ids = np.unique(np.concatenate([self.flow.group_ids_of(layer) for layer in attention.channels]))
        gone = group_ids[group_ids > FIXED].tolist() if not self.left[group_ids].all() else self._removed()
        if len(alive) and reason.kind == "result_depends":
            reason = reasons.nonzero_values(node)
        for root in gone:
            self._found.setdefault(root, reason)

    def _removed_at(self, name: str) -> list[int]:
        """List the removed channels that enter or leave a module; without any, those of the whole network."""
        leaving = self.flow.group_ids_of(name) if name in self.flow.layers else np.zeros(0, dtype=np.int64)
        group_ids = np.unique(np.concatenate([leaving, self.flow.entering_group_ids(name)]))
        gone: list[int] = group_ids[~self.left[group_ids]].tolist()
        return gone or self._removed()

    def _removed(self) -> list[int]:
        group_ids = np.unique(np.concatenate([self.flow.group_ids_of(name) for name in self.flow.layers]))
        gone: list[int] = group_ids[~self.left[group_ids]].tolist()
        return gone


def exact_channels(
    node: Node, whole: nn.Module, small: nn.Module, flow: ChannelFlow, left: np.ndarray, values: Mapping[Node, Any]
) -> Tensor | None:
    """Say which channels a linear layer or attention, entered by no removed channel, gives in the small network.

    ``values``: by node, what it gives in the whole network first. None, unless the weights are those of the channels
    left: then the layer gives in the small network what it gives there in the whole one; all else is masked.
    """
    read = _read(node)
    if read is None or read[0] not in flow.layers:
        return None
    name, parents, kinds, prefix = read
    layers: list[Any] = [network.get_submodule(name) for network in (whole, small)]
    if any(type(each) not in kinds or each._forward_pre_hooks or each._forward_hooks for each in layers):
        return None
    entering = [_entering(parent, flow, left, values) for parent in parents]
    ins = entering[0]
    if ins is None or any(each is None or not torch.equal(each, ins) for each in entering):
        return None
    weight, bias = ([getattr(layer, f"{prefix}{part}") for layer in layers] for part in ("weight", "bias"))
    outs = torch.from_numpy(np.flatnonzero(left[flow.group_ids_of(name)])).to(weight[0].device)
    if not torch.equal(weight[0].index_select(0, outs).index_select(1, ins.to(outs.device)), weight[1]):
        return None
    if bias[0] is not None and not torch.equal(bias[0][outs], bias[1]):
        return None
    given = flow.numbers[node.name]
    numbers = (given[0] if isinstance(given, (tuple, list)) else given).flatten(0, -2)[0]
    return torch.from_numpy(left[flow.group_ids(numbers.numpy())])


def _read(node: Node) -> tuple[str, list[Node], tuple[type[nn.Module], ...], str] | None:
    """Return what a node calls, what that reads, of which classes it may be and how its weights' names begin."""
    if node.op == "call_module" and len(node.args) == 1 and isinstance(node.args[0], Node):
        return str(node.target), [node.args[0]], _LINEAR, ""
    if node.target is attend and len(node.args) == 5:
        module, _, *states = node.args
        others = set(node.all_input_nodes) - {module, *states}  # masks, which may be of all heads
        if isinstance(module, Node) and not others:
            parents = [each for each in states if isinstance(each, Node)]
            return str(module.target), parents, _MULTIHEAD, "in_proj_"
    return None


def _entering(parent: Node, flow: ChannelFlow, left: np.ndarray, values: Mapping[Node, Any]) -> Tensor | None:
    """List the channels left of what enters, in its last dimension; None if it lacks others, or has few rows."""
    # What a parameter holds isn't compared before it is used.
    value, numbers = values[parent][0], flow.numbers[parent.name]
    if parent.op == "get_attr" or not isinstance(value, Tensor) or not isinstance(numbers, Tensor):
        return None
    if numbers.dim() != value.dim() or value[..., 0].numel() < _ROWS:
        return None
    *others, ins = kept_slices(numbers, tuple(value.shape), flow, left)
    return ins if [len(each) for each in others] == list(value.shape[:-1]) else None
