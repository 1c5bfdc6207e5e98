"""The magnitude study: direct and iterative pruning of some or all layers, and the bytes and time that zeros save.

Source: "Network Structure Pruning", AVLSI final project report, sections V and VI, figures 11 to 20.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor, nn

from nni_topo import zoo
from nni_topo.disk import only_process
from nni_topo.errors import ConfigError, instance, number
from nni_topo.network.layers import CONVOLUTIONS, weights_left
from nni_topo.network.speedup import dependency_groups, masked_model
from nni_topo.pruners.registry import create_pruner, pruner_info
from nni_topo.pruners.rounds import even_steps, prune_in_rounds
from nni_topo.runs.provenance import Record
from nni_topo.runs.run import Start, made_dense, pruner_knobs
from nni_topo.runs.widths import inner_layers
from nni_topo.studies.analysis.magnitude.report import WORDS, magnitude_figure, markdown_magnitude
from nni_topo.studies.analysis.magnitude.storage import stored_bytes, with_sparse_linears
from nni_topo.studies.analysis.sensitivity import sensitivity
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.study import Findings, Tell, TrainedStudy

_PARTS = {"level": ("all", "conv", "dense"), "matrix": ("all",)}
_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "all": (*CONVOLUTIONS, nn.Linear),
    "conv": CONVOLUTIONS,
    "dense": (nn.Linear,),
}
_BATCH = 64
_ROW = {
    **dict.fromkeys(("pruner", "part", "way"), instance(str)),
    "ratio": number(0.0, 1.0),
    "accuracy": number(0.0, 1.0),
}


@dataclass(frozen=True)
class MagnitudeStudy(Findings):
    """Records of the unpruned network, of every way of pruning it, and of each layer pruned alone."""

    stem = "magnitude"
    baseline: Record
    rows: list[Record]
    sensitivity: Record

    def figures(self) -> dict[str, Figure]:
        """Return ``magnitude``: accuracy, each layer's sensitivity, parameters, bytes and time against the ratio."""
        return {"magnitude": magnitude_figure(self.to_dict())}


@dataclass(frozen=True, kw_only=True)
class AnalyzeMagnitude(TrainedStudy[MagnitudeStudy]):
    """Prune by magnitude directly and iteratively, and measure the bytes and time that zeros save.

    Direct pruning has all epochs of fine-tuning after its only round, iterative pruning shares them among its rounds.
    """

    ratios: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)  # sparse_ratio of the pruned layers, in (0, 1)
    rounds: int = 3  # rounds of iterative pruning, in [1, epochs]
    epochs: int = 3  # epochs of fine-tuning in all
    images: int | None = None  # test images used, at least 1; None: all
    runs: int = 30  # timed passes, at least 1

    def check(self) -> None:
        """Raise ConfigError unless the study can be carried out."""
        if not self.ratios or not all(0.0 < ratio < 1.0 for ratio in self.ratios):
            raise ConfigError(f"ratios must be one or more numbers in (0, 1), got {self.ratios} (magnitude)")
        if not 1 <= self.rounds <= self.epochs:
            raise ConfigError(f"rounds must be in [1, epochs], got {self.rounds} of {self.epochs} epochs (magnitude)")

    def find(self, tell: Tell) -> MagnitudeStudy:
        """Prune one trained network in every way that has no record in ``rows.jsonl`` yet."""
        self.check()
        with only_process(self.out, wait=False):
            return self._found(tell)

    def _found(self, tell: Tell) -> MagnitudeStudy:
        start, path = self.start(self.images), self.out / "rows.jsonl"
        images = {"train_images": len(start.data.train), "test_images": len(start.data.test)}
        request = {"rounds": self.rounds, "epochs": self.epochs, "seed": self.seed, **images}
        rows = [
            row for row in read_records(path, _ROW) if request.items() <= row.items() and row["ratio"] in self.ratios
        ]
        done = set(map(_place, rows))
        for row in self._wanted(start):
            if _place(row) not in done:
                rows.append({**row, **self._measured(start, **row), **request})
                which = f"{row['pruner']}, {row['part']}, {WORDS[row['way']]}, {row['ratio']:g}"
                tell(f"{which}: {100 * rows[-1]['accuracy']:.1f} %")
                append_record(path, rows[-1])
        curves = sensitivity(start.net, start.example, start.tested, sorted(set(self.ratios)), "level")
        return MagnitudeStudy(self.baseline(start), sorted(rows, key=_place), curves.to_dict())

    def show(self, found: MagnitudeStudy) -> Iterator[str]:
        """Yield the tables, in Markdown."""
        yield markdown_magnitude(found.to_dict())

    def baseline(self, start: Start) -> Record:
        """Return the record of the unpruned network."""
        return {
            "accuracy": start.accuracy,
            "params": zoo.count_params(start.net),
            "bytes": stored_bytes(start.net),
            "latency_ms": zoo.latency_ms(start.net, _images(start), runs=self.runs),
        }

    def _wanted(self, start: Start) -> Iterator[Record]:
        """Yield pruner, part, way and ratio of every record."""
        for ratio, pruner in itertools.product(sorted(set(self.ratios)), _PARTS):
            for part, way in itertools.product(_PARTS[pruner], ("direct", "direct, retrained", "iterative")):
                if _layers(start, pruner, part):
                    yield {"pruner": pruner, "part": part, "way": way, "ratio": ratio}

    def _measured(self, start: Start, pruner: str, part: str, way: str, ratio: float) -> Record:
        pruned = copy.deepcopy(start.net)
        config: list[dict[str, Any]] = [{"op_names": _layers(start, pruner, part), "sparse_ratio": ratio}]
        if pruner_info(pruner).structured:
            config = dependency_groups(pruned, start.example, config)
        made = create_pruner(pruner, pruned, config, **pruner_knobs(pruner, pruned, start))
        if way != "direct":
            return {
                "accuracy": self._fine_tuned_accuracy(
                    start, made, pruned, 1 if way == "direct, retrained" else self.rounds
                )
            }
        _, masks = made.compress()
        made.unwrap_model()
        masked = masked_model(pruned, start.example, masks)
        # only records of all layers pruned directly have parameters, bytes and milliseconds
        costs = self._costs(start, pruner, masked, masks) if part == "all" else {}
        return {"accuracy": start.tested(masked), **costs}

    def _fine_tuned_accuracy(self, start: Start, pruner: Any, pruned: nn.Module, rounds: int) -> float:
        epochs = iter([self.epochs // rounds + (index < self.epochs % rounds) for index in range(rounds)])

        def train() -> None:
            recipe = start.recipe.for_retraining(next(epochs))
            zoo.train(pruned, start.data, recipe, seed=start.seed, device=start.device)

        prune_in_rounds(pruner, even_steps(rounds), train)
        accuracy = start.tested(pruned)
        pruner.unwrap_model()
        return accuracy

    def _costs(self, start: Start, pruner: str, masked: nn.Module, masks: Any) -> Record:
        """Return nonzero parameters, bytes and milliseconds; the unpruned network is timed in turns with the others."""
        if pruner == "matrix":
            stored = made_dense(start, masks)[0]
            others, params = {"dense": stored}, zoo.count_params(stored)
        else:
            stored, others = masked, {"csr": with_sparse_linears(masked)}
            params = weights_left(masked)
        times = zoo.latencies({"unpruned": start.net, "zeros": masked, **others}, _images(start), runs=self.runs)
        return {"params": params, "bytes": stored_bytes(stored), "latency_ms": times}


def _place(row: Record) -> tuple[str, str, str, float]:
    return row["pruner"], row["part"], row["way"], row["ratio"]


def _images(start: Start) -> Tensor:
    return start.data.test[:_BATCH][0].to(start.device)


def _layers(start: Start, pruner: str, part: str) -> list[str]:
    found = [name for name, module in start.net.named_modules() if isinstance(module, _KINDS[part])]
    inner = inner_layers(start.net, start.example) if pruner_info(pruner).structured else found
    return [name for name in found if name in inner]
