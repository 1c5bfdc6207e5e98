"""What T8 of HYPOTHESES.md can find: its power, from the rows of earlier comparisons.

    python -m benchmarks.topology.power

The primary comparison is a t-test of twelve means of kinds. How far such means spread comes from the networks of
``benchmarks/records/fresh_networks`` and ``named`` with a quarter of the MACs and batch norms recalibrated, a kind that
is in both counted once; for reconstructed weights it comes from T7 as well. Kinds that T8 adds may spread more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from benchmarks.selection import forest
from benchmarks.topology import which_clouds
from nni_topo.studies.records import read_records

KINDS = 12
DRAWS = 20_000
LEVEL, ASKED_POWER = 0.05, 0.8
BASES = {"l1": "L1", "random": "random", "torch-pruning": "Torch-Pruning's norm"}
SAME = {
    "lenet5_like": "LeNet-5-like",
    "resnet20": "ResNet-20",
    "mobilenet_like": "MobileNetV2, small",
    "vit_small": "ViT, small",
    "vgg16 x0.25": "VGG-16, a quarter of its width",
}
"""Kinds that both comparisons have, by their name in the second."""


def main() -> None:
    """Print the power of the primary comparison, then the spread that T7 shows after weight reconstruction."""
    means = {base: earlier_means(base) for base in BASES}
    print(f"primary: {KINDS} kinds, batch norms recalibrated, a quarter of the MACs; points")
    for base, by_kind in means.items():
        print(f"  than {BASES[base]}: {report(list(by_kind.values()))}")
    print(f"  all three intervals above zero, if the true means are those: {joint_power(means):.2f}")
    clouds = read_records(forest.TOPOLOGY / "which_clouds.jsonl")
    print("weights reconstructed, T7's four kinds, a quarter of every layer; points")
    for base, name in BASES.items():
        tested = [which_clouds.figures(clouds, kind, "test") for kind in which_clouds.KINDS]
        gains = [forest.differences(rows[which_clouds.OURS], rows[base]) for rows in tested]
        print(f"  than {name}: {report([float(np.mean(each)) for each in gains])}")


def earlier_means(base: str) -> dict[str, float]:
    """Return by kind the mean difference of the functional cloud from a row, in points."""
    gains: dict[str, list[float]] = defaultdict(list)
    for kind, points in forest.Rows(forest.records()).gains(forest.CLOUD, base, forest.DRAWN, "recalibrated").items():
        name = kind.removesuffix(", fresh").removesuffix(", named")
        gains[SAME.get(name, name)] += points
    return {kind: float(np.mean(points)) for kind, points in gains.items()}


def report(means: Sequence[float]) -> str:
    """Return the spread of kinds, the interval that twelve such kinds have, and what it finds."""
    spread = float(np.std(means, ddof=1))
    half = stats.t.ppf(0.975, KINDS - 1) * spread / math.sqrt(KINDS)
    found = optimize.brentq(lambda true: power(true, spread) - ASKED_POWER, 1e-9, 100.0 * spread)
    return (
        f"{len(means)} kinds, mean {np.mean(means):+.2f}, standard deviation {spread:.2f}; {KINDS} kinds: "
        f"half an interval {half:.2f}, {found:.2f} found with {100 * ASKED_POWER:.0f} %, "
        f"the mean with {100 * power(abs(float(np.mean(means))), spread):.0f} %"
    )


def power(true: float, spread: float) -> float:
    """Return the probability that the interval of twelve kinds lies above zero."""
    threshold = stats.t.ppf(1.0 - LEVEL / 2.0, KINDS - 1)
    return float(stats.nct.sf(threshold, KINDS - 1, true * math.sqrt(KINDS) / spread))


def joint_power(means: dict[str, dict[str, float]]) -> float:
    """Return the probability that all three intervals lie above zero, by draws of kinds with the means' covariance."""
    kinds = sorted(set.intersection(*(set(by_kind) for by_kind in means.values())))
    observed = np.array([[by_kind[kind] for kind in kinds] for by_kind in means.values()])
    centre = [np.mean(list(by_kind.values())) for by_kind in means.values()]
    generator = np.random.default_rng(0)
    drawn = generator.multivariate_normal(centre, np.cov(observed), (DRAWS, KINDS))
    halves = stats.t.ppf(1.0 - LEVEL / 2.0, KINDS - 1) * drawn.std(1, ddof=1) / math.sqrt(KINDS)
    return float((drawn.mean(1) > halves).all(1).mean())


if __name__ == "__main__":
    main()
