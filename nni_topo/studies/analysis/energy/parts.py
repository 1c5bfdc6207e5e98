"""The optional parts of an energy study, from dropout to schedules.

Each part takes a :class:`Subject` and returns plain numbers for the study's record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.maths.search.subsets import EvolutionSettings
from nni_topo.network.speedup.dependency import dependency_groups
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.recovery import recalibrate_batch_norm
from nni_topo.runs.choices import PrunerChoice
from nni_topo.runs.provenance import Record
from nni_topo.runs.run import Start, retrain
from nni_topo.runs.scheduled import Schedule, prune_on_schedule
from nni_topo.studies.analysis.energy.accumulated import Step, accumulate_energy, harmless_layers
from nni_topo.studies.analysis.energy.dropout import RATES, study_dropout
from nni_topo.studies.analysis.energy.plots import layer_plot
from nni_topo.studies.analysis.energy.replacement import study_replacement
from nni_topo.studies.analysis.energy.selection import study_selection
from nni_topo.studies.analysis.energy.study import (
    EnergyStudy,
    EvaluateQuality,
    LayerEnergy,
    Quality,
    masks_of,
    quality_on,
)
from nni_topo.studies.study import plain
from nni_topo.zoo.labelled import subset

_SUBSET = 256
_RECALIBRATION_IMAGES = 1024
_DROPOUT_THRESHOLDS = (0.01, 0.1)
_SEARCH = EvolutionSettings(population_size=20, generations=10)
_FINE_TUNING_EPOCHS = 4


@dataclass(frozen=True)
class Subject:
    """The trained network, its study and the settings that all parts use."""

    start: Start
    study: EnergyStudy
    evaluate: EvaluateQuality
    knobs: dict[str, Any]
    layer: str | None
    pictures: dict[str, Figure] = field(default_factory=dict)

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
        models = {row.name: partial(_pruned_alone, subject, row, threshold) for row in study.layers}
        found = study_dropout(models, subject.evaluate, seed=subject.start.seed)
        record[str(threshold)] = plain(found)
        subject.pictures.update(_dropout_pictures(study, threshold, found))
    return record


def accumulated_part(subject: Subject) -> Record:
    """Prune, one after the other, the layers that cost less than two points alone at the lowest threshold."""
    threshold = subject.study.thresholds[0]
    layers = harmless_layers(subject.study, threshold)
    steps = accumulate_energy(
        subject.start.net, layers, subject.start.example, subject.evaluate, threshold=threshold, **subject.knobs
    )
    return {"threshold": threshold, "steps": plain(steps)}


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


def schedules_part(subject: Subject) -> Record:
    """Prune half of every layer's filters at once, or in rounds with fine-tuning between, with equal epochs in all."""
    layers = [name for row in subject.study.layers for name in row.layers]
    entry = {"op_names": layers, "sparse_ratio": 0.5}
    config_list = dependency_groups(subject.start.net, subject.start.example, [entry])
    recipe = subject.start.recipe.for_retraining(_FINE_TUNING_EPOCHS)
    choice = PrunerChoice("energy", knobs=subject.knobs)
    schedules: tuple[Schedule, ...] = ("one-shot", "linear", "agp")
    record: Record = {"ratio": 0.5, "epochs": _FINE_TUNING_EPOCHS}
    for schedule in schedules:
        dense = prune_on_schedule(subject.start, choice, config_list, recipe, schedule=schedule)
        record[schedule] = plain(subject.evaluate(dense))
    return record


PARTS: dict[str, Callable[[Subject], Record]] = {
    "dropout": dropout_part,
    "accumulated": accumulated_part,
    "iterative": iterative_part,
    "replacement": replacement_part,
    "selection": selection_part,
    "schedules": schedules_part,
}


def _dropout_pictures(
    study: EnergyStudy, threshold: float, found: dict[str, dict[float, Quality]]
) -> dict[str, Figure]:
    """Draw accuracy and loss by layer, a line per rate, and their change by dropout."""
    rows = [found[row.name] for row in study.layers]
    where = f"one layer at {100 * threshold:g} % of its energy"
    figures = {}
    for suffix, label, column, factor in (("", "accuracy %", "accuracy", 100.0), ("_loss", "loss (nats)", "loss", 1.0)):
        values = {rate: [factor * getattr(row[rate], column) for row in rows] for rate in RATES}
        change = {rate: [a - b for a, b in zip(values[rate], values[0.0], strict=True)] for rate in RATES}
        for more, what, lines in (("", label, values), ("_change", f"{label}, change by dropout", change)):
            named = {f"rate {rate:g}": line for rate, line in lines.items()}
            figures[f"dropout_{threshold:g}{suffix}{more}"] = layer_plot(study.layers, named, f"{what}, {where}")
    return figures


def _pruned_alone(subject: Subject, row: LayerEnergy, threshold: float) -> nn.Module:
    return masked_model(subject.start.net, subject.start.example, masks_of(row.layers, subject.study.masks[threshold]))
