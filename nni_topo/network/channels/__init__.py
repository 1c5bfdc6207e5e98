"""Which channels of a network go together, and where they go."""

from nni_topo.network.channels import reasons
from nni_topo.network.channels.constraints import blocks_of, meeting, partial_ties
from nni_topo.network.channels.dense_order import DenseOrder
from nni_topo.network.channels.flow import ChannelFlow
from nni_topo.network.channels.ids import FIXED, Blocks, Layer, varies
from nni_topo.network.channels.readers import followers, norms_behind, only_norm_behind, passes
from nni_topo.network.channels.reasons import Reason, Reasons
from nni_topo.network.channels.rules import Operation, has_property, register_operator, rules_registered
from nni_topo.network.channels.shuffle import Share, Shares, asked_of, chosen_of, shares, stays_in_place

__all__ = [
    "FIXED",
    "Blocks",
    "ChannelFlow",
    "DenseOrder",
    "Layer",
    "Operation",
    "Reason",
    "Reasons",
    "Share",
    "Shares",
    "asked_of",
    "blocks_of",
    "chosen_of",
    "followers",
    "has_property",
    "meeting",
    "norms_behind",
    "only_norm_behind",
    "partial_ties",
    "passes",
    "reasons",
    "register_operator",
    "rules_registered",
    "shares",
    "stays_in_place",
    "varies",
]
