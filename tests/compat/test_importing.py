"""What holds while NNI is imported: PyTorch's pytree nodes are kept, and one thread finds no trainer library."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.utils import _pytree

from nni_topo.compat import importing


def test_trainers_are_hidden_from_the_thread_that_imports() -> None:
    finder = importing._Hidden()
    for name in ("pytorch_lightning", "transformers"):
        with pytest.raises(ModuleNotFoundError, match=f"^{name} is imported when it is used$") as caught:
            finder.find_spec(name)
        assert caught.value.name == name
    assert finder.find_spec("transformers.trainer") is None
    assert finder.find_spec("torch") is None
    with ThreadPoolExecutor(1) as other:
        assert other.submit(finder.find_spec, "transformers").result() is None


def test_trainers_are_found_by_an_nni_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "KNOWN_NNI_VERSIONS", ("2.10",))
    before = list(sys.meta_path)
    with importing._trainers_hidden():
        assert sys.meta_path == before
    assert sys.meta_path == before


class Opened:
    """A type without a node."""


def test_types_that_have_a_node_keep_it() -> None:
    own, register = _pytree.SUPPORTED_NODES[dict], _pytree._register_pytree_node
    with importing._registered_once() as held_back:
        for kind in (dict, Opened):
            _pytree._register_pytree_node(kind, lambda _: ([], None), lambda *_: None)
    try:
        assert held_back == [dict]
        assert _pytree.SUPPORTED_NODES[dict] is own
        assert _pytree.tree_leaves(Opened()) == []
        assert _pytree._register_pytree_node is register
    finally:
        _pytree.SUPPORTED_NODES.pop(Opened, None)


def test_nothing_is_held_back_where_nni_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert importing.keep_pytree_nodes() is False
    monkeypatch.delitem(sys.modules, "nni.compression.speedup.utils")
    assert importing.keep_pytree_nodes() is False
