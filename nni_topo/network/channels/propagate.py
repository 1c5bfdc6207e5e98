"""Numbers of channels on their way through a traced network: where they go, and which of them meet.

Data movement (concatenation, chunk, view, permute, channel shuffle) moves them, an elementwise operation on two tensors
ties the numbers that meet, a depth-wise convolution ties its output channel to its input channel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.fx
from torch.utils._pytree import tree_map, tree_map_only

from nni_topo.errors import ConfigError
from nni_topo.network.attention import Attention, attend, find_heads, is_mixed, states_read
from nni_topo.network.channels import reasons
from nni_topo.network.channels.ids import (
    Blocks,
    ChannelIds,
    FreeParameter,
    Layer,
    compressed,
    fixed,
    given_shapes,
    staying,
    varies,
)
from nni_topo.network.channels.rules import Operation, has_property, made, module_rule, rule_of
from nni_topo.network.graph import RANDOM, is_of_forward, makes_mask, tensor_shape
from nni_topo.network.layers import (
    CONVOLUTIONS,
    PER_CHANNEL,
    RULES,
    TRANSPOSED,
    AlongChannels,
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


class Propagation(torch.fx.Interpreter):
    """Number the channels of a traced model with shapes in ``node.meta["tensor_meta"]``."""

    # What can't be followed isn't guessed: channels that enter an operation without a rule are pinned, that is, they
    # stay. So every number says all there is to say about a channel, and the network can be cut by numbers alone.
    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.traced = graph_module
        self.extra_traceback = False  # an error of ours says what it has to
        self._given = ChannelIds()
        self.layers = self._given.layers
        self.in_training = dict[str, Layer]()  # those that run in training alone, which are no layers to be pruned
        self.along = set[str]()  # convolutions that go along the channels of others, and make none of their own
        self.own = self._given.own
        self.attention = find_heads(graph_module)  # by module; of those that the graph calls
        self.heads: dict[str, Attention] = {}  # the same by layer that makes queries, keys or values
        self.blocks = self._given.blocks
        self.summed, self.guessed = self._given.summed, self._given.guessed
        self.numbers, self.picks = self._given.by_node, self._given.picks
        self._called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
        self._entering: dict[str, np.ndarray] = {}

    @property
    def reorders(self) -> bool:
        """Whether the dense model may put channels into another order: see `DenseOrder`."""
        return self._given.reorders

    @property
    def chunks(self) -> bool:
        """Whether channels are cut into equal pieces."""
        return self._given.chunks

    def channel_ids_of(self, name: str) -> np.ndarray:
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
        labels = [] if makes_mask(n) or has_property(n, "is_like") else tensors_of((args, kwargs))
        if n.op == "call_module":  # an embedding of positions may be given a size alone
            return self._module(n, labels or [staying(())], shape)
        return self._function(n, labels, shape)

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
            self.own[name] = FreeParameter(self._given.new(count), count, long[-1])
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
        if name in self.along or (name not in self.layers and _goes_along(module, labels[0], shape or ())):
            return self._along(node, name, module, labels[0], shape or ())
        if output_channels(module) is not None:
            return self._layer(name, module, labels[0], shape or ())
        known = module_rule(module)
        if known is not None and known.moves:
            return known.apply(self._operation(node))
        if isinstance(module, torch.nn.GroupNorm) and module.num_groups < module.num_channels:
            # A norm's groups are of one size, so those that are left have to be too.
            side = np.split(self._given.per_channel(labels[0], 1), module.num_groups)
            self.blocks.append(Blocks([list(side)], may_vanish=True))
        if isinstance(module, (*PER_CHANNEL, *RULES)) or is_normalizing(module):
            rule = RULES.get(type(module))
            dim = rule.dim if rule else channel_dim(module)
            if dim is None:
                return self._whole(node, labels, reasons.uncut_module(node, type(module).__name__))
            self._tie_calls(name, self._given.per_channel(labels[0], dim % labels[0].dim()))
        elif known is not None:
            return known.apply(self._operation(node))
        if isinstance(module, tuple(RULES)) or not (any(True for _ in module.parameters()) or is_normalizing(module)):
            self.guessed.add(node.name)
        return self._operation(node).passed(labels)

    def _operation(self, node: torch.fx.Node) -> Operation:
        """Put a node as its rule sees it."""
        values = {parent: self.env[parent] for parent in node.all_input_nodes}
        return Operation(node, values, self._given, self.fetch_attr)

    def _along(self, node: torch.fx.Node, name: str, module: Any, labels: torch.Tensor, shape: tuple[int, ...]) -> Any:
        """Let a convolution along channels leave them where they are."""
        self.along.add(name)
        if not _goes_along(module, labels, shape) or labels.shape[2] != len(self._entering.get(name, labels[0, 0])):
            return self._whole(node, [labels], reasons.convolved_elsewhere(node))
        self._tie_calls(name, self._given.per_channel(labels, 2))
        return labels[:, :1].expand(shape)

    def _recur(self, node: torch.fx.Node, labels: list[torch.Tensor], name: str, kind: str) -> Any:
        """Let a recurrent layer take fewer channels in, and tie the gates of each unit, and the states that it gets."""
        self._tie_calls(name, self._given.per_channel(labels[0], labels[0].dim() - 1))
        found = given_shapes(node)
        if name not in self.attention:
            # What it puts out is what its state holds, which stays.
            return self._whole(node, labels[1:], reasons.recurrent_input(node, kind))
        units = self._head_numbers(self.attention[name])
        for state in labels[1:]:
            self._given.tie(self._given.per_channel(state, state.dim() - 1), units)
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
                self._tie_calls(name, self._given.per_channel(each, each.dim() - 1))
        heads, numbers = attention.query_heads, self._head_numbers(attention)
        first = numbers.reshape(heads, -1)[:, 0]
        needed = []
        for each in labels:
            # What another module says of positions, head by head: T5's first block says it for all of them.
            if each.dim() == 4 and each.shape[1] == heads and varies(each, 1):
                self._given.tie(first, self._given.per_channel(each, 1))
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
        return self._operation(node).all_kept(labels, reason)

    def _layer(self, name: str, module: Any, labels: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        dim = len(shape) - 1 if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) else 1
        count = output_channels(module) or 0
        # A layer that is called again puts out the same channels: one set of weights makes them.
        if name not in self.layers:
            self.layers[name] = Layer(name, self._given.new(count), count, is_depthwise(module))
        numbers = np.arange(count) + self.layers[name].first
        if not isinstance(module, torch.nn.Embedding):
            self._enter(name, module, self._given.per_channel(labels, dim), numbers)
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

    def _function(self, n: torch.fx.Node, labels: list[torch.Tensor], shape: tuple[int, ...] | None) -> Any:
        if n.target is attend:
            return self._attend(n, labels, self.attention[str(n.args[0].target)])  # type: ignore[union-attr]
        op = self._operation(n)
        if not labels:
            return op.computed() if shape is None else made(n, shape, self._given)
        rule = rule_of(n)
        if rule is not None and (rule.moves or rule.writes):
            return rule.apply(op)
        if not tensors_of(given_shapes(n)):
            return op.computed()
        return op.by_place(known=False) if rule is None else rule.apply(op)


def _goes_along(module: torch.nn.Module, labels: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Tell whether a layer is a convolution along the channels that enter it, labelled, and puts as many out."""
    if not isinstance(module, torch.nn.Conv1d) or labels.dim() != 3 or labels.shape[::2] != shape[::2]:
        return False
    is_known = type(module) in (torch.nn.Conv1d, AlongChannels)
    is_plain = is_known and module.padding_mode == "zeros" and module.groups == 1
    return is_plain and module.stride == (1,) and varies(labels, 2) and not varies(labels, 1)
