"""Dense models in files: checkpoints, folders of Transformers, exports."""

from nni_topo.network.io.checkpoint import (
    fingerprint,
    load,
    model_fingerprint,
    save,
    save_pretrained,
    take_out,
    take_out_part,
    tell_depth,
    tell_pruned_heads,
    tells_depth,
    why_undescribed,
)
from nni_topo.network.io.exporting import Exported, export

__all__ = [
    "Exported",
    "export",
    "fingerprint",
    "load",
    "model_fingerprint",
    "save",
    "save_pretrained",
    "take_out",
    "take_out_part",
    "tell_depth",
    "tell_pruned_heads",
    "tells_depth",
    "why_undescribed",
]
