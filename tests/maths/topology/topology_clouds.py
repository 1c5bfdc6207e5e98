"""Random point clouds, degenerate ones among them, and random subsets of them."""

from __future__ import annotations

import numpy as np

KINDS = (
    "normal",
    "duplicates",
    "zeros",
    "collinear",
    "tiny",
    "grid",
    "constant",
    "far",
    "sphere",
    "clusters",
)


def make_cloud(seed: int) -> np.ndarray:
    """Return a small cloud (n, features); ten seeds in a row give one of each kind."""
    rng = np.random.default_rng(seed)
    n, features = int(rng.integers(3, 16)), int(rng.integers(1, 6))
    points = rng.normal(size=(n, features))
    kind = KINDS[seed % len(KINDS)]
    if kind == "duplicates":
        points = np.vstack([points, points[rng.integers(0, n, 4)]])
    elif kind == "zeros":
        points[rng.random(n) < 0.5] = 0.0
    elif kind == "collinear":
        points = np.outer(rng.integers(0, 6, n), rng.normal(size=features))
    elif kind == "tiny":
        points = points[: 1 + seed // len(KINDS) % 2]
    elif kind == "grid":
        points = rng.integers(0, 3, size=(n, features)).astype(float)
    elif kind == "constant":
        points = np.repeat(points[:1], n, axis=0)
    elif kind == "far":
        points = 1e-3 * points + 100.0
    elif kind == "sphere":
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    elif kind == "clusters":
        points = points[rng.integers(0, 3, n)] + 1e-4 * rng.normal(size=(n, features))
    return points


def make_subsets(seed: int, count: int, points: int, size: int | None = None) -> np.ndarray:
    """Return random boolean subsets (count, points), each of `size` points or of any number >= 1."""
    rng = np.random.default_rng(seed)
    subsets = np.zeros((count, points), dtype=bool)
    for row in subsets:
        row[rng.permutation(points)[: size or rng.integers(1, points + 1)]] = True
    return subsets
