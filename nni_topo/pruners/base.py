"""The base class of the package's structured pruners: NNI's Pruner with three hooks.

NNI's three stages call the hooks, so the pruner also works inside NNI's scheduled pruners. The calculator asks the
planner how many blocks to keep::

    config_list -> NNI wraps the model -> DataCollector -> MetricCalculator -> SparsityAllocator -> masks
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

from nni.compression.base.compressor import Pruner
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning.basic_pruner import _NormPruner
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.errors import ConfigError, LayerError, unknown_name
from nni_topo.network.channels.constraints import Share
from nni_topo.network.layers.derived import plain_layer
from nni_topo.network.runtime.copies import left_alone
from nni_topo.network.runtime.hooks import example_inputs_of
from nni_topo.network.runtime.progress import quiet
from nni_topo.network.speedup.analysis import Facts
from nni_topo.network.speedup.dependency import DependencyGroups
from nni_topo.pruners.allocators import ConfigAllocator
from nni_topo.pruners.budget import AUTO, Budget, BudgetPlanner, as_budget
from nni_topo.pruners.checks import check_no_ratios, check_request, matched_modules, pruner_arguments
from nni_topo.pruners.hooks import (
    Data,
    DataCollector,
    Masks,
    MetricCalculator,
    Metrics,
    PruningContext,
    SparsityAllocator,
)
from nni_topo.pruners.planner import Planner
from nni_topo.pruners.units import ChannelCoupling, TargetSpaces, in_network_order, is_active, pruning_units
from nni_topo.rules import NONE, Rule, instance

_logger = logging.getLogger(__name__)


class StructuredPruner(Pruner):
    """Prune whole filters and neurons with a collector, a metric and an allocator.

    Decorate a subclass's constructor with :func:`~nni_topo.pruners.checks.pruner_arguments`: it stores the knobs as
    attributes, and this class reads those that are listed under "Other Parameters".

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune. NNI wraps it; ``unwrap_model()`` removes the wrappers.
    config_list : list of dict
        NNI's config_list, see docs/config_list.md.
    evaluator : nni.compression.utils.Evaluator or None, default=None
        Needed for scheduled pruning. The inputs on which it evaluates are used if ``calibration`` is missing.
    existed_wrappers : dict or None, default=None
        Used by ``from_compressor``.
    collector : DataCollector
        Collects one row of numbers per block.
    calculator : MetricCalculator
        Scores the collected rows; larger = keep.
    allocator : SparsityAllocator or None, default=None
        Makes the masks. None: :class:`~nni_topo.hooks.ConfigAllocator`.
    planner : Planner or None, default=None
        Says how many blocks are kept without a budget. None: :class:`~nni_topo.hooks.Planner`, by the config_list.

    Other Parameters
    ----------------
    calibration : iterable, Evaluator or None
        Batches of inputs, or of ``(inputs, targets)`` whose targets are ignored. A list or DataLoader, not a generator.
        None: the inputs on which the evaluator evaluates.
    budget : Budget, mapping or None
        :class:`~nni_topo.Budget` for the whole network instead of ratios, e.g. ``{"flops": 0.25}``.
    example_inputs : Any
        Inputs of the model, for a ``budget``. None: the first ``calibration`` batch, else the evaluator's
        ``dummy_input`` or the first batch on which it evaluates.
    round_to : int or None
        Every layer keeps a multiple of this number of channels, or all of them, rounded up. None: any number.
    seed : int
        Same seed, same masks.
    progress : bool or None
        Show progress on standard error: a bar in a terminal, elsewhere a line every half minute. None: only after five
        seconds.

    Attributes
    ----------
    needs_rule : bool
        Whether every entry of the config_list must have a ratio or a threshold; False if the pruner finds the number.
    setting_rules : mapping of str to Rule
        Rules for values of the config_list, by key, in addition to NNI's.
    allocations : tuple of str
        The allocations of :class:`~nni_topo.Budget` that the pruner supports.

    Raises
    ------
    ConfigError, DataError
        If the request is invalid, before the model is wrapped; see :func:`~nni_topo.pruners.checks.check_request`.

    Notes
    -----
    ``unwrap_model()`` restores the unmasked weights as *new* Parameters: an optimizer made before doesn't have them.
    ``interval_steps``, ``total_times`` and ``first_step_gen`` mean what they mean for NNI's own pruners;
    ``LinearPruner`` and ``AGPPruner`` set them.

    At the default granularity a transposed convolution loses output channels, as every other layer does. With this
    package imported NNI's own pruners do the same; without it they prune its input channels.
    """

    needs_rule: bool = True
    setting_rules: ClassVar[Mapping[str, Rule]] = {}
    allocations: ClassVar[tuple[str, ...]] = ("uniform",)
    _target_spaces: TargetSpaces
    # Defaults for subclasses without these knobs.
    budget: Any = None
    calibration: Any = None
    example_inputs: Any = None
    round_to: int | None = None
    progress: bool | None = None

    @pruner_arguments(
        collector=instance(DataCollector),
        calculator=instance(MetricCalculator),
        allocator=instance(SparsityAllocator) | NONE,
        planner=instance(Planner) | NONE,
    )
    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        collector: DataCollector,
        calculator: MetricCalculator,
        allocator: SparsityAllocator | None = None,
        planner: Planner | None = None,
    ) -> None:
        if planner is None:
            planner = Planner(round_to=self.round_to)
        self.planner = planner
        has_budget = self.budget is not None
        if has_budget:
            budget = as_budget(self.budget)
            if budget.allocation == AUTO:
                names = " or ".join(map(repr, self.allocations))
                raise ConfigError(
                    f"a pruner's allocation must be {names}, got {AUTO!r}: nni_topo.shrink, which compensates, tries "
                    "all that its pruner takes (budget)"
                )
            if budget.allocation not in self.allocations:
                raise unknown_name("allocation of this pruner", budget.allocation, self.allocations, "budget")
            inputs = example_inputs_of(self.example_inputs, model, calibration=self.calibration, evaluator=evaluator)
            if inputs is None:
                raise ConfigError(
                    "a budget needs example_inputs, calibration data or an evaluator that evaluates, got none (budget)"
                )
            self.planner = BudgetPlanner(budget, inputs, round_to=self.planner.round_to)
        self.needs_rule = self.needs_rule and not has_budget
        check_request(model, config_list, existed_wrappers, self.setting_rules, needs_rule=self.needs_rule)
        if has_budget:
            check_no_ratios(config_list)
        self.collector = collector
        self.calculator = calculator
        config_list = self._leave_out_refused(model, config_list)
        self._collected: Data | None = None  # data of the first call of `masks_for`
        self._ties: ChannelCoupling = {}
        self._shares: Mapping[str, Share] = {}
        if isinstance(config_list, DependencyGroups):
            self._ties, self._shares = config_list.ties, config_list.shares
        self.facts: Facts | None = None  # what the caller already knows about the model
        self._facts = Facts()  # what was found about the model while making the latest masks
        if allocator is None:
            allocator = ConfigAllocator()
        self.allocator = allocator
        self.interval_steps = -1
        self.total_times: int | Literal["unlimited"] = 1
        self.first_step_gen = False
        super().__init__(model, config_list, evaluator, existed_wrappers)
        self._target_spaces = in_network_order(model, self._target_spaces)
        if has_budget:
            self._activate_targets()
        # Raises if a granularity doesn't fit its shape, or the members of a group don't fit each other.
        pruning_units(self._target_spaces, self._ties)

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Masks]:
        """Make the masks and put them into the wrapped model.

        Parameters
        ----------
        max_steps, max_epochs : int or None, default=None
            Only for pruners fused with a training one (``from_compressor``).

        Returns
        -------
        torch.nn.Module
            The wrapped model, masked.
        dict
            The masks, ``{module name: {target name: tensor of 0 and 1}}``.

        Notes
        -----
        If it raises, the model is unwrapped. Without training, modes, buffers and the global generators are as before,
        whatever an evaluator does.
        """
        trains = max_steps is not None or max_epochs is not None
        try:
            with nullcontext() if trains else left_alone(self.bound_model):
                model, masks = super().compress(max_steps, max_epochs)
        except BaseException:
            self.unwrap_model()
            raise
        return model, masks

    def generate_masks(self) -> Masks:
        """Return the masks; NNI's three stages call the hooks."""
        self._begin_facts()
        with quiet(self.progress):
            return self._generate_sparsity(self._calculate_metrics(self._collect_data()))

    def masks_for(self, budget: Budget) -> Masks:
        """Return the masks for another budget of the same kind and allocation, without putting them into the model.

        Each call selects channels anew from the data of the first call. ``planner.outcome`` says whether the budget is
        met; no warning is logged if it isn't. ConfigError for a budget of another kind or allocation.
        """
        planner = self.planner
        if not isinstance(planner, BudgetPlanner):
            raise ConfigError(
                f"a pruner must have a budget to get masks for another, got a {type(self).__name__} without (budget)"
            )
        planner.change(budget)
        self._keep_measurements()
        self._begin_facts()
        with left_alone(self.bound_model), quiet(self.progress):
            if self._collected is None:
                self._collected = self._collect_data()
            masks = self._generate_sparsity(self._calculate_metrics(self._collected))
        # Expand each mask to its parameter's shape, as NNI's wrappers do.
        for name, targets in masks.items():
            for target, mask in targets.items():
                parameter = self._target_spaces[name][target].target
                if mask is not None and parameter is not None:
                    targets[target] = mask.expand_as(parameter).clone()
        return masks

    def _leave_out_refused(self, model: nn.Module, config_list: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Check the layers; leave out refused ones if dependency groups chose them by type, else raise."""
        try:
            self.collector.check(model, matched_modules(model, config_list))  # nothing is wrapped yet
            return config_list
        except LayerError as error:
            modules = dict(model.named_modules())
            if any(plain_layer(modules[name]) is not None for name in error.layers if name in modules):
                hint = "nni_topo.as_torch_layers(model) makes layers of a model's own classes PyTorch's"
                error.args = (f"{error}; {hint}",)
            if not isinstance(config_list, DependencyGroups):
                raise
            remaining = config_list.without(error.layers)
            refused = []
            for config in config_list:
                if config not in remaining:
                    refused += config["op_names"]
            if not (remaining and refused) or config_list.named & set(refused):
                raise
            _logger.warning("layers stay unpruned (%s): %s", ", ".join(refused), error)
            return self._leave_out_refused(model, remaining)

    def _begin_facts(self) -> None:
        """Forget what was found about the model, which may have been trained since, unless the caller passed facts."""
        self._facts = Facts() if self.facts is None else self.facts
        if isinstance(self.planner, BudgetPlanner):
            self.planner.facts = self._facts

    def _keep_measurements(self) -> None:
        """Keep what the calculator measures for later calls of :meth:`masks_for`; by default nothing."""

    def collect_data(self) -> Data:
        """Return what the collector reads from the model, without making masks: per target, a row per block."""
        self._begin_facts()
        with quiet(self.progress):
            return self._collect_data()

    def score_blocks(self, data: Data) -> Metrics:
        """Return the scores of collected data, larger = keep."""
        with quiet(self.progress):
            return self._calculate_metrics(data)

    def masks_from(self, metrics: Metrics, *, sparse_threshold: float | None = None) -> Masks:
        """Return the masks of scores, without putting them into the model.

        ``sparse_threshold`` replaces the threshold of all targets that have one, from now on.
        """
        if sparse_threshold is not None:
            for targets in self._target_spaces.values():
                for space in targets.values():
                    if space.sparse_threshold is not None:
                        space.sparse_threshold = sparse_threshold
        return self._generate_sparsity(metrics)

    def _collect_data(self) -> Data:
        return self.collector.collect(self.context)

    def _calculate_metrics(self, data: Data) -> Metrics:
        return self.calculator.calculate(data, self.context)

    def _generate_sparsity(self, metrics: Metrics) -> Masks:
        return self.allocator.allocate(metrics, self.context)

    @property
    def context(self) -> PruningContext:
        """The input of the hooks: the model, its targets with the current ratios, the evaluator and the planner."""
        names = self._get_param_names_map() if self._is_wrapped else {}
        return PruningContext(
            self.bound_model,
            self._target_spaces,
            self.evaluator,
            names,
            self.planner,
            self._ties,
            self._shares,
            self._facts,
        )

    def _activate_targets(self, cap: float = 0.0) -> None:
        """Set ``sparse_ratio`` to ``cap`` on configured targets without a rule: the pruner finds the number."""
        spaces = [space for targets in self._target_spaces.values() for space in targets.values()]
        # One member's rule holds for its whole group; a second rule could contradict it.
        ruled = {space.dependency_group_id for space in spaces if is_active(space)} - {None}
        for space in spaces:
            lacks_rule = space.align is None and space.target is not None and not is_active(space)
            if lacks_rule and space.dependency_group_id not in ruled:
                space.sparse_ratio = cap

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if max_steps is not None or max_epochs is not None:
            raise ConfigError(
                f"{type(self).__name__} doesn't train by itself: max_steps and max_epochs must be None, got "
                f"{max_steps} and {max_epochs} (compress)"
            )
        self.update_masks(self.generate_masks())

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        _NormPruner._register_trigger(self, evaluator)

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        """Leave the evaluator as it is: NNI reverts its patches."""
