"""The base class of the package's structured pruners: NNI's Pruner with three hooks.

A pruner of this kind is a data collector, a metric calculator and a sparsity allocator. NNI's three stages call them,
so the pruner also works inside NNI's scheduled pruners::

    config_list -> NNI wraps the model -> DataCollector -> MetricCalculator -> SparsityAllocator -> masks
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.hooks import (
    ConfigAllocator,
    Data,
    DataCollector,
    Masks,
    MetricCalculator,
    Metrics,
    PruningContext,
    SparsityAllocator,
)
from nni_topo.hooks.units import is_active
from nni_topo.pruners.checks import check_request

_logger = logging.getLogger(__name__)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class StructuredPruner(Pruner):
    """Prune whole filters and neurons by a collector, a metric and an allocator.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune. NNI wraps it; ``unwrap_model()`` takes the wrappers off again.
    config_list : list of dict
        NNI's config_list; keys of NNI 2 are rewritten, see :func:`~nni_topo.pruners.legacy.modern_config`.
    evaluator : nni.compression.utils.Evaluator or None, default=None
        Needed for scheduled pruning, and by collectors that have no calibration data.
    existed_wrappers : dict or None, default=None
        Used by ``from_compressor``.
    collector : DataCollector
        What is looked at.
    calculator : MetricCalculator
        How it is scored; larger = keep.
    allocator : SparsityAllocator or None, default=None
        How much goes. None: :class:`~nni_topo.hooks.ConfigAllocator`.

    Raises
    ------
    ConfigError, DataError
        If the request is bad, before the model is wrapped; see :func:`~nni_topo.pruners.checks.check_request`.

    Notes
    -----
    ``unwrap_model()`` restores the unmasked weights as *new* Parameters: an optimizer made before doesn't know them.
    ``interval_steps``, ``total_times`` and ``first_step_gen`` mean what they mean for NNI's own pruners;
    ``LinearPruner`` and ``AGPPruner`` set them.

    At the default granularity a transposed convolution (without groups) loses output channels, and its bias with
    them. NNI's own pruners take its input channels and fail on the bias.
    """

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
    ) -> None:
        config_list = check_request(model, config_list, existed_wrappers)
        self.collector = collector
        self.calculator = calculator
        self.allocator = ConfigAllocator() if allocator is None else allocator
        self.interval_steps = -1
        self.total_times: int | Literal["unlimited"] = 1
        self.first_step_gen = False
        super().__init__(model, config_list, evaluator, existed_wrappers)
        self._target_spaces = self._in_network_order()

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
        """
        model, masks = super().compress(max_steps, max_epochs)
        return model, masks

    def update_masks(self, masks: Masks) -> None:
        """Put masks into the wrapped model; those of modules that this pruner doesn't know are left out.

        NNI's own pruners promise the same and raise a KeyError.

        Parameters
        ----------
        masks : dict
            ``{module name: {target name: mask}}``.
        """
        unknown = sorted(masks.keys() - self._module_wrappers.keys())
        if unknown:
            _logger.warning("masks of modules that aren't pruned here are left out: %s", ", ".join(unknown))
        super().update_masks({name: targets for name, targets in masks.items() if name in self._module_wrappers})

    def _set_default_sparse_granularity(self, target_space: PruningTargetSpace) -> list[int] | str | None:
        if _loses_outputs_transposed(target_space):
            return "in_channel"  # NNI's name for the second dimension, here the output channels
        granularity: list[int] | str | None = super()._set_default_sparse_granularity(target_space)
        return granularity

    def _register_scalers(self) -> None:
        super()._register_scalers()
        for spaces in self._target_spaces.values():
            for space in spaces.values():
                source = spaces.get(space.align["target_name"]) if space.align is not None else None
                if source is not None and source.granularity == "in_channel" and _loses_outputs_transposed(source):
                    space._setting["align"] = {**space.align, "dims": [1]}

    def _collect_data(self) -> Data:
        return self.collector.collect(self._context())

    def _calculate_metrics(self, data: Data) -> Metrics:
        return self.calculator.calculate(data, self._context())

    def _generate_sparsity(self, metrics: Metrics) -> Masks:
        return self.allocator.allocate(metrics, self._context())

    def _context(self) -> PruningContext:
        names = self._get_param_names_map() if self._is_wrapped else {}
        return PruningContext(self.bound_model, self._target_spaces, self.evaluator, names)

    def _activate_targets(self) -> None:
        """Make every configured weight a target of its own, for pruners that say themselves how much goes."""
        for spaces in self._target_spaces.values():
            for space in spaces.values():
                if space.align is None and space.target is not None and not is_active(space):
                    space.sparse_ratio = 0.0

    def _in_network_order(self) -> Any:
        order = {name: index for index, (name, _) in enumerate(self.bound_model.named_modules(remove_duplicate=False))}
        return dict(sorted(self._target_spaces.items(), key=lambda item: order[item[0]]))

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        if max_steps is not None or max_epochs is not None:
            raise ConfigError(
                f"{type(self).__name__} doesn't train by itself: max_steps and max_epochs must be None, got "
                f"{max_steps} and {max_epochs} (compress)"
            )
        self.update_masks(self.generate_masks())

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        schedule = _Schedule(self)
        evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[schedule.step])

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        """Leave the evaluator as it is: NNI reverts its patches."""


def _loses_outputs_transposed(space: PruningTargetSpace) -> bool:
    """Say whether a target is the weight of a transposed convolution, its output channels in dimension 1."""
    module = space._wrapper.module
    return isinstance(module, _TRANSPOSED) and module.groups == 1 and space.type is TargetType.PARAMETER


class _Schedule:
    """Makes masks at the optimizer steps that a scheduled pruner asks for."""

    def __init__(self, pruner: StructuredPruner) -> None:
        self.pruner = pruner
        self.steps = 0
        self.first = True
        self.remaining: float = torch.inf if pruner.total_times == "unlimited" else pruner.total_times

    def step(self) -> None:
        """Count one optimizer step; make masks when the interval is over."""
        self.steps += 1
        due = self.steps == self.pruner.interval_steps
        if due or (self.first and self.pruner.first_step_gen):
            self.pruner.update_masks(self.pruner.generate_masks())
            self.remaining -= 1
            _logger.debug("%s made masks, %s times remaining", type(self.pruner).__name__, self.remaining)
        if due and self.remaining > 0:
            self.steps = 0
        self.first = False
