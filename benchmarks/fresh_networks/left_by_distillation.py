"""The share of the lost accuracy that distillation leaves, by the records of networks that chose no default.

    python -m benchmarks.fresh_networks.left_by_distillation

It prints the rows of `nni_topo.runs.expected.RECORDED`: for each share of the multiply-accumulates the 5th and the 95th
percentile, over all networks and criteria, of what distillation leaves of what weight reconstruction leaves. Beside
these is what a range is worth on a kind of network that it wasn't made from: each kind is left out in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.fresh_networks.report import Record, read
from nni_topo.studies.tables import markdown_table

LEAST_LOST = 0.005
"""Least accuracy that is missing after weight reconstruction: 25 of the 5,000 images."""
LIMITS = (5.0, 95.0)  # percentiles

Shares = dict[float, list[tuple[str, float]]]
"""By the share of the multiply-accumulates, the kind of each network and the share of its loss that is left."""


def main() -> None:
    """Print the table of the package, and how often each range holds for a kind that was left out."""
    shares = shares_left(read())
    lines, held, count = [], 0, 0
    for share, rows in shares.items():
        low, high = limits([left for _, left in rows])
        within = held_for_others(rows)
        held, count = held + within, count + len(rows)
        cells = [f"{share:g}", str(len(rows)), f"{low:.2f}", f"{high:.2f}", f"{within} of {len(rows)}"]
        lines.append(cells)
    head = ["share of the MACs", "networks", "least left", "most left", "holds for a kind left out"]
    print(markdown_table(head, lines, text_columns=0))
    print(f"\n{held} of {count}, {held / count:.0%}")


def shares_left(records: Iterable[Record]) -> Shares:
    """Return the shares that distillation leaves of the accuracy lost after weight reconstruction."""
    shares: Shares = {}
    for record in records:
        percent, _, unit = record["target"].partition(" % of the ")
        if "accuracy_distilled" not in record or unit != "MACs left":
            continue
        lost = record["accuracy_before"] - record["accuracy_compensated"]
        left = record["accuracy_before"] - record["accuracy_distilled"]
        if lost >= LEAST_LOST:
            shares.setdefault(float(percent) / 100.0, []).append((record["model"], left / lost))
    return dict(sorted(shares.items(), reverse=True))


def limits(shares: Sequence[float]) -> tuple[float, float]:
    """Return the range of the shares: the 5th and the 95th percentile."""
    low, high = np.percentile(shares, LIMITS)
    return float(low), float(high)


def held_for_others(rows: Sequence[tuple[str, float]]) -> int:
    """Return how many shares are in the range of all other kinds of networks."""
    held = 0
    for kind in {kind for kind, _ in rows}:
        low, high = limits([left for other, left in rows if other != kind])
        held += sum(low <= left <= high for other, left in rows if other == kind)
    return held


if __name__ == "__main__":
    main()
