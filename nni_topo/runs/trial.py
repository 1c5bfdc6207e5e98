"""``python -m nni_topo.runs.trial``: one trial of an NNI experiment, or with ``--params FILE`` a trial without NNI.

A trial prunes, makes dense, compensates, retrains and measures; if it was killed, the same call runs it again. Under
NNI the parameters come from the tuner, the results go to it, and the files lie in the trial's folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import nni
import tyro

from nni_topo.disk import only_process, read_json, reading, write_json, write_tensors
from nni_topo.errors import ConfigError, DataError, NniTopoError, unknown_name
from nni_topo.network.io import checkpoint as serialization
from nni_topo.network.speedup.dependency import groups_of
from nni_topo.pruners.registry import check_pruner_knobs, pruner_info
from nni_topo.rules import NONE, PATH, check_fields, number, whole
from nni_topo.runs.choices import (
    Cell,
    CompensationChoice,
    DataChoice,
    DistillationChoice,
    ModelChoice,
    PrunerChoice,
    Target,
    changed_recipe,
)
from nni_topo.runs.headline import headline_of_records
from nni_topo.runs.provenance import Record, provenance
from nni_topo.runs.run import (
    WHOLE_CHANNELS,
    budget_facts,
    costs,
    distilled,
    latencies,
    load_model_data,
    made_dense,
    on_cpu,
    prune_to_ratios,
    retrain,
    trained,
)
from nni_topo.runs.widths import as_entries, inner_layers_of, layer_ratios, proposed_ratios
from nni_topo.zoo import default_recipe

METRICS, SETTINGS = "metrics.json", "settings.json"
DENSE, MASKS, CONFIG_LIST = "dense.safetensors", "masks.pt", "config_list.json"
_RATIO, _KNOB = "ratio.", "knob."

ReportMetrics = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrialSettings:
    """One trial. Every scalar field is an option of ``python -m nni_topo.runs.trial`` and may be a tuner's parameter.

    The score that the tuner maximises is ``accuracy - flops_weight * MACs share - latency_weight * latency share``, all
    three in [0, 1] or near it. A weight is the accuracy that a network may lose to save all of that cost. A weighted
    sum finds only points on the convex hull of the trade-off; every trial reports the three values as well.
    """

    model: str = "small_cnn"  # a listed name or package.module:factory
    width: float = 1.0  # factor of the layers' widths
    data: str = "digits"  # a listed name, an .npz file or a folder
    data_dir: str | None = None  # folder with the data set's files
    limit: int | None = None  # training images for the unpruned net; None: all
    image_size: int | None = None  # pixels of each side to which a folder's images are scaled; None: unchanged
    train_epochs: int | None = None  # epochs of the unpruned net; None: the model's recipe
    checkpoint: str | None = None  # state dict of the trained net; None: it is trained, once per experiment
    pruner: str = "l1"  # registered name, see nni-topo list
    ratio: float = 0.5  # sparse_ratio in [0, 1) of layers without one of their own
    flops: float | None = None  # share of the MACs to keep, in (0, 1]; ratios then are proportions
    calibration: int = 0  # training images without labels for a pruner that takes calibration data
    compensate: int = 0  # training images without labels for compensation; 0: none
    distill: int = 0  # training images without labels for distillation; 0: none
    retrain_epochs: int = 1  # after pruning; 0: none
    retrain_images: int | None = None  # training images used after pruning; None: all
    lr: float | None = None  # learning rate after pruning; None: a fifth of the recipe's
    flops_weight: float = 0.0  # accuracy that all MACs of the unpruned net are worth
    latency_weight: float = 0.0  # accuracy that the latency of the unpruned net is worth
    seed: int = 0  # of the net, of a pruner that takes one, and of retraining
    device: str = "cpu"  # cpu, cuda or auto
    # parameters of a tuner, not flags: `ratio.LAYER` by layer or shell pattern, and the pruner's `knob.NAME[.FIELD]`
    ratios: tyro.conf.Suppress[Mapping[str, float]] = field(default_factory=dict)
    knobs: tyro.conf.Suppress[Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("calibration", "compensate", "distill", "retrain_epochs"), whole(0))
        weights = dict.fromkeys(("flops_weight", "latency_weight"), number(0.0))
        limits = dict.fromkeys(("limit", "retrain_images"), whole(1) | NONE)
        paths = dict.fromkeys(("data_dir", "checkpoint"), PATH | NONE)
        for name, value in {"ratio": self.ratio, **{_RATIO + k: v for k, v in self.ratios.items()}}.items():
            number(0.0, 1.0, "left").check("a ratio", value, name)
        check_fields(self, "trial", **counts, **weights, **limits, **paths)
        if self.flops is not None:
            Target("flops", self.flops)
        check_pruner_knobs(self.pruner, self.knobs, "trial")

    def layer_ratio(self, layer: str) -> float:
        """Return a layer's proposed ratio: its own, the ratio of the first pattern it matches, or ``ratio``."""
        if layer in self.ratios:
            return self.ratios[layer]
        return next((value for name, value in self.ratios.items() if fnmatchcase(layer, name)), self.ratio)

    def cell(self) -> Cell:
        """Return the trial as a cell of a comparison, which shares the trained net."""
        default = default_recipe(self.model, self.data)
        train = default if self.train_epochs is None else changed_recipe(default, {"epochs": self.train_epochs})
        retrain = train.for_retraining(self.retrain_epochs)
        # A search over pruners has one `calibration` for all.
        takes_images = "calibration" in pruner_info(self.pruner).knobs()
        return Cell(
            model=ModelChoice(self.model, self.width),
            data=DataChoice(self.data, self.data_dir, self.limit, image_size=self.image_size),
            pruner=PrunerChoice(self.pruner, knobs=self.knobs, calibration=self.calibration if takes_images else 0),
            target=Target("ratio", self.ratio) if self.flops is None else Target("flops", self.flops),
            seed=self.seed,
            train=train,
            retrain=retrain if self.lr is None else replace(retrain, lr=self.lr),
            device=self.device,
            compensate=CompensationChoice(self.compensate) if self.compensate else None,
            distill=DistillationChoice(self.distill) if self.distill else None,
        )


@dataclass(frozen=True, kw_only=True)
class Trial(TrialSettings):
    """Prune, make dense, compensate, retrain and report to NNI."""

    params: Path | None = None  # JSON file with the parameters, instead of NNI's tuner
    out: Path | None = None  # folder for the trial's files; None: the folder that NNI makes
    cache: Path | None = None  # folder of trained nets; None: the experiment's


def with_parameters(settings: TrialSettings, parameters: Mapping[str, Any]) -> TrialSettings:
    """Return settings with a tuner's parameters (scalars, ``ratio.LAYER``, ``knob.NAME[.FIELD]``)."""
    kinds = {item.name: str(item.type) for item in fields(TrialSettings) if item.name not in ("ratios", "knobs")}
    changes: dict[str, Any] = {}
    ratios, knobs = dict(settings.ratios), dict(settings.knobs)
    for name, value in parameters.items():
        if name.startswith(_RATIO):
            ratios[name.removeprefix(_RATIO)] = value
        elif name.startswith(_KNOB):
            knob, _, part = name.removeprefix(_KNOB).partition(".")
            knobs[knob] = {**knobs.get(knob, {}), part: value} if part else value
        elif name not in kinds:
            raise unknown_name("a trial's parameter", str(name), [*kinds, f"{_RATIO}LAYER", f"{_KNOB}NAME"], "trial")
        # Tuners give integers as floats, and floats as integers.
        elif kinds[name].startswith("int") and isinstance(value, float) and value.is_integer():
            changes[name] = int(value)
        elif kinds[name].startswith("float") and isinstance(value, int) and not isinstance(value, bool):
            changes[name] = float(value)
        else:
            changes[name] = value
    return replace(settings, **changes, ratios=ratios, knobs=knobs)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Read parameters from a JSON file; DataError if it is missing or isn't a JSON object."""
    path = Path(path)
    with reading(path, "a file of parameters", "of JSON"):
        content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"parameters must be a JSON object, got {type(content).__name__} ({path})")
    return content


def run_trial(
    settings: TrialSettings, out: str | Path, *, cache: str | Path | None = None, report: ReportMetrics | None = None
) -> Record:
    """Run a trial in a folder, unless it is finished; return the content of ``metrics.json`` (accuracies in [0, 1]).

    ``cache`` holds the trained nets that trials share. ``report`` is called with 0 and the result after pruning, then
    with every epoch's number and result: ``default``, the score, and ``accuracy``, both on validation images, so that a
    search doesn't overfit to the test images.
    """
    out = Path(out)
    with only_process(out):
        known, mine = read_json(out / SETTINGS), asdict(settings)
        if known is None:
            write_json(out / SETTINGS, mine)
        elif known != mine:
            other = ", ".join(sorted(key for key in mine if known.get(key) != mine[key]))
            raise ConfigError(f"a trial's folder must hold one trial, got another one, with other {other} ({out})")
        metrics: Record | None = read_json(out / METRICS)  # of a finished trial
        if metrics is not None:
            return metrics
        began = time.perf_counter()
        if not pruner_info(settings.pruner).structured:
            raise ConfigError(f"a trial's pruner must remove whole channels, got {settings.pruner!r} (pruner)")
        cell, nets = settings.cell(), out / "nets" if cache is None else Path(cache)
        with only_process(nets) if settings.checkpoint is None else nullcontext():
            start = trained(
                cell.model,
                cell.data,
                recipe=cell.train,
                checkpoint=settings.checkpoint,
                folder=nets / "checkpoints",
                seed=cell.seed,
                device=settings.device,
            )
        names = inner_layers_of(start.analysis)
        for pattern in settings.ratios:
            if not any(name == pattern or fnmatchcase(name, pattern) for name in names):
                raise unknown_name("the layer of a ratio", pattern, names, "ratios")
        if settings.flops is not None and not settings.ratios:
            ratios = layer_ratios(start.net, start.example, cell.target)
        else:
            proposed = {name: settings.layer_ratio(name) for name in names}
            ratios = proposed_ratios(start.net, start.example, proposed, settings.flops)
        masks = on_cpu(prune_to_ratios(start, cell.pruner, cell.target, ratios).masks)
        write_tensors(out / MASKS, masks)

        dense, _ = made_dense(start, masks, cell.compensate)
        if cell.distill is not None:
            dense = distilled(start, dense, cell.distill).model
        accuracy = start.validated(dense)
        facts: Record = {"accuracy_pruned": accuracy, **costs(start, dense)}
        facts["flops_share"] = facts["flops"] / facts["flops_before"]
        facts["price"] = settings.flops_weight * facts["flops_share"]
        if settings.latency_weight:
            facts |= latencies(start, dense)
            facts["latency_share"] = facts["latency_ms"] / facts["latency_before_ms"]
            facts["price"] += settings.latency_weight * facts["latency_share"]
        if settings.flops is not None:
            facts |= budget_facts(start, dense, cell.target, facts, WHOLE_CHANNELS)

        def tell(step: int, accuracy: float) -> None:
            if report is not None:
                report(step, {"default": accuracy - facts["price"], "accuracy": accuracy})

        tell(0, accuracy)
        if cell.retrain.epochs:
            data = start.data
            if settings.retrain_images is not None:
                images = settings.retrain_images
                limit = images if cell.data.limit is None else min(images, cell.data.limit)
                data = load_model_data(cell.model, replace(cell.data, limit=limit))
            knobs = {"callback": lambda log: tell(log.epoch, log.validation_accuracy or 0.0)}
            retrain(dense, data, cell.retrain, seed=cell.seed, **knobs)
            accuracy = start.validated(dense)
        done = {
            **facts,
            "score": accuracy - facts["price"],
            "accuracy": accuracy,
            "test_accuracy": start.tested(dense),
            "test_accuracy_before": start.accuracy,
            "seconds": time.perf_counter() - began,
            "settings": mine,
            **provenance(),
        }
        serialization.save(dense, out / DENSE)
        # With this config_list any structured pruner makes the same widths.
        realised: dict[str, float] = {}
        for name in names:
            before, after = facts["widths_before"][name], facts["widths"][name]
            realised[name] = (before - after + 0.5) / before if after < before else 0.0
        write_json(out / CONFIG_LIST, groups_of(start.analysis, as_entries(realised)))
        write_json(out / METRICS, done)
        return done


def reported(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the part of a trial's metrics that goes to the tuner, as ``default``, and to NNI's web page."""
    names = ("accuracy", "flops_share", "latency_share")
    return {"default": metrics["score"], **{name: metrics[name] for name in names if name in metrics}}


def parsed(arguments: Sequence[str] | None = None) -> Trial:
    """Return the trial that a command line asks for; by default the command line of this process."""
    return tyro.cli(Trial, prog="python -m nni_topo.runs.trial", args=arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a trial by a command line; return 0, or 2 with the reason on standard error."""

    def show(step: int, result: dict[str, float]) -> None:
        print(json.dumps({"step": step, **result}), flush=True)

    def tell_nni(step: int, result: dict[str, float]) -> None:
        nni.trial.overwrite_intermediate_seq(step)  # NNI knows some results of a trial that is run again
        nni.report_intermediate_result(result)

    try:
        options = parsed(arguments)
        alone = options.params is not None
        if options.out is None and (alone or "NNI_OUTPUT_DIR" not in os.environ):
            raise ConfigError("a trial outside of NNI must have --params FILE and --out FOLDER, got no folder (trial)")
        out = Path(os.environ["NNI_OUTPUT_DIR"]) if options.out is None else options.out
        cache = options.cache or (None if alone else out.parent.parent / "nets")
        if options.params is not None:
            parameters = read_parameters(options.params)
        elif nni.get_trial_id() == "STANDALONE":
            raise ConfigError("parameters must come from NNI or from --params FILE, got neither (trial)")
        else:
            parameters = nni.get_next_parameter()
        settings = TrialSettings(**{item.name: getattr(options, item.name) for item in fields(TrialSettings)})
        settings = with_parameters(settings, parameters)
        metrics = run_trial(settings, out, cache=cache, report=show if alone else tell_nni)
    except NniTopoError as error:
        print(f"nni_topo.runs.trial: {error}", file=sys.stderr)
        return 2
    if alone:
        print(json.dumps({"sentence": headline_of_records([metrics]), **reported(metrics)}))
    else:
        nni.report_final_result(reported(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main())
