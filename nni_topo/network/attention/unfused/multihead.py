"""Attention of PyTorch, torchvision and CLIP step by step, whatever number of heads and channels is left.

Their own computes with the weights of its layers, which it never calls, or takes the width of its heads for that of
what enters. Here the layers are called, so that hooks and wrappers see them, but for the one weight
of ``nn.MultiheadAttention``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Where the classes are that compute step by step, by class. torchvision takes long to load, and is there where a model
# has such a module, as Transformers is.
_STEPWISE = {
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): "nni_topo.network.attention.unfused.swin",
    ("torchvision.models.swin_transformer", "ShiftedWindowAttentionV2"): "nni_topo.network.attention.unfused.swin",
    (
        "torchvision.models.video.swin_transformer",
        "ShiftedWindowAttention3d",
    ): "nni_topo.network.attention.unfused.swin",
    ("torchvision.models.maxvit", "RelativePositionalMultiHeadAttention"): "nni_topo.network.attention.unfused.swin",
    ("transformers.models.clip.modeling_clip", "CLIPAttention"): "nni_topo.network.attention.unfused.clip",
    ("transformers.models.siglip.modeling_siglip", "SiglipAttention"): "nni_topo.network.attention.unfused.clip",
    ("transformers.models.siglip2.modeling_siglip2", "Siglip2Attention"): "nni_topo.network.attention.unfused.clip",
}


def multihead(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    mix: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute what ``nn.MultiheadAttention`` does, step by step, whatever the number of heads that are left."""
    del is_causal  # a hint that the mask makes unnecessary
    is_single, states = query.dim() == 2, [query] if query is key is value else [query, key, value]
    if is_single or not self.batch_first:
        states = [each.unsqueeze(0) if is_single else each.transpose(0, 1) for each in states]
    entering = states * 3 if len(states) == 1 else states
    heads = [each.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for each in projected(self, *entering)]
    mask: Tensor | None = None
    if attn_mask is not None:
        # Masks by head know those that were there at first.
        mask = _additive(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (len(heads[0]), -1)), heads[0])
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, heads[0]).reshape(len(heads[0]), 1, 1, -1)
        mask = padding if mask is None else mask + padding
    dropout, shares = self.dropout if self.training else 0.0, None
    if need_weights:
        scores = heads[0] @ heads[1].transpose(2, 3) / self.head_dim**0.5
        shares = functional.dropout((scores if mask is None else scores + mask).softmax(3), dropout)
        context = shares @ heads[2]
        shares = shares.mean(1) if average_attn_weights else shares
        shares = shares.squeeze(0) if is_single else shares
    else:
        context = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], mask, dropout)
    mixed = (mix or self.out_proj)(context.transpose(1, 2).flatten(2))
    if is_single or not self.batch_first:
        mixed = mixed.squeeze(0) if is_single else mixed.transpose(0, 1)
    return mixed, shares


def projected(self: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Return the queries, keys and values that ``nn.MultiheadAttention`` makes of what enters: (..., width)."""
    if query is key is value:
        return list(functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
    biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    entering = zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
    return [functional.linear(*each) for each in entering]


def _additive(mask: Tensor, states: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=states.dtype).masked_fill(mask, -torch.inf)
    return mask.to(states.dtype)


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` of another width than its heads have together."""

    forward = multihead


def stepwise_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that computes step by step what a module's does, its own if that does so; None: it's no such."""
    kind = type(module)
    if kind in (nn.MultiheadAttention, PrunedMultiheadAttention):
        return PrunedMultiheadAttention
    if kind.__module__ in _STEPWISE.values():
        return kind
    place = _STEPWISE.get((kind.__module__, kind.__qualname__))
    found: type[nn.Module] | None = import_module(place).STEPWISE.get(kind) if place else None
    return found


def is_stepwise(module: nn.Module) -> bool:
    """Tell whether a module is such attention, whole or pruned: only its layers read what enters it."""
    return stepwise_class(module) is not None


def is_whole(module: nn.Module) -> bool:
    """Tell whether a module is attention that computes with the weights of layers which it doesn't call."""
    return stepwise_class(module) not in (None, type(module)) and getattr(module, "_qkv_same_embed_dim", True)


def set_stepwise(module: Any, stepwise: bool = True) -> None:
    """Let attention compute step by step, or as its own class does."""
    computed = stepwise_class(module)
    module.__class__ = computed if stepwise or type(module) is not computed else computed.__base__
    if isinstance(module, nn.MultiheadAttention):
        # Layers of PyTorch's don't compute with its weights by themselves where this is false.
        module._qkv_same_embed_dim = not stepwise


@contextmanager
def mixing_called(*models: nn.Module) -> Iterator[None]:
    """Let attention call the layer that mixes its heads, and others of it, so that hooks see them."""
    with ExitStack() as undone:
        for module in (each for model in models for each in model.modules() if is_whole(each)):
            kind: Any = stepwise_class(module)
            # NNI's wrapper keeps the forward that it calls.
            place = vars(getattr(module, "_nni_wrapper", module))
            key = "forward" if place is vars(module) else "module_forward"
            undone.callback(partial(place.__setitem__, key, place[key]) if key in place else partial(place.pop, key))
            place[key] = partial(kind.forward, module)
        # The fast paths call no layers at all.
        undone.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        yield
