"""Which parameters no recovery changes: those that don't require gradients, in a model where others do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from nni_topo.errors import listed

_NAMES = 8  # layers that a sentence names
FROZEN = "frozen (requires_grad=False), while other parameters aren't"
"""Reason why a recovery leaves a layer as it is."""


def frozen_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that a recovery leaves as they are.

    There are none if no parameter requires gradients: then the model was frozen because it was only used, not because
    nothing may change.
    """
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point() or parameter.is_complex()
    }
    frozen = frozenset(name for name, parameter in parameters.items() if not parameter.requires_grad)
    return frozen if len(frozen) < len(parameters) else frozenset()


def frozen_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that hold `frozen_parameters`; the model's own name is empty."""
    holders = {name.rpartition(".")[0] for name in frozen_parameters(model)}
    return tuple(name for name, _ in model.named_modules() if name in holders)


def told_of_frozen(layers: Sequence[str]) -> str:
    """Return a sentence on the layers that hold frozen parameters, for reports."""
    named = listed([name or "the model itself" for name in layers], _NAMES)
    return (
        f"no recovery changes the frozen parameters (requires_grad=False) of {named}; in a model without trainable "
        "parameters, as model.requires_grad_(False) makes it, all are recovered"
    )
