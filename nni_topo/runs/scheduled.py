"""Pruning in rounds with training in between, by NNI's schedules over one of the package's pruners."""

from __future__ import annotations

import copy
import logging
from typing import Any, Literal

from nni.compression.pruning import AGPPruner, LinearPruner, scheduled_pruner
from torch import nn

from nni_topo import zoo
from nni_topo.errors import ConfigError, unknown_name
from nni_topo.network.speedup.dense import to_dense
from nni_topo.pruners.registry import create_pruner
from nni_topo.runs.choices import PrunerChoice
from nni_topo.runs.evaluators import batches_of, recipe_evaluator
from nni_topo.runs.run import Start, made_dense, prune, pruner_knobs

Schedule = Literal["one-shot", "linear", "agp"]
_SCHEDULERS = {"linear": LinearPruner, "agp": AGPPruner}


def prune_on_schedule(
    start: Start,
    pruner: PrunerChoice,
    config_list: list[dict[str, Any]],
    recipe: zoo.Recipe,
    *,
    schedule: Schedule,
    rounds: int = 4,
    finishing: int = 1,
) -> nn.Module:
    """Prune a copy of a network and train it, in rounds or at once, for the same number of epochs; return it dense.

    ``one-shot`` prunes all at the beginning, ``linear`` in equal steps, ``agp`` in steps that shrink (NNI's pruners);
    the pruner scores anew in each of the ``rounds``. All epochs of the recipe are spent, the last ``finishing`` ones,
    in [0, epochs - 1], on the dense network: while masks are in force a removed channel's batch-norm bias is still
    heard, and they make up for that. ConfigError if the schedule is unknown, a number is out of its range, there are
    more rounds than training steps, or the pruner refuses the request.
    """
    if schedule not in ("one-shot", *_SCHEDULERS):
        raise unknown_name("schedule", schedule, ("one-shot", *_SCHEDULERS), "schedule")
    if rounds < 1 or not 0 <= finishing < max(recipe.epochs, 1):
        raise ConfigError(
            f"rounds must be at least 1 and finishing in [0, {recipe.epochs - 1}], got {rounds} and {finishing} "
            "(prune_on_schedule)"
        )
    if schedule == "one-shot":
        pruned = prune(start, pruner, config_list)
        dense, _ = made_dense(start, pruned.masks)
        left = recipe
    else:
        victim = copy.deepcopy(start.net)
        knobs = {**pruner_knobs(pruner.name, victim, start, pruner.calibration), **pruner.knobs}
        knobs["evaluator"] = recipe_evaluator(victim, start.data, recipe, seed=start.seed)
        knobs.pop("training_steps", None)
        steps = (recipe.epochs - finishing) * batches_of(start.data, recipe)
        if rounds > steps:
            raise ConfigError(
                f"rounds must be at most the number of training steps before the last epochs, {steps}, got {rounds} "
                "(prune_on_schedule)"
            )
        inner = create_pruner(pruner.name, victim, config_list, **knobs)
        # NNI warns, on standard output, of pruners that aren't its own; the conformance checks test them.
        logger = logging.getLogger(scheduled_pruner.__name__)
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            scheduled = _SCHEDULERS[schedule](inner, interval_steps=max(1, steps // (rounds + 1)), total_times=rounds)
        finally:
            logger.setLevel(level)
        _, masks = scheduled.compress(max_steps=steps, max_epochs=None)
        scheduled.unwrap_model()
        dense = to_dense(victim, start.example, masks)
        left = recipe.for_retraining(finishing)
    zoo.train(dense, start.data, left, seed=start.seed, device=start.device)
    dense.eval()
    return dense
