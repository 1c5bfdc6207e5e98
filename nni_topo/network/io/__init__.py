"""Dense models in files: checkpoints, folders of Transformers, exports."""

from nni_topo.network.io.checkpoint import load, save
from nni_topo.network.io.depth import take_out, tell_depth
from nni_topo.network.io.exporting import Exported, export
from nni_topo.network.io.pretrained import save_pretrained

__all__ = [
    "Exported",
    "export",
    "load",
    "save",
    "save_pretrained",
    "take_out",
    "tell_depth",
]
