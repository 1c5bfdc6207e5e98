"""The patch that has to be in place while NNI is being imported."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import _pytree

_REGISTERING_MODULE = "nni.compression.speedup.utils"
EVALUATORS = "NNI_TOPO_EVALUATORS"
"""Environment variable; ``torch`` lets NNI start without Lightning and Transformers, which take seconds to import."""


def keep_pytree_nodes() -> bool:
    """Import NNI's compression without letting it replace PyTorch's own pytree nodes.

    Place: ``nni/compression/speedup/utils.py``, which registers ``immutable_list`` and ``immutable_dict`` of
    ``torch.fx`` at import. Cause: PyTorch registers both itself (2.1 and newer, so all of 2.11 to 2.15, on every
    Python). NNI's registration prints four warnings and drops PyTorch's serialised names and key paths, which
    ``torch.export`` needs. Returns True if a registration was held back; False if there was none, or NNI was imported
    before.
    """
    already_imported = _REGISTERING_MODULE in sys.modules
    with _registered_once() as held_back, _trainers_hidden(os.environ.get(EVALUATORS) == "torch"):
        importlib.import_module("nni.compression.pruning")
        importlib.import_module("nni.compression.speedup")
    return bool(held_back) and not already_imported


@contextmanager
def _trainers_hidden(hidden: bool) -> Iterator[None]:
    """Let NNI, which looks for trainer libraries whenever it is imported, find none that isn't imported already."""
    names = [name for name in ("pytorch_lightning", "transformers") if hidden and name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


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
