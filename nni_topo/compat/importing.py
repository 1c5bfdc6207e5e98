"""What has to be in place while NNI is being imported."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from torch.utils import _pytree

_REGISTERING_MODULE = "nni.compression.speedup.utils"
KNOWN_NNI_VERSIONS = ("3.0",)
TRAINERS = ("pytorch_lightning", "transformers")
"""What NNI imports wherever it is installed; only its evaluators need it, and it takes seconds."""


def keep_pytree_nodes() -> bool:
    """Import NNI's compression without letting it replace PyTorch's own pytree nodes.

    Place: ``nni/compression/speedup/utils.py``, which registers ``immutable_list`` and ``immutable_dict`` of
    ``torch.fx`` at import. Cause: PyTorch registers both itself (2.1 and newer, so all of 2.11 to 2.15, on every
    Python). NNI's registration prints four warnings and drops PyTorch's serialised names and key paths, which
    ``torch.export`` needs. Returns True if a registration was held back; False if there was none, or NNI was imported
    before.
    """
    already_imported = _REGISTERING_MODULE in sys.modules
    with _registered_once() as held_back, _trainers_hidden():
        importlib.import_module("nni.compression.pruning")
        importlib.import_module("nni.compression.speedup")
    return bool(held_back) and not already_imported


class _Hidden(MetaPathFinder):
    """Let one thread find no trainer library; what other threads import meanwhile is not touched."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Say nothing of other modules, so that Python's own finders are asked."""
        if name in TRAINERS and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"{name} is imported when it is used", name=name)
        return None


@contextmanager
def _trainers_hidden() -> Iterator[None]:
    """Let NNI find no trainer library but those that are imported already.

    `evaluators.import_trainers_late` gives NNI the others when they are used. An NNI that isn't known finds all.
    """
    if metadata.version("nni") not in KNOWN_NNI_VERSIONS:
        yield
        return
    finder = _Hidden()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextmanager
def _registered_once() -> Iterator[list[type]]:
    """Let ``_register_pytree_node`` skip the types that have a node already, and list these."""
    held_back: list[type] = []
    register: Callable[..., None] = _pytree._register_pytree_node

    def register_new(cls: type, *args: Any, **kwargs: Any) -> None:
        if cls in _pytree.SUPPORTED_NODES:
            held_back.append(cls)
        else:
            register(cls, *args, **kwargs)

    _pytree._register_pytree_node = register_new
    try:
        yield held_back
    finally:
        _pytree._register_pytree_node = register
