"""What a comparison runs: a plan, and the cells it is made of."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from nni_topo.errors import ConfigError, DataError, unknown_name
from nni_topo.recovery.compensation import METHODS
from nni_topo.zoo import Recipe, default_recipe

SCRATCH = "scratch"
_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class ModelChoice:
    """A model by name, and its width as a factor of the paper's (1.0)."""

    name: str
    width: float = 1.0

    @property
    def label(self) -> str:
        """Name, with the width where it isn't 1."""
        return self.name if self.width == 1.0 else f"{self.name} x{self.width:g}"


@dataclass(frozen=True)
class DataChoice:
    """A data set by name, from ``data_dir`` (None: embedded).

    ``limit`` and ``test_limit`` say how many training and test images are used, the test set's first ones; None: all.
    """

    name: str = "digits"
    data_dir: str | None = None
    limit: int | None = None
    test_limit: int | None = None
    download: bool = False


@dataclass(frozen=True)
class CompensationChoice:
    """How every row is compensated before it is retrained: by how many unlabelled training images, and how."""

    images: int = 1024
    method: Literal["reconstruct", "channel", "pair"] = "reconstruct"
    refine: int = 2

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError(f"images must be at least 1, got {self.images} (compensate)")
        if self.method not in METHODS:
            raise unknown_name("method", str(self.method), METHODS)


@dataclass(frozen=True)
class PrunerChoice:
    """A pruner by name with its knobs.

    Attributes
    ----------
    name : str
        Registered name, see :func:`nni_topo.list_pruners`; or ``"scratch"``: no pruner, but a network of the same
        widths, trained from new weights by the whole recipe.
    label : str
        Row of the table. Empty: the name.
    knobs : dict
        The pruner's own arguments.
    calibration : int
        Training images (without labels) given to the pruner as ``calibration``; 0: none.
    compensate : CompensationChoice, False or None
        Compensation of this row, False: none; None: as the plan says.
    """

    name: str
    label: str = ""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    calibration: int = 0
    compensate: CompensationChoice | Literal[False] | None = None

    @property
    def row(self) -> str:
        """Label or, without one, the name."""
        return self.label or self.name


@dataclass(frozen=True)
class Target:
    """How much goes: a ``sparse_ratio`` for every layer, or the share of the MACs that is left."""

    kind: Literal["ratio", "flops"]
    value: float

    def __post_init__(self) -> None:
        if self.kind not in ("ratio", "flops"):
            raise ConfigError(f"a target must be 'ratio' or 'flops', got {self.kind!r} (target)")
        low, high = (0.0, 1.0)
        inside = low <= self.value < high if self.kind == "ratio" else low < self.value <= high
        if not inside:
            interval = "[0, 1)" if self.kind == "ratio" else "(0, 1]"
            raise ConfigError(f"a {self.kind} target must be in {interval}, got {self.value} (target)")

    @property
    def label(self) -> str:
        """The target in words."""
        return f"ratio {self.value:g}" if self.kind == "ratio" else f"{100 * self.value:g} % of the MACs left"


@dataclass(frozen=True)
class Cell:
    """One run: a trained model of one seed, pruned by one pruner to one target, made dense and retrained."""

    model: ModelChoice
    data: DataChoice
    pruner: PrunerChoice
    target: Target
    seed: int
    train: Recipe
    retrain: Recipe
    device: str = "cpu"
    compensate: CompensationChoice | None = None

    @property
    def key(self) -> str:
        """Name of the cell's record: equal settings, equal key, wherever the data lies."""
        settings = {**asdict(self), "data": _data_facts(self.data)}
        if self.compensate is None:
            del settings["compensate"]
        del settings["pruner"]["compensate"]  # the cell's own says what is done
        return _digest(settings)

    @property
    def training_key(self) -> str:
        """Name of the trained checkpoint, which all cells of a model, data set, recipe and seed share."""
        return training_key(self.model, self.data, self.train, self.seed)


@dataclass(frozen=True)
class Plan:
    """All cells of a comparison.

    Attributes
    ----------
    models, data, pruners, targets : tuple
        The factors; every combination is a cell.
    seeds : int
        How many seeds, at least 1.
    first_seed : int
        The seeds are ``first_seed``, ``first_seed + 1``, ...
    train, retrain : dict
        Fields of the recipe to replace in the model's default recipe; ``retrain`` needs ``epochs``, of which 0 leaves
        retraining out.
    device : str
        ``"cpu"``, ``"cuda"`` or ``"auto"``.
    compensate : CompensationChoice or None
        Compensation between pruning and retraining, for every row; None: none.
    """

    models: tuple[ModelChoice, ...]
    data: tuple[DataChoice, ...]
    pruners: tuple[PrunerChoice, ...]
    targets: tuple[Target, ...]
    seeds: int = 1
    first_seed: int = 0
    train: Mapping[str, Any] = field(default_factory=dict)
    retrain: Mapping[str, Any] = field(default_factory=lambda: {"epochs": 1})
    device: str = "cpu"
    compensate: CompensationChoice | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds must be at least 1, got {self.seeds} (plan)")
        for name in ("models", "data", "pruners", "targets"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must hold at least one entry, got none (plan)")
        rows = [pruner.row for pruner in self.pruners]
        twice = sorted({row for row in rows if rows.count(row) > 1})
        if twice:
            raise ConfigError(f"labels of pruners must differ, got twice: {', '.join(twice)} (plan)")

    def _seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def cells(self) -> Iterator[Cell]:
        """Yield the cells, those that share a trained model next to each other."""
        for model, data, seed in itertools.product(self.models, self.data, self._seeds()):
            default = default_recipe(model.name, data.name)
            train = changed_recipe(default, self.train)
            retrain = changed_recipe(train.for_retraining(int(self.retrain.get("epochs", 1))), self.retrain)
            for target, pruner in itertools.product(self.targets, self.pruners):
                own = pruner.compensate
                compensate = self.compensate if own is None else own or None
                yield Cell(model, data, pruner, target, seed, train, retrain, self.device, compensate)


def load_plan(path: str | Path) -> Plan:
    """Read a plan from a YAML file.

    Parameters
    ----------
    path : str or Path
        Keys as in :class:`Plan`; an entry of ``models``, ``data`` and ``pruners`` is a name or a mapping, one of
        ``targets`` a mapping such as ``{flops: 0.25}``.

    Returns
    -------
    Plan

    Raises
    ------
    DataError
        If the file is missing or isn't YAML.
    ConfigError
        If a key is unknown or a value can't be used.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"a plan must be a readable YAML file, got: {error} ({path})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"a plan must be a mapping, got {type(content).__name__} ({path})")
    known = {item.name for item in fields(Plan)}
    for key in content:
        if key not in known:
            raise unknown_name(f"key of {path.name}", str(key), known)
    lists = {name: content.get(name, []) for name in ("models", "data", "pruners", "targets")}
    entries = {name: value if isinstance(value, list) else [value] for name, value in lists.items()}
    return Plan(
        models=tuple(_choice(ModelChoice, entry, "models") for entry in entries["models"]),
        data=tuple(_choice(DataChoice, entry, "data") for entry in entries["data"]),
        pruners=tuple(_choice(PrunerChoice, entry, "pruners") for entry in entries["pruners"]),
        targets=tuple(_target(entry) for entry in entries["targets"]),
        compensate=compensation_choice(content.get("compensate")),
        **{key: content[key] for key in ("seeds", "first_seed", "train", "retrain", "device") if key in content},
    )


def compensation_choice(entry: Any) -> CompensationChoice | None:
    """Return what a file's ``compensate`` says, None where it says nothing; ConfigError if a key is unknown."""
    if entry is None or isinstance(entry, CompensationChoice):
        return entry
    if not isinstance(entry, dict):
        raise ConfigError(f"an entry must be a mapping such as {{images: 1024}}, got {entry!r} (compensate)")
    known = {item.name for item in fields(CompensationChoice)}
    for key in entry:
        if key not in known:
            raise unknown_name("key of compensate", str(key), known)
    return CompensationChoice(**entry)


def _choice(kind: type[_Choice], entry: Any, place: str) -> _Choice:
    values = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(values, dict) or "name" not in values:
        raise ConfigError(f"an entry must be a name or a mapping with a name, got {entry!r} ({place})")
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise unknown_name(f"key of {place}", str(key), known)
    if values.get("compensate"):
        values = {**values, "compensate": compensation_choice(values["compensate"])}
    return kind(**values)


def _target(entry: Any) -> Target:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ConfigError(f"a target must be a mapping with one key, ratio or flops, got {entry!r} (targets)")
    ((kind, value),) = entry.items()
    return Target(kind, float(value))


def changed_recipe(default: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some fields replaced; an unknown field is a :class:`ConfigError`."""
    known = {item.name for item in fields(Recipe)}
    for key in changes:
        if key not in known:
            raise unknown_name("key of a recipe", str(key), known)
    return replace(default, **changes)


def training_key(model: ModelChoice, data: DataChoice, recipe: Recipe, seed: int) -> str:
    """Return the name of a trained network's checkpoint."""
    digest = _digest([asdict(model), _data_facts(data), asdict(recipe)])
    stem = "-".join((model.label, data.name)).replace("/", "_").replace(" ", "_").replace(":", "_")
    return f"{stem}-{digest}-seed{seed}"


def _data_facts(data: DataChoice) -> dict[str, Any]:
    """The data's part of a key: without its place, and without ``test_limit`` where the whole test set is used."""
    found = asdict(replace(data, data_dir=None, download=False))
    if found["test_limit"] is None:
        del found["test_limit"]
    return found


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
