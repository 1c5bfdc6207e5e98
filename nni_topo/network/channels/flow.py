"""Find the channels of a network that can only be removed together.

Every output channel of every layer gets an id; `ids` defines the terms. Tensors of ids go through the graph in place
of the values, so couplings are found channel by channel and not only layer by layer. Data movement (concatenation,
chunk, view, permute, channel shuffle) moves ids, an elementwise operation on two tensors couples the ids at the same
position, and a depth-wise convolution couples each output channel with its input channel.

`Propagation` sends the ids through the graph; `ChannelFlow` answers questions about the result.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import pairwise, zip_longest
from typing import Any, cast

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional
from torch.utils._pytree import tree_map, tree_map_only

from nni_topo.errors import ConfigError, NniTopoError, out_of_memory
from nni_topo.network.attention.heads import Attention, attend, find_heads, states_read
from nni_topo.network.channels import reasons
from nni_topo.network.channels.ids import (
    FIXED,
    Blocks,
    ChannelIds,
    ForeignWidth,
    FreeParameter,
    Layer,
    compress,
    fixed,
    given_shapes,
    smallest_of_connected,
    staying,
    varies,
)
from nni_topo.network.channels.rules import (
    FAILURES,
    FixedPlaces,
    Operation,
    first_argument,
    has_property,
    ids_of_new_tensor,
    module_rule,
    reads_shape_only,
    rule_of,
)
from nni_topo.network.graph.nodes import (
    AS_NUMBERS,
    RANDOM,
    UNSHOWN,
    UNUSED,
    described,
    is_of_forward,
    makes_mask,
    place,
    tensor_shape,
)
from nni_topo.network.graph.traced_int import (
    CHECKS,
    ON_NUMBERS,
    Check,
    TracedInt,
    attribute_channels,
    attribute_sizes_in,
    counted_by,
    fold_numbers,
    plain,
)
from nni_topo.network.layers.derived import is_head
from nni_topo.network.layers.integer_attributes import LAYER_WIDTHS, Place, is_of_torch
from nni_topo.network.layers.kinds import (
    CONVOLUTIONS,
    NORMS,
    PER_CHANNEL,
    RULES,
    TRANSPOSED,
    can_be_cut,
    can_follow,
    entering_channels,
    has_complex_weights,
    has_no_width,
    is_depthwise,
    is_normalizing,
    is_plain_norm,
    is_recurrent,
    output_channels,
    row_names,
    weight_name,
)
from nni_topo.network.layers.norms import channel_dim, dims_together, gives_no_channels
from nni_topo.network.runtime.inputs import tensors_of
from nni_topo.network.runtime.results import STORED, STORED_WITHIN
from nni_topo.sharing import find_ties

_logger = logging.getLogger(__name__)
_WEIGHT = ".weight"  # how the names of layers' weights end


class Propagation(torch.fx.Interpreter):
    """Propagate channel ids through a traced model whose nodes have shapes in ``node.meta["tensor_meta"]``."""

    # Channels that enter an operation that can't be followed are kept, so the network can be cut by ids alone.
    def __init__(self, graph_module: GraphModule, dims: Mapping[str, int] | None = None) -> None:
        super().__init__(graph_module)
        self.traced = graph_module
        self.extra_traceback = False  # our error messages need no text from the interpreter
        self._channels = ChannelIds()
        self._channels.dims = dims or {}
        self.layers = self._channels.layers
        self.channel_wise = set[str]()  # channel-wise convolutions, which make no channels of their own
        self.free_parameters = self._channels.free_parameters
        self.attention = find_heads(graph_module)  # by name, the attention modules that the graph calls
        self.heads: dict[str, Attention] = {}  # by layer that computes queries, keys or values of each head
        self.shared: dict[str, Attention] = {}  # by layer that only computes keys or values shared by all heads
        self.blocks = self._channels.blocks
        self.summed, self.guessed = self._channels.summed, self._channels.guessed
        self.ids, self.picks = self._channels.by_node, self._channels.picks
        self._called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
        self._entering: dict[str, np.ndarray] = {}

    @property
    def reorders(self) -> bool:
        """Whether the dense model may put channels into another order: see `DenseOrder`."""
        return self._channels.reorders

    def channel_ids_of(self, name: str) -> np.ndarray:
        """List the ids of a layer's output channels: int, shape (channels,)."""
        return self.layers[name].ids

    def uncoupled(self, *, kept_too: bool = False) -> dict[str, FreeParameter]:
        """Return, by name, free parameters with a choice of dimensions that aren't coupled with removable channels.

        ``kept_too``: that aren't coupled with channels which are kept either.
        """
        free = self.free_parameters | self._channels.one_valued
        several = {name: parameter for name, parameter in free.items() if len(parameter.dims) > 1}
        if not several:
            return {}
        before, after, _ = self._channels.settle()
        group_ids = after
        if kept_too:
            group_ids = before
        is_of_layer = np.zeros(len(group_ids), dtype=np.bool_)
        for name in self.layers:
            is_of_layer[group_ids[self.channel_ids_of(name)]] = True
        is_of_layer[FIXED] = False
        uncoupled = {}
        for name, parameter in several.items():
            coupled = np.unique(group_ids[parameter.ids])
            # A single one means that all entries are coupled, so another dimension holds the channels.
            if is_of_layer[coupled].sum() < 2:
                uncoupled[name] = parameter
        return uncoupled

    def run_node(self, n: Node) -> Any:
        """Compute the channel ids of a node's outputs from the ids of its arguments."""
        is_random = any(RANDOM in parent.meta for parent in n.all_input_nodes)
        self._channels.reason = reasons.joins_random(n) if is_random else reasons.joins_constant(n)
        self._channels.node = n
        outputs = self._ids_of(n)
        if RANDOM in n.meta:
            # With fewer channels other numbers would be drawn, and outputs couldn't be compared.
            entering = self.fetch_args_kwargs_from_env(n)
            for ids in map(compress, tensors_of((entering, outputs))):
                self._channels.pin(np.unique(ids), reasons.random_shape(n))
        if UNUSED in n.meta and n.op == "call_module":
            for ids in map(compress, tensors_of(outputs)):
                self._channels.pin(np.unique(ids), reasons.not_followed())
        if isinstance(outputs, Tensor):
            self.ids[n.name] = compress(outputs)
        else:
            self.ids[n.name] = tree_map(compress, outputs)
        return outputs

    def _ids_of(self, n: Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        if n.op == "get_attr":
            value = super().run_node(n)
            if is_of_forward(n) and value.dtype in (torch.bool, torch.int64, torch.int32):
                self.picks[n.name] = value.cpu()
            owner, _, attribute = str(n.target).rpartition(".")
            module = self.fetch_attr(owner) if owner in self._called else None
            if module is not None and (not is_head(module) or attribute in (weight_name(module), *row_names(module))):
                # The graph calls its module, and the parameter is cut with that.
                if owner in self.layers and isinstance(module, nn.Embedding) and attribute == "weight":
                    # The columns of an embedding have the ids of its channels, because a head may read its weight.
                    return torch.from_numpy(self.channel_ids_of(owner)).expand(value.shape)
                return tree_map(fixed, value)
            is_free = not is_of_forward(n) and can_follow(value)
            if is_free:
                return self._parameter(str(n.target), value)
            return tree_map(fixed, value)
        values = {parent: self.env[parent] for parent in n.all_input_nodes}
        op = Operation(n, values, self._channels, self.fetch_attr)
        if n.op == "call_module":
            return self._module(op)
        return self._function(op)

    def _parameter(self, name: str, value: Tensor) -> Tensor:
        """Return the ids of a free parameter: by default of its last dimension, of a weight the first (outputs)."""
        if name not in self.free_parameters:
            dims = [d for d in range(value.dim()) if value.shape[d] > 1]
            if name.endswith(_WEIGHT):
                dims.reverse()
            dim = self._channels.dims.get(name, dims[-1])
            count = value.shape[dim]
            self.free_parameters[name] = FreeParameter(self._channels.new(count), count, dim, dims)
        return self.free_parameters[name].ids_of_places(tuple(value.shape))

    def _module(self, op: Operation) -> Any:
        name, module, shape = str(op.node.target), op.module, op.shape or ()
        first = op.ids[0] if op.ids else staying(())  # a position embedding may get only a size
        if not first.numel() and any(True for _ in module.parameters()):
            return self._on_nothing(op, name)
        if isinstance(module, nn.RNNBase):
            return self._recur(op, name)
        if name in self.attention:
            return self._attend(op, self.attention[name])
        if not can_be_cut(module):
            # It needs all channels that enter, and its output can't become smaller.
            if has_complex_weights(module):
                return op.all_kept(reason=reasons.complex_reader(op.node))
            return op.all_kept(reason=reasons.uncut_module(op.node, type(module).__name__))
        if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) and first.dim() != module.weight.dim():
            inputs = [tensor_shape(node) for node in self.traced.graph.nodes if node.op == "placeholder"]
            if any(input_shape is not None and len(input_shape) == first.dim() for input_shape in inputs[:1]):
                raise ConfigError(
                    "example_inputs must hold a batch, the samples in the first dimension, "
                    f"got a tensor of shape {tuple(first.shape)}, which enters {name} (example_inputs)"
                )
            return op.all_kept(reason=reasons.no_batch(op.node))
        if name in self.channel_wise or (name not in self.layers and _is_channel_wise(module, first, shape)):
            return self._channel_wise(op, name)
        if output_channels(module) is not None:
            return self._layer(name, module, first, shape)
        if op.rule is not None and op.rule.moves:
            return self._applied(op, op.rule.apply)
        if isinstance(module, nn.PReLU) and (module.num_parameters == 1 or not varies(first, 1)):
            return op.pass_through()  # all channels share one slope, or the slopes of the places
        if isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels:
            # A norm's groups must have equal sizes after pruning, too.
            side = np.split(self._channels.per_channel(first, 1), module.num_groups)
            self.blocks.append(Blocks([list(side)], may_vanish=True, place=described(op.node)))
        if isinstance(module, (*PER_CHANNEL, *RULES)) or is_normalizing(module):
            rule = RULES.get(type(module))
            dim = rule.dim if rule else channel_dim(module)
            if dim is None or (rule is None and len(op.args) + len(op.kwargs) > 1):  # another argument may be a gate
                return op.all_kept(reason=reasons.uncut_module(op.node, type(module).__name__))
            dims = 1 if rule else dims_together(module)
            if dims > 1:
                of_channels = [d for d in range(first.dim() - dims, first.dim()) if varies(first, d)]
                if not of_channels:
                    self.guessed.add(op.node.name)
                    return op.pass_through()  # it works over places, and treats each channel separately
                if len(of_channels) > 1:
                    first = op.whole_rows(first, of_channels[1:])
                # Each entry has the id of its channel. Along the dimensions before them ids usually don't differ.
                entering = self._channels.per_channel(_with_one_place(first, first.dim() - dims).flatten(-dims), -1)
            elif (
                rule is None
                and dim == -1
                and varies(first, -1)
                and any(varies(first, d) for d in range(first.dim() - 1))
            ):
                rows = compress(first).flatten(0, -2).numpy()
                self._channels.tie_columns(name, rows)
                entering = rows[0]
            else:
                entering = self._channels.per_channel(first, dim % first.dim())
            before = self._entering.get(name, entering)
            if has_no_width(module):
                # Its calls may lose different channels; its width attribute follows the first call.
                self._entering.setdefault(name, entering)
            elif len(before) == len(entering):
                self._tie_calls(name, entering)
            else:
                reason = reasons.several_widths(op.node)
                self._channels.pin(np.unique(before), reason)
                return op.all_kept(reason=reason)
            if gives_no_channels(module):
                return given_shapes(op.node)
        elif op.rule is not None:
            return self._applied(op, op.rule.apply)
        if isinstance(module, tuple(RULES)) or not (any(True for _ in module.parameters()) or is_normalizing(module)):
            self.guessed.add(op.node.name)
        return op.pass_through()

    def _on_nothing(self, op: Operation, name: str) -> Any:
        """Keep the channels of a module that gets an empty tensor in all of its calls, and those before it.

        Such a tensor has no ids: nothing shows which channels would enter.
        """
        calls = [node for node in self.traced.graph.nodes if node.op == "call_module" and node.target == name]
        if any(0 not in (tensor_shape(call) or ()) for call in calls):
            return given_shapes(op.node)
        reason = reasons.nothing_found(op.node)
        for inner, module in op.module.named_modules(prefix=name):
            count = output_channels(module)
            if count is not None and inner not in self.layers:
                self.layers[inner] = Layer(inner, self._channels.new(count), count, depthwise=False)
                self._channels.pin(self.channel_ids_of(inner), reason)
        waiting, seen = list(op.node.all_input_nodes), set[Node]()
        while waiting:
            parent = waiting.pop()
            nonempty = [ids for ids in tensors_of(self.ids.get(parent.name)) if ids.numel()]
            for ids in nonempty:
                self._channels.pin(np.unique(ids.numpy()), reason)
            if not nonempty and parent not in seen:
                waiting += parent.all_input_nodes
            seen.add(parent)
        return given_shapes(op.node)

    def _channel_wise(self, op: Operation, name: str) -> Any:
        """Let a channel-wise convolution slide along the remaining channels, in their order."""
        self.channel_wise.add(name)
        ids, shape = op.ids[0], op.shape or ()
        if not _is_channel_wise(op.module, ids, shape) or ids.shape[2] != len(self._entering.get(name, ids[0, 0])):
            return op.all_kept(reason=reasons.convolved_elsewhere(op.node))
        self._tie_calls(name, self._channels.per_channel(ids, 2))
        return ids[:, :1].expand(shape)

    def _recur(self, op: Operation, name: str) -> Any:
        """Let a recurrent layer lose input channels, and couple each unit's gates and initial states."""
        states, *initial = op.ids
        self._tie_calls(name, self._channels.per_channel(states, states.dim() - 1))
        if name not in self.attention:
            # Its outputs are its states, whose size is kept.
            return op.all_kept(initial, reasons.recurrent_input(op.node, type(op.module).__name__))
        units = self._head_ids(self.attention[name])
        for state in initial:
            self._channels.tie(self._channels.per_channel(state, state.dim() - 1), units)

        def unit_ids(leaf: Tensor) -> Tensor:
            # An output holds the units once for each direction, a state once.
            return torch.from_numpy(np.tile(units, leaf.shape[-1] // len(units))).expand(leaf.shape)

        return tree_map_only(Tensor, unit_ids, given_shapes(op.node))

    def _head_ids(self, attention: Attention) -> np.ndarray:
        """Give ids to the layers that compute heads, couple each head's; return the ids of the heads' output."""
        for name in attention.layers:
            if name not in self.layers:
                head_rows = []
                if name in attention.channels:
                    head_rows = [attention.channels[name]]
                count = sum(rows.size for rows in (*head_rows, *attention.shared.get(name, ())))
                self.layers[name] = Layer(name, self._channels.new(count), count, depthwise=False)
                if name not in self._entering:
                    self._entering[name] = np.zeros(entering_channels(self.fetch_attr(name)), dtype=np.int64)
                (self.heads if head_rows else self.shared)[name] = attention
        ids_by_layer = [channels + self.layers[name].first for name, channels in attention.channels.items()]
        for ids_of_head in zip(*ids_by_layer, strict=True):
            self._channels.tie(ids_of_head[0][0], np.concatenate(ids_of_head))
        for name, shared in attention.shared.items():
            for rows in shared:
                self._channels.pin(rows.ravel() + self.layers[name].first, reasons.shared_by_heads(attention.name))
        layer, order = attention.outputs
        context: np.ndarray = order + self.layers[layer].first
        return context

    def _attend(self, op: Operation, attention: Attention) -> Any:
        """Couple the layers that compute each head. Tensors that none of these layers reads keep all channels."""
        read = states_read(op.node, op.args, op.kwargs)
        for name, states in read.items():
            for tensor in states:
                self._tie_calls(name, self._channels.per_channel(tensor, tensor.dim() - 1))
        heads, context_ids = attention.query_heads, self._head_ids(attention)
        first = context_ids.reshape(heads, -1)[:, 0]
        states_of_all = [state for states in read.values() for state in states]
        needed = []
        for tensor in op.ids:
            # A position bias per head from another module: in T5 the first block computes it for all blocks.
            if tensor.dim() == 4 and tensor.shape[1] == heads and varies(tensor, 1):
                self._channels.tie(first, self._channels.per_channel(tensor, 1))
            elif tensor.dim() == 3 and tensor.shape[0] % heads == 0 and varies(tensor, 0):
                # (batch * heads, ...): the heads of one sample are neighbours.
                self._channels.tie(first, self._channels.per_channel(tensor.unflatten(0, (-1, heads)), 1))
            elif not any(torch.equal(tensor, state) for state in states_of_all):
                needed.append(tensor)
        kept_outputs = op.all_kept(needed, reasons.needs_all_channels(op.node, attention.name))
        context, *further_outputs = tensors_of(kept_outputs)
        if op.node.op != "call_module" or attention.out is None:  # else it comes from the output projection
            context = torch.from_numpy(context_ids).expand(context.shape)
        outputs = [context]
        for output in further_outputs:
            is_by_head = output.dim() == 4 and output.shape[1] == heads  # attention weights
            if is_by_head:
                output = torch.from_numpy(first).view(-1, 1, 1).expand(output.shape)
            outputs.append(output)
        leaves = iter(outputs)
        return tree_map_only(Tensor, lambda _: next(leaves), kept_outputs)

    def _layer(self, name: str, module: Any, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
        dim = 1
        if isinstance(module, (nn.Linear, nn.Embedding)):
            dim = len(shape) - 1
        count = output_channels(module) or 0
        # A layer that is called again has the same output channels, because its weights are the same.
        if name not in self.layers:
            self.layers[name] = Layer(name, self._channels.new(count), count, is_depthwise(module))
        leaving = self.layers[name].ids
        if not isinstance(module, nn.Embedding):
            entering = self._channels.per_channel(ids, dim)
            self._tie_calls(name, entering)
            groups = getattr(module, "groups", 1)
            if is_depthwise(module):
                # Several outputs may come from one input (channel multiplier).
                self._channels.tie(np.repeat(entering, len(leaving) // groups), leaving)
            elif groups > 1:
                sides = [list(np.split(entering, groups)), list(np.split(leaving, groups))]
                self.blocks.append(Blocks(sides, may_vanish=True, place=described(self._channels.node)))
        view = [1] * len(shape)
        view[dim] = count
        # Expanding gives the other dimensions stride 0, so that `varies` needn't compare values.
        return torch.from_numpy(leaving).view(view).expand(shape)

    def _tie_calls(self, name: str, entering: np.ndarray) -> None:
        """Couple the channels that enter a module in all of its calls, because they meet the same weights."""
        self._channels.tie(self._entering.setdefault(name, entering), entering)

    def _function(self, op: Operation) -> Any:
        node, rule = op.node, op.rule
        if node.target is attend:
            return self._attend(op, self.attention[str(node.args[0].target)])  # type: ignore[union-attr]
        has_ids = bool(op.ids) and not makes_mask(node) and not (rule is not None and rule.is_like)
        if not has_ids and op.shape is not None:
            return ids_of_new_tensor(node, op.shape, self._channels)
        gives_tensors = bool(tensors_of(given_shapes(node))) or (rule is not None and (rule.moves or rule.writes))
        if not has_ids or not gives_tensors:
            return self._applied(op, Operation.run_on_ids)  # it returns a size, say
        if rule is None:
            return op.by_place(is_elementwise=False)
        return self._applied(op, rule.apply)

    def _applied(self, op: Operation, apply: Callable[[Operation], Any]) -> Any:
        """Apply a rule; if it raises, keep all channels that enter."""
        try:
            return apply(op)
        except FAILURES as error:
            if isinstance(error, NniTopoError) or out_of_memory(error):
                raise  # from a rule that a user has registered, say
            # The rule may not cover the call (empty tensors, say): only the channels that enter it are kept.
            _logger.debug("the rule fails at %s", described(op.node), exc_info=True)
            return op.all_kept(reason=reasons.call_not_covered(op.node))


def _with_one_place(ids: Tensor, dims: int) -> Tensor:
    """Shorten each of the first dimensions along which ids don't differ to length 1."""
    for d in range(dims):
        if not varies(ids, d):
            ids = ids.narrow(d, 0, 1)
    return ids


def _is_channel_wise(module: nn.Module, ids: Tensor, shape: tuple[int, ...]) -> bool:
    """Tell whether a layer is a channel-wise convolution: it slides along the channels and keeps their number."""
    if not isinstance(module, nn.Conv1d) or ids.dim() != 3 or ids.shape[::2] != shape[::2]:
        return False
    is_plain = type(module) is nn.Conv1d and module.padding_mode == "zeros" and module.groups == 1
    return is_plain and module.stride == (1,) and varies(ids, 2) and not varies(ids, 1)


class ChannelFlow(Propagation):
    """The channels of a traced model: which layers share them, which are kept, and why."""

    def __init__(
        self,
        graph_module: GraphModule,
        args: tuple[Any, ...],
        kept_for_training: Iterable[tuple[str, np.ndarray, reasons.Reason]] = (),
    ) -> None:
        super().__init__(graph_module)
        with torch.no_grad():
            outputs = self.run(*tree_map(fixed, args))
            dims = self._dims_before_last(args)
            if dims:
                super().__init__(graph_module, dims)
                outputs = self.run(*tree_map(fixed, args))
        self._beside: dict[frozenset[str], dict[str, dict[int, str]]] = {}
        self.own_widths: dict[str, int] = {}  # by module whose forward is to be rewritten, the dimension of its width
        # Channels at the model's output, which are kept.
        arriving = np.zeros(0, dtype=np.int64)
        for ids in tensors_of(outputs):
            arriving = np.concatenate([arriving, np.unique(ids.numpy())])
        for node in graph_module.graph.nodes:
            if AS_NUMBERS in node.meta:
                for ids in tensors_of(self.ids[node.name]):
                    self._channels.pin(np.unique(ids.numpy()), reasons.read_as_numbers(node))
        self._couple_shared_weights(arriving)
        needed = list[tuple[np.ndarray, reasons.Reason]]()
        for name, is_kept, why in kept_for_training:
            if name in self.layers:  # else it runs in training mode only
                needed.append((self.channel_ids_of(name)[is_kept], why))
        for node in graph_module.graph.nodes:
            if STORED in node.meta:
                for ids in tensors_of(self.ids[node.name]):
                    needed.append((np.unique(ids.numpy()), reasons.stored(of=node.meta[STORED])))
            for name, sizes in node.meta.get(STORED_WITHIN, {}).items():
                for channels in self._ids_within(node, sizes):
                    needed.append((channels, reasons.stored(of=name)))
        if needed:
            before = self._channels.settle()[0]
            # A mask on what the model returns is an error, but one on what is needed otherwise is undone.
            for channels, why in needed:
                self._channels.pin(channels[~np.isin(before[channels], before[arriving])], why)
        attribute_sizes = attribute_channels(graph_module.graph, self.ids, self._channels.settle()[0])
        self._follow_layer_widths(attribute_sizes)
        fold_numbers(graph_module.graph, attribute_sizes.keys())
        self._keep_fixed_places(attribute_sizes.keys())
        self._keep_shuffled_into_groups()
        self._before, self._group_ids, self._reasons = self._channels.settle()
        for name in self._channels.heads_only(self._before):
            self._entering.pop(name, None)
        self._leaving = np.setdiff1d(self._before[arriving], FIXED)
        remaining = []
        for blocks in self.blocks:
            rows = [self._before[row] for row in blocks.all]
            are_heads = all(len(row) > 1 and bool((row == row[0]).all()) for row in rows)
            # Heads, whose channels are all coupled, are removed as a whole if an attribute holds their number.
            if not (blocks.counted and are_heads):
                remaining.append(blocks)
        self.blocks[:] = remaining
        group_ids = np.unique(self.group_ids(arriving))
        self.at_output = group_ids[group_ids > FIXED]
        self._attribute_sizes: dict[Place, tuple[int, list[np.ndarray]]] = {}
        for held_at, uses in attribute_sizes.items():
            distinct = dict.fromkeys(tuple(self.group_ids(channels).tolist()) for _, channels in uses)
            counted = [np.array(counted_ids, dtype=np.int64) for counted_ids in distinct]
            self._attribute_sizes[held_at] = uses[0][0], counted
            # One attribute counts all of these channels, so their numbers must stay equal.
            if len(counted) > 1:
                where = f"the attribute {f'{held_at[0]}.{held_at[1]}'.lstrip('.')}"
                self.blocks.append(Blocks([counted], may_vanish=False, place=where))
        self._keep_checked_sizes()
        self._class_ids = self._with_patterns()

    def _with_patterns(self) -> np.ndarray:
        """Return the class id of each group id: int, (count,).

        Where a group norm or grouped convolution reads blocks of several layers' channels, as after a concatenation,
        the layers reach equal numbers in all blocks by one pattern: the channels at one position of every block form a
        class. Other blocks of these channels need the pattern, too: between 4 and 6 channels it repeats every 2.
        """
        moved_ids = set[int]()
        for blocks in self.blocks:
            if blocks.moves and self.reorders:  # these are chosen by segment instead
                moved_ids.update(self.group_ids(blocks.ids).tolist())
        firsts = sorted(layer.first for layer in self.layers.values())
        waiting = list[tuple[np.ndarray, bool]]()  # group ids, (blocks, channels of a block); whether of several layers
        for blocks in self.blocks:
            if blocks.may_vanish:
                for side in blocks.sides:
                    ids = self.group_ids(np.stack(side))
                    if len(side) > 1 and moved_ids.isdisjoint(ids.ravel().tolist()):
                        waiting.append((ids, len(np.unique(np.searchsorted(firsts, ids, "right"))) > 1))
        class_ids, reached = np.arange(self.size), np.zeros(self.size, dtype=np.bool_)
        while True:
            joining = [ids for ids, is_of_several in waiting if is_of_several or reached[ids].any()]
            waiting = [(ids, False) for ids, is_of_several in waiting if not (is_of_several or reached[ids].any())]
            if not joining:
                return class_ids
            for ids in joining:
                reached[ids] = True
                pairs = np.stack(np.broadcast_arrays(class_ids[ids[:1]], class_ids[ids]), -1).reshape(-1, 2)
                class_ids = smallest_of_connected(pairs, self.size)[class_ids]
            reached[FIXED] = False

    def _keep_checked_sizes(self) -> None:
        """Let numbers of channels stay equal, or multiples of a number, if the forward has found that they are."""
        for node in self.traced.graph.nodes:
            if node.target not in CHECKS or len(node.all_input_nodes) != len(node.args) - (node.target is operator.mod):
                continue
            first, second = node.args
            counted, rows = counted_by(first, self.ids), list[np.ndarray]()
            if counted is None:
                continue
            if node.target is operator.mod:
                is_constant = not isinstance(second, TracedInt) or second.place not in self._attribute_sizes
                divides = (
                    isinstance(second, int) and 1 < plain(second) < len(counted) and not len(counted) % plain(second)
                )
                if divides and is_constant:
                    rows = np.split(counted, plain(second))
            elif node.target in (operator.eq, operator.ne):
                equal = counted_by(second, self.ids)
                rows = []
                if equal is not None and len(equal) == len(counted):
                    rows = [counted, equal]
            rows = [self.group_ids(row) for row in rows]
            if rows and any(not np.array_equal(np.sort(row), np.sort(rows[0])) for row in rows):
                self.blocks.append(Blocks([rows], may_vanish=False, place=described(node)))

    def _ids_within(self, node: Node, sizes: tuple[int, ...]) -> list[np.ndarray]:
        """Return the ids that a tensor may hold that a module computed, which is one node: those with its sizes."""
        module: Any = node.args[0] if node.target is attend else node
        attention = self.attention.get(str(module.target))
        output_ids = [np.unique(ids.numpy()) for ids in tensors_of(self.ids[node.name])]
        if attention is None:
            return [ids for ids in output_ids if len(ids) in sizes]
        samples, heads = (tensor_shape(node) or (1,))[0], attention.query_heads
        of_heads = [self.channel_ids_of(layer) for layer in attention.layers]
        widths = {heads, samples * heads, heads * attention.size, *map(len, of_heads)}
        if widths.intersection(sizes):
            return of_heads
        return []

    def _dims_before_last(self, args: tuple[Any, ...]) -> dict[str, int]:
        """Return, by name, the channel dimension of free parameters for which it isn't the default.

        If the default dimension isn't coupled with removable channels (position biases have the heads first), the
        other dimensions are tried, the likeliest first. Weights of layers, whose default is the rows, come last.
        """
        channel_dims: dict[str, int] = {}
        # A matrix whose wrong dimension is taken keeps the channels that it is multiplied with, so that the parameters
        # which these channels are added to aren't coupled with removable ones: look for the matrix's dimension first.
        for are_weights, kept_too in ((False, True), (False, False), (True, False)):
            before: Propagation = self
            if channel_dims:
                before = Propagation(self.traced, channel_dims)
                before.run(*tree_map(fixed, args))
            untried: dict[str, list[int]] = {}
            uncoupled = before.uncoupled(kept_too=kept_too)
            if kept_too and len(uncoupled) == len(before.uncoupled()):
                continue
            for name, parameter in uncoupled.items():
                if name.endswith(_WEIGHT) is are_weights:
                    untried[name] = parameter.dims[:-1]
            while untried := {name: dims for name, dims in untried.items() if dims}:
                tried = {name: dims.pop() for name, dims in untried.items()}
                trial = Propagation(self.traced, channel_dims | tried)
                trial.run(*tree_map(fixed, args))
                for name in tried.keys() - trial.uncoupled().keys():
                    channel_dims[name] = tried[name]
                    del untried[name]
        return channel_dims

    def _couple_shared_weights(self, arriving: np.ndarray) -> None:
        """Couple the channels of modules that share a tensor, so that they can share the smaller tensor.

        Channels along the same dimension are coupled: the columns of an embedding with the inputs of a head of the
        same weight. Where one module can't be cut, the others keep their channels, too. ``arriving``: ids at the
        model's output.
        """
        ties = find_ties(self.traced)
        if not ties:
            return
        before = self._channels.settle()[0]  # group ids, as if no weight were shared
        staying = np.unique([FIXED, *before[arriving]])
        nodes = {str(node.target): node for node in self.traced.graph.nodes if node.op in ("call_module", "get_attr")}
        for names in ties:
            used = []
            for name in names:
                owner = name.rpartition(".")[0]
                if name in nodes or owner in self.layers or owner in self._entering:
                    used.append(name)
            for first_name, second_name in pairwise(used):
                reader = second_name  # a module may only be called as part of another one
                while reader and reader not in nodes:
                    reader = reader.rpartition(".")[0]
                if reader:
                    self._channels.node = nodes[reader]
                else:
                    self._channels.node = next(iter(self.traced.graph.nodes))
                for first, second in zip_longest(*self._ids_in_shared(first_name, second_name)):
                    if first is not None and second is not None and len(first) == len(second):
                        first_stays, second_stays = (np.isin(before[ids], staying) for ids in (first, second))
                        is_free = ~first_stays & ~second_stays
                        self._channels.tie(first[is_free], second[is_free])
                        self._channels.pin(
                            np.unique(first[second_stays & ~first_stays]),
                            reasons.shared_weight(first_name, second_name),
                        )
                        self._channels.pin(
                            np.unique(second[first_stays & ~second_stays]),
                            reasons.shared_weight(second_name, first_name),
                        )
                        continue
                    # If one module can't be cut along a dimension, the other keeps all channels of it.
                    if first is not None:
                        self._channels.pin(
                            first[~np.isin(before[first], staying)], reasons.shared_weight(first_name, second_name)
                        )
                    if second is not None:
                        self._channels.pin(
                            second[~np.isin(before[second], staying)], reasons.shared_weight(second_name, first_name)
                        )

    def _ids_in_shared(self, first_name: str, second_name: str) -> list[list[np.ndarray | None]]:
        """Return the ids along a tensor's first dimensions, for two of its names; None where it can't be cut."""
        owners, attribute = (
            (first_name.rpartition(".")[0], second_name.rpartition(".")[0]),
            first_name.rpartition(".")[2],
        )
        modules = [self.traced.get_submodule(owner) for owner in owners]
        if (
            type(modules[0]) is type(modules[1])
            and attribute == second_name.rpartition(".")[2]
            and attribute not in ("bias", "in_proj_bias")
            and not self.free_parameters.keys() & {first_name, second_name}
            and getattr(modules[0], "groups", 1) == getattr(modules[1], "groups", 1)
        ):
            # Modules of one class are cut alike, whatever their groups, gates and heads are: along output and input
            # channels, norms along input channels.
            ids_by_owner = list[list[np.ndarray | None]]()
            for owner in owners:
                ids_of_dims = list[np.ndarray | None]()
                if owner in self.layers:
                    ids_of_dims.append(self.layers[owner].ids)
                if len(self._entering.get(owner, ())):
                    ids_of_dims.append(self._entering[owner])
                ids_by_owner.append(ids_of_dims)
            return ids_by_owner
        return [
            self._ids_in_parameter(name, module)
            for name, module in zip((first_name, second_name), modules, strict=True)
        ]

    def _ids_in_parameter(self, name: str, module: Any) -> list[np.ndarray | None]:
        """Return the ids along the first dimensions of a module's tensor; None, or no entry, where it can't be cut."""
        owner, _, attribute = name.rpartition(".")
        if name in self.free_parameters:
            free = self.free_parameters[name]
            return [None] * free.dim + [free.ids]
        if owner not in self.layers:
            if isinstance(module, PER_CHANNEL) and owner in self._entering:
                return [self._entering[owner]]
            return []
        leaving, reads = self.layers[owner].ids, self._entering.get(owner)
        if is_recurrent(module):
            return []
        if attribute in row_names(module):
            return [leaving]
        if isinstance(module, nn.Embedding):
            return [None, leaving]
        if getattr(module, "groups", 1) > 1:
            if is_depthwise(module) and not isinstance(module, TRANSPOSED):
                return [leaving]
            return []
        if isinstance(module, TRANSPOSED):
            return [reads, leaving]
        return [leaving, reads]

    def _keep_fixed_places(self, following: Collection[Place]) -> None:
        """Keep channels that a forward picks or counts by fixed numbers, as ``z[:, 1:4]`` or ``z.split(3, 1)``.

        ``z[:, 4]`` keeps the first five channels; later channels may be pruned. A number that comes from a shape, or
        from an attribute in ``following``, changes with the channels and keeps none.
        """

        def is_fixed(value: Any) -> bool:
            return isinstance(value, int) and not (isinstance(value, TracedInt) and value.place in following)

        for node in self.traced.graph.nodes:
            rule, parent = rule_of(node), first_argument(node)
            if rule is None or rule.held is None or not isinstance(parent, Node):
                continue
            entering, shape = self.ids.get(parent.name), tensor_shape(parent)
            if not isinstance(entering, Tensor) or shape is None:
                continue
            for dim, size in enumerate(shape):
                # If channels are spread over several dimensions (heads), an index in one dimension is no channel.
                if not entering.shape[dim] == entering.numel() == size > 1:
                    continue
                stays = np.zeros(size, dtype=np.bool_)
                for part in rule.held(FixedPlaces(node, dim, shape, is_fixed, self.picks, self.ids[node.name])):
                    stays[part] = True
                if stays.any():
                    self._channels.pin(entering.flatten().numpy()[stays], rule.why_held(node))

    def _follow_layer_widths(self, following: dict[Place, list[tuple[int, np.ndarray]]]) -> None:
        """Let widths of PyTorch's layers that a forward reads, as ``self.conv.in_channels``, count their own channels.

        ``following``: the channels that attributes count, by place. If it isn't known what the forward does with a
        width, the layer keeps these channels.
        """
        read, checked = dict[Place, Node](), dict[Place, Node]()
        for node in self.traced.graph.nodes:
            places = [size.place for size in attribute_sizes_in((node.args, node.kwargs)) if size.place is not None]
            (checked if node.target in CHECKS else read).update(dict.fromkeys(places, node))
        for name, key, path in checked | read:
            if key not in LAYER_WIDTHS or name not in self._called or not is_of_torch(self.fetch_attr(name)):
                continue
            is_made = key in ("out_channels", "out_features", "embedding_dim") and name in self.layers
            channels = self.channel_ids_of(name) if is_made else self.entering_channel_ids(name)
            uses = following.pop((name, key, path), [])
            is_only_checked = (name, key, path) not in read
            if (uses or is_only_checked) and all(
                parts == 1 and len(counted) == len(channels) for parts, counted in uses
            ):
                following[name, key, path] = [*uses, (1, channels)]
            else:
                reader = checked[name, key, path] if is_only_checked else read[name, key, path]
                self._channels.pin(np.unique(channels), reasons.number_made(reader))

    def _keep_shuffled_into_groups(self) -> None:
        """Keep shuffled channels that a grouped convolution reads: the dense model would put them into other groups."""
        moves = [blocks.ids for blocks in self.blocks if blocks.moves]
        if not (self.reorders and moves):
            return
        group_ids = self._channels.settle()[0]
        moved_ids = group_ids[np.concatenate(moves)]
        for node in self.traced.graph.nodes:
            name = str(node.target)
            module: Any = self.fetch_attr(name) if node.op == "call_module" and name in self.layers else None
            if getattr(module, "groups", 1) > 1 and not is_depthwise(module):
                entering = group_ids[self._entering[name]]
                if (np.diff(entering[np.isin(entering, moved_ids)]) < 0).any():
                    self._channels.pin(np.unique(entering), reasons.call_not_covered(node))

    def group_ids(self, ids: np.ndarray) -> np.ndarray:
        """Look up group ids, int, shape (n,): equal for coupled channels, ``FIXED`` for kept channels."""
        group_ids: np.ndarray = self._group_ids[ids]
        return group_ids

    def foreign_widths(self) -> dict[str, ForeignWidth]:
        """Return, by name, the modules that reshape channels to the width of channels not coupled with them."""
        return self._channels.foreign_widths()

    def sizes_kept(self, is_kept: np.ndarray) -> dict[Place, int]:
        """Return the new values of attributes that count channels; ``is_kept``: bool, by group id."""
        return {
            place: parts * int(is_kept[counted[0]].sum()) for place, (parts, counted) in self._attribute_sizes.items()
        }

    def factors(self, is_kept: np.ndarray) -> Iterator[tuple[str, int, float]]:
        """Yield layers, their input channels that are means over channels, and the share of these that is kept.

        ``is_kept``: bool, by group id.
        """
        for average in self._channels.averages.values():
            share = float(is_kept[self.group_ids(average.ids)].mean())
            for layer, column in average.columns:
                yield layer, column, share

    @property
    def averaged(self) -> set[str]:
        """The nodes whose values are larger in the dense model, until a layer's weights make up for it."""
        return set[str]().union(*(average.nodes for average in self._channels.averages.values()))

    def counted_in(self, place: Place) -> list[int]:
        """List the channels that an attribute counts: group ids; none if it isn't known to count any."""
        _, counted = self._attribute_sizes.get(place, (1, []))
        channels: list[int] = np.concatenate([np.zeros(0, dtype=np.int64), *counted]).tolist()
        return channels

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the layers and norms that read channels."""
        return tuple(self._entering)

    @property
    def mixes_places(self) -> bool:
        """Whether a view or reshape joins channels with places, so that couplings may depend on the input's size."""
        for node in self.traced.graph.nodes:
            is_module = node.op == "call_module"
            rule = module_rule(self.fetch_attr(str(node.target))) if is_module else rule_of(node)
            if rule is not None and rule.joins and node.all_input_nodes:
                entering, leaving = self.ids.get(node.all_input_nodes[0].name), self.ids[node.name]
                # Dimensions along which ids don't differ have length 1 here.
                if not isinstance(entering, Tensor) or not isinstance(leaving, Tensor):
                    continue
                if leaving.numel() > entering.numel() > 1:
                    return True
        return False

    def compared_sizes(self) -> tuple[Check, ...]:
        """List the forward's tests whether a size, such as an image's height, equals a number.

        The numbers of channels and samples are no such sizes; that of a parameter is a number. A comparison with 1 is
        left out: it sets a single step of a sequence apart, and channels can't be told from a single place.
        """
        checks = dict[Check, None]()
        for node in self.traced.graph.nodes:
            if node.target not in (operator.eq, operator.ne) or UNSHOWN not in node.meta:
                continue
            numbers, sizes = list[int](), list[int]()
            for side in node.args:
                value, changes = self._number(side)
                if value is not None:
                    if changes:
                        sizes.append(value)
                    else:
                        numbers.append(value)
            if len(sizes) == len(numbers) == 1 and numbers[0] > 1:
                checks[node.target, sizes[0], numbers[0]] = None
        return tuple(checks)

    def _number(self, value: Any) -> tuple[int | None, bool]:
        """Return a number in the graph, and whether it changes with the sizes of the inputs.

        None if it changes with the number of samples, or counts channels.
        """
        if not isinstance(value, Node):
            if isinstance(value, int):
                return (plain(value), False)
            return (None, False)
        if value.target in ON_NUMBERS:
            compute: Any = value.target
            operands = [self._number(argument) for argument in value.args]
            numbers = [number for number, _ in operands if number is not None]
            computed = None
            if len(numbers) == len(operands):
                computed = compute(*numbers)
            return computed, any(changes for _, changes in operands)
        if value.target != "size" or len(value.args) != 2:
            return None, False
        tensor, dim = cast("tuple[Node, int]", value.args)
        shape, ids = tensor_shape(tensor), self.ids.get(tensor.name)
        if shape is None or not isinstance(dim, int) or not isinstance(ids, Tensor):
            return None, False
        dim %= len(shape)
        is_of_model = tensor.op == "get_attr"
        holds_channels = ids.shape[dim] > 1 or (tensor.op == "placeholder" and dim == 1 and len(shape) > 3)
        if holds_channels or not (dim or is_of_model):
            return None, False
        return shape[dim], not is_of_model

    @property
    def shuffles(self) -> bool:
        """Whether the network shuffles channels and splits channels with chunk."""
        return self.reorders and self._channels.chunks

    @property
    def size(self) -> int:
        """The number of channel ids, including ``FIXED``."""
        return len(self._group_ids)

    def group_ids_of(self, name: str) -> np.ndarray:
        """Look up the group ids of a layer's output channels: int, shape (channels,)."""
        return self.group_ids(self.channel_ids_of(name))

    def masked_channel_ids(self, name: str) -> np.ndarray:
        """Look up the ids of the channels that a mask of a layer or norm decides on: int, shape (channels,)."""
        if name in self.layers:
            return self.channel_ids_of(name)
        return self.entering_channel_ids(name)

    def class_ids_of(self, name: str) -> np.ndarray:
        """Look up the class ids of the channels that a mask of a layer or norm decides on: int, shape (channels,)."""
        class_ids: np.ndarray = self._class_ids[self.masked_group_ids(name)]
        return class_ids

    def masked_group_ids(self, name: str) -> np.ndarray:
        """Look up the group ids of the channels that a mask of a layer or norm decides on: int, shape (channels,)."""
        return self.group_ids(self.masked_channel_ids(name))

    def kept_groups(self, chosen: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return which channels stay if layers and norms keep the selected channels: bool, by group id.

        ``chosen``: by layer or norm, bool, shape (channels,) or (heads,). A channel stays if any channel coupled with
        it is selected. A layer that isn't in ``chosen`` keeps all, except that a depth-wise one follows the layer
        before it. Of a layer whose channels only reach norms in ``chosen``, no channel is selected that none of these
        norms selects.
        """
        is_kept, stated = np.zeros(self.size, dtype=np.bool_), np.zeros(self.size, dtype=np.bool_)
        norms = {name: chosen[name] for name in chosen if name not in self.layers}
        silenced, beside = self._silenced(norms), self.read_beside(frozenset(norms)) if norms else {}
        for name, layer in self.layers.items():
            ids, selection = self.group_ids_of(name), chosen.get(name)
            if selection is not None and len(selection) < len(ids):
                ids = self.group_ids(self.unit_channel_ids(name))
            # For an output projection ``chosen`` may select columns, which don't count here.
            if selection is not None and len(selection) == len(ids):
                selected = ids[selection]
            elif not layer.depthwise:
                selected = ids
            else:
                continue
            stated[ids] = True
            if norms:
                selected = selected[~silenced[selected] | np.isin(selected, list(beside.get(name, ())))]
            is_kept[selected] = True
        is_kept[FIXED] = True
        return is_kept | ~stated

    def _silenced(self, chosen: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the channels that norms read and none of them selects: bool, by group id."""
        silenced, selected = np.zeros(self.size, dtype=np.bool_), np.zeros(self.size, dtype=np.bool_)
        for name, is_selected in chosen.items():
            group_ids = self.entering_group_ids(name)
            if len(group_ids) == len(is_selected):
                silenced[group_ids] = True
                selected[group_ids[is_selected]] = True
        if chosen:
            selected[list(self.read_beside(frozenset(chosen)).get("", ()))] = True
        return silenced & ~selected

    def read_beside(self, norms: frozenset[str]) -> Mapping[str, Mapping[int, str]]:
        """Return, by layer, the channels that something reads before any of these norms does: group id and reader.

        The empty name stands for channels that no layer makes, such as those of a position embedding.
        """
        if norms not in self._beside:
            self._beside[norms] = self._find_read_beside(norms)
        return self._beside[norms]

    def _find_read_beside(self, norms: frozenset[str]) -> dict[str, dict[int, str]]:
        beside = dict[str, dict[int, str]]()
        sources = ["", *self.layers]  # source and group id are stored as one number: rank of the source * size + id
        nothing = np.zeros(0, dtype=np.int64)
        output_ids = dict[Node, np.ndarray]()  # group ids of a node's outputs
        raw = dict[Node, np.ndarray]()  # of these, sources and group ids that no norm has read yet
        for node in self.traced.graph.nodes:
            name, parents = str(node.target), node.all_input_nodes
            arrays = [np.unique(self.group_ids(ids.numpy())) for ids in tensors_of(self.ids[node.name])]
            output_ids[node], raw[node] = np.setdiff1d(np.concatenate([nothing, *arrays]), FIXED), nothing
            reads_sizes = node.op != "output" and (not arrays or has_property(node, "reads_sizes"))
            if (node.op == "call_module" and name in norms) or reads_sizes:
                continue
            entering = np.unique(np.concatenate([nothing, *(raw[parent] for parent in parents)]))
            # The layers within attention aren't called by nodes, so its output counts as made by none.
            is_attention = node.op == "call_module" and name in self.attention
            is_layer = node.op == "call_module" and name in self.layers and not self.layers[name].depthwise
            if node.op == "output" or is_attention or is_layer:
                read, source = entering, ""
                if is_layer and not is_attention:
                    source = name
                raw[node] = sources.index(source) * self.size + output_ids[node]
            else:
                passes = np.isin(entering % self.size, output_ids[node])
                before = np.concatenate([nothing, *(output_ids[parent] for parent in parents)])
                raw[node] = np.concatenate([entering[passes], np.setdiff1d(output_ids[node], before)])
                # What a chunk or a slice leaves out isn't read by it.
                moves = node.target is operator.getitem or has_property(node, "moves") or has_property(node, "picks")
                read = entering[~passes]
                if moves:
                    read = nothing
            for code in read.tolist():
                beside.setdefault(sources[code // self.size], {}).setdefault(code % self.size, place(node))
        return beside

    def coupled_with(self, name: str) -> list[str]:
        """List the other layers that share channels or classes, including kept ones, with a layer, in network order."""

        def labels(layer: str) -> np.ndarray:
            class_ids = self.class_ids_of(layer)
            return np.unique(np.concatenate([self._before[self.channel_ids_of(layer)], class_ids[class_ids != FIXED]]))

        shared = labels(name)
        return [layer for layer in self.layers if layer != name and np.isin(labels(layer), shared).any()]

    def coupling_operations(self, name: str) -> list[Node]:
        """List the operations that couple a layer's channels with others or with one another, in network order."""
        group_ids = np.unique(self._before[self.channel_ids_of(name)])
        operations = dict[Node, None]()
        for node, pairs in self._channels.ties():
            different = pairs[pairs[:, 0] != pairs[:, 1]]
            if np.isin(self._before[different[:, 0]], group_ids).any():
                operations[node] = None
        return list(operations)

    def block_places(self, name: str) -> tuple[str, ...]:
        """List the operations that require equal blocks of a layer's channels, in network order."""
        group_ids = np.setdiff1d(self.masked_group_ids(name), FIXED)
        places = dict[str, None]()
        for blocks in self.blocks:
            if np.isin(group_ids, self.group_ids(blocks.ids)).any():
                places[blocks.place] = None
        return tuple(places)

    def why_pinned(self, name: str) -> reasons.Reasons:
        """Return the reasons why channels of a layer, or before a norm, can never be removed, each once."""
        group_ids = self._before[self.masked_channel_ids(name)].tolist()
        pinned_reasons = [self._reasons[group_id] for group_id in group_ids if group_id in self._reasons]
        if ((self.class_ids_of(name) == FIXED) & (self.masked_group_ids(name) != FIXED)).any():
            pinned_reasons.append(reasons.blocks_equal(self.block_places(name)))
        return tuple(dict.fromkeys(pinned_reasons))

    def reaches_output(self, name: str) -> bool:
        """Tell whether any channel of a layer, or before a norm, is in the model's output, and so has to stay."""
        return bool(np.isin(self.masked_group_ids(name), self.at_output).any())

    def is_output(self, name: str) -> bool:
        """Tell whether all channels of a layer are in the model's output, even if something else keeps them, too."""
        return bool(np.isin(self._before[self.channel_ids_of(name)], self._leaving).all())

    def entering_group_ids(self, name: str) -> np.ndarray:
        """Look up the group ids of the channels that enter a layer or norm: int, shape (input channels,)."""
        return self.group_ids(self.entering_channel_ids(name))

    def entering_channel_ids(self, name: str) -> np.ndarray:
        """Look up the ids of the channels that enter a layer or norm: int, shape (input channels,)."""
        # No channels enter an embedding. After a flatten, each feature that enters has the id of its channel.
        return self._entering.get(name, np.zeros(0, dtype=np.int64))

    def read(self) -> list[tuple[np.ndarray, str]]:
        """List the channels that layers, norms and index operations read: group ids, and the reader."""
        reads = [(self.group_ids(entering), name) for name, entering in self._entering.items() if len(entering)]
        for node in self.traced.graph.nodes:
            ids = self.ids[node.name]
            picks = has_property(node, "picks") and not reads_shape_only(node)
            # Operations that only move entries or are elementwise also run on zero channels.
            picks = picks and not all(has_property(user, "meets") or has_property(user, "moves") for user in node.users)
            if picks and isinstance(ids, Tensor) and ids.numel():
                reads.append((np.unique(self.group_ids(ids.numpy())), place(node)))
        for blocks in self.blocks:
            if blocks.is_filled:
                for block in blocks.sides[0]:
                    block_ids = block[block != FIXED]
                    reads.append((np.unique(self.group_ids(block_ids)), blocks.place))
        return reads

    def units(self, name: str) -> np.ndarray:
        """Return the indices of a layer's output channels by unit, such as a head: int, (units, channels of a unit)."""
        if name in self.heads:
            return self.heads[name].channels[name]
        if name not in self.layers:
            return np.arange(len(self.entering_channel_ids(name)))[:, None]
        return np.arange(self.layers[name].channels).reshape(-1, self._unit_size(name))

    def unit_channel_ids(self, name: str) -> np.ndarray:
        """Return the id of the first channel of each unit of a layer, or of each channel of a norm: int, (units,)."""
        ids: np.ndarray = self.masked_channel_ids(name)[self.units(name)[:, 0]]
        return ids

    def _unit_size(self, name: str) -> int:
        """Return how many neighbouring channels of a layer make a unit, as before a pixel shuffle."""
        group_ids = self.group_ids_of(name)
        starts = np.flatnonzero(np.diff(group_ids, prepend=-1))
        size = len(group_ids) // len(starts)
        # NNI's granularity can't express blocks of a transposed convolution's channels.
        if size == 1 or FIXED in group_ids or isinstance(self.fetch_attr(name), (*TRANSPOSED, nn.Embedding)):
            return 1
        is_even = len(np.unique(group_ids[starts])) == len(starts) and np.array_equal(
            starts, np.arange(len(starts)) * size
        )
        # A depth-wise convolution with a channel multiplier follows the layer before it.
        follows = self.layers[name].depthwise and len(self.entering_channel_ids(name)) < len(group_ids)
        if is_even and not follows:
            return size
        return 1

    def output_projections(self) -> dict[str, Attention]:
        """Return the linear layers that read all heads of an attention module and nothing else, by name."""
        projections: dict[str, Attention] = {}
        for attention in dict.fromkeys(heads.name for heads in self.heads.values()):
            if self.attention[attention].recurrent:
                continue
            layer, order = self.attention[attention].outputs
            context = self.group_ids_of(layer)[order]
            projections |= {
                name: self.attention[attention]
                for name in self.layers
                if FIXED not in context and np.array_equal(self.entering_group_ids(name), context)
            }
        return projections


def why_read_beside(flow: ChannelFlow, norms: Iterable[str], group_ids: np.ndarray) -> reasons.Reasons:
    """Return why the masks of norms remove none of these channels: what reads the channels before the norms do."""
    names = dict[str, None]()
    for readers in flow.read_beside(frozenset(norms)).values():
        names |= {readers[group_id]: None for group_id in group_ids.tolist() if group_id in readers}
    return tuple(map(reasons.read_before_norm, names))


_PASSING = (nn.Identity, nn.modules.dropout._DropoutNd)


def norms_after(model: nn.Module, flow: ChannelFlow) -> dict[str, str]:
    """Return, by layer, the batch norm that reads exactly its channels. Layers without one are left out."""
    first = {layer.first: name for name, layer in flow.layers.items()}
    norms = {}
    for name, module in model.named_modules():
        entering = flow.entering_channel_ids(name)
        if not isinstance(module, NORMS) or not is_plain_norm(module) or not len(entering):
            continue
        layer = first.get(int(entering[0]))
        if layer is None:
            continue
        # After a concatenation ids of several layers enter: only the first ones are this layer's.
        if np.array_equal(entering, flow.layers[layer].ids):
            norms[layer] = name
    return norms


def only_norm_after(model: nn.Module, flow: ChannelFlow, name: str) -> nn.Module | None:
    """Return a layer's only reader if that is a batch norm with running statistics that reads nothing else."""
    calls = [node for node in flow.traced.graph.nodes if node.op == "call_module" and node.target == name]
    readers = {user for node in calls for user in node.users}
    targets = {str(user.target) if user.op == "call_module" else "" for user in readers}
    name_after = targets.pop() if len(targets) == 1 else ""
    if not name_after:
        return None
    norm = model.get_submodule(name_after)
    if not is_plain_norm(norm) or not isinstance(norm.running_mean, Tensor):
        return None
    calls_of_norm = {node for node in flow.traced.graph.nodes if node.op == "call_module" and node.target == name_after}
    if calls_of_norm == readers:
        return norm
    return None


def followers(node: Node) -> Iterator[Node]:
    """Yield the nodes after a node, as long as each has one reader and the shape stays the same."""
    shape = tensor_shape(node)
    # With a second reader the next node isn't the only one that uses the value.
    while len(node.users) == 1:
        node = next(iter(node.users))
        if tensor_shape(node) != shape:
            return
        yield node


def passes(graph_module: GraphModule, node: Node) -> bool:
    """Say whether the output of a node equals its input, in evaluation mode."""
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), _PASSING)
    if node.op == "call_method":
        return node.target in ("contiguous", "clone")
    return node.target is functional.dropout and node.kwargs.get("training") is False
