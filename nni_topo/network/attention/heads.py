"""Attention, found by the names of its layers: which channels belong to a head, and how heads are removed.

Heads are independent up to the output projection. So the queries, keys and values of a head are pruned together, and
heads that share keys and values (grouped-query attention) are pruned together too. Such a set is called a head here. So
is a unit of a recurrent layer, which is pruned with its rows in all gates. Where all heads share one key and one value
(multi-query attention [1]_), these are kept, and a head is pruned with its queries and the columns that read its
output.

References
----------
.. [1] N. Shazeer, "Fast transformer decoding: one write-head is all you need", https://arxiv.org/abs/1911.02150
"""

from __future__ import annotations

import copy
import inspect
import operator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nni_topo.network.attention.unfused.multihead import (
    PrunedMultiheadAttention,
    is_fused_attention,
    set_unfused,
    unfused_class,
)
from nni_topo.network.attention.unfused.own_width import take_own_width
from nni_topo.network.layers.kinds import entering_channels, is_recurrent
from nni_topo.network.runtime.modules import put_attribute
from nni_topo.network.runtime.results import STORED, STORED_WITHIN

IntArray = NDArray[np.int64]

# Queries, keys, values; possible names of the output projection, if it is a part of the module.
_APART = (
    ("q_proj", "k_proj", "v_proj", ("o_proj", "out_proj", "dense")),
    ("query", "key", "value", ("out_proj",)),
    ("q_lin", "k_lin", "v_lin", ("out_lin",)),
    ("q", "k", "v", ("o",)),
    ("query_proj", "key_proj", "value_proj", ()),  # DeBERTa's
)
_TOGETHER = (
    ("qkv", ("proj", "project.0", "projection")),
    ("c_attn", ("c_proj",)),
    ("to_qkv", ("merge",)),
    ("Wqkv", ("Wo",)),
    ("query_key_value", ("dense",)),
    ("qkv_proj", ("o_proj",)),  # keys and values may have fewer heads
)
# Layers whose rows are ordered by head (its queries, keys, values); in all others, queries of all heads come first.
_HEAD_BY_HEAD = ("query_key_value",)
COUNTS = ("num_attention_heads", "num_heads", "n_heads")
# Other names of the same number, in modules that also hold one of these: the heads on one device, for example.
_FURTHER_COUNTS = (
    "n_local_heads", "num_local_heads", "n_head", "num_head", "nhead", "nheads", "heads", "n_q_heads", "num_q_heads",
    "num_query_heads",
)  # fmt: skip
SHARED_COUNTS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_local_kv_heads", "num_local_kv_heads", "n_kv_head",
    "num_kv_head", "kv_heads", "num_heads_kv", "n_heads_kv", "n_head_kv", "kv_n_heads", "n_query_groups",
    "num_query_groups",
)  # fmt: skip
# Heads of queries for each head of keys and values.
_PER_SHARED = (
    "num_key_value_groups", "num_kv_groups", "n_kv_groups", "kv_groups", "n_rep", "num_rep", "repeats", "q_per_kv",
    "queries_per_kv", "num_queries_per_kv",
)  # fmt: skip
_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_WIDTHS = (
    "all_head_size", "hidden_size", "inner_dim", "attn_dim", "dim", "embed_dim", "split_size", "output_dim",
    "hidden_size_output",
)  # fmt: skip
# Parameters with an entry for each head, and the dimension of the heads; also of a layer that outputs such a table.
_BY_HEAD = {
    "relative_position_bias_table": 1, "relative_attention_bias.weight": 1,
    "relative_position_bias.relative_position_bias_table": 1, "logit_scale": 0, "cpb_mlp.2.weight": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """An attention module and its heads."""

    name: str  # of the module
    heads: int  # sets of heads that are pruned together
    size: int  # channels of a head
    channels: dict[str, IntArray]  # by layer, its output channels of each head: (heads, channels)
    context: tuple[str, IntArray]  # the layer of values, and its channels in the order of the heads' outputs
    out: str | None  # the output projection; None if it isn't a part of the module
    width: int  # channels that enter
    by_head: dict[str, int] = field(default_factory=dict)  # parameters with an entry for each head, and its dimension
    recurrent: bool = False  # heads are units, each with one output channel, that read one another
    also: tuple[str, ...] = ()  # further arguments that the layers of queries and keys read: positions
    shifted: bool = False  # norms within add an offset to the heads' outputs, also to pruned ones
    # By layer, its output channels that all heads share: keys, then values, each (1, channels). With these, `channels`
    # has only the queries'.
    shared: dict[str, list[IntArray]] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The layers that compute queries, keys and values."""
        return list(dict.fromkeys([*self.channels, *self.shared]))

    @property
    def is_fused(self) -> bool:
        """Whether one layer computes queries, keys and values."""
        return len(self.layers) == 1

    @property
    def outputs(self) -> tuple[str, IntArray]:
        """A layer, and its channels with which the heads' outputs are pruned, in order."""
        if not self.shared:
            return self.context
        ((layer, channels),) = self.channels.items()
        return layer, channels.ravel()

    @property
    def parts(self) -> list[tuple[str, IntArray]]:
        """The layers that compute queries, keys and values, each with its channels of each head: (heads, channels).

        Keys and values that all heads share have one row.
        """
        if self.shared:
            parts = list(self.channels.items())
            return parts + [(layer, rows) for layer, arrays in self.shared.items() for rows in arrays]
        if self.is_fused:
            ((layer, channels),) = self.channels.items()
            size = (channels.shape[1] - self.size) // 2
            return [(layer, part) for part in np.split(channels, (self.size, self.size + size), axis=1)]
        return list(self.channels.items())

    @property
    def head_size(self) -> int:
        """Channels of a head's keys."""
        return int(self.parts[1][1].shape[1])

    @property
    def query_heads(self) -> int:
        """The number of heads of queries, of which some may share keys and values."""
        return self.parts[0][1].size // self.head_size

    def granularity(self, layer: str) -> list[int]:
        """Return NNI's granularity at which a layer loses heads; if `is_fused`, for one of queries, keys and values."""
        return [self.size if self.is_fused else self.channels[layer].shape[1], -1]


def find_attention(model: nn.Module) -> dict[str, Attention]:
    """Find the attention modules of a model, by name."""
    by_name = {}
    for name, module in model.named_modules():
        attention = _attention(name, module)
        if attention is not None:
            by_name[name] = attention
    return by_name


def find_heads(model: nn.Module) -> dict[str, Attention]:
    """Find the attention modules of a model, and the recurrent layers whose units can be pruned, by name."""
    heads = find_attention(model)
    for name, module in model.named_modules():
        if is_recurrent(module):
            layer: Any = module
            # The rows are ordered by gate: those of a unit are `hidden_size` apart.
            rows = np.arange(len(layer.weight_ih_l0)).reshape(-1, layer.hidden_size).T
            outputs, width = (name, rows[:, 0]), layer.input_size
            heads[name] = Attention(name, len(rows), 1, {name: rows}, outputs, None, width, recurrent=True)
    return heads


def is_attention(module: nn.Module) -> bool:
    """Tell whether a module is attention whose heads are known."""
    return _attention("", module) is not None


def _attention(name: str, module: Any) -> Attention | None:
    prefix = f"{name}." if name else ""
    if isinstance(module, nn.MultiheadAttention):
        # Not supported: keys or values of another width, which have weights of their own; appended keys or values,
        # which belong to no head; subclasses, which may compute something else.
        is_known = is_fused_attention(module) or type(module) is PrunedMultiheadAttention
        if not is_known or module.bias_k is not None or module.add_zero_attn:
            return None
        rows = np.arange(3 * module.num_heads * module.head_dim).reshape(3, module.num_heads, -1)
        return _with_rows(name, [name] * 3, list(rows), f"{prefix}out_proj", module.embed_dim, {})
    if not module._modules:
        return None
    count = _first_int(module, COUNTS) or getattr(getattr(module, "config", None), "num_attention_heads", None)
    if not count or _adds_residual(module):
        return None
    parts = {key: part for key, part in module.named_children() if next(part.parameters(), None) is not None}
    for *names, outs in (*_APART, *_TOGETHER):
        layers: list[Any] = [parts.get(child_name) for child_name in names]
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            continue
        inner, parameters = dict(module.named_modules()), dict(module.named_parameters())
        out = next((path for path in outs if isinstance(inner.get(path), nn.Linear)), None)
        size = _first_int(module, _SIZES) or layers[0].out_features // (count if len(layers) > 1 else 3 * count)
        by_head = {
            key: dim for key, dim in _BY_HEAD.items() if key in parameters and parameters[key].shape[dim] == count
        }
        # All heads must share all other parameters, such as those of norms of queries and keys.
        by_name = {*names, *by_head}
        if out is not None:
            by_name.add(out)
        known_parts = {path.partition(".")[0] for path in by_name}
        shared_parameters: list[Tensor] = []
        for key, parameter in module.named_parameters(recurse=False):
            if key not in by_head:
                shared_parameters.append(parameter)
        for key, part in parts.items():
            if key not in known_parts:
                shared_parameters += part.parameters()
        # If a head has as many channels as there are heads, only a shape such as (heads, 1, 1) shows an entry by head.
        are_shared = all(
            parameter.numel() == size and (parameter.dim() == 1 or parameter.shape[0] == 1)
            for parameter in shared_parameters
        )
        if not are_shared and not _is_pooled(module):
            return None
        if len(layers) > 1:
            if any(layer.out_features % size for layer in layers):
                return None
            parts_of_heads = [np.arange(layer.out_features).reshape(-1, size) for layer in layers]
        else:
            n_rows = layers[0].out_features
            shared = count  # number of heads of keys and values
            if names[0] == "qkv_proj":
                shared, by_head = getattr(module, "num_key_value_heads", count), {}
            elif n_rows == (count + 2) * size:
                shared = 1
            elif not any(key in vars(module) for key in COUNTS) and any(key in vars(module) for key in _SIZES):
                # The config may be the whole model's, with another number of heads.
                count = shared = n_rows // (3 * size)
            if not shared or count % shared or n_rows != (count + 2 * shared) * size:
                return None
            # GPT-BigCode's rows are ordered by head too, if each head has keys and values of its own.
            is_ordered_by_head = names[0] in _HEAD_BY_HEAD or getattr(module, "multi_query", None) is False
            if is_ordered_by_head and shared == count:
                parts_of_heads = list(np.arange(n_rows).reshape(count, 3, size).swapaxes(0, 1))
            else:
                parts_of_heads = np.split(np.arange(n_rows).reshape(-1, size), (count, count + shared))
            names = names * 3
        attention = _with_rows(
            name,
            [prefix + layer_name for layer_name in names],
            parts_of_heads,
            None if out is None else prefix + out,
            entering_channels(layers[0]),
            by_head,
        )
        if attention is not None and names[0] == "query_proj" and getattr(module, "relative_attention", False):
            return replace(attention, also=("rel_embeddings",))
        if attention is not None and _is_pooled(module):
            return replace(attention, shifted=True)
        return attention
    return None


def _with_rows(
    name: str, layers: list[str], rows: list[IntArray], out: str | None, width: int, by_head: dict[str, int]
) -> Attention | None:
    """Describe attention by the layers of queries, keys and values and their channels, each (heads, channels).

    Several heads may share keys and values, or all may.
    """
    queries, keys, values = rows
    heads, size = len(values), values.shape[1]
    if len(keys) != heads or not heads or len(queries) % heads:
        return None
    times = len(queries) // heads
    if heads == 1 < times:
        shared: dict[str, list[IntArray]] = {}
        for layer, head_channels in zip(layers[1:], (keys, values), strict=True):
            shared.setdefault(layer, []).append(head_channels)
        context = layers[2], np.tile(values.ravel(), times)
        return Attention(name, times, size, {layers[0]: queries}, context, out, width, by_head, shared=shared)
    # If heads share keys, it isn't known which of them an entry of a parameter by head belongs to.
    if by_head and times > 1:
        return None
    channels: dict[str, IntArray] = {}
    for layer, head_channels in zip(layers, (queries.reshape(heads, -1), keys, values), strict=True):
        if layer in channels:
            head_channels = np.concatenate([channels[layer], head_channels], axis=1)
        channels[layer] = head_channels
    context = layers[2], values.repeat(times, axis=0).ravel()
    return Attention(name, heads, times * size, channels, context, out, width, by_head)


def _adds_residual(module: nn.Module) -> bool:
    """Tell whether a module adds an argument to its output projection's result, as BLOOM's attention does."""
    forward = inspect.unwrap(getattr(type(module), "forward", None))  # type: ignore[arg-type]
    if not inspect.isfunction(forward):
        return False
    code = forward.__code__
    return "residual" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def _first_int(module: nn.Module, names: tuple[str, ...]) -> int:
    """Return the first of some attributes that is an integer; 0 if none is."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return 0


def _is_pooled(module: nn.Module) -> bool:
    """Tell whether a module is attention of torchvision's MViT, whose pooling is the same for all heads."""
    return (type(module).__module__, type(module).__name__) == ("torchvision.models.video.mvit", "MultiscaleAttention")


def attend(attention: Any, out: str, *args: Any, **kwargs: Any) -> Any:
    """Run attention without its output projection, and return the heads' outputs."""
    if (kind := unfused_class(attention)) is not None:
        return partial(kind.forward, attention, mix=lambda context: context)(*args, **kwargs)
    place, _, key = out.rpartition(".")
    owner = attention.get_submodule(place)
    layer = owner._modules[key]
    owner._modules[key] = nn.Identity()
    try:
        return attention(*args, **kwargs)
    finally:
        owner._modules[key] = layer


def states_read(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Return, by linear layer within attention, the attention's arguments that enter it; empty if not known."""
    if node.target is attend:
        args = args[2:]
    arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    read = {}
    for layer, places in (node.meta.get("reads") or {}).items():
        states: Any = [arguments.get(at) for at in places]
        if not all(isinstance(state, Tensor) for state in states):
            return {}
        read[layer] = states
    return read


Given = tuple[bool, dict[str, list[int | str]]]
"""Whether attention returns several values; by layer, which arguments it reads unchanged, empty if unknown."""


def open_attention(graph_module: GraphModule, reads_by_name: dict[str, Given]) -> None:
    """Give each output projection of attention a node of its own in a graph; see `attend`.

    ``given``: by name, for the attention modules that run. ``meta["reads"]`` of their nodes stores which arguments
    their layers read.
    """
    if not reads_by_name:
        return
    graph, attention_modules = graph_module.graph, find_attention(graph_module)
    for node in list(graph.nodes):
        attention = attention_modules.get(str(node.target)) if node.op == "call_module" else None
        if attention is None or attention.name not in reads_by_name:
            continue
        many, node.meta["reads"] = reads_by_name[attention.name]
        if attention.out is None:
            continue
        picked = {user: user.args[1] for user in node.users if user.target is operator.getitem}
        # If a call returns one tensor, although others return several values, its readers use it as it is.
        apart = len(picked) == len(node.users) and all(isinstance(at, int) for at in picked.values())
        if many and not apart:
            continue
        with graph.inserting_before(node):
            module = graph.create_node("get_attr", attention.name)
            inner = graph.call_function(
                attend, (module, attention.out.removeprefix(f"{attention.name}."), *node.args), node.kwargs
            )
            inner.meta = {
                key: node.meta[key] for key in ("nn_module_stack", "reads", STORED_WITHIN) if key in node.meta
            }
            context = graph.call_function(operator.getitem, (inner, 0)) if many else inner
            mixed = graph.call_module(attention.out, (context,))
        for value in [user for user, at in picked.items() if at == 0] if many else [node]:
            if STORED in value.meta:
                mixed.meta[STORED] = value.meta[STORED]
        if many:
            for user, at in picked.items():
                if at == 0:
                    user.replace_all_uses_with(mixed)
                    graph.erase_node(user)
                else:
                    user.replace_input_with(node, inner)
        else:
            node.replace_all_uses_with(mixed)
        graph.erase_node(node)
    graph_module.recompile()


def resize(module: Any, attention: Attention, n_heads: int, width: int) -> None:
    """Set a module's number of heads and its input width; its layers are cut already."""
    old = attention.heads
    is_smaller = n_heads < old or width < attention.width
    if is_smaller and is_fused_attention(module):
        set_unfused(module)
        vars(module).pop("forward", None)  # NNI stores the class's forward there when it removes a wrapper
    elif is_smaller and unfused_class(module) is None:
        take_own_width(module)
    if isinstance(module, nn.MultiheadAttention):
        module.num_heads = n_heads
        module.embed_dim = module.kdim = module.vdim = width
        return
    if n_heads == old:
        return
    of_heads, config = len(attention.context[1]), vars(module).get("config")
    if attention.is_fused and config is not None and not any(key in vars(module) for key in COUNTS):
        # The module reads the number of heads from the model's config; other blocks may keep more.
        put_attribute(module, "config", copy.copy(config))
        module.config.num_attention_heads = config.num_attention_heads // old * n_heads
    # If all heads share one key and value, their count stays, and only the count of heads for each changes.
    counts = (*COUNTS, *_FURTHER_COUNTS, *(_PER_SHARED if attention.shared else SHARED_COUNTS))
    for key, value in vars(module).items():
        if key in counts and isinstance(value, int) and value % old == 0:
            put_attribute(module, key, value // old * n_heads)
        elif key in _WIDTHS and value == of_heads:
            put_attribute(module, key, of_heads // old * n_heads)
