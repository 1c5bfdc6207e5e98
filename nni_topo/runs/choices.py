"""The choice of a model, data, a pruner and a target for a run, and the YAML file of a single pruning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from nni_topo.disk import reading
from nni_topo.errors import ConfigError, unknown_name
from nni_topo.network.runtime.arguments import CONFIG_LIST
from nni_topo.network.runtime.precision import Precision
from nni_topo.pruners.budget import BUDGETS
from nni_topo.pruners.registry import PRUNERS
from nni_topo.recovery.distilling import KNOBS
from nni_topo.recovery.registry import RECOVERIES
from nni_topo.rules import NONE, NUMBER, PATH, as_settings, check_fields, whole
from nni_topo.zoo import Augmentation, Recipe

TARGETS = ("ratio", *BUDGETS)


@dataclass(frozen=True)
class ModelChoice:
    """A model by name, and its width as a factor of the paper's (1.0)."""

    name: str
    width: float = 1.0
    checkpoint: str | None = None  # file of its weights; None: it is trained

    def __post_init__(self) -> None:
        check_fields(self, "models", checkpoint=PATH | NONE)

    @property
    def label(self) -> str:
        """Name, with the width where it isn't 1."""
        return self.name if self.width == 1.0 else f"{self.name} x{self.width:g}"


@dataclass(frozen=True)
class DataChoice:
    """A data set by name."""

    name: str = "digits"
    data_dir: str | None = None  # folder with its files; None: embedded
    limit: int | None = None  # training images used, and of a folder validation images; None: all
    test_limit: int | None = None  # test images used, the set's first ones; None: all
    download: bool = False
    image_size: int | None = None  # pixels of each side to which a folder's images are scaled; None: unchanged
    workers: int | None = None  # processes that read a folder's images, at least 0; None: one per core, at most 8

    def __post_init__(self) -> None:
        check_fields(self, "data", data_dir=PATH | NONE)


@dataclass(frozen=True)
class CompensationChoice:
    """How every row is compensated before fine-tuning, with ``images`` training images without labels."""

    images: int = 1024
    method: str = "reconstruct"
    refine: int | None = None  # steps of refining; None: as nni_topo.recovery.Reconstruct chooses

    def __post_init__(self) -> None:
        check_fields(self, "compensate", images=whole(1), refine=whole(0) | NONE)
        RECOVERIES.info(self.method, "compensate", "method")


@dataclass(frozen=True)
class DistillationChoice:
    """How every row is distilled from the unpruned network before fine-tuning.

    ``images`` training images are used without labels; an eighth as many after them are held out. The other fields
    are knobs of :func:`nni_topo.distill`; ``augmentation`` is as in a recipe.
    """

    images: int = 1024
    augmentation: Augmentation = "crop-flip"
    temperature: float = 2.0
    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 64
    lr: float | None = None
    blend: bool = True
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        own = {name: rule for name, rule in KNOBS.items() if hasattr(self, name)}
        check_fields(self, "distill", images=whole(2), **own)


@dataclass(frozen=True)
class PrunerChoice:
    """A pruner by name with its knobs."""

    # a registered name, or "scratch": a network of the same widths, trained from new weights by the whole recipe
    name: str
    label: str = ""  # row of the table; empty: the name
    knobs: Mapping[str, Any] = field(default_factory=dict)  # the pruner's own arguments
    calibration: int = 0  # training images, without labels, given to the pruner; 0: none
    compensate: CompensationChoice | Literal[False] | None = None  # of this row; False: none; None: as in the plan
    distill: DistillationChoice | Literal[False] | None = None  # likewise

    def __post_init__(self) -> None:
        check_fields(self, "pruners", calibration=whole(0))

    @property
    def row(self) -> str:
        """Label or, without one, the name."""
        return self.label or self.name


@dataclass(frozen=True)
class Target:
    """The ``sparse_ratio`` of every layer, or the share of a budget's cost that is kept."""

    kind: Literal["ratio", "flops", "params", "latency", "memory"]
    value: float

    def __post_init__(self) -> None:
        if self.kind not in TARGETS:
            raise unknown_name("a target", str(self.kind), TARGETS, "target")
        NUMBER.check(f"a {self.kind} target", self.value, "target")
        interval, edge = ("[0, 1)", 0.0) if self.kind == "ratio" else ("(0, 1]", 1.0)
        if not (0.0 < self.value < 1.0 or self.value == edge):
            raise ConfigError(f"a {self.kind} target must be in {interval}, got {self.value} (target)")

    @property
    def label(self) -> str:
        """The target in words."""
        counted = {"flops": "MACs", "params": "parameters"}.get(self.kind, self.kind)
        return f"ratio {self.value:g}" if self.kind == "ratio" else f"{100 * self.value:g} % of the {counted} left"


@dataclass(frozen=True)
class Cell:
    """One run: a trained model of one seed, pruned by one pruner to one target, made dense and fine-tuned."""

    model: ModelChoice
    data: DataChoice
    pruner: PrunerChoice
    target: Target
    seed: int
    train: Recipe
    retrain: Recipe
    device: str = "cpu"
    compensate: CompensationChoice | None = None
    distill: DistillationChoice | None = None
    until: float | None = None  # share of the unpruned validation accuracy that ends fine-tuning; None: all epochs

    @property
    def key(self) -> str:
        """Name of the cell's record; equal settings have equal keys, whatever the folder of the data."""
        settings = {**asdict(self), "model": _model_facts(self.model), "data": _data_facts(self.data)}
        for step in ("compensate", "distill"):
            del settings["pruner"][step]  # the cell's own fields replace them
        for name in ("compensate", "distill", "until"):
            if settings[name] is None:
                del settings[name]
        if self.distill is not None and self.distill.precision == "float32":
            del settings["distill"]["precision"]  # so that records from before this setting existed are found
        return _digest(settings)

    @property
    def training_key(self) -> str:
        """Name of the trained checkpoint, which all cells of a model, data set, recipe and seed share."""
        return training_key(self.model, self.data, self.train, self.seed)


@dataclass(frozen=True)
class PruneConfig:
    """A pruning configuration file: a pruner by name, NNI's config_list, the pruner's own knobs."""

    pruner: str
    config_list: list[dict[str, Any]]
    knobs: Mapping[str, Any] = field(default_factory=dict)
    calibration: int = 0  # training images, without labels, given to the pruner; 0: none
    compensate: CompensationChoice | None = None  # on training images without labels, for any pruner; None: none
    round_to: int | None = None  # layers keep a multiple of this number of channels
    retrain: Mapping[str, Any] = field(default_factory=dict)  # fields of the recipe, e.g. `epochs`; empty: none

    def __post_init__(self) -> None:
        check_fields(self, "configuration", config_list=CONFIG_LIST, calibration=whole(0), round_to=whole(1) | NONE)


def load_prune_config(path: str | Path) -> PruneConfig:
    """Read a YAML file; DataError if it can't be read, ConfigError if a key is unknown or missing."""
    content = read_yaml(path, "a configuration")
    for key in ("pruner", "config_list"):
        if key not in content:
            found = ", ".join(map(str, content)) or "nothing"
            raise ConfigError(f"a configuration must name {key}, got {found} ({path})")
    PRUNERS.info(content["pruner"], Path(path).name)
    return as_settings(PruneConfig, content, Path(path).name)


def read_yaml(path: str | Path, what: str) -> dict[str, Any]:
    """Read a YAML file's mapping, with ``compensate`` and ``distill`` as settings."""
    path = Path(path)
    with reading(path, what, "of YAML"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ConfigError(f"{what} must be a mapping, got {type(content).__name__} ({path})")
    return with_recovery(content)


def with_recovery(content: dict[str, Any], none: tuple[Any, ...] = (None,)) -> dict[str, Any]:
    """Return a mapping with its ``compensate`` and ``distill`` as settings, where they aren't ``none``."""
    kinds = {"compensate": CompensationChoice, "distill": DistillationChoice}
    given = {step: kind for step, kind in kinds.items() if content.get(step) not in none}
    return {**content, **{step: as_settings(kind, content[step], step) for step, kind in given.items()}}


def changed_recipe(default: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some fields replaced; an unknown field is a :class:`ConfigError`."""
    return as_settings(Recipe, {**asdict(default), **changes}, "a recipe")


def training_key(model: ModelChoice, data: DataChoice, recipe: Recipe, seed: int) -> str:
    """Return the name of a trained network's checkpoint."""
    digest = _digest([_model_facts(model), _data_facts(data), asdict(recipe)])
    stem = "-".join((model.label, data.name)).replace("/", "_").replace(" ", "_").replace(":", "_")
    return f"{stem}-{digest}-seed{seed}"


def _model_facts(model: ModelChoice) -> dict[str, Any]:
    """The model's part of a key."""
    return {name: value for name, value in asdict(model).items() if name != "checkpoint" or value is not None}


def _data_facts(data: DataChoice) -> dict[str, Any]:
    """The data's part of a key: without folder, download and workers, and without sizes that aren't set."""
    found = asdict(replace(data, data_dir=None, download=False, workers=None))
    return {
        name: value for name, value in found.items() if name not in ("test_limit", "image_size", "workers") or value
    }


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
