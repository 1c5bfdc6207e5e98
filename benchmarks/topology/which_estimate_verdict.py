"""The verdict of T8 once more, by the standard library alone, from the lines of its rows.

    python benchmarks/topology/which_estimate_verdict.py benchmarks/records/topology/which_estimate.jsonl

It shares no code with ``which_estimate.py``: it reads the lines itself, computes Student's distribution by integration,
and Holm's correction by its definition. It prints JSON: how many networks are complete, the primary means over kinds
with half their intervals, the outcome, and the p-values by Holm of the other comparisons.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

KINDS, SEEDS = 12, 5
ROWS_OF_A_NETWORK = 22
OURS, SETTINGS = "functional cloud", ("functional cloud", "mean distance", "no origin")
BASES = ("l1", "random", "torch-pruning")
BESIDE_L1 = ("least squares", "random", "torch-pruning", "l2", "fpgm", "taylor", "hessian")
CELLS = [(share, step) for share in (0.25, 0.1) for step in ("recalibrated", "reconstructed")]
STEPS = 4_000  # of the integration


def two_sided(t: float, freedom: int) -> float:
    """Return the probability of a larger absolute value of Student's t, by Simpson's rule over its angle.

    With t = sqrt(freedom) * tan(angle) the density is a power of the cosine.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))

    def integral(low: float, high: float) -> float:
        width = (high - low) / STEPS
        values = [math.cos(low + place * width) ** (freedom - 1) for place in range(STEPS + 1)]
        return width / 3.0 * (values[0] + values[-1] + 4.0 * sum(values[1:-1:2]) + 2.0 * sum(values[2:-1:2]))

    return integral(angle, math.pi / 2.0) / integral(0.0, math.pi / 2.0)


def half_interval(numbers: list[float]) -> float:
    """Return half of the 95 % interval of a mean."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if two_sided(middle, len(numbers) - 1) > 0.05 else (low, middle)
    return low * stdev(numbers) / math.sqrt(len(numbers))


def main() -> None:
    """Print the verdict of a file of rows."""
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    rows_of: dict[tuple[str, int], int] = defaultdict(int)
    accuracy: dict[tuple[object, ...], float] = {}
    for line in lines:
        kind, seed, share, row = line["key"]
        rows_of[kind, seed] += 1
        for _, step in CELLS[:2]:
            if "error" not in line:
                accuracy[share, step, kind, seed, row] = 100.0 * line[f"test_{step}"]

    def means(cell: tuple[float, str], row: str, base: str) -> list[float]:
        by_kind: dict[str, list[float]] = defaultdict(list)
        for kind, seed in sorted(rows_of):
            ours, theirs = (accuracy.get((*cell, kind, seed, name)) for name in (row, base))
            if ours is not None and theirs is not None:
                by_kind[kind].append(ours - theirs)
        return [fmean(points) for points in by_kind.values()]

    complete = sum(count == ROWS_OF_A_NETWORK for count in rows_of.values())
    primary = {}
    for base in BASES:
        points = means(CELLS[0], OURS, base)
        if len(points) > 1:
            primary[base] = [fmean(points), half_interval(points)]
    outcome = "open"
    if complete == KINDS * SEEDS:
        is_ahead = len(primary) == len(BASES) and all(mean > half for mean, half in primary.values())
        outcome = "becomes the default" if is_ahead else "no default changes"
    p_values: dict[str, float] = {}
    for cell in CELLS:
        pairs = [(row, base) for row in SETTINGS for base in BASES]
        pairs += [(row, "l1") for row in BESIDE_L1] + [(OURS, "least squares")]
        for row, base in pairs:
            if cell == CELLS[0] and row == OURS and base in BASES:
                continue
            points = means(cell, row, base)
            p = 1.0
            if len(points) > 1 and max(points) > min(points):
                p = two_sided(fmean(points) / (stdev(points) / math.sqrt(len(points))), len(points) - 1)
            p_values[f"{cell[0]:g}, {cell[1]}, {row} than {base}"] = p
    corrected: dict[str, float] = {}
    for name, p in p_values.items():
        # the largest of this and all smaller p-values, each times the number of those that aren't smaller
        smaller = [other for other in p_values.values() if other <= p]
        products = [other * sum(each >= other for each in p_values.values()) for other in smaller]
        corrected[name] = min(1.0, max(products))
    print(json.dumps({"networks": complete, "primary": primary, "outcome": outcome, "holm": corrected}, indent=1))


if __name__ == "__main__":
    main()
