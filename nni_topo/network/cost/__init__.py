"""What a network costs: multiply-accumulates, parameters, time."""

from nni_topo.network.cost.cost import Kept, NetworkCost, cost_of
from nni_topo.network.cost.latency import LatencyTable, LayerLatency, measure_latency
from nni_topo.network.cost.measure import (
    ModeCost,
    count_macs,
    count_params,
    counting_macs,
    latencies,
    latency_ms,
    profile,
    time_shares,
)

__all__ = [
    "Kept",
    "LatencyTable",
    "LayerLatency",
    "ModeCost",
    "NetworkCost",
    "cost_of",
    "count_macs",
    "count_params",
    "counting_macs",
    "latencies",
    "latency_ms",
    "measure_latency",
    "profile",
    "time_shares",
]
