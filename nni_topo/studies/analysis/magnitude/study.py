"""The magnitude study: direct and iterative pruning of some or all layers, and the bytes and time that zeros save.

Source: "Network Structure Pruning", AVLSI final project report, sections V and VI, figures 11 to 20.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure
from rich.console import RenderableType
from torch import Tensor, nn

from nni_topo import zoo
from nni_topo.disk import only_process
from nni_topo.errors import ConfigError
from nni_topo.network.cost.measure import time_shares
from nni_topo.network.layers.kinds import CONVOLUTIONS, weights_left
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.speedup.dependency import dependency_groups
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.pruners.registry import create_pruner, pruner_info
from nni_topo.pruners.rounds import even_steps, prune_in_rounds
from nni_topo.rules import all_of, instance, number, whole
from nni_topo.runs.provenance import Record
from nni_topo.runs.run import Start, made_dense, pruner_knobs
from nni_topo.runs.widths import inner_layers
from nni_topo.studies.analysis.magnitude.report import WORDS, magnitude_figure, magnitude_tables
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
_ROW = {
    **dict.fromkeys(("pruner", "part", "way"), instance(str)),
    "seed": whole(0),
    "ratio": number(0.0, 1.0),
    "accuracy": number(0.0, 1.0),
}


@dataclass(frozen=True)
class MagnitudeStudy(Findings):
    """Records of every way of pruning, and, a record per seed, of the unpruned networks and of each layer alone."""

    stem = "magnitude"
    rows: list[Record]
    baselines: list[Record]
    sensitivities: list[Record]

    def figures(self) -> dict[str, Figure]:
        """Return ``magnitude``: accuracy, each layer's sensitivity, parameters, bytes and time against the ratio."""
        return {"magnitude": magnitude_figure(self.to_dict())}


@dataclass(frozen=True, kw_only=True)
class AnalyzeMagnitude(TrainedStudy[MagnitudeStudy]):
    """Prune by magnitude directly and iteratively, and measure the bytes and time that zeros save.

    Direct pruning has all epochs of fine-tuning after its only round, iterative pruning shares them among its rounds.
    Each seed trains a network of its own, unless there is a checkpoint, and fine-tunes with that seed.
    """

    ratios: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)  # sparse_ratio of the pruned layers, in (0, 1)
    rounds: int = 3  # rounds of iterative pruning, in [1, epochs]
    epochs: int = 3  # epochs of fine-tuning in all, at least 0; 0: direct pruning alone
    seeds: int = 1  # runs, each with a seed of its own, at least 1
    images: int | None = None  # test images used, at least 1; None: all
    batch: int = 256  # test images of a timed pass, at least 1
    seconds: float = 10.0  # after so many seconds of timing one pruned network no further round starts, above 0

    def check(self) -> None:
        """Raise ConfigError unless the study can be carried out."""
        all_of(number(0, 1, "neither"), tuple, least=1).check("ratios", self.ratios, "magnitude")
        whole(0).check("epochs", self.epochs, "magnitude")
        if self.epochs and not 1 <= self.rounds <= self.epochs:
            raise ConfigError(f"rounds must be in [1, epochs], got {self.rounds} of {self.epochs} epochs (magnitude)")
        whole(1).check("seeds", self.seeds, "magnitude")
        whole(1).check("batch", self.batch, "magnitude")
        number(0.0, closed="neither").check("seconds", self.seconds, "magnitude")

    def find(self, tell: Tell) -> MagnitudeStudy:
        """Prune each seed's network in every way that has no record in ``rows.jsonl`` yet."""
        with only_process(self.out, wait=False):
            return self._found(tell)

    def _found(self, tell: Tell) -> MagnitudeStudy:
        rows, baselines, sensitivities = [], [], []
        for seed in range(self.seed, self.seed + self.seeds):
            start = replace(self, seed=seed).start(self.images)
            rows += self._rows(start, tell)
            baselines.append(self.baseline(start))
            curves = sensitivity(start.net, start.example, start.tested, sorted(set(self.ratios)), "level")
            sensitivities.append({"seed": seed, **curves.to_dict()})
        return MagnitudeStudy(sorted(rows, key=lambda row: (*_place(row), row["seed"])), baselines, sensitivities)

    def _rows(self, start: Start, tell: Tell) -> list[Record]:
        """Return the records of one seed, known ones first."""
        path = self.out / "rows.jsonl"
        wanted = {_place(row): row for row in self._wanted(start)}
        known = read_records(path, _ROW)
        rows = [r for r in known if _place(r) in wanted and self._request(start, r).items() <= r.items()]
        done = set(map(_place, rows))
        for place, row in wanted.items():
            if place not in done:
                rows.append({**row, **self._measured(start, **row), **self._request(start, row)})
                which = f"{row['pruner']}, {row['part']}, {WORDS[row['way']]}, {row['ratio']:g}, seed {start.seed}"
                tell(f"{which}: {100 * rows[-1]['accuracy']:.1f} %")
                append_record(path, rows[-1])
        return rows

    def _request(self, start: Start, row: Record) -> Record:
        """Return what a record's figures depend on, beside its place."""
        request: Record = {
            "seed": start.seed,
            "train_images": len(start.data.train),
            "test_images": len(start.data.test),
        }
        if row["way"] != "direct":
            request |= {"rounds": self.rounds, "epochs": self.epochs}
        if row["part"] == "all" and row["way"] == "direct":  # these have parameters, bytes and times
            request |= {"batch": self.batch, "seconds": self.seconds}
        return request

    def show(self, found: MagnitudeStudy) -> Iterator[RenderableType]:
        """Yield the tables."""
        return magnitude_tables(found.to_dict())

    def baseline(self, start: Start) -> Record:
        """Return the record of the unpruned network."""
        images = self._timed_images(start)
        return {
            "seed": start.seed,
            "accuracy": start.accuracy,
            "params": zoo.count_params(start.net),
            "bytes": stored_bytes(start.net),
            "latency_ms": zoo.latency_ms(start.net, images),
            "batch": len(images),
        }

    def _timed_images(self, start: Start) -> Tensor:
        return start.data.test[: self.batch][0].to(start.device)

    def _wanted(self, start: Start) -> Iterator[Record]:
        """Yield pruner, part, way and ratio of every record."""
        ways = tuple(WORDS) if self.epochs else ("direct",)
        for ratio, pruner in itertools.product(sorted(set(self.ratios)), _PARTS):
            for part, way in itertools.product(_PARTS[pruner], ways):
                if _layers(start, pruner, part):
                    yield {"pruner": pruner, "part": part, "way": way, "ratio": ratio}

    def _measured(self, start: Start, pruner: str, part: str, way: str, ratio: float) -> Record:
        pruned = copy.deepcopy(start.net)
        config: list[dict[str, Any]] = [{"op_names": _layers(start, pruner, part), "sparse_ratio": ratio}]
        if pruner_info(pruner).structured:
            config = dependency_groups(pruned, start.example, config)
        made = create_pruner(pruner, pruned, config, **pruner_knobs(pruner, pruned, start))
        if way != "direct":
            rounds = 1 if way == "direct, retrained" else self.rounds
            epochs = iter([self.epochs // rounds + (index < self.epochs % rounds) for index in range(rounds)])

            def train() -> None:
                recipe = start.recipe.for_retraining(next(epochs))
                zoo.train(pruned, start.data, recipe, seed=start.seed, device=start.device)

            prune_in_rounds(made, even_steps(rounds), train)
            accuracy = start.tested(pruned)
            made.unwrap_model()
            return {"accuracy": accuracy}
        _, masks = made.compress()
        made.unwrap_model()
        masked = masked_model(pruned, start.example, masks)
        costs = self._costs(start, pruner, masked, masks) if part == "all" else {}
        return {"accuracy": start.tested(masked), **costs}

    def _costs(self, start: Start, pruner: str, masked: nn.Module, masks: Any) -> Record:
        """Return nonzero parameters, bytes, and times as shares of the unpruned network's.

        A copy of the unpruned network is timed like the others: how far its share is from 1 is noise.
        """
        nets = {"unpruned": detached_copy(start.net), "zeros": masked}
        if pruner == "matrix":
            stored = nets["dense"] = made_dense(start, masks)[0]
            params = zoo.count_params(stored)
        else:
            stored, nets["csr"] = masked, with_sparse_linears(masked)
            params = weights_left(masked)
        timed = time_shares(list(nets.values()), start.net, self._timed_images(start), seconds=self.seconds)
        shares = {}
        for name, (median, half) in zip(nets, timed, strict=True):
            shares[name] = {"median": median, "half": half}
        return {"params": params, "bytes": stored_bytes(stored), "time_shares": shares}


def _place(row: Record) -> tuple[str, str, str, float]:
    return row["pruner"], row["part"], row["way"], row["ratio"]


def _layers(start: Start, pruner: str, part: str) -> list[str]:
    found = [name for name, module in start.net.named_modules() if isinstance(module, _KINDS[part])]
    inner = inner_layers(start.net, start.example) if pruner_info(pruner).structured else found
    return [name for name in found if name in inner]
