"""Checks of arrays for the topology functions."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, float64

from nni_topo.errors import DataError
from nni_topo.rules import number, one_of, whole

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]
IntArray: TypeAlias = NDArray[np.intp]

ENGINE = one_of(("exact", "gudhi"))
DEGREE = whole(0)  # of homology
ORDER = number(1.0)  # of Wasserstein distances


def _as_floats(values: ArrayLike, subject: str) -> FloatArray:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", float64).numpy()
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{subject} must be real numbers, got {type(values).__name__}: {error}") from error


def _require_finite(values: FloatArray, subject: str) -> None:
    if not np.isfinite(values).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise DataError(f"{subject} must be finite, got {values[place]} at index {place}")


def as_points(points: ArrayLike, subject: str = "points") -> FloatArray:
    """Return a point cloud, or any matrix, as float64 of shape (n, features), finite and not empty."""
    return as_tensor(points, subject, 2, "be a matrix with at least one row and column")


def as_tensor(
    values: ArrayLike, subject: str, most: float = np.inf, rule: str = "have two or more dimensions, none of them empty"
) -> FloatArray:
    """Return a tensor of two to so many dimensions as float64, finite and not empty."""
    tensor = _as_floats(values, subject)
    if not 2 <= tensor.ndim <= most or 0 in tensor.shape:
        raise DataError(f"{subject} must {rule}, got shape {tensor.shape}")
    _require_finite(tensor, subject)
    return tensor


def as_distances(distances: ArrayLike) -> FloatArray:
    """Return a distance matrix as C-contiguous float64 (n, n): finite, symmetric, >= 0, zero diagonal."""
    matrix = np.ascontiguousarray(_as_floats(distances, "distances"))
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise DataError(f"distances must have shape (n, n) with n >= 1, got {matrix.shape}")
    _require_finite(matrix, "distances")
    if matrix.min() < 0 or matrix.diagonal().any():
        raise DataError(
            "distances must be >= 0 with a zero diagonal, got a minimum of "
            f"{matrix.min()} and a diagonal maximum of {matrix.diagonal().max()}"
        )
    if not np.array_equal(matrix, matrix.T):
        place = tuple(int(i) for i in np.argwhere(matrix != matrix.T)[0])
        raise DataError(f"distances must be symmetric, got {matrix[place]} against its mirror at {place}")
    return matrix


def as_index(index: int, size: int, subject: str) -> int:
    """Return a point's index in [0, size)."""
    if not 0 <= index < size:
        raise DataError(f"{subject} must be a point's index in [0, {size}), got {index}")
    return int(index)


def as_subsets(subsets: ArrayLike, size: int, base: int | None = None) -> BoolArray:
    """Return subsets as boolean (p, size), none of them empty; the base point, if any, is always kept."""
    masks = np.asarray(subsets)
    if masks.dtype != np.bool_:
        if masks.size and not np.isin(masks, (0, 1)).all():
            raise DataError(f"subsets must be boolean, got values of {masks.dtype} other than 0 and 1")
        masks = masks.astype(np.bool_)
    if masks.ndim != 2 or masks.shape[1] != size:
        raise DataError(f"subsets must have shape (p, {size}), got {masks.shape}")
    if base is not None:
        masks = masks.copy()
        masks[:, as_index(base, size, "base")] = True
    empty = np.flatnonzero(~masks.any(axis=1))
    if empty.size:
        raise DataError(f"a subset must keep at least one point, got none in subset {int(empty[0])}")
    return np.ascontiguousarray(masks)


def as_diagram(diagram: ArrayLike, subject: str) -> FloatArray:
    """Return a persistence diagram as float64 (n, 2): finite births, deaths >= births, inf allowed."""
    bars = _as_floats(diagram, subject)
    if bars.size == 0:
        return np.empty((0, 2))
    if bars.ndim != 2 or bars.shape[1] != 2:
        raise DataError(f"{subject} must have shape (n, 2), got {bars.shape}")
    wrong = np.flatnonzero(~(np.isfinite(bars[:, 0]) & (bars[:, 1] >= bars[:, 0])))
    if wrong.size:
        row = int(wrong[0])
        raise DataError(f"{subject} must have finite births and deaths >= births, got {bars[row]} in row {row}")
    return bars
