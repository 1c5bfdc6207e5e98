"""Numbers that stand for channels, and how single operations carry them from tensor to tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils._pytree import tree_map

from nni_topo.network.graph import plain_name
from nni_topo.network.layers import AlongChannels

FIXED = 0  # the root of all channels that have to stay; the first layer starts at 1

# These are run on the numbers themselves, which shows where each channel goes.
MOVING_MODULES = (
    torch.nn.Flatten, torch.nn.Unflatten, torch.nn.PixelShuffle, torch.nn.PixelUnshuffle, torch.nn.ChannelShuffle,
)  # fmt: skip
MOVES = frozenset((
    "cat", "concat", "concatenate", "column_stack", "dstack", "hstack", "vstack", "row_stack", "stack", "chunk",
    "split", "tensor_split", "split_with_sizes", "unbind", "flatten", "unflatten", "reshape", "reshape_as", "view",
    "view_as", "permute", "transpose", "swapaxes", "t", "movedim", "moveaxis", "squeeze", "unsqueeze", "expand",
    "expand_as", "repeat", "repeat_interleave", "tile", "narrow", "select", "getitem", "index_select", "flip", "roll",
    "contiguous", "clone", "detach", "getattr", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
))  # fmt: skip
# Of these the index may be a computed tensor, in whose place only numbers of channels are at hand.
INDEXED = frozenset(["getitem", "index_select", "gather", "take", "take_along_dim"])
# Here channels meet place by place, and a channel that is gone on one side is missed by the other: they are tied.
MEETS = frozenset((
    "add", "iadd", "radd", "sub", "isub", "subtract", "mul", "imul", "multiply", "div", "truediv", "itruediv",
    "divide", "true_divide", "floordiv", "floor_divide", "pow", "maximum", "minimum", "fmax", "fmin", "max", "min",
    "where", "lerp", "addcmul", "addcdiv", "and", "or", "xor", "logical_and", "logical_or", "logical_xor", "eq", "ne",
    "lt", "le", "gt", "ge", "mod", "remainder", "fmod",
))  # fmt: skip
_OF_ONE_VALUE = frozenset(f"{new}{name}" for name in ("zeros", "ones", "empty", "full") for new in ("", "new_"))


def fixed(leaf: Any) -> Any:
    """Label a tensor from outside ``FIXED``: its channels can't be removed; any other leaf comes back as it is."""
    # On the CPU, as all labels are, wherever the model lies.
    return staying(tuple(leaf.shape)) if isinstance(leaf, torch.Tensor) else leaf


def staying(shape: tuple[int, ...]) -> torch.Tensor:
    """Label all of a tensor ``FIXED``."""
    return torch.tensor(FIXED).expand(shape)


def made(node: torch.fx.Node, shape: tuple[int, ...], numbers: dict[str, Any]) -> torch.Tensor:
    """Label what is made of no traced tensor, given the labels of the nodes before.

    It is a constant, of which all stays, and so do the channels that meet it; but of one value, as large as a tensor
    along a dimension, there is as much as that has left.
    """
    args = node.args[is_like(node) :]
    # As ``torch.zeros(2, 3)`` and ``torch.full((2, 3), value)``.
    sizes: Any = args[0] if args and isinstance(args[0], (tuple, list)) else args
    for d, size in enumerate(sizes if plain_name(node) in _OF_ONE_VALUE and len(sizes) >= len(shape) else ()):
        if isinstance(size, torch.fx.Node) and plain_name(size) == "size" and len(size.args) == 2:
            tensor, at = size.args
            labels = numbers.get(tensor.name) if isinstance(tensor, torch.fx.Node) else None
            if isinstance(labels, torch.Tensor) and isinstance(at, int) and labels.numel() == labels.shape[at] > 1:
                return labels.view([-1 if each == d else 1 for each in range(len(shape))]).expand(shape)
    return staying(shape)


def is_like(node: torch.fx.Node) -> bool:
    """Tell whether a node makes a tensor of the type of another one, of which it takes no more (``x.new_zeros``)."""
    return plain_name(node) in _OF_ONE_VALUE and plain_name(node).startswith("new_")


def put_by_row(node: torch.fx.Node, labels: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """Return labels of one row each of a tensor and of those that are put into its rows; None for any other node."""
    dim = node.args[1] if len(node.args) == 4 else None
    if plain_name(node) not in ("index_add", "index_copy") or not isinstance(dim, int) or len(labels) != 3:
        return None
    rows = labels[0], labels[2]
    return None if any(varies(each, dim) for each in rows) else [each.narrow(dim, 0, 1) for each in rows]


def compressed(leaf: Any) -> Any:
    """Keep of labels one entry of every dimension along which they don't differ; any other leaf comes back as it is."""
    if isinstance(leaf, torch.Tensor):
        for d in range(leaf.dim()):
            leaf = leaf if leaf.shape[d] == 0 or varies(leaf, d) else leaf.narrow(d, 0, 1)
        return leaf.clone()
    return leaf


def given_shapes(node: torch.fx.Node) -> Any:
    """Label all that a node puts out ``FIXED``, in the output's containers; None in place of what is no tensor."""
    metas = node.meta.get("tensor_meta")
    return tree_map(
        lambda meta: staying(tuple(meta.shape)) if isinstance(meta, TensorMetadata) else None,
        metas,
        is_leaf=lambda meta: isinstance(meta, TensorMetadata),
    )


def merges(node: torch.fx.Node, labels: list[torch.Tensor]) -> bool:
    """Tell whether a node is torchvision's function, into which no tracer goes, that puts four neighbours together."""
    return plain_name(node) == "patch_merging_pad" and not any(varies(labels[0], d) for d in (-3, -2))


def merge(labels: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Put the channels of four neighbours next to one another, in a tensor of this shape."""
    return torch.cat([labels[..., :1, :1, :].expand(*shape[:-1], -1)] * 4, -1)


def varies(labels: torch.Tensor, dim: int) -> bool:
    """Tell whether labels, int64, differ along a dimension."""
    # A stride of 0 is one entry seen many times: nothing to compare.
    some = labels.shape[dim] > 1 and labels.stride(dim) != 0
    return some and not torch.equal(labels.narrow(dim, 0, 1).expand(labels.shape), labels)


def carry(labels: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Carry labels (batch, channels, ...) to a shape with the channels where they were; None if that can't be told."""
    # What keeps its shape (an activation, a norm) works place by place, as far as shapes can tell.
    if tuple(labels.shape) == shape:
        return labels
    alike = min(labels.dim(), len(shape)) > 1 and tuple(labels.shape[:2]) == shape[:2]
    # Where the places of a channel have numbers that differ, a place of the output could have any of them.
    if not alike or any(varies(labels, d) for d in range(2, labels.dim())):
        return None
    # Any place will do, all being alike; expanded again, so that strides of 0 still say that nothing differs.
    channels = labels[(slice(None), slice(None)) + (0,) * (labels.dim() - 2)]
    return channels.view(shape[:2] + (1,) * (len(shape) - 2)).expand(shape)


def carry_picked(node: torch.fx.Node, labels: list[torch.Tensor], shape: tuple[int, ...] | None) -> torch.Tensor | None:
    """Carry channels in the last dimension to what a computed index or mask picks along others; None elsewhere.

    ``labels`` are those of the tensor and of indices and masks.
    """
    states, *indices = labels
    last = states.dim() - 1
    if plain_name(node) != "getitem" or not shape or not indices or not _leaves_last(node.args[1], states.dim()):
        return None
    if any(varies(each, d) for each in indices for d in range(each.dim())) or any(
        varies(states, d) or not states.shape[d] for d in range(last)
    ):
        return None
    return states[(slice(0, 1),) * last].reshape(-1).expand(shape)


def _leaves_last(index: Any, dims: int) -> bool:
    """Tell whether an index of a tensor with so many dimensions takes all of the last one."""
    parts = [part for part in (index if isinstance(index, (tuple, list)) else (index,)) if part is not None]
    if any(part is Ellipsis for part in parts):
        return parts[-1] is Ellipsis or parts[-1] == slice(None)
    metas = [part.meta.get("tensor_meta") if isinstance(part, torch.fx.Node) else None for part in parts]
    # A mask stands for as many dimensions as it has.
    taken = sum(len(meta.shape) if meta is not None and meta.dtype == torch.bool else 1 for meta in metas)
    return taken < dims or (taken == dims and parts[-1] == slice(None))


def carry_reduced(labels: torch.Tensor, shape: tuple[int, ...], dims: Iterable[int]) -> torch.Tensor | None:
    """Carry labels through a reduction along dimensions, counted from 0; None if that can't be told.

    They are ``FIXED`` where all channels go into one number, which is made anew in the dense model too.
    """
    gone = set(dims)
    places = [d for d in range(labels.dim()) if varies(labels, d)]
    if set(places) <= gone:
        return staying(shape)
    if gone & set(places):
        return None
    for d in gone:
        labels = labels.narrow(d, 0, 1)
    left = labels if len(shape) == labels.dim() else labels.squeeze(tuple(gone))
    return left.expand(shape) if left.dim() == len(shape) else None


def meet_alike(labels: list[torch.Tensor], shape: tuple[int, ...]) -> bool:
    """Tell whether tensors can meet place by place to give one of a shape."""
    try:
        return tuple(torch.broadcast_shapes(*(each.shape for each in labels))) == shape
    except RuntimeError:
        return False


def goes_along(module: nn.Module, labels: Tensor, shape: tuple[int, ...]) -> bool:
    """Tell whether a layer is a convolution along the channels that enter it, labelled, and puts as many out."""
    if not isinstance(module, nn.Conv1d) or labels.dim() != 3 or labels.shape[::2] != shape[::2]:
        return False
    is_plain = type(module) in (nn.Conv1d, AlongChannels) and module.padding_mode == "zeros" and module.groups == 1
    return is_plain and module.stride == (1,) and varies(labels, 2) and not varies(labels, 1)
