"""Norms over channels, and other modules that treat all channels alike: found by running them, cut with the channels.

A library's own norm, such as LLaMA's RMS norm or ConvNeXt's response norm, is found by running it: each of its
parameters has one number a channel, and if its channels and these numbers are permuted, so are its results. With fewer
channels it is the same module with fewer numbers. The same holds for a spatial gate by the mean and the maximum over
the channels (CBAM's), which holds no number for each channel and returns the gated channels or the gate.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nni_topo.network.runtime.modules import put_attribute
from nni_topo.network.runtime.switches import random_state_kept

_NEAR = 1e-4  # tolerance for values near one, whose squares are in single precision


class Over(NamedTuple):
    """How a module works over channels."""

    dim: int  # dimension of the channels: -1 or 1
    gives_channels: bool = True  # False: its output has the same size for any number of channels
    dims: int = 1  # number of last dimensions over which it works together, such as frequencies and channels


def channel_dim(norm: nn.Module) -> int | None:
    """Return the dimension in which a norm, or a PReLU, has its channels: -1 or 1. None for any other module."""
    over = _over(norm)
    if over is None:
        return None
    return over.dim


def dims_together(norm: nn.Module) -> int:
    """Return over how many last dimensions a norm works together; 1 unless it is a layer norm over several."""
    over = _over(norm)
    if over is None:
        return 1
    return over.dims


def entries_last(norm: nn.Module, x: Tensor) -> Tensor:
    """Move a norm's channels to the last dimension of its input or output; flatten the dimensions of several."""
    over = _over(norm) or Over(1)
    if over.dims == 1:
        return x.movedim(over.dim, -1)
    return x.flatten(-over.dims)


def gives_no_channels(module: nn.Module) -> bool:
    """Tell whether a module works over channels and its output has none of them, such as a spatial gate."""
    over = _over(module)
    return over is not None and not over.gives_channels


_BY_CHANNEL = (nn.modules.batchnorm._NormBase, nn.PReLU)  # they treat each channel separately


def _over(norm: nn.Module) -> Over | None:
    if isinstance(norm, nn.PReLU):
        # A class with another forward is followed operation by operation.
        if norm.num_parameters > 1 and type(norm).forward is nn.PReLU.forward:
            return Over(1)
        return None
    if isinstance(norm, (*_BY_CHANNEL, nn.GroupNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)):
        return Over(1)
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and type(norm).__module__.startswith("torch.nn."):
        return Over(-1, dims=len(norm.normalized_shape))
    # accelerate replaces a module's forward by one that runs the original module, even in a copy
    if type(norm).__module__.startswith(("torch.", "nni_topo.")) or "forward" in vars(norm):
        return None
    parameters, parts = (
        [parameter for parameter in norm._parameters.values() if parameter is not None],
        list(norm.modules()),
    )
    if len(parts) > _MOST_PARTS or not _takes_one(norm):
        return None
    if parameters:
        has_others = any(True for part in parts[1:] for _ in part.parameters())
        width = parameters[0].numel()
        if (
            has_others
            or width < 2
            or any(parameter.numel() != width or max(parameter.shape) != width for parameter in parameters)
        ):
            return None
    attributes = [{name: value for name, value in vars(part).items() if name not in _USUAL} for part in parts]
    if norm._buffers or not all(_is_plain(value) for values in attributes for value in values.values()):
        # A part may hold anything, such as a function that it calls. Then norms are tried each time, and gates aren't.
        if parameters:
            return _tried(norm, parameters)
        return None
    numbers = list(norm.parameters())
    if not parameters and (
        any(parameter.is_meta for parameter in numbers)
        or sum(parameter.numel() for parameter in numbers) > _MOST_NUMBERS
    ):
        return None
    shapes = [(name, tuple(parameter.shape)) for name, parameter in norm.named_parameters()]
    key = type(norm), f"{shapes} {attributes} {[type(part) for part in parts]}"
    if key not in _KNOWN:
        _KNOWN[key] = _tried(norm, parameters)
    return _KNOWN[key]


def _takes_one(norm: nn.Module) -> bool:
    """Tell whether a forward runs on one argument; another that it needs may be a gate."""
    parameters = inspect.signature(norm.forward).parameters.values()
    return len([parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]) == 1


_KNOWN: dict[Any, Over | None] = {}  # cache, by class, shapes, attributes and parts of a module
_USUAL = vars(nn.Module()).keys() - {"training"}
_MOST_PARTS = 12  # modules in a gate: itself, pools, a convolution of their results, an activation
_MOST_NUMBERS = 256  # parameters of a gate; CBAM's has 98
_FEW = 2  # a module must run on so few channels, too
_WIDTHS = ("dim", "size", "width", "channel", "feature", "hidden", "shape")  # in names of channel counts
_WIDTHS_TRIED = (6, 4099)  # for a module that holds nothing for each channel


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, str))


def _tried(norm: nn.Module, parameters: list[nn.Parameter]) -> Over | None:
    """Run a module to find how it works over channels."""
    width = _width_held(norm)
    if norm._modules or norm._buffers:  # a forward may change its buffers
        try:
            norm = copy.deepcopy(norm).to("cpu", torch.float32).eval()
        except Exception:  # it may hold a lock, for example
            return None
    if width is not None:
        return _tried_at(norm, parameters, width)
    # The larger width reveals modules that select channels by a fixed index or slice.
    over = _tried_at(norm, parameters, _WIDTHS_TRIED[0])
    if over is None or _tried_at(norm, parameters, _WIDTHS_TRIED[1]) == over:
        return over
    return None


def _tried_at(norm: nn.Module, parameters: list[nn.Parameter], width: int) -> Over | None:
    """Run a module on inputs of one width to find how it works over channels."""
    holds_width = _width_held(norm) is not None
    drawing = torch.Generator().manual_seed(0)
    order = torch.cat([torch.arange(1, width, 2), torch.arange(0, width, 2)])  # across groups and neighbours
    numbers = [torch.linspace(0.5, 1.5 + at, width).view(parameter.shape) for at, parameter in enumerate(parameters)]
    module = _with_parameters(norm, numbers)
    fewer, kept_channels = _with_parameters(norm, numbers), torch.arange(_FEW if width > _FEW else 1)
    cut_norm(fewer, kept_channels)
    permuted = _with_parameters(norm, [row.flatten()[order].view(row.shape) for row in numbers])
    images = torch.randn(2, 3, 4, width, generator=drawing)
    # Norms with the channels first may take only texts, of three dimensions. A module that holds nothing for each
    # channel may treat positions alike, and only images with the channels first tell these from channels.
    for x in (images, images.flatten(1, 2)) if holds_width else (images,):
        for dim in (-1, 1) if holds_width else (1,):
            try:
                with torch.no_grad(), random_state_kept():
                    output = module.forward(x.movedim(-1, dim)).movedim(dim, -1)
                    turned = permuted.forward(x[..., order].movedim(-1, dim)).movedim(dim, -1)
                    changed_input = torch.cat([x[..., :1], 1 - x[..., 1:]], -1)
                    changed = module.forward(changed_input.movedim(-1, dim)).movedim(dim, -1)
                    narrow = fewer.forward(x[..., kept_channels].movedim(-1, dim)).movedim(dim, -1)
            except Exception:  # a forward may raise anything
                continue
            gives_channels = output.shape == x.shape
            if gives_channels:
                is_alike = narrow.shape == x[..., kept_channels].shape and _agree(output[..., order], turned)
                changes = not _agree(output[..., 0], changed[..., 0])
            else:
                is_alike = not holds_width and output.shape[:-1] == x.shape[:-1] and narrow.shape == output.shape
                is_alike = is_alike and _agree(output, turned)
                changes = not _agree(output, changed)
            # A module that treats each channel separately is no norm.
            if is_alike and changes:
                return Over(dim, gives_channels)
    return None


def _agree(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=_NEAR, atol=_NEAR)


def _with_parameters(norm: Any, numbers: list[Tensor]) -> Any:
    """Return a shallow copy of a norm with these values of its parameters."""
    copied = copy.copy(norm)
    copied._parameters = dict(norm._parameters)
    names = [name for name, parameter in norm._parameters.items() if parameter is not None]
    for name, values in zip(names, numbers, strict=True):
        copied._parameters[name] = nn.Parameter(values, requires_grad=False)
    return copied


def scales_channels(norm: nn.Module) -> bool:
    """Tell whether a norm multiplies each channel by an entry of its weight, so that zeros there silence a channel."""
    weight, over = getattr(norm, "weight", None), _over(norm)
    if over is None or over.dims > 1 or not isinstance(weight, Tensor):
        return False
    if isinstance(norm, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
        return True
    # Gemma's norm, for example, multiplies by one more than its weight.
    numbers = [torch.zeros(parameter.shape) for parameter in norm._parameters.values() if parameter is not None]
    if any(number.dim() != 1 for number in numbers):
        return False
    x = torch.randn(2, 3, 4, weight.numel(), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), random_state_kept():
            return not bool(_with_parameters(norm, numbers).forward(x.movedim(-1, over.dim)).any())
    except Exception:  # a forward may raise anything
        return False


def is_over_channels(module: nn.Module) -> bool:
    """Tell whether a module combines channels, all in the same way, like layer, RMS and group norms and gates."""
    return not isinstance(module, _BY_CHANNEL) and channel_dim(module) is not None


def numbers_of(parameter: Tensor, places: Tensor) -> Tensor:
    """Return a norm's numbers for some channels, from a parameter with one number a channel.

    Of a norm over several dimensions, ``kept`` lists entries of these, flattened: all combinations of some indices.
    """
    sizes = [len(indices) for indices in _indices_of(tuple(parameter.shape), places)]
    return parameter.flatten().index_select(0, places).view(sizes)


def _indices_of(shape: tuple[int, ...], places: Tensor) -> list[list[int]]:
    """Return the indices in each dimension of entries of a flattened tensor, each once, in their order."""
    return [list(dict.fromkeys(indices.tolist())) for indices in torch.unravel_index(places, shape)]


def cut_norm(norm: Any, places: Tensor) -> None:
    """Keep some channels of a norm over channels, or entries of one over several dimensions, in place."""
    shape = _shape_held(norm)
    if shape is None:
        return
    sizes = tuple(len(indices) for indices in _indices_of(shape, places))
    names = list[str]()  # of the attributes that hold the width, as a number or in a tuple
    for name, value in vars(norm).items():
        is_width = type(value) is int and (value,) == shape and any(word in name.lower() for word in _WIDTHS)
        if is_width or (isinstance(value, tuple) and value == shape):
            names.append(name)
    for name, parameter in list(norm._parameters.items()):
        if parameter is not None:
            numbers = numbers_of(parameter, places).detach()
            put_attribute(norm, name, nn.Parameter(numbers, requires_grad=parameter.requires_grad))
    for name in names:
        put_attribute(norm, name, sizes if isinstance(getattr(norm, name), tuple) else sizes[0])


def _shape_held(norm: nn.Module) -> tuple[int, ...] | None:
    """Return the sizes that a norm is made for, of several dimensions or of the channels; None if it takes any."""
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        return tuple(norm.normalized_shape)
    parameters = [parameter for parameter in norm._parameters.values() if parameter is not None]
    if parameters:
        return (parameters[0].numel(),)
    for name, value in vars(norm).items():
        is_width = isinstance(value, tuple) and len(value) == 1 and type(value[0]) is int and value[0] > 1
        if is_width and any(word in name.lower() for word in _WIDTHS):
            return tuple(value)
    return None


def _width_held(norm: nn.Module) -> int | None:
    """Return the number of channels that a norm is made for; None if it takes any number."""
    shape = _shape_held(norm)
    if shape is None:
        return None
    return math.prod(shape)
