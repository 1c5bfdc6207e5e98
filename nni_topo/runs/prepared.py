"""What `shrink` and `frontier` do once, before they make networks, and the report of each network that they return."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from nni_topo.network.attention.config import is_pretrained
from nni_topo.network.io.checkpoint import why_undescribed
from nni_topo.network.layers.kinds import with_transposed_weights
from nni_topo.network.runtime.arguments import check_model
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.reports import give_report
from nni_topo.pruners.budget import AUTO, Budget, BudgetOutcome
from nni_topo.runs.allocating import Tried
from nni_topo.runs.depth import DepthPipeline
from nni_topo.runs.images import ImageParts
from nni_topo.runs.measurements import UNPRUNED, Measurements
from nni_topo.runs.pipeline import Pipeline, RecoveredNetwork, plain_weights
from nni_topo.runs.report import ShrinkReport
from nni_topo.runs.settings import Settings

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A checked request: the network to make smaller, and the budget."""

    model: nn.Module  # with plain weights
    budget: Budget
    is_described: bool  # whether a config of Transformers has to describe the smaller network
    warnings: tuple[str, ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        images: Calibration,
        settings: Settings,
        budget: Budget,
        tolerance: float | None = None,
    ) -> Asked:
        """Check a request before any work."""
        check_model(model)
        settings.check_layers(model)
        settings.check_budget(budget)
        settings.check_shared(images, budget, tolerance)
        budget, is_described = settings.as_described(model, budget)
        model, warnings = plain_weights(model)
        return cls(model, budget, is_described, warnings)


@dataclass(frozen=True)
class Prepared:
    """A pipeline, and the measurements of its networks, of which the unpruned one is measured."""

    asked: Asked
    pipeline: Pipeline
    measured: Measurements

    @classmethod
    def of(
        cls, asked: Asked, images: ImageParts, settings: Settings, *, is_search: bool, is_sized: bool = False
    ) -> Prepared:
        """Find the layers to prune, and the blocks, and measure the unpruned network.

        ``is_sized``: whether the share of the budget is asked for; then a warning says if it can't be reached.
        """
        model, budget = asked.model, asked.budget
        settings.check_distillation(model, images.all)
        pipeline = Pipeline.of(
            model, images, settings, budget.kind, is_search=is_search, is_described=asked.is_described
        )
        if is_sized and not settings.depth:
            pipeline.tell_reachable(budget)
        measured = Measurements(model, images, settings.evaluate, settings.outputs)
        measured.add(UNPRUNED, model)
        if settings.depth:
            pipeline = DepthPipeline.on(pipeline, budget)
        return cls(asked, pipeline, measured)

    def report(
        self,
        network: nn.Module,
        budget: Budget,
        recovered: RecoveredNetwork | None,
        tried: tuple[Tried, ...],
        warnings: tuple[str, ...] = (),
        *,
        outcome: BudgetOutcome | None,
        **found: Any,
    ) -> ShrinkReport:
        """Give a network its report, and return it; ``found`` are other fields of it."""
        pipeline, images, settings = self.pipeline, self.pipeline.images, self.pipeline.settings
        compensation = None if recovered is None else recovered.report
        allocation = "" if settings.chooses_how_many else str(budget.allocation)
        if allocation == AUTO:
            allocation = next((each.allocation for each in tried if each.is_chosen), "")
        report = ShrinkReport(
            compensation=compensation,
            depth=None if recovered is None else recovered.depth,
            tried=tried,
            budget=outcome,
            images=images.learned.samples_of_all,
            held_out=0 if images.held_out is None else images.held_out.samples_of_all,
            warnings=(
                *self.asked.warnings,
                *warnings,
                *(() if compensation is None else compensation.warnings),
                *pipeline.warnings,
            ),
            whole=pipeline.prunable.unpruned,
            outputs=self.measured.answers.named,
            pruner=settings.pruner_name,
            allocation=allocation,
            equal_blocks=bool(budget.equal_blocks),
            recovery=settings.recovery_name,
            undescribed=_told_by_config(network, self.asked.is_described),
            grouped=images.all.groups is not None,
            **found,
        )
        if not give_report(network, report):
            _logger.warning(
                "the model has an attribute of its own called report, so that this is only told here: %s", report
            )
        return report


def _told_by_config(network: nn.Module, is_described: bool) -> str:
    """Let a network of Transformers be as its config describes it, and return what the config can't say."""
    if is_described:
        with_transposed_weights(network)
    return why_undescribed(network) if is_pretrained(network) else ""
