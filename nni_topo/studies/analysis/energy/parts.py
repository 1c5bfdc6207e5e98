"""The optional parts of an energy study, from dropout to schedules.

Each part takes a :class:`Subject` and returns plain numbers for the study's record. A function beside it makes a table
of the record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.maths.search.subsets import GeneticSearch
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.recovery import recalibrate_batch_norm
from nni_topo.runs.provenance import Record
from nni_topo.runs.run import Start, retrain
from nni_topo.studies.analysis.energy.dropout import RATES, study_dropout
from nni_topo.studies.analysis.energy.replacement import study_replacement
from nni_topo.studies.analysis.energy.selection import study_selection
from nni_topo.studies.analysis.energy.study import (
    LITTLE,
    EnergyStudy,
    EvaluateQuality,
    LayerEnergy,
    Step,
    accumulate_energy,
    layer_plot,
    masks_of,
    quality_on,
    short_name,
)
from nni_topo.studies.study import plain
from nni_topo.studies.tables import NumberTable, table_of
from nni_topo.zoo.labelled import subset

_SUBSET = 256
_RECALIBRATION_IMAGES = 1024
_DROPOUT_THRESHOLDS = (0.01, 0.1)
_SEARCH = GeneticSearch(population_size=20, generations=10)
QUALITY = {"accuracy %": "{quality[accuracy]:.1%}", "loss": "{quality[loss]:.3f}"}
"""Columns of tables of records that hold a quality."""
Titled = tuple[str, NumberTable]
"""A title is a line of its own, because a narrow table would wrap it."""


@dataclass(frozen=True)
class Subject:
    """The trained network, its study and the settings that all parts use."""

    start: Start
    study: EnergyStudy
    evaluate: EvaluateQuality
    knobs: dict[str, Any]
    layer: str | None

    def nearest(self, threshold: float) -> float:
        """Return the study's threshold nearest to a number."""
        return min(self.study.thresholds, key=lambda known: abs(known - threshold))

    def single_layer(self) -> LayerEnergy:
        """Return the layer that replacement and selection study."""
        threshold = self.nearest(0.1)
        alone = [row for row in self.study.layers if len(row.layers) == 1 and row.removed[threshold]]
        if self.layer is not None:
            alone = [row for row in alone if row.layers == (self.layer,)]
        if not alone:
            wanted = self.layer or "any"
            raise ConfigError(f"a layer outside all dependency groups must lose filters at 10 %, got none ({wanted})")
        return max(alone, key=lambda row: self.study.lost(row, threshold))


def dropout_part(subject: Subject) -> Record:
    """Measure accuracy at every dropout rate: unpruned, and with each layer alone pruned at 1 and 10 %."""
    study = subject.study
    (unpruned,) = study_dropout({"": lambda: subject.start.net}, subject.evaluate, seed=subject.start.seed).values()
    record: Record = {"unpruned": plain(unpruned)}
    for threshold in sorted({subject.nearest(t) for t in _DROPOUT_THRESHOLDS}):
        models = {}
        for row in study.layers:
            masks = masks_of(row.layers, study.masks[threshold])
            models[row.name] = partial(masked_model, subject.start.net, subject.start.example, masks)
        found = study_dropout(models, subject.evaluate, seed=subject.start.seed)
        record[str(threshold)] = plain(found)
        # accuracy and loss by layer, a line per rate, and their change by dropout
        rows = [found[row.name] for row in study.layers]
        where = f"one layer at {100 * threshold:g} % of its energy"
        values = {
            "accuracy %": {rate: [100.0 * row[rate].accuracy for row in rows] for rate in RATES},
            "loss (nats)": {rate: [row[rate].loss for row in rows] for rate in RATES},
        }
        for label, by_rate in values.items():
            name = f"dropout_{threshold:g}" + ("_loss" if label == "loss (nats)" else "")
            lines = {f"rate {rate:g}": line for rate, line in by_rate.items()}
            study.pictures[name] = layer_plot(study.layers, lines, f"{label}, {where}")
            for line in lines:
                lines[line] = [a - b for a, b in zip(lines[line], by_rate[0.0], strict=True)]
            study.pictures[f"{name}_change"] = layer_plot(study.layers, lines, f"{label}, change by dropout, {where}")
    return record


def dropout_table(part: Record) -> Titled:
    """Return the accuracies by rate: unpruned, and means over the layers at each threshold."""
    rates = list(part["unpruned"])
    rows = [["unpruned", *(f"{100 * part['unpruned'][rate]['accuracy']:.1f}" for rate in rates)]]
    for threshold, layers in part.items():
        if threshold != "unpruned":
            means = [sum(layer[rate]["accuracy"] for layer in layers.values()) / len(layers) for rate in rates]
            rows.append([f"one layer at {threshold}, mean", *(f"{100 * mean:.1f}" for mean in means)])
    return "dropout at test time", NumberTable(None, ["accuracy % at dropout rate", *rates], rows)


def accumulated_part(subject: Subject) -> Record:
    """Prune, one after the other, the layers that cost less than two points alone at the lowest threshold."""
    study, threshold = subject.study, subject.study.thresholds[0]
    pruned = [row for row in study.layers if row.removed[threshold]]
    layers = [row.layers for row in pruned if study.lost(row, threshold) < LITTLE]
    steps = accumulate_energy(
        subject.start.net, layers, subject.start.example, subject.evaluate, threshold=threshold, **subject.knobs
    )
    return {"threshold": threshold, "steps": plain(steps)}


def accumulated_table(part: Record) -> Titled:
    """Return a row per layer pruned."""
    rows = [{**step, "name": short_name(step["layers"])} for step in part["steps"]]
    title = f"accumulated at {100 * part['threshold']:g} % of the energy, without fine-tuning"
    return title, table_of(None, rows, {"after layer": "{name}", "removed": "{removed}", **QUALITY})


def iterative_part(subject: Subject) -> Record:
    """Prune all layers at 10 % of their energy, one after the other, with equal epochs of fine-tuning between or after.

    ``"none"``: no fine-tuning. ``"between"``: an epoch after each layer. ``"after"``: as many epochs, after the last.
    """
    start, threshold = subject.start, subject.nearest(0.1)
    layers = [row.layers for row in subject.study.layers if row.removed[threshold]]

    def steps(retrain_step: Callable[[nn.Module], object]) -> list[Step]:
        return accumulate_energy(
            start.net,
            layers,
            start.example,
            subject.evaluate,
            threshold=threshold,
            retrain=retrain_step,
            **subject.knobs,
        )

    each = start.recipe.for_retraining(1)
    networks: list[nn.Module] = []
    without = steps(networks.append)
    between = steps(lambda net: retrain(net, start.data, each, seed=start.seed))
    last = networks[-1]
    retrain(last, start.data, start.recipe.for_retraining(len(layers)), seed=start.seed)
    record: Record = {"threshold": threshold, "epochs": len(layers), "none": plain(without), "between": plain(between)}
    return {**record, "after": plain(subject.evaluate(last))}


def iterative_table(part: Record) -> Titled:
    """Return a row per layer pruned, without and with an epoch after it, and one of all epochs after the last."""
    share, epochs = f"{100 * part['threshold']:g} %", part["epochs"]
    rows = []
    for without, step in zip(part["none"], part["between"], strict=True):
        accuracies = [f"{100 * each['quality']['accuracy']:.1f}" for each in (without, step)]
        loss = f"{step['quality']['loss']:.3f}"
        rows.append([short_name(without["layers"]), str(without["removed"]), accuracies[0], str(step["removed"])])
        rows[-1] += [accuracies[1], loss]
    head = ["after layer", "removed", "accuracy %", "an epoch after each: removed", "accuracy %", "loss"]
    after = [f"the first, then {epochs} epochs", "", f"{100 * part['after']['accuracy']:.1f}", "", "", ""]
    title = f"one layer after the other at {share} of its energy; {epochs} epochs of fine-tuning in all"
    return title, NumberTable(None, head, rows, [after])


def replacement_part(subject: Subject) -> Record:
    """Replace one layer's low-energy filters; evaluate before and after batch-norm re-calibration."""
    row, threshold = subject.single_layer(), subject.nearest(0.1)
    images = subject.start.images(_RECALIBRATION_IMAGES)
    found = study_replacement(
        subject.start.net,
        row.layers[0],
        subject.start.example,
        subject.evaluate,
        threshold=threshold,
        fitness=partial(quality_on, images=subset(subject.start.data.train, slice(_SUBSET))),
        repair=lambda net: recalibrate_batch_norm(net, images),
        seed=subject.start.seed,
        **subject.knobs,
    )
    kinds, filters = plain(found), row.removed[threshold]
    return {"layer": row.layers[0], "threshold": threshold, "filters": filters, "kinds": kinds}


def replacement_table(part: Record) -> Titled:
    """Return a row per kind of replacement."""
    columns = {
        "filters": "{name}",
        "accuracy %": "{quality[accuracy]:.1%}",
        "re-calibrated %": "{repaired[accuracy]:.1%}",
        "energy %": "{energy:.1%}",
        "similarity": "{similarity:.2f}",
    }
    rows = [{"name": kind, **made} for kind, made in part["kinds"].items()]
    return f"{part['filters']} filters of {part['layer']} replaced", table_of(None, rows, columns)


def selection_part(subject: Subject) -> Record:
    """Select half of one layer's filters by energy, Taylor terms and genetic search."""
    row = subject.single_layer()
    place = subject.start.example.device
    images, labels = (tensor.to(place) for tensor in subject.start.data.train[:_SUBSET])
    found = study_selection(
        subject.start.net,
        row.layers[0],
        subject.start.example,
        [(images, labels)],
        subject.evaluate,
        keep=max(1, row.filters // 2),
        evolution=_SEARCH,
        seed=subject.start.seed,
        **subject.knobs,
    )
    return {"layer": row.layers[0], "filters": row.filters, "methods": plain(found)}


def selection_table(part: Record) -> Titled:
    """Return a row per method."""
    columns = {"": "{name}", **QUALITY, "energy lost %": "{energy:.1%}", "Taylor": "{taylor:.4f}"}
    rows = [{"name": name, **made} for name, made in part["methods"].items()]
    title = f"half of the {part['filters']} filters of {part['layer']}, selected by"
    return title, table_of(None, rows, {**columns, "seconds": "{seconds:.2f}"})


PARTS: dict[str, tuple[Callable[[Subject], Record], Callable[[Record], Titled]]] = {
    "dropout": (dropout_part, dropout_table),
    "accumulated": (accumulated_part, accumulated_table),
    "iterative": (iterative_part, iterative_table),
    "replacement": (replacement_part, replacement_table),
    "selection": (selection_part, selection_table),
}
"""By name what finds a part's record, and what makes its table."""
