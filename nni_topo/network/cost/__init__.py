"""What a network costs: multiply-accumulates, parameters, time."""

from nni_topo.network.cost.cost import Kept, NetworkCost
from nni_topo.network.cost.latency import LatencyTable, LayerLatency
from nni_topo.network.cost.measure import count_macs, count_params, latencies, latency_ms, time_shares
from nni_topo.network.cost.profiling import ModeCost, profile
from nni_topo.network.cost.timing import measure_latency

__all__ = [
    "Kept",
    "LatencyTable",
    "LayerLatency",
    "ModeCost",
    "NetworkCost",
    "count_macs",
    "count_params",
    "latencies",
    "latency_ms",
    "measure_latency",
    "profile",
    "time_shares",
]
