"""Transposed convolutions, whose weights hold the output channels in the second dimension: ``(in, out / groups, ...)``.

NNI takes the first dimension of every weight as the output channels and gives the bias the same mask. So by itself it
prunes input channels of a transposed convolution, and the mask doesn't fit the bias or masks the wrong entries. Here
the blocks of such a weight are its output channels, for the package's pruners and for NNI's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.utils.scaling import Scaling
from torch import Tensor

from nni_topo.network.layers.kinds import TRANSPOSED, channels_swapped
from nni_topo.pruners.units import TargetSpaces


class OutputScaling(Scaling):
    """Each block is an output channel of a transposed convolution: ``(out, 1, ...)``, as for other layers.

    ``is_column``: ``(out, 1)``, for a group whose members' weights have different numbers of dimensions.
    """

    def __init__(self, groups: int, *, is_column: bool = False) -> None:
        super().__init__([1], kernel_padding_mode="back", kernel_padding_val=-1)
        self._groups, self._is_column = groups, is_column

    def as_column(self) -> OutputScaling:
        """Return the same blocks as a column."""
        return OutputScaling(self._groups, is_column=True)

    def shrink(
        self, target: Tensor, reduce_func: Callable[[Tensor], Tensor] | None = None, keepdim: bool = False
    ) -> Tensor:
        """Reduce each output channel of ``(in, out / groups, ...)`` to one value, by default the mean."""
        values: Tensor = super().shrink(channels_swapped(target, self._groups), reduce_func, keepdim)
        if keepdim and self._is_column:
            # A function that reduces nothing keeps each block's values in a trailing dimension.
            return values.reshape(-1, 1, *values.shape[target.dim() :])
        return values

    def expand(self, target: Tensor, expand_size: list[int], keepdim: bool = False, full_expand: bool = True) -> Tensor:
        """Give each weight of an output channel the value of the channel."""
        ins, outs, *kernel = expand_size
        if not full_expand:
            kernel = [1] * len(kernel)
        # With one group the first dimension may stay 1; with several, each group has its own rows.
        ins = ins // self._groups if full_expand or self._groups > 1 else 1
        rows = target.reshape(-1, *[1] * (1 + len(kernel))).expand(outs * self._groups, ins, *kernel)
        return channels_swapped(rows, self._groups).clone()


class FollowingScaling(Scaling):
    """Blocks of a target aligned to the output channels of a transposed convolution, as its bias is: ``(out,)``."""

    def __init__(self, ins: int, groups: int) -> None:
        super().__init__([1])
        self._ins, self._groups = ins, groups

    def shrink(
        self, target: Tensor, reduce_func: Callable[[Tensor], Tensor] | None = None, keepdim: bool = False
    ) -> Tensor:
        """Return the values ``(out,)`` as they are: each is a block."""
        return target

    def expand(self, target: Tensor, expand_size: list[int], keepdim: bool = False, full_expand: bool = True) -> Tensor:
        """Return the channels ``(out,)`` that any row of a mask ``(in, out / groups)`` keeps."""
        if target.dim() == 1:
            return target.clone()
        return channels_swapped(target.expand(self._ins, -1), self._groups).amax(1)


def scale_by_outputs(model: Any, target_spaces: TargetSpaces) -> None:
    """Make output channels the blocks of transposed convolutions and of the targets aligned to their weights.

    All groups of such a layer lose equally many channels.
    """
    del model
    for name, spaces in target_spaces.items():
        for space in spaces.values():
            if space.type is not TargetType.PARAMETER:
                continue
            module = space._wrapper.module
            if is_transposed_weight(space) and space.granularity == "out_channel":
                space._scaler = OutputScaling(module.groups)
                if 1 < module.groups < module.in_channels and not space.internal_metric_block:
                    space._setting["internal_metric_block"] = module.groups
            if space.align is None or list(space.align["dims"]) != [0]:
                continue
            source = target_spaces.get(space.align["module_name"] or name, {}).get(space.align["target_name"])
            if source is not None and is_transposed_weight(source):
                of = source._wrapper.module
                # NNI keeps these dimensions of the weight's mask and hands the rest to the scaler.
                space._setting["align"] = {**space.align, "dims": [0, 1]}
                space._scaler = FollowingScaling(of.in_channels, of.groups)


def is_transposed_weight(space: PruningTargetSpace) -> bool:
    """Tell whether a target is the weight of a transposed convolution."""
    is_weight = space.type is TargetType.PARAMETER and space._target_name == "weight"
    return is_weight and isinstance(space._wrapper.module, TRANSPOSED)
