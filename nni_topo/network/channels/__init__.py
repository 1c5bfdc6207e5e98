"""Which channels of a network go together, and where they go."""

from nni_topo.network.channels.constraints import blocks_of, meeting, partial_ties
from nni_topo.network.channels.dense_order import DenseOrder
from nni_topo.network.channels.flow import ONLY_TRAINED, ChannelFlow
from nni_topo.network.channels.ids import Blocks, Layer
from nni_topo.network.channels.readers import followers, norms_behind, only_norm_behind, passes
from nni_topo.network.channels.rules import FIXED, varies
from nni_topo.network.channels.shuffle import Share, Shares, asked_of, chosen_of, shares, stays_in_place

__all__ = [
    "FIXED",
    "ONLY_TRAINED",
    "Blocks",
    "ChannelFlow",
    "DenseOrder",
    "Layer",
    "Share",
    "Shares",
    "asked_of",
    "blocks_of",
    "chosen_of",
    "followers",
    "meeting",
    "norms_behind",
    "only_norm_behind",
    "partial_ties",
    "passes",
    "shares",
    "stays_in_place",
    "varies",
]
