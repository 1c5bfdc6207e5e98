"""``nni-topo analyze energy``: the energy study of one model by name."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import yaml
from rich.console import RenderableType
from torch import nn

from nni_topo import zoo
from nni_topo.errors import unknown_name
from nni_topo.maths.signals import Chirp
from nni_topo.network.speedup.dense import to_dense
from nni_topo.pruners.hooks import Masks
from nni_topo.rules import number
from nni_topo.runs.provenance import Record
from nni_topo.runs.widths import inner_layers
from nni_topo.studies.analysis.energy.dropout import with_dropout
from nni_topo.studies.analysis.energy.parts import PARTS, Subject
from nni_topo.studies.analysis.energy.study import (
    THRESHOLDS,
    EnergyStudy,
    check_thresholds,
    masks_of,
    quality_on,
    short_name,
    study_energy,
)
from nni_topo.studies.study import Names, Tell, TrainedStudy, plain
from nni_topo.studies.tables import NumberTable
from nni_topo.zoo.labelled import subset

_CHIRP = Chirp()


@dataclass(frozen=True, kw_only=True)
class AnalyzeEnergy(TrainedStudy[EnergyStudy]):
    """Prune filters at several energy thresholds, measure the accuracy of each, and suggest a threshold per layer.

    Everything is measured on validation images; the suggestion is then measured on the test images.
    """

    thresholds: tuple[float, ...] = THRESHOLDS  # energy shares in (0, 1), ascending
    images: int | None = None  # number of validation images, and of test images, at least 1; None: all
    max_drop: float = 0.01  # accuracy that each suggested threshold may cost alone, at least 0
    parts: Names = ()  # further: dropout, accumulated, iterative, replacement, selection
    layer: str | None = None  # layer of replacement and selection; None: the one that costs most accuracy
    sweep: str = _CHIRP.sweep  # of the chirp: nyquist or thesis
    direction: str = _CHIRP.direction  # of the chirp: mean, radial or diagonal

    def check(self) -> None:
        """Check the fields; ConfigError if one is out of its range."""
        for part in self.parts:
            if part not in PARTS:
                raise unknown_name("part of an energy study", part, PARTS, "parts")
        check_thresholds(self.thresholds)
        chirp: dict[str, Any] = {"sweep": self.sweep, "direction": self.direction}
        replace(_CHIRP, **chirp)  # which checks its fields
        number(0.0).check("max_drop", self.max_drop, self.place)

    def find(self, tell: Tell) -> EnergyStudy:
        """Study a trained model, then the parts that were asked for."""
        start = self.start(self.images)
        net, example = start.net, start.example
        # the pruner's arguments, as in YAML
        knobs: dict[str, Any] = {"signal": {"sweep": self.sweep, "direction": self.direction}}
        if "dropout" in self.parts:
            with_dropout(net, 0.0, 0)  # raises at once if the model has no dropout
        layers = [name for name in inner_layers(net, example) if not isinstance(net.get_submodule(name), nn.Linear)]
        evaluate = partial(quality_on, images=subset(start.data.validation, slice(self.images)))
        study = study_energy(net, layers, example, evaluate, thresholds=self.thresholds, **knobs)
        study.more.update({"model": self.model_choice.label, "data": self.data, "seed": self.seed})
        thresholds = study.suggestion(self.max_drop)
        if thresholds:
            # all layers at once, measured on the test images
            masks: Masks = {}
            for name, threshold in thresholds.items():
                masks |= masks_of([name], study.masks[threshold])
            dense = to_dense(net, example, masks)
            study.more["suggested"] = plain(
                {
                    "thresholds": thresholds,
                    "macs": zoo.count_macs(dense, example[:1]) / zoo.count_macs(net, example[:1]),
                    "quality": quality_on(dense, start.data.test),
                    "quality_before": quality_on(net, start.data.test),
                }
            )
            study = replace(study, file=self._suggestion(study.more, knobs))
        subject = Subject(start, study, evaluate, knobs, self.layer)
        for part in self.parts:
            tell(f"{part} ...")
            study.more[part] = PARTS[part][0](subject)
        return study

    def show(self, found: EnergyStudy) -> Iterator[RenderableType]:
        """Yield the tables of the study and of its parts."""
        return show_energy(found.to_dict())

    def _suggestion(self, record: Record, knobs: dict[str, Any]) -> str:
        """Return a file for ``nni-topo prune``, with the command."""
        found, thresholds = record["suggested"], record["suggested"]["thresholds"]
        entries = [
            {"op_names": [name for name in thresholds if thresholds[name] == threshold], "sparse_threshold": threshold}
            for threshold in sorted(set(thresholds.values()))
        ]
        content: dict[str, Any] = {"pruner": "energy", "config_list": entries, "knobs": knobs}
        # the command prunes the same network
        values: dict[str, Any] = {
            "model": self.model,
            "data": self.data,
            "data-dir": self.data_dir,
            "checkpoint": self.checkpoint,
            "width": None if self.width == 1.0 else f"{self.width:g}",
            "limit": self.limit,
        }
        given = [word for knob, value in values.items() if value is not None for word in (f"--{knob}", str(value))]
        command = shlex.join(["nni-topo", "prune", *given])
        before, accuracy = (100.0 * found[key]["accuracy"] for key in ("quality_before", "quality"))
        comment = (
            f"# {record['model']} on {record['data']}: per layer the highest energy threshold that, alone, costs at "
            f"most {100.0 * self.max_drop:g} points\n# on validation images. All at once, without fine-tuning, on test "
            f"images: {accuracy:.1f} % ({before:.1f} % before) at {100.0 * found['macs']:.1f} % of the MACs.\n"
            f"#   {command} --config suggested.yaml --out DIR\n\n"
        )
        return comment + yaml.safe_dump(content, sort_keys=False)


def show_energy(record: Record) -> Iterator[NumberTable | str]:
    """Yield the tables and lines of a study's record; a title is a line of its own, as a narrow table would wrap it."""
    base, layers = record["baseline"], record["layers"]
    thresholds = [str(threshold) for threshold in record["thresholds"]]
    heads = [f"{100 * threshold:g} %" for threshold in record["thresholds"]]
    together = [record["together"][t] for t in thresholds]
    rows, losses = [], []
    for layer in layers:
        alone = [layer["alone"][t] for t in thresholds]
        counts = zip((layer["removed"][t] for t in thresholds), alone, strict=True)
        cells = [f"{removed}: {100 * quality['accuracy']:.1f}" for removed, quality in counts]
        rows.append([short_name(layer["layers"]), str(layer["filters"]), *cells])
        losses.append([short_name(layer["layers"]), *(f"{quality['loss']:.3f}" for quality in alone)])
    cells = [f"{row['removed']}: {100 * row['quality']['accuracy']:.1f}" for row in together]
    totals = [
        ["all at once", str(sum(layer["filters"] for layer in layers)), *cells],
        ["MACs kept %", "", *(f"{100 * row['macs']:.1f}" for row in together)],
    ]
    before = f"{100 * base['accuracy']:.1f} %, loss {base['loss']:.3f}"
    yield f"{record['model']} on {record['data']}: {before}; filters removed: accuracy %"
    yield NumberTable(None, ["layer", "filters", *heads], rows, totals, text_columns=2)
    yield "loss (nats), this layer alone pruned"
    all_losses = ["all at once", *(f"{row['quality']['loss']:.3f}" for row in together)]
    yield NumberTable(None, ["layer", *heads], losses, [all_losses])
    for verdict in ("saturated", "redundant"):
        names = [short_name(layer["layers"]) for layer in layers if layer["verdict"] == verdict]
        yield f"{verdict}: {', '.join(names) or 'none'}"
    if "suggested" in record:
        suggested = record["suggested"]
        accuracy = f"{100 * suggested['quality']['accuracy']:.1f} %"
        yield f"suggested, all at once: {accuracy} at {100 * suggested['macs']:.1f} % of the MACs"
    for part, (_, table) in PARTS.items():
        if part in record:
            yield from table(record[part])
