"""Four benchmarks in their quick forms, beside what the pages say: what has got slower since a row was measured.

    python -m benchmarks.speed.quick --out runs/quick

runs `bench_fitness`, `bench_dense`, `bench_seconds` and `bench_time` on one case each. All figures are ratios of times
of the same process, or shares, so that they may be compared between machines. A line a figure goes to ``quick.jsonl``:
the figure of the page, the commit of its row, how many commits have changed the code that it times since, and today's
figure. The exit status is 1 if one is more than half worse than the page's.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table

BENCHMARKS = Path(__file__).parents[1]
RECORDS = BENCHMARKS / "records"
WORSE = 1.5  # times as bad as the page's figure


@dataclass(frozen=True)
class Quick:
    """A quick form of a benchmark, one of its figures, and the figure's place on a page."""

    figure: str
    command: str  # arguments of Python; {out}: a folder for the records
    file: str  # the records in that folder
    value: Callable[[Path], float]  # reads the figure from records
    on_page: Callable[[], tuple[float, str]]  # the page's figure, and the commit of its row
    code: str  # what the figure times
    is_larger_better: bool = False


def _fitness(path: Path) -> float:
    return float(json.loads(path.read_text(encoding="utf-8"))["fitness"][0]["ratio"])


def _fitness_on_page() -> tuple[float, str]:
    table = RECORDS / "printed/speed/cost_of_one_fitness.csv"
    with table.open(encoding="utf-8", newline="") as lines:
        cells = {row[0]: row[-1] for row in csv.reader(lines)}
    return float(cells["H1, 128 x 1152"].split()[0]), _recorded("archive/speed.md", "## Cost of one fitness")


def _dense(path: Path) -> float:
    """Return groups, selection and unchecked dense network in jobs of Torch-Pruning, the second time in a process."""
    least: dict[str, float] = {}
    for record in read_records(path):
        if record["net"] == "resnet18:224" and "whole again" in record:
            tool, seconds = record["tool"], record["whole again"]
            least[tool] = min(seconds, least.get(tool, seconds))
    return least["unchecked"] / least["torch-pruning"]


def _seconds_of(record: dict[str, Any]) -> float:
    return float(record["select, passes"] + record["reconstruct, passes"])


def _seconds_on_page() -> tuple[float, str]:
    record = [each for each in read_records(RECORDS / "seconds.jsonl") if each["network"] == "resnet18"][-1]
    return _seconds_of(record), str(record["commit"])


def _time_record(path: Path) -> dict[str, Any]:
    return [each for each in read_records(path) if each["key"] == ["ResNet-20, 28 x 28", "default"]][-1]


def _time(path: Path) -> float:
    return float(_time_record(path)["pytorch"]["share"][0])


def _recorded(page: str, heading: str) -> str:
    """Return the commit at which a section of a page was recorded, as its line says."""
    text = (BENCHMARKS / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    found = re.search(r"^Recorded: [^\n]*?\(([0-9a-f]{7,12})\)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"a section must say at which commit it was recorded ({heading}, {page})")
    return found[1]


QUICK = (
    Quick(
        "one fitness in H1, 128 points: times cheaper than the naive one",
        "-m benchmarks.speed.bench_fitness --quick --parts h1 --out {out}/fitness.json",
        "fitness.json",
        _fitness,
        _fitness_on_page,
        "nni_topo/maths",
        is_larger_better=True,
    ),
    Quick(
        "L1 without check on a ResNet-18: jobs of Torch-Pruning",
        "-m benchmarks.speed.bench_dense resnet18:224 --tools unchecked torch-pruning --out {out}/dense.jsonl",
        "dense.jsonl",
        _dense,
        lambda: (
            _dense(RECORDS / "dense.jsonl"),
            _recorded("results/speed.md", "## Cost of groups and dense networks"),
        ),
        "nni_topo/network",
    ),
    Quick(
        "selecting and reconstructing a ResNet-18: passes",
        "-m benchmarks.speed.bench_seconds --networks resnet18 --no-distillation --out {out}",
        "seconds.jsonl",
        lambda path: _seconds_of(read_records(path)[-1]),
        _seconds_on_page,
        "nni_topo",
    ),
    Quick(
        "a ResNet-20 with half of its MACs: share of the time in PyTorch",
        "-m benchmarks.speed.bench_time --quick --out {out}",
        "time.jsonl",
        _time,
        lambda: (
            _time(RECORDS / "time.jsonl"),
            str(_time_record(RECORDS / "time.jsonl")["revision"]).rstrip("+"),
        ),
        "nni_topo",
    ),
)


def measure(quick: Quick, out: Path) -> dict[str, Any]:
    """Run a benchmark and return its figure beside the page's."""
    (out / quick.file).unlink(missing_ok=True)
    command = [sys.executable, *quick.command.format(out=out).split()]
    subprocess.run(command, check=True, cwd=BENCHMARKS.parent)
    on_page, commit = quick.on_page()
    today = quick.value(out / quick.file)
    times = on_page / today if quick.is_larger_better else today / on_page
    changes = subprocess.run(
        ["git", "rev-list", "--count", f"{commit}..HEAD", "--", quick.code],
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
    )
    return {
        "figure": quick.figure,
        "page": on_page,
        "page commit": commit,
        "changes": int(changes.stdout) if changes.returncode == 0 else None,  # a history may begin later
        "today": today,
        "worse": times,
        "revision": provenance()["revision"],
    }


def table(records: list[dict[str, Any]]) -> str:
    """Return the last line of each figure, in the order of the benchmarks."""
    last = {record["figure"]: record for record in records}
    rows = []
    for quick in QUICK:
        if quick.figure not in last:
            rows.append([quick.figure, *["not run"] * 4, ""])
            continue
        record = last[quick.figure]
        since = "not known" if record["changes"] is None else str(record["changes"])
        verdict = "slower than the page says" if record["worse"] > WORSE else ""
        if not verdict and record["changes"]:
            verdict = "the row is older than its code"
        page = f"{record['page']:.3g} ({record['page commit'][:8]})"
        rows.append([quick.figure, page, since, f"{record['today']:.3g}", record["revision"], verdict])
    head = ["figure", "page (commit)", "later commits to its code", "today", "today's commit", ""]
    return markdown_table(head, rows)


def main() -> int:
    """Run the benchmarks and print the table; return 1 if one is much slower than its page says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the records")
    parser.add_argument("--only", nargs="+", type=int, choices=range(len(QUICK)), default=range(len(QUICK)))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    records = []
    for index in options.only:
        records.append(measure(QUICK[index], options.out))
        append_record(options.out / "quick.jsonl", records[-1])
    print(table(records))
    return int(any(record["worse"] > WORSE for record in records))


if __name__ == "__main__":
    sys.exit(main())
