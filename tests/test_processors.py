from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def processors():
    spec = importlib.util.spec_from_file_location("processors", Path(__file__).with_name("processors.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_failures_and_errors_are_counted(processors, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3"/></testsuites>')
    assert processors.counted(report) == (3, 3, 3)
    assert processors.counted(tmp_path / "none.xml") == (0, 0, 0)


def test_all_tests_that_are_named_exist(processors):
    for test in (*processors.THOROUGH, *processors.QUICK):
        assert (processors.TESTS / test).exists(), test


@pytest.mark.slow  # starts two interpreters
def test_a_failing_test_fails_the_variant(processors, tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text("import os\ndef test_it(): assert os.environ['PYTHONHASHSEED'] != '20181'\n")
    monkeypatch.setattr(processors, "TESTS", tmp_path)
    variant = next(v for v in processors.variants() if v.name == "hash-seed")
    passed, failed, skipped, _ = processors.run(variant, ["test_it.py"], tmp_path)
    assert (passed, failed, skipped) == (0, 1, 0)
