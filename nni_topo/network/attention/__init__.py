"""Attention: its heads, their sizes, and attention without fused kernels."""

from nni_topo.network.attention.heads import (
    Attention,
    Given,
    IntArray,
    attend,
    find_attention,
    find_heads,
    is_attention,
    is_mixed,
    open_attention,
    resize,
    set_size,
    states_read,
    tell_config,
)
from nni_topo.network.attention.rotary import by_table, find_frequencies, keep_frequencies, pairs_of
from nni_topo.network.attention.unfused.multihead import (
    PrunedMultiheadAttention,
    is_fused_attention,
    is_unfused,
    mixing_called,
    projected,
    set_unfused,
    unfused_class,
)

__all__ = [
    "Attention",
    "Given",
    "IntArray",
    "PrunedMultiheadAttention",
    "attend",
    "by_table",
    "find_attention",
    "find_frequencies",
    "find_heads",
    "is_attention",
    "is_fused_attention",
    "is_mixed",
    "is_unfused",
    "keep_frequencies",
    "mixing_called",
    "open_attention",
    "pairs_of",
    "projected",
    "resize",
    "set_size",
    "set_unfused",
    "states_read",
    "tell_config",
    "unfused_class",
]
