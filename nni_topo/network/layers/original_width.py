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
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

_EPS = ("variance_epsilon", "eps", "epsilon")


def _precise(x: Tensor) -> Tensor:
    """Return a tensor in single precision at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalized(x: Tensor, width: int, eps: float) -> Tensor:
    """Return values with the mean and variance that their last dimension would have with zeros after it up to a width.

    On a GPU each operation reads and writes all values and has to be launched, so there the zeros are written and
    PyTorch's own kernel does the rest: three operations instead of a dozen. A CPU takes longer over the zeros.
    """
    kept = x.shape[-1]
    if x.device.type != "cpu":
        return functional.layer_norm(functional.pad(x, (0, width - kept)), (width,), eps=eps)[..., :kept]
    # Sums along contiguous memory: `var_mean`, and the layouts that layers may return, take up to ten times as long.
    x, share = _precise(x.contiguous()), kept / width
    mean = share * x.mean(-1, keepdim=True)
    x = x - mean
    # Not `torch.linalg.vecdot`, which autocast computes in half precision.
    variance = share * (x * x).sum(-1, keepdim=True) / kept + (1 - share) * mean.square()
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
        x = _normalized(images.movedim(self.dim, -1), self.counted, self.eps)
        factors = _precise(self.weight) + self.shift if self.shift else self.weight
        return _weighed(x, factors, self.bias).movedim(-1, self.dim).to(images.dtype)

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
        groups = images.unflatten(1, (self.num_groups, -1)).flatten(2)
        width = groups.shape[2] // (images.shape[1] // self.num_groups) * self.counted
        x = _normalized(groups, width, self.eps).reshape(images.shape)
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
        return found.movedim(-1, self.dim).to(images.dtype)

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

    A class derived from ``nn.LayerNorm`` is run to find out.
    """
    if isinstance(norm, nn.RMSNorm):
        return (
            -1
            if type(norm) in (nn.RMSNorm, ShiftedRMSNorm, OriginalWidthRMSNorm) and len(norm.normalized_shape) == 1
            else None
        )
    if not isinstance(norm, nn.LayerNorm):
        response = response_norm(norm)
        return 1 if response is None else response.dim
    if isinstance(norm, OriginalWidthLayerNorm):
        return norm.dim
    if len(norm.normalized_shape) != 1:
        return None
    if type(norm) in (nn.LayerNorm, ShiftedLayerNorm):
        return -1
    weight = next(norm.parameters(), torch.zeros(0))
    images = torch.linspace(-1, 2, 6 * norm.normalized_shape[0]).view(1, 2, 3, -1).to(weight)
    for x in (images, images.flatten(1, 2)):  # norms with the channels first may take texts, of three dimensions, alone
        plain = functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        for dim in (1, -1):
            try:
                given = norm.forward(x.movedim(-1, dim))  # a tracer would take `norm(...)` for a call of the model's
            except Exception:  # a forward fails in as many ways as it is written
                continue
            if _is_same(given, plain.movedim(-1, dim), rtol=1e-5, atol=1e-5):
                return dim
    return None


def plain_norm(norm: nn.Module) -> nn.Module | None:
    """Return the RMS or layer norm, of PyTorch's or shifted, that computes what a custom module does; None without one.

    It has the module's weight and bias. Both are run and compared, on inputs of which some are as small as the epsilon
    added to their squares. A class derived from ``nn.LayerNorm`` that has a bias, and whose channels `channel_dim`
    finds, needs no other.
    """
    own, weight = dict(norm.named_parameters()), getattr(norm, "weight", None)
    eps = next((each for key in _EPS if isinstance(each := getattr(norm, key, None), float)), None)
    is_other = not type(norm).__module__.startswith(("torch.", "nni_topo."))
    if not is_other or list(own) not in (["weight"], ["weight", "bias"]) or eps is None:
        return None
    if weight is None or weight.dim() != 1 or any(each.shape != weight.shape for each in own.values()):
        return None
    if len(inspect.signature(norm.forward).parameters) > 1:  # a gate, say
        return None
    kinds: tuple[type[nn.Module], ...] = (nn.RMSNorm, ShiftedRMSNorm, nn.LayerNorm, ShiftedLayerNorm)
    if "bias" in own:
        if isinstance(norm, nn.LayerNorm) and channel_dim(norm) is not None:
            return None
        kinds = (nn.LayerNorm, ShiftedLayerNorm)
    rows = torch.linspace(-1, 2, 3 * len(weight)).view(3, -1) * torch.tensor([[1.0], [eps**0.5], [10.0]])
    rows = rows.to(weight)
    near = 64 * torch.finfo(weight.dtype).eps
    with torch.no_grad():
        try:
            given = norm.forward(rows)
            # A norm over groups, or over all places of a sample, does the same to rows, and something else here.
            places = norm.forward(rows.view(1, 3, 1, -1))
        except Exception:  # a forward fails in as many ways as it is written
            return None
        if not isinstance(given, Tensor) or given.shape != rows.shape:
            return None
        if not _is_same(places, given.reshape(1, 3, 1, -1), rtol=near, atol=near):
            return None
        for kind in kinds:
            made: Any = kind(len(weight), eps=eps, device="meta")
            made.weight = weight
            if issubclass(kind, nn.LayerNorm):
                made.bias = own.get("bias")
            if isinstance(made, (ShiftedRMSNorm, ShiftedLayerNorm)):
                made.shift = 1.0
            if _is_same(given, made.forward(rows), rtol=near, atol=near):
                return cast("nn.Module", made)
    return None


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
