"""The magnitude study: direct and iterative pruning, which layers, and what zeros are worth on disk and in time.

References
----------
.. [1] "Network Structure Pruning", AVLSI final project report, sections V and VI, figures 11 to 20.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nni_topo import zoo
from nni_topo.analysis.magnitude.storage import stored_bytes, with_sparse_linears
from nni_topo.analysis.sensitivity import sensitivity
from nni_topo.errors import ConfigError
from nni_topo.network.dependency import dependency_groups
from nni_topo.network.layers import CONVOLUTIONS
from nni_topo.network.reference import masked_model
from nni_topo.pruners.registry import create_pruner, pruner_info
from nni_topo.pruners.rounds import even_steps, prune_in_rounds
from nni_topo.runs.run import Start, made_dense, pruner_knobs
from nni_topo.runs.widths import inner_layers

PARTS = ("all", "conv", "dense")
_BATCH = 64
Announce = Callable[[str], None]


@dataclass(frozen=True)
class MagnitudePlan:
    """How large a study is: ratios in (0, 1), and rounds of the iterative way.

    Attributes
    ----------
    epochs : int
        Of retraining in all, at least ``rounds``: the direct way has them behind its one pruning, the iterative one
        deals them to its rounds.
    runs : int
        Timed passes.
    """

    ratios: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
    rounds: int = 3
    epochs: int = 3
    runs: int = 30

    def __post_init__(self) -> None:
        if not self.ratios or not all(0.0 < ratio < 1.0 for ratio in self.ratios):
            raise ConfigError(f"ratios must be one or more numbers in (0, 1), got {self.ratios} (magnitude)")
        if not 1 <= self.rounds <= self.epochs:
            raise ConfigError(f"rounds must be in [1, epochs], got {self.rounds} of {self.epochs} epochs (magnitude)")


@dataclass(frozen=True)
class MagnitudeStudy:
    """Prunes one trained network in many ways; :meth:`rows` yields a record for each."""

    start: Start
    plan: MagnitudePlan

    def rows(self, done: Container[tuple[str, str, str, float]] = ()) -> Iterator[dict[str, Any]]:
        """Yield a record per pruner, part, way and ratio, with its accuracy; those that are ``done`` are left out."""
        rounds = {"direct": 0, "direct, retrained": 1, "iterative": self.plan.rounds}
        parts = {"level": PARTS, "matrix": ("all",)}
        for ratio, pruner in itertools.product(sorted(set(self.plan.ratios)), parts):
            for part, way in itertools.product(parts[pruner], rounds):
                if (pruner, part, way, ratio) not in done and self._layers(pruner, part):
                    row = {"pruner": pruner, "part": part, "way": way, "ratio": ratio}
                    yield row | self._measured(pruner, part, ratio, rounds[way])

    def baseline(self) -> dict[str, Any]:
        """Return the record of the unpruned network."""
        return {
            "accuracy": self._accuracy(self.start.net),
            "params": zoo.count_params(self.start.net),
            "bytes": stored_bytes(self.start.net),
            "latency_ms": zoo.latency_ms(self.start.net, self._images, runs=self.plan.runs),
        }

    @property
    def _images(self) -> Any:
        return self.start.data.test.tensors[0][:_BATCH].to(self.start.device)

    def _accuracy(self, model: nn.Module) -> float:
        return self.start.tested(model)

    def _layers(self, pruner: str, part: str) -> list[str]:
        kinds = {"all": (*CONVOLUTIONS, nn.Linear), "conv": CONVOLUTIONS, "dense": (nn.Linear,)}[part]
        found = [name for name, module in self.start.net.named_modules() if isinstance(module, kinds)]
        inner = inner_layers(self.start.net, self.start.example) if pruner_info(pruner).structured else found
        return [name for name in found if name in inner]

    def _pruner(self, name: str, part: str, ratio: float) -> tuple[Any, nn.Module]:
        victim = copy.deepcopy(self.start.net)
        config: list[dict[str, Any]] = [{"op_names": self._layers(name, part), "sparse_ratio": ratio}]
        knobs = pruner_knobs(name, victim, self.start)
        if pruner_info(name).structured:
            config = dependency_groups(victim, self.start.example, config)
        return create_pruner(name, victim, config, **knobs), victim

    def _measured(self, name: str, part: str, ratio: float, rounds: int) -> dict[str, Any]:
        if rounds:
            return {"accuracy": self._retrained(name, part, ratio, rounds)}
        masked, masks = self._direct(name, part, ratio)
        # parameters left, bytes and milliseconds come with the records of all layers pruned directly
        costs = self._costs(name, masked, masks) if part == "all" else {}
        return {"accuracy": self._accuracy(masked), **costs}

    def _direct(self, name: str, part: str, ratio: float) -> tuple[nn.Module, Any]:
        pruner, victim = self._pruner(name, part, ratio)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        return masked_model(victim, self.start.example, masks), masks

    def _retrained(self, name: str, part: str, ratio: float, rounds: int) -> float:
        pruner, victim = self._pruner(name, part, ratio)
        shares = [self.plan.epochs // rounds + (index < self.plan.epochs % rounds) for index in range(rounds)]
        epochs = iter(shares)

        def train() -> None:
            recipe = self.start.recipe.for_retraining(next(epochs))
            zoo.train(victim, self.start.data, recipe, seed=self.start.seed, device=self.start.device)

        prune_in_rounds(pruner, even_steps(rounds), train)
        accuracy = self._accuracy(victim)
        pruner.unwrap_model()
        return accuracy

    def _costs(self, name: str, masked: nn.Module, masks: Any) -> dict[str, Any]:
        """Return parameters left, bytes and milliseconds; the unpruned network is timed in turns with the others."""
        if name == "matrix":
            stored = other = made_dense(self.start, masks)[0]
            left = zoo.count_params(stored)
        else:
            stored, other, left = masked, with_sparse_linears(masked), _nonzero(masked)
        label = "dense" if name == "matrix" else "csr"
        models = {"unpruned": self.start.net, "zeros": masked, label: other}
        times = zoo.latencies(models, self._images, runs=self.plan.runs)
        return {"params": left, "bytes": stored_bytes(stored), "latency_ms": times}


def run_magnitude(study: MagnitudeStudy, out: str | Path, announce: Announce = lambda line: None) -> dict[str, Any]:
    """Run a study, a line per record in ``rows.jsonl``, but for what stands there; return ``magnitude.json``."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    plan, path = study.plan, out / "rows.jsonl"
    images = {"train_images": len(study.start.data.train), "test_images": len(study.start.data.test)}
    request = {"rounds": plan.rounds, "epochs": plan.epochs, "seed": study.start.seed, **images}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if request.items() <= row.items() and row["ratio"] in plan.ratios]
    done = {(row["pruner"], row["part"], row["way"], row["ratio"]) for row in rows}
    for row in study.rows(done):
        rows.append({**row, **request})
        announce(f"{row['pruner']}, {row['part']}, {row['way']}, {row['ratio']:g}: {100 * row['accuracy']:.1f} %")
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    rows.sort(key=lambda row: (row["pruner"], row["part"], row["way"], row["ratio"]))
    curves = sensitivity(study.start.net, study.start.example, study.start.tested, plan.ratios, "level")
    document = {"baseline": study.baseline(), "rows": rows, "sensitivity": curves.to_dict()}
    (out / "magnitude.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def _nonzero(model: nn.Module) -> int:
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())
