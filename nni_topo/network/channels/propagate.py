"""Numbers of channels on their way through a traced network: where they go, and which of them meet.

Data movement (concatenation, chunk, view, permute, channel shuffle) moves them, an elementwise operation on two tensors
ties the numbers that meet, a depth-wise convolution ties its output channel to its input channel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map, tree_map_only

from nni_topo.errors import ConfigError
from nni_topo.network.attention import Attention, attend, find_heads, is_mixed, states_read
from nni_topo.network.channels import reasons
from nni_topo.network.channels.ids import Blocks, Layer, Numbers, Own, by_layer
from nni_topo.network.channels.reductions import POINTWISE, POINTWISE_MODULES, Along, along, operation_name
from nni_topo.network.channels.rules import (
    INDEXED,
    MEETS,
    MOVES,
    MOVING_MODULES,
    carry,
    carry_picked,
    carry_reduced,
    compressed,
    fixed,
    given_shapes,
    goes_along,
    is_like,
    made,
    meet_alike,
    merge,
    merges,
    put_by_row,
    staying,
    varies,
)
from nni_topo.network.graph import RANDOM, is_of_forward, makes_mask, plain_name, tensor_shape
from nni_topo.network.layers import (
    CONVOLUTIONS,
    PER_CHANNEL,
    RULES,
    TRANSPOSED,
    can_be_cut,
    can_follow,
    channel_dim,
    entering_channels,
    is_depthwise,
    is_head,
    is_normalizing,
    is_scripted,
    output_channels,
    row_names,
    weight_name,
)
from nni_topo.network.runtime import tensors_of


class Numbering(torch.fx.Interpreter):
    """Number the channels of a traced model with shapes in ``node.meta["tensor_meta"]``."""

    # What can't be followed isn't guessed: channels that enter an operation without a rule are pinned, that is, they
    # stay. So every number says all there is to say about a channel, and the network can be cut by numbers alone.
    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.traced = graph_module
        self.extra_traceback = False  # an error of ours says what it has to
        self.layers: dict[str, Layer] = {}  # in the order they are called
        self.in_training = dict[str, Layer]()  # those that run in training alone, which are no layers to be pruned
        self.along = set[str]()  # convolutions that go along the channels of others, and make none of their own
        self.own: dict[str, Own] = {}  # by name; these go with the channels that they meet, and have no say
        self.attention = find_heads(graph_module)  # by module; of those that the graph calls
        self.heads: dict[str, Attention] = {}  # the same by layer that makes queries, keys or values
        self.blocks: list[Blocks] = []  # one for each grouped convolution, group norm and chunk
        self.reorders = False  # whether the dense model may put channels into another order: see `DenseOrder`
        self.chunks = False  # whether channels are cut into equal pieces
        self.summed = set[str]()  # nodes that add up over channels: what is removed has to arrive as zeros
        self.guessed = set[str]()  # nodes without a rule that are taken to work place by place
        self.numbers: dict[str, Any] = {}  # by node, what it puts out: int64, of length 1 where nothing differs
        self.picks: dict[str, torch.Tensor] = {}  # by node, the places that a constant of the forward's picks
        self._called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
        self._entering: dict[str, np.ndarray] = {}
        self._given = Numbers()

    def layer_numbers(self, name: str) -> np.ndarray:
        """List the numbers of a layer's output channels: int, shape (channels,)."""
        layer = self.all_layers[name]
        return np.arange(layer.first, layer.first + layer.channels)

    @property
    def all_layers(self) -> dict[str, Layer]:
        """All layers by name, those that run in training alone among them."""
        return self.layers | self.in_training if self.in_training else self.layers

    def own_numbers(self, name: str) -> np.ndarray:
        """List the numbers of a parameter's channels: int, shape (channels,)."""
        own = self.own[name]
        return np.arange(own.first, own.first + own.channels)

    def run_node(self, n: torch.fx.Node) -> Any:
        """Compute a node's channel numbers from those of its arguments."""
        is_random = any(RANDOM in parent.meta for parent in n.all_input_nodes)
        self._given.reason = reasons.joins_random(n) if is_random else reasons.joins_constant(n)
        found = self._numbered(n)
        if RANDOM in n.meta:
            # With fewer channels others would be drawn, and nothing could be compared.
            entering = self.fetch_args_kwargs_from_env(n)
            for labels in map(compressed, tensors_of((entering, found))):
                self._given.pin(np.unique(labels), reasons.random_shape(n))
        self.numbers[n.name] = tree_map(compressed, found)
        return found

    def _numbered(self, n: torch.fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        if n.op == "get_attr":
            value = super().run_node(n)
            if is_of_forward(n) and value.dtype in (torch.bool, torch.int64, torch.int32):
                self.picks[n.name] = value.cpu()
            own = can_follow(value) and not self._is_cut_with_a_module(str(n.target))
            return self._parameter(str(n.target), value) if own else tree_map(fixed, value)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        shape = tensor_shape(n)
        labels = [] if makes_mask(n) or is_like(n) else tensors_of((args, kwargs))
        if n.op == "call_module":  # an embedding of positions may be given a size alone
            return self._module(n, labels or [staying(())], shape)
        return self._function(n, args, kwargs, labels, shape)

    def _is_cut_with_a_module(self, name: str) -> bool:
        """Tell whether a parameter is lost along with channels of the module that holds it, which the graph calls."""
        owner, _, own = name.rpartition(".")
        if owner not in self._called:
            return False
        module = self.fetch_attr(owner)
        return not is_head(module) or own in (weight_name(module), *row_names(module))

    def _parameter(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Number the one dimension of a parameter that isn't of length 1, or the last: where channels usually are."""
        long = [d for d in range(value.dim()) if value.shape[d] > 1]
        if name not in self.own:
            count = value.shape[long[-1]]
            self.own[name] = Own(self._given.new(count), count, long[-1])
        own = self.own[name]
        view = [1] * value.dim()
        view[own.dim] = own.channels
        return torch.from_numpy(self.own_numbers(name)).view(view).expand(value.shape)

    def _module(self, node: torch.fx.Node, labels: list[torch.Tensor], shape: tuple[int, ...] | None) -> Any:
        name = str(node.target)
        module: torch.nn.Module = self.fetch_attr(name)
        if isinstance(module, torch.nn.RNNBase):
            return self._recur(node, labels, name, type(module).__name__)
        if name in self.attention:
            return self._attend(node, labels, self.attention[name])
        if not can_be_cut(module):
            # It needs all that enters, and what it puts out can't be made less.
            kind = "compiled by torch.jit" if is_scripted(module) else type(module).__name__
            return self._whole(node, labels, reasons.uncut_module(node, kind))
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and labels[0].dim() != module.weight.dim():
            inputs = [tensor_shape(each) for each in self.traced.graph.nodes if each.op == "placeholder"]
            if any(each is not None and len(each) == labels[0].dim() for each in inputs[:1]):
                raise ConfigError(
                    "example_inputs must hold a batch, the samples in the first dimension, "
                    f"got a tensor of shape {tuple(labels[0].shape)}, which enters {name} (example_inputs)"
                )
            return self._whole(node, labels, reasons.no_batch(node))
        if name in self.along or (name not in self.layers and goes_along(module, labels[0], shape or ())):
            return self._along(node, name, module, labels[0], shape or ())
        if output_channels(module) is not None:
            return self._layer(name, module, labels[0], shape or ())
        if isinstance(module, MOVING_MODULES):
            # They only move entries, so on integers they say exactly where each channel goes.
            return module(labels[0])
        if isinstance(module, torch.nn.GroupNorm) and module.num_groups < module.num_channels:
            # A norm's groups are of one size, so those that are left have to be too.
            side = np.split(self._per_channel(labels[0], 1), module.num_groups)
            self.blocks.append(Blocks([list(side)], may_vanish=True))
        if isinstance(module, (*PER_CHANNEL, *RULES)) or is_normalizing(module):
            rule = RULES.get(type(module))
            dim = rule.dim if rule else channel_dim(module)
            if dim is None:
                return self._whole(node, labels, reasons.uncut_module(node, type(module).__name__))
            self._tie_calls(name, self._per_channel(labels[0], dim % labels[0].dim()))
        elif (found := along(node, (), {}, labels[0].dim(), self.fetch_attr)) is not None:
            return self._along_dims(node, labels, found)
        if isinstance(module, tuple(RULES)) or not (any(True for _ in module.parameters()) or is_normalizing(module)):
            self._guess(node, known=isinstance(module, POINTWISE_MODULES))
        return self._passed(node, labels)

    def _along(self, node: torch.fx.Node, name: str, module: Any, labels: torch.Tensor, shape: tuple[int, ...]) -> Any:
        """Let a convolution along channels leave them where they are."""
        self.along.add(name)
        if not goes_along(module, labels, shape) or labels.shape[2] != len(self._entering.get(name, labels[0, 0])):
            return self._whole(node, [labels], reasons.convolved_elsewhere(node))
        self._tie_calls(name, self._per_channel(labels, 2))
        return labels[:, :1].expand(shape)

    def _recur(self, node: torch.fx.Node, labels: list[torch.Tensor], name: str, kind: str) -> Any:
        """Let a recurrent layer take fewer channels in, and tie the gates of each unit, and the states that it gets."""
        self._tie_calls(name, self._per_channel(labels[0], labels[0].dim() - 1))
        found = given_shapes(node)
        if name not in self.attention:
            # What it puts out is what its state holds, which stays.
            return self._whole(node, labels[1:], reasons.recurrent_input(node, kind))
        units = self._head_numbers(self.attention[name])
        for state in labels[1:]:
            self._given.tie(self._per_channel(state, state.dim() - 1), units)
        return tree_map_only(torch.Tensor, lambda leaf: torch.from_numpy(units).expand(leaf.shape), found)

    def _head_numbers(self, attention: Attention) -> np.ndarray:
        """Number what makes the heads and tie each together; return the numbers of what they put out."""
        for name, channels in attention.channels.items():
            if name not in self.layers:
                self.layers[name] = Layer(name, self._given.new(channels.size), channels.size, depthwise=False)
                if name not in self._entering:
                    self._entering[name] = np.zeros(entering_channels(self.fetch_attr(name)), dtype=np.int64)
                self.heads[name] = attention
        numbers = [channels + self.layers[name].first for name, channels in attention.channels.items()]
        for head in zip(*numbers, strict=True):
            self._given.tie(head[0][0], np.concatenate(head))
        layer, order = attention.context
        put_out: np.ndarray = order + self.layers[layer].first
        return put_out

    def _attend(self, node: torch.fx.Node, labels: list[torch.Tensor], attention: Attention) -> Any:
        """Tie what makes each head together; what enters is read by the linear layers within, or needed as a whole."""
        read = states_read(node, *self.fetch_args_kwargs_from_env(node))
        for name, states in read.items():
            for each in states:
                self._tie_calls(name, self._per_channel(each, each.dim() - 1))
        heads, numbers = attention.query_heads, self._head_numbers(attention)
        first = numbers.reshape(heads, -1)[:, 0]
        needed = []
        for each in labels:
            # What another module says of positions, head by head: T5's first block says it for all of them.
            if each.dim() == 4 and each.shape[1] == heads and varies(each, 1):
                self._given.tie(first, self._per_channel(each, 1))
            elif not any(torch.equal(each, other) for states in read.values() for other in states):
                needed.append(each)
        found = self._whole(node, needed, reasons.needs_all_channels(node, attention.name))
        context, *others = tensors_of(found)
        by_head = [
            torch.from_numpy(first).view(-1, 1, 1).expand(each.shape)
            if each.dim() == 4 and each.shape[1] == heads else each
            for each in others
        ]  # fmt: skip
        context = context if is_mixed(node, attention) else torch.from_numpy(numbers).expand(context.shape)
        leaves = iter([context, *by_head])
        return tree_map_only(torch.Tensor, lambda _: next(leaves), found)

    def _whole(self, node: torch.fx.Node, labels: list[torch.Tensor], reason: reasons.Reason) -> Any:
        """Keep all channels that enter a node, and so all that leave it."""
        found = given_shapes(node)
        # What gives no tensor (a size, an assertion) is no reader of channels, unless it writes into one.
        if tensors_of(found) or plain_name(node) == "setitem":
            for each in map(compressed, labels):
                self._given.pin(np.unique(each), reason)
        return found

    def _passed(self, node: torch.fx.Node, labels: list[torch.Tensor]) -> Any:
        """Carry the channels of one tensor to each of those that a node puts out."""
        found = given_shapes(node)
        carried = [carry(labels[0], tuple(each.shape)) if len(labels) == 1 else None for each in tensors_of(found)]
        if any(each is None for each in carried):
            return self._whole(node, labels, reasons.no_rule(node))
        rest = iter(carried)
        return tree_map_only(torch.Tensor, lambda _: next(rest), found)

    def _along_dims(self, node: torch.fx.Node, labels: list[torch.Tensor], found: Along) -> Any:
        """Carry channels through what works along dimensions; along those it needs all, unless it only adds them up."""
        held = [d for d in found.dims if varies(labels[0], d)]
        if held and found.adds:
            self.summed.add(node.name)
        elif held:
            entries = compressed(labels[0]).movedim(held, list(range(len(held))))
            rows = entries.flatten(0, len(held) - 1).flatten(1) if entries.dim() > len(held) else entries.reshape(-1, 1)
            # Places of a dimension that can only go together leave none behind for which their absence counts.
            self._given.pin_unless_tied(rows.numpy(), reasons.result_depends(node))
        shape = tensor_shape(node)
        if len(labels) > 1:
            is_alike = shape is not None and meet_alike(labels, shape)
            return self._meet(labels, shape or ()) if is_alike else self._passed(node, labels)
        if not found.reduces:
            return self._passed(node, labels)
        given = given_shapes(node)
        carried = [carry_reduced(labels[0], tuple(each.shape), found.dims) for each in tensors_of(given)]
        if any(each is None for each in carried):
            return self._whole(node, labels, reasons.no_rule(node))
        rest = iter(carried)
        return tree_map_only(torch.Tensor, lambda _: next(rest), given)

    def _guess(self, node: torch.fx.Node, *, known: bool = False) -> None:
        """Note a node that is taken to work place by place, unless it is known to."""
        if not known:
            self.guessed.add(node.name)

    def _layer(self, name: str, module: Any, labels: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        dim = len(shape) - 1 if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) else 1
        count = output_channels(module) or 0
        # A layer that is called again puts out the same channels: one set of weights makes them.
        if name not in self.layers:
            self.layers[name] = Layer(name, self._given.new(count), count, is_depthwise(module))
        numbers = np.arange(count) + self.layers[name].first
        if not isinstance(module, torch.nn.Embedding):
            self._enter(name, module, self._per_channel(labels, dim), numbers)
        view = [1] * len(shape)
        view[dim] = count
        # Expanded, not copied: where nothing differs the stride is 0, which `varies` sees without a look at the values.
        return torch.from_numpy(numbers).view(view).expand(shape)

    def _enter(self, name: str, module: Any, entering: np.ndarray, numbers: np.ndarray) -> None:
        """Record the ties between a layer's input and output channels, over all of its calls."""
        self._tie_calls(name, entering)
        groups = getattr(module, "groups", 1)
        if is_depthwise(module):
            # Several outputs may come from one input (channel multiplier).
            self._given.tie(np.repeat(entering, len(numbers) // groups), numbers)
        elif groups > 1:
            sides = [list(np.split(entering, groups)), list(np.split(numbers, groups))]
            self.blocks.append(Blocks(sides, may_vanish=True))

    def _tie_calls(self, name: str, entering: np.ndarray) -> None:
        """Tie what enters a module in one call to what enters it in another: one set of weights serves both."""
        self._given.tie(self._entering.setdefault(name, entering), entering)

    def _function(
        self, n: torch.fx.Node, args: Any, kwargs: Any, labels: list[torch.Tensor], shape: tuple[int, ...] | None
    ) -> Any:
        if n.target is attend:
            return self._attend(n, labels, self.attention[str(n.args[0].target)])  # type: ignore[union-attr]
        if not labels:
            return self._size(n) if shape is None else made(n, shape, self.numbers)
        if plain_name(n) in ("put", "setitem"):  # whose numbers nobody would know any more
            return self._whole(n, labels, reasons.overwritten(n))
        if plain_name(n) in ("to", "type_as"):  # the other is looked at for its type or device
            labels = labels[:1]
        if shape is not None and merges(n, labels):
            return merge(labels[0], shape)
        # Numbers in place of an index that is computed would pick at random, so such a choice isn't run on them.
        name, indices = plain_name(n), n.all_input_nodes[1:]
        is_known = bool(indices) and all(each.name in self.picks for each in indices)
        if name in INDEXED and (is_known or not tensors_of((args[1:], kwargs))):
            return self._move(n, labels[:1])
        if name in MOVES - INDEXED:
            moved = self._move(n, labels)
            if name in ("cat", "concat", "concatenate", "stack"):
                dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
                return self._joined(moved, labels, dim, is_new=name == "stack")
            return moved
        if not tensors_of(given_shapes(n)):
            return self._size(n)
        if (rows := put_by_row(n, labels)) is not None:
            return self._meet(rows, tuple(rows[0].shape)).expand(shape or ())
        if (picked := carry_picked(n, labels, shape)) is not None:
            return picked
        if not (name in MEETS and len(labels) > 1):  # of two tensors a maximum is place by place
            found = along(n, args, kwargs, labels[0].dim(), self.fetch_attr)
            if found is not None:
                return self._along_dims(n, labels, found)
        if shape is None:
            self._guess(n)
            return self._passed(n, labels)
        if name in ("matmul", "bmm", "rmatmul", "imatmul") and len(labels) == 2:
            return self._product(n, labels, shape)
        # A functional layer on parameters of the model's own, which nobody cuts.
        own = any(node.op == "get_attr" for node in n.all_input_nodes)
        self._guess(n, known=name in MEETS or operation_name(n) in POINTWISE)
        if len(labels) > 1 and (name in MEETS or not own) and meet_alike(labels, shape):
            return self._meet(labels, shape)
        return self._passed(n, labels)

    def _move(self, n: torch.fx.Node, labels: list[torch.Tensor]) -> Any:
        """Run data movement on the numbers themselves."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if plain_name(n) in INDEXED:  # known places are those of the numbers too
            values = self.env | {
                node: self.picks[node.name] for node in n.all_input_nodes[1:] if node.name in self.picks
            }
            args, kwargs = map_arg((n.args, n.kwargs), values.__getitem__)
        try:
            if plain_name(n) in ("view", "view_as"):
                # The numbers are expanded, which no view can be taken of.
                args = (args[0].contiguous(), *args[1:])
            moved = getattr(self, n.op)(n.target, args, kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError):
            return self._whole(n, labels, reasons.no_rule(n))
        if plain_name(n) in ("view", "reshape", "unflatten") and len(labels) == 1:
            self._split(n, labels[0], moved)
        # In the dense model too chunk makes equal pieces of what it gets, so all of them have to lose equally many.
        if plain_name(n) == "chunk" and moved[0].dim() > 1 and len({piece.shape for piece in moved}) == 1:
            held = [d for d in range(1, moved[0].dim()) if any(varies(piece, d) for piece in moved)]
            pieces = [self._per_channel(piece, held[0] if len(held) == 1 else 1) for piece in moved]
            sides, self.chunks = by_layer(pieces, [*self.layers.values(), *self.own.values()], self.reorders), True
            uneven = self.reorders and any(len({len(block) for block in side}) > 1 for side in sides)
            self.blocks.append(Blocks([pieces] if uneven else sides, may_vanish=False, moves=True, is_uneven=uneven))
        return moved

    def _split(self, n: torch.fx.Node, labels: torch.Tensor, moved: torch.Tensor) -> None:
        """Say what a view asks of channels that it takes apart into rows: so many of them, or each of such a length."""
        places = [[d for d in range(each.dim()) if varies(each, d)] for each in (labels, moved)]
        sizes: Any = n.args[1:] or n.kwargs.get("shape", n.kwargs.get("size", ()))
        if len(places[0]) != 1 or len(places[1]) != 2:
            return
        if plain_name(n) == "unflatten":
            given = n.kwargs.get("sizes", n.args[-1])
            # A slice of a shape is a node of its own, whose sizes follow those of a tensor.
            parts = given if isinstance(given, (tuple, list)) else [given] * (moved.dim() - labels.dim() + 1)
            sizes = (*[None] * places[1][0], *parts)
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        if len(sizes) <= places[1][1]:
            return
        fixed_sizes = [isinstance(sizes[d], int) and sizes[d] != -1 for d in places[1]]
        rows = moved.movedim(places[1], (0, 1)).flatten(2)[:, :, 0].numpy()
        if fixed_sizes == [True, False]:
            self.blocks.append(Blocks([list(rows)], may_vanish=False, moves=True))
            self.reorders = True
        elif fixed_sizes == [False, True]:
            self._given.tie(rows[:, :1], rows)

    def _size(self, n: torch.fx.Node) -> Any:
        """Compute what isn't a tensor: a size, say."""
        try:
            return super().run_node(n)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError):
            return None

    def _product(self, n: torch.fx.Node, labels: list[torch.Tensor], shape: tuple[int, ...]) -> Any:
        """Tie the channels over which a matrix product sums; other channels go where their rows and columns do."""
        one, other = labels
        if min(one.dim(), other.dim()) < 2:
            return self._whole(n, labels, reasons.no_rule(n))
        along = [[d - each.dim() for d in range(1, each.dim()) if varies(each, d)] for each in labels]
        if along[0] in ([], [-1]) and along[1] in ([], [-2]):
            self._tie(one[..., :1, :].flatten(0, -2)[0], other[..., :, :1].transpose(-1, -2).flatten(0, -2)[0])
            return staying(shape)
        # Rows of the first, or columns of the second, that hold channels are rows or columns of what comes out.
        if along == [[-2], []]:
            return one[..., :1].expand(shape)
        if along == [[], [-1]]:
            return other[..., :1, :].expand(shape)
        return self._whole(n, labels, reasons.no_rule(n))

    def _meet(self, labels: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """Tie what meets elementwise; an operand that is broadcast along the channels ties nothing."""
        full = [entry.view((1,) * (len(shape) - entry.dim()) + tuple(entry.shape)) for entry in labels]
        # Which dimension holds the channels isn't known; it is one along which numbers differ.
        varying = {d for entry in full for d in range(1, len(shape)) if varies(entry, d)}
        tied = [entry for entry in full if all(entry.shape[d] == shape[d] for d in varying)]
        for other in tied[1:]:
            self._tie(tied[0], other)
        return (tied or full)[0].expand(shape)

    def _joined(self, moved: torch.Tensor, labels: list[torch.Tensor], dim: int, *, is_new: bool) -> torch.Tensor:
        """Tie what is joined along another dimension than that of the channels."""
        # A slice in which numbers still differ has its channels in another dimension, where they meet those of the
        # others.
        parts = [entry.unsqueeze(dim) if is_new else entry for entry in labels]
        slices = [entry.narrow(dim, 0, 1) for entry in parts if entry.shape[dim]]  # of a part all channels may be gone
        if not all(any(varies(entry, d) for d in range(1, entry.dim())) for entry in slices):
            return moved
        for other in slices[1:]:
            self._tie(slices[0], other)
        # One number for what is tied, so that only channels differ in what follows.
        return torch.from_numpy(self._given.settled()[1])[moved]

    def _tie(self, one: torch.Tensor, other: torch.Tensor) -> None:
        one, other = torch.broadcast_tensors(one, other)
        # Along a dimension in which neither differs (batch, pixels) one place says all, and few pairs are left to sort.
        for d in range(one.dim()):
            if not (one.shape[d] == 0 or varies(one, d) or varies(other, d)):
                one, other = one.narrow(d, 0, 1), other.narrow(d, 0, 1)
        count = self._given.count
        self._given.tie(*np.divmod(np.unique((one * count + other).numpy()), count))

    def _per_channel(self, labels: torch.Tensor, dim: int) -> np.ndarray:
        """Reduce labels to one a channel; those that share a channel are tied."""
        rows = labels.transpose(0, dim)
        # The usual case, all places of a channel alike, is one comparison; ties are looked for only where it fails.
        first = rows[(slice(None),) + (slice(0, 1),) * (rows.dim() - 1)]
        if not torch.equal(first.expand(rows.shape), rows):
            self._tie(first, rows)
        return first.reshape(-1).numpy()
