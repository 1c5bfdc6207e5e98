"""Where each number of README, choosing.md and index.md comes from; ``quotes.py`` holds the pages against it.

**A number on one of these pages needs one entry here.** Of a measured number it is a ``Quote``: the words around it, as
the page has them, with ``{}`` for the number, and for each ``{}`` a statistic of records. It is compared to as many
decimals as the page prints. Of a number that nothing measured it is its words in ``NOT_MEASURED``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.selection import forest
from benchmarks.topology.registered import CONFIRMATION
from nni_topo.studies.records import Record, read_records
from nni_topo.studies.tables import interval

RECORDS = Path(__file__).parent / "records"
README_RECORDS = "readme.jsonl"
ANY = None
"""In a key: any value. Differences are paired by these values, and by those of a range: they are those of networks."""

# Statistics of the values of a column


def only(values: Sequence[Any]) -> float:
    """Return the value of all rows; ValueError if they differ."""
    (value,) = set(values)
    return float(value)


def mean(values: Sequence[Any]) -> float:
    """Return the mean."""
    return float(np.mean(values))


def half(values: Sequence[Any]) -> float:
    """Return half of the width of the mean's 95 % interval."""
    return float(interval(values).half)


def count(values: Sequence[Any]) -> float:
    """Return how many rows there are, or pairs of rows."""
    return float(len(values))


def distinct(values: Sequence[Any]) -> float:
    """Return how many different values there are."""
    return float(len(set(values)))


def true(values: Sequence[Any]) -> float:
    """Return in how many rows the column is true."""
    return float(sum(map(bool, values)))


def smallest(values: Sequence[Any]) -> float:
    """Return the smallest value."""
    return float(min(values))


def largest(values: Sequence[Any]) -> float:
    """Return the largest value."""
    return float(max(values))


# Rows of records, and figures that they make


@dataclass(frozen=True)
class Rows:
    """Rows of a file of records whose entries are those of ``where``; parts of ``key`` may be ``ANY``."""

    file: str
    where: Mapping[str, Any]

    def select(self) -> dict[Any, Record]:
        """Return the rows by their network; ValueError if there is none, or if two have the same."""
        rows: dict[Any, Record] = {}
        for record in read(self.file):
            if not all(is_like(record.get(name), wanted) for name, wanted in self.where.items()):
                continue
            key = self.where.get("key")
            network = record.get("seed")
            if key is not None:
                parts = zip(record["key"], key, strict=True)
                network = tuple(part for part, wanted in parts if wanted is ANY or isinstance(wanted, range))
            if network in rows:
                raise ValueError(f"rows must be one for each network, got two for {network} ({self})")
            rows[network] = record
        if not rows:
            raise ValueError(f"an entry must have rows, got none ({self})")
        return rows


def is_like(value: Any, wanted: Any) -> bool:
    """Return whether a record's value is the one of an entry, or one of its range."""
    if isinstance(wanted, tuple):
        is_long = value is not None and len(value) == len(wanted)
        return is_long and all(map(is_like, value, wanted))
    if isinstance(wanted, range):
        return value in wanted
    return wanted is ANY or bool(value == wanted)


@functools.cache
def read(file: str) -> list[Record]:
    """Return the records of a file; of a JSON file its entries by their name, or all rows of documents by revision."""
    if file.endswith(".jsonl"):
        return read_records(RECORDS / file)
    content = json.loads((RECORDS / file).read_text(encoding="utf-8"))
    if isinstance(content, dict):
        return [{**entry, "key": [name]} for name, entry in content.items()]
    parts = [(document["revision"], *part) for document in content for part in document.items()]
    return [
        {**row, "key": [revision, name, row["row"]]}
        for revision, name, lines in parts
        if isinstance(lines, list)
        for row in lines
        if "row" in row
    ]


Column = Callable[[Record], Any]


@dataclass(frozen=True)
class Figure:
    """A statistic of a column of rows; with ``less`` of its paired differences from other rows.

    Of several rows in ``less`` the one with the highest mean of ``chosen_by`` is taken: the best baseline.
    """

    statistic: Callable[[Sequence[Any]], float]
    rows: Rows
    column: Column
    less: Sequence[Rows] = ()
    chosen_by: Column | None = None

    def value(self) -> float:
        """Compute the figure."""
        ours = self.rows.select()
        values = [self.column(record) for record in ours.values()]
        if self.less:
            chosen_by = self.chosen_by or self.column
            others = [rows.select() for rows in self.less]
            baseline = max(others, key=lambda rows: mean([chosen_by(record) for record in rows.values()]))
            shared = [network for network in ours if network in baseline]
            values = [self.column(ours[network]) - self.column(baseline[network]) for network in shared]
        return self.statistic(values)


@functools.cache
def compared() -> forest.Rows:
    """Return the rows that the estimate over kinds of networks takes."""
    return forest.Rows(forest.records())


@dataclass(frozen=True)
class OverKinds:
    """A number of the estimate over kinds of networks: points that a criterion has more than another.

    ``part``: ``"mean"`` and ``"half"`` of the estimate, ``"kinds"``, their number, ``"left"``, the MACs that are left.
    """

    part: str
    row: str
    base: str
    share: int
    recovery: str

    def value(self) -> float:
        """Compute the figure."""
        gains = compared().gains(self.row, self.base, self.share, self.recovery)
        if self.part == "kinds":
            return float(len(gains))
        if self.part == "left":
            networks = compared().by_network.items()
            cells = [rows[self.row] for (_, _, share), rows in networks if share == self.share and self.row in rows]
            return mean([cell["flops"] / cell["flops_before"] for cell in cells])
        cell = forest.estimate(gains)
        if cell is None:
            raise ValueError(f"an entry must have rows of two kinds, got {len(gains)} ({self})")
        return float(getattr(cell.over_kinds, self.part))


@dataclass(frozen=True)
class Furthest:
    """The largest distance from zero that any of several intervals reaches."""

    estimates: Sequence[tuple[str, str, int, str]]

    def value(self) -> float:
        """Compute the figure."""
        ends = [[OverKinds(part, *estimate).value() for part in ("mean", "half")] for estimate in self.estimates]
        return max(abs(middle) + width for middle, width in ends)


AnyFigure = Figure | OverKinds | Furthest


class Quote:
    """The words of a page around its figures, ``{}`` for each of them."""

    def __init__(self, text: str, *figures: AnyFigure) -> None:
        if text.count("{}") != len(figures):
            raise ValueError(f"an entry must have a figure for each {{}}, got {len(figures)} ({text})")
        self.text = text
        self.figures = figures

    @functools.cached_property
    def values(self) -> list[float]:
        """Compute the figures."""
        return [figure.value() for figure in self.figures]


def mean_and_half(
    rows: Rows, column: Column, less: Sequence[Rows] = (), chosen_by: Column | None = None
) -> tuple[Figure, Figure]:
    """Return the figures of ``{} ± {}``."""
    return Figure(mean, rows, column, less, chosen_by), Figure(half, rows, column, less, chosen_by)


def rows(file: str, **where: Any) -> Rows:
    """Return rows by their entries."""
    return Rows(file, where)


def entry(*path: str | int, times: float = 1.0) -> Column:
    """Return the column at a path of keys and places."""

    def column(record: Record) -> Any:
        value: Any = record
        for part in path:
            value = value[part]
        return value if times == 1.0 else times * value

    return column


def key(place: int, times: float = 1.0) -> Column:
    """Return the column of a part of the key."""
    return entry("key", place, times=times)


# README: what its code reports


def _step(name: str) -> Rows:
    return rows(README_RECORDS, key=(name,))


def _sizes(name: str) -> tuple[Figure, Figure]:
    return Figure(only, _step(name), entry("macs")), Figure(only, _step(name), entry("params"))


def _range(name: str, *path: str) -> tuple[Figure, ...]:
    if path[0] == "ms":
        return tuple(Figure(only, _step(name), entry("ms", place)) for place in range(3))
    return tuple(Figure(only, _step(name), entry(path[0] + end)) for end in ("", "_low", "_high"))


def _right(record: Record) -> float:
    return float(record["accuracy"] * record["tested"])


def _accuracy(name: str) -> Figure:
    return Figure(only, _step(name), entry("accuracy"))


README_CODE = [
    Quote(
        "{} of the MACs (multiply-accumulates) is left",
        Figure(only, _step("distilled"), lambda record: record["macs"] / record["macs_before"]),
    ),
    Quote(
        "and {} images take {} ms on one thread in place of {}",
        Figure(only, _step("distilled"), entry("batch")),
        Figure(only, _step("distilled"), entry("ms", 0)),
        Figure(only, _step("unpruned"), entry("ms", 0)),
    ),
    Quote(
        "{} of the {} test images are right, {} were before",
        Figure(only, _step("distilled"), _right),
        Figure(only, _step("distilled"), entry("tested")),
        Figure(only, _step("unpruned"), _right),
    ),
    Quote(
        "{} of the time, {} of the MACs, {} % of the answers on {} held-out samples",
        Figure(only, _step("distilled"), entry("time_share")),
        Figure(only, _step("distilled"), lambda record: record["macs"] / record["macs_before"]),
        Figure(only, _step("distilled"), entry("agreement", times=100)),
        Figure(only, _step("distilled"), entry("held_out")),
    ),
    Quote(
        "unpruned {} {} {} ({}-{}) {} {}",
        *_sizes("unpruned"),
        *_range("unpruned", "ms"),
        Figure(only, _step("unpruned"), entry("agreement")),
        _accuracy("unpruned"),
    ),
    Quote("pruned {} {} {} ({}-{}) {}\n", *_sizes("pruned"), *_range("pruned", "agreement"), _accuracy("pruned")),
    Quote(
        "reconstructed {} {} {} ({}-{}) {}\n",
        *_sizes("reconstructed"),
        *_range("reconstructed", "agreement"),
        _accuracy("reconstructed"),
    ),
    Quote(
        "distilled {} {} {} ({}-{}) {} ({}-{}) {}\n",
        *_sizes("distilled"),
        *_range("distilled", "ms"),
        *_range("distilled", "agreement"),
        _accuracy("distilled"),
    ),
    Quote(
        "the network above gets {} of its {} test images right by the old lines, {} by the new ones",
        Figure(only, _step("old lines"), _right),
        Figure(only, _step("old lines"), entry("tested")),
        Figure(only, _step("new lines"), _right),
    ),
    Quote("the new lines get {}.", Figure(only, _step("new lines without compensate"), _right)),
    Quote("This takes {} seconds on one core", Figure(only, _step("distilled"), entry("cpu_seconds"))),
]

# MiniLM and EfficientNet-Lite0

MINILM, EFFICIENTNET = "trained/minilm.jsonl", "trained/efficientnet-lite0.jsonl"
_LONG = "compensate, distill in bfloat16"
_OURS = rows(MINILM, key=("minilm", 0.5, "shrink, more sentences", _LONG))
_L1 = rows(MINILM, key=("minilm", 0.5, "l1", _LONG))
_LAYERS = rows(MINILM, key=("minilm", 0.5, "three of six layers", "distill in bfloat16"))
_SIZE = rows(MINILM, key=("minilm", 0.5, "shrink", "size"))
_COSINE, _RECALL = entry("figures", "cosine", "value"), entry("figures", "recall@10", "value", times=100)
_SAME_CLASS = entry("figures", "top 1", "value", times=100)


def _lite0(share: float, criterion: str, recovery: str) -> Rows:
    return rows(EFFICIENTNET, key=("efficientnet-lite0", share, criterion, recovery))


TRAINED = [
    Quote("MiniLM with {} of its MACs", Figure(only, _OURS, entry("macs"))),
    Quote("a model of sentence embeddings, with {} of its MACs", Figure(only, _OURS, entry("macs"))),
    Quote(
        "{} of the MACs, by [`shrink`, then `distill`](docs/embedding_model.md), in {} minutes of one core",
        Figure(only, _OURS, entry("macs")),
        Figure(only, _OURS, entry("seconds", times=1 / 60)),
    ),
    Quote(
        "sentences take {} ms, unpruned {}",
        Figure(only, _SIZE, entry("milliseconds")),
        Figure(only, _SIZE, entry("milliseconds_unpruned")),
    ),
    Quote(
        "a cosine of {} with the unpruned network's embeddings, {} % of their",
        Figure(only, _OURS, _COSINE),
        Figure(only, _OURS, _RECALL),
    ),
    Quote("L1 with the same recovery {} and {} %", Figure(only, _L1, _COSINE), Figure(only, _L1, _RECALL)),
    Quote("layers, distilled as long, {} and {} %", Figure(only, _LAYERS, _COSINE), Figure(only, _LAYERS, _RECALL)),
    Quote("By the cosine three layers are {} behind there", Figure(mean, _OURS, _COSINE, [_LAYERS])),
    Quote("{} sentences of scikit-learn's and pandas' docstrings", Figure(only, _OURS, entry("data", "test"))),
    Quote("{} of the MACs; blocks may go", Figure(only, _lite0(0.8, "reconstruction", "widths, blocks"), key(1))),
    Quote(
        "{} % of new crops keep their class, after {} photos",
        Figure(only, _lite0(0.8, "reconstruction", "widths, blocks"), _SAME_CLASS),
        Figure(only, _lite0(0.8, "reconstruction", "widths, blocks"), entry("data", "calibration", "photos")),
    ),
    Quote("{} % if channels alone go", Figure(only, _lite0(0.8, "reconstruction", "widths, uniform"), _SAME_CLASS)),
    Quote("{} % by L1 with our recovery", Figure(only, _lite0(0.8, "l1", "compensate"), _SAME_CLASS)),
    Quote(
        "{} of the MACs of EfficientNet-Lite0 {} % of new crops keep their class",
        Figure(only, _lite0(0.5, "reconstruction", "widths, blocks"), key(1)),
        Figure(only, _lite0(0.5, "reconstruction", "widths, blocks"), _SAME_CLASS),
    ),
]

# Budgets of time, and tolerances


def _eighth(way: str) -> Rows:
    return rows("eight.jsonl", key=("resnet20", 0.125, 1024, ANY, way))


def _lost(record: Record) -> float:
    return float(100 * (record["unpruned"] - record["accuracy"]))


def _blocks(record: Record) -> int:
    return len(record["removed"])


def _tolerated(tolerance: float) -> Rows:
    return rows("tolerance_by_network.jsonl", key=(ANY, tolerance, ANY))


def _came_back(tolerance: float) -> tuple[Figure, Figure]:
    """Return how many networks came back unpruned, and the tolerance in percent."""
    networks = _tolerated(tolerance)
    return Figure(true, networks, lambda record: record["left"] == 1), Figure(only, networks, key(1, times=100))


_HALF_OF_THE_TIME = rows("equal_time.jsonl", key=("vit_small", ANY, 0.5, "channels", 64))
_DEFAULT = rows("time.jsonl", key=(ANY, "default"))
TIME = [
    Quote(
        "an {} of the time; {} of nine blocks go",
        Figure(only, _eighth("both"), key(1)),
        Figure(only, _eighth("both"), _blocks),
    ),
    Quote(
        "{} ± {} times as fast in onnxruntime, {} ± {} points lost",
        *mean_and_half(_eighth("both"), entry("faster", 0)),
        *mean_and_half(_eighth("both"), _lost),
    ),
    Quote("L1 with blocks removed in the same way {} ± {} points", *mean_and_half(_eighth("both, l1"), _lost)),
    Quote(
        "paired {} ± {} more ({} networks",
        *mean_and_half(_eighth("both, l1"), _lost, [_eighth("both")]),
        Figure(count, _eighth("both, l1"), _lost, [_eighth("both")]),
    ),
    Quote(
        "Torch-Pruning's Taylor {} ({} networks)",
        Figure(mean, _eighth("channels, taylor"), _lost),
        Figure(count, _eighth("channels, taylor"), _lost),
    ),
    Quote("in place of distillation, for as long, {} ± {}", *mean_and_half(_eighth("both, labels"), _lost)),
    Quote("[{} networks]", Figure(count, _DEFAULT, entry("left"))),
    Quote(
        "with {} of their MACs take {} to {} of their time in PyTorch by default",
        Figure(mean, _DEFAULT, entry("left")),
        Figure(smallest, _DEFAULT, entry("pytorch", "share", 0)),
        Figure(largest, _DEFAULT, entry("pytorch", "share", 0)),
    ),
    Quote(
        "A small ViT asked for {} of its time takes {} ± {} % of it",
        Figure(only, _HALF_OF_THE_TIME, key(2)),
        *mean_and_half(_HALF_OF_THE_TIME, entry("time", times=100)),
    ),
    Quote(
        "Of {} small networks {} came back unpruned at {} %, {} at {} % and {} at {} %",
        Figure(count, _tolerated(0.01), entry("left")),
        *_came_back(0.01),
        *_came_back(0.02),
        *_came_back(0.05),
    ),
]

_VIT = rows("cuda.json", key=("d12f1566", "latency", "vit_b_16, float16, batch 64"))
_RESNET50 = rows("cuda.json", key=("d12f1566", "pruned to half the MACs", "resnet50, shrink"))
GPU = [
    Quote(
        "{} of the MACs of a ResNet-50 take {} s on an H200 with",
        Figure(only, _RESNET50, entry("macs")),
        Figure(only, _RESNET50, entry("whole_seconds")),
    ),
    Quote("images take {} ms by Torch-Pruning, which prunes", Figure(only, _VIT, entry("torch-pruning ms"))),
    Quote(
        "and {} by `shrink` in multiples of 32; unpruned {}",
        Figure(only, _VIT, entry("shrink, multiples of 32 ms")),
        Figure(only, _VIT, entry("unpruned ms")),
    ),
]

# Selection criteria

BASELINES = ("random", "l1", "l2", "fpgm", "taylor", "torch-pruning")


def _fresh(network: str, share: int, row: str) -> Rows:
    return rows(f"fresh_networks/{network}.jsonl", target=f"{share} % of the MACs left", pruner=row)


def _named(network: str, share: int, row: str) -> Rows:
    return rows(f"named/{network}.jsonl", target=f"{share} % of the MACs left", pruner=row)


def _cloud(network: str, row: str) -> Rows:
    return rows("topology/which_clouds.jsonl", key=(network, ANY, row))


def _left(record: Record) -> float:
    return float(record["flops"] / record["flops_before"])


def _left_percent(record: Record) -> float:
    return 100 * _left(record)


_COMPENSATED, _RETRAINED = entry("accuracy_compensated", times=100), entry("accuracy_retrained", times=100)
_TEST = entry("test", times=100)
_CLOUD, _SQUARES = _cloud("ResNet-20", "functional cloud"), _cloud("ResNet-20", "least squares")
_RESNET = _fresh("resnet20", 10, "reconstruction")
_MOBILENET = _fresh("mobilenet_like", 10, "reconstruction")
_SMALL = _named("small_cnn", 25, "reconstruction")
_BESIDE_L1 = mean_and_half(_RESNET, _RETRAINED, [_fresh("resnet20", 10, "l1")])
NORMS_ONLY, RECONSTRUCTED, TUNED = "recalibrated", "compensated", "retrained"
CLOUD, SQUARES = forest.CLOUD, forest.SQUARES


def _points(row: str, base: str, recovery: str) -> tuple[OverKinds, OverKinds]:
    """Return the figures of ``{} ± {}`` over kinds with a quarter of the MACs."""
    return OverKinds("mean", row, base, 25, recovery), OverKinds("half", row, base, 25, recovery)


def _kinds(row: str, recovery: str) -> OverKinds:
    return OverKinds("kinds", row, "l1", 25, recovery)


def _quarter(row: str) -> OverKinds:
    return OverKinds("left", row, "l1", 25, NORMS_ONLY)


def _beside_best(network: str) -> tuple[Figure, Figure]:
    """Return what least squares has more than the best baseline, with a tenth of the MACs."""
    without = {"torch-pruning"} if network == "vit_small" else set()  # it doesn't take this ViT
    baselines = [_fresh(network, 10, row) for row in BASELINES if row not in without]
    validation = entry("validation_compensated")
    return mean_and_half(_fresh(network, 10, "reconstruction"), _COMPENSATED, baselines, validation)


def _filters(row: str) -> Rows:
    return rows("topology/which_filters.jsonl", key=(CONFIRMATION, 0.5, row))


CRITERIA = [
    Quote(
        "our selection has {} ± {} points over L1 on {} ResNet-20s with {} % of the MACs, and over {} kinds of "
        "networks with a {} {} ± {}",
        *_BESIDE_L1,
        Figure(count, _RESNET, _left),
        Figure(mean, _RESNET, _left_percent),
        _kinds(SQUARES, TUNED),
        _quarter(SQUARES),
        *_points(SQUARES, "l1", TUNED),
    ),
    Quote(
        "With {} % of the MACs of a ResNet-20, both distilled and then fine-tuned for an epoch, least squares has "
        "{} ± {} points over L1 on {} networks",
        Figure(mean, _RESNET, _left_percent),
        *_BESIDE_L1,
        Figure(count, _RESNET, _left),
    ),
    Quote(
        "and over {} kinds with a {} {} ± {}",
        _kinds(SQUARES, TUNED),
        _quarter(SQUARES),
        *_points(SQUARES, "l1", TUNED),
    ),
    Quote("{} of the small CNN's MACs", Figure(mean, _SMALL, _left)),
    Quote(
        "least squares has {} ± {} points against the best baseline after weight reconstruction",
        *mean_and_half(
            _SMALL,
            _COMPENSATED,
            [_named("small_cnn", 25, row) for row in BASELINES],
            entry("validation_compensated"),
        ),
    ),
    Quote(
        "On {} small MobileNetV2s with {} % of the MACs",
        Figure(count, _MOBILENET, _left),
        Figure(mean, _MOBILENET, _left_percent),
    ),
    Quote("L2, the best baseline, by {} ± {} points", *_beside_best("mobilenet_like")),
    Quote(
        "other kinds in that table it has {} ± {}, {} ± {}, {} ± {} and {} ± {}",
        *_beside_best("resnet20"),
        *_beside_best("vit_small"),
        *_beside_best("vgg16_quarter"),
        *_beside_best("lenet5_like"),
    ),
    Quote(
        "over {} kinds with a {} of the MACs it has {} ± {} over L1",
        _kinds(SQUARES, RECONSTRUCTED),
        _quarter(SQUARES),
        *_points(SQUARES, "l1", RECONSTRUCTED),
    ),
    Quote("Points more than L1 with a {} of the MACs, by criterion", _quarter(CLOUD)),
    Quote(
        "with a {} of the MACs `TopologicalPruner` with calibration images has {} ± {} points over L1 in the mean over "
        "{} kinds of networks",
        _quarter(CLOUD),
        *_points(CLOUD, "l1", NORMS_ONLY),
        _kinds(CLOUD, NORMS_ONLY),
    ),
    Quote("as many as Torch-Pruning's norm ({} ± {} beside it", *_points(CLOUD, "torch-pruning", NORMS_ONLY)),
    Quote("Torch-Pruning's norm it is open ({} ± {}", *_points(CLOUD, "torch-pruning", NORMS_ONLY)),
    Quote("as least squares, our default ({} ± {}", *_points(CLOUD, SQUARES, NORMS_ONLY)),
    Quote("kinds of networks, least squares {} ± {}", *_points(SQUARES, "l1", NORMS_ONLY)),
    Quote("random choice is as good as L1 there ({} ± {}", *_points("random", "l1", NORMS_ONLY)),
    Quote("four convolutions with {} of every layer", Figure(only, _filters("random"), key(1))),
    Quote(
        "as `TopologicalPruner` (which has {} ± {} more",
        *mean_and_half(_filters("functional Hausdorff"), entry("test", times=100), [_filters("random")]),
    ),
    Quote("it has {} ± {} over L1 and is behind", *_points(CLOUD, "l1", RECONSTRUCTED)),
    Quote("it has {} ± {} points over L1 there and is behind", *_points(CLOUD, "l1", RECONSTRUCTED)),
    Quote("is behind least squares by {} ± {}", *_points(SQUARES, CLOUD, RECONSTRUCTED)),
    Quote(
        "from {} to a {} of the MACs, neither differs from L1 by more than {} points",
        OverKinds("left", CLOUD, "l1", 50, TUNED),
        OverKinds("left", CLOUD, "l1", 25, TUNED),
        Furthest([(row, "l1", share, TUNED) for row in (CLOUD, SQUARES) for share in (50, 25)]),
    ),
    Quote(
        "on {} ResNet-20s with a quarter of the channels by {} ± {}",
        Figure(count, _CLOUD, _TEST),
        *mean_and_half(_SQUARES, _TEST, [_CLOUD]),
    ),
    Quote("`EnergyFilterPruner` has {} ± {} points over L1", *_points("energy", "l1", RECONSTRUCTED)),
    Quote("`SubclusterPruner` {} ± {}", *_points("subcluster", "l1", RECONSTRUCTED)),
    Quote(
        "where only batch norms follow {} ± {} and {} ± {}",
        *_points("energy", "l1", NORMS_ONLY),
        *_points("subcluster", "l1", NORMS_ONLY),
    ),
]

# Without inputs


def _without(share: float, way: str) -> Rows:
    return rows("without_data.jsonl", key=(ANY, share, way))


def _less(share: float, way: str) -> tuple[Figure, Figure]:
    """Return how many points fewer than on real images."""
    column = entry("accuracy", times=-100)
    return mean_and_half(_without(share, way), column, [_without(share, "`shrink`, real images")])


_SYNTHETIC, _MERGED = "`shrink`, synthetic images", 'L1, `compensate(method="merge")`'
WITHOUT_INPUTS = [
    Quote(
        "On {} small CNNs with a {} of the MACs that has {} ± {} points less than real images, with a {} {} ± {}",
        Figure(count, _without(0.25, _SYNTHETIC), key(0)),
        Figure(only, _without(0.25, _SYNTHETIC), key(1)),
        *_less(0.25, _SYNTHETIC),
        Figure(only, _without(0.1, _SYNTHETIC), key(1)),
        *_less(0.1, _SYNTHETIC),
    ),
    Quote("takes no inputs either, {} ± {} and {} ± {} points less", *_less(0.25, _MERGED), *_less(0.1, _MERGED)),
]

# NNI's own tests, and what commands take

_UPSTREAM, _NEW, _OLD = (rows("upstream.json", key=(version,)) for version in (ANY, "2.14", "2.15"))


def _torch(record: Record) -> float:
    return float(record["versions"]["torch"].rpartition(".")[0])


def _date(place: int) -> Figure:
    return Figure(only, _OLD, lambda record: int(record["date"].split("-")[place]))


COMMANDS = [
    Quote("We run {} of the pruning tests in its repository", Figure(only, _UPSTREAM, entry("expected"))),
    Quote(
        "with it all {} pass on PyTorch {}; on {} all {} did in the run of {}-{}-{}",
        Figure(only, _NEW, entry("passed")),
        Figure(only, _NEW, _torch),
        Figure(only, _OLD, _torch),
        Figure(only, _OLD, entry("passed")),
        *map(_date, range(3)),
    ),
    Quote(
        "runs the tests: {} minutes", Figure(only, rows("checks.json", key=("tests",)), entry("seconds", times=1 / 60))
    ),
]

QUOTES = (*README_CODE, *TRAINED, *TIME, *GPU, *CRITERIA, *WITHOUT_INPUTS, *COMMANDS)
"""Every measured number. An entry may hold on several pages, and must hold on one."""

WITHOUT_RECORD = (
    "installs everything (7 GB)",
    "shows tables and a picture: two minutes",
    "most of the 7 GB is PyTorch with CUDA",
    "beside the baselines (five minutes)",
    "the first and last network in half an hour",
)
"""Measured, but no run kept a record: this list must become shorter."""

NOT_MEASURED = {
    "names": (
        "L1",
        "L2",
        "L1NormPruner",
        "MiniLM-L6",
        "all-MiniLM-L6-v2",
        "EfficientNet-Lite0",
        "ResNet-20",
        "ResNet-20s",
        "ResNet-18",
        "ResNet-50",
        "MobileNetV2",
        "MobileNetV2s",
        "INT8",
        "H1",
        "small.pt2",
        "their ten nearest neighbours",
        "three of the six layers",
        "the cosine three layers are",
        "compute in half precision",
        "H200",
        "T8",
        "of nine blocks",
        "95 % intervals",
        "a few dozen photos",
        "a notebook of two minutes",
    ),
    "versions and years": (
        "[NNI](https://github.com/microsoft/nni) 3.0",
        "NNI 3.0",
        "NNI 2",
        "NNI 3",
        "GPL v3",
        "Python 3.10 to 3.13",
        "University of Moratuwa, 2022",
    ),
    "arguments": (
        "8x8 images",
        "num_classes=10, in_channels=1, image_size=8, seed=0",
        "epochs=10, batch_size=32), seed=0",
        "tensors[0]",
        'images.split(64), {"flops": 0.25}',
        "images[:2]",
        '{"latency": 0.5',
        '{"flops": 0.5}',
        '{"op_types": ["Conv2d"], "sparse_ratio": 0.5}',
        "tolerance=0.05",
        "multiples of eight",
        "64 sentences take",
        "one core",
        "one thread",
        "keep half of a small network's channels",
        "with a quarter of the channels",
        "on an H200 64 images",
        "multiples of 32",
        "H200 with 256 images",
        "Where half of the MACs stay",
        "a MobileNetV2 with 3 % of its MACs",
        "YOLO, half as large",
    ),
    "counts of what a page or the project has": (
        "in seven ways",
        "In ten lines",
        "these three lines",
        "two of its columns",
        "in one call",
        "[five runtimes]",
        "five questions, five answers",
        "Five questions",
        "eight questions",
        "five roads",
        "Three doors",
        "six jobs",
        "in five ways",
        "(six, five of them in two comparisons)",
        "all rows of two comparisons",
        "[one estimate]",
        "on four convolutions",
        "asks twelve kinds",
        "four other kinds in that table",
        "on two that were trained elsewhere",
        "unpruned one",
        "one by one",
        "Some hundred",
        "smaller one",
        "masked one",
        "## 1.",
        "## 2.",
        "## 3.",
        "## 4.",
        "## 5.",
        "1. **Select**",
        "2. **Reconstruct**",
        "3. **Remove**",
        "4. **Distil**",
    ),
}
"""Words with numbers that no run measured, by what they are."""
