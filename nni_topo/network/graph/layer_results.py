"""What layers gave when a model ran, so that another run on the same values doesn't compute it again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nni_topo.network.layers import is_inner
from nni_topo.network.runtime import difference

_SAME = 1e-5  # of the largest value; sums in another order, as attention may compute them, are far below
_SPARE_BYTES = 1 << 28


class LayerResults(TorchFunctionMode):
    """What convolutions and products with a model's weights got and gave, as far as it fits into memory.

    A later run that gives them the same, or it twice, as a run on twice the samples does, gets the same back. All else
    is computed, so that what differs shows where it enters the next layer, or in what the run puts out.
    """

    def __init__(self, model: nn.Module, spare_bytes: int = _SPARE_BYTES) -> None:
        super().__init__()
        self._weights = {id(parameter) for parameter in model.parameters()}
        # What a model's weights take, its activations may take too; small networks may keep some more.
        self._bytes = spare_bytes + sum(parameter.nbytes for parameter in model.parameters())
        self._left = 0
        self._taking = False
        self._seen: dict[Any, list[tuple[Tensor, int, Tensor, Any]]] = defaultdict(list)  # by function and weight
        self._places: dict[Any, int] = {}  # the next call to come

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take what layers give within the block; nothing is known from before."""
        self._seen.clear()
        self._left, self._taking = self._bytes, True
        with self:
            yield

    @contextmanager
    def given(self) -> Iterator[None]:
        """Give it back within the block, in the same order."""
        self._places, self._taking = {}, False
        with self:
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, or return what it gave."""
        kwargs = kwargs or {}
        if not is_inner(func) or len(args) < 2 or id(args[1]) not in self._weights:
            return func(*args, **kwargs)
        entering = args[0]
        key = func, id(args[1])
        settings = [id(each) if isinstance(each, Tensor) else each for each in (*args[2:], *kwargs.values())]
        if not self._taking:
            place = self._places.get(key, 0)
            self._places[key] = place + 1
            known = self._seen.get(key, [])
            found = self._known(known[place], entering, settings) if place < len(known) else None
            return func(*args, **kwargs) if found is None else found
        out = func(*args, **kwargs)
        if not isinstance(entering, Tensor) or entering.is_inference() or self._left < 0:
            self._left = -1  # a call that isn't noted would leave the next one in its place
            return out
        self._left -= entering.nbytes + out.nbytes
        if self._left >= 0:
            # A copy, for the model may write into it, as an activation in place does.
            self._seen[key].append((entering, entering._version, out.clone(), settings))
        return out

    def _known(self, call: tuple[Tensor, int, Tensor, Any], entering: Any, settings: Any) -> Tensor | None:
        before, version, given, known_settings = call
        if not isinstance(entering, Tensor) or before._version != version or settings != known_settings:
            return None
        if before.shape == entering.shape:
            return given.clone() if difference(before, entering) <= _SAME else None
        if before.dim() < 2 or entering.shape != (2 * len(before), *before.shape[1:]):
            return None
        for half in entering.chunk(2):
            if not difference(before, half) <= _SAME:
                return None
        return torch.cat([given, given])
