"""Import NNI's compression without changes to PyTorch's pytree, and without trainer libraries."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from torch.utils import _pytree

_REGISTERING_MODULE = "nni.compression.speedup.utils"
KNOWN_NNI_VERSIONS = ("3.0",)
TRAINERS = ("pytorch_lightning", "transformers")
"""Libraries that NNI imports if they are installed; only its evaluators need them, and the import takes seconds."""


def keep_pytree_nodes() -> bool:
    """Import NNI's compression without letting it replace PyTorch's own pytree nodes.

    Place: ``nni/compression/speedup/utils.py``, which registers ``immutable_list`` and ``immutable_dict`` of
    ``torch.fx`` at import. Cause: PyTorch registers both itself. NNI's registration prints four warnings and drops
    serialised names and key paths, which ``torch.export`` needs.
    """
    already_imported = _REGISTERING_MODULE in sys.modules
    held_back: list[type] = []
    register: Callable[..., None] = _pytree._register_pytree_node

    def register_new(cls: type, *args: Any, **kwargs: Any) -> None:
        if cls in _pytree.SUPPORTED_NODES:
            held_back.append(cls)
        else:
            register(cls, *args, **kwargs)

    # `evaluators.import_trainers_late` gives NNI the trainer libraries when they are used.
    finder, hides_trainers = _Hidden(), metadata.version("nni") in KNOWN_NNI_VERSIONS
    if hides_trainers:
        sys.meta_path.insert(0, finder)
    _pytree._register_pytree_node = register_new
    try:
        importlib.import_module("nni.compression.pruning")
        importlib.import_module("nni.compression.speedup")
    finally:
        _pytree._register_pytree_node = register
        if hides_trainers:
            sys.meta_path.remove(finder)
    return bool(held_back) and not already_imported


class _Hidden(MetaPathFinder):
    """Finder that hides the trainer libraries from one thread; imports of other threads work as usual."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Raise for trainer libraries; return None for other modules, so that Python asks its other finders."""
        if name in TRAINERS and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{name} is imported when it is used", name=name)
        return None
