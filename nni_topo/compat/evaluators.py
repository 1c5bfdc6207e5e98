"""Mends of NNI's evaluators. Nothing here imports a trainer library that NNI itself hasn't imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from nni.compression.utils import evaluator
from torch import Tensor


def set_lightning_steps() -> bool:
    """Let ``LightningEvaluator`` limit the number of training steps.

    Place: ``nni/compression/utils/evaluator.py``, ``LightningEvaluator.train``. Cause: it assigns
    ``trainer.fit_loop.max_steps``, which PyTorch Lightning 2.x only lets read; the limit lives on the loop over an
    epoch (any PyTorch and Python). Returns True if ``train`` was replaced, False if Lightning isn't installed, has the
    setter, or NNI doesn't need it.
    """
    train = evaluator.LightningEvaluator.train
    if not evaluator.LIGHTNING_INSTALLED or train is _train_lightning or _can_set_steps():
        return False
    evaluator.LightningEvaluator.train = _train_lightning
    return True


def _can_set_steps() -> bool:
    """Tell whether the fit loop of the installed Lightning takes ``max_steps``."""
    from pytorch_lightning.loops import fit_loop

    loop = getattr(fit_loop, "_FitLoop", None) or fit_loop.FitLoop
    limit = getattr(loop, "max_steps", None)
    return not isinstance(limit, property) or limit.fset is not None


def _train_lightning(self: Any, max_steps: int | None = None, max_epochs: int | None = None) -> None:
    """Train the bound module with a fresh copy of the trainer, whose own limits hold where none is given."""
    trainer = self.trainer.trace_copy().get()
    # sanity batches before training would run through the pruner's hooks
    trainer.num_sanity_val_steps = 0
    if max_steps:
        trainer.fit_loop.epoch_loop.max_steps = max_steps
    if max_epochs:
        trainer.fit_loop.max_epochs = max_epochs
    trainer.fit(self.model, self.data_module)
    # a trainer left on the model would be saved with it
    self.model.trainer = None


def patch_trainer_steps() -> bool:
    """Run a pruner's tasks at the optimizer steps of a transformers Trainer, those of every pruner once.

    Place: ``nni/compression/utils/evaluator.py``, ``TransformersEvaluator.patch_optimizer_step``. Cause: it takes
    ``trainer.deepspeed`` for the optimizer wherever the attribute exists, but it is None without DeepSpeed (seen with
    transformers 4.57), a messageless AssertionError. It also keeps one set of tasks for all pruners: of a schedule and
    its pruner the first set was lost and the second ran twice. Returns True if NNI's method was replaced, False if
    transformers isn't installed or the method isn't NNI's.
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

    Place: ``nni/compression/utils/evaluator.py``, ``TransformersEvaluator.patch_loss``. Cause: the method it puts in
    place knows no ``num_items_in_batch``, which Trainers pass (seen with transformers 4.57). Returns True if NNI's
    method was replaced, False if transformers isn't installed or has no such argument.
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
