"""In which precision models compute.

Networks that are compared compute in the precision of their parameters, whatever the process allows for speed. A GPU
rounds the factors of convolutions to three digits where nobody forbids it (TF32), and those of matrices where
``torch.set_float32_matmul_precision`` allows it. A model that learns may compute under autocast.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nni_topo.errors import ConfigError, one_of

PutBack = Callable[[], object]
_logger = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16"]
"""In what a model that learns computes: as its parameters are, or under autocast to bfloat16."""

PRECISION = one_of(["float32", "bfloat16"])


class Switch:
    """A switch of PyTorch's, which all threads share: the last one that needs it off restores it."""

    def __init__(self, turn_off: Callable[[], PutBack]) -> None:
        self._turn_off = turn_off
        self._lock = threading.Lock()
        self._users = 0
        self._restore: PutBack = tuple

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Turn it off for a while."""
        with self._lock:
            if self._users == 0:
                self._restore = self._turn_off()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore()


def _in_full() -> PutBack:
    """Let products of single-precision numbers be computed in single precision."""
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
    convolutions = _allows_tf32()
    torch.set_float32_matmul_precision("highest")
    _BACKENDS.cudnn.allow_tf32 = False
    for each in _OPERATIONS:
        each.fp32_precision = "ieee"

    def put_back() -> None:
        torch.set_float32_matmul_precision(products)
        _BACKENDS.cudnn.allow_tf32 = convolutions
        for each, precision in zip(_OPERATIONS, precisions, strict=True):
            each.fp32_precision = precision

    return put_back


def _allows_tf32() -> bool:
    """Tell whether the older switch lets convolutions round, where no operation does."""
    try:
        allows: bool = _BACKENDS.cudnn.allow_tf32
    except RuntimeError:  # which says that they disagree
        return True
    return allows


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
_rounding_off = Switch(_in_full)


@contextmanager
def in_full_precision() -> Iterator[None]:
    """Let products of single-precision numbers be computed in single precision for a while, whatever is set."""
    with _rounding_off():
        yield


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
    """Let PyTorch's operations compute in a precision; parameters, and their gradients, keep their own.

    On a CPU attention itself stays in single precision: the gradient of the fused operation takes six times as long in
    bfloat16 where sequences have 32 places. So do convolutions that the processor computes wrong in bfloat16: on those
    with AMX, for example, a ``Conv1d`` of 8 channels with kernels of 64 gives numbers that have nothing to do with it.
    The gradients of what is computed are to be taken by `backward_in`.
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
    """Take the gradients of a loss of what a model gave in `computing_in`.

    A checkpoint runs the forward again for them: under autocast by itself, with the same exceptions through ours.
    """
    if precision == "float32" or device.type != "cpu":
        loss.backward()
        return
    towards = torch.ones_like(loss)
    with _SomeInSingle():
        # A mode handles `Tensor.backward` and `torch.autograd.backward`, and then doesn't see what these call.
        engine: Any = torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), (towards,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def is_within_autocast() -> bool:
    """Tell whether the caller is within ``torch.autocast``, enabled or not.

    There PyTorch keeps the casts of weights until the outermost block ends: weights that learn would compute as they
    were at the first step. So blocks within it must not keep casts.
    """
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth > 1


class _SomeInSingle(TorchFunctionMode):
    """Compute some operations in single precision, under autocast.

    Attention, also that of ``nn.MultiheadAttention``, and convolutions that come out wrong in bfloat16.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in _IN_SINGLE:
            return _IN_SINGLE[func](*args, **kwargs)
        # A forward may turn autocast off for a part of itself, or choose another precision.
        if func not in _CONVOLUTIONS or not _rounds(args, kwargs):
            return func(*args, **kwargs)
        call = call_of(func, _with_few_samples(args), kwargs)
        if call is None or is_right_in_bfloat16(call):
            return func(*args, **kwargs)
        return _in_single(func, args, kwargs).to(torch.bfloat16)


def _rounds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a convolution computes in bfloat16: under autocast as that says, else as its tensors are."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    return all(each.dtype == torch.bfloat16 for each in tensors)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """Compute attention of half precision in single precision, without autocast."""
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    half = [each.dtype for each in tensors if each.dtype in (torch.bfloat16, torch.float16)]
    found = _in_single(functional.scaled_dot_product_attention, args, kwargs)
    return found.to(half[0]) if half else found


def _in_single(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call a function without autocast, on single precision in place of half."""
    with torch.autocast("cpu", enabled=False):
        return function(*map(_single, args), **{name: _single(each) for name, each in kwargs.items()})


def _single(value: Any) -> Any:
    """Return a tensor of half precision in single precision, and anything else as it is."""
    is_half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_half else value


def _with_attention(function: Any) -> Any:
    """Return a function of ``torch.nn.functional`` with our attention in place of the one that it calls by name.

    While a mode handles a function of Python's, it doesn't see what that calls.
    """
    names = {**vars(functional), "scaled_dot_product_attention": _attention}
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


_IN_SINGLE: dict[Any, Any] = {
    functional.scaled_dot_product_attention: _attention,
    functional.multi_head_attention_forward: _with_attention(functional.multi_head_attention_forward),
}
"""What is called in place of functions that compute attention."""


_CONVOLUTIONS = {
    functional.conv1d,
    functional.conv2d,
    functional.conv3d,
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
}
_MOST_ROUNDED = 0.1
"""How far a number may be off in bfloat16, as a share of the numbers' root mean square. Rounding makes up 0.02."""


_TRIED = 8  # samples at most of what is tried


def _with_few_samples(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a convolution with fewer samples: a trial has to be quick, and batches differ in size."""
    both = args[:2]
    if len(both) == 2 and all(isinstance(each, Tensor) for each in both) and both[0].dim() == both[1].dim():
        return both[0].detach()[:_TRIED], *args[1:]
    return args  # a single sample has one dimension less than the weight


@dataclass(frozen=True)
class TensorLike:
    """A tensor without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class FunctionCall:
    """A function and its arguments, with tensors' shapes in place of tensors."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


def call_of(function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> FunctionCall | None:
    """Describe a call; None where autocast wouldn't compute it in bfloat16, or it has no samples."""

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            return TensorLike(tuple(value.shape), tuple(value.stride()))
        return tuple(value) if isinstance(value, list) else value

    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    if any(each.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not each.numel() for each in tensors):
        return None
    named = tuple((name, described(kwargs[name])) for name in sorted(kwargs))
    return FunctionCall(function, tuple(map(described, args)), named)


@lru_cache(maxsize=4096)
def is_right_in_bfloat16(call: FunctionCall) -> bool:
    """Say whether a function under autocast differs from single precision by rounding alone, gradients included.

    It is tried once on random numbers, so that the answer hangs on the shapes and on the processor alone.
    """
    kind: Any = {"dtype": torch.float32, "device": "cpu"}
    generator = torch.Generator("cpu").manual_seed(0)

    def made(value: Any) -> Any:
        if not isinstance(value, TensorLike):
            return value
        # Drawn as they lie in memory: those of an expanded tensor, or of frames that overlap, lie at one place.
        places = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.strides, strict=True))
        numbers = torch.randn(places, generator=generator, **kind)
        return numbers.as_strided(value.shape, value.strides).requires_grad_()

    # A checkpoint keeps what is computed within it by hooks, which mustn't see what is computed here.
    apart = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), apart:
        args, kwargs = tuple(map(made, call.args)), {name: made(value) for name, value in call.kwargs}
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        wanted = _in_single(call.function, args, kwargs)
        towards = wanted.detach()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            found = call.function(*args, **kwargs)
        answers = [towards, *torch.autograd.grad(wanted, tensors, towards)]
        others = [found.detach(), *torch.autograd.grad(found, tensors, towards.to(found.dtype))]
    shares = [
        float((other.float() - answer).abs().max() / _size(answer, towards))
        for answer, other in zip(answers, others, strict=True)
    ]
    if all(share <= _MOST_ROUNDED for share in shares):
        return True
    shapes = ", ".join(str(tuple(each.shape)) for each in tensors)
    _logger.warning(
        "%s of tensors %s stays in single precision: in bfloat16 this processor computes it wrong, by up to %.3g times "
        "the size of the right numbers",
        call.function.__name__,
        shapes,
        max(shares),
    )
    return False


def _size(answer: Tensor, towards: Tensor) -> Tensor:
    """Return the root mean square of numbers; of a bias's gradient, which may vanish, at least that of sums as long."""
    size = answer.square().mean()
    return size.sqrt() if answer.dim() != 1 else torch.maximum(size, towards.square().sum() / answer.numel()).sqrt()
