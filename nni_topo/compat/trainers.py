"""Mends of NNI's ``TransformersEvaluator``, whose hooks into a Trainer's steps and losses are those of old Trainers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from nni.compression.utils import evaluator
from torch import Tensor


def patch_trainer_steps() -> bool:
    """Run a pruner's tasks at the optimizer steps of a transformers Trainer, those of every pruner once.

    Place: ``nni/compression/utils/evaluator.py``, ``TransformersEvaluator.patch_optimizer_step``. Cause: it takes
    ``trainer.deepspeed`` for the optimizer wherever the attribute exists, but it is None without DeepSpeed
    (seen with transformers 4.57), a messageless AssertionError. It also keeps one set of tasks for all pruners:
    of a schedule and its pruner the first set was lost and the second ran twice.

    Returns
    -------
    bool
        True if NNI's method was replaced, False if transformers isn't installed or the method isn't NNI's.
    """
    cls = evaluator.TransformersEvaluator
    if not evaluator.TRANSFORMERS_INSTALLED or cls.patch_optimizer_step is _patch_optimizer_step:
        return False
    if "deepspeed" not in inspect.unwrap(evaluator.HFTrainer.__init__).__code__.co_names:
        return False
    cls.patch_optimizer_step = _patch_optimizer_step
    return True


def pass_loss_arguments() -> bool:
    """Pass a Trainer's further arguments on to ``compute_loss`` when a pruner adds to the loss.

    Place: ``nni/compression/utils/evaluator.py``, ``TransformersEvaluator.patch_loss``. Cause: the method it puts
    in place knows no ``num_items_in_batch``, which Trainers pass (seen with transformers 4.57).

    Returns
    -------
    bool
        True if NNI's method was replaced, False if transformers isn't installed or has no such argument.
    """
    cls = evaluator.TransformersEvaluator
    if not evaluator.TRANSFORMERS_INSTALLED or cls.patch_loss is _patch_loss:
        return False
    if "num_items_in_batch" not in inspect.signature(evaluator.HFTrainer.compute_loss).parameters:
        return False
    cls.patch_loss = _patch_loss
    return True


def _patch_optimizer_step(
    self: Any, before_step_tasks: Sequence[Callable[[], None]], after_step_tasks: Sequence[Callable[[], None]]
) -> None:
    trainer = self.trainer

    class StepTasks(evaluator.PatchCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer: torch.optim.Optimizer = getattr(trainer, "deepspeed", None) or trainer.callback_handler.optimizer
            step = optimizer.step

            def step_with_tasks(*args: Any, **kwargs: Any) -> Any:
                for task in before_step_tasks:
                    task()
                result = step(*args, **kwargs)
                for task in after_step_tasks:
                    task()
                return result

            optimizer.step = step_with_tasks  # type: ignore[method-assign]

    trainer.add_callback(StepTasks())


def _patch_loss(self: Any, patch: Callable[[Tensor, Any], Tensor]) -> None:
    compute_loss = self.trainer.compute_loss

    def compute_patched_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        result = compute_loss(model, inputs, return_outputs, **kwargs)
        return (patch(result[0], inputs), result[1]) if return_outputs else patch(result, inputs)

    self.trainer.compute_loss = compute_patched_loss
