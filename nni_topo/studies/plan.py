"""A comparison's plan, read from YAML, and its cells."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nni_topo.errors import ConfigError, unknown_name
from nni_topo.pruners.registry import pruner_info
from nni_topo.rules import JOBS, SEED, as_settings, check_fields, number, whole
from nni_topo.runs.choices import (
    TARGETS,
    Cell,
    CompensationChoice,
    DataChoice,
    DistillationChoice,
    ModelChoice,
    PrunerChoice,
    Target,
    changed_recipe,
    read_yaml,
    with_recovery,
)
from nni_topo.studies.baselines import is_baseline
from nni_topo.zoo import default_recipe

SCRATCH = "scratch"


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison: every combination of models, data, pruners, targets and seeds is a cell.

    ``retrain`` with 0 ``epochs`` means no fine-tuning. Its ``until``, a share in (0, 1], ends fine-tuning after the
    first epoch that reaches this share of the unpruned network's validation accuracy, or after ``epochs``; the learning
    rate is then constant, unless ``schedule`` is given. A ``scratch`` row is trained for all epochs of ``train``.
    """

    models: tuple[ModelChoice, ...]
    data: tuple[DataChoice, ...]
    pruners: tuple[PrunerChoice, ...]
    targets: tuple[Target, ...]
    seeds: int = 1  # number of seeds from `first_seed` on, at least 1
    first_seed: int = 0
    train: Mapping[str, Any] = field(default_factory=dict)  # fields to replace in the model's training recipe
    retrain: Mapping[str, Any] = field(default_factory=lambda: {"epochs": 1})  # likewise for fine-tuning; also `until`
    device: str = "cpu"  # cpu, cuda or auto
    compensate: CompensationChoice | None = None  # weight reconstruction after pruning, for every row; None: none
    distill: DistillationChoice | None = None  # distillation after weight reconstruction, for every row; None: none
    n_jobs: int = 1  # cells run in parallel, at least 1; -1: one per core; other than 1: each in its own process

    def __post_init__(self) -> None:
        check_fields(self, "plan", seeds=whole(1), first_seed=SEED, n_jobs=JOBS)
        if self.retrain.get("until") is not None:
            number(0, 1, "right").check("until", self.retrain["until"], "retrain")
            if not self.retrain.get("epochs"):
                raise ConfigError(
                    f"until needs epochs, the maximum number of epochs, got {dict(self.retrain)} (retrain)"
                )
        for name in ("models", "data", "pruners", "targets"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must hold at least one entry, got none (plan)")
        rows = [pruner.row for pruner in self.pruners]
        for pruner in self.pruners:
            is_ours = pruner.name != SCRATCH and not is_baseline(pruner.name)
            needs = pruner_info(pruner.name).needs if is_ours else ()
            if not pruner.calibration and any(need.startswith("calibration") for need in needs):
                raise ConfigError(
                    f"pruner {pruner.name!r} needs calibration data, got {pruner.calibration} images (calibration of "
                    f"{pruner.row})"
                )
        twice = sorted({row for row in rows if rows.count(row) > 1})
        if twice:
            raise ConfigError(f"labels of pruners must differ, got twice: {', '.join(twice)} (plan)")

    def cells(self) -> Iterator[Cell]:
        """Yield the cells; cells that share a trained model follow each other."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        for model, data, seed in itertools.product(self.models, self.data, seeds):
            train = changed_recipe(default_recipe(model.name, data.name), self.train)
            changes = dict(self.retrain)
            until = changes.pop("until", None)
            retrain = train.for_retraining(int(changes.get("epochs", 1)))
            if until is not None:
                # Fine-tuning may end early, when a cosine over all epochs would still be at a high learning rate.
                retrain = replace(retrain, schedule="constant")
            retrain = changed_recipe(retrain, changes)
            for target, pruner in itertools.product(self.targets, self.pruners):
                compensate, distill = self.compensate, self.distill
                if pruner.compensate is not None:
                    compensate = pruner.compensate or None
                if pruner.distill is not None:
                    distill = pruner.distill or None
                yield Cell(model, data, pruner, target, seed, train, retrain, self.device, compensate, distill, until)


def load_plan(path: str | Path, network: str = "") -> ComparisonPlan:
    """Read a plan from a YAML file with the fields of :class:`ComparisonPlan`; an entry is a name or a mapping.

    A file with several comparisons also has ``networks``: by name, the keys that are specific to one comparison;
    ``network`` chooses one.
    """
    content = read_yaml(path, "a plan")
    networks = content.pop("networks", {})
    if not isinstance(networks, dict) or not all(isinstance(keys, dict) for keys in networks.values()):
        raise ConfigError(f"networks must be a mapping of names to mappings, got {networks!r:.80} ({path})")
    if network or networks:
        if network not in networks:
            raise unknown_name("network", network, networks, f"networks of {Path(path).name}")
        content = with_recovery({**content, **networks[network]})
    for name, kind in {"models": ModelChoice, "data": DataChoice, "pruners": PrunerChoice, "targets": Target}.items():
        entries = content.get(name, [])
        if not isinstance(entries, list):
            entries = [entries]
        if kind is Target:
            content[name] = tuple(map(_target, entries))
        else:
            content[name] = tuple(_choice(kind, choice, name) for choice in entries)
    return as_settings(ComparisonPlan, content, Path(path).name)


def _choice(kind: Any, choice: Any, place: str) -> Any:
    values = {"name": choice} if isinstance(choice, str) else choice
    if not isinstance(values, dict) or "name" not in values:
        raise ConfigError(f"an entry must be a name or a mapping with a name, got {choice!r} ({place})")
    return as_settings(kind, with_recovery(values, (None, False)), place)


def _target(choice: Any) -> Target:
    if not isinstance(choice, dict) or len(choice) != 1:
        raise ConfigError(f"a target must be a mapping with one key of {', '.join(TARGETS)}, got {choice!r} (targets)")
    ((kind, value),) = choice.items()
    try:
        return Target(kind, float(value))  # YAML reads 1e-3 as a string
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"a target must be a number in its interval, got {choice!r} (targets): {error}") from error
