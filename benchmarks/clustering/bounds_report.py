"""The tables of Net Deviation and theorem 1, from runs of ``nni-topo analyze deviation`` and ``analyze retraining``.

    python benchmarks/clustering/bounds_report.py --keep lenet5 runs/deviation

adds a run's points to ``records/bounds.jsonl``: the network's name, then the folder that ``--out`` named. A later run
of the same study, network, ratio and number of epochs replaces an earlier one's points. Without ``--keep`` the tables
of the records are written into ``results/clustering.md``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.tables import with_tables
from nni_topo.disk import output_file
from nni_topo.studies.analysis.deviation import DeviationStudy
from nni_topo.studies.analysis.retraining import RetrainingStudy
from nni_topo.studies.records import read_records
from nni_topo.studies.tables import markdown_table

SOURCE = "benchmarks/clustering/bounds_report.py"
RECORDS = Path(__file__).parents[1] / "records" / "bounds.jsonl"
PAGE = Path(__file__).parents[1] / "results" / "clustering.md"
OF_A_RUN = {"study", "net", "accuracy_unpruned", "images", "trained_epochs", "most_epochs", "gamma"}
OWN_TABLE = 0.6
"""The ratio of the text's table 3.1, which no other run has: its rows stand in a table of their own."""


def keep(net: str, out: Path) -> None:
    """Add the points of a run to the records; FileNotFoundError if the folder holds no study."""
    kept = read_records(RECORDS)
    paths = {study: out / f"{study}.json" for study in ("deviation", "retraining")}
    if not any(path.exists() for path in paths.values()):
        raise FileNotFoundError(f"a run must have written deviation.json or retraining.json, got neither ({out})")
    for study, path in paths.items():
        if not path.exists():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        points = found.pop("points")
        # a point has an accuracy, too
        run = {"study": study, "net": net, "accuracy_unpruned": found.pop("accuracy"), **found}
        new = [{**run, **point} for point in points]
        replaced = {_run_of(record) for record in new}
        kept = [record for record in kept if _run_of(record) not in replaced] + new
    lines = [json.dumps(record, sort_keys=True) for record in kept]
    output_file(RECORDS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells the runs apart whose points the records hold."""
    return record["study"], record["net"], record.get("most_epochs"), record["ratio"]


def deviation_table(records: list[dict[str, Any]]) -> str:
    """Return a line for each network, pruner and ratio: means over seeds."""
    lines = []
    for net in dict.fromkeys(record["net"] for record in records):
        rows = [record for record in records if record["net"] == net]
        study = DeviationStudy(_points(rows), rows[0]["accuracy_unpruned"], rows[0]["images"])
        for row in study.means().to_dict("records"):
            line = [net, row["pruner"], f"{row['ratio']:g}", f"{100 * row['pruned']:.1f}"]
            line += [f"{row[key]:.4g}" for key in ("error", "bound", "dev", "relative", "lipschitz")]
            lines.append([*line, f"{100 * row['accuracy']:.1f}", f"{100 * study.accuracy:.1f}"])
    head = ["net", "pruner", "ratio", "weights removed %", "error", "bound (3.9)", "dev (3.12)", "dev / bound"]
    return markdown_table([*head, "Lipschitz bound", "no recovery %", "unpruned %"], lines, text_columns=2)


def retraining_table(records: list[dict[str, Any]]) -> str:
    """Return a line for each network, number of epochs, kind of pruning and ratio: means over seeds."""
    lines = []
    for net, most in dict.fromkeys((record["net"], record["most_epochs"]) for record in records):
        rows = [record for record in records if (record["net"], record["most_epochs"]) == (net, most)]
        first = rows[0]
        study = RetrainingStudy(
            _points(rows), first["accuracy_unpruned"], first["trained_epochs"], most, first["gamma"]
        )
        for row in study.means().to_dict("records"):
            line = [f"{net}, {most}", "nodes" if row["kind"] == "node" else "connections", f"{row['ratio']:g}"]
            line += [f"{row['bound']:.3g}", f"{row['derived']:.3g}", f"{row['epochs']:.1f}", f"{row['back']:g}"]
            line.append(f"{row['fitted']:.3g}")
            line += [f"{100 * row[key]:.1f}" for key in ("accuracy_pruned", "accuracy_retrained")]
            lines.append(line)
    head = ["net, most epochs", "pruning", "ratio", "bound (3.1), gamma = 1", "bound as derived", "epochs taken"]
    head += ["runs recovered", "fitted gamma (3.1)", "no recovery %", "fine-tuned %"]
    return markdown_table(head, lines, text_columns=2)


def _points(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points of a run, without what the records say of the run."""
    return [{name: value for name, value in record.items() if name not in OF_A_RUN} for record in records]


def with_bounds(page: str, records: list[dict[str, Any]]) -> str:
    """Return a page with the tables of some records."""
    deviation = [record for record in records if record["study"] == "deviation"]
    retraining = [record for record in records if record["study"] == "retraining"]
    page = with_tables(page, f"{SOURCE}, deviation", deviation_table(deviation))
    others = [record for record in retraining if record["ratio"] != OWN_TABLE]
    page = with_tables(page, f"{SOURCE}, retraining", retraining_table(others))
    of_the_text = [record for record in retraining if record["ratio"] == OWN_TABLE]
    return with_tables(page, f"{SOURCE}, table 3.1", retraining_table(of_the_text))


def main() -> None:
    """Keep a run, or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs=2, metavar=("NET", "OUT"), help="add a run's points to the records")
    args = parser.parse_args()
    if args.keep:
        keep(args.keep[0], Path(args.keep[1]))
        return
    page = with_bounds(PAGE.read_text(encoding="utf-8"), read_records(RECORDS))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
