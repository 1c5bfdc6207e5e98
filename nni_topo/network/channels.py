"""Which channels of a network can only be removed together.

Every output channel of every layer gets a number. The numbers travel through the graph in place of
the values: data movement (concatenation, chunk, view, permute, channel shuffle) moves them, an
elementwise operation on two tensors ties the numbers that meet, a depth-wise convolution ties its
output channel to its input channel. So ties are found channel by channel and not only layer by layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.fx
from torch.utils._pytree import tree_map, tree_map_only

from nni_topo.network.inputs import tensors_of
from nni_topo.network.labels import (
    FIXED,
    INDEXED,
    MEETS,
    MOVES,
    MOVING_MODULES,
    REDUCTIONS,
    UNKNOWN,
    carry,
    carry_reduced,
    fixed,
    given_shapes,
    plain_name,
    tensor_shape,
    unknown,
    varies,
)
from nni_topo.network.layers import NORMS, can_be_cut, is_depthwise, output_channels


@dataclasses.dataclass
class Layer:
    """A layer that makes channels."""

    name: str
    first: int  # number of its first output channel; the others follow
    channels: int
    depthwise: bool  # each output channel depends on one input channel alone, with which it stays or goes


@dataclasses.dataclass
class Blocks:
    """Channels in blocks of which each keeps equally many: by side, one array of channel numbers a block."""

    sides: list[list[np.ndarray]]  # a grouped convolution's inputs and its outputs, a norm's channels, a chunk's pieces
    may_vanish: bool  # a block may lose all of its channels, on all sides at once


class ChannelFlow(torch.fx.Interpreter):
    """Follow the channels of a traced model with shapes in ``node.meta["tensor_meta"]``, on its arguments."""

    def __init__(self, graph_module: torch.fx.GraphModule, args: tuple[Any, ...]) -> None:
        super().__init__(graph_module)
        self.layers: dict[str, Layer] = {}  # in the order they are called
        self.blocks: list[Blocks] = []  # one for each grouped convolution, group norm and chunk
        self.whole: list[str] = []  # modules with parameters that can't be cut, in the order they are called
        self._entering: dict[str, np.ndarray] = {}
        # Union-find over channel numbers. All that stays is tied to number 0, which so needs no care of its own.
        self._parents = [FIXED]
        with torch.no_grad():
            outputs = self.run(*tree_map(fixed, args))
        # Channels at the model's output, which have to stay. FIXED ones stay anyway, and UNKNOWN ones have no number.
        arriving = [np.unique(labels.numpy()) for labels in tensors_of(outputs)]
        numbers = np.unique(np.concatenate([*arriving, np.zeros(0, dtype=np.int64)]))
        roots = np.unique(self.roots(numbers))
        self.at_output = roots[roots > FIXED]

    def roots(self, numbers: np.ndarray) -> np.ndarray:
        """Look up representatives, int, shape (n,): one for channels that are tied, ``FIXED`` if they stay."""
        return np.array([self._root(int(number)) for number in numbers], dtype=np.int64)

    def layer_roots(self, name: str) -> np.ndarray:
        """Look up the representatives of a layer's output channels: int, shape (channels,)."""
        layer = self.layers[name]
        # Looked up anew each time: ties found later in the graph, by a sum or an output, change representatives.
        return self.roots(np.arange(layer.first, layer.first + layer.channels))

    def reaches_output(self, name: str) -> bool:
        """Tell whether any channel of a layer is one of the model's output, so that it has to stay."""
        return bool(np.isin(self.layer_roots(name), self.at_output).any())

    def entering_roots(self, name: str) -> np.ndarray:
        """Look up the representatives of what enters a layer or batch norm: int, shape (input channels,)."""
        return self.roots(self.entering_numbers(name))

    def entering_numbers(self, name: str) -> np.ndarray:
        """Look up what enters a layer or batch norm, as numbered by the layers before: int, (input channels,)."""
        # An embedding is entered by indices, so by no channels; a linear layer behind a flattening one, by features.
        return self._entering.get(name, np.zeros(0, dtype=np.int64))

    def run_node(self, n: torch.fx.Node) -> Any:
        """Compute a node's channel numbers from those of its arguments."""
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        if n.op == "get_attr":
            # What the model uses by itself (a layer scale, a constant) isn't cut, so that channels that meet it stay.
            return tree_map(fixed, super().run_node(n))
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        shape = tensor_shape(n)
        labels = tensors_of((args, kwargs))
        if n.op == "call_module":
            return self._module(n, labels, shape)
        return self._function(n, args, kwargs, labels, shape)

    def _module(self, node: torch.fx.Node, labels: list[torch.Tensor], shape: tuple[int, ...] | None) -> Any:
        name = str(node.target)
        module = self.fetch_attr(name)
        if not labels or not can_be_cut(module):
            # A recurrent layer or attention needs all that enters, and what it puts out can't be made less.
            self._pin(labels)
            self.whole.append(name)
            return given_shapes(node, FIXED)
        if shape is None:
            # Several tensors, as of a pooling that returns its indices: each has its channels where its input has them.
            return self._several(node, labels)
        if output_channels(module) is not None:
            return self._layer(name, module, labels[0], shape)
        if isinstance(module, MOVING_MODULES):
            # They only move entries, so on integers they say exactly where each channel goes.
            return module(labels[0])
        if isinstance(module, torch.nn.GroupNorm):
            # A norm's groups are of one size, so those that are left have to be too.
            side = np.split(self._per_channel(labels[0], 1), module.num_groups)
            self.blocks.append(Blocks([list(side)], may_vanish=True))
        passed = carry(labels[0], shape) if len(labels) == 1 else None
        if passed is None:
            # Nobody can say which of the module's parameters belong to which channel, so it isn't cut.
            if any(True for _ in module.parameters()):
                self._pin(labels)
            return torch.full(shape, UNKNOWN)
        if isinstance(module, NORMS):
            self._entering.setdefault(name, self._per_channel(labels[0], 1))
        return passed

    def _several(self, node: torch.fx.Node, labels: list[torch.Tensor]) -> Any:
        """Carry labels to each of several tensors."""

        def passed(value: torch.Tensor) -> torch.Tensor:
            carried = carry(labels[0], tuple(value.shape)) if len(labels) == 1 else None
            return value if carried is None else carried

        return tree_map_only(torch.Tensor, passed, given_shapes(node, UNKNOWN))

    def _layer(self, name: str, module: Any, labels: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        dim = len(shape) - 1 if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) else 1
        count = output_channels(module) or 0
        # A layer that is called again puts out the same channels: one set of weights makes them.
        if name not in self.layers:
            self.layers[name] = Layer(name, len(self._parents), count, is_depthwise(module))
            self._parents.extend(range(len(self._parents), len(self._parents) + count))
        numbers = np.arange(count) + self.layers[name].first
        if not isinstance(module, torch.nn.Embedding):
            self._enter(name, module, self._per_channel(labels, dim), numbers)
        view = [1] * len(shape)
        view[dim] = count
        # Expanded, not copied: where nothing differs the stride is 0, which `varies` sees without a look at the values.
        return torch.from_numpy(numbers).view(view).expand(shape)

    def _enter(self, name: str, module: Any, entering: np.ndarray, numbers: np.ndarray) -> None:
        """Record the ties between a layer's input and output channels, over all of its calls."""
        # One column of the weight serves every call, so what enters it in one is tied to what enters it in another.
        earlier = self._entering.setdefault(name, entering)
        for one, other in zip(earlier, entering, strict=True):
            self._unite(int(one), int(other))
        groups = getattr(module, "groups", 1)
        if is_depthwise(module):
            for channel, number in enumerate(numbers):
                # Several outputs may come from one input (channel multiplier); one from an UNKNOWN input, -1, has to
                # stay.
                self._unite(max(int(entering[channel * groups // len(numbers)]), FIXED), int(number))
        elif groups > 1:
            sides = [list(np.split(entering, groups)), list(np.split(numbers, groups))]
            self.blocks.append(Blocks(sides, may_vanish=True))

    def _function(
        self, n: torch.fx.Node, args: Any, kwargs: Any, labels: list[torch.Tensor], shape: tuple[int, ...] | None
    ) -> Any:
        name = plain_name(n)
        # Numbers in place of an index that is computed would pick at random, so such a choice isn't run on them.
        indexed = name in INDEXED and bool(tensors_of((args[1:], kwargs)))
        if name in ("cat", "concat", "concatenate", "stack"):
            self._join(labels, kwargs.get("dim", args[1] if len(args) > 1 else 0), is_new=name == "stack")
        if (shape is None or name in MOVES) and not indexed:
            return self._move(n, shape, trusted=name in MOVES)
        # What is made of no traced tensor (torch.zeros) is a constant: its channels stay, and so do those that meet it.
        if shape is None or not labels:
            return None if shape is None else torch.zeros(shape, dtype=torch.int64)
        if name in MEETS and len(labels) > 1:
            return self._meet(labels, shape)
        if name in REDUCTIONS and len(labels) == 1:
            return carry_reduced(labels[0], shape)
        # A functional layer on parameters of the model's own, which nobody cuts.
        if len(labels) > 1 and any(node.op == "get_attr" for node in n.all_input_nodes):
            self._pin(labels)
            return labels[0] if tuple(labels[0].shape) == shape else torch.full(shape, UNKNOWN)
        passed = carry(labels[0], shape) if len(labels) == 1 else None
        return torch.full(shape, UNKNOWN) if passed is None else passed

    def _move(self, n: torch.fx.Node, shape: tuple[int, ...] | None, *, trusted: bool) -> Any:
        """Run a function on the numbers themselves: data movement, or arithmetic on sizes."""
        try:
            moved = super().run_node(n)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return None if shape is None else torch.full(shape, UNKNOWN)
        # In the dense model too chunk makes equal pieces of what it gets, so all of them have to lose equally many.
        if plain_name(n) == "chunk" and moved[0].dim() > 1 and len({piece.shape for piece in moved}) == 1:
            side = [self._per_channel(piece, 1) for piece in moved]
            self.blocks.append(Blocks([side], may_vanish=False))
        # A function that may compute with the numbers gives sizes that hold, but tensors that name no channels.
        return moved if trusted else tree_map(unknown, moved)

    def _pin(self, labels: list[torch.Tensor]) -> None:
        """Keep channels that enter something whose weights can't be cut."""
        for entering in labels:
            self._tie(entering, torch.zeros(1, dtype=torch.int64))

    def _meet(self, labels: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """Tie what meets elementwise; an operand that is broadcast along the channels ties nothing."""
        full = [entry.view((1,) * (len(shape) - entry.dim()) + tuple(entry.shape)) for entry in labels]
        # Which dimension holds the channels isn't known; it is one along which numbers differ.
        varying = {d for entry in full for d in range(1, len(shape)) if varies(entry, d)}
        tied = [entry for entry in full if all(entry.shape[d] == shape[d] for d in varying)]
        for other in tied[1:]:
            self._tie(tied[0], other)
        return (tied or full)[0].expand(shape)

    def _join(self, labels: list[torch.Tensor], dim: int, *, is_new: bool) -> None:
        """Tie what is joined along another dimension than that of the channels."""
        # A slice in which numbers still differ has its channels in another dimension, where they meet those of the
        # others.
        slices = [entry.unsqueeze(dim) if is_new else entry.narrow(dim, 0, 1) for entry in labels]
        if all(any(varies(entry, d) for d in range(1, entry.dim())) for entry in slices):
            for other in slices[1:]:
                self._tie(slices[0], other)

    def _tie(self, one: torch.Tensor, other: torch.Tensor) -> None:
        one, other = torch.broadcast_tensors(one, other)
        # Along a dimension in which neither differs (batch, pixels) one place says all, and few pairs are left to sort.
        for d in range(one.dim()):
            if not (one.shape[d] == 0 or varies(one, d) or varies(other, d)):
                one, other = one.narrow(d, 0, 1), other.narrow(d, 0, 1)
        pairs = np.stack([one.reshape(-1).numpy(), other.reshape(-1).numpy()])
        for first, second in np.unique(pairs, axis=1).T:
            self._unite(int(first), int(second))

    def _per_channel(self, labels: torch.Tensor, dim: int) -> np.ndarray:
        """Reduce labels to one a channel; those that share a channel are tied."""
        rows = labels.transpose(0, dim)
        # The usual case, all places of a channel alike, is one comparison; ties are looked for only where it fails.
        first = rows[(slice(None),) + (slice(0, 1),) * (rows.dim() - 1)]
        if not torch.equal(first.expand(rows.shape), rows):
            self._tie(first, rows)
        return first.reshape(-1).numpy()

    def _root(self, number: int) -> int:
        if number < 0:
            return number  # UNKNOWN is tied to nothing: it represents itself
        # Union-find; halving the path on the way keeps it short.
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def _unite(self, one: int, other: int) -> None:
        if one >= 0 and other >= 0:
            roots = self._root(one), self._root(other)
            # The smaller number leads: FIXED, 0, does wherever it is met, else the layer that came first.
            self._parents[max(roots)] = min(roots)
