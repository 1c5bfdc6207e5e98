"""The magnitude study: direct and iterative pruning of some or all layers, with the bytes and time that zeros save.

Source: "Network Structure Pruning", AVLSI final project report, sections V and VI, figures 11 to 20.
"""

from __future__ import annotations

import copy
import gzip
import io
import itertools
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import RenderableType
from torch import Tensor, nn

from nni_topo import zoo
from nni_topo.errors import ConfigError
from nni_topo.network.cost.measure import time_shares
from nni_topo.network.layers.kinds import CONVOLUTIONS, weights_left
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.speedup.dependency import dependency_groups
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.pruners.registry import create_pruner, pruner_info
from nni_topo.pruners.rounds import even_steps, prune_in_rounds
from nni_topo.rules import all_of, check_knobs, number, whole
from nni_topo.runs.provenance import Record
from nni_topo.runs.run import Start, made_dense, pruner_knobs
from nni_topo.runs.widths import inner_layers
from nni_topo.studies.analysis.sensitivity import sensitivity
from nni_topo.studies.pictures import finish
from nni_topo.studies.study import Findings, Tell, TrainedStudy
from nni_topo.studies.tables import NumberTable, show_range

_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "all": (*CONVOLUTIONS, nn.Linear),
    "conv": CONVOLUTIONS,
    "dense": (nn.Linear,),
}
WORDS = {"direct": "direct", "direct, retrained": "direct, fine-tuned", "iterative": "iterative"}
"""Ways of pruning: the name in records, and the name in figures and tables."""
_STYLES = {
    "direct": "-", "direct, fine-tuned": "--", "iterative": ":",
    "dense": "-", "gzip": "--", "coo": ":", "csr": "-.", "csr32": ".-", "zeros": "--", "unpruned": ":",
}  # fmt: skip
_COLORS = {("level", "all"): "C0", ("level", "conv"): "C1", ("level", "dense"): "C2", ("matrix", "all"): "C3"}
_AGAIN = "unpruned"  # name of the unpruned network's copy among the timed networks
_SHARE = "time / unpruned network's time"

PerSeed = Mapping[float, Sequence[float]]
"""The values of all seeds, by ratio."""


@dataclass(frozen=True)
class MagnitudeStudy(Findings):
    """Records of every way of pruning; also, one record per seed, of the unpruned network and of each layer alone."""

    stem = "magnitude"
    rows: list[Record]
    baselines: list[Record]
    sensitivities: list[Record]

    def series(self) -> dict[str, dict[tuple[str, ...], PerSeed]]:
        """Return the values of all seeds by quantity, then by name, then by rising ratio."""
        series: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        for row in sorted(self.rows, key=lambda row: row["ratio"]):
            pruner, ratio = row["pruner"], row["ratio"]
            series["accuracy"][pruner, row["part"], WORDS[row["way"]]][ratio].append(row["accuracy"])
            if "params" in row:
                series["params"][pruner,][ratio].append(row["params"])
            for name, size in row.get("bytes", {}).items():
                series["bytes"][pruner, name][ratio].append(size)
            for name, share in row.get("time_shares", {}).items():
                series["time"][pruner, name][ratio].append(share["median"])
        for study in self.sensitivities:
            for curve in study["curves"]:
                for ratio, accuracy in curve["accuracy"].items():
                    series["alone"]["+".join(curve["layers"]),][float(ratio)].append(accuracy)
        return series  # type: ignore[no-any-return]

    def figures(self) -> dict[str, Figure]:
        """Return ``magnitude``: accuracy, each layer's sensitivity, parameters, bytes and time against the ratio."""
        figure = Figure(figsize=(15.0, 8.0), layout="constrained")
        *axes, spare = figure.subplots(2, 3).ravel()
        spare.remove()
        series, baselines = self.series(), self.baselines
        drawn = {
            "accuracy": ("accuracy", [base["accuracy"] for base in baselines]),
            "alone": ("accuracy, one layer pruned", [base["accuracy"] for base in baselines]),
            "params": ("nonzero parameters", [base["params"] for base in baselines]),
            "bytes": ("bytes on disk", [base["bytes"]["dense"] for base in baselines]),
            "time": (_SHARE, [1.0]),
        }
        for axis, (quantity, (label, unpruned)) in zip(axes, drawn.items(), strict=True):
            for index, (key, values_by_ratio) in enumerate(series[quantity].items()):
                part = key[1] if quantity == "accuracy" else "all"
                own_color = _COLORS.get((key[0], part))
                color, style = own_color or f"C{index % 10}", _STYLES.get(key[-1], ".-")
                ratios, values = list(values_by_ratio), list(values_by_ratio.values())
                axis.plot(ratios, [float(np.mean(seeds)) for seeds in values], style, color=color, label=", ".join(key))
                if max(map(len, values)) > 1:  # a band from the lowest to the highest seed
                    lowest, highest = list(map(min, values)), list(map(max, values))
                    axis.fill_between(ratios, lowest, highest, alpha=0.1, linewidth=0, color=color)
            axis.axhline(float(np.mean(unpruned)), color="0.5", linewidth=0.8)
            yscale: Any = "log" if quantity in ("params", "bytes") else "linear"
            finish(axis, "ratio", label, yscale=yscale)
        return {"magnitude": figure}


@dataclass(frozen=True, kw_only=True)
class AnalyzeMagnitude(TrainedStudy[MagnitudeStudy]):
    """Prune by magnitude directly and iteratively, and measure the bytes and time that zeros save.

    Direct pruning uses all epochs of fine-tuning after its only round, iterative pruning shares them among its rounds.
    """

    ratios: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)  # sparse_ratio of the pruned layers, in (0, 1)
    rounds: int = 3  # rounds of iterative pruning, in [1, epochs]
    epochs: int = 3  # total number of epochs of fine-tuning, at least 0; 0: direct pruning only
    seeds: int = 1  # number of seeds, at least 1
    images: int | None = None  # test images used, at least 1; None: all
    batch: int = 256  # test images of a timed pass, at least 1
    seconds: float = 10.0  # seconds after which timing of a pruned network starts no further round, above 0

    def check(self) -> None:
        rules = {
            "ratios": all_of(number(0, 1, "neither"), tuple, least=1),
            "epochs": whole(0),
            "seeds": whole(1),
            "batch": whole(1),
            "seconds": number(0.0, closed="neither"),
        }
        check_knobs("magnitude", vars(self), rules)
        if self.epochs and not 1 <= self.rounds <= self.epochs:
            raise ConfigError(f"rounds must be in [1, epochs], got {self.rounds} of {self.epochs} epochs (magnitude)")

    def find(self, tell: Tell) -> MagnitudeStudy:
        ways = tuple(WORDS) if self.epochs else ("direct",)
        ratios = sorted(set(self.ratios))
        rows, baselines, sensitivities = [], [], []
        for seed in range(self.seed, self.seed + self.seeds):
            start = replace(self, seed=seed).start(self.images)
            for (pruner, part), way, ratio in itertools.product(_COLORS, ways, ratios):
                layers = [name for name, module in start.net.named_modules() if isinstance(module, _KINDS[part])]
                if pruner_info(pruner).structured:
                    inner = inner_layers(start.net, start.example)
                    layers = [name for name in layers if name in inner]
                if not layers:
                    continue
                row = {"pruner": pruner, "part": part, "way": way, "ratio": ratio, "seed": seed}
                rows.append({**row, **self._measure(start, pruner, layers, way, ratio, with_costs=part == "all")})
                accuracy = 100 * rows[-1]["accuracy"]
                tell(f"{pruner}, {part}, {WORDS[way]}, {ratio:g}, seed {seed}: {accuracy:.1f} %")
            images = start.data.test[: self.batch][0].to(start.device)
            baselines.append(
                {
                    "seed": seed,
                    "accuracy": start.accuracy,
                    "params": zoo.count_params(start.net),
                    "bytes": stored_bytes(start.net),
                    "latency_ms": zoo.latencies({"net": start.net}, images)["net"],
                    "batch": len(images),
                }
            )
            curves = sensitivity(start.net, start.example, start.tested, ratios, "level")
            sensitivities.append({"seed": seed, **curves.to_dict()})
        return MagnitudeStudy(rows, baselines, sensitivities)

    def show(self, findings: MagnitudeStudy) -> Iterator[RenderableType]:
        series, baselines = findings.series(), findings.baselines
        ratios = sorted({row["ratio"] for row in findings.rows})
        heads = [f"{ratio:g}" for ratio in ratios]

        def cells(values: PerSeed, scale: float, digits: int = 1) -> list[str]:
            texts = []
            for ratio in ratios:
                text = ""
                if ratio in values:
                    text = show_range(values[ratio], scale, digits)
                texts.append(text)
            return texts

        costs = []
        for (pruner,), values in series["params"].items():
            unpruned = show_range([base["params"] for base in baselines], 1e-3)
            costs.append([pruner, "parameters (k)", unpruned, *cells(values, 1e-3)])
        for (pruner, name), values in series["bytes"].items():
            unpruned = show_range([base["bytes"][name] for base in baselines], 1e-3)
            costs.append([pruner, f"{name} (kB)", unpruned, *cells(values, 1e-3)])
        for (pruner, name), values in series["time"].items():
            timed = "copy of the unpruned network" if name == _AGAIN else name
            costs.append([pruner, f"{timed}: {_SHARE}", "1", *cells(values, 1, 2)])
        accuracy = show_range([base["accuracy"] for base in baselines], 100)
        first, milliseconds = baselines[0], show_range([base["latency_ms"] for base in baselines])
        yield f"Unpruned: {accuracy} %, {milliseconds} ms for {first['batch']} images. Seeds: {len(baselines)}."
        accuracies = [[*key, *cells(values, 100)] for key, values in series["accuracy"].items()]
        yield NumberTable(None, ["pruner", "layers", "way", *heads], accuracies, text_columns=3)
        alone = [[*key, *cells(values, 100)] for key, values in series["alone"].items()]
        yield NumberTable(None, ["layer alone", *heads], alone)
        yield NumberTable(None, ["pruner", "what", "0", *heads], costs, text_columns=2)
        shares = [share for row in findings.rows for share in row.get("time_shares", {}).items()]
        noise = show_range([share["median"] for name, share in shares if name == _AGAIN], 1, 3)
        halves = [100 * share["half"] for _, share in shares]
        yield (
            f"Noise of the times: a copy of the unpruned network takes {noise} of its time. Each is the median of many "
            f"rounds, whose 95 % interval is on average {float(np.mean(halves)):.1f} % of it to either side, at most "
            f"{max(halves):.1f} %."
        )

    def _measure(
        self, start: Start, pruner: str, layers: list[str], way: str, ratio: float, *, with_costs: bool
    ) -> Record:
        """Prune some layers of a copy; return its accuracy, and its costs if it is pruned directly ``with_costs``."""
        pruned = copy.deepcopy(start.net)
        config: list[dict[str, Any]] = [{"op_names": layers, "sparse_ratio": ratio}]
        if pruner_info(pruner).structured:
            config = dependency_groups(pruned, start.example, config)
        magnitude_pruner = create_pruner(pruner, pruned, config, **pruner_knobs(pruner, pruned, start))
        if way != "direct":
            rounds = 1 if way == "direct, retrained" else self.rounds
            epochs = iter([self.epochs // rounds + (index < self.epochs % rounds) for index in range(rounds)])

            def train() -> None:
                recipe = start.recipe.for_retraining(next(epochs))
                zoo.train(pruned, start.data, recipe, seed=start.seed, device=start.device)

            prune_in_rounds(magnitude_pruner, even_steps(rounds), train)
            accuracy = start.tested(pruned)
            magnitude_pruner.unwrap_model()
            return {"accuracy": accuracy}
        _, masks = magnitude_pruner.compress()
        magnitude_pruner.unwrap_model()
        masked = masked_model(pruned, start.example, masks)
        accuracy = start.tested(masked)
        if not with_costs:
            return {"accuracy": accuracy}
        # A copy of the unpruned network is timed too: the difference of its share from 1 is noise.
        nets = {_AGAIN: detached_copy(start.net), "zeros": masked}
        if pruner == "matrix":
            stored = nets["dense"] = made_dense(start, masks)[0]
            params = zoo.count_params(stored)
        else:
            stored, nets["csr"] = masked, with_sparse_linears(masked)
            params = weights_left(masked)
        images = start.data.test[: self.batch][0].to(start.device)
        timed = time_shares(list(nets.values()), start.net, images, seconds=self.seconds)
        shares = {name: {"median": median, "half": half} for name, (median, half) in zip(nets, timed, strict=True)}
        return {"accuracy": accuracy, "params": params, "bytes": stored_bytes(stored), "time_shares": shares}


def stored_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of a model's state dict on disk, by format; pruned weights must be zeros."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    dense = _saved_bytes(state)
    # Weights with two or more dimensions become matrices (out, rest), with 64-bit indices except in csr32.
    matrices = {name: value.flatten(1) for name, value in state.items() if value.dim() > 1}
    coordinates = {name: matrix.to_sparse_coo().coalesce() for name, matrix in matrices.items()}
    rows = {name: _csr(matrix) for name, matrix in matrices.items()}
    # Clones, because the indices may be views of larger storages, which would be written in full.
    parts = {name: (m.crow_indices().clone(), m.col_indices().clone(), m.values().clone()) for name, m in rows.items()}
    short = {name: (crow.int(), columns.int(), values) for name, (crow, columns, values) in parts.items()}
    return {
        "dense": len(dense),
        "gzip": len(gzip.compress(dense, 6)),
        "coo": len(_saved_bytes({**state, **{name: (m.indices(), m.values()) for name, m in coordinates.items()}})),
        "csr": len(_saved_bytes({**state, **parts})),
        "csr32": len(_saved_bytes({**state, **short})),
    }


class SparseLinear(nn.Module):
    """A linear layer whose weight is a sparse matrix in CSR format."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.rows = _csr(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``(n, in)`` to ``(n, out)``."""
        outputs: Tensor = (self.rows @ inputs.T).T
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs


def with_sparse_linears(model: nn.Module) -> nn.Module:
    """Return a copy with :class:`SparseLinear` layers; PyTorch has no such kernel for convolutions."""
    model = detached_copy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, SparseLinear(module))
    return model


def _csr(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return matrix.to_sparse_csr()


def _saved_bytes(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()
