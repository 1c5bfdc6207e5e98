"""Which channels of a network go together, and where they go."""

from nni_topo.network.channels import reasons
from nni_topo.network.channels.constraints import blocks_of, coupled_names, partial_couplings
from nni_topo.network.channels.flow import ChannelFlow, followers, norms_after, only_norm_after, passes
from nni_topo.network.channels.ids import FIXED, Blocks, Layer, varies
from nni_topo.network.channels.reasons import Reason, Reasons
from nni_topo.network.channels.rules import (
    Operation,
    einsum_letters,
    has_property,
    operation_name,
    register_operator,
    rules_registered,
)
from nni_topo.network.channels.shuffle import (
    DenseOrder,
    Share,
    Shares,
    asked_of,
    chosen_of,
    regrouped,
    shares,
    stays_in_place,
)

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
    "coupled_names",
    "einsum_letters",
    "followers",
    "has_property",
    "norms_after",
    "only_norm_after",
    "operation_name",
    "partial_couplings",
    "passes",
    "reasons",
    "register_operator",
    "regrouped",
    "rules_registered",
    "shares",
    "stays_in_place",
    "varies",
]
