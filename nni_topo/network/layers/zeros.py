"""Networks of which single weights were pruned: how many are left, and training that leaves the zeros alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nni_topo.errors import checked
from nni_topo.network.layers.kinds import WEIGHTED
from nni_topo.network.runtime import MODEL


@checked(model=MODEL)
@contextmanager
def zeros_held(model: nn.Module) -> Iterator[None]:
    """Keep the weights that are zero at zero while a network trains.

    Masks of single weights leave zeros in the network that :func:`~nni_topo.to_dense` returns. Within this context the
    gradients at zeros of the weights of convolutions and linear layers are zero, and so are the zeros themselves after
    every optimizer's step, whatever it does with momentum, weight decay or whole matrices.

    Parameters
    ----------
    model : torch.nn.Module
        The network, not wrapped by a pruner. Weights shared between layers count once.

    Notes
    -----
    A copy of the network that is made within the context isn't held, nor is a weight that a parametrization computes.

    Examples
    --------
    >>> import torch
    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 2.0]]))
    >>> with zeros_held(layer):
    ...     layer(torch.ones(1, 2)).sum().backward()
    >>> layer.weight.grad.tolist()
    [[0.0, 1.0]]
    """
    held = [(weight, weight != 0) for weight in _weights(model) if weight.requires_grad and not bool(weight.all())]
    handles = [weight.register_hook(lambda gradient, kept=kept: gradient * kept) for weight, kept in held]

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for weight, kept in held:
            if weight.is_leaf:
                weight.mul_(kept.to(weight.device))

    handles.append(register_optimizer_step_post_hook(restore))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights_left(model: nn.Module) -> int:
    """Count the parameters without the zeros in the weights of convolutions and linear layers."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - sum(int((weight == 0).sum()) for weight in _weights(model))


def _weights(model: nn.Module) -> list[Tensor]:
    """Return the weights of all convolutions and linear layers, each once."""
    found = (module.weight for module in model.modules() if isinstance(module, WEIGHTED))
    return list({id(weight): weight for weight in found}.values())
