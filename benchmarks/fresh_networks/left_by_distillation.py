"""The share of the lost accuracy that distillation leaves, by the records of networks that chose no default.

    python -m benchmarks.fresh_networks.left_by_distillation

It prints the rows of `nni_topo.runs.expected.RECORDED`: for each share of the multiply-accumulates the range of what
distillation leaves of what weight reconstruction leaves. Kinds of networks differ more than networks of one kind, and a
user's network is of another kind. So the range is a prediction interval for a network of a new kind: of logarithms, by
the variances between and within kinds, and by Student's t because kinds are few. Beside these is what a range is worth
on a kind of network that it wasn't made from: each kind is left out in turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from benchmarks.fresh_networks.report import Record, read
from nni_topo.studies.tables import markdown_table

LEAST_LOST = 0.005
"""Least accuracy that is missing after weight reconstruction: 25 of the 5,000 images."""
CONFIDENCE = 0.9
LEAST_LEFT = 0.02  # less, also after a gain in accuracy, counts as this, because it has no logarithm

Rows = Sequence[tuple[str, float]]
Shares = dict[float, list[tuple[str, float]]]
"""By the share of the multiply-accumulates, the kind of each network and the share of its loss that is left."""


def main() -> None:
    """Print the table of the package, and how often each range holds for a kind that was left out."""
    shares = shares_left(read())
    lines, held, count = [], 0, 0
    for share, rows in shares.items():
        low, high = limits(rows)
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


def limits(rows: Rows) -> tuple[float, float]:
    """Return the range of the share that is left of a network of a new kind, given those of several kinds.

    The upper limit is at most 1, because weights that distillation makes worse are discarded.
    """
    by_kind: dict[str, list[float]] = {}
    for kind, left in rows:
        by_kind.setdefault(kind, []).append(math.log(max(left, LEAST_LEFT)))
    means = np.array([np.mean(logs) for logs in by_kind.values()])
    squares = sum(float(np.square(logs - np.mean(logs)).sum()) for logs in by_kind.values())
    within = squares / (len(rows) - len(means)) if len(rows) > len(means) else 0.0
    between = means.var(ddof=1) * (1.0 + 1.0 / len(means))
    half = stats.t.ppf((1.0 + CONFIDENCE) / 2.0, len(means) - 1) * math.sqrt(between + within)
    return math.exp(means.mean() - half), min(math.exp(means.mean() + half), 1.0)


def held_for_others(rows: Rows) -> int:
    """Return how many shares are in the range of all other kinds of networks."""
    held = 0
    for kind in {kind for kind, _ in rows}:
        low, high = limits([row for row in rows if row[0] != kind])
        held += sum(low <= left <= high for other, left in rows if other == kind)
    return held


if __name__ == "__main__":
    main()
