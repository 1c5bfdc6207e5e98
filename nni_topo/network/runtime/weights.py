"""Other weights in a copy of a network: random ones, and ones of another precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.runtime.modules import cast_tensor, put_attribute


class RandomWeights:
    """Random numbers for a network's weights, which layers share: to draw them all takes longer than to run it."""

    _DRAWN = 262_147  # a prime, so that no two rows of a layer hold the same numbers
    _APART = 4096  # layers begin at different places

    def __init__(self, draw: Callable[..., Tensor], generator: torch.Generator | None = None) -> None:
        self._drawn = draw(self._DRAWN, generator=generator, device="cpu")
        self._scaled: dict[tuple[torch.device, float], Tensor] = {}
        self._start = 0

    def like(self, weight: Tensor, scale: float, shift: float = 0.0) -> Tensor:
        """Return single-precision numbers ``scale * drawn + shift`` in the shape of a weight."""
        key, count = (weight.device, scale), weight.numel() + self._APART
        if key not in self._scaled or self._scaled[key].numel() < count:
            scaled = (self._drawn[:count] * scale + shift).to(weight.device)
            self._scaled[key] = scaled.repeat(-(-count // scaled.numel()))
        # An even place: complex numbers can be seen in the weights from there alone.
        self._start = (self._start + 102) % self._APART
        return self._scaled[key][self._start : self._start + weight.numel()].view(weight.shape)


def put_parameters(model: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Replace a model's real and complex parameters, by full name; one in several places stays one."""
    made = dict[int, tuple[Tensor, nn.Parameter]]()  # with the old one, so that no other gets its id
    for name, module in model.named_modules():
        for own, old in list(module._parameters.items()):
            if old is not None and (old.is_floating_point() or old.is_complex()):
                if id(old) not in made:
                    new = make(f"{name}.{own}".lstrip("."), old.detach())
                    made[id(old)] = old, nn.Parameter(new, requires_grad=False)
                put_attribute(module, own, made[id(old)][1])


def to_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model to single or double precision, in place: its floats, and complex numbers to complex ones."""
    model._apply(partial(cast_tensor, dtype=dtype))
    return model


def in_double(model: nn.Module) -> nn.Module:
    """Return a copy that computes in double precision; large weights, the model's own, are cast as they are read."""
    copied: nn.Module = detached_copy(model, light=True)
    as_read: list[tuple[nn.Module, nn.Parameter]] = []
    for module in copied.modules():
        weight = module._parameters.get("weight")
        is_usual = isinstance(module, _READ_BY_FORWARD) and type(module)._apply is nn.Module._apply
        if is_usual and weight is not None and weight.is_floating_point():
            as_read.append((module, weight))
            del module._parameters["weight"]
    put_parameters(copied, lambda _, old: old.clone())  # casting works in place
    to_precision(copied, torch.float64)
    for module, weight in as_read:
        module._parameters["weight"] = weight
        kind = type(module)
        if kind not in _DOUBLING:
            own = {"weight": property(_weight_in_double), "__module__": kind.__module__}
            _DOUBLING[kind] = type(kind.__name__, (kind,), own)
        module.__class__ = _DOUBLING[kind]
    return copied


_READ_BY_FORWARD = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
_DOUBLING: dict[type[nn.Module], type[nn.Module]] = {}


def _weight_in_double(module: nn.Module) -> Tensor:
    own = module._parameters["weight"]
    assert own is not None  # a layer without weight keeps its class
    return own.double()
