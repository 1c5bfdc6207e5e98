"""Run the numerical tests as other processors, libraries and settings would round: ``make test-processors``.

Which kernels a library takes for a product or a sum decides about the last bits. Most of them can be asked for by an
environment variable on any x86 machine, so that a choice that hangs on rounding shows without the other machine.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent
THOROUGH = ("maths", "recovery", "pruners", "studies", "network/runtime/test_calibration.py")
# Where kernels differed before, and where choices are made.
QUICK = (
    *("maths/topology/test_spanning.py", "maths/topology/test_covering.py"),
    *("maths/topology/test_clouds.py", "maths/clustering", "maths/test_ties.py", "maths/test_near_ties.py"),
    *("maths/search/test_subsets.py", "pruners/test_cluster.py", "pruners/test_reconstruction.py"),
    "maths/least_squares/test_greedy.py",
)
# Prescott has the narrowest sums of all: more tests failed under it than under any other.
HARDEST = "prescott"
_PROBE = """
import numpy, scipy.linalg
from threadpoolctl import threadpool_info
print(*{str(lib.get("architecture", lib["internal_api"])) for lib in threadpool_info()}, sep="+")
"""


@dataclass(frozen=True)
class Variant:
    """Settings of one run: environment variables, options of pytest, and what the processor must be able to do."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    needs: str = ""


def variants() -> list[Variant]:
    """List all variants."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NNI_TOPO_TEST_THREADS")
    return [
        Variant("prescott", {"OPENBLAS_CORETYPE": "Prescott"}, needs="sse3"),
        Variant("haswell", {"OPENBLAS_CORETYPE": "Haswell"}, needs="avx2"),
        Variant("zen", {"OPENBLAS_CORETYPE": "Zen"}, needs="avx2"),
        Variant("skylakex", {"OPENBLAS_CORETYPE": "SkylakeX"}, needs="avx512vl"),
        Variant("aten-default", {"ATEN_CPU_CAPABILITY": "default"}),
        Variant("aten-avx2", {"ATEN_CPU_CAPABILITY": "avx2"}, needs="avx2"),
        Variant("numpy-without-avx512", {"NPY_DISABLE_CPU_FEATURES": wide_features()}, needs="avx512f"),
        Variant("mkl-compatible", {"MKL_CBWR": "COMPATIBLE"}),
        Variant("one-thread", dict.fromkeys(threads, "1")),
        Variant("two-threads", dict.fromkeys(threads, "2")),
        Variant("hash-seed", {"PYTHONHASHSEED": "20181"}),
        Variant("random-order", options=("--random-order", "--random-order-bucket=global", "--random-order-seed=17")),
    ]


def wide_features() -> str:
    """Return the AVX-512 features that NumPy chooses kernels by."""
    try:
        from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
    except ImportError:  # NumPy 1
        from numpy.core._multiarray_umath import __cpu_dispatch__, __cpu_features__
    wide = [name for name in __cpu_dispatch__ if "AVX512" in name or name == "X86_V4"]
    return " ".join(name for name in wide if __cpu_features__.get(name))


def processor_flags() -> set[str]:
    """Return what the processor can do, as far as it is known here."""
    listed = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not listed.exists():
        return set()
    lines = [line for line in listed.read_text().splitlines() if line.startswith("flags")]
    return {"sse3" if flag == "pni" else flag for flag in lines[0].split()} if lines else set()


def run(variant: Variant, tests: Sequence[str], folder: Path) -> tuple[int, int, int, str]:
    """Run the tests; return how many passed, failed and were skipped, and the BLAS kernels."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **variant.environment}
    probe = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True)
    kernels = probe.stdout.strip() or "unknown"
    report = folder / f"{variant.name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=short", "--no-header", f"--junit-xml={report}"]
    ended = subprocess.run(
        [*command, "-p", "no:cacheprovider", *variant.options, *(str(TESTS / test) for test in tests)],
        env=environment,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    passed, failed, skipped = counted(report)
    if ended.returncode:
        failed = max(failed, 1)
        print(ended.stdout[-6000:], ended.stderr[-2000:], sep="\n", flush=True)
    return passed, failed, skipped, kernels


def counted(report: Path) -> tuple[int, int, int]:
    """Read from pytest's report how many tests passed, failed and were skipped."""
    if not report.exists():
        return 0, 0, 0
    suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        return 0, 0, 0
    every, failures, errors, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped"))
    return every - failures - errors - skipped, failures + errors, skipped


def chosen(options: argparse.Namespace) -> list[Variant]:
    """Return the variants that are asked for."""
    known = {variant.name: variant for variant in variants()}
    if options.turn:
        return [list(known.values())[datetime.date.today().toordinal() % len(known)]]
    names = options.only or ([HARDEST] if options.hardest else list(known))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"a variant must be one of {', '.join(known)}, got {', '.join(unknown)} (--only)")
    return [known[name] for name in names]


def main() -> int:
    """Run the variants one after the other and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants; default all")
    which.add_argument("--turn", action="store_true", help="one variant, another one each day")
    which.add_argument("--hardest", action="store_true", help=f"only {HARDEST}")
    parser.add_argument("--quick", action="store_true", help="only the tests where it matters most")
    parser.add_argument("--list", action="store_true", help="name the variants and end")
    options = parser.parse_args()
    asked, flags = chosen(options), processor_flags()
    if options.list:
        print(*(variant.name for variant in asked), sep="\n")
        return 0
    tests, broken = QUICK if options.quick else THOROUGH, 0
    print(f"{'variant':22} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}  BLAS kernels", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for variant in asked:
            if variant.needs and variant.needs not in flags:
                print(f"{variant.name:22} {'':>7} {'':>7} {'':>8} {'':>8}  needs {variant.needs}", flush=True)
                continue
            place = Path(folder, variant.name)
            place.mkdir()
            start = time.monotonic()
            passed, failed, skipped, kernels = run(variant, tests, place)
            took = time.monotonic() - start
            broken += failed
            print(f"{variant.name:22} {passed:7} {failed:7} {skipped:8} {took:8.0f}  {kernels}", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
