"""Numbers that stand for channels, and how single operations carry them from tensor to tensor."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils._pytree import tree_map

FIXED = 0
UNKNOWN = -1

MOVING_MODULES = (
    torch.nn.Flatten, torch.nn.Unflatten, torch.nn.PixelShuffle, torch.nn.PixelUnshuffle, torch.nn.ChannelShuffle,
)  # fmt: skip
MOVES = frozenset(
    [
        "cat",
        "concat",
        "concatenate",
        "column_stack",
        "dstack",
        "hstack",
        "vstack",
        "row_stack",
        "stack",
        "chunk",
        "split",
        "tensor_split",
        "split_with_sizes",
        "unbind",
        "flatten",
        "unflatten",
        "reshape",
        "view",
        "view_as",
        "permute",
        "transpose",
        "swapaxes",
        "t",
        "movedim",
        "moveaxis",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "repeat",
        "repeat_interleave",
        "tile",
        "narrow",
        "select",
        "getitem",
        "index_select",
        "flip",
        "roll",
        "contiguous",
        "clone",
        "detach",
        "getattr",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
    ]
)
INDEXED = frozenset(["getitem", "index_select", "gather", "take", "take_along_dim"])
MEETS = frozenset(
    [
        "add",
        "iadd",
        "radd",
        "sub",
        "isub",
        "subtract",
        "mul",
        "imul",
        "multiply",
        "div",
        "truediv",
        "itruediv",
        "divide",
        "true_divide",
        "floordiv",
        "floor_divide",
        "pow",
        "maximum",
        "minimum",
        "fmax",
        "fmin",
        "max",
        "min",
        "where",
        "lerp",
        "addcmul",
        "addcdiv",
        "and",
        "or",
        "xor",
        "logical_and",
        "logical_or",
        "logical_xor",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "mod",
        "remainder",
        "fmod",
    ]
)
REDUCTIONS = frozenset(
    ["mean", "sum", "amax", "amin", "max", "min", "norm", "std", "var", "prod", "logsumexp", "argmax", "argmin"]
)


def fixed(leaf: Any) -> Any:
    """Mark a tensor from outside as one whose channels can't be removed.

    Parameters
    ----------
    leaf : Any
        A tensor of any shape, or anything else.

    Returns
    -------
    Any
        ``FIXED`` for each element; what isn't a tensor comes back as it is.
    """
    return torch.zeros(leaf.shape, dtype=torch.int64) if isinstance(leaf, torch.Tensor) else leaf


def unknown(leaf: Any) -> Any:
    """Mark a tensor that comes out of an operation that can't be followed.

    Parameters
    ----------
    leaf : Any
        A tensor of any shape, or anything else.

    Returns
    -------
    Any
        ``UNKNOWN`` for each element; what isn't a tensor comes back as it is.
    """
    return torch.full_like(leaf, UNKNOWN, dtype=torch.int64) if isinstance(leaf, torch.Tensor) else leaf


def tensor_shape(node: torch.fx.Node) -> tuple[int, ...] | None:
    """Look up the shape of a node's tensor.

    Parameters
    ----------
    node : torch.fx.Node
        A node with its shape in ``node.meta["tensor_meta"]``.

    Returns
    -------
    tuple of int or None
        None if the node's value isn't one tensor.
    """
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def given_shapes(node: torch.fx.Node, label: int) -> Any:
    """Label all that a node puts out alike.

    Parameters
    ----------
    node : torch.fx.Node
        A node with its shapes in ``node.meta["tensor_meta"]``.
    label : int
        The label of every element.

    Returns
    -------
    Any
        Tensors of int64 in the containers of the node's output; None if it puts out no tensor.
    """
    metas = node.meta.get("tensor_meta")
    return tree_map(
        lambda meta: torch.full(tuple(meta.shape), label) if isinstance(meta, TensorMetadata) else None,
        metas,
        is_leaf=lambda meta: isinstance(meta, TensorMetadata),
    )


def plain_name(node: torch.fx.Node) -> str:
    """Name a function or method alike however it is called.

    Parameters
    ----------
    node : torch.fx.Node
        A node that calls a function or method.

    Returns
    -------
    str
        ``"add"`` for ``torch.add``, ``operator.add`` and ``Tensor.add_``.
    """
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return "getitem" if node.target is operator.getitem else name.strip("_")


def varies(labels: torch.Tensor, dim: int) -> bool:
    """Tell whether labels differ along a dimension.

    Parameters
    ----------
    labels : Tensor of int64
        Channel numbers.
    dim : int
        The dimension.

    Returns
    -------
    bool
        True if any two differ.
    """
    return labels.stride(dim) != 0 and not torch.equal(labels.narrow(dim, 0, 1).expand(labels.shape), labels)


def carry(labels: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Carry labels through an operation that leaves the channels (dimension 1) where they are.

    Parameters
    ----------
    labels : Tensor of int64, shape (batch, channels, ...)
        The labels that enter.
    shape : tuple of int
        Shape of the operation's output.

    Returns
    -------
    Tensor of int64, shape ``shape``, or None
        None if the shapes don't tell where the channels are.
    """
    if tuple(labels.shape) == shape:
        return labels
    alike = min(labels.dim(), len(shape)) > 1 and tuple(labels.shape[:2]) == shape[:2]
    if not alike or any(varies(labels, d) for d in range(2, labels.dim())):
        return None
    channels = labels[(slice(None), slice(None)) + (0,) * (labels.dim() - 2)]
    return channels.view(shape[:2] + (1,) * (len(shape) - 2)).expand(shape)


def carry_reduced(labels: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Carry labels through a reduction, unless it mixes channels.

    Parameters
    ----------
    labels : Tensor of int64, shape (batch, channels, ...)
        The labels that enter.
    shape : tuple of int
        Shape of the reduction's output.

    Returns
    -------
    Tensor of int64, shape ``shape``
        ``UNKNOWN`` if channels are mixed.
    """
    reduced = len(shape) > 1 and set(shape[2:]) <= {1}
    carried = carry(labels, shape) if reduced else None
    return torch.full(shape, UNKNOWN) if carried is None else carried
