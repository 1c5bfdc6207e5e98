"""Attention of CLIP and SigLIP layer by layer; see `unfused`.

That of Transformers 4 gives what its heads put out the width of what enters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention
from transformers.models.siglip2.modeling_siglip2 import Siglip2Attention


def contrastive(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    causal_attention_mask: Tensor | None = None,
    output_attentions: bool = False,
    mix: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention of CLIP and SigLIP, for any number of heads and channels."""
    query, key, value = (
        layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        for layer in (self.q_proj, self.k_proj, self.v_proj)
    )
    mask = attention_mask if causal_attention_mask is None else causal_attention_mask
    if attention_mask is not None and causal_attention_mask is not None:
        mask = attention_mask + causal_attention_mask
    dropout, shares = self.dropout if self.training else 0.0, None
    if output_attentions or self.config._attn_implementation == "eager":
        scores = query @ key.transpose(2, 3) * self.scale
        shares = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(scores.dtype)
        shares = functional.dropout(shares, dropout)
        context = shares @ value
    else:
        knobs = {"attn_mask": mask, "dropout_p": dropout, "scale": self.scale}
        context = functional.scaled_dot_product_attention(query, key, value, **knobs)
    return (mix or self.out_proj)(context.transpose(1, 2).flatten(2)), shares


class PrunedCLIPAttention(CLIPAttention):
    """CLIP's attention of another width than its heads have together."""

    forward = contrastive


class PrunedSiglipAttention(SiglipAttention):
    """SigLIP's."""

    forward = contrastive


class PrunedSiglip2Attention(Siglip2Attention):
    """That of SigLIP's second version."""

    forward = contrastive


_PAIRS: list[tuple[Any, type[nn.Module]]] = [
    (CLIPAttention, PrunedCLIPAttention),
    (SiglipAttention, PrunedSiglipAttention),
    (Siglip2Attention, PrunedSiglip2Attention),
]
UNFUSED: dict[type[nn.Module], type[nn.Module]] = {
    kind: unfused for kind, unfused in _PAIRS if "embed_dim" in kind.forward.__code__.co_varnames
}
"""By class of attention, its unfused class; empty with Transformers 5, whose own classes call their layers."""
