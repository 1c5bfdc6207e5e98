"""Layer, RMS, group and response norms with pruned channels, whose statistics are those of the original width.

The pruned channels enter these statistics as zeros. With ``s`` the share of the kept channels, the mean over all
channels is ``s`` times the mean of the kept ones, and so is the mean square. The variance is ``s`` times the mean
squared distance of the kept channels from the mean over all, plus ``1 - s`` times the square of that mean, for the
pruned ones. A plain norm of the smaller size would compute other values. A response norm (GRN, of ConvNeXt v2) divides
by the mean of the channels' lengths over all places.

As in PyTorch's norms, the statistics of half precision are taken in single precision, in which squares don't overflow;
outputs have the precision of the inputs, under autocast too.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

# What norms add to a variance or mean square, where no attribute says it. None: PyTorch's, by the type of what enters.
_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3, None)
_NEAR = 64 * torch.finfo(torch.float32).eps  # of norms of the same values in single precision


def _precise(x: Tensor) -> Tensor:
    """Return a tensor in single precision at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _channels_back(x: Tensor, dim: int) -> Tensor:
    """Move the last dimension to a place. PyTorch's older ONNX exporter takes -1 for no place to move it from."""
    return x.movedim(x.dim() - 1, dim)


def _normalized(x: Tensor, share: float, eps: float) -> Tensor:
    """Return values with the mean and variance over their last dimension that they would have with zeros beside them.

    ``share``: that of the values, in (0, 1], among them and the zeros. No size is read: PyTorch's older ONNX exporter
    would write it into the file. This is for CPUs. On a GPU each operation reads and writes all values and has to be
    launched, so there the norms write the zeros, and PyTorch's own kernel does the rest: three operations instead of a
    dozen. A CPU takes longer over the zeros.
    """
    # Sums along contiguous memory: `var_mean`, and the layouts that layers may return, take up to ten times as long.
    x = _precise(x.contiguous())
    mean = share * x.mean(-1, keepdim=True)
    x = x - mean
    # Not `torch.linalg.vecdot`, which autocast computes in half precision.
    variance = share * (x * x).mean(-1, keepdim=True) + (1 - share) * mean.square()
    return x * torch.rsqrt(variance + eps)


def _weighed(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return normalized values times a weight, plus a bias."""
    if weight is None:
        return x if bias is None else x + bias
    if bias is None:
        return x * weight
    # One operation counts on a GPU. Core ML's converter, whose programs are of the CPU, doesn't know it.
    return x * weight + bias if x.device.type == "cpu" else torch.addcmul(bias, x, weight)


class OriginalWidthLayerNorm(nn.LayerNorm):
    """A layer norm with the statistics of ``counted`` channels; all but ``normalized_shape`` of them are pruned."""

    counted: int
    dim: int  # -1, or 1 in networks that hold channels first
    shift: float = 0.0

    def forward(self, images: Tensor) -> Tensor:
        """Normalize along the channels: ``(..., channels)``, or ``(batch, channels, ...)`` if ``dim`` is 1."""
        kept, x = images.shape[self.dim], images.movedim(self.dim, -1)
        if images.device.type == "cpu":
            x = _normalized(x, kept / self.counted, self.eps)
        else:
            x = functional.pad(x, (0, self.counted - kept))
            x = functional.layer_norm(x, (self.counted,), eps=self.eps)[..., :kept]
        factors = _precise(self.weight) + self.shift if self.shift else self.weight
        return _channels_back(_weighed(x, factors, self.bias), self.dim).to(images.dtype)

    def extra_repr(self) -> str:
        """Show the original width too."""
        return f"{super().extra_repr()}, counted={self.counted}"


class OriginalWidthRMSNorm(nn.RMSNorm):
    """An RMS norm with the statistics of ``counted`` channels; all but ``normalized_shape`` of them are pruned."""

    counted: int
    shift: float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Normalize along the channels: ``(..., channels)``."""
        kind, kept, x = x.dtype, x.shape[-1], _precise(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        # The mean square of the kept channels is `counted / kept` times that of all, and so has to be the epsilon.
        ratio = self.counted / kept
        if not self.elementwise_affine:
            normed: Tensor = functional.rms_norm(x, (kept,), eps=ratio * eps) * ratio**0.5
        else:
            factors = (self.weight + self.shift).to(x.dtype) * ratio**0.5
            normed = functional.rms_norm(x, (kept,), factors, ratio * eps)
        return normed.to(kind)

    def extra_repr(self) -> str:
        """Show the original width too."""
        return f"{super().extra_repr()}, counted={self.counted}"


class ShiftedLayerNorm(nn.LayerNorm):
    """A layer norm whose factors are its weights plus ``shift``, which is 1 in Nemotron."""

    shift: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalize along the channels, in single precision at least: ``(..., channels)``."""
        kind = torch.promote_types(x.dtype, torch.float32)
        factors, bias = self.weight.to(kind) + self.shift, None if self.bias is None else self.bias.to(kind)
        return functional.layer_norm(x.to(kind), self.normalized_shape, factors, bias, self.eps).to(x.dtype)


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """A layer norm of images that hold their channels first, as ConvNeXt's: ``(batch, channels, ...)``."""

    def forward(self, images: Tensor) -> Tensor:
        """Normalize along the channels."""
        return _channels_back(super().forward(images.movedim(1, -1)), 1)


class ShiftedRMSNorm(nn.RMSNorm):
    """An RMS norm whose factors are its weights plus ``shift``, which is 1 in Gemma."""

    shift: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalize along the channels, in single precision at least: ``(..., channels)``."""
        kind = torch.promote_types(x.dtype, torch.float32)
        factors = self.weight.to(kind) + self.shift
        return functional.rms_norm(x.to(kind), self.normalized_shape, factors, self.eps).to(x.dtype)


class OriginalWidthGroupNorm(nn.GroupNorm):
    """A group norm with the statistics of groups of ``counted`` channels, of which equally many in each are pruned."""

    counted: int

    def forward(self, images: Tensor) -> Tensor:
        """Normalize within each group: ``(batch, channels, ...)``."""
        kept = self.num_channels // self.num_groups
        x = images.unflatten(1, (self.num_groups, kept))
        if images.device.type == "cpu":
            x = _normalized(x.flatten(2), kept / self.counted, self.eps).reshape(images.shape)
        else:
            x = functional.pad(x, (*[0, 0] * (images.dim() - 2), 0, self.counted - kept)).flatten(1, 2)
            x = functional.group_norm(x, self.num_groups, eps=self.eps)
            x = x.unflatten(1, (self.num_groups, self.counted))[:, :, :kept].flatten(1, 2)
        view = (-1, *[1] * (x.dim() - 2))
        weight, bias = (None if each is None else each.view(view) for each in (self.weight, self.bias))
        return _weighed(x, weight, bias).to(images.dtype)

    def extra_repr(self) -> str:
        """Show the original width too."""
        return f"{super().extra_repr()}, counted={self.counted}"


class OriginalWidthResponseNorm(nn.Module):
    """A global response norm with the statistics of ``counted`` channels; those that its parameters lack are pruned."""

    counted: int
    dim: int  # -1, or 1 in networks that hold channels first
    eps: float
    names: tuple[str, str]  # of the gain and the shift; FSDP and replicas of DataParallel list no parameters

    def forward(self, images: Tensor) -> Tensor:
        """Weigh channels by their length relative to the mean length: four dimensions, channels in ``dim``."""
        gain, shift = (getattr(self, name).flatten() for name in self.names)
        x = _precise(images.movedim(self.dim, -1))
        lengths = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        found: Tensor = x + shift + gain * x * lengths / (lengths.sum(-1, keepdim=True) / self.counted + self.eps)
        return _channels_back(found, self.dim).to(images.dtype)

    def extra_repr(self) -> str:
        """Show the kept channels and the original width."""
        return f"{next(self.parameters()).numel()}, counted={self.counted}"


def response_norm(norm: nn.Module) -> OriginalWidthResponseNorm | None:
    """Return the global response norm that a custom module computes, with its parameters; None if it computes none.

    Both are run and compared, on inputs of which some are as small as the epsilon added to their mean length.
    """
    if isinstance(norm, OriginalWidthResponseNorm):
        return norm
    sizes = [parameter.numel() for parameter in norm.parameters()]
    is_other = not type(norm).__module__.startswith(("torch.", "nni_topo."))
    if not is_other or len(sizes) != 2 or sizes[0] != sizes[1] or sizes[0] < 2 or norm._buffers or norm._modules:
        return None
    gain, shift = (
        nn.Parameter(torch.linspace(low, high, sizes[0], dtype=torch.float64)) for low, high in ((0.5, 1.5), (-1, 1))
    )
    tried: Any = copy.deepcopy(norm)
    made = OriginalWidthResponseNorm()
    for (name, old), new in zip(norm.named_parameters(), (gain, shift), strict=True):
        setattr(tried, name, nn.Parameter(new.view(old.shape)))
    made.gain, made.shift, made.counted, made.names = gain, shift, sizes[0], ("gain", "shift")
    rows = torch.linspace(-9, 9, 24 * sizes[0], dtype=torch.float64).sin().view(2, 3, 4, -1)
    rows[1] *= 1e-6
    eps = getattr(norm, "eps", 1e-6)
    for made.dim in (-1, 1) if isinstance(eps, float) else ():
        made.eps, x = eps, rows.movedim(-1, made.dim)
        with torch.no_grad():
            try:
                given, wanted = tried.forward(x), made.forward(x)
            except Exception:  # a forward fails in as many ways as it is written
                continue
        if _is_same(given, wanted, rtol=1e-9, atol=1e-12):
            return made
    return None


def _is_same(given: Any, wanted: Tensor, *, rtol: float, atol: float) -> bool:
    """Tell whether a module gave a tensor, of the same shape, type and, within rounding, values as another."""
    if not isinstance(given, Tensor) or given.shape != wanted.shape or given.dtype != wanted.dtype:
        return False
    return torch.allclose(given, wanted, rtol=rtol, atol=atol)


def channel_dim(norm: nn.Module) -> int | None:
    """Return the dimension in which a norm has its channels; None if a custom class may do more than normalize.

    A class derived from ``nn.LayerNorm`` or ``nn.RMSNorm`` is run to find out.
    """
    if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        response = response_norm(norm)
        return 1 if response is None else response.dim
    if isinstance(norm, OriginalWidthLayerNorm):
        return norm.dim
    if len(norm.normalized_shape) != 1:
        return None
    if type(norm) in (nn.LayerNorm, ShiftedLayerNorm, nn.RMSNorm, ShiftedRMSNorm, OriginalWidthRMSNorm):
        return -1
    weight = next(norm.parameters(), torch.zeros(0))
    images = torch.linspace(-1, 2, 6 * norm.normalized_shape[0]).view(1, 2, 3, -1).to(weight)
    for x in (images, images.flatten(1, 2)):  # norms with the channels first may take texts, of three dimensions, alone
        if isinstance(norm, nn.RMSNorm):
            plain, dims = functional.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps), [-1]
        else:
            plain, dims = functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps), [1, -1]
        for dim in dims:
            try:
                given = norm.forward(x.movedim(-1, dim))  # a tracer would take `norm(...)` for a call of the model's
            except Exception:  # a forward fails in as many ways as it is written
                continue
            if _is_same(given, plain.movedim(-1, dim), rtol=1e-5, atol=1e-5):
                return dim
    return None


def plain_norm(norm: nn.Module) -> nn.Module | None:
    """Return the RMS or layer norm that computes what a custom module does; None without one.

    It is one of PyTorch's, a shifted one, or one of channels first. It has the module's gain and bias, whatever their
    names. Both are run in single precision and compared, on inputs of which some are as small as the epsilons that are
    added to their squares. A class derived from PyTorch's that has the right parameters, and whose channels
    `channel_dim` finds, needs no other.
    """
    own = list(norm.parameters())
    is_other = not type(norm).__module__.startswith(("torch.", "nni_topo."))
    if not is_other or len(own) not in (1, 2) or not own[0].numel():
        return None
    if any(each.dim() != 1 or each.shape != own[0].shape for each in own):
        return None
    if len(inspect.signature(norm.forward).parameters) > 1:  # a gate, say
        return None
    kinds: tuple[type[nn.Module], ...] = (nn.LayerNorm, ShiftedLayerNorm)
    is_known = isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and channel_dim(norm) is not None
    if is_known and (isinstance(norm, nn.RMSNorm) or len(own) == 2):
        return None
    if len(own) == 1:
        kinds = (nn.RMSNorm, ShiftedRMSNorm, *kinds)
    numbers = [each for each in vars(norm).values() if isinstance(each, float) and each > 0]
    width = own[0].numel()
    rows = torch.linspace(-1, 2, 6 * width).view(6, -1) * torch.tensor([1.0, 10.0, 0.1, 1e-2, 1e-3, 1e-5])[:, None]
    # Other parameters than its own, which may be all ones and zeros and hide how they are used.
    drawn = [torch.linspace(low, high, width) for low, high in ((0.5, 1.5), (1.0, -1.0))[: len(own)]]
    rows, *drawn = (each.to(own[0].device) for each in (rows, *drawn))
    with torch.no_grad():
        # Half precision, which tells no epsilons apart, only shows whether the norm gives the type that it gets.
        large = rows[:3].to(own[0].dtype)
        if _as_rows(norm, large, -1) is None and _as_rows(norm, large, 1) is None:
            return None
        try:
            tried: Any = copy.deepcopy(norm).float()
            for (name, _), values in zip(norm.named_parameters(), drawn, strict=True):
                setattr(tried, name, nn.Parameter(values))
        except Exception:  # a module of one's own refuses as it likes
            return None
        given = _as_rows(tried, rows, -1)
        if given is None:
            kinds, given = (ChannelsFirstLayerNorm,), _as_rows(tried, rows, 1)
        if given is None:
            return None
        for kind, eps in itertools.product(kinds, dict.fromkeys([*numbers, *_EPS])):
            if eps is None and not issubclass(kind, nn.RMSNorm):
                continue
            for order in itertools.permutations(range(len(own))):
                made: Any = kind(width, eps=eps, device="meta")
                if isinstance(made, (ShiftedRMSNorm, ShiftedLayerNorm)):
                    made.shift = 1.0
                _take(made, [drawn[place] for place in order])
                found = _as_rows(made, rows, 1 if kind is ChannelsFirstLayerNorm else -1)
                if found is not None and _is_same(given, found, rtol=_NEAR, atol=_NEAR):
                    _take(made, [own[place] for place in order])
                    return cast("nn.Module", made)
    return None


def _take(norm: Any, parameters: list[Tensor]) -> None:
    """Give a norm a weight, and a bias if there are two parameters."""
    weight, *biases = (each if isinstance(each, nn.Parameter) else nn.Parameter(each) for each in parameters)
    norm.weight = weight
    if isinstance(norm, nn.LayerNorm):
        norm.register_parameter("bias", biases[0] if biases else None)


def _as_rows(norm: nn.Module, rows: Tensor, dim: int) -> Tensor | None:
    """Run a norm on rows, (rows, channels), with the channels in a dimension of images; None if it's no norm of rows.

    A norm over groups, or over all places of a sample, does the same to single rows, and something else to an image
    whose places they are.
    """
    apart, together = rows if dim == -1 else rows[:, None, None], rows.view(1, len(rows), 1, -1)
    try:
        one = norm.forward(apart.movedim(-1, dim))
        other = norm.forward(together.movedim(-1, dim))
    except Exception:  # a forward fails in as many ways as it is written
        return None
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.numel() != rows.numel():
        return None
    one, other = one.movedim(dim, -1), other.movedim(dim, -1)
    near = max(_NEAR, 64 * torch.finfo(rows.dtype).eps)
    if one.shape != apart.shape or one.dtype != rows.dtype:
        return None
    return one.reshape(rows.shape) if _is_same(other, one.reshape(together.shape), rtol=near, atol=near) else None


def silent_value(norm: nn.Module, name: str) -> float:
    """Return the value that a norm's parameter of this name holds for a channel that comes out as zero."""
    if name == "weight" and isinstance(norm, (ShiftedLayerNorm, OriginalWidthLayerNorm)):
        return -norm.shift
    return 0.0


def keep_original_width(norm: nn.Module, channels: int) -> None:
    """Let a norm go on with the statistics of so many channels (of a group); one that does already keeps its number."""
    kinds = {
        nn.LayerNorm: OriginalWidthLayerNorm,
        nn.RMSNorm: OriginalWidthRMSNorm,
        nn.GroupNorm: OriginalWidthGroupNorm,
    }
    if isinstance(norm, (*kinds.values(), OriginalWidthResponseNorm)):
        return
    if response := response_norm(norm):
        gain, shift = (name for name, _ in norm.named_parameters())
        norm.__class__ = OriginalWidthResponseNorm
        norm.names = gain, shift  # type: ignore[assignment]
        norm.counted, norm.dim, norm.eps = channels, response.dim, response.eps  # type: ignore[assignment]
        return
    dim = channel_dim(norm)
    kind = next(wide for plain, wide in kinds.items() if isinstance(norm, plain))
    norm.__class__ = kind
    norm.counted, norm.dim = channels, dim  # type: ignore[assignment]
