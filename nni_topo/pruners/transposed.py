"""Transposed convolutions, whose weights hold the output channels in the second dimension: ``(in, out / groups, ...)``.

NNI prunes the first dimension of every weight and gives the bias the same mask: of a transposed convolution the input
channels go, and the bias, one entry per output channel, doesn't fit or loses the wrong entries.
"""

from __future__ import annotations

from typing import Any

from nni.compression.base.target_space import PruningTargetSpace, TargetType
from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def output_granularity(space: PruningTargetSpace) -> list[Any] | str | None:
    """Return the granularity at which a transposed convolution's weight loses whole output channels.

    Parameters
    ----------
    space : PruningTargetSpace
        Any target.

    Returns
    -------
    list, str or None
        ``"in_channel"``, NNI's name for the second dimension; with several groups the block's extent, so that the
        metric has shape ``(groups, out / groups, 1, ...)``, flat in the order of the output channels. None if the
        target isn't such a weight.
    """
    if space.type is not TargetType.PARAMETER or not isinstance(module := space._wrapper.module, TRANSPOSED):
        return None
    return "in_channel" if module.groups == 1 else [[module.in_channels // module.groups, 1], "back", -1]


def follow_outputs(target_spaces: dict[str, dict[str, PruningTargetSpace]]) -> None:
    """Let the groups of transposed convolutions lose as many channels each, and their biases what the weights lose.

    Parameters
    ----------
    target_spaces : dict
        NNI's target spaces, changed in place where a weight has the granularity of :func:`output_granularity`.
    """
    for spaces in target_spaces.values():
        for space in spaces.values():
            source = spaces.get(space.align["target_name"]) if space.align is not None else None
            if source is not None and loses_outputs(source):
                space._setting["align"] = {**space.align, "dims": [1]}
            if loses_outputs(space) and not space.internal_metric_block:
                module = space._wrapper.module
                grouped = 1 < module.groups < module.in_channels
                space._setting["internal_metric_block"] = module.groups if grouped else None


def loses_outputs(space: Any) -> bool:
    """Tell whether a target is a transposed convolution's weight that loses output channels."""
    granularity = output_granularity(space)
    return granularity is not None and space.granularity == granularity


def output_mask(weight_mask: Tensor, module: nn.Module) -> Tensor:
    """Return which output channels a mask of a transposed convolution's weight keeps.

    Parameters
    ----------
    weight_mask : torch.Tensor
        Shape ``(in, out / groups, ...)``.
    module : torch.nn.Module
        The transposed convolution.

    Returns
    -------
    torch.Tensor
        Shape ``(out,)``, of zeros and ones.
    """
    groups: int = module.groups  # type: ignore[assignment]
    rows = weight_mask.reshape(groups, len(weight_mask) // groups, weight_mask.shape[1], -1)
    return rows.amax((1, 3)).flatten()
