"""PyTorch's attention and transformer layers without their fast paths, so that hooks and masks work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.fx
from torch import nn

from nni_topo.network.attention.unfused.multihead import is_whole, stepwise_class


@contextmanager
def fast_paths_off() -> Iterator[None]:
    """Let attention and transformer layers compute what they say, step by step, for a while."""
    # The fast paths turn padded batches into nested tensors, on which hooks and masks can't work.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def mixing_called(*models: nn.Module) -> Iterator[None]:
    """Let attention call the layer that mixes its heads, and others of it, so that hooks see them."""
    with ExitStack() as undone:
        for module in (each for model in models for each in model.modules() if is_whole(each)):
            kind: Any = stepwise_class(module)
            # NNI's wrapper keeps the forward that it calls.
            place = vars(getattr(module, "_nni_wrapper", module))
            key = "forward" if place is vars(module) else "module_forward"
            undone.callback(partial(place.__setitem__, key, place[key]) if key in place else partial(place.pop, key))
            place[key] = partial(kind.forward, module)
        with fast_paths_off():
            yield
