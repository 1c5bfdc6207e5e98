"""Networks of other people's packages that come as ONNX files alone: each to half of its MACs, from file to file.

    python -m pip install --no-deps --target runs/vendors --requirement benchmarks/files/requirements.txt
    python -m benchmarks.files.vendors --packages runs/vendors --out runs/vendors.jsonl

Voice activity, pitch, notes, and what listeners think of a call. Inputs are computed, see `sounds`: speech of
espeak-ng, harmonic tones and plucked notes, with noise, gaps and echoes; the test has other voices and sentences than
the calibration data. A line for each file and method goes to the file: the share of the MACs that is kept, the quality
on the network's own task, the agreement with the unpruned file, and the processor's time in onnxruntime on one thread.
`shrink` ends with weight reconstruction here. onnxsim's structured pruning gets the largest sparsity whose MACs aren't
below those of `shrink`. The same command goes on where it was stopped; ``--only`` takes names of files.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

import nni_topo
from benchmarks.files.sounds import (
    SPEECH_RATE,
    Part,
    Sound,
    generator,
    mel_powers,
    noise,
    notes,
    tone,
    utterances,
)
from benchmarks.networks.zoo_build import append_line, read_lines
from nni_topo.network.cost.measure import count_macs
from nni_topo.network.io.importing import files

Feed = dict[str, NDArray[Any]]
Run = Callable[[Feed], list[NDArray[Any]]]
KEPT = 0.5
METHODS = ("shrink", "onnxsim", "onnxsim, fine-tuned")
OF_CONVOLUTIONS = "shrink of the convolutions alone"
"""For plcmos, most of whose layers are small."""
TITLES = {
    "silero_vad": "silero-vad 6.2.3, voice activity",
    "swift_f0": "swift-f0 0.3.0, pitch",
    "basic_pitch": "basic-pitch 0.4.0, notes (TensorFlow)",
    "plcmos": "speechmos 0.0.1.1, plcmos",
    "aecmos": "speechmos 0.0.1.1, aecmos",
}


class Network:
    """A file of a package, inputs of its domain, and what its answers are worth."""

    file: str
    measure: str
    """Quality on the task of the network itself."""
    likeness: str
    """Agreement of answers with those of the unpruned file."""

    def calibration(self, run: Run) -> list[Feed]:
        """Return batches of inputs; ``run`` is the unpruned file."""
        raise NotImplementedError

    def answers(self, run: Run) -> NDArray[np.float64]:
        """Return the answers of a file on the test inputs."""
        raise NotImplementedError

    def quality(self, answers: NDArray[np.float64]) -> float:
        """Return the quality of answers on the task."""
        raise NotImplementedError

    def agreement(self, answers: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
        """Return how far answers agree with those of the unpruned file."""
        raise NotImplementedError


class SileroVad(Network):
    """Frames of 32 ms at 16 kHz, with the 64 samples before them and the state after the frame before."""

    file = "silero_vad/data/silero_vad.onnx"
    measure = "area under the ROC curve of speech against noise"
    likeness = "frames with the same answer at 0.5"
    streams, frame, context = 16, 512, 64

    def _streams(self, part: Part) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return streams of noise with utterances, in frames with their context, and which frames hold speech."""
        random, length = generator(part), 10 * SPEECH_RATE
        spoken = utterances(part, 24)
        frames, labels = [], []
        for _ in range(self.streams):
            speech = np.zeros(length, dtype=np.float32)
            place = int(random.integers(SPEECH_RATE))
            while place < length:
                utterance = spoken[int(random.integers(len(spoken)))][: length - place]
                speech[place : place + len(utterance)] = utterance * random.uniform(0.2, 1)
                place += len(utterance) + int(random.integers(SPEECH_RATE // 2, 3 * SPEECH_RATE))
            loudness = speech[speech != 0].std() * 10 ** (-random.uniform(0, 20) / 20)
            wave = np.pad(speech + noise(length, random) * loudness, (self.context, 0))
            windows = np.lib.stride_tricks.sliding_window_view(wave, self.frame + self.context)[:: self.frame]
            clean = speech[: len(windows) * self.frame].reshape(len(windows), self.frame)
            frames.append(windows.astype(np.float32))
            labels.append(np.abs(clean).mean(1) > 1e-3)
        return np.stack(frames, 1), np.stack(labels, 1)

    def _feeds(self, run: Run, frames: NDArray[np.float32]) -> Iterable[tuple[Feed, NDArray[Any]]]:
        state = np.zeros((2, self.streams, 128), dtype=np.float32)
        for frame in frames:
            feed = {"input": frame, "state": state, "sr": np.array(SPEECH_RATE)}
            score, state = run(feed)
            yield feed, score

    def calibration(self, run: Run) -> list[Feed]:
        """Return every fourth frame, with the state that the unpruned file had there."""
        frames, _ = self._streams("calibration")
        return [feed for place, (feed, _) in enumerate(self._feeds(run, frames)) if place % 4 == 3]

    def answers(self, run: Run) -> NDArray[np.float64]:
        """Return the scores of all frames."""
        frames, self._labels = self._streams("test")
        return np.concatenate([score for _, score in self._feeds(run, frames)], 1).T.astype(np.float64)

    def quality(self, answers: NDArray[np.float64]) -> float:
        """Return the area under the ROC curve."""
        scores, labels = answers.ravel(), self._labels.ravel()
        ranks = stats.rankdata(scores)
        positive = int(labels.sum())
        return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * (len(labels) - positive)))

    def agreement(self, answers: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
        """Return the share of frames with the same answer."""
        return float(((answers > 0.5) == (reference > 0.5)).mean())


class SwiftF0(Network):
    """The pitch of two seconds of a tone, every 16 ms."""

    file = "swift_f0/model.onnx"
    measure = "frames whose pitch is right within 50 cents"
    likeness = "frames whose pitch agrees within 50 cents"
    length, hop, least, most = 2 * SPEECH_RATE, 256, 46.875, 2093.75

    def _feed(self, wave: Sound) -> Feed:
        band = {"fmin": np.array(self.least, dtype=np.float32), "fmax": np.array(self.most, dtype=np.float32)}
        return {"audio": wave[None], **band}

    def calibration(self, run: Run) -> list[Feed]:
        """Return tones, and utterances, one by one: the file takes no batch."""
        random = generator("calibration")
        waves = [tone(self.length, SPEECH_RATE, random)[0] for _ in range(24)]
        waves += [np.resize(each, self.length) for each in utterances("calibration", 12)]
        return [self._feed(wave) for wave in waves]

    def answers(self, run: Run) -> NDArray[np.float64]:
        """Return the pitch of each frame in cents."""
        random, cents, correct = generator("test"), [], []
        for _ in range(24):
            wave, pitch = tone(self.length, SPEECH_RATE, random)
            cents.append(1200 * np.log2(run(self._feed(wave))[0][0]))
            correct.append(1200 * np.log2(pitch[:: self.hop][: len(cents[-1])]))
        self._correct = np.concatenate(correct)
        return np.concatenate(cents)

    def quality(self, answers: NDArray[np.float64]) -> float:
        """Return the share of frames with the tone's pitch."""
        return self.agreement(answers, self._correct)

    def agreement(self, answers: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
        """Return the share of frames with the same pitch."""
        return float((np.abs(answers - reference) < 50).mean())


class BasicPitch(Network):
    """Which of 88 notes sound, 86 times a second, in two seconds."""

    file = "basic_pitch/saved_models/icassp_2022/nmp.onnx"
    measure = "F1 of notes by frame"
    likeness = "F1 against the unpruned file's notes"
    rate, length, hop, threshold = 22050, 43844, 256, 0.3
    name, place = "serving_default_input_2:0", 1

    def _waves(self, part: Part, count: int) -> tuple[NDArray[np.float32], list[Any]]:
        random = generator(part)
        waves, played = zip(*(notes(self.length, self.rate, random) for _ in range(count)), strict=True)
        return np.stack(waves)[..., None], list(played)

    def calibration(self, run: Run) -> list[Feed]:
        """Return batches of four."""
        waves, _ = self._waves("calibration", 32)
        return [{self.name: batch} for batch in np.split(waves, 8)]

    def answers(self, run: Run) -> NDArray[np.float64]:
        """Return a probability for each frame and note."""
        waves, played = self._waves("test", 16)
        probabilities = np.concatenate([run({self.name: wave[None]})[self.place] for wave in waves])
        self._sounding = np.zeros(probabilities.shape, dtype=bool)
        for sounding, of_wave in zip(self._sounding, played, strict=True):
            for number, start, end in of_wave:
                sounding[start // self.hop : end // self.hop, number - 21] = True
        return probabilities.astype(np.float64)

    def _f1(self, sounding: NDArray[np.bool_], correct: NDArray[np.bool_]) -> float:
        return float(2 * (sounding & correct).sum() / (sounding.sum() + correct.sum()))

    def quality(self, answers: NDArray[np.float64]) -> float:
        """Return the F1 of the notes that were played."""
        return self._f1(answers > self.threshold, self._sounding)

    def agreement(self, answers: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
        """Return the F1 of the unpruned file's notes."""
        return self._f1(answers > self.threshold, reference > self.threshold)


class Plcmos(Network):
    """What listeners think of speech with lost packets."""

    file = "speechmos/plcmos_models/plcmos_v2.onnx"
    measure = "rank correlation with the packets that arrived"
    likeness = "correlation of scores with the unpruned file's"
    packet, size = 320, 512

    def _clips(self, part: Part, count: int) -> list[tuple[NDArray[np.float32], float]]:
        """Return log spectra of utterances with lost packets, and the share of packets that arrived."""
        random, clips = generator(part), []
        for utterance in utterances(part, count):
            wave = utterance[: len(utterance) // self.packet * self.packet].reshape(-1, self.packet).copy()
            is_lost = random.random(len(wave)) < random.uniform(0, 0.4)
            wave[is_lost] = 0
            clips.append((self._spectrum(wave.ravel()), 1 - float(is_lost.mean())))
        return clips

    def _spectrum(self, wave: Sound) -> NDArray[np.float32]:
        """Return the log spectrum, as the package's ``stft_transform`` computes it."""
        hop = self.size // 2
        frames = -(-(len(wave) + hop) // hop)
        padded = np.zeros((frames + 1) * hop)
        padded[hop : hop + len(wave)] = wave
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.size)[::hop]
        powers = np.abs(np.fft.rfft(windows * np.hamming(self.size + 1)[:-1])) ** 2
        is_zero = powers == 0
        logs = np.log(powers, where=~is_zero, out=np.zeros_like(powers))
        logs[is_zero] = np.log(powers[~is_zero].min()) - 12 / np.log10(np.e)
        return (logs / 20).astype(np.float32)[None, None]

    def _feed(self, spectrum: NDArray[np.float32], random: np.random.Generator) -> Feed:
        return {"degraded_audio": spectrum, "rater_embed": random.standard_normal((1, 64)).astype(np.float32)}

    def calibration(self, run: Run) -> list[Feed]:
        """Return clips one by one, each with a listener, as the package does."""
        random = generator("calibration")
        return [self._feed(spectrum, random) for spectrum, _ in self._clips("calibration", 136)]

    def answers(self, run: Run) -> NDArray[np.float64]:
        """Return a score for each clip: the mean of five listeners."""
        random, clips = generator("test"), self._clips("test", 48)
        self._arrived = [arrived for _, arrived in clips]
        listeners = [[float(run(self._feed(each, random))[0]) for _ in range(5)] for each, _ in clips]
        return np.mean(np.array(listeners), 1)

    def quality(self, answers: NDArray[np.float64]) -> float:
        """Return Spearman's rank correlation."""
        return float(stats.spearmanr(answers, self._arrived).statistic)

    def agreement(self, answers: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
        """Return Pearson's correlation."""
        return float(np.corrcoef(answers, reference)[0, 1])


class Aecmos(Network):
    """What listeners think of the echo that is left in a call."""

    file = "speechmos/aecmos_models/Run_1663829550_Stage_0.onnx"
    measure = "rank correlation with the echo that was removed, in dB"
    likeness = "correlation of scores with the unpruned file's"
    states = (4, 1, 64)

    def _clips(self, part: Part, count: int) -> list[tuple[Feed, float]]:
        random, clips = generator(part), []
        spoken = utterances(part, count)
        for place, near in enumerate(spoken):
            far = spoken[(place + 1) % count]
            length = min(len(near), len(far))
            near = near * (random.random() < 0.5)  # half of the calls have echo alone
            near, far = near[:length], far[:length]
            echo = np.roll(far, int(random.integers(800, 3200))) * random.uniform(0.3, 1)
            removed = float(random.uniform(0, 40))
            microphone = near + echo + 0.002 * noise(length, random)
            cleaned = near + echo * 10 ** (-removed / 20) + 0.001 * noise(length, random)
            features = [self._mels(wave) for wave in (far, microphone, cleaned)]
            feed = {"input": np.stack(features)[None], "h0": np.zeros(self.states, dtype=np.float32)}
            clips.append((feed, removed))
        return clips

    def _mels(self, wave: Sound) -> NDArray[np.float32]:
        """Return mel powers in dB of the loudest, as the package scales them."""
        powers = mel_powers(wave, 513, 256, 160, SPEECH_RATE)
        decibels = 10 * np.log10(np.maximum(powers, 1e-10) / max(powers.max(), 1e-10))
        return ((np.maximum(decibels, -80) + 40) / 40).astype(np.float32)

    def calibration(self, run: Run) -> list[Feed]:
        """Return calls one by one: the states of the file are those of one call."""
        return [feed for feed, _ in self._clips("calibration", 136)]

    def answers(self, run: Run) -> NDArray[np.float64]:
        """Return the score of the echo of each call."""
        clips = self._clips("test", 48)
        self._removed = [removed for _, removed in clips]
        return np.array([float(run(feed)[0].ravel()[0]) for feed, _ in clips])

    def quality(self, answers: NDArray[np.float64]) -> float:
        """Return Spearman's rank correlation."""
        return float(stats.spearmanr(answers, self._removed).statistic)

    def agreement(self, answers: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
        """Return Pearson's correlation."""
        return float(np.corrcoef(answers, reference)[0, 1])


NETWORKS: dict[str, Callable[[], Network]] = {
    "silero_vad": SileroVad, "swift_f0": SwiftF0, "basic_pitch": BasicPitch, "plcmos": Plcmos, "aecmos": Aecmos,
}  # fmt: skip


def runs(file: Path | bytes) -> Run:
    """Return what runs a file in onnxruntime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    model = str(file) if isinstance(file, Path) else file
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda feed: list(session.run(None, feed))


def milliseconds(first: Run, second: Run, feed: Feed) -> tuple[float, float]:
    """Return the median times of two files on one input, in turns: those of the processor, which others may share."""
    times: tuple[list[float], list[float]] = ([], [])
    until = time.perf_counter() + 4
    while time.perf_counter() < until or len(times[0]) < 5:
        for run, of_run in zip((first, second), times, strict=True):
            start = time.process_time()
            run(feed)
            of_run.append(1000 * (time.process_time() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def macs_of(file: Any, feed: Feed) -> int:
    """Return the multiplications and additions of a file on an input.

    It is converted but not compared with the network: the files of other tools may compute very large numbers.
    """
    source = files.source_of(file)
    network, _ = files._converted(source, [files.as_call(source.inputs, feed, "macs_of")])
    return count_macs(network, tuple(torch.from_numpy(np.array(value)) for value in feed.values()))


def by_shrink(path: Path, batches: list[Feed], folder: str, layers: Any = None) -> Path:
    """Return the smaller file of `shrink` and `export`."""
    small = nni_topo.shrink(path, batches, {"flops": KEPT}, layers=layers, distill=False, progress=False)
    return nni_topo.export(small, f"{folder}/small.onnx").path


def by_onnxsim(path: Path, batches: list[Feed], most_macs: float, is_tuned: bool) -> tuple[bytes, float]:
    """Return the file of onnxsim's structured pruning with at least so many MACs, and its sparsity."""
    import onnx

    onnxsim = importlib.import_module("onnxsim")
    model = onnx.load(str(path))
    before = macs_of(model, batches[0])
    low, high = 0.0, 0.95
    for _ in range(7):
        sparsity = (low + high) / 2
        pruned = onnxsim.apply_structured_pruning(model, sparsity)
        if macs_of(pruned, batches[0]) >= most_macs:
            low = sparsity
        else:
            high = sparsity
    pruned = onnxsim.apply_structured_pruning(model, low)
    if macs_of(pruned, batches[0]) == before:
        raise ValueError("it removes nothing")
    if is_tuned:
        pruned = onnxsim.apply_pruning_finetune(model, pruned, calibration_data=batches[:32])
    return pruned.SerializeToString(), low


def measure(packages: Path, name: str, method: str, records: dict[str, Any]) -> dict[str, Any]:
    """Prune one file by one method, and measure it beside the unpruned one."""
    import onnx

    torch.manual_seed(0)
    network, record = NETWORKS[name](), {"model": f"{name}, {method}", "name": name, "method": method}
    path = packages / network.file
    before = runs(path)
    reference = network.answers(before)
    batches = network.calibration(before)
    record |= {"batches": len(batches), "quality_before": network.quality(reference)}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if method in ("shrink", OF_CONVOLUTIONS):
                layers = None if method == "shrink" else [{"op_types": ["Conv2d", "Conv1d"]}]
                file: Any = by_shrink(path, batches, folder, layers)
            else:
                macs = records[f"{name}, shrink"]["macs"]
                file, record["sparsity"] = by_onnxsim(path, batches, macs, "tuned" in method)
        except Exception as error:  # of other people's code, in as many ways as there are files
            return record | {"outcome": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        record["seconds"] = time.perf_counter() - start
        model = onnx.load(str(file)) if isinstance(file, Path) else onnx.load_from_string(file)
        after = runs(file)
        answers = network.answers(after)
        ends = [[each.name for each in (*one.graph.input, *one.graph.output)] for one in (onnx.load(str(path)), model)]
    record |= {
        "outcome": "done",
        "same_names": ends[0] == ends[1],
        "macs_before": macs_of(path, batches[0]),
        "macs": macs_of(model, batches[0]),
        "bytes_before": path.stat().st_size,
        "bytes": model.ByteSize(),
        "quality": network.quality(answers),
        "agreement": network.agreement(answers, reference),
    }
    record["ms_before"], record["ms"] = milliseconds(before, after, batches[0])
    return record


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each file and method."""
    lines = [
        "| file | method | MACs | quality on its task (unpruned) | agreement | ms of one thread | size, KB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, title in TITLES.items():
        rows = [each for each in records if each["name"] == name]
        done = [each for each in rows if each["outcome"] == "done"]
        if done:
            one = done[0]
            lines.append(
                f"| {title} | unpruned | 100 % | {one['quality_before']:.3f} | 1 | {one['ms_before']:.2f} | "
                f"{one['bytes_before'] / 1024:.0f} |"
            )
        for each in rows:
            if each["outcome"] != "done":
                lines.append(f"| {title} | {each['method']} | {each['outcome']} | | | | |")
                continue
            quality = f"{each['quality']:.3f} ({each['quality_before']:.3f}) | {each['agreement']:.3f}"
            lines.append(
                f"| {title} | {each['method']} | {100 * each['macs'] / each['macs_before']:.1f} % | {quality} | "
                f"{each['ms']:.2f} | {each['bytes'] / 1024:.0f} |"
            )
    measured = [name for name in TITLES if any(each["name"] == name for each in records)]
    notes_below = [
        f"- {TITLES[name]}: quality is the {network.measure}; agreement the {network.likeness}."
        for name, network in ((name, NETWORKS[name]()) for name in measured)
    ]
    return "\n".join([*lines, "", *notes_below])


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="the folder that pip's --target names")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    options = parser.parse_args()
    sys.path.append(str(options.packages))
    torch.set_num_threads(1)
    done = read_lines(options.out)
    for method in (*METHODS, OF_CONVOLUTIONS):
        for name in options.only:
            if f"{name}, {method}" not in done and (name == "plcmos" or method in METHODS):
                record = measure(options.packages, name, method, done)
                done[record["model"]] = record
                append_line(options.out, record)
                print(record, flush=True)
    print(table(list(done.values())))


if __name__ == "__main__":
    main()
