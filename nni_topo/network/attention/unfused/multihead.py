"""Unfused attention: PyTorch's and torchvision's, computed layer by layer, for any width and number of heads.

The original classes use the weights of layers that they never call, or assume that all heads together have the width of
the input. Here the layers are called, so that hooks and wrappers see them; only ``in_proj_weight`` of
``nn.MultiheadAttention`` belongs to no layer.
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

from nni_topo.network.runtime.modules import put_attribute

_SWIN = "nni_topo.network.attention.unfused.swin"  # imported late, since torchvision takes long to load


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
    """Compute what ``nn.MultiheadAttention`` does, layer by layer, for any number of heads."""
    del is_causal  # only a hint: the mask says it too
    is_single, states = query.dim() == 2, [query, key, value]
    if query is key is value:
        states = [query]
    if is_single:
        states = [tensor.unsqueeze(0) for tensor in states]
    elif not self.batch_first:
        states = [tensor.transpose(0, 1) for tensor in states]
    entering = states * 3 if len(states) == 1 else states
    heads = [projection.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for projection in projected(self, *entering)]
    mask: Tensor | None = None
    if attn_mask is not None:
        # Masks by head have entries for the original heads.
        if attn_mask.dim() != 2:
            attn_mask = attn_mask.unflatten(0, (len(heads[0]), -1))
        mask = _additive(attn_mask, heads[0])
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, heads[0]).reshape(len(heads[0]), 1, 1, -1)
        mask = padding if mask is None else mask + padding
    dropout = self.dropout if self.training else 0.0
    shares: Tensor | None = None
    if need_weights:
        scores = heads[0] @ heads[1].transpose(2, 3) / self.head_dim**0.5
        if mask is not None:
            scores = scores + mask
        shares = functional.dropout(scores.softmax(3), dropout)
        context = shares @ heads[2]
        if average_attn_weights:
            shares = shares.mean(1)
        if is_single:
            shares = shares.squeeze(0)
    else:
        context = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], mask, dropout)
    mixed = (mix or self.out_proj)(context.transpose(1, 2).flatten(2))
    if is_single:
        mixed = mixed.squeeze(0)
    elif not self.batch_first:
        mixed = mixed.transpose(0, 1)
    return mixed, shares


def projected(self: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Return the queries, keys and values that ``nn.MultiheadAttention`` computes, each (..., width)."""
    if query is key is value:
        return list(functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
    biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    entering = zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
    return [functional.linear(*operands) for operands in entering]


def _additive(mask: Tensor, states: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=states.dtype).masked_fill(mask, -torch.inf)
    return mask.to(states.dtype)


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose heads together may be narrower than its input."""

    forward = multihead


def unfused_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the unfused class of an attention module, which may be its own; None if there is none."""
    kind = type(module)
    if kind in (nn.MultiheadAttention, PrunedMultiheadAttention):
        return PrunedMultiheadAttention
    if kind.__module__ == _SWIN:
        return kind
    if not kind.__module__.startswith("torchvision.models."):
        return None
    unfused: type[nn.Module] | None = import_module(_SWIN).UNFUSED.get(kind)
    return unfused


def is_unfused(module: nn.Module) -> bool:
    """Tell whether a module is attention with an unfused class, in which only its layers read its input."""
    return unfused_class(module) is not None


def is_fused_attention(module: nn.Module) -> bool:
    """Tell whether a module is attention that computes with the weights of layers without calling them."""
    return unfused_class(module) not in (None, type(module)) and getattr(module, "_qkv_same_embed_dim", True)


def set_unfused(module: Any, unfused: bool = True) -> None:
    """Switch attention to its unfused class, or back to its own."""
    computed: Any = unfused_class(module)
    is_made = unfused or type(module) is not computed
    put_attribute(module, "__class__", computed if is_made else computed.__base__)
    if isinstance(module, nn.MultiheadAttention):
        # If this is false, PyTorch's transformer layers call the attention instead of using its weights.
        module._qkv_same_embed_dim = not unfused


@contextmanager
def mixing_called(*models: nn.Module) -> Iterator[None]:
    """Within the context, attention calls its output projection and its other layers, so that hooks see them."""
    with ExitStack() as undone:
        for module in (part for model in models for part in model.modules() if is_fused_attention(part)):
            kind: Any = unfused_class(module)
            # NNI's wrapper keeps the forward that it calls.
            place = vars(getattr(module, "_nni_wrapper", module))
            key = "forward" if place is vars(module) else "module_forward"
            if key in place:
                undone.callback(place.__setitem__, key, place[key])
            else:
                undone.callback(place.pop, key)
            place[key] = partial(kind.forward, module)
        # The fast paths call no layers.
        undone.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        yield
