"""The patches as a whole: what is reported, what is warned of, and what a fresh interpreter gets."""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
import warnings

import nni
import pytest
import torch
from nni.common.concrete_trace_utils import concrete_tracer

from nni_topo import compat

BY_PYTHON = {"index_code_units", "restore_branch_opcodes"}
ALWAYS_BROKEN = {"keep_pytree_nodes", *(patch.__name__ for patch in compat.patches())} - BY_PYTHON

BYTECODE = {"index_code_units"} if sys.version_info >= (3, 11) else set()
BYTECODE |= {"restore_branch_opcodes"} if sys.version_info[:2] == (3, 11) else set()

FRESH = """
import json, sys
from nni_topo import compat
report = compat.enable()
from torch.fx.immutable_collections import immutable_list
from torch.utils import _pytree
compat.reports.clear()
again = compat.enable().applied
node = _pytree.SUPPORTED_NODES[immutable_list]
print(json.dumps({
    "applied": report.applied, "failed": report.failed, "again": again, "nni": report.nni,
    "serialized": _pytree.SUPPORTED_SERIALIZED_TYPES[immutable_list].serialized_type_name,
    "flatten": node.flatten_fn.__module__,
}))
"""


@pytest.mark.slow
def test_fresh_interpreter_is_patched_without_a_warning_and_once() -> None:
    # NNI's dependencies import what Python deprecates; NNI and PyTorch themselves stay quiet
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", FRESH]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["applied"]) == ALWAYS_BROKEN | BYTECODE
    assert found["failed"] == {}
    assert found["again"] == []
    assert found["nni"] == "3.0"
    assert found["flatten"] == "torch.fx.immutable_collections"
    assert found["serialized"] == "torch.fx.immutable_collections.immutable_list"


def test_missing_nni_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nni", "nni_topo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nni", None)
    with pytest.raises(RuntimeError, match=r"^nni\.compression must be importable, got ModuleNotFoundError") as caught:
        importlib.import_module("nni_topo")
    assert type(caught.value).__name__ == "CompatibilityError"


def test_report_names_every_patch_once() -> None:
    report = compat.enable()
    assert compat.enable() is report
    names = [*report.applied, *report.unneeded, *report.failed]
    assert len({*names}) == len(names) == len(compat.patches()) + 1
    assert set(report.applied) == ALWAYS_BROKEN | BYTECODE
    assert report.torch == torch.__version__
    assert report.python == platform.python_version()
    assert "restore_tensor_methods" in str(report)


def test_unknown_version_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "reports", [])
    monkeypatch.setattr(compat, "KNOWN_NNI_VERSIONS", ("2.10",))
    with pytest.warns(compat.CompatibilityWarning, match=r"knows NNI 2\.10, found NNI 3\.0.*applied: .*not needed: "):
        report = compat.enable()
    # all patches are in place, and say so
    assert (report.applied, report.failed) == ((), {})
    assert set(report.unneeded) >= ALWAYS_BROKEN | BYTECODE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.enable()


def test_patch_that_fails_is_named_and_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "reports", [])
    monkeypatch.setattr(nni, "_nni_topo_patches", nni._nni_topo_patches - {"accept_purity_argument"})
    monkeypatch.delattr(concrete_tracer, "node_is_impure_wrapper")
    with pytest.warns(compat.CompatibilityWarning, match="failed: accept_purity_argument \\(AttributeError"):
        report = compat.enable()
    assert list(report.failed) == ["accept_purity_argument"]
