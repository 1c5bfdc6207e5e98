"""Run NNI's own pruning and speedup tests with nothing but ``import nni_topo`` added.

The tests come from a checkout of NNI that the caller has; they are copied to a temporary directory, where
Fashion-MNIST's files stand in for MNIST's, and run by pytest, the large models one process each.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PROJECT = Path(__file__).resolve().parents[2]
RECORDS = PROJECT / "benchmarks/records/upstream.json"
COUNTED = ("nni_topo/compat", "nni_topo/network")
"""Folders whose commits make a record old."""
PRUNING_TESTS = Path("test/algo/compression/pruning")
PLUGIN = "upstream_plugin"

TESTS = {
    "test_pruner": 38,
    "test_speedup_torchvision": 11,
    "test_concrete_trace_dce": 9,
    "test_concrete_trace_mix_trace": 8,
    "test_speedup_init_mask": 4,
    "test_concrete_trace_super": 3,
    "test_channel_dependency": 3,
    "test_speedup_softmax": 2,
    "test_auto_conv": 1,
}
ONE_PROCESS_PER_TEST = (
    "test_speedup_torchvision",
    "test_concrete_trace_dce",
    "test_concrete_trace_mix_trace",
)
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass
class FileResult:
    """What became of one test file; ``expected`` is how many tests NNI 3.0 has in it."""

    file: str
    expected: int
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all the tests that should be there passed."""
        return self.passed == self.expected and not self.failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests that the command line asks for; 0 if all of them pass."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="nni-upstream-") as name:
        workspace = Path(name)
        prepare(workspace, options.nni, options.fashion_mnist, plain=options.plain)
        results = []
        for file in options.only or TESTS:
            results.append(run_file(file, workspace, options.timeout))
            print(row(results[-1]), flush=True)
    passed, expected = sum(result.passed for result in results), sum(result.expected for result in results)
    print(f"{passed} of {expected} passed")
    for result in results:
        for failure in result.failures:
            print(f"FAILED {result.file}: {failure}")
    written = report(results, plain=options.plain)
    if options.out:
        options.out.write_text(json.dumps(written, indent=2) + "\n")
    if options.record:
        keep(written, RECORDS)
    return 0 if all(result.complete for result in results) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nni", type=Path, required=True, help="a checkout of NNI's repository at v3.0")
    parser.add_argument("--fashion-mnist", type=Path, required=True, help="folder with the four idx files, or .gz")
    parser.add_argument("--out", type=Path, help="write the results as JSON to this file")
    parser.add_argument("--record", action="store_true", help=f"keep the counts in {RECORDS.relative_to(PROJECT)}")
    parser.add_argument("--only", nargs="+", choices=TESTS, metavar="FILE", help="run these files only")
    parser.add_argument("--plain", action="store_true", help="leave `import nni_topo` out, to see what breaks")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one process (default: 3600)")
    options = parser.parse_args(arguments)
    if options.record and (options.only or options.plain):
        parser.error("--record keeps whole runs with nni_topo, got --only or --plain")
    if not (options.nni / PRUNING_TESTS).is_dir():
        parser.error(f"--nni must be a checkout of NNI, got {options.nni} (no {PRUNING_TESTS})")
    for name in IDX_FILES:
        if not any((options.fashion_mnist / (name + suffix)).is_file() for suffix in ("", ".gz")):
            parser.error(f"--fashion-mnist must hold {name} or {name}.gz, got {options.fashion_mnist}")
    return options


def prepare(workspace: Path, nni: Path, images: Path, *, plain: bool) -> None:
    """Copy the tests, lay out the images as torchvision's MNIST, and write the plugin."""
    copied = workspace / "test/algo"
    copied.mkdir(parents=True)
    shutil.copy(nni / "test/algo/__init__.py", copied)
    (workspace / "test/ut").mkdir()
    shutil.copy(nni / "test/ut/__init__.py", workspace / "test/ut")
    left_by_runs = shutil.ignore_patterns("*logs", "data", "__pycache__")
    shutil.copytree(nni / "test/algo/compression", copied / "compression", ignore=left_by_runs)
    (workspace / "pytest.ini").write_text("[pytest]\n")
    (workspace / f"{PLUGIN}.py").write_text("" if plain else "import nni_topo\n")
    raw = workspace / "data/mnist/MNIST/raw"
    raw.mkdir(parents=True)
    for name in IDX_FILES:
        plain_file = images / name
        (raw / name).write_bytes(
            plain_file.read_bytes() if plain_file.is_file() else gzip.decompress((images / f"{name}.gz").read_bytes())
        )


def run_file(file: str, workspace: Path, timeout: float) -> FileResult:
    """Run one test file, in one process or in one per test."""
    result = FileResult(file, TESTS[file])
    path = str(PRUNING_TESTS / f"{file}.py")
    targets = collect(path, workspace) if file in ONE_PROCESS_PER_TEST else []
    start = time.perf_counter()
    for target in targets or [path]:
        run_process(target, result, workspace, timeout)
    result.seconds = round(time.perf_counter() - start, 1)
    return result


def collect(path: str, workspace: Path) -> list[str]:
    """List the test ids of one file; an empty list where it can't be imported, which running it will show."""
    listed = pytest(["--collect-only", "-q", path], workspace, timeout=600.0)
    return [line for line in listed.stdout.splitlines() if line.startswith(path) and "::" in line]


def run_process(target: str, result: FileResult, workspace: Path, timeout: float) -> None:
    """Run one process of pytest and add its counts."""
    xml = workspace / "junit.xml"
    xml.unlink(missing_ok=True)
    try:
        finished = pytest(["-q", f"--junitxml={xml}", target], workspace, timeout)
    except subprocess.TimeoutExpired:
        result.failed += 1
        result.failures.append(f"{target}: no end within {timeout} s")
        return
    if not xml.is_file():
        result.failed += 1
        result.failures.append(f"{target}: pytest ended with {finished.returncode}: {finished.stderr[-500:]}")
        return
    add_counts(ElementTree.parse(xml).iter("testcase"), result)


def add_counts(cases: Iterable[ElementTree.Element], result: FileResult) -> None:
    """Count the outcomes of a JUnit report."""
    for case in cases:
        broken = next((part for part in case if part.tag in ("failure", "error")), None)
        if broken is not None:
            result.failed += 1
            result.failures.append(f"{case.get('name')}: {broken.get('message')}: {(broken.text or '')[-300:]}")
        elif case.find("skipped") is not None:
            result.skipped += 1
        else:
            result.passed += 1


def pytest(arguments: list[str], workspace: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Start pytest in the workspace, with the plugin."""
    path = os.pathsep.join([str(workspace), str(PROJECT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command,
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": path},
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def row(result: FileResult) -> str:
    """Write one line of the table."""
    counts = f"{result.passed:3d} passed {result.failed:3d} failed {result.skipped:3d} skipped"
    return f"{result.file:32s} {counts} of {result.expected:3d} {result.seconds:8.1f} s"


def report(results: list[FileResult], *, plain: bool) -> dict[str, Any]:
    """Put the results together with the versions they were made with."""
    packages = ("nni", "torch", "torchvision", "pytorch-lightning", "numpy")
    return {
        "import_nni_topo": not plain,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "passed": sum(result.passed for result in results),
        "expected": sum(result.expected for result in results),
        "files": [asdict(result) for result in results],
    }


def keep(written: dict[str, Any], records: Path) -> None:
    """Enter a run in the records, in place of the last one with the same minor version of PyTorch.

    How many commits changed the folders that matter is kept, and not a commit's name: names change when a branch is
    rebased.
    """
    minor = ".".join(written["versions"]["torch"].split(".")[:2])
    kept = json.loads(records.read_text()) if records.exists() else {}
    kept[minor] = {
        "date": datetime.date.today().isoformat(),
        "commits": commits(),
        "passed": written["passed"],
        "expected": written["expected"],
        "versions": written["versions"],
        "files": {file["file"]: file["passed"] for file in written["files"]},
    }
    records.parent.mkdir(parents=True, exist_ok=True)
    records.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


def commits() -> int:
    """Count the commits that changed the folders of which NNI's tests may fail."""
    command = ["git", "-C", str(PROJECT), "rev-list", "--count", "HEAD", "--", *COUNTED]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def version(package: str) -> str | None:
    """Give the installed version of a package, None if it isn't there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
