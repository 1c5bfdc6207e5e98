"""Patches of NNI's evaluators. Nothing here imports a trainer library before an evaluator needs it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import nni
import torch
from nni.common import version
from nni.compression.utils import evaluator
from torch import Tensor


def import_trainers_late() -> bool:
    """Import Lightning and Transformers when an evaluator for them is made.

    Place: ``nni/compression/utils/evaluator.py`` and ``nni/common/version.py``. Cause: they import the libraries at
    once if these are installed, so that each new process takes seconds longer to start.
    """

    def import_lightning() -> None:
        """Import Lightning for NNI's evaluators; if that fails, mark it as not installed."""
        if hasattr(evaluator, "pl"):
            return
        try:
            evaluator.pl = importlib.import_module("pytorch_lightning")
        except ImportError:
            evaluator.LIGHTNING_INSTALLED = False

    def import_trainer() -> None:
        """Import the Trainer of Transformers for NNI's evaluators, with a base class for its callbacks."""
        if hasattr(evaluator, "HFTrainer"):
            return
        try:
            from transformers import TrainerCallback
            from transformers.trainer import Trainer
        except ImportError:
            evaluator.TRANSFORMERS_INSTALLED = False
            return

        class PatchCallback(TrainerCallback):
            """Stands in for the class that NNI defines if Transformers is installed."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                """Do nothing; NNI's tasks are in subclasses."""

        PatchCallback.__module__, PatchCallback.__qualname__ = evaluator.__name__, "PatchCallback"
        evaluator.PatchCallback = PatchCallback
        evaluator.HFTrainer = Trainer

    is_late = False
    if not evaluator.LIGHTNING_INSTALLED and importlib.util.find_spec("pytorch_lightning") is not None:
        # NNI passes the version on to its manager
        version.PYTORCH_LIGHTNING_VERSION = version._minor_version_tuple(metadata.version("pytorch_lightning"))
        _prepare(evaluator.LightningEvaluator, import_lightning)
        evaluator.LIGHTNING_INSTALLED = True
        is_late = True
    if not evaluator.TRANSFORMERS_INSTALLED and importlib.util.find_spec("transformers") is not None:
        _prepare(evaluator.TransformersEvaluator, import_trainer)
        evaluator.TRANSFORMERS_INSTALLED = True
        is_late = True
    return is_late


def _prepare(cls: type, prepare: Callable[[], None]) -> None:
    """Run a function before each object of a class is created, also by copying or unpickling."""

    def make(kind: type, *args: Any, **kwargs: Any) -> Any:
        prepare()
        return object.__new__(kind)

    cls.__new__ = make  # type: ignore[assignment, method-assign]


def run_lightning() -> bool:
    """Let ``LightningEvaluator`` limit the number of training steps, and evaluate a model while it trains.

    Place: ``nni/compression/utils/evaluator.py``, ``LightningEvaluator``. Cause: ``train`` assigns
    ``trainer.fit_loop.max_steps``, which is read-only in PyTorch Lightning 2.x. ``evaluate`` leaves the model without a
    trainer, so that an evaluation between two training steps ends the training; it also shows a second progress bar,
    which Rich's console refuses.
    """
    if not evaluator.LIGHTNING_INSTALLED:
        return False

    def train(self: Any, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Train the bound module with a fresh copy of the trainer; without arguments the trainer's own limits hold."""
        trainer = self.trainer.trace_copy().get()
        # sanity batches before training would run through the pruner's hooks
        trainer.num_sanity_val_steps = 0
        if max_steps:
            trainer.fit_loop.epoch_loop.max_steps = max_steps
            trainer.fit_loop.max_epochs = -1  # otherwise the trainer's number of epochs may end the training early
        if max_epochs:
            trainer.fit_loop.max_epochs = max_epochs
        trainer.fit(self.model, self.data_module)
        # a trainer left on the model would be saved with it
        self.model.trainer = None

    def evaluate(self: Any) -> tuple[float | None, list[dict[str, float]]]:
        """Test the bound module with a fresh copy of the trainer; a training in progress continues afterwards."""
        trainer = self.trainer.trace_copy().get()
        training = self.model._trainer
        if training is not None and trainer.progress_bar_callback is not None:
            trainer.callbacks.remove(trainer.progress_bar_callback)
        try:
            results = trainer.test(self.model, self.data_module, verbose=training is None)
        finally:
            self.model.trainer = training
            if training is not None:
                self.data_module.trainer = training
        scores = [metrics["default"] for metrics in results if "default" in metrics]
        return (sum(scores) / len(scores) if scores else None), results

    evaluator.LightningEvaluator.train, evaluator.LightningEvaluator.evaluate = train, evaluate
    return True


def patch_trainer_steps() -> bool:
    """Run the tasks of every pruner exactly once at each optimizer step of a transformers Trainer.

    Place: ``nni/compression/utils/evaluator.py``, ``TransformersEvaluator.patch_optimizer_step``. Cause: it uses
    ``trainer.deepspeed`` as the optimizer if the attribute exists, even if it is None (transformers 4.57): an
    AssertionError without a message. It also keeps one set of tasks for all pruners: with a scheduled pruner around
    another pruner, the first set was lost and the second ran twice.
    """
    if not evaluator.TRANSFORMERS_INSTALLED:
        return False

    def patch_optimizer_step(
        self: Any, before_step_tasks: Sequence[Callable[[], None]], after_step_tasks: Sequence[Callable[[], None]]
    ) -> None:
        trainer = self.trainer

        class StepTasks(evaluator.PatchCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                optimizer: torch.optim.Optimizer = (
                    getattr(trainer, "deepspeed", None) or trainer.callback_handler.optimizer
                )
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

    evaluator.TransformersEvaluator.patch_optimizer_step = patch_optimizer_step
    return True


def make_default_optimizer() -> bool:
    """Let ``TransformersEvaluator`` take a Trainer without ``optimizers=``, which then makes its default optimizer.

    Place: ``nni/compression/utils/evaluator.py``, ``TransformersEvaluator._init_optimizer_helpers``. Cause: it replaces
    ``Trainer.get_optimizer_cls_and_kwargs`` by a function that takes the training arguments only; Trainers pass the
    model too (transformers 4.57): a TypeError, then in every Trainer of the process.
    """
    cls = evaluator.TransformersEvaluator
    if not evaluator.TRANSFORMERS_INSTALLED:
        return False
    initialize = cls._init_optimizer_helpers

    @functools.wraps(initialize)
    def initialize_with_optimizer(self: Any, pure_model: Any) -> None:
        trainer = self.traced_trainer
        if trainer.optimizer is not None:
            initialize(self, pure_model)
            return
        choose = trainer.get_optimizer_cls_and_kwargs

        def choose_traced(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            kind, settings = choose(*args, **kwargs)
            return nni.trace(kind), settings

        trainer.get_optimizer_cls_and_kwargs = choose_traced
        try:
            trainer.create_optimizer()
            initialize(self, pure_model)
        finally:
            del trainer.get_optimizer_cls_and_kwargs
            trainer.optimizer = None

    cls._init_optimizer_helpers = initialize_with_optimizer
    return True


def pass_loss_arguments() -> bool:
    """Pass all keyword arguments on to ``Trainer.compute_loss`` when a pruner changes the loss.

    Place: ``nni/compression/utils/evaluator.py``, ``TransformersEvaluator.patch_loss``. Cause: its ``compute_loss``
    doesn't take ``num_items_in_batch``, which Trainers pass (transformers 4.57).
    """
    if not evaluator.TRANSFORMERS_INSTALLED:
        return False

    def patch_loss(self: Any, patch: Callable[[Tensor, Any], Tensor]) -> None:
        compute_loss = self.trainer.compute_loss

        def compute_patched_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            result = compute_loss(model, inputs, return_outputs, **kwargs)
            return (patch(result[0], inputs), result[1]) if return_outputs else patch(result, inputs)

        self.trainer.compute_loss = compute_patched_loss

    evaluator.TransformersEvaluator.patch_loss = patch_loss
    return True
