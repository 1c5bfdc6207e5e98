"""What a trial does: settings from the command line, and the parameters a tuner proposes on top of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tyro

from nni_topo.disk import read_json, reading
from nni_topo.errors import ConfigError, DataError, unknown_name
from nni_topo.pruners.registry import check_pruner_knobs, pruner_info
from nni_topo.rules import NONE, PATH, check_fields
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
from nni_topo.zoo import default_recipe

BUDGET_KEY = "TRIAL_BUDGET"
"""Key that NNI's Hyperband and BOHB add to a trial's parameters."""
_RATIO, _KNOB = "ratio.", "knob."
_PLAIN = (str, int, float, bool)


@dataclass(frozen=True)
class TrialSettings:
    """One trial. Every scalar field is an option of ``python -m nni_topo.runs.trial`` and may be a tuner's parameter.

    The score that the tuner maximises is ``accuracy - flops_weight * MACs share - latency_weight * latency share``, all
    three in [0, 1] or near it: what a pruned network may lose in accuracy to be smaller or faster by so much. A
    weighted sum finds points on the convex hull of the trade-off only; every trial reports the three values as well.
    """

    model: str = "small_cnn"  # a listed name or package.module:factory
    width: float = 1.0  # factor on the layers' widths
    data: str = "digits"  # a listed name, an .npz file or a folder
    data_dir: str | None = None  # folder with the data set's files
    limit: int | None = None  # training images of the unpruned net; None: all
    image_size: int | None = None  # pixels a side that a folder's images are scaled to; None: as they are
    train_epochs: int | None = None  # of the unpruned net; None: the model's recipe
    checkpoint: str | None = None  # state dict of the trained net; None: it is trained, once per experiment
    pruner: str = "l1"  # registered name, see nni-topo list
    ratio: float = 0.5  # sparse_ratio in [0, 1) of layers without one of their own
    flops: float | None = None  # share of the MACs to be left, in (0, 1]; ratios then are proportions
    calibration: int = 0  # training images without labels for a pruner that takes calibration data
    compensate: int = 0  # training images without labels for compensation; 0: none
    distill: int = 0  # training images without labels for distillation; 0: none
    retrain_epochs: int = 1  # after pruning; 0: none
    retrain_images: int | None = None  # training images used after pruning; None: all
    double_images_after: int | None = None  # trials of an experiment after which retrain_images doubles
    images_per_budget: int | None = None  # images after pruning per unit of TRIAL_BUDGET
    lr: float | None = None  # learning rate after pruning; None: a fifth of the recipe's
    flops_weight: float = 0.0  # accuracy that the whole net's MACs are worth
    latency_weight: float = 0.0  # accuracy that the whole net's latency is worth
    seed: int = 0  # of the net, the pruner where it takes one, and retraining
    device: str = "cpu"  # cpu, cuda or auto
    # no flags, a tuner's alone: by layer or shell pattern, `ratio.LAYER`, and the pruner's `knob.NAME[.FIELD]`
    ratios: tyro.conf.Suppress[Mapping[str, float]] = field(default_factory=dict)
    knobs: tyro.conf.Suppress[Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "trial", data_dir=PATH | NONE, checkpoint=PATH | NONE)
        for name in ("calibration", "compensate", "distill", "retrain_epochs", "flops_weight", "latency_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)} (trial)")
        for name in ("limit", "retrain_images", "double_images_after", "images_per_budget"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)} (trial)")
        for name, value in {"ratio": self.ratio, **{_RATIO + k: v for k, v in self.ratios.items()}}.items():
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"a ratio must be in [0, 1), got {value} ({name})")
        if self.double_images_after is not None and self.retrain_images is None:
            raise ConfigError("images that double need retrain_images to begin with, got none (double_images_after)")
        if self.flops is not None:
            Target("flops", self.flops)
        check_pruner_knobs(self.pruner, self.knobs, "trial")

    def layer_ratio(self, layer: str) -> float:
        """Return a layer's proposed ratio: its own, that of the first pattern it matches, or ``ratio``."""
        if layer in self.ratios:
            return self.ratios[layer]
        return next((value for name, value in self.ratios.items() if fnmatchcase(layer, name)), self.ratio)

    def cell(self) -> Cell:
        """Return the trial as a comparison's cell, whose trained net it shares."""
        default = default_recipe(self.model, self.data)
        train = default if self.train_epochs is None else changed_recipe(default, {"epochs": self.train_epochs})
        retrain = train.for_retraining(self.retrain_epochs)
        # A search over pruners has one number for all.
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

    def for_trial(self, number: int) -> TrialSettings:
        """Return the settings of an experiment's trial, numbered from 0: later ones may retrain on more images."""
        if self.double_images_after is None or self.retrain_images is None:
            return self
        doublings = number // self.double_images_after
        return replace(self, retrain_images=self.retrain_images * 2**doublings, double_images_after=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return asdict(self)


def scalar_kinds() -> dict[str, type]:
    """Return the types of the fields that are options of the trial program; those that may be None default to it."""
    hints = get_type_hints(TrialSettings, include_extras=True)
    kinds = {name: (*get_args(hint), hint)[0] for name, hint in hints.items()}
    return {name: kind for name, kind in kinds.items() if kind in _PLAIN}


@dataclass(frozen=True, kw_only=True)
class Trial(TrialSettings):
    """Prune, make dense, compensate, retrain and report to NNI."""

    params: Path | None = None  # JSON file with the parameters, instead of NNI's tuner
    out: Path | None = None  # folder for the trial's files; None: the one NNI makes
    cache: Path | None = None  # folder of trained nets; None: the experiment's

    def settings(self) -> TrialSettings:
        """Return what isn't about places."""
        return TrialSettings(**{item.name: getattr(self, item.name) for item in fields(TrialSettings)})


def with_parameters(settings: TrialSettings, parameters: Mapping[str, Any]) -> TrialSettings:
    """Return settings with a tuner's parameters (scalars, ``ratio.LAYER``, ``knob.NAME[.FIELD]``, ``TRIAL_BUDGET``)."""
    known = scalar_kinds()
    changes: dict[str, Any] = {}
    ratios, knobs = dict(settings.ratios), dict(settings.knobs)
    for name, value in parameters.items():
        if name.startswith(_RATIO):
            ratios[name.removeprefix(_RATIO)] = _typed(name, value, float)
        elif name.startswith(_KNOB):
            knob, _, field = name.removeprefix(_KNOB).partition(".")
            knobs[knob] = {**knobs.get(knob, {}), field: value} if field else value
        elif name in known:
            changes[name] = _typed(name, value, known[name], optional=getattr(TrialSettings, name) is None)
        elif name == BUDGET_KEY:
            if settings.images_per_budget is None:
                raise ConfigError(f"a tuner's budget needs images_per_budget, got none ({BUDGET_KEY} = {value})")
            changes["retrain_images"] = max(1, round(settings.images_per_budget * _typed(BUDGET_KEY, value, float)))
        else:
            raise unknown_name("a trial's parameter", str(name), [*known, f"{_RATIO}LAYER", f"{_KNOB}NAME"], "trial")
    return replace(settings, **changes, ratios=ratios, knobs=knobs)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Read parameters from a JSON file; DataError if it is missing or isn't a JSON object."""
    path = Path(path)
    with reading(path, "a file of parameters", "of JSON"):
        content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"parameters must be a JSON object, got {type(content).__name__} ({path})")
    return content


def _typed(name: str, value: Any, kind: type, *, optional: bool = False) -> Any:
    """Return a parameter as its field's type; tuners give whole numbers as floats."""
    if value is None and optional:
        return None
    wrong = not isinstance(value, _PLAIN) or isinstance(value, bool) or (kind is str) != isinstance(value, str)
    if wrong or (kind is not str and not math.isfinite(value)) or (kind is int and value != int(value)):
        raise ConfigError(f"a parameter must be of type {kind.__name__}, got {value!r} ({name})")
    return kind(value)
