"""The mutants of `make mutants`: which are made and drawn, which tests they meet, what is counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("mutmut")
pytest.importorskip("coverage")
SCRIPTS = Path(__file__).parents[1] / "tools/mutants"

CODE = '''"""Words."""
import warnings
from typing import Any

Alias = dict[str, Any]
LIMIT = 3


class Bound:
    """A bound of 7."""

    def over(self, count: int, *, strictly: bool = False) -> bool:
        """Say whether it's over."""
        if count < 0:
            raise ValueError(f"count must be >= 0, got {count + 0}")
        warnings.warn("far too many" + str(count * 2), stacklevel=2)
        return sorted([count], reverse=True)[0] > LIMIT


def mode(name: str) -> str:
    return "a b" if name == "last" else name
'''


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for path in SCRIPTS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "package/part").mkdir(parents=True)
    (tmp_path / "package/part/code.py").write_text(CODE)
    return tmp_path


def test_code_is_changed_and_words_are_not(root: Path):
    from mutating import every_mutant

    changes = {(m.function, m.before.strip(), m.after.strip()) for m in every_mutant(root, ["package"])}
    assert changes == {
        ("", "3", "4"),
        ("Bound.over", "False", "True"),
        ("Bound.over", "< 0", "<= 0"),
        ("Bound.over", "0", "1"),
        ("Bound.over", "True", "False"),
        ("Bound.over", "sorted([count], reverse=True)", "sorted([count], )"),
        ("Bound.over", "> LIMIT", ">= LIMIT"),
        ("mode", "== \"last\"", "!= \"last\""),
        ("mode", '"last"', '"XXlastXX"'),
        ("mode", '"a b" if name == "last" else name', '"a b" if (name == "last") and False else name'),
        ("mode", '"a b" if name == "last" else name', '"a b" if (name == "last") or True else name'),
    }  # fmt: skip


def test_the_draw_grows_at_its_end_and_stays_when_lines_and_folders_move(root: Path):
    from mutating import draw

    def keys(seed: int, count: int) -> list[str]:
        return [mutant.key for mutant in draw(root, ["package"], seed, count)]

    five = keys(0, 5)
    assert keys(0, 8)[:5] == five != keys(1, 5)
    assert len(set(keys(0, 100))) == 12
    (root / "package/part/code.py").write_text(CODE.replace("LIMIT = 3", "\n\nLIMIT = 3"))
    (root / "package/part").rename(root / "package/moved")
    assert keys(0, 5) == five


def test_tests_of_the_function_come_first_and_what_does_not_fit_is_counted():
    from covering import Chosen, TestFile, choose
    from mutating import Mutant

    near = TestFile("tests/part/test_code.py", "", {"slow": 3.0, "quick": 1.0, "beside": 0.5})
    near.runs = {"package/part/code.py": {"mode": ["slow", "quick"], "Bound.over": ["beside"]}}
    far = TestFile("tests/test_all.py", "", {"all": 0.1}, {"package/part/code.py": {"mode": ["all"]}})
    other = TestFile("tests/test_other.py", "", {"other": 0.1}, {"package/part/other.py": {"mode": ["other"]}})
    mutant = Mutant("key", "package/part/code.py", "mode", 21, "", "", 0)
    assert choose(mutant, [far, near, other], 9.0) == Chosen(("quick", "slow", "all", "beside"), 4.6, 0)
    assert choose(mutant, [far, near, other], 4.0) == Chosen(("quick", "slow"), 4.0, 2)
    unseen = Mutant("key", "package/part/code.py", "kernel", 30, "", "", 0)
    assert set(choose(unseen, [far, near, other], 9.0).tests) == {"quick", "slow", "beside", "all"}


def test_the_score_leaves_out_what_no_test_can_kill():
    from reporting import report

    states = ("killed", "timeout", "died", "survived", "survived", "untested")
    found = {
        str(i): {
            "key": str(i), "path": "package/part/code.py", "line": i, "function": "mode", "diff": ["-a", "+b"],
            "tests": 4, "left_out": 0, "state": state,
        }
        for i, state in enumerate(states)
    }  # fmt: skip
    told = report(found, {"4": "the same"})
    assert told.splitlines()[-1].split() == ["all", "6", "3", "2", "1", "60.0%"]
    assert "code.py:3 mode 3 (4 tests)" in told
    assert "code.py:5 mode 5 (no test runs it)" in told
    assert "code.py:4" not in told


def test_packages_below_the_score_that_is_asked_for_are_named():
    from reporting import shortfalls

    def of(package: str, killed: int, survived: int) -> dict[str, dict[str, str]]:
        """Return mutants of a package."""
        keys = {f"{package} {place}": place < killed for place in range(killed + survived)}
        path = f"nni_topo/{package}/part/code.py"
        return {key: {"key": key, "path": path, "state": "killed" if is_killed else "survived"}
                for key, is_killed in keys.items()}  # fmt: skip

    # where 88 % of all changes are noticed, a draw of 60 has 48 or fewer with a probability of 5.1 %, 47 with 2.4 %
    found = of("runs", 47, 13) | of("cli", 48, 12)
    assert shortfalls(found, {}, 88) == ["nni_topo/runs: 78.3%, which is below 88 %"]
    assert shortfalls(found, {"runs 58": "the same", "runs 59": "the same"}, 88) == []
    assert shortfalls(of("runs", 59, 1), {}, 100) == ["nni_topo/runs: 98.3%, which is below 100 %"]
