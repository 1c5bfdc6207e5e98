"""What must go of networks of which half of every layer's channels are asked for, and which layers may stay.

A layer that is kept by a poor rule computes nothing wrong, so only a table of what is possible shows it.
``must_go.txt`` has a row for each network of the zoo and of ``make reliability``::

    network | channels that go / channels of its layers | layers that may stay | requests that may change nothing

A network's name begins with the list that holds it: ``operators/relu``, ``networks/VGG``, ``torchvision/resnet18``.
Layers and requests are written ``names: reason``, separated by semicolons; names are separated by commas, and ``*`` in
a name stands for any characters. Rows were made once by a run and read by a person: a layer that may stay needs a
reason that is true of the network, not only of the rules of this package.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

TABLE = Path(__file__).with_suffix(".txt")

Counts = Mapping[str, tuple[int, int] | list[int]]
"""By layer the channels that are left, and the channels of the unpruned network."""


@dataclass(frozen=True)
class Row:
    """What must go of one network."""

    removed: int
    channels: int
    layers: dict[str, str]  # patterns of layers that may stay, with the reason
    requests: dict[str, str]  # patterns of requests that may change nothing, with the reason

    def may_change_nothing(self, request: str) -> bool:
        """Tell whether a request may leave all channels, or be refused."""
        return not self.removed or matching(self.requests, request)

    def problems(self, counts: Counts) -> list[str]:
        """Say what stays that must go, and which patterns of the row no longer match a layer that stays."""
        channels = sum(n for _, n in counts.values())
        removed = channels - sum(left for left, _ in counts.values())
        staying = [layer for layer, (left, n) in counts.items() if left == n > 1]
        found = [f"{layer} must lose channels" for layer in staying if not matching(self.layers, layer)]
        if channels != self.channels or removed < self.removed:
            found.append(f"{self.removed}/{self.channels} channels must go, got {removed}/{channels}")
        unused = [pattern for pattern in self.layers if not fnmatch.filter(staying, pattern)]
        return found + [f"{pattern} loses channels, so it needs no entry" for pattern in unused]


def matching(patterns: Iterable[str], name: str) -> bool:
    """Tell whether a name matches any of some patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def read_table(path: Path = TABLE) -> dict[str, Row]:
    """Read the rows by network."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        name, numbers, layers, requests = (f"{line} | |".split("|")[place].strip() for place in range(4))
        removed, _, channels = numbers.partition("/")
        rows[name] = Row(int(removed), int(channels), _signed(layers), _signed(requests))
    return rows


def _signed(text: str) -> dict[str, str]:
    reasons = {}
    for part in filter(None, text.split("; ")):
        names, _, reason = part.partition(": ")
        reasons |= dict.fromkeys(names.split(", "), reason)
    return reasons


def channels_left(model: nn.Module, shapes: Mapping[str, Iterable[int]], kinds: Iterable[str]) -> dict[str, list[int]]:
    """Count the channels of the layers of some types, after and before.

    Parameters
    ----------
    model : Module
        The unpruned network.
    shapes : dict of str to sizes
        The shapes of the dense network's parameters and buffers.
    kinds : iterable of str
        Names of types of PyTorch's layers; layers of derived classes count too.

    Returns
    -------
    dict of str to [int, int]
        Of layers whose weight the dense network has under the same name.
    """
    types = tuple(getattr(nn, kind) for kind in kinds)
    counts = {}
    for layer, module in model.named_modules():
        if not isinstance(module, types):
            continue
        key, place = "weight", 0
        if isinstance(module, nn.RNNBase):
            key, place = "weight_hh_l0", 1
        elif isinstance(module, _ConvTransposeNd) and module.groups > 1:
            key = "bias"
        elif isinstance(module, (_ConvTransposeNd, nn.Embedding)):
            place = 1
        sizes = shapes.get(f"{layer}.{key}")
        if sizes is not None:
            before = channels_of(module)
            counts[layer] = [list(sizes)[place], before]
    return counts


def channels_of(module: nn.Module) -> int:
    """Return the channels that a layer of the unpruned network makes."""
    if isinstance(module, nn.RNNBase):
        return module.hidden_size
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    return module.out_channels if isinstance(module, _ConvNd) else module.out_features
