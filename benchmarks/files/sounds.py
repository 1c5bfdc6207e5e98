"""Sounds that are computed: speech of espeak-ng's voices, tones and notes whose pitch is known, and noise."""

from __future__ import annotations

import ctypes
import functools
import importlib
import multiprocessing
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import signal

Sound = NDArray[np.float32]
Part = Literal["calibration", "test"]

SPEECH_RATE = 16000
# A voice, a sentence and a seed belong to one part only.
VOICES: dict[Part, tuple[str, ...]] = {
    "calibration": ("en-us", "en-gb-x-rp", "de", "fr", "it", "pt"),
    "test": ("en-gb-scotland", "es", "nl", "sv"),
}
SENTENCES: dict[Part, tuple[str, ...]] = {
    "calibration": (
        "The train to the coast leaves from the third platform.",
        "Please put the blue cups back on the upper shelf.",
        "Nobody had expected so much rain in early June.",
        "She counted seventeen boats between the two bridges.",
        "Our neighbour grows beans and tomatoes behind his garage.",
        "The museum opens at ten, but the garden is never closed.",
        "A second key is under the stone beside the door.",
        "They painted the kitchen yellow and the hall white.",
        "Can you hear the wind in the wires?",
        "The last bus was full, so we walked home.",
    ),
    "test": (
        "Her brother repairs old clocks in a shop near the harbour.",
        "It takes forty minutes to boil a good broth.",
        "The library moved to a larger house last winter.",
        "Have you ever slept in a tent on the snow?",
        "Two white dogs waited patiently in front of the bakery.",
        "Most of the letters were written in green ink.",
    ),
}
_SEEDS: dict[Part, int] = {"calibration": 1, "test": 2}
_EVENTS_AT_ONCE = 2  # espeak-ng hands over the sound while it is computed
_RATE, _PITCH = 1, 3  # numbers of its parameters


def generator(part: Part) -> np.random.Generator:
    """Return the part's random numbers."""
    return np.random.default_rng(_SEEDS[part])


class Voices:
    """Speech by espeak-ng, from the package espeakng-loader."""

    def __init__(self) -> None:
        loader = importlib.import_module("espeakng_loader")
        self._library = ctypes.CDLL(loader.get_library_path())
        folder = str(loader.get_data_path()).encode()
        self.rate = self._library.espeak_Initialize(_EVENTS_AT_ONCE, 0, folder, 0)
        self._pieces = list[Any]()
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._receive)  # kept: the library has its address
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, _: Any) -> int:
        if count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, sentence: str, voice: str, words_per_minute: int, pitch: int) -> Sound:
        """Return a sentence at 16 kHz, with a peak of 0.5."""
        self._pieces.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"a voice must be one of espeak-ng's, got {voice!r}")
        self._library.espeak_SetParameter(_RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        text = sentence.encode()
        self._library.espeak_Synth(text, len(text) + 1, 0, 1, 0, 1, None, None)
        self._library.espeak_Synchronize()
        wave = np.concatenate(self._pieces).astype(np.float64)
        wave = signal.resample_poly(wave, SPEECH_RATE // 50, self.rate // 50)
        spoken: Sound = (wave / np.abs(wave).max() / 2).astype(np.float32)
        return spoken


@functools.cache
def utterances(part: Part, count: int) -> tuple[Sound, ...]:
    """Return sentences by voices of the part, at other speeds and pitches."""
    # In a process of its own: the library's next sentence depends on those that it has spoken.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_spoken, (part, count))


def _spoken(part: Part, count: int) -> tuple[Sound, ...]:
    voices, random = Voices(), generator(part)
    spoken = []
    for place in range(count):
        voice = VOICES[part][place % len(VOICES[part])]
        sentence = SENTENCES[part][int(random.integers(len(SENTENCES[part])))]
        spoken.append(voices.say(sentence, voice, int(random.integers(120, 200)), int(random.integers(20, 80))))
    return tuple(spoken)


def noise(length: int, random: np.random.Generator) -> Sound:
    """Return noise of a random colour between white and brown, with a root mean square of 1."""
    spectrum = np.fft.rfft(random.standard_normal(length))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** random.uniform(0, 1)
    wave = np.fft.irfft(spectrum, length)
    coloured: Sound = (wave / wave.std()).astype(np.float32)
    return coloured


def tone(length: int, rate: int, random: np.random.Generator) -> tuple[Sound, NDArray[np.float64]]:
    """Return a harmonic tone that glides and vibrates, in noise, and its pitch at each sample in Hz."""
    seconds = np.arange(length) / rate
    ends = np.log(random.uniform(80, 600, size=3))
    glide = np.interp(seconds, np.linspace(0, seconds[-1], 3), ends)
    pitch = np.exp(glide + 0.02 * np.sin(2 * np.pi * random.uniform(4, 7) * seconds))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    decay = random.uniform(0.6, 1.6)
    wave = sum(np.sin(k * phase) * (k * pitch < rate / 2) / k**decay for k in range(1, 16))
    wave = wave / wave.std() + noise(length, random) * 10 ** (-random.uniform(5, 30) / 20)
    sound: Sound = (wave / np.abs(wave).max() / 2).astype(np.float32)
    return sound, pitch


def notes(length: int, rate: int, random: np.random.Generator) -> tuple[Sound, list[tuple[int, int, int]]]:
    """Return plucked notes, and for each its MIDI number, its first sample and the sample after its last."""
    wave, played = 0.01 * noise(length, random), list[tuple[int, int, int]]()
    for _ in range(int(random.integers(4, 10))):
        number, start = int(random.integers(40, 88)), int(random.integers(0, length - rate // 4))
        end = min(start + int(random.uniform(0.25, 0.8) * rate), length)
        seconds = np.arange(end - start) / rate
        frequency = 440 * 2 ** ((number - 69) / 12)
        loudness = random.uniform(0.2, 1) * np.exp(-seconds * random.uniform(1, 3))
        for k in range(1, 11):
            if k * frequency < rate / 2:
                wave[start:end] += loudness * np.sin(2 * np.pi * k * frequency * seconds) / k**1.5
        played.append((number, start, end))
    return (wave / np.abs(wave).max() / 2).astype(np.float32), played


def mel_powers(wave: Sound, size: int, hop: int, bands: int, rate: int) -> NDArray[np.float64]:
    """Return mel powers, (frames, bands), as librosa's ``melspectrogram`` computes them by default."""
    padded = np.pad(wave.astype(np.float64), size // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    powers = np.abs(np.fft.rfft(frames * signal.get_window("hann", size))) ** 2
    return powers @ _mel_filters(size, bands, rate).T


@functools.cache
def _mel_filters(size: int, bands: int, rate: int) -> NDArray[np.float64]:
    """Return triangular filters of equal area on Slaney's scale, linear below 1 kHz and logarithmic above."""
    step, least = 200 / 3, 1000.0
    per_octave = np.log(6.4) / 27

    def to_hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
        above = least * np.exp(per_octave * (mels - least / step))
        return np.where(mels < least / step, mels * step, above)

    highest = least / step + np.log(rate / 2 / least) / per_octave
    edges = to_hertz(np.linspace(0, highest, bands + 2))
    frequencies = np.fft.rfftfreq(size, 1 / rate)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return np.asarray(triangles * (2 / (edges[2:] - edges[:-2]))[:, None])
