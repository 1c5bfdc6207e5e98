"""Models that don't fit into memory, pruned block by block."""

from nni_topo.runs.streaming.report import BlockRow, StreamingReport
from nni_topo.runs.streaming.shrinking import shrink_pretrained

__all__ = ["BlockRow", "StreamingReport", "shrink_pretrained"]
