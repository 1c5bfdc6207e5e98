from __future__ import annotations

import processors
import pytest


def test_all_tests_that_are_named_exist():
    for test in (*processors.THOROUGH, *processors.QUICK):
        assert (processors.TESTS / test).exists(), test


@pytest.mark.slow  # starts two interpreters
def test_a_failing_test_fails_the_variant(tmp_path, monkeypatch):
    tests = "import os\ndef test_it(): assert os.environ['PYTHONHASHSEED'] != '20181'\ndef test_right(): pass\n"
    (tmp_path / "test_it.py").write_text(tests)
    monkeypatch.setattr(processors, "TESTS", tmp_path)
    variant = next(v for v in processors.variants() if v.name == "hash-seed")
    passed, failed, skipped, _ = processors.run(variant, ["test_it.py"], tmp_path)
    assert (passed, failed, skipped) == (1, 1, 0)
    assert processors.counted(tmp_path / "none.xml") == (0, 0, 0)
