"""Chirps: their shapes, and their frequencies as Fourier transforms see them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_topo.errors import ConfigError
from nni_topo.maths.signals import Chirp, chirp, chirp_2d

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
KNOBS = {
    "sweep": st.sampled_from(["nyquist", "thesis"]),
    "direction": st.sampled_from(["diagonal", "radial"]),
}


def line(length, **knobs):
    """A chirp from the first sample to the last."""
    return chirp((length,), direction="diagonal", **knobs)


def loudest(signal):
    """Frequency, in cycles per sample, at which a real signal's spectrum peaks."""
    tapered = signal * np.hanning(len(signal))
    spectrum = np.abs(np.fft.rfft(tapered, 16 * len(signal)))
    return np.fft.rfftfreq(16 * len(signal))[spectrum.argmax()]


@given(shape=SIZES, **KNOBS)
@settings(max_examples=60, deadline=None)
def test_every_chirp_is_finite_bounded_and_not_silent(shape, sweep, direction):
    signal = chirp(shape, sweep=sweep, direction=direction)
    assert signal.shape == shape
    assert signal.dtype == np.float64
    assert np.abs(signal).max() <= 1.0
    assert np.square(signal).sum() > 0.0


@pytest.mark.parametrize("center", [200, 500, 800])
def test_the_frequency_rises_linearly_to_nyquist(center):
    start, end = 1e-3, 0.5
    local = loudest(line(1000)[center - 50 : center + 50])
    assert local == pytest.approx(start + (end - start) * center / 999, abs=0.01)


@pytest.mark.parametrize("center", [600, 700, 850])
def test_the_upper_half_of_the_text_sweep_folds_back(center):
    start, end = 1e-3, 1.0
    frequency = start + (end - start) * center / 999
    assert frequency > 0.5
    assert loudest(line(1000, sweep="thesis")[center - 40 : center + 40]) == pytest.approx(1 - frequency, abs=0.01)


def test_a_diagonal_chirp_has_one_orientation_and_the_whole_band():
    size = 128
    # Tapered at the borders, so that the jump there doesn't leak into other orientations.
    taper = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    signal = chirp_2d(size, size, direction="diagonal") * np.outer(taper, taper)
    power = np.abs(np.fft.fft2(signal)) ** 2
    rows, columns = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    along = np.abs(rows + columns) / np.sqrt(2)
    across = np.abs(rows - columns) / np.sqrt(2)
    start, end = 1 / np.hypot(size, size), 0.5
    assert power[across < 0.02].sum() > 0.99 * power.sum()
    assert power[(along > start / 2) & (along < end + 0.02)].sum() > 0.99 * power.sum()
    bands = [power[(along > low) & (along <= low + 0.1)].sum() / power.sum() for low in (0.1, 0.2, 0.3)]
    assert min(bands) > 0.15


def test_a_radial_chirp_has_every_orientation():
    size = 128
    power = np.abs(np.fft.fft2(chirp_2d(size, size, direction="radial"))) ** 2
    rows, columns = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    radius = np.hypot(rows, columns)
    assert power[radius < 0.52].sum() > 0.99 * power.sum()
    ring = (radius > 0.1) & (radius < 0.3)
    sectors = np.floor(np.arctan2(rows, columns) / np.pi * 4)[ring]
    shares = np.array([power[ring][sectors == sector].sum() for sector in range(-4, 4)])
    assert shares.max() < 1.2 * shares.min()


@given(shape=SIZES, sweep=KNOBS["sweep"], direction=st.sampled_from(["radial", "mean"]))
@settings(max_examples=60)
def test_the_planes_of_a_chirp_without_a_preferred_direction_are_closed_under_mirrors(shape, sweep, direction):
    planes = Chirp(direction, sweep).planes(shape)
    assert planes.shape[1:] == shape

    def ordered(found):
        return sorted(found.reshape(len(found), -1).round(9).tolist())

    for axis in range(len(shape)):
        np.testing.assert_allclose(ordered(np.flip(planes, axis + 1)), ordered(planes), atol=1e-8)
    turned = Chirp(direction, sweep).planes(shape[::-1])
    np.testing.assert_allclose(ordered(planes.transpose(0, *range(len(shape), 0, -1))), ordered(turned), atol=1e-8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: chirp_2d(0, 3), "integers from 1, got \\(0, 3\\)"),
        (lambda: chirp((2.5,)), "got \\(2.5,\\)"),
        (lambda: chirp(()), "one to three sizes"),
        (lambda: chirp((2, 2, 2, 2)), "one to three sizes"),
        (lambda: chirp((4,), sweep="nyqist"), "did you mean nyquist"),
        (lambda: chirp_2d(4, 4, direction="radical"), "did you mean radial"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


@pytest.mark.parametrize("shape", [(9,), (6, 9), (4, 5, 6)])
def test_the_mean_is_over_diagonal_chirps_from_every_corner_and_those_along_axes(shape):
    planes = Chirp(direction="mean").planes(shape)
    along = chirp(shape, direction="diagonal")
    corners = [
        np.flip(along, [axis for axis, is_mirrored in enumerate(signs) if is_mirrored])
        for signs in itertools.product((False, True), repeat=len(shape))
    ]
    axes = []
    for axis, size in enumerate(shape if len(shape) > 1 else ()):
        line = chirp((size,), direction="diagonal")
        axes.append(np.broadcast_to(np.expand_dims(line, [d for d in range(len(shape)) if d != axis]), shape))
    for expected in (*corners, *axes):
        assert any(np.array_equal(plane, expected) for plane in planes)
