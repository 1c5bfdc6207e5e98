"""The arguments of `shrink` and `frontier` apart from the size, and their checks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn

from nni_topo.context import advice
from nni_topo.errors import ConfigError, DataError, GradientError, listed, shown, unknown_name
from nni_topo.network.attention.config import described_layers, is_pretrained
from nni_topo.network.io.checkpoint import why_undescribed
from nni_topo.network.layers.kinds import has_channels, without_plain_weights
from nni_topo.network.runtime.arguments import BY_HEAD, check_entry, check_model
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.pruners.budget import AUTO, BUDGETS, Budget, as_budget, with_flops
from nni_topo.pruners.checks import check_no_ratios
from nni_topo.pruners.registry import PRUNERS, check_pruner_knobs, pruner_info
from nni_topo.recovery import RecoveryMethod, distillation
from nni_topo.recovery.distilling import KNOBS as DISTILLATION_KNOBS
from nni_topo.recovery.distilling import check_can_learn
from nni_topo.recovery.held_out import too_few_batches
from nni_topo.recovery.lesson import check_augment
from nni_topo.recovery.outputs import Outputs
from nni_topo.recovery.pool import Pool, first_inputs, without_distillation
from nni_topo.recovery.registry import RECOVERIES
from nni_topo.rules import NONE, check_knobs, instance, one_of, taking

LEAVE_OUT = "leave {} out of the layers to prune (layers)"
"""How a layer is left out of what :func:`nni_topo.shrink` prunes."""

PREFERRED: Literal["preferred"] = "preferred"
"""The value of ``round_to`` with which layers keep multiples of channels as far as the budget allows."""
TOLERANCE = "a tolerance"
"""The reason in errors why :func:`nni_topo.shrink` makes networks of several sizes."""
# Arguments of a pruner that the call sets:
_OFFERED = ("seed", "calibration", "example_inputs", "budget", "round_to")
Layers = Sequence[str | Mapping[str, Any]]
"""Names of layers, and entries of a config_list without ratios."""


@dataclass(frozen=True)
class Settings:
    """How a network is made smaller, apart from its size; the fields are the arguments of :func:`nni_topo.shrink`.

    ConfigError for values that can't be used with any model.
    """

    pruner: str = "reconstruction"
    knobs: Mapping[str, Any] = field(default_factory=dict)
    layers: Layers | None = None
    compensate: str | RecoveryMethod | None = "reconstruct"
    distill: Mapping[str, Any] | bool = True
    depth: bool = False
    outputs: Outputs | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    round_to: int | Literal["preferred"] | None = None
    seconds: float | None = None
    seed: int = 0
    progress: bool | None = None
    place: str = "shrink"  # the function that the user called

    @classmethod
    def among(cls, arguments: Mapping[str, Any], place: str = "shrink") -> Settings:
        """Take the settings from the arguments of a function with the same parameter names."""
        given = {each.name: arguments[each.name] for each in fields(cls) if each.name in arguments}
        given["knobs"] = {} if given["knobs"] is None else given["knobs"]
        given["layers"] = None if given["layers"] is None else list(given["layers"])
        return cls(**given, place=place)

    def __post_init__(self) -> None:
        instance(Mapping).check("knobs", self.knobs, self.place)
        (taking("network") | NONE).check("evaluate", self.evaluate, self.place)
        (taking("output", "inputs") | NONE).check("outputs", self.outputs, self.place)
        check_pruner_knobs(self.pruner, self.knobs, self.place)
        info = pruner_info(self.pruner)
        if not info.structured:
            raise ConfigError(f"pruner must be one that removes whole channels, got {self.pruner!r} ({self.place})")
        if "budget" in self.knobs:  # it is an argument of the call itself
            got = shown(self.knobs["budget"])
            raise ConfigError(f"budget must be left out of knobs, got {got} ({self.place})")
        given = {*_OFFERED, *(knob for knob, value in self.knobs.items() if value is not None)}
        missing = [need for need in info.needs if given.isdisjoint(need.split(" or "))]
        if missing:
            raise ConfigError(
                f"pruner must be one that needs no {', '.join(missing)}, got {self.pruner!r}: create_pruner takes one "
                f"({self.place})"
            )
        check_no_ratios([each if isinstance(each, Mapping) else {} for each in self.layers or ()], "layers")
        if isinstance(self.compensate, str):
            RECOVERIES.info(self.compensate, self.place, "compensate")
        if isinstance(self.distill, Mapping):
            allowed = tuple(inspect.signature(distillation).parameters)[3:]
            for knob in self.distill:
                if knob not in allowed:
                    raise unknown_name("knob of distill", str(knob), allowed, self.place)
            check_knobs("distill", self.distill, DISTILLATION_KNOBS)

    @property
    def chooses_how_many(self) -> bool:
        """Whether the pruner itself chooses how many channels it keeps; pruners with a budget, and NNI's, don't."""
        info = pruner_info(self.pruner)
        return not (info.origin == "nni" or "budget" in info.knobs())

    @property
    def recovery_name(self) -> str:
        """Name of the recovery method, or of its class; empty if no weights are reconstructed."""
        if self.compensate is None or isinstance(self.compensate, str):
            return self.compensate or ""
        return type(self.compensate).__name__

    @property
    def distillation_knobs(self) -> Mapping[str, Any]:
        """The knobs of :func:`nni_topo.distill` that were given."""
        return self.distill if isinstance(self.distill, Mapping) else {}

    @property
    def objective(self) -> str:
        """The objective of distillation, by which outputs are also compared."""
        return str(self.distillation_knobs.get("objective", "auto"))

    def checked(self, model: nn.Module, budget: Budget, several: str = "") -> Budget:
        """Check a request before any work; return the budget."""
        check_model(model)
        self.check_layers(model)
        self.check_together(budget, several)
        self.check_described(model, budget)
        return budget

    def check_together(self, budget: Budget, several: str = "") -> None:
        """Refuse settings that don't go together.

        ``several`` says what makes networks of several sizes, such as a tolerance; empty: one network is made.
        """
        allocations = pruner_info(self.pruner).allocations() or ("uniform",)
        if budget.allocation == AUTO:
            allocations_to_try(self.pruner)
            allocations = (AUTO,)
        has_table = budget.latency_table is not None
        has_entries = any(isinstance(each, Mapping) for each in self.layers or ())
        asks_size = several or "depth=True" * self.depth
        refused = [  # whether it is refused, by which argument, and why
            (
                bool(asks_size) and self.chooses_how_many,
                "pruner",
                f"{asks_size} must have a pruner that can be asked for a size, got {self.pruner!r}, which chooses how "
                "many channels it keeps",
            ),
            (
                not self.chooses_how_many and budget.allocation not in allocations,
                "budget",
                f"the allocation of pruner {self.pruner!r} must be {' or '.join(map(repr, allocations))}, got "
                f"{budget.allocation!r}",
            ),
            (
                bool(several) and budget.runtime != "pytorch",
                "budget",
                f"networks of several sizes must be timed in PyTorch, got {budget.runtime!r}: shrink makes one network "
                "of a given share of the time",
            ),
            (
                self.depth and budget.kind == "latency" and (bool(several) or has_table),
                "budget",
                "a budget of latency with depth=True must have a share and no latency_table, got "
                f"{several or 'a table'}: the networks without blocks are timed",
            ),
            (self.depth and has_entries, "layers", "depth=True needs layers by name, got an entry of a config_list"),
            (
                bool(several) and self.seconds is not None,
                "seconds",
                f"seconds must be left out with {several}, which makes as many networks as it needs, got "
                f"{self.seconds}; distill={{'seconds': ...}} limits each distillation",
            ),
            (
                self.seconds is not None and self.distill is False,
                "seconds",
                "seconds must be left out with distill=False, because it shortens nothing else",
            ),
        ]
        for is_refused, argument, sentence in refused:
            if is_refused:
                raise ConfigError(f"{sentence} ({argument}, {self.place})")

    def check_layers(self, model: nn.Module) -> None:
        """Refuse layers that a model doesn't have, with the nearest names that it has."""
        if self.layers is None:
            return
        if not self.layers:
            raise ConfigError(
                "layers must name at least one layer, got none; None stands for all that can lose channels "
                f"({self.place})"
            )
        known = [name for name, module in model.named_modules() if name and has_channels(module)]
        modules = {name for name, _ in model.named_modules()}
        for index, each in enumerate(self.layers):
            named: Any = each
            if isinstance(each, Mapping):
                check_entry(dict(each), f"layers[{index}]", BY_HEAD)
                named = each.get("op_names", ())
            for name in named if isinstance(named, (list, tuple)) else [named]:
                if name not in modules:
                    raise unknown_name("layer of the model", name, known, self.place)

    def check_two_samples(self, images: Calibration) -> None:
        """Refuse a single sample where networks are distilled."""
        if self.distill is not False and images.samples < 2:
            raise DataError(
                f"distillation must have at least two samples, one to judge by, got {images.samples}: pass more, or "
                f"leave distillation out: {without_distillation()} ({images.name})"
            )

    def check_distillation(self, model: nn.Module, images: Calibration, *, is_held_out: bool) -> float:
        """Raise errors of :func:`nni_topo.distill` for images and outputs before anything is pruned.

        ``is_held_out``: whether some of them are. Return the seconds per sample of a gradient step of the model; NaN
        without distillation.
        """
        if self.distill is False:
            return math.nan
        self.check_two_samples(images)
        if not any(parameter.is_floating_point() for parameter in model.parameters()):
            return math.nan  # `layers_to_prune` raises the error that it has no layer to prune
        inputs, why_whole = first_inputs(model, images)
        if isinstance(inputs, list) and not is_held_out and len(images) < 2:
            raise too_few_batches(len(images), why_whole)
        knobs = self.distillation_knobs
        if knobs.get("augment") is not None:
            check_augment(model, Pool(inputs).few(2), knobs["augment"], 0)
        names = ("objective", "temperature", "outputs", "blocks", "blend", "precision")
        chosen = {"outputs": self.outputs} | {name: knobs[name] for name in names if name in knobs}
        try:
            return check_can_learn(model, inputs, **chosen)
        except GradientError as error:
            if self.distill is not True:  # knobs were given; without them a warning at the end is enough
                raise GradientError(f"{error}; {without_distillation()} leaves distillation out") from error
            return math.nan

    def check_described(self, model: nn.Module, budget: Budget) -> None:
        """Refuse a model of Transformers if its config can't describe the smaller network.

        It has to unless ``equal_blocks`` is False, or by default if it can't describe any.
        """
        if not is_pretrained(model) or budget.equal_blocks is False:
            return
        if budget.equal_blocks is None and not described_layers(model):
            return
        why = why_undescribed(model)
        if names := without_plain_weights(model):
            why = f"which has other layers than the plain ones that are pruned ({listed(names)})"
        if why:
            why = f"a model that its config doesn't describe, {why}"
        elif self.chooses_how_many:
            why = "a pruner that chooses how many channels it keeps"
        elif budget.allocation != "uniform":
            why = f"the allocation {budget.allocation!r}, by which blocks keep different widths"
        if why:
            raise ConfigError(
                f"the smaller network must be one that the config of {type(model).__name__} can describe, so that "
                f"from_pretrained loads it, got {why}; {free_widths()} ({self.place})"
            )


def free_widths() -> str:
    """Return the advice in errors if a config of Transformers can't describe a network."""
    how = advice("{'equal_blocks': False} in the budget", "--no-equal-blocks")
    return f"with {how} layers and heads may keep any width, and nni_topo.save and nni_topo.load take the network"


def cost_without_share(budget: Any, place: str, decides: str) -> Budget:
    """Return the budget for a cost without a share, as ``"flops"`` or ``{"flops": None, ...}``.

    ``decides`` names what determines how much is kept, such as a tolerance.
    """
    budget = with_flops(budget)
    if isinstance(budget, str):
        one_of(BUDGETS).check("budget", budget, place)
    given = {budget: None} if isinstance(budget, str) else budget
    if isinstance(given, Mapping):
        costs = [name for name in BUDGETS if name in given]
        if len(costs) == 1 and given[costs[0]] is None:
            return as_budget({**given, costs[0]: 1.0})
    raise ConfigError(
        f"budget must name a cost, e.g. 'flops' or {{'flops': None}}, got {shown(budget)}: {decides} says how much is "
        f"kept ({place})"
    )


def allocations_to_try(pruner: str) -> tuple[str, ...]:
    """Return the ways in which a pruner can distribute a budget; ConfigError if there is only one."""
    found = pruner_info(pruner).allocations()
    if len(found) < 2:
        able = ", ".join(sorted(name for name, info in PRUNERS.table.items() if len(info.allocations()) > 1))
        raise ConfigError(
            f"a pruner must distribute budgets in several ways ({able}) for allocation={AUTO!r}, got {pruner!r} "
            "(budget)"
        )
    return found
