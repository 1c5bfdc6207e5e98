"""What each selection criterion is worth: points of accuracy more than L1, over networks and over kinds of networks.

    python -m benchmarks.selection.forest                        # prints the tables
    python -m benchmarks.selection.forest --picture FILE.png     # draws a quarter of the MACs

``make tables`` writes both from the records of the comparison on networks that chose no default and of every pruner in
one protocol. A difference is that of two rows of the same trained network with the same share of the MACs, after the
same steps of recovery. Two intervals are shown: Student's t over all networks, as if they were drawn from one kind, and
a random-effects mean over kinds [1]_ with the interval of [2]_, which answers what another kind of networks may show.

References
----------
.. [1] R. DerSimonian and N. Laird, "Meta-analysis in clinical trials", Controlled Clinical Trials 7, 1986
.. [2] G. Knapp and J. Hartung, "Improved tests for a random effects meta-regression with a single covariate",
   Statistics in Medicine 22, 2003
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from benchmarks.fresh_networks import report
from benchmarks.selection import bench_named
from benchmarks.tables import WIDE
from benchmarks.topology import which_clouds
from benchmarks.topology.registered import CONFIRMATION
from nni_topo.disk import write_figure
from nni_topo.studies.pictures import finish, panels
from nni_topo.studies.records import read_records
from nni_topo.studies.tables import Interval, interval, markdown_table

SOURCE = "benchmarks/selection/forest.py"  # as the comments around a page's tables say
PICTURE = Path(__file__).parents[2] / "docs" / "figures" / "criteria.png"
TOPOLOGY = Path(__file__).parents[1] / "records" / "topology"
RECOVERIES = {
    "recalibrated": "batch norms recalibrated",
    "compensated": "weights reconstructed",
    "distilled": "then distilled",
    "retrained": "then fine-tuned",
}
L1, CLOUD, SQUARES = "l1", "topological, functional", "reconstruction"
CRITERIA = {
    SQUARES: "least squares",
    CLOUD: "functional cloud",
    "topological": "weight cloud",
    "torch-pruning": "Torch-Pruning's norm",
    "l2": "L2",
    "fpgm": "FPGM",
    "taylor": "Taylor",
    "random": "random",
    "energy": "energy",
    "cluster": "clusters",
    "subcluster": "sub-clusters",
    "perera2022": "`perera2022`",
}
"""By row of a comparison, the name in tables and in the picture."""
SHARES = {f"{share} % of the MACs left": share for share in (50, 25, 10, 3)}
BEST = "the best baseline"
BASES = {
    "l1": "L1",
    "random": "random",
    "torch-pruning": "Torch-Pruning's norm",
    BEST: BEST,
    "least squares": "least squares",
}
DRAWN = 25  # percent of the MACs

Record = dict[str, Any]
Gains = Mapping[str, Sequence[float]]
"""Differences in points by kind of networks, one for each network."""


def main() -> None:
    """Parse the command line; draw, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="file for the picture")
    options = parser.parse_args()
    if options.picture is not None:
        draw(options.picture)
    else:
        print(tables())


def records() -> list[Record]:
    """Return the records of both comparisons, each with its ``kind``; the same network in both is two kinds."""
    fresh = [{**record, "kind": f"{record['model']}, fresh"} for record in report.read()]
    named = [record for network in bench_named.NETWORKS for record in bench_named.records_of(network)[0]]
    return fresh + [{**record, "kind": f"{record['model'].rpartition(':')[2]}, named"} for record in named]


class Rows:
    """The records by kind, seed and share, then by row."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.by_network: dict[tuple[str, int, int], dict[str, Record]] = defaultdict(dict)
        for record in records:
            if record["target"] in SHARES:
                place = record["kind"], record["seed"], SHARES[record["target"]]
                self.by_network[place][record["pruner"]] = record

    def gains(self, row: str, base: str, share: int, recovery: str) -> dict[str, list[float]]:
        """Return what a row has more than another, of the networks on which both were measured in the same way."""
        column = f"accuracy_{recovery}"
        by_kind: dict[str, list[float]] = defaultdict(list)
        for (kind, _, share_of_network), rows in self.by_network.items():
            if share_of_network != share or not {row, base} <= rows.keys():
                continue
            ours, theirs = rows[row], rows[base]
            if column in ours and column in theirs and are_alike(ours, theirs, recovery):
                by_kind[kind].append(100.0 * (ours[column] - theirs[column]))
        return dict(by_kind)

    def have_batch_norms(self, kind: str) -> bool:
        """Say whether recalibrating batch norms changed any accuracy of a kind."""
        rows = [record for (name, *_), rows in self.by_network.items() if name == kind for record in rows.values()]
        return any(record.get("accuracy_recalibrated") != record.get("accuracy_oneshot") for record in rows)


def are_alike(ours: Record, theirs: Record, recovery: str) -> bool:
    """Say whether two rows begin with the same trained network, and were distilled both or neither before."""
    unpruned = ("accuracy_before", "validation_before")
    is_one_network = all(ours.get(name) == theirs.get(name) for name in unpruned)
    is_after = recovery == "retrained"
    return is_one_network and not (is_after and ("accuracy_distilled" in ours) != ("accuracy_distilled" in theirs))


@dataclass(frozen=True)
class Estimate:
    """A difference in points over all networks, and over kinds of networks."""

    over_networks: Interval
    over_kinds: Interval
    networks: int
    kinds: int

    @property
    def is_wide(self) -> bool:
        """Whether the interval over kinds holds zero and reaches more than a point to each side."""
        return abs(self.over_kinds.mean) <= self.over_kinds.half and self.over_kinds.half > WIDE

    def show(self, expected: tuple[int, int]) -> str:
        """Return both intervals, and the numbers of networks and kinds where they aren't the expected ones."""
        text = f"{shown(self.over_networks)}; {shown(self.over_kinds)}" + " (wide)" * self.is_wide
        counts = self.networks, self.kinds
        return text if counts == expected else f"{text} [{counts[0]}, {counts[1]}]"


def shown(points: Interval) -> str:
    """Return an interval with one decimal if it is coarse, else with two."""
    return points.show(digits=1 if points.half >= 2.0 else 2, sign=True)


def estimate(gains: Gains) -> Estimate | None:
    """Return the estimate of differences by kind; None with fewer than two kinds or with a single network of one."""
    if len(gains) < 2 or min(map(len, gains.values())) < 2:
        return None
    everything = [gain for kind in gains.values() for gain in kind]
    return Estimate(interval(everything), random_effects(gains), len(everything), len(gains))


def random_effects(gains: Gains) -> Interval:
    """Return the random-effects mean over kinds by DerSimonian and Laird, with the interval of Knapp and Hartung."""
    means = np.array([np.mean(kind) for kind in gains.values()])
    # Kinds whose networks all differ by the same have no spread, which would give them all the weight.
    errors = np.maximum([np.var(kind, ddof=1) / len(kind) for kind in gains.values()], 1e-12)
    weights = 1.0 / errors
    fixed = (weights * means).sum() / weights.sum()
    excess = (weights * np.square(means - fixed)).sum() - (len(means) - 1)
    between = max(0.0, excess / (weights.sum() - np.square(weights).sum() / weights.sum()))
    weights = 1.0 / (errors + between)
    mean = (weights * means).sum() / weights.sum()
    spread = (weights * np.square(means - mean)).sum() / (len(means) - 1) / weights.sum()
    return Interval(float(mean), float(stats.t.ppf(0.975, len(means) - 1) * np.sqrt(spread)))


# Tables


def tables() -> str:
    """Return Markdown: the criteria beside L1, the functional cloud beside others, by kind, what was registered."""
    rows = Rows(records())
    blocks = []
    beside_l1 = {name: (row, L1) for row, name in CRITERIA.items()}
    beside_others = {name: (CLOUD, base) for base, name in CRITERIA.items() if base != CLOUD}
    for title, head, pairs in (
        ("Points more than L1", "criterion", beside_l1),
        ("The functional cloud's points more than another criterion", "than", beside_others),
    ):
        for share in SHARES.values():
            blocks += [f"**{title}, {share} % of the MACs**", criteria_table(head, estimates_of(rows, pairs, share))]
    blocks += [f"**By kind: batch norms recalibrated, {DRAWN} % of the MACs, points**", table_by_kind(rows)]
    blocks += ["**Registered before their runs: the functional cloud's points more than**", registered_table()]
    blocks += ["**Revisions of the rows**", revision_table()]
    return "\n\n".join(blocks)


def estimates_of(rows: Rows, pairs: Mapping[str, tuple[str, str]], share: int) -> dict[str, dict[str, Estimate]]:
    """Return by name of a pair its estimates by recovery; what wasn't run is left out."""
    estimates: dict[str, dict[str, Estimate]] = {}
    for name, (row, base) in pairs.items():
        for recovery in RECOVERIES:
            cell = estimate(rows.gains(row, base, share, recovery))
            if cell is not None:
                estimates.setdefault(name, {})[recovery] = cell
    return estimates


def criteria_table(head: str, estimates: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Return a table of estimates; cells of other networks than the first cell's say their numbers."""
    lines = []
    for name, by_recovery in estimates.items():
        first = next(iter(by_recovery.values()))
        counts = first.networks, first.kinds
        cells = [by_recovery[step].show(counts) if step in by_recovery else "not run" for step in RECOVERIES]
        lines.append([name, f"{counts[0]}, {counts[1]}", *cells])
    return markdown_table([head, "networks, kinds", *RECOVERIES.values()], lines)


def table_by_kind(rows: Rows) -> str:
    """Return the table of each kind's differences where batch norms alone follow."""
    pairs = {
        "cloud - L1": (CLOUD, L1),
        "cloud - random": (CLOUD, "random"),
        "cloud - Torch-Pruning": (CLOUD, "torch-pruning"),
        "least squares - cloud": (SQUARES, CLOUD),
    }
    gains = {name: rows.gains(*pair, DRAWN, "recalibrated") for name, pair in pairs.items()}
    lines = []
    for kind in gains["cloud - L1"]:
        has_norms = "yes" if rows.have_batch_norms(kind) else "no"
        cells = [shown(interval(by_kind[kind])) if kind in by_kind else "not run" for by_kind in gains.values()]
        lines.append([kind, str(len(gains["cloud - L1"][kind])), has_norms, *cells])
    return markdown_table(["kind", "networks", "batch norms", *pairs], lines)


def registered_table() -> str:
    """Return the table of the confirming networks of T6, T6b and T7, by kind, and of the mean of T7's kinds."""
    lines = []
    for question, tested in frozen_weights().items():
        gains = {base: differences(tested["functional Hausdorff"], tested.get(base, {})) for base in BASES}
        lines.append([question, "batch norms recalibrated", *_with_count(gains)])
    clouds = read_records(TOPOLOGY / "which_clouds.jsonl")
    kinds = []
    for kind in which_clouds.KINDS:
        tested = which_clouds.figures(clouds, kind, "test")
        tested[BEST] = tested[str(which_clouds.best_baseline(clouds, kind))]
        kinds.append({base: differences(tested[which_clouds.OURS], tested[base]) for base in BASES})
        lines.append([f"T7, {kind}, a quarter of every layer", "weights reconstructed", *_with_count(kinds[-1])])
    means = [shown(interval([float(np.mean(gains[base])) for gains in kinds])) for base in BASES]
    lines.append(["T7, mean of its kinds", "weights reconstructed", f"{len(kinds)} kinds", *means])
    return markdown_table(["question", "recovery", "networks", *BASES.values()], lines, text_columns=2)


def frozen_weights() -> dict[str, dict[str, dict[int, float]]]:
    """Return the accuracies of T6 and T6b by question, then by row, then by seed."""
    tested: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for name, question in (("which_filters", "T6"), ("which_filters_exact", "T6b")):
        for record in read_records(TOPOLOGY / f"{name}.jsonl"):
            *kind, seed, share, row = record["key"]
            if seed in CONFIRMATION:
                place = f"{question}, {kind[0] if kind else 'four convolutions'}, {share:g} of every layer"
                tested[place][row][seed] = record["test"]
    return tested


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Return paired differences in points."""
    return [100.0 * (ours[seed] - theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def _with_count(gains: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the cells of a row: how many networks, then each difference."""
    return [
        str(max(map(len, gains.values()))),
        *(shown(interval(each)) if each else "not run" for each in gains.values()),
    ]


def revision_table() -> str:
    """Return by kind of networks how many rows are of which revision."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records():
        counts[record["kind"]][record["revision"]] += 1
    lines = [[kind, ", ".join(f"{name} ({count})" for name, count in of.items())] for kind, of in counts.items()]
    return markdown_table(["kind", "revisions (rows)"], lines, text_columns=2)


# The picture


def drawn_estimates() -> dict[str, dict[str, Estimate]]:
    """Return what the picture shows."""
    return estimates_of(Rows(records()), {name: (row, L1) for row, name in CRITERIA.items()}, DRAWN)


def digest() -> str:
    """Return a name of the drawn figures to a thousandth of a point, which the picture's file holds."""
    shown_figures = [
        f"{name} {step} {cell.networks} {cell.kinds} {points.mean:.3f} {points.half:.3f}"
        for name, by_recovery in drawn_estimates().items()
        for step, cell in by_recovery.items()
        for points in (cell.over_networks, cell.over_kinds)
    ]
    return hashlib.sha256("\n".join(shown_figures).encode()).hexdigest()


def is_current(path: Path = PICTURE) -> bool:
    """Say whether a picture shows the records' figures; another matplotlib may draw it with other pixels."""
    return path.exists() and digest().encode() in path.read_bytes()


def draw(path: Path = PICTURE) -> None:
    """Draw a panel for each recovery with a row for each criterion."""
    estimates = drawn_estimates()
    named = [(title, (estimates, step)) for step, title in RECOVERIES.items()]
    figure = panels(named, _draw_panel, size=(5.0, 3.8), columns=2)
    figure.suptitle(f"points of accuracy more than L1, {DRAWN} % of the MACs, 95 % intervals", fontsize="medium")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize="small", ncols=2)
    write_figure(path, figure, dpi=110, metadata={"Description": digest()})


def _draw_panel(axis: Axes, drawn: tuple[Mapping[str, Mapping[str, Estimate]], str]) -> None:
    estimates, step = drawn
    ticks = []
    for place, (name, by_recovery) in enumerate(estimates.items()):
        name = name.strip("`")
        cell = by_recovery.get(step)
        ticks.append(name if cell is None else f"{name} ({cell.networks}, {cell.kinds})")
        if cell is None:
            continue
        for points, shift, marker, color, label in (
            (cell.over_kinds, -0.15, "D", "C3", "mean over kinds of networks"),
            (cell.over_networks, 0.15, "o", "C0", "mean over networks (networks, kinds)"),
        ):
            label = "" if place else label
            settings = {"xerr": points.half, "marker": marker, "color": color, "markersize": 4, "label": label}
            axis.errorbar(points.mean, place + shift, linestyle="", **settings)
    axis.axvline(0.0, color="k", linestyle=":")
    axis.set_yticks(range(len(ticks)), ticks, fontsize="x-small")
    axis.invert_yaxis()
    finish(axis, "points", legend=False)


if __name__ == "__main__":
    main()
