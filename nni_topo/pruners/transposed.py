"""Transposed convolutions, whose weights hold the output channels in the second dimension: ``(in, out / groups, ...)``.

NNI prunes the first dimension of every weight and gives the bias the same mask: of a transposed convolution the input
channels go, and the bias, one entry per output channel, doesn't fit or loses the wrong entries.
"""

from __future__ import annotations

from typing import Any

from nni.compression.base.target_space import PruningTargetSpace, TargetType
from torch import Tensor, nn

from nni_topo.network.layers import TRANSPOSED


def output_granularity(space: PruningTargetSpace) -> list[Any] | str | None:
    """Return the granularity at which a transposed convolution's weight loses output channels; None for others."""
    if space.type is not TargetType.PARAMETER or not isinstance(module := space._wrapper.module, TRANSPOSED):
        return None
    # NNI's name for the second dimension; with groups the metric is (groups, out / groups, 1, ...), flat in the order
    # of the output channels.
    return "in_channel" if module.groups == 1 else [[module.in_channels // module.groups, 1], "back", -1]


def follow_outputs(target_spaces: dict[str, dict[str, PruningTargetSpace]]) -> None:
    """Let the groups of transposed convolutions lose as many channels each, and their biases what the weights do."""
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
    """Return the output channels, 0 or 1, ``(out,)``, that a transposed mask ``(in, out / groups, ...)`` keeps."""
    groups: int = module.groups  # type: ignore[assignment]
    rows = weight_mask.reshape(groups, len(weight_mask) // groups, weight_mask.shape[1], -1)
    return rows.amax((1, 3)).flatten()
