"""Prune the two networks that nobody here trained, recover them without labels, and record how alike they stay.

    python -m benchmarks.trained.run efficientnet-lite0 --out runs/trained
    python -m benchmarks.trained.run minilm --out runs/trained
    python -m benchmarks.trained.run minilm --out runs/trained --only l1 reconstruction --recoveries none

Every row keeps the same number of channels in every layer, but for MiniLM without layers. A cell is a network, a share
of its cost, a selection criterion and a recovery; each is a line of ``NETWORK.jsonl``, and the same command goes on
where it was stopped. ``--only`` and ``--recoveries`` run some rows and columns; the rows of EXTRA run only if they are
named. ``--sizes`` times MiniLM's dense networks, and sees which of them ``from_pretrained`` loads. ``--images 8 32 128
512`` measures instead what weight reconstruction gains from so many crops (sentences), ``--allocations uniform error
auto blocks`` what `shrink` reaches on EfficientNet-Lite0 where it chooses the widths of the layers. ``--only shrink``
is `shrink` on MiniLM, then `distill`, as ``docs/embedding_model.md`` has it. ``report.py`` beside this file makes the
tables.

Weights are recovered from calibration photos (sentences), distilled weights are kept or discarded by validation photos,
and all figures are of test photos, which nothing else looks at. Seconds are those of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.recovery import recovery_rules  # noqa: F401  (registers methods by name)
from benchmarks.trained import measures, photos, pretrained, sentences
from nni_topo.errors import NniTopoError
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.budget import Budget
from nni_topo.runs.provenance import provenance
from nni_topo.runs.widths import inner_layers, planned_ratios, pruning_config
from nni_topo.studies.baselines import baseline_masks
from nni_topo.studies.records import append_record, read_records

CRITERIA = ("random", "l1", "l2", "fpgm", "torch-pruning", "reconstruction")
OURS = "reconstruction"
WHOLE_HEADS, LAYERS = "reconstruction, whole heads", "three of six layers"
SHRINK, SHRINK_MORE = "shrink", "shrink, more sentences"
EXTRA = (WHOLE_HEADS, LAYERS, SHRINK, SHRINK_MORE)
"""Further rows of MiniLM: least squares as the others prune (rows of `OURS` are of a version that made heads narrower),
the best three layers that stay, and `shrink`, which prunes neurons alone, because a config of BERT says how many of
these there are; with more sentences distillation learns from all, as it does in the other rows."""
UNPRUNED = "unpruned"
SOLVED = {"channel": "channel", "compensate": "reconstruct"}
"""Recoveries by the method of `compensate` that they are; distillation may follow."""
NEW_WEIGHTS = "new weights, distill"
ROUNDED = " in bfloat16"
"""At the end of a recovery whose gradient steps are computed under autocast."""
RECOVERIES = (
    "none",
    "batch norms",
    "channel",
    "compensate",
    "distill",
    NEW_WEIGHTS,
    "compensate, distill",
    f"distill{ROUNDED}",
    f"compensate, distill{ROUNDED}",
)
UNIFORM, BLOCKS, DISTILLED_BLOCKS = "uniform", "blocks", "blocks, distill"
ALLOCATIONS = (UNIFORM, "error", "auto", BLOCKS, DISTILLED_BLOCKS)
"""How `shrink` spends its budget; with "blocks" it may remove blocks, and the widths are uniform."""
USUAL = tuple(name for name in RECOVERIES if not name.endswith(ROUNDED))
"""Recoveries that run unless others are named."""
LONG = ("channel", *(name for name in RECOVERIES if "distill" in name))
"""Recoveries that only the rows of LONG_ROWS have: they take minutes."""
LONG_ROWS = ("l1", OURS, *EXTRA)
Masks = Any


class Subject(ABC):
    """A trained network, the data that it is recovered from and measured on, and how it is pruned."""

    name: str
    shares: tuple[float, ...]
    ours = OURS  # the name of the row of least squares
    model: nn.Module
    example: Any  # example inputs
    count: int  # crops or sentences for selection, weight reconstruction and batch norms
    data: nni_topo.Calibration  # these

    @abstractmethod
    def choose(self, criterion: str, share: float) -> tuple[nn.Module, Masks]:
        """Return a network that computes what the unpruned one does, and masks of it."""

    @abstractmethod
    def distilled(self, dense: nn.Module, limits: dict[str, Any]) -> nni_topo.recovery.Distillation:
        """Distil a dense network; limits are steps (of 64 images or sentences), seconds, and at times the rate."""

    @abstractmethod
    def figures(self, net: nn.Module) -> dict[str, measures.Figure]:
        """Compare a network with the unpruned one on the test data."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the data are, for the records."""

    def masks_of(self, criterion: str, net: nn.Module, config_list: list[dict[str, Any]]) -> Masks:
        """Run a pruner by name on a copy of a network."""
        victim = detached_copy(net)
        knobs: dict[str, Any] = {}
        if criterion == OURS:
            knobs = {"calibration": self.data, "example_inputs": self.example}
        elif criterion == "random":
            knobs = {"seed": 0}
        pruner = nni_topo.create_pruner(criterion, victim, config_list, **knobs)
        masks = pruner.compress()[1]
        pruner.unwrap_model()
        return masks


class Cnn(Subject):
    """EfficientNet-Lite0 at 128 pixels, pruned to a share of its multiply-accumulates."""

    name = "efficientnet-lite0"
    shares = (0.8, 0.5)
    distilled_crops = 1920

    def __init__(self, count: int | None = None) -> None:
        self.model = pretrained.efficientnet_lite0()
        self.example = torch.zeros(1, 3, photos.SIDE, photos.SIDE)
        self.count = 960 if count is None else count
        self._photos = min(self.count, len(photos.PHOTOS["calibration"]))
        self.data = _in_turns(photos.random_crops("calibration", self.count, seed=1, photos=self._photos))
        self._test = photos.random_crops("test", 960, seed=3)
        self._wanted = measures.answers(self.model, self._test.batches())

    @property
    def facts(self) -> dict[str, Any]:
        """Photos and crops of each part."""
        names = photos.PHOTOS
        return {
            "calibration": {"photos": self._photos, "crops": self.count},
            "distillation": {"photos": len(names["calibration"]), "crops": self.distilled_crops},
            "validation": {"photos": len(names["validation"]), "crops": 320},
            "test": {"photos": len(names["test"]), "crops": len(self._test.photos)},
        }

    def choose(self, criterion: str, share: float) -> tuple[nn.Module, Masks]:
        """Prune all layers to the same widths, whatever the criterion; the share is of multiply-accumulates."""
        analysis = Analysis.on(self.model, self.example)
        ratios, _ = planned_ratios(analysis, Budget(flops=share), self.entries())
        if criterion.startswith("torch-pruning"):
            return self.model, baseline_masks(criterion, analysis, ratios)[0]
        return self.model, self.masks_of(criterion, self.model, pruning_config(self.model, self.example, ratios))

    def entries(self) -> list[dict[str, Any]]:
        """Name the layers within the blocks: the widths between blocks stay as they are."""
        names = inner_layers(self.model, self.example)
        widened = {name.rpartition(".")[0] for name in names if name.endswith("_expand_conv")}
        within = ("_expand_conv", "_depthwise_conv")
        return [{"op_names": [n for n in names if n.rpartition(".")[0] in widened and n.endswith(within)]}]

    def distilled(self, dense: nn.Module, limits: dict[str, Any]) -> nni_topo.recovery.Distillation:
        """Distil on crops of the calibration photos; crops of the validation photos decide."""
        learned = photos.random_crops("calibration", self.distilled_crops, seed=2)
        judges = photos.random_crops("validation", 320, seed=2)
        return nni_topo.distillation(
            dense,
            self.model,
            _in_turns(learned),
            held_out=judges.batches(),
            # On the validation photos 3e-4 and 1e-3 made the loss larger.
            **{"lr": 1e-4} | limits,
            blocks=50.0,
            blend=False,
        )

    def kept_by_photo(self, net: nn.Module) -> list[float]:
        """Agreement of classes on the crops of each test photo."""
        return measures.kept_by_photo(measures.answers(net, self._test.batches()), self._wanted, self._test)

    def figures(self, net: nn.Module) -> dict[str, measures.Figure]:
        """Agreement of classes on crops of the test photos."""
        mine = measures.answers(net, self._test.batches())
        return measures.like_classifier(mine, self._wanted, self._test)


def _in_turns(crops: photos.Crops, size: int = 64) -> nni_topo.Calibration:
    """Return crops in an order in which photos take turns, so that each batch has crops of most, with the photos."""
    kinds = crops.photos.unique()
    places = [(crops.photos == kind).nonzero().flatten() for kind in kinds]
    most = max(len(each) for each in places)
    order = torch.tensor([int(each[turn]) for turn in range(most) for each in places if turn < len(each)])
    return nni_topo.Calibration(list(crops.images[order].split(size)), groups=crops.photos[order])


class Encoder(Subject):
    """MiniLM-L6 on sentences of at most 32 tokens, without half of its heads' channels and half of its MLPs'."""

    name = "minilm"
    ours = WHOLE_HEADS
    shares = (0.5,)
    learned = 16_000
    one_call = 4096  # sentences of one call of `shrink`, whose selection of channels reads them all
    judges = 300
    blocks = 0.2  # the share of the blocks' hidden states in what distillation compares

    def __init__(self, home: Path, count: int | None = None) -> None:
        folder = pretrained.minilm_folder(home)
        self.model = pretrained.minilm(folder)
        self._cache = home
        self._words = pretrained.tokenizer(folder)
        self.count = 1024 if count is None else count
        self._texts = {
            "calibration": sentences.read("calibration", self.learned, cache=home),
            "validation": sentences.read("validation", self.judges, cache=home),
            "test": sentences.read("test", 2000, cache=home),
        }
        self.data = nni_topo.Calibration(self._batches("calibration", self.count))
        self.example = {name: each[:2] for name, each in self.data[0].items()}
        self._test = self._batches("test")
        self._wanted = measures.embeddings(self.model, self._test)

    def _batches(self, part: str, count: int | None = None) -> list[dict[str, Tensor]]:
        return sentences.batches(sentences.tokens(self._words, self._texts[part][:count]))

    @property
    def facts(self) -> dict[str, Any]:
        """Sentences of each part, with a hash of those measured."""
        return {
            "calibration": self.count,
            "distillation": len(self._texts["calibration"]),
            "validation": len(self._texts["validation"]),
            "test": len(self._texts["test"]),
            "test sentences": sentences.digest(self._texts["test"]),
            "packages": sentences.versions(),
        }

    def choose(self, criterion: str, share: float) -> tuple[nn.Module, Masks]:
        """Prune heads and neurons."""
        heads = {"op_names_re": [r".*\.attention\.self"], "granularity": "head", "sparse_ratio": 1.0 - share}
        neurons = {"op_names_re": [r".*\.intermediate\.dense"], "sparse_ratio": 1.0 - share}
        if criterion == "torch-pruning":
            ids = self.example["input_ids"]
            config_list = nni_topo.dependency_groups(self.model, self.example, [heads, neurons])
            names = [name for entry in config_list for name in entry["op_names"]]
            ratios = dict.fromkeys(names, 1.0 - share)
            return self.model, baseline_masks(criterion, Analysis.on(self.model, ids), ratios)[0]
        if criterion == LAYERS:
            return self.without_layers(self.best_layers()), {}
        groups = nni_topo.dependency_groups(self.model, self.example, [heads, neurons])
        return self.model, self.masks_of(OURS if criterion == WHOLE_HEADS else criterion, self.model, groups)

    def best_layers(self) -> tuple[int, ...]:
        """Return the three layers that by themselves are nearest to the whole encoder, on the validation sentences."""
        judges = self._batches("validation")
        wanted = measures.embeddings(self.model, judges)

        def cosine(kept: tuple[int, ...]) -> float:
            found = measures.embeddings(self.without_layers(kept), judges)
            return float(nn.functional.cosine_similarity(found, wanted).mean())

        return max(itertools.combinations(range(len(self.model.encoder.layer)), 3), key=cosine)

    def without_layers(self, kept: Sequence[int]) -> nn.Module:
        """Return the encoder with a few layers, under their old numbers: distillation compares layers by name."""
        net = detached_copy(self.model)
        for number in set(range(len(net.encoder.layer))) - set(kept):
            del net.encoder.layer._modules[str(number)]
        return net

    def sizes(self, share: float) -> Iterator[dict[str, Any]]:
        """Yield milliseconds of a batch, CPU time in turns with the unpruned encoder, and whether the folder loads."""
        shapes = {name: self.choose(name, share) for name in ("l1", WHOLE_HEADS)}
        shapes[LAYERS] = self.without_layers(range(3)), {}  # any three take as long
        shapes[SHRINK] = self.shrunk(share, None)[0], {}
        nets = {name: nni_topo.to_dense(net, self.example, m) if m else net for name, (net, m) in shapes.items()}
        times: dict[str, list[float]] = {UNPRUNED: [], **{name: [] for name in nets}}
        with torch.no_grad():
            for _ in range(25):
                for name, net in {UNPRUNED: self.model, **nets}.items():
                    times[name].append(timed(lambda net=net: net(**self.data[0]))[1])  # type: ignore[misc]
        for name, net in nets.items():
            yield {
                "key": (self.name, share, name, "size"),
                "milliseconds": 1000 * statistics.median(times[name]),
                "milliseconds_unpruned": 1000 * statistics.median(times[UNPRUNED]),
                "loads": self.loads(name, net),
            }

    def loads(self, name: str, net: nn.Module) -> bool:
        """Return whether ``from_pretrained`` makes the same network of the folder that `save_pretrained` writes."""
        if name == LAYERS:  # numbered from 0 on, as a config says it
            net = detached_copy(net)
            net.encoder.layer = nn.ModuleList(net.encoder.layer._modules.values())
            net.config.num_hidden_layers = len(net.encoder.layer)
        with tempfile.TemporaryDirectory() as folder:
            try:
                nni_topo.save_pretrained(net, folder)
            except NniTopoError:
                return False
            again = pretrained.minilm(Path(folder))
        found, wanted = (measures.embeddings(each, self._test[:2]) for each in (again, net))
        return torch.allclose(found, wanted, atol=1e-5)

    def shrunk(self, share: float, seconds: float | None, has_more: bool = False) -> tuple[Any, Any]:
        """Make a network by `shrink`, and return it with how distillation ended.

        Seconds are those of the whole call; where distillation has more sentences, its own. None: for the size alone.
        """

        def embedding(output: Any, batch: dict[str, Tensor]) -> Tensor:
            return pretrained.embedding(output, batch["attention_mask"])

        knobs: dict[str, Any] = {"blocks": self.blocks, "lr": 8e-4, "steps": 100_000}
        knobs["precision"] = "bfloat16"
        few = self.data if has_more else self._batches("calibration", 64 if seconds is None else self.one_call)
        small: Any = nni_topo.shrink(
            self.model,
            few,
            {"flops": share},
            outputs=embedding,
            distill=False if seconds is None or has_more else knobs,
            seconds=None if has_more else seconds,
        )
        if seconds is None or not has_more:
            return small, small.report.distillation
        many = self._batches("calibration")
        found = nni_topo.distillation(small, self.model, many, outputs=embedding, seconds=seconds, **knobs)
        return found.model, found.verdict

    def distilled(self, dense: nn.Module, limits: dict[str, Any]) -> nni_topo.recovery.Distillation:
        """Distil pooled embeddings and the blocks' hidden states; other sentences decide."""
        return nni_topo.distillation(
            dense,
            self.model,
            self._batches("calibration"),
            held_out=self._batches("validation"),
            outputs=lambda output, batch: pretrained.embedding(output, batch["attention_mask"]),
            blocks=self.blocks,
            **{"lr": 8e-4} | limits,
        )

    def figures(self, net: nn.Module) -> dict[str, measures.Figure]:
        """Cosine and neighbours of embeddings of the test sentences."""
        return measures.like_encoder(measures.embeddings(net, self._test), self._wanted)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=(Cnn.name, Encoder.name))
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--only", nargs="+", choices=(*CRITERIA, *EXTRA), default=CRITERIA, metavar="CRITERION")
    parser.add_argument("--recoveries", nargs="+", choices=RECOVERIES, default=USUAL, metavar="RECOVERY")
    parser.add_argument("--shares", nargs="+", type=float, metavar="SHARE", help="shares of the cost to keep")
    parser.add_argument("--steps", type=int, default=250, help="of a distillation (default 250)")
    parser.add_argument("--seconds", type=float, help="wall time of a distillation's steps (default: no limit)")
    parser.add_argument("--images", nargs="+", type=int, metavar="COUNT", help="calibration crops or sentences")
    parser.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, metavar="ALLOCATION")
    parser.add_argument("--sizes", action="store_true", help="time MiniLM's networks and load their folders instead")
    parser.add_argument("--all", action="store_true", help="the long recoveries for every criterion")
    options = parser.parse_args(arguments)
    if options.network == Encoder.name:
        options.only = [Encoder.ours if name == OURS else name for name in options.only]
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.network}.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    for images in options.images or [None]:
        subject: Subject = Cnn(images) if options.network == Cnn.name else Encoder(options.out, images)
        common = {"network": subject.name, "data": subject.facts, **provenance()}
        if options.sizes and isinstance(subject, Encoder):
            share = subject.shares[0]
            if (subject.name, share, WHOLE_HEADS, "size") not in done:
                for record in subject.sizes(share):
                    append_record(path, record | common)
            return
        work = cells if images is None else image_cells
        for record in (allocation_cells if options.allocations else work)(subject, options, done):
            append_record(path, record | common)
            shown = ", ".join(f"{name} {figure['value']:.3f}" for name, figure in record["figures"].items())
            print(f"{' | '.join(map(str, record['key']))}: {shown} ({record['seconds']:.0f} s)", flush=True)


def wanted(criterion: str, options: argparse.Namespace) -> list[str]:
    """Return the recoveries of a row, in the order in which they run."""
    names = [name for name in RECOVERIES if name in options.recoveries]
    if options.network == Encoder.name:  # it has no batch norms
        names = [name for name in names if name != "batch norms"]
    if criterion in (SHRINK, SHRINK_MORE):
        return [name for name in names if name == f"compensate, distill{ROUNDED}"]
    if criterion == LAYERS:  # no channels are gone whose contribution could be reconstructed
        names = [name for name in names if name in ("none", "distill", f"distill{ROUNDED}")]
    if options.all or criterion in LONG_ROWS:
        return names
    return [name for name in names if name not in LONG]


def cells(subject: Subject, options: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Measure the cells that aren't done; a row's selection and weight reconstruction run once for all of them."""
    cost = NetworkCost.on(subject.model, subject.example)({})
    for share in options.shares or subject.shares:
        for criterion in options.only:
            names = [name for name in wanted(criterion, options) if (subject.name, share, criterion, name) not in done]
            if not names:
                continue
            if criterion in (SHRINK, SHRINK_MORE):
                assert isinstance(subject, Encoder)
                yield shrink_cell(subject, share, criterion, names[0], options.seconds, cost)
                continue
            (net, masks), chosen_in = timed(lambda row=criterion, part=share: subject.choose(row, part))  # type: ignore[misc]
            row = Row(subject, share, net, masks)
            for name in names:
                dense, seconds, notes = row.recovered(name, {"steps": options.steps, "seconds": options.seconds})
                left = NetworkCost.on(dense, subject.example)({})
                yield {
                    "key": (subject.name, share, criterion, name),
                    "figures": {key: asdict(figure) for key, figure in subject.figures(dense).items()},
                    "selection_seconds": chosen_in,
                    "seconds": chosen_in + seconds,
                    "macs": left.macs / cost.macs,
                    "params": left.params / cost.params,
                    **notes,
                }


def shrink_cell(subject: Encoder, share: float, criterion: str, name: str, seconds: float, cost: Any) -> dict[str, Any]:
    """Measure one call of `shrink`; seconds of wall time are for all of it, with more sentences for distillation."""
    has_more = criterion == SHRINK_MORE
    (dense, verdict), taken = timed(lambda: subject.shrunk(share, seconds, has_more))
    left = NetworkCost.on(dense, subject.example)({})
    judges = subject._batches("validation")
    validation = measures.like_encoder(measures.embeddings(dense, judges), measures.embeddings(subject.model, judges))
    return {
        "key": (subject.name, share, criterion, name),
        "figures": {key: asdict(figure) for key, figure in subject.figures(dense).items()},
        "validation": {key: asdict(figure) for key, figure in validation.items()},
        "seconds": taken,
        "macs": left.macs / cost.macs,
        "params": left.params / cost.params,
        "neurons": dense.config.intermediate_size,
        "sentences": subject.count if has_more else subject.one_call,
        "steps": verdict.steps,
        "lr": verdict.lr,
        "is_kept": verdict.is_kept,
    }


def image_cells(subject: Subject, options: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Measure weight reconstruction with few images; they select the channels too."""
    share = (options.shares or subject.shares)[0]
    key = (subject.name, share, subject.ours, f"compensate, {subject.count} images")
    if key in done:
        return
    (net, masks), chosen_in = timed(lambda: subject.choose(subject.ours, share))
    dense, seconds = Row(subject, share, net, masks).solved("reconstruct")
    yield {
        "key": key,
        "images": subject.count,
        "figures": {name: asdict(figure) for name, figure in subject.figures(dense).items()},
        "selection_seconds": chosen_in,
        "seconds": chosen_in + seconds,
    }


def allocation_cells(
    subject: Subject, options: argparse.Namespace, done: set[tuple[Any, ...]]
) -> Iterator[dict[str, Any]]:
    """Measure `shrink` with the layers' widths by an allocation, or with blocks removed, too; some then distil."""
    if not isinstance(subject, Cnn):
        raise SystemExit(f"--allocations is for {Cnn.name} alone: the other network is pruned to a share of its heads")
    cost, layers = NetworkCost.on(subject.model, subject.example)({}), subject.entries()[0]["op_names"]
    for share in options.shares or subject.shares:
        for name in options.allocations:
            key = (subject.name, share, OURS, f"widths, {name}")
            if key in done:
                continue
            has_blocks = name in (BLOCKS, DISTILLED_BLOCKS)
            budget = {"flops": share, "allocation": UNIFORM if has_blocks else name}
            shrink = functools.partial(
                nni_topo.shrink, distill=False, layers=layers, depth=has_blocks, round_to=1, progress=False
            )
            dense, seconds = timed(lambda budget=budget, shrink=shrink: shrink(subject.model, subject.data, budget))  # type: ignore[misc]
            notes: dict[str, Any] = {}
            if has_blocks:
                notes["removed"] = [each.name for each in dense.report.depth.removed]
            if name == DISTILLED_BLOCKS:
                limits = {"steps": options.steps, "seconds": options.seconds}
                dense, spent, distilled = learned(subject, dense, limits)
                seconds, notes = seconds + spent, notes | distilled
            left = NetworkCost.on(dense, subject.example)({})
            yield {
                "key": key,
                "allocation": name,
                "figures": {each: asdict(figure) for each, figure in subject.figures(dense).items()},
                "by_photo": subject.kept_by_photo(dense),
                "seconds": seconds,
                "macs": left.macs / cost.macs,
                "params": left.params / cost.params,
                **notes,
            }


class Row:
    """A pruned network, and what its recoveries share."""

    def __init__(self, subject: Subject, share: float, net: nn.Module, masks: Masks) -> None:
        self.subject, self.share, self.net, self.masks = subject, share, net, masks
        self._solved: dict[str, tuple[nn.Module, float]] = {}

    def recovered(self, name: str, limits: dict[str, Any]) -> tuple[nn.Module, float, Mapping[str, Any]]:
        """Return the dense network after a recovery, its seconds, and notes for the record."""
        subject = self.subject
        if name.endswith(ROUNDED):
            name, limits = name.removesuffix(ROUNDED), {**limits, "precision": "bfloat16"}
        first, _, then = name.partition(", ")
        if first in SOLVED:
            dense, spent = self.solved(SOLVED[first])
            if not then:
                return dense, spent, {}
        else:
            has_masks = len(self.masks) > 0  # none where whole layers are gone
            dense, spent = nni_topo.to_dense(self.net, subject.example, self.masks) if has_masks else self.net, 0.0
        if name == "none":
            return dense, spent, {}
        if name == NEW_WEIGHTS:
            draw_weights(dense)
            limits = {**limits, "lr": None}  # a range test finds it: what suits trained weights may be too low
        if name == "batch norms":
            calibrated, seconds = timed(lambda: nni_topo.recalibrate_batch_norm(dense, subject.data))
            return calibrated, seconds, {}
        found, seconds, notes = learned(subject, dense, limits)
        return found, spent + seconds, notes

    def solved(self, method: str) -> tuple[nn.Module, float]:
        """Return the dense network after weight reconstruction, and the seconds of that."""
        if method not in self._solved:

            def solve() -> nn.Module:
                full = nni_topo.compensate(self.net, self.masks, self.subject.data, method=method)
                return nni_topo.to_dense(full, self.subject.example, self.masks)

            self._solved[method] = timed(solve)
        return self._solved[method]


def learned(subject: Subject, dense: nn.Module, limits: dict[str, Any]) -> tuple[nn.Module, float, dict[str, Any]]:
    """Return the distilled network, its seconds, and notes for the record."""
    found, seconds = timed(lambda: subject.distilled(dense, limits))
    return found.model, seconds, {"steps": found.steps, "lr": found.lr, "is_kept": found.is_kept}


def draw_weights(net: nn.Module) -> None:
    """Give all layers of a network new random weights in place, as they have before any training."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)  # as BERT's were drawn
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a function returns, and the processor's seconds that it took."""
    began = time.process_time()
    found = work()
    return found, time.process_time() - began


if __name__ == "__main__":
    main()
