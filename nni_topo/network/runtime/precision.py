"""The precision in which models compute.

Networks that are compared compute in the precision of their parameters, whatever the process allows for speed. By
default a GPU rounds the factors of convolutions to three digits (TF32), and the factors of matrix products if
``torch.set_float32_matmul_precision`` allows it. Training may use autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from nni_topo.errors import ConfigError
from nni_topo.rules import one_of

Precision = Literal["float32", "bfloat16"]
"""Precision of training: the type of the parameters, or autocast to bfloat16."""

PRECISION = one_of(["float32", "bfloat16"])


@contextmanager
def in_full_precision() -> Iterator[None]:
    """Compute products of single-precision numbers in single precision within the block, whatever the settings."""
    # PyTorch has one setting for each operation, one for each library, and one for all.
    precisions = []
    for operation, library in zip(_OPERATIONS, _LIBRARIES, strict=True):
        # An operation with the same setting as its library most likely has no setting of its own.
        setting = operation.fp32_precision
        precisions.append("none" if setting == library.fp32_precision else setting)
    for operation in _OPERATIONS:
        operation.fp32_precision = "ieee"
    # The older switches can't be read if they disagree with the settings of operations.
    products = torch.get_float32_matmul_precision()
    try:
        convolutions = _BACKENDS.cudnn.allow_tf32
    except RuntimeError:  # they disagree
        convolutions = True
    torch.set_float32_matmul_precision("highest")
    _BACKENDS.cudnn.allow_tf32 = False
    for operation in _OPERATIONS:
        operation.fp32_precision = "ieee"

    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        _BACKENDS.cudnn.allow_tf32 = convolutions
        for operation, precision in zip(_OPERATIONS, precisions, strict=True):
            operation.fp32_precision = precision


_BACKENDS: Any = torch.backends  # PyTorch sets these attributes at import; type checkers don't know them
_OPERATIONS: tuple[Any, ...] = (
    _BACKENDS.cuda.matmul,
    _BACKENDS.cudnn.conv,
    _BACKENDS.cudnn.rnn,
    _BACKENDS.mkldnn.matmul,
    _BACKENDS.mkldnn.conv,
    _BACKENDS.mkldnn.rnn,
)
_LIBRARIES: tuple[Any, ...] = 3 * (_BACKENDS.cudnn,) + 3 * (_BACKENDS.mkldnn,)
"""For each operation, the library whose setting is its default; GPU matrix products use cuDNN's, too."""


def check_precision(precision: Precision, device: torch.device, place: str) -> None:
    """Raise ConfigError unless a model on a device can compute in a precision."""
    PRECISION.check("precision", precision, place)
    if precision != "float32" and not torch.amp.is_autocast_available(device.type):
        raise ConfigError(
            f"precision must be 'float32' on a device without autocast, got {precision!r} on {device} ({place})"
        )


def not_under_autocast(precision: Precision, error: Exception, place: str) -> ConfigError:
    """Return an error for a model that can't be trained under autocast because of ``error``, but can without it."""
    first_line = str(error).partition("\n")[0]
    return ConfigError(
        f"precision must be 'float32' for a model that doesn't learn under torch.autocast, got {precision!r}: "
        f"{first_line} ({place})"
    )


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute PyTorch's operations in a precision within the block.

    On a CPU bfloat16 is for linear layers. Attention stays in single precision, because the gradient of the fused
    operation takes six times as long in bfloat16 for sequences of length 32. Convolutions do, because processors with
    AMX compute some convolutions wrong, such as a ``Conv1d`` of 8 channels with kernels of size 64.
    """
    if not torch.amp.is_autocast_available(device.type):  # it has no autocast to turn off
        yield
        return
    is_half = precision == "bfloat16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=is_half, cache_enabled=not is_within_autocast())
    with autocast, _SomeInSingle() if is_half and device.type == "cpu" else nullcontext():
        yield


def is_within_autocast() -> bool:
    """Tell whether the caller is within ``torch.autocast``, enabled or not: inner blocks must not cache casts.

    PyTorch caches them until the outermost block ends: weights in training would keep their first values.
    """
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth > 1


class _SomeInSingle(TorchFunctionMode):
    """Compute attention (also ``nn.MultiheadAttention``) and convolutions in single precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _IN_SINGLE.get(func, func)(*args, **(kwargs or {}))


def _in_single(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that computes in single precision, and returns half precision if it gets any."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        half = [
            value.dtype for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dtype in _HALF
        ]
        single: Any = tree_map_only(
            Tensor, lambda tensor: tensor.float() if tensor.dtype in _HALF else tensor, (args, kwargs)
        )
        with torch.autocast("cpu", enabled=False):
            output = function(*single[0], **single[1])
        if half:
            return output.to(half[0])
        return output

    return call


_HALF = (torch.bfloat16, torch.float16)
_attention = _in_single(functional.scaled_dot_product_attention)
# PyTorch's function with our attention: a mode doesn't see calls within a function that it handles.
_multi_head = functional.multi_head_attention_forward
_with_attention = FunctionType(
    _multi_head.__code__,
    {**vars(functional), "scaled_dot_product_attention": _attention},
    argdefs=_multi_head.__defaults__,
)
_CONVOLUTIONS: tuple[Any, ...] = (
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
_IN_SINGLE: dict[Any, Any] = {
    functional.scaled_dot_product_attention: _attention,
    _multi_head: _with_attention,
    **{function: _in_single(function) for function in _CONVOLUTIONS},
}
"""Replacements of functions that compute attention or convolutions."""
