"""Kinds of layers: how many channels they output, where their weights hold these, and what norms do to channels."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.prune import remove as remove_pruning
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.optim.optimizer import register_optimizer_step_post_hook

from nni_topo.errors import unknown_name
from nni_topo.network.layers.derived import adopt, inner_of, plain_layer
from nni_topo.network.layers.norms import channel_dim, scales_channels
from nni_topo.network.runtime.arguments import MODEL, STRUCTURE
from nni_topo.network.runtime.copies import detached_copy, evaluation_mode
from nni_topo.network.runtime.hooks import counted_places
from nni_topo.network.runtime.public import public
from nni_topo.rules import checked

_logger = logging.getLogger(__name__)

CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)
RECURRENT = (torch.nn.RNNBase, torch.nn.RNNCellBase)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, torch.nn.Linear)
NORMALIZING = (torch.nn.modules.batchnorm._NormBase, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.RMSNorm)
PER_CHANNEL = (*NORMALIZING, torch.nn.PReLU)
"""Modules that hold one number a channel, and keep the order of channels."""


@dataclasses.dataclass(frozen=True)
class ChannelRule:
    """How channels are cut out of a custom module."""

    cut: Callable[[Any, torch.Tensor], None]
    dim: int


RULES: dict[type[torch.nn.Module], ChannelRule] = {}


@checked()
def register_module(kind: type[torch.nn.Module], cut: Callable[[Any, torch.Tensor], None], *, dim: int = 1) -> None:
    """Register how to cut channels out of a module that treats each channel separately, if tracing can't show that.

    `dependency_groups` checks that each output channel depends only on the same input channel, and is zero where that
    is.

    Parameters
    ----------
    kind : type
        The module's class. It isn't traced into; its output has the shape of its first input.
    cut : callable
        Called with such a module and the indices of the kept channels, ascending or in the order in which they enter,
        int64, shape (kept,); makes the module smaller in place.
    dim : int, default=1
        The dimension of the input that holds the channels, -1 for the last.

    Examples
    --------
    >>> class Gain(torch.nn.Module):
    ...     def __init__(self, channels):
    ...         super().__init__()
    ...         self.gains = torch.nn.Parameter(torch.ones(channels))
    ...     def forward(self, images):
    ...         return torch.stack([image * self.gains[:, None, None] for image in images])
    >>> def shorten(module, kept):
    ...     module.gains = torch.nn.Parameter(module.gains.detach()[kept])
    >>> register_module(Gain, shorten)
    """
    RULES[kind] = ChannelRule(cut, dim)


@public(model=STRUCTURE)
def as_torch_layers(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model with PyTorch's plain layers in place of custom ones that compute the same.

    ``Conv1D``, as in GPT-2, is a linear layer with a transposed weight, of shape (inputs, outputs); NNI, and this
    package, would mistake its inputs for outputs.

    Parameters
    ----------
    model : torch.nn.Module
        Not wrapped by NNI. It isn't changed.

    Returns
    -------
    torch.nn.Module
        A model that computes the same, with linear layers for ``Conv1D``. Linear layers and convolutions of classes
        that aren't derived from PyTorch's, such as PyTorch Geometric's ``Linear``, become PyTorch's if their parameter
        is called ``weight``. Weights computed by weight norm, spectral norm, another parametrization or the masks of
        ``torch.nn.utils.prune`` become plain ones with their values in evaluation mode.
    """
    return with_linear_layers(with_plain_weights(model))


_CLASS = "class_with_transposed_weight"


def with_linear_layers(model: torch.nn.Module) -> torch.nn.Module:
    """Replace each ``Conv1D`` by a linear layer, in place, which stores the replaced class."""

    def linear(module: Any) -> torch.nn.Module | None:
        if not is_transposed_linear(module):
            return None
        entering, leaving = module.weight.shape
        layer = torch.nn.Linear(entering, leaving, device="meta")
        setattr(layer, _CLASS, type(module))
        return layer

    return _with_transposed(model, linear)


def with_transposed_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Restore each ``Conv1D`` that `with_linear_layers` replaced, in its current size, in place."""

    def transposed(module: Any) -> torch.nn.Module | None:
        if _CLASS not in vars(module):
            return None
        with torch.device("meta"):
            layer: torch.nn.Module = vars(module)[_CLASS](*module.weight.shape)
        return layer

    return _with_transposed(model, transposed)


def _with_transposed(
    model: torch.nn.Module, make: Callable[[torch.nn.Module], torch.nn.Module | None]
) -> torch.nn.Module:
    """Replace each layer for which ``make`` returns another, which gets the transposed weight."""
    replacements: dict[torch.nn.Module, Any] = {}  # a module with two names stays one
    for name, module in list(model.named_modules(remove_duplicate=False)):
        old: Any = module
        if module not in replacements:
            replacements[module] = new = make(module) if name else None
            if new is not None:
                new.weight = torch.nn.Parameter(old.weight.detach().T.contiguous(), old.weight.requires_grad)
                new.bias = old.bias
                new.train(old.training)
        if replacements[module] is not None:
            model.set_submodule(name, replacements[module])
    return model


# How to remove a hook that computes a weight before each call, such that the computed weight stays.
_REMOVERS: dict[type[Any], tuple[str, Callable[[Any, str], Any]]] = {
    WeightNorm: ("name", remove_weight_norm),
    SpectralNorm: ("name", remove_spectral_norm),
    BasePruningMethod: ("_tensor_name", remove_pruning),
}


def with_plain_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model whose weights are parameters, with the values that they have in evaluation mode.

    Linear layers and convolutions of other classes become PyTorch's in it.
    """
    copied: torch.nn.Module = detached_copy(model)
    with evaluation_mode(copied):
        for module in copied.modules():
            if is_parametrized(module):
                # PyTorch's own function would remove the weight from the class, which copies share.
                parametrizations: Any = module.parametrizations
                computed = {name: getattr(module, name).detach().clone() for name in parametrizations}
                trained = {
                    name: any(parametrization.requires_grad for parametrization in parametrizations[name].parameters())
                    for name in parametrizations
                }
                del module.parametrizations
                module.__class__ = type(module).__bases__[0]
                for name, value in computed.items():
                    module.register_parameter(name, torch.nn.Parameter(value, trained[name]))
            for hook in list(module._forward_pre_hooks.values()):
                for kind, (attribute, remove) in _REMOVERS.items():
                    if isinstance(hook, kind):
                        remove(module, getattr(hook, attribute))
        adopt(copied)
    return copied


def without_plain_weights(model: torch.nn.Module) -> list[str]:
    """Name the layers that :func:`with_plain_weights` changes."""
    names = []
    for name, module in model.named_modules():
        has_hook = any(isinstance(hook, tuple(_REMOVERS)) for hook in module._forward_pre_hooks.values())
        if is_parametrized(module) or has_hook or (name and plain_layer(module) is not None):
            names.append(name)
    return names


def is_scripted(module: Any) -> bool:
    """Tell whether a module is compiled by ``torch.jit``, so that its layers can't be traced or cut."""
    return isinstance(module, torch.jit.ScriptModule)


def is_recurrent(module: Any) -> bool:
    """Tell whether a module is a recurrent layer whose units can be pruned: PyTorch's, without a projection."""
    return type(module) in (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN) and not module.proj_size


def recurrent_products(module: torch.nn.Module) -> int:
    """Count the multiplications of a recurrent layer, or of a cell, at one step: one for each weight."""
    # By name, because NNI's wrapper holds the pruned weights itself.
    names = module._flat_weights_names if isinstance(module, torch.nn.RNNBase) else ("weight_ih", "weight_hh")
    return sum(getattr(module, name).numel() for name in names if name.startswith("weight"))


def is_transposed_linear(module: torch.nn.Module) -> bool:
    """Tell whether a module is a ``Conv1D`` of Transformers, which needn't be installed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_one(module: torch.nn.Module) -> bool:
    """Tell whether a custom module is a layer or norm that can be cut, perhaps with an activation in it."""
    if type(module) in RULES:
        return True
    if isinstance(module, (*WEIGHTED, torch.nn.Embedding)):
        inner = inner_of(module)
        if inner is None or not (inner.is_bare or inner.is_own):
            return not any(True for _ in module.children())
        return inner.is_bare  # else the operations after its convolution are followed, see `head`
    return is_normalizing(module) and channel_dim(module) is not None


def is_normalizing(module: torch.nn.Module) -> bool:
    """Tell whether a module is a norm of PyTorch's, or a norm over channels of another class."""
    return isinstance(module, NORMALIZING) or channel_dim(module) is not None


def per_channel_names(norm: torch.nn.Module) -> list[str]:
    """Name the parameters of a norm that hold one number a channel."""
    names = {"weight", "bias"} if isinstance(norm, PER_CHANNEL) else dict(norm.named_parameters()).keys()
    return [name for name in names if isinstance(getattr(norm, name, None), torch.Tensor)]


def has_no_width(norm: torch.nn.Module) -> bool:
    """Tell whether a norm holds no number for any channel and treats each separately, so that it runs on any width."""
    names = ("weight", "bias", "running_mean", "running_var")
    is_by_channel = isinstance(norm, torch.nn.modules.batchnorm._NormBase)  # instance norms too
    return is_by_channel and not any(isinstance(getattr(norm, name), torch.Tensor) for name in names)


def is_plain_norm(module: torch.nn.Module) -> bool:
    """Tell whether a module is a batch norm of PyTorch's own class; a custom one may hold an activation too."""
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and type(module).__module__.startswith("torch.")


def can_be_cut(module: torch.nn.Module) -> bool:
    """Tell whether a module can be made smaller, or has no parameters to cut; some recurrent layers can't."""
    if output_channels(module) is not None:
        return not weight_is_computed(module) and not has_complex_weights(module)
    return follows_channels(module) or not any(True for _ in module.parameters())


def follows_channels(module: torch.nn.Module) -> bool:
    """Tell whether a module, such as a norm, is cut with the layer whose channels enter it."""
    return isinstance(module, (*PER_CHANNEL, *RULES)) or is_normalizing(module)


def has_complex_weights(module: torch.nn.Module) -> bool:
    """Tell whether a layer's own parameters are complex numbers, which no pruner supports."""
    return any(parameter is not None and parameter.is_complex() for parameter in module._parameters.values())


def weight_is_computed(module: torch.nn.Module) -> bool:
    """Tell whether a layer's weight is computed from other parameters, as under weight norm."""
    # NNI's wrapper also replaces a weight by a plain tensor, and holds the parameter itself.
    names = [name for name, _ in module.named_parameters() if not name.startswith("_nni_wrapper")]
    return "weight" not in module._parameters and any("weight" in name for name in names)


def is_depthwise(module: torch.nn.Module) -> bool:
    """Tell whether a convolution filters each of several input channels separately."""
    if not isinstance(module, CONVOLUTIONS + TRANSPOSED):
        return False
    return module.groups == module.in_channels and module.groups > 1


def output_channels(module: torch.nn.Module) -> int | None:
    """Count the output channels of a convolution, linear layer, embedding or attention; None for any other module."""
    if isinstance(module, CONVOLUTIONS + TRANSPOSED):
        return int(module.out_channels)
    if isinstance(module, torch.nn.Linear):
        return int(module.out_features)
    if isinstance(module, torch.nn.MultiheadAttention) and module.in_proj_weight is not None:
        return len(module.in_proj_weight)
    if is_recurrent(module):
        return len(weight_of(module))  # rows of all gates
    if isinstance(module, torch.nn.Embedding):
        return int(module.embedding_dim)
    return None


def masked_channels(module: Any) -> int | None:
    """Count the channels that a mask of a module's weight can remove: of a layer, or of a norm that scales them."""
    channels = output_channels(module)
    if channels is None and scales_channels(module):
        return int(module.weight.numel())
    return channels


def has_channels(module: torch.nn.Module) -> bool:
    """Tell whether a module has output channels of its own, even if they can't be removed yet, as in a ``Conv1D``."""
    if isinstance(module, (torch.nn.MultiheadAttention, *RECURRENT)) or is_transposed_linear(module):
        return True
    return output_channels(module) is not None


def entering_channels(module: Any) -> int:
    """Count the input channels of a linear layer or of ``MultiheadAttention``."""
    return int(module.embed_dim if isinstance(module, torch.nn.MultiheadAttention) else module.in_features)


def weight_name(module: torch.nn.Module) -> str:
    """Return the name of the parameter whose mask says which channels a layer loses."""
    names = {torch.nn.MultiheadAttention: "in_proj_weight", torch.nn.RNNBase: "weight_ih_l0"}
    return next((name for kind, name in names.items() if isinstance(module, kind)), "weight")


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """Return the parameter whose mask says which channels a layer loses."""
    weight: torch.Tensor = getattr(module, weight_name(module))
    return weight


def row_names(module: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the other parameters with an entry for each output channel: the bias."""
    if isinstance(module, torch.nn.RNNBase):
        # Of all stacked layers and both directions; weights first.
        names = [name for name in module._flat_weights_names if name != "weight_ih_l0"]
        return tuple(sorted(names, key=lambda name: name.startswith("bias")))
    return ("in_proj_bias" if isinstance(module, torch.nn.MultiheadAttention) else "bias",)


def has_bias(module: torch.nn.Module) -> bool:
    """Tell whether a layer adds a bias to its channels."""
    if isinstance(module, torch.nn.RNNBase):
        return module.bias
    return getattr(module, row_names(module)[-1], None) is not None


def channel_dimension(module: torch.nn.Module) -> int:
    """Return the dimension of a layer's weight that holds its output channels."""
    if isinstance(module, (*TRANSPOSED, torch.nn.Embedding)):
        return 1
    return 0


def feature_dimension(module: torch.nn.Module) -> int:
    """Return the dimension of a layer's input and output that holds the channels."""
    last = (torch.nn.Linear, torch.nn.Embedding, torch.nn.RNNBase, torch.nn.MultiheadAttention)
    if isinstance(module, last):
        return -1
    return 1


def kept_channels(module: torch.nn.Module, targets: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the channels of a layer or norm with an unmasked weight: bool, shape (channels,); None without a mask."""
    mask = targets.get(weight_name(module))
    if mask is None or masked_channels(module) is None:
        return None
    rows = by_output(mask, module)
    return rows.reshape(len(rows), -1).amax(1).ne(0)


def by_output(weight: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """Move the output channels of a weight, or of its mask, into the first dimension, (channels, ...), or back."""
    if isinstance(module, TRANSPOSED):
        return channels_swapped(weight, module.groups)
    if channel_dimension(module):
        return weight.transpose(0, 1)
    return weight


def channels_swapped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Swap the channels of a transposed convolution's weight: (in, out / groups, ...) and (out, in / groups, ...).

    With one group the result is a view.
    """
    grouped: torch.Tensor = weight.unflatten(0, (groups, -1))
    return grouped.transpose(1, 2).flatten(0, 1)


def spread(module: torch.nn.Module, is_kept: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Expand kept output channels, bool, shape (channels,), to a mask of ones and zeros of the weight's shape."""
    weight = weight_of(module)
    rows = by_output(weight, module)
    is_kept = is_kept.to(dtype=dtype or weight.dtype, device=weight.device).view(-1, *[1] * (rows.dim() - 1))
    return by_output(is_kept.expand(rows.shape), module).clone(memory_format=torch.contiguous_format)


def check_names(model: torch.nn.Module, config_list: Iterable[Any], place: str = "") -> None:
    """Raise a ConfigError for an unknown name in a config_list's ``op_names``; warn of one in ``exclude_op_names``.

    ``place``: the argument that the names come from, if it isn't the config_list.
    """
    # NNI ignores such a name, or raises a KeyError.
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for index, config in enumerate(config_list):
        if not isinstance(config, dict):
            continue
        where = place or f"config_list[{index}]"
        for name in config.get("op_names") or ():
            if name not in names:
                raise unknown_name("a layer", str(name), names, where)
        for name in config.get("exclude_op_names") or ():
            # A config_list for several models may exclude a layer that only some of them have.
            if name not in names:
                _logger.warning("nothing is excluded: %s", unknown_name("an excluded layer", str(name), names, where))


def by_channel(module: nn.Module, values: Tensor) -> Tensor:
    """Reshape a layer's input or output to ``(channels, samples)``: every position of every batch entry is a sample.

    Padding positions are left out; see `padding_known`.
    """
    rows = values.detach().movedim(feature_dimension(module), 0)
    real = counted_places(rows.shape[1:])
    if real is None:
        return rows.flatten(1)
    return rows[:, real.to(rows.device)]


def can_follow(value: Any) -> bool:
    """Tell whether a free parameter or buffer can lose channels."""
    return isinstance(value, Tensor) and value.numel() > 1 and value.is_floating_point()


def norm_scale(norm: nn.Module) -> Tensor | None:
    """Return the factor by which a norm multiplies each channel, ``(channels,)``; None if that depends on the batch."""
    module: Any = norm
    if module.running_var is None:
        return None
    # Not fuse_conv_bn_weights, which computes in the network's own precision: the root of a small variance needs more.
    scale: Tensor = (module.running_var.detach().double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    return scale


def through_norms(norms: Iterable[nn.Module], constants: Tensor) -> tuple[Tensor, Tensor]:
    """Return the combined scale of successive norms, and their output for constants; both ``(channels,)``."""
    constants = constants.detach().double()
    scale = torch.ones_like(constants)
    for norm in norms:
        factor = norm_scale(norm)
        if factor is None:
            continue
        module: Any = norm
        scale, constants = scale.to(factor.device) * factor, constants.to(factor.device)
        # Subtract the mean first: a large mean would cancel against an offset computed from it.
        constants = (constants - module.running_mean.detach().double()) * factor
        if module.bias is not None:
            constants = constants + module.bias.detach().double()
    return scale, constants


@checked(model=MODEL)
@contextmanager
def zeros_held(model: nn.Module) -> Iterator[None]:
    """Keep weights that are zero at zero while a network trains.

    Masks of single weights leave zeros in the network that :func:`~nni_topo.to_dense` returns. Within this context,
    zero weights of convolutions and linear layers have zero gradients, and are set to zero again after every optimizer
    step, whatever momentum, weight decay or updates of whole matrices do. Copies of the network made within the context
    aren't held, nor are weights computed by a parametrization.

    Parameters
    ----------
    model : torch.nn.Module
        The network, not wrapped by a pruner. Weights shared between layers count once.

    Examples
    --------
    >>> layer = nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 2.0]]))
    >>> with zeros_held(layer):
    ...     layer(torch.ones(1, 2)).sum().backward()
    >>> layer.weight.grad.tolist()
    [[0.0, 1.0]]
    """
    masked_weights = [
        (weight, weight != 0) for weight in _weights(model) if weight.requires_grad and not bool(weight.all())
    ]
    handles = [weight.register_hook(lambda gradient, mask=mask: gradient * mask) for weight, mask in masked_weights]

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for weight, mask in masked_weights:
            if weight.is_leaf:
                weight.mul_(mask.to(weight.device))

    handles.append(register_optimizer_step_post_hook(restore))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights_left(model: nn.Module) -> int:
    """Count a model's parameters without zero weights of convolutions and linear layers."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - sum(int((weight == 0).sum()) for weight in _weights(model))


def _weights(model: nn.Module) -> list[Tensor]:
    """Return the weights of all convolutions and linear layers, each once."""
    weights = (module.weight for module in model.modules() if isinstance(module, WEIGHTED))
    return list({id(weight): weight for weight in weights}.values())
