"""Layers that make channels: how many, and where their weights hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from nni_topo.errors import unknown_name

CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)


PER_CHANNEL = (
    torch.nn.modules.batchnorm._NormBase,
    torch.nn.GroupNorm,
    torch.nn.LayerNorm,
    torch.nn.PReLU,
)
"""Modules that hold one number a channel, and leave channels where they are."""


def can_be_cut(module: torch.nn.Module) -> bool:
    """Tell whether a module can be made smaller, or has nothing to be cut.

    Parameters
    ----------
    module : torch.nn.Module
        Any module that is called as a whole.

    Returns
    -------
    bool
        False for a module with parameters that is no convolution, linear layer, embedding, norm or PReLU: for a
        recurrent layer or attention, say.
    """
    known = output_channels(module) is not None or isinstance(module, PER_CHANNEL)
    return known or not any(True for _ in module.parameters())


def is_depthwise(module: torch.nn.Module) -> bool:
    """Tell whether a convolution filters each input channel by itself.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Returns
    -------
    bool
        True for a convolution with as many groups as input channels, of which there are at least two.
    """
    if not isinstance(module, CONVOLUTIONS + TRANSPOSED):
        return False
    return module.groups == module.in_channels and module.groups > 1


def output_channels(module: torch.nn.Module) -> int | None:
    """Count the output channels of a layer that makes new channels.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Returns
    -------
    int or None
        The count; None if the module is no convolution, linear layer or embedding.
    """
    if isinstance(module, CONVOLUTIONS + TRANSPOSED):
        return int(module.out_channels)
    if isinstance(module, torch.nn.Linear):
        return int(module.out_features)
    return int(module.embedding_dim) if isinstance(module, torch.nn.Embedding) else None


def channel_dimension(module: torch.nn.Module) -> int:
    """Tell which dimension of a layer's weight holds its output channels.

    Parameters
    ----------
    module : torch.nn.Module
        A layer with a weight.

    Returns
    -------
    int
        1 for a transposed convolution and an embedding, else 0.
    """
    return 1 if isinstance(module, (*TRANSPOSED, torch.nn.Embedding)) else 0


def kept_channels(module: torch.nn.Module, targets: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Tell which output channels a layer's masks keep.

    Parameters
    ----------
    module : torch.nn.Module
        A convolution, linear layer or embedding.
    targets : mapping of str to Tensor
        Its masks, of the parameters' shapes.

    Returns
    -------
    Tensor of bool, shape (channels,), or None
        True where anything of the channel's weights is kept; None if its weight isn't masked or the
        module doesn't make channels.
    """
    count, mask = output_channels(module), targets.get("weight")
    if count is None or mask is None:
        return None
    return by_output(mask, module).flatten(1).ne(0).any(1)


def by_output(weight: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """Put a weight's, or its mask's, output channels into the first dimension.

    Parameters
    ----------
    weight : Tensor
        As the module holds it.
    module : torch.nn.Module
        A convolution, linear layer or embedding.

    Returns
    -------
    Tensor, shape (channels, ...)
    """
    if isinstance(module, TRANSPOSED):  # weight: (in, out / groups, ...)
        grouped: torch.Tensor = weight.unflatten(0, (module.groups, -1))
        return grouped.transpose(1, 2).flatten(0, 1)
    return weight.transpose(0, 1) if channel_dimension(module) else weight


def spread(module: torch.nn.Module, kept: torch.Tensor) -> torch.Tensor:
    """Turn kept output channels into a mask of the layer's weight.

    Parameters
    ----------
    module : torch.nn.Module
        A convolution, linear layer or embedding.
    kept : Tensor of bool, shape (channels,)
        The channels to keep.

    Returns
    -------
    Tensor, shape of the weight
        Ones for the weights of kept channels, else zeros.
    """
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    kept = kept.to(dtype=weight.dtype, device=weight.device)
    if isinstance(module, TRANSPOSED):
        rows = kept.view(module.groups, 1, -1).expand(-1, weight.shape[0] // module.groups, -1).flatten(0, 1)
        return rows.view(rows.shape + (1,) * (weight.dim() - 2)).expand_as(weight).clone()
    view = [1] * weight.dim()
    view[channel_dimension(module)] = -1
    return kept.view(view).expand_as(weight).clone()


def check_names(model: torch.nn.Module, config_list: Iterable[Any]) -> None:
    """Check that a model has the layers that a config_list names.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    config_list : iterable of dict
        NNI's config_list; what isn't a dict is passed over.

    Raises
    ------
    ConfigError
        If an ``op_names`` holds a name that is no module's; NNI says nothing or raises a KeyError.
    """
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for config in config_list:
        for name in (config.get("op_names") or ()) if isinstance(config, dict) else ():
            if name not in known:
                raise unknown_name("a layer", str(name), known)
