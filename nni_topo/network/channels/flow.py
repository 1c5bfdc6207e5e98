"""Which channels of a network can only be removed together.

Every output channel of every layer gets a number. The numbers travel through the graph in place of the values
(`numbering`), so ties are found channel by channel and not only layer by layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.fx
from torch.utils._pytree import tree_map

from nni_topo.network.attention import Attention, attend
from nni_topo.network.channels import reasons
from nni_topo.network.channels.ids import FIXED, Blocks, Layer, fixed
from nni_topo.network.channels.propagate import Propagation
from nni_topo.network.channels.rules import FixedPlaces, has_property, is_looked_at, rule_of
from nni_topo.network.graph import IN_TRAINING, TRAINED_OUTPUT, TracedInt, counted, place, tensor_shape
from nni_topo.network.layers import TRANSPOSED, Place
from nni_topo.network.runtime import tensors_of


class ChannelFlow(Propagation):
    """Follow the channels of a traced model, on its arguments, and answer what they have to do with one another."""

    def __init__(self, graph_module: torch.fx.GraphModule, args: tuple[Any, ...], missed: str = "") -> None:
        super().__init__(graph_module)
        self.missed = missed  # what is known of modules that only training mode may reach, and that aren't followed
        with torch.no_grad():
            outputs = self.run(*tree_map(fixed, args))
        self.in_training = self._set_apart()
        written = counted(graph_module.graph, self.numbers)
        self._keep_fixed_places(written.keys())
        self._before, self._roots, self._reasons = self._given.settled()
        # Channels at the model's output, which have to stay. FIXED ones stay anyway.
        arriving = [np.unique(labels.numpy()) for labels in tensors_of(outputs)]
        group_ids = np.unique(self.group_ids(np.concatenate([*arriving, np.zeros(0, dtype=np.int64)])))
        self.at_output = group_ids[group_ids > FIXED]
        self._written = {
            place: (
                uses[0][0],
                [np.array(each, dtype=np.int64) for each in dict.fromkeys(tuple(self.group_ids(c)) for _, c in uses)],
            )
            for place, uses in written.items()
        }
        # One number can only count equally many.
        self.blocks += [Blocks([each], may_vanish=False) for _, each in self._written.values() if len(each) > 1]

    def _set_apart(self) -> dict[str, Layer]:
        """Take out of the layers those that run in training alone, and let them and what they put out stay.

        They read fewer channels where a layer before them loses some. What they make of these nobody has measured.
        """
        modes = dict[str, bool]()  # by what is called, whether that is in training alone
        for node in self.traced.graph.nodes:
            if node.op == "call_module" or node.target is attend:
                holder: Any = node if node.op == "call_module" else node.args[0]
                modes[str(holder.target)] = modes.get(str(holder.target), True) and IN_TRAINING in node.meta
            if node.meta.get(TRAINED_OUTPUT):
                for labels in tensors_of(self.numbers[node.name]):
                    self._given.pin(np.unique(labels.numpy()), reasons.training_output())
        owners = {layer: name for name, each in self.attention.items() for layer in each.channels}
        found = dict[str, Layer]()
        for name in list(self.layers):
            if modes.get(owners.get(name, name), False):
                self._given.pin(self.channel_ids_of(name), reasons.training_only(name))
                found[name] = self.layers.pop(name)
                # What heads are cut with counts heads, which these keep.
                if self.heads.pop(name, None) is not None:
                    self._given.pin(self._entering[name], reasons.training_reader(name))
        return found

    def _keep_fixed_places(self, following: Collection[Place]) -> None:
        """Keep channels that a forward picks or counts by fixed numbers, as ``z[:, 1:4]`` or ``z.split(3, 1)``.

        The numbers stay as they are in the dense model, so the channels that they count have to stay too: in front of
        ``z[:, 4]`` there must be four channels, whichever these are; what comes behind may go. A number that the
        forward takes from a shape, or from an attribute that counts channels, one of ``following``, follows the
        channels and keeps none.
        """

        def is_fixed(value: Any) -> bool:
            return isinstance(value, int) and not (isinstance(value, TracedInt) and value.place in following)

        for node in self.traced.graph.nodes:
            rule, parent = rule_of(node), node.args[0] if node.args else node.kwargs.get("input")
            if rule is None or rule.held is None or not isinstance(parent, torch.fx.Node):
                continue
            entering, shape = self.numbers.get(parent.name), tensor_shape(parent)
            if not isinstance(entering, torch.Tensor) or shape is None:
                continue
            for dim, size in enumerate(shape):
                # Where channels are spread over several dimensions, as heads are, no place in one is that of a channel.
                if not entering.shape[dim] == entering.numel() == size > 1:
                    continue
                held = np.zeros(size, dtype=np.bool_)
                for part in rule.held(FixedPlaces(node, dim, shape, is_fixed, self.picks)):
                    held[part] = True
                if held.any():
                    self._given.pin(entering.flatten().numpy()[held], reasons.fixed_channels(node))

    def group_ids(self, numbers: np.ndarray) -> np.ndarray:
        """Look up representatives, int, shape (n,): one for channels that are tied, ``FIXED`` if they stay."""
        found: np.ndarray = self._roots[numbers]
        return found

    def sizes_kept(self, left: np.ndarray) -> dict[Place, int]:
        """Count anew what attributes of the model count, given which representatives stay."""
        return {place: parts * int(left[each[0]].sum()) for place, (parts, each) in self._written.items()}

    @property
    def shuffles(self) -> bool:
        """Whether the network cuts into equal pieces what it puts into another order."""
        return self.reorders and self.chunks

    @property
    def size(self) -> int:
        """How many numbers there are, ``FIXED`` among them."""
        return len(self._roots)

    def group_ids_of(self, name: str) -> np.ndarray:
        """Look up the representatives of a layer's output channels: int, shape (channels,)."""
        return self.group_ids(self.channel_ids_of(name))

    def kept(self, chosen: Mapping[str, np.ndarray]) -> np.ndarray:
        """Tell which channels stay if layers keep the chosen ones: bool, by group id.

        ``chosen``: by layer, bool, shape (channels,) or (heads,). A channel stays as soon as one coupled with it does.
        A layer that isn't chosen for keeps all, but for a depth-wise one, which follows the layer before it.
        """
        kept, stated = np.zeros(self.size, dtype=np.bool_), np.zeros(self.size, dtype=np.bool_)
        for name, layer in self.layers.items():
            ids, own = self.group_ids_of(name), chosen.get(name)
            if own is not None and len(own) < len(ids):
                ids = self.group_ids(self.unit_channel_ids(name))
            # Of a layer that mixes heads, the choice may be one of columns.
            if own is not None and len(own) == len(ids):
                kept[ids[own]] = True
                stated[ids] = True
            elif not layer.depthwise:
                kept[ids] = True
                stated[ids] = True
        kept[FIXED] = True
        return kept | ~stated

    def coupled_with(self, name: str) -> list[str]:
        """List the other layers that share a channel with a layer, channels that stay included, in network order."""
        shared = np.unique(self._before[self.channel_ids_of(name)])
        return [
            other
            for other in self.layers
            if other != name and np.isin(self._before[self.channel_ids_of(other)], shared).any()
        ]

    def why_pinned(self, name: str) -> reasons.Reasons:
        """Return why channels of a layer stay in any case, each reason once."""
        group_ids = self._before[self.channel_ids_of(name)].tolist()
        return tuple(dict.fromkeys(self._reasons[root] for root in group_ids if root in self._reasons))

    def reaches_output(self, name: str) -> bool:
        """Tell whether any channel of a layer is one of the model's output, so that it has to stay."""
        return bool(np.isin(self.group_ids_of(name), self.at_output).any())

    def entering_group_ids(self, name: str) -> np.ndarray:
        """Look up the representatives of what enters a layer or norm: int, shape (input channels,)."""
        return self.group_ids(self.entering_channel_ids(name))

    def entering_channel_ids(self, name: str) -> np.ndarray:
        """Look up what enters a layer or norm, as numbered by the layers before: int, (input channels,)."""
        # An embedding is entered by indices, so by no channels; a linear layer behind a flattening one, by features.
        return self._entering.get(name, np.zeros(0, dtype=np.int64))

    def read(self) -> list[tuple[np.ndarray, str]]:
        """List the channels that layers and norms read, and those that are picked of others: roots, and who does."""
        found = [(self.group_ids(entering), name) for name, entering in self._entering.items() if len(entering)]
        for node in self.traced.graph.nodes:
            labels = self.numbers[node.name]
            picks = has_property(node, "picks") and not is_looked_at(node)
            # What moves, or meets others, may have no channels.
            picks = picks and not all(has_property(user, "meets") or has_property(user, "moves") for user in node.users)
            if picks and isinstance(labels, torch.Tensor) and labels.numel():
                found.append((np.unique(self.group_ids(labels.numpy())), place(node)))
        return found

    def units(self, name: str) -> np.ndarray:
        """List a layer's output channels by what goes together, as a head does: int, (bundles, channels)."""
        if name in self.heads:
            return self.heads[name].channels[name]
        return np.arange(self.layers[name].channels).reshape(-1, self._unit_size(name))

    def unit_channel_ids(self, name: str) -> np.ndarray:
        """List the first number of each of a layer's bundles: int, (bundles,)."""
        numbers: np.ndarray = self.channel_ids_of(name)[self.units(name)[:, 0]]
        return numbers

    def _unit_size(self, name: str) -> int:
        """Count the neighbouring channels of a layer that only go together, as those that a pixel shuffle spreads."""
        group_ids = self.group_ids_of(name)
        starts = np.flatnonzero(np.diff(group_ids, prepend=-1))
        size = len(group_ids) // len(starts)
        # NNI can't state blocks of a transposed convolution's channels.
        if size == 1 or FIXED in group_ids or isinstance(self.fetch_attr(name), (*TRANSPOSED, torch.nn.Embedding)):
            return 1
        is_even = len(np.unique(group_ids[starts])) == len(starts) and np.array_equal(
            starts, np.arange(len(starts)) * size
        )
        # A depth-wise convolution that makes several channels of each follows the layer before it.
        follows = self.layers[name].depthwise and len(self.entering_channel_ids(name)) < len(group_ids)
        return size if is_even and not follows else 1

    def output_projections(self) -> dict[str, Attention]:
        """Return the linear layers that read all heads of attention and nothing else, by name."""
        found: dict[str, Attention] = {}
        for attention in dict.fromkeys(each.name for each in self.heads.values()):
            if self.attention[attention].recurrent:
                continue
            layer, order = self.attention[attention].context
            context = self.group_ids_of(layer)[order]
            found |= {
                name: self.attention[attention]
                for name in self.layers
                if FIXED not in context and np.array_equal(self.entering_group_ids(name), context)
            }
        return found
