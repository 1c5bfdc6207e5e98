"""Is there an empirical relation for the constant gamma of theorem 1? Epochs predicted for networks left out.

    nni-topo analyze retraining --model lenet300 ... --out DIR/lenet300
    nni-topo analyze retraining --model lenet5 ... --out DIR/lenet5
    python benchmarks/bench_gamma.py DIR/lenet300/retraining.json DIR/lenet5/retraining.json

By (3.1) the epochs are at least ``gamma * bound``, with the bound at gamma = 1. A relation for gamma is thus one for
the epochs: each relation here is a least-squares fit of their logarithm. Runs that didn't recover, or needed no epoch,
are counted and left out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from nni_topo.studies.tables import markdown_table


class Relation(NamedTuple):
    """A relation for the epochs: what multiplies into them with a power to fit, and what with the power 1."""

    gamma: str
    fitted: tuple[str, ...] = ()
    fixed: str | None = None


RELATIONS = {
    "the same epochs whatever the bound": Relation("c / bound"),
    "(3.1), one gamma": Relation("c", fixed="bound"),
    "(3.1), a power of the bound": Relation("c bound^(b - 1)", ("bound",)),
    "as derived, one gamma": Relation("c derived / bound", fixed="derived"),
    "as derived, a power": Relation("c derived^b / bound", ("derived",)),
    "exponential in the ratio": Relation("c e^(b ratio) / bound", ("ratio",)),
    "exponential in the ratio, and a power of the bound": Relation("c e^(a ratio) bound^(b - 1)", ("ratio", "bound")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="retraining.json of each network")
    options = parser.parse_args()
    points = [
        point | {"group": f"{path.parent.name}, {point['kind']}"}
        for path in options.files
        for point in json.loads(path.read_text())["points"]
    ]
    known = [point for point in points if point["epochs"]]
    never = sum(point["epochs"] is None for point in points)
    at_once = len(points) - len(known) - never
    print(f"{len(points)} runs: {len(known)} recovered, {never} never did, {at_once} at once\n")
    print(markdown_table(*correlations(known)))
    print(markdown_table(*table(known)))


def correlations(points: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return Spearman's rank correlation of the epochs with both bounds and with the ratio, by network and kind."""
    head = ["net, pruned", "runs", "epochs", "gamma", "with (3.1)", "with the bound as derived", "with the ratio"]
    rows = []
    for group in [*dict.fromkeys(point["group"] for point in points), "all"]:
        chosen = [point for point in points if group in ("all", point["group"])]
        epochs = [point["epochs"] for point in chosen]
        gammas = [point["epochs"] / point["bound"] for point in chosen]
        row = [group, str(len(chosen)), f"{min(epochs)} to {max(epochs)}", f"{min(gammas):.2g} to {max(gammas):.2g}"]
        ranks = [spearmanr([point[column] for point in chosen], epochs) for column in ("bound", "derived", "ratio")]
        rows.append([*row, *(f"{rank.statistic:.2f}" for rank in ranks)])
    return head, rows


def table(points: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return each relation's typical factor between predicted and true epochs: fitted, and on groups left out."""
    groups = list(dict.fromkeys(point["group"] for point in points))
    head = ["relation", "gamma", "factor, all fitted", "factor, left out", "powers fitted to all"]
    rows = []
    for name, relation in RELATIONS.items():
        coefficients = fit(relation, points)
        left_out = []
        for group in groups:
            rest = [point for point in points if point["group"] != group]
            held = [point for point in points if point["group"] == group]
            left_out += errors(relation, fit(relation, rest), held)
        factors = [factor(errors(relation, coefficients, points)), factor(left_out)]
        powers = ", ".join(f"{value:.2f}" for value in coefficients[1:])
        rows.append([name, relation.gamma, *(f"{value:.2f}" for value in factors), powers])
    return head, rows


def fit(relation: Relation, points: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the logarithm of the constant c and the fitted powers, by least squares on the logarithm of the epochs."""
    design, target = _design(relation, points)
    return np.linalg.lstsq(design, target, rcond=None)[0]


def errors(relation: Relation, coefficients: np.ndarray, points: Sequence[dict[str, Any]]) -> list[float]:
    """Return the logarithms of predicted over true epochs."""
    design, target = _design(relation, points)
    return (design @ coefficients - target).tolist()


def factor(logarithms: Sequence[float]) -> float:
    """Return the typical factor of logarithmic errors: 1 is exact, 2 is twice as many or half of them."""
    return math.exp(float(np.mean(np.abs(logarithms))))


def _design(relation: Relation, points: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    def column(name: str) -> np.ndarray:
        values = np.array([point[name] for point in points], dtype=np.float64)
        return values if name == "ratio" else np.log(values)

    target = np.log([point["epochs"] for point in points])
    if relation.fixed is not None:
        target = target - column(relation.fixed)
    return np.stack([np.ones(len(points)), *map(column, relation.fitted)], axis=1), target


if __name__ == "__main__":
    main()
