"""The order of channels in the dense model of a network that splits and shuffles them, and how many of each may stay.

The dense model splits and shuffles the kept channels in its own way (`DenseOrder`). Where it sends the first, second
and third channel of a layer depends only on how many channels the layer keeps. In the unpruned model channels belong to
segments: those of one segment go to the same pieces. `shares` says how many channels of each segment may stay so that
the dense model sends as many to each piece.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from nni_topo.network.channels.constraints import coupled_names
from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED, carry, compressed, given_shapes, varies
from nni_topo.network.channels.rules import module_rule, rule_of
from nni_topo.network.graph import resized
from nni_topo.network.layers import is_depthwise
from nni_topo.network.runtime import tensors_of


class DenseOrder(torch.fx.Interpreter):
    """Follow the numbers of channels through the dense model, given which of their representatives stay."""

    # A channel shuffle in two halves puts the first channel of the second half behind the first of the first half,
    # whichever these are: the masked model has them in another order as soon as the halves lose different ones.
    def __init__(self, flow: ChannelFlow, left: np.ndarray) -> None:
        super().__init__(flow.traced)
        self.flow, self.left = flow, left
        self.numbers: dict[str, Any] = {}  # by node, as in the flow, but of the dense model's shapes
        self.entering: dict[str, np.ndarray] = {}  # by module
        self.own: dict[
            str, np.ndarray
        ] = {}  # places that stay of the model's own parameters, in the order they are met
        self.unfit = set[str]()  # the nodes that can't be run on what is left
        self.reordered = set[str]()  # the nodes that give channels in another order than the whole model
        with torch.no_grad():
            self.run()

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        """Look up a node's arguments, with the dense model's sizes."""
        return resized(super().fetch_args_kwargs_from_env(n), self.flow.sizes_kept(self.left))

    def run_node(self, n: Node) -> Any:
        """Follow the numbers through one node."""
        ascending = self._ascending(n)
        self.numbers[n.name] = found = self._renamed(self._moved(n, ascending), ascending)
        pairs = zip(tensors_of(found), tensors_of(ascending), strict=False)
        if any(one is not other and not torch.equal(compressed(one), compressed(other)) for one, other in pairs):
            self.reordered.add(n.name)
        return found

    def _renamed(self, found: Any, ascending: Any) -> Any:
        """Name channels as the flow does where what they are tied to, as a layer scale, gave its own names."""
        if not (isinstance(found, Tensor) and isinstance(ascending, Tensor)) or found.shape != ascending.shape:
            return found
        one, other = compressed(found), compressed(ascending)
        group_ids, named = (self.flow.group_ids(each.numpy()) for each in (one, other))
        if one.shape != other.shape or torch.equal(one.flatten().unique(), other.flatten().unique()):
            return found
        if np.array_equal(group_ids, named):
            return ascending
        places = dict(zip(named.ravel().tolist(), other.flatten().tolist(), strict=True))
        if len(places) < other.numel() or not places.keys() >= set(group_ids.ravel().tolist()):
            return found
        renamed = [places[root] for root in group_ids.ravel().tolist()]
        return torch.tensor(renamed).view(one.shape).expand(found.shape)

    def _ascending(self, node: Node) -> Any:
        """Take the numbers that are gone out of what a node gives."""
        leaves, spec = tree_flatten(self.flow.numbers[node.name])
        shapes = tree_flatten(given_shapes(node))[0]
        if len(leaves) != len(shapes):
            return self.flow.numbers[node.name]
        return tree_unflatten([self._cut(*pair) for pair in zip(leaves, shapes, strict=True)], spec)

    def _cut(self, numbers: Any, full: Any) -> Any:
        if not isinstance(numbers, Tensor) or not isinstance(full, Tensor):
            return numbers
        stays, shape = torch.from_numpy(np.asarray(self.left[self.flow.group_ids(numbers.numpy())])), list(full.shape)
        for d, size in enumerate(numbers.shape):
            if size == full.shape[d]:
                rows = stays.movedim(d, 0).reshape(size, -1).any(1)
                numbers = numbers.index_select(d, rows.nonzero().flatten())
                shape[d] = numbers.shape[d]
        return numbers.expand(shape)

    def _moved(self, node: Node, ascending: Any) -> Any:
        if node.op in ("placeholder", "get_attr", "output"):
            return ascending
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        labels = tensors_of((args, kwargs))
        if not tensors_of(given_shapes(node)):
            return self._tried(node, args, kwargs, ascending)
        if node.op == "call_module":
            return self._through(node, labels[0], ascending) if labels else ascending
        rule = rule_of(node)
        if rule is not None and rule.moves and not (rule.by_index and tensors_of((args[1:], kwargs))):
            args = (args[0].contiguous(), *args[1:]) if isinstance(args[0], Tensor) else args
            return self._tried(node, args, kwargs, ascending)
        self._reorder_own(node)
        return _carried(labels, ascending)

    def _reorder_own(self, node: Node) -> None:
        """Put a parameter of the model's own that a node reads into the order of the channels that it meets."""
        owned = [each for each in node.all_input_nodes if each.op == "get_attr" and str(each.target) in self.flow.own]
        others = tensors_of([self.env[each] for each in node.all_input_nodes if each not in owned])
        for parent in owned if others else ():
            name, labels = str(parent.target), self.numbers[parent.name]
            numbers = self.flow.own_numbers(name)
            met = self.flow.group_ids(compressed(others[0]).flatten().numpy()).tolist()
            place = {root: at for at, root in enumerate(self.flow.group_ids(numbers).tolist())}
            found = np.array([place.get(root, -1) for root in met], dtype=np.int64)
            kept = np.flatnonzero(self.left[self.flow.group_ids(numbers)])
            if len(parent.users) == 1 and np.array_equal(np.sort(found), kept) and not np.array_equal(found, kept):
                view = [-1 if d == self.flow.own[name].dim else 1 for d in range(labels.dim())]
                self.own[name], self.numbers[parent.name] = found, torch.from_numpy(numbers[found]).view(view)
                self.reordered.add(parent.name)

    def _through(self, node: Node, labels: Tensor, ascending: Any) -> Any:
        name = str(node.target)
        layer, entering = self.flow.all_layers.get(name), self.flow.entering_channel_ids(name)
        if len(entering):
            dims = [d for d in range(1, labels.dim()) if varies(labels, d)] or [1]
            self.entering[name] = labels.transpose(0, dims[0]).flatten(1)[:, 0].numpy()
        rule = module_rule(self.fetch_attr(name))
        if rule is not None and rule.moves:
            return self._tried(node, (labels.contiguous(),), {}, ascending)
        if layer is None:
            return _carried([labels], ascending)
        if layer.depthwise and name in self.entering:
            # What it puts out comes in the order of what enters.
            outs = self.flow.channel_ids_of(name).reshape(len(entering), -1)[self.places(name)].ravel()
            view = [1, -1, *[1] * (ascending.dim() - 2)]
            return torch.from_numpy(outs).view(view).expand(ascending.shape)
        return ascending

    def _tried(self, node: Node, args: Any, kwargs: Any, ascending: Any) -> Any:
        """Run a node on numbers; where the dense model couldn't either, the rehearsal finds that out."""
        try:
            return getattr(self, node.op)(node.target, args, kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError):
            self.unfit.add(node.name)
            return ascending

    def places(self, name: str) -> np.ndarray:
        """List the channels that enter a module and stay, by their places in the whole model: int, (left,)."""
        entering = self.flow.entering_channel_ids(name)
        kept = np.flatnonzero(self.left[self.flow.group_ids(entering)])
        arriving = self.entering.get(name, entering[:0])
        place = {number: at for at, number in zip(kept.tolist(), entering[kept].tolist(), strict=True)}
        found = np.array([place.get(number, -1) for number in arriving.tolist()], dtype=np.int64)
        return found if np.array_equal(np.sort(found), kept) else kept

    def select(self, node: Node, value: Any) -> Any:
        """Take removed channels out of the tensors that a node gives, and put the others in order."""
        leaves, spec = tree_flatten(value)
        pairs = [tree_flatten(each[node.name])[0] for each in (self.flow.numbers, self.numbers)]
        if not len(leaves) == len(pairs[0]) == len(pairs[1]):
            return value
        return tree_unflatten([_gathered(*each) for each in zip(leaves, *pairs, strict=True)], spec)


def _carried(labels: list[Tensor], ascending: Any) -> Any:
    """Let what keeps its shape, or its first two dimensions, keep the order of that of its operands that varies."""
    if not isinstance(ascending, Tensor):
        return ascending
    for each in labels:
        carried = carry(each, tuple(ascending.shape))
        if carried is not None and any(varies(carried, d) for d in range(1, carried.dim())):
            return carried
    return ascending


def _gathered(value: Any, numbers: Any, dense: Any) -> Any:
    """Look up the values of a tensor that belong to the dense model's numbers, each of which it holds once."""
    if not (isinstance(value, Tensor) and isinstance(numbers, Tensor) and isinstance(dense, Tensor)):
        return value
    dims = [d for d in range(numbers.dim()) if numbers.shape[d] > 1]
    if not dims:
        return value.clone()
    rest = [d for d in range(value.dim()) if d not in dims]
    known, few = numbers.flatten().numpy(), dense[tuple(slice(None if d in dims else 1) for d in range(dense.dim()))]
    order = np.argsort(known, kind="stable")
    places = order[np.searchsorted(known[order], few.flatten().numpy()).clip(max=len(order) - 1)]
    flat = value.permute(*rest, *dims).flatten(len(rest))
    picked = flat[..., torch.from_numpy(places).to(value.device)].unflatten(-1, [dense.shape[d] for d in dims])
    return picked.permute(*np.argsort([*rest, *dims]).tolist()).contiguous()


class Share(NamedTuple):
    """How many of which of a layer's channels stay if it is asked to keep so many."""

    asked: int
    stretches: tuple[int, ...]  # the stretch that each channel belongs to
    counts: tuple[int, ...]  # how many of each stretch stay: `asked` together, or more where that can't be


Shares = dict[str, Share]
Parts = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
Routes = Mapping[int, tuple[tuple[str, int], ...]]
_KNOWN: WeakKeyDictionary[ChannelFlow, dict[tuple[tuple[str, int], ...], Shares]] = WeakKeyDictionary()
_MORE = 16  # channels that a layer keeps at most beyond those asked for


def stays_in_place(flow: ChannelFlow, left: np.ndarray, names: Collection[str] | None = None) -> bool:
    """Tell whether in the dense model every piece holds the channels of the whole model that are left, in any order.

    ``names``: only pieces with channels of these layers count.
    """
    order = DenseOrder(flow, left)
    looked_at = np.ones(flow.size, dtype=np.bool_)
    if names is not None:
        looked_at[:] = False
        looked_at[np.concatenate([flow.group_ids_of(name) for name in names])] = True
    unfit = [leaf for node in order.unfit for leaf in tree_flatten(flow.numbers[node])[0] if isinstance(leaf, Tensor)]
    if any(bool(looked_at[flow.group_ids(leaf.numpy())].any()) for leaf in unfit):
        return False
    for name in order.entering:
        module: Any = flow.fetch_attr(name)
        groups = getattr(module, "groups", 1)
        arriving = order.entering[name]
        if not looked_at[flow.entering_group_ids(name)].any():
            continue
        kept = np.flatnonzero(left[flow.entering_group_ids(name)])
        places = order.places(name)
        if not np.array_equal(np.sort(arriving), np.sort(flow.entering_channel_ids(name)[kept])):
            return False
        of_group = places // max(len(flow.entering_channel_ids(name)) // groups, 1)
        if groups > 1 and not is_depthwise(module) and bool((np.diff(of_group) < 0).any()):
            return False
    pieces = zip(_pieces(flow, flow.numbers), _pieces(flow, order.numbers), strict=True)
    return all(
        np.array_equal(whole[left[whole]], dense) for (_, _, whole), (_, _, dense) in pieces if looked_at[whole].any()
    )


def shares(flow: ChannelFlow, wanted: Mapping[str, int]) -> Shares:
    """Say which channels of layers may stay, given how many of each should; only of layers that are shuffled."""
    if not flow.shuffles:
        return {}
    counts = dict[str, int]()
    moved = np.concatenate([[FIXED], *(flow.group_ids(each) for blocks in _moving(flow) for each in blocks)])
    for name in wanted:
        group_ids = flow.group_ids_of(name)
        is_free = (
            len(np.unique(group_ids)) == len(group_ids) and FIXED not in group_ids and not flow.layers[name].depthwise
        )
        if is_free and np.isin(group_ids, moved).any():
            counts[name] = wanted[name]
    known = _KNOWN.setdefault(flow, {})
    if (key := tuple(counts.items())) not in known:
        known[key] = _shares(flow, counts)
    return known[key]


def _shares(flow: ChannelFlow, counts: dict[str, int]) -> Shares:
    whole, found = _routes(flow, flow.numbers), Shares()
    rows = [set(flow.group_ids(np.concatenate(blocks)).tolist()) for blocks in _moving(flow)]
    met = {
        name: {place for place, row in enumerate(rows) if not row.isdisjoint(flow.group_ids_of(name).tolist())}
        for name in counts
    }
    for names in coupled_names(met):
        # A number may be one with which a channel would go where none of its layer does in the whole model.
        for more in range(_MORE):
            asked = {name: min(counts[name] + more, flow.layers[name].channels) for name in names}
            if each := _shared_out(flow, whole, counts | asked, names):
                found |= {name: Share(counts[name], *each[name]) for name in names}
                counts |= asked
                break
        else:
            counts |= {name: flow.layers[name].channels for name in names}
    return found


def _shared_out(flow: ChannelFlow, whole: Routes, counts: Mapping[str, int], names: list[str]) -> Parts:
    """Say how many channels of each stretch stay if each layer keeps so many; nothing where that can't be."""
    left = np.ones(flow.size, dtype=np.bool_)
    for name, count in counts.items():
        left[flow.group_ids_of(name)[count:]] = False
    dense, found = _routes(flow, DenseOrder(flow, left).numbers), Parts()
    for name in names:
        group_ids = flow.group_ids_of(name).tolist()
        stretches = [whole[root] for root in group_ids]
        room, taken = Counter(stretches), Counter(dense[root] for root in group_ids[: counts[name]])
        if any(count > room[stretch] for stretch, count in taken.items()):
            return {}
        ranks = {stretch: rank for rank, stretch in enumerate(room)}
        found[name] = tuple(ranks[stretch] for stretch in stretches), tuple(taken[stretch] for stretch in ranks)
        left[group_ids] = chosen_of(*found[name], np.arange(len(group_ids))[::-1])
    return found if stays_in_place(flow, left, names) else {}


def chosen_of(stretches: Sequence[int], counts: Sequence[int], order: np.ndarray) -> np.ndarray:
    """Tell which channels stay if of each stretch the last ones in an order do: bool, (channels,)."""
    placed, left = np.asarray(stretches)[order], np.zeros(len(stretches), dtype=np.bool_)
    for stretch, count in enumerate(counts):
        own = order[placed == stretch]
        left[own[len(own) - count :]] = True
    return left


def asked_of(flow: ChannelFlow, entries: Iterable[Mapping[str, Any]], ties: Collection[str]) -> dict[str, int]:
    """Count the channels that should stay of each layer: all, but for those with a ratio and nothing else."""
    asked = {name: layer.channels for name, layer in flow.layers.items()}
    for entry in entries:
        ratio: Any = entry.get("sparse_ratio")
        (name,) = entry["op_names"]
        is_plain = isinstance(ratio, (int, float)) and not isinstance(entry.get("granularity"), list)
        if name in asked and is_plain and name not in ties and "global_group_id" not in entry:
            asked[name] = max(asked[name] - int(asked[name] * ratio), 1)
    return asked


def _moving(flow: ChannelFlow) -> list[list[np.ndarray]]:
    """List what each chunk takes apart, and each view into rows."""
    return [[block for side in each.sides for block in side] for each in flow.blocks if each.moves]


def _routes(flow: ChannelFlow, numbers: Mapping[str, Any]) -> Routes:
    """List, by representative, the pieces that a channel goes to."""
    found: dict[int, tuple[tuple[str, int], ...]] = defaultdict(tuple)
    for node, piece, group_ids in _pieces(flow, numbers):
        for root in group_ids.tolist():
            found[root] = (*found[root], (node, piece))
    return found


def _pieces(flow: ChannelFlow, numbers: Mapping[str, Any]) -> list[tuple[str, int, np.ndarray]]:
    """List the pieces that splits make, by node and place, with the representatives in them, ascending."""
    found = []
    for node in flow.traced.graph.nodes:
        if isinstance(numbers[node.name], (tuple, list)):
            leaves = [leaf for leaf in tree_flatten(numbers[node.name])[0] if isinstance(leaf, Tensor)]
            each = [np.unique(flow.group_ids(compressed(leaf).numpy().ravel())) for leaf in leaves]
            found += [(node.name, place, group_ids) for place, group_ids in enumerate(each)]
    return found
