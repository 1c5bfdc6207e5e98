"""Operations that look at several places of a dimension at once: along which, and whether zeros among them count.

A removed channel is zero in the masked network and missing in the dense one. A sum or a length is the same with and
without it. A mean counts it, a maximum may be it, a softmax gives it a share, a sort puts others in its place: where
such an operation goes along channels, all of them have to stay. What an operation does decides, not what came out
for some numbers.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.fx import Node

from nni_topo.network.graph import plain_name

Modules = Callable[[str], Any]
"""Looks up a module of a traced model by name."""


@dataclasses.dataclass(frozen=True)
class Along:
    """What an operation does along dimensions."""

    dims: tuple[int, ...]  # from 0
    adds: bool  # zeros make no difference to what it gives at other places
    reduces: bool  # the dimensions are gone behind it, or of length 1


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """Where a function finds its dimensions."""

    place: int | None  # among the arguments, the tensor's being 0; None: by name alone
    default: int | tuple[int, ...] | None  # where none are given; None: all


def _table(*groups: tuple[str, int | None, int | tuple[int, ...] | None]) -> dict[str, _Arguments]:
    return {name: _Arguments(place, default) for names, place, default in groups for name in names.split()}


# Functions and methods by name, with the place and the default of their dimensions. First what is the same with zeros.
_ADDS = _table(
    ("sum nansum any count_nonzero", 1, None),
    ("norm linalg_norm linalg_vector_norm", 2, None),
    ("linalg_matrix_norm", 2, (-2, -1)),
    ("normalize", 2, 1),
    ("cumsum", 1, -1),
)
# What is the same with zeros where no value is negative.
_LARGEST = _table(("amax max", 1, None))
# What counts zeros, chooses among them, or says or depends on where a value is.
_COUNTS = _table(
    ("mean nanmean std var std_mean var_mean prod all amin min aminmax median nanmedian", 1, None),
    ("logsumexp argmax argmin", 1, None),
    ("sort argsort mode cumprod cummax cummin logcumsumexp", 1, -1),
    ("softmax log_softmax softmin", 1, ()),
    ("gather scatter scatter_add scatter_reduce index_add index_copy index_fill index_reduce", 1, None),
    ("take_along_dim quantile nanquantile", 2, None),
    ("topk kthvalue diff linalg_cross", 2, -1),
    ("trapezoid trapz cumulative_trapezoid unique_consecutive", None, -1),
    ("gumbel_softmax", 4, -1),
    ("unique", 4, None),
    ("msort", None, 0),
    ("local_response_norm", None, 1),
    ("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft", 2, -1),
    ("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2", 2, (-2, -1)),
    ("fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn", 2, None),
    ("fft_fftshift fft_ifftshift", 1, None),
    # Windows slide along the last dimensions.
    ("max_pool1d avg_pool1d lp_pool1d adaptive_max_pool1d adaptive_avg_pool1d", None, -1),
    ("max_pool2d avg_pool2d lp_pool2d adaptive_max_pool2d adaptive_avg_pool2d fractional_max_pool2d", None, (-2, -1)),
    ("max_pool3d avg_pool3d lp_pool3d adaptive_max_pool3d adaptive_avg_pool3d fractional_max_pool3d", None,
     (-3, -2, -1)),
)  # fmt: skip
_REDUCE = frozenset((
    "sum", "nansum", "any", "count_nonzero", "norm", "linalg_norm", "linalg_vector_norm", "linalg_matrix_norm", "amax",
    "max", "mean", "nanmean", "std", "var", "std_mean", "var_mean", "prod", "all", "amin", "min", "aminmax", "median",
    "nanmedian", "logsumexp", "argmax", "argmin", "mode", "kthvalue", "quantile", "nanquantile", "trapezoid", "trapz",
))  # fmt: skip
_POOLS: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (
    ((nn.MaxPool1d, nn.AvgPool1d, nn.LPPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d), 1),
    ((nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.FractionalMaxPool2d), 2),
    ((nn.MaxPool3d, nn.AvgPool3d, nn.LPPool3d, nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool3d, nn.FractionalMaxPool3d), 3),
)

# What works on each value by itself.
POINTWISE = frozenset((
    "abs", "absolute", "neg", "negative", "positive", "pos", "sign", "sgn", "square", "sqrt", "rsqrt", "reciprocal",
    "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "tan", "tanh", "sinh", "cosh", "asin",
    "acos", "atan", "atan2", "arctan", "erf", "erfc", "expit", "sigmoid", "logit", "relu", "relu6", "leaky_relu", "elu",
    "celu", "selu", "gelu", "silu", "mish", "hardtanh", "hardsigmoid", "hardswish", "hardshrink", "softshrink",
    "tanhshrink", "softplus", "softsign", "logsigmoid", "threshold", "rrelu", "clamp", "clamp_min", "clamp_max", "clip",
    "ceil", "floor", "round", "trunc", "frac", "nan_to_num", "float", "half", "double", "bfloat16", "long", "int",
    "bool", "to", "type", "type_as", "cpu", "cuda", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_alpha_dropout", "invert", "bitwise_not", "logical_not", "isnan", "isinf", "isfinite", "requires_grad",
    "zero", "fill", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "conj", "real",
    "imag", "masked_fill", "stochastic_depth",
))  # fmt: skip
POINTWISE_MODULES = (
    nn.Identity, nn.modules.dropout._DropoutNd, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
    nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Threshold, nn.RReLU, nn.Sigmoid, nn.Tanh,
)  # fmt: skip

# What is never negative whatever it gets, and what isn't where nothing that it gets is.
_NOT_NEGATIVE = frozenset((
    "relu", "relu6", "sigmoid", "hardsigmoid", "softplus", "exp", "abs", "square", "sqrt", "softmax", "norm",
    "linalg_vector_norm",
))  # fmt: skip
_NOT_NEGATIVE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.Softmax, nn.Softmax2d,
)  # fmt: skip
_KEEPS_SIGN = frozenset((
    "add", "iadd", "mul", "imul", "maximum", "minimum", "amax", "amin", "mean", "sum", "cat", "concat", "concatenate",
    "stack", "chunk", "split", "getitem", "flatten", "unflatten", "reshape", "view", "permute", "transpose", "movedim",
    "squeeze", "unsqueeze", "expand", "expand_as", "contiguous", "clone", "dropout", "max_pool1d", "max_pool2d",
    "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "channel_shuffle",
))  # fmt: skip
_KEEPS_SIGN_MODULES = (
    nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle,
    *(pool for pools, _ in _POOLS for pool in pools),
)  # fmt: skip


def operation_name(node: Node) -> str:
    """Name a function or method as the tables here do."""
    return plain_name(node).removeprefix("special_")


def along(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], rank: int, modules: Modules) -> Along | None:
    """Tell along which dimensions a node works on a tensor of ``rank`` dimensions; None if no rule knows it."""
    if node.op == "call_module":
        return _module_along(modules(str(node.target)), rank)
    name = operation_name(node)
    found = next((table[name] for table in (_ADDS, _LARGEST, _COUNTS) if name in table), None)
    if found is None:
        return _norm_along(name, args, kwargs, rank)
    given = kwargs.get("dim", kwargs.get("axis"))
    if given is None and found.place is not None and len(args) > found.place:
        given = args[found.place]
    if given is None or isinstance(given, bool):  # ``x.std(True)`` asks for no dimension
        given = found.default
        given = _softmax_default(rank) if given == () else given
    dims = _from_zero(given, rank)
    if dims is None:
        return None
    adds = name in _ADDS and _order_adds(name, args, kwargs)
    adds |= name in _LARGEST and _values_alone(node) and _never_negative(node.args[0], modules)
    return Along(dims, adds, name in _REDUCE)


def _softmax_default(rank: int) -> int:
    """Return along which dimension PyTorch's softmax goes if it isn't told."""
    return 0 if rank in (0, 1, 3) else 1


def _from_zero(given: Any, rank: int) -> tuple[int, ...] | None:
    """Count dimensions from 0: one, several, or all; None if they aren't known."""
    listed = list(given) if isinstance(given, Iterable) else [] if given is None else [given]
    if not all(isinstance(d, int) for d in listed):
        return None
    return tuple(d % rank for d in listed) if listed and rank else tuple(range(rank))


def _order_adds(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a norm is one that zeros add nothing to."""
    if "norm" not in name:
        return True
    order = kwargs.get("p", kwargs.get("ord", args[1] if len(args) > 1 else None))
    return order is None or order in ("fro", "nuc") or (isinstance(order, (int, float)) and order >= 0)


def _norm_along(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], rank: int) -> Along | None:
    """Tell along which dimensions a norm without a module of its own works."""
    if name == "group_norm":
        return Along(tuple(range(1, rank)), adds=False, reduces=False)
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else None)
    if name in ("layer_norm", "rms_norm") and isinstance(shape, Iterable):
        return Along(tuple(range(rank - len(list(shape)), rank)), adds=False, reduces=False)
    return None


def _module_along(module: nn.Module, rank: int) -> Along | None:
    """Tell along which dimensions a module without parameters works."""
    dims: Any = None
    if isinstance(module, (nn.Softmax, nn.LogSoftmax, nn.Softmin)):
        dims = _softmax_default(rank) if module.dim is None else module.dim
    elif isinstance(module, nn.Softmax2d):
        dims = -3
    elif isinstance(module, (nn.LocalResponseNorm, nn.CrossMapLRN2d)):
        dims = 1
    for pools, count in _POOLS:
        dims = tuple(range(-count, 0)) if isinstance(module, pools) else dims
    found = None if dims is None else _from_zero(dims, rank)
    return None if found is None else Along(found, adds=False, reduces=False)


def _values_alone(node: Node) -> bool:
    """Tell whether of the values and places that a maximum gives the values alone are read."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] != 0 and user.users:
            return False
        if user.target is getattr and user.args[1] != "values":
            return False
    return True


def _never_negative(value: Any, modules: Modules) -> bool:
    """Tell whether what a node gives can't be negative."""
    known: dict[Node, bool] = {}
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, Node) or current in known:
            if isinstance(current, (int, float)) and current < 0:
                return False
            continue
        name = operation_name(current)
        module = modules(str(current.target)) if current.op == "call_module" else None
        known[current] = True
        if isinstance(module, _NOT_NEGATIVE_MODULES) or (module is None and name in _NOT_NEGATIVE):
            continue
        least = _least(current, name, module)
        if least is not None and least >= 0:
            continue
        if name == "pow" and len(current.args) > 1 and isinstance(current.args[1], int) and current.args[1] % 2 == 0:
            continue
        keeps = isinstance(module, _KEEPS_SIGN_MODULES) or (module is None and name in _KEEPS_SIGN)
        if not keeps or current.op in ("placeholder", "get_attr"):
            return False
        # Of what only moves values the numbers among the arguments are places.
        numbers = current.args if name in ("add", "iadd", "mul", "imul") else current.all_input_nodes
        waiting += [each for each in numbers if isinstance(each, (Node, int, float))]
    return True


def _least(node: Node, name: str, module: nn.Module | None) -> float | None:
    """Return below which number a node that clamps gives nothing; None if there is none, or it isn't known."""
    least: Any = None
    if isinstance(module, nn.Hardtanh):
        least = module.min_val
    elif module is None and name in ("clamp", "clip", "clamp_min", "hardtanh"):
        least = node.kwargs.get("min", node.kwargs.get("min_val", node.args[1] if len(node.args) > 1 else None))
    return least if isinstance(least, (int, float)) else None
