"""In which precision models compute.

Networks that are compared compute in the precision of their parameters, whatever the process allows for speed. A GPU
rounds the factors of convolutions to three digits where nobody forbids it (TF32), and those of matrices where
``torch.set_float32_matmul_precision`` allows it. A model that learns may compute under autocast.
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

from nni_topo.errors import ConfigError
from nni_topo.rules import one_of

Precision = Literal["float32", "bfloat16"]
"""In what a model that learns computes: as its parameters are, or under autocast to bfloat16."""

PRECISION = one_of(["float32", "bfloat16"])


@contextmanager
def in_full_precision() -> Iterator[None]:
    """Let products of single-precision numbers be computed in single precision for a while, whatever is set."""
    # PyTorch has a switch for each operation, one for those of each library, and one for all.
    precisions = []
    for each, library in zip(_OPERATIONS, _LIBRARIES, strict=True):
        # An operation that is set to what its library's are set to most likely has no setting of its own.
        own = each.fp32_precision
        precisions.append("none" if own == library.fp32_precision else own)
    for each in _OPERATIONS:
        each.fp32_precision = "ieee"
    # The older switches don't tell how they are set where an operation rounds and they don't, or the other way round.
    products = torch.get_float32_matmul_precision()
    try:
        convolutions = _BACKENDS.cudnn.allow_tf32
    except RuntimeError:  # which says that they disagree
        convolutions = True
    torch.set_float32_matmul_precision("highest")
    _BACKENDS.cudnn.allow_tf32 = False
    for each in _OPERATIONS:
        each.fp32_precision = "ieee"

    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        _BACKENDS.cudnn.allow_tf32 = convolutions
        for each, precision in zip(_OPERATIONS, precisions, strict=True):
            each.fp32_precision = precision


_BACKENDS: Any = torch.backends  # PyTorch makes these attributes when it is imported, unseen by type checkers
_OPERATIONS: tuple[Any, ...] = (
    _BACKENDS.cuda.matmul,
    _BACKENDS.cudnn.conv,
    _BACKENDS.cudnn.rnn,
    _BACKENDS.mkldnn.matmul,
    _BACKENDS.mkldnn.conv,
    _BACKENDS.mkldnn.rnn,
)
_LIBRARIES: tuple[Any, ...] = 3 * (_BACKENDS.cudnn,) + 3 * (_BACKENDS.mkldnn,)
"""Where the setting is that an operation follows if it has none of its own; matrices on a GPU follow cuDNN's, too."""


def check_precision(precision: Precision, device: torch.device, place: str) -> None:
    """Raise ConfigError unless a model on a device can compute in a precision."""
    PRECISION.check("precision", precision, place)
    if precision != "float32" and not torch.amp.is_autocast_available(device.type):
        raise ConfigError(
            f"precision must be 'float32' on a device without autocast, got {precision!r} on {device} ({place})"
        )


def not_under_autocast(precision: Precision, error: Exception, place: str) -> ConfigError:
    """Return the error of a model that can't learn under autocast, because of another one, but can without it."""
    first_line = str(error).partition("\n")[0]
    return ConfigError(
        f"precision must be 'float32' for a model that doesn't learn under torch.autocast, got {precision!r}: "
        f"{first_line} ({place})"
    )


@contextmanager
def computing_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let PyTorch's operations compute in a precision; take the gradients of what they give by `backward_in`.

    On a CPU bfloat16 is for linear layers. Attention stays in single precision: the gradient of the fused operation
    takes six times as long in bfloat16 where sequences have 32 places. So do convolutions: processors with AMX compute
    some wrong, such as a ``Conv1d`` of 8 channels with kernels of 64.
    """
    if not torch.amp.is_autocast_available(device.type):  # there is none to turn off, either
        yield
        return
    keeps = not is_within_autocast()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=keeps)
    exceptions = _SomeInSingle() if precision == "bfloat16" and device.type == "cpu" else nullcontext()
    with autocast, exceptions:
        yield


def backward_in(precision: Precision, device: torch.device, loss: Tensor) -> None:
    """Take the gradients of a loss in `computing_in`; a checkpoint runs the forward again, with the same exceptions."""
    if precision == "float32" or device.type != "cpu":
        loss.backward()
        return
    towards = torch.ones_like(loss)
    with _SomeInSingle():
        # A mode handles `Tensor.backward` and `torch.autograd.backward`, and then doesn't see what these call.
        engine: Any = torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), (towards,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def is_within_autocast() -> bool:
    """Tell whether the caller is within ``torch.autocast``, enabled or not: blocks within it must not keep casts.

    PyTorch keeps them until the outermost block ends: weights that learn would compute as they were at the first step.
    """
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth > 1


class _SomeInSingle(TorchFunctionMode):
    """Compute attention (also ``nn.MultiheadAttention``) and convolutions in single precision."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        return _IN_SINGLE.get(func, func)(*args, **(kwargs or {}))


def _in_single(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that computes in single precision, and returns half precision if it gets any."""

    def single(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value

    def call(*args: Any, **kwargs: Any) -> Tensor:
        given = [each.dtype for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        half = [each for each in given if each in _HALF]
        with torch.autocast("cpu", enabled=False):
            found = function(*map(single, args), **{name: single(each) for name, each in kwargs.items()})
        return found.to(half[0]) if half else found

    return call


def _with_attention(function: Any) -> Any:
    """Return a function of ``torch.nn.functional`` that calls our attention: a mode doesn't see what it calls."""
    names = {**vars(functional), "scaled_dot_product_attention": _attention}
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


_HALF = (torch.bfloat16, torch.float16)
_CONVOLUTIONS: tuple[Any, ...] = (
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
_attention = _in_single(functional.scaled_dot_product_attention)
_IN_SINGLE: dict[Any, Any] = {
    functional.scaled_dot_product_attention: _attention,
    functional.multi_head_attention_forward: _with_attention(functional.multi_head_attention_forward),
    **{each: _in_single(each) for each in _CONVOLUTIONS},
}
"""What is called in place of functions that compute attention or convolutions."""
