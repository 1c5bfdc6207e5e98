"""Linear chirps in one, two and three dimensions: signals with every frequency that a filter can respond to.

The frequency of a chirp rises linearly along a coordinate, from one cycle per diagonal to the end of its sweep. The
energy of a filter's response to a chirp measures how much the filter lets through, without any data.

Source: Janjic, "Exploring Redundancy in Neural Networks: Pruning by Genetic Algorithm & Filter Energy", MSc thesis,
University of Manitoba, 2018, section 4.2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nni_topo.rules import Rule, all_of, check_fields, checked, whole

__all__ = ["Chirp", "chirp", "chirp_2d"]

FloatArray: TypeAlias = NDArray[np.float64]
Sweep = Literal["nyquist", "thesis"]
Direction = Literal["radial", "diagonal"]

_SIZES = all_of(whole(1), Sequence, least=1)
_SHAPE = Rule("one to three sizes, integers from 1", lambda shape: _SIZES.holds(shape) and len(shape) <= 3)


@checked()
def chirp_2d(
    height: int,
    width: int,
    *,
    sweep: Sweep = "nyquist",
    direction: Direction = "radial",
) -> FloatArray:
    """Return a two-dimensional linear chirp, ``(height, width)`` in pixels; see :func:`chirp`.

    Examples
    --------
    >>> chirp_2d(28, 28).shape
    (28, 28)
    """
    return chirp((height, width), sweep=sweep, direction=direction)


@checked(shape=_SHAPE)
def chirp(
    shape: Sequence[int],
    *,
    sweep: Sweep = "nyquist",
    direction: Direction = "radial",
) -> FloatArray:
    """Return a linear chirp: a cosine whose frequency rises linearly along a coordinate.

    Parameters
    ----------
    shape : sequence of int
        Pixels per axis, one to three axes, at least 1 each.
    sweep : {"nyquist", "thesis"}, default="nyquist"
        Range of the frequency, from one cycle per diagonal. ``"nyquist"`` ends at 1/2 cycle per pixel, the highest
        frequency that pixels can carry; ``"thesis"`` ends at 1, as the source does, so that the upper half of the
        sweep is aliased to lower frequencies.
    direction : {"radial", "diagonal"}, default="radial"
        ``"radial"``: with the distance from the centre, out to the corners; every orientation. ``"diagonal"``: along
        the diagonal from the first to the last pixel, as in the source; one orientation, every frequency once.

    Returns
    -------
    ndarray of float64, of the given shape
        Values in [-1, 1]. A single pixel gives 1.

    Notes
    -----
    With the coordinate ``s`` in pixels, from 0 to ``S``, and the sweep from ``f0`` to ``f1``, the value is
    ``cos(2 pi (f0 s + (f1 - f0) s^2 / (2 S)))``: the frequency at ``s`` is ``f0 + (f1 - f0) s / S`` cycles per pixel.

    Examples
    --------
    >>> chirp((5,), direction="diagonal").round(3)
    array([ 1.   ,  0.078, -0.951,  0.924, -0.809])
    """
    end = 0.5 if sweep == "nyquist" else 1.0  # cycles per pixel
    start = min(1.0 / math.hypot(*shape), end)
    if direction == "diagonal":
        axes = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in shape), indexing="ij")
        position = np.tensordot(shape, axes, axes=1) / math.hypot(*shape)
    else:
        axes = np.meshgrid(*(np.arange(size) - (size - 1) / 2.0 for size in shape), indexing="ij")
        position = np.sqrt(np.sum(np.square(axes), axis=0))
    length = max(float(position.max()), 1.0)
    phase = start * position + (end - start) * position**2 / (2.0 * length)
    signal: FloatArray = np.cos(2.0 * np.pi * phase)
    return signal


@dataclass(frozen=True)
class Chirp:
    """The signal that is sent into all input channels of a layer at once to measure its filters.

    Attributes
    ----------
    direction : {"mean", "radial", "diagonal"}, default="mean"
        ``"mean"``: the mean energy of chirps from every corner and along every axis. ``"radial"``: one chirp of every
        orientation, at an eighth of the cost. ``"diagonal"``: the source's chirp along one diagonal; filters along the
        other diagonal don't respond to it.
    sweep : {"nyquist", "thesis"}, default="nyquist"
        Whether the frequency ends at 1/2 or at 1 cycle per pixel; see :func:`chirp`.

    Examples
    --------
    >>> Chirp().planes((5, 7)).shape, Chirp("radial").planes((5, 7)).shape
    ((8, 5, 7), (1, 5, 7))
    """

    direction: Literal["mean", "radial", "diagonal"] = "mean"
    sweep: Sweep = "nyquist"

    def __post_init__(self) -> None:
        check_fields(self)

    def planes(self, shape: Sequence[int]) -> FloatArray:
        """Return the chirps for an input of a shape, ``(planes, *shape)``."""
        sizes = tuple(shape)
        if self.direction != "mean":
            return chirp(sizes, sweep=self.sweep, direction=self.direction)[None]
        along = chirp(sizes, sweep=self.sweep, direction="diagonal")
        planes = []
        for signs in itertools.product((False, True), repeat=len(sizes)):
            mirrored = tuple(axis for axis, sign in enumerate(signs) if sign)
            planes.append(np.flip(along, mirrored))
        if len(sizes) == 1:
            return np.stack(planes)
        for axis, size in enumerate(sizes):
            line = chirp((size,), sweep=self.sweep, direction="diagonal")
            varying = [1] * len(sizes)
            varying[axis] = size
            plane = np.broadcast_to(line.reshape(varying), sizes)
            planes += [plane, np.flip(plane, axis)]
        return np.stack(planes)
