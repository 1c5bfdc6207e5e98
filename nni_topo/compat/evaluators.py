"""Mends of NNI's evaluators. Nothing here imports a trainer library that NNI itself hasn't imported."""

from __future__ import annotations

from typing import Any

from nni.compression.utils import evaluator


def set_lightning_steps() -> bool:
    """Let ``LightningEvaluator`` limit the number of training steps.

    Place: ``nni/compression/utils/evaluator.py``, ``LightningEvaluator.train``. Cause: it assigns
    ``trainer.fit_loop.max_steps``, which PyTorch Lightning 2.x only lets read; the limit lives on the loop
    over an epoch (any PyTorch and Python).

    Returns
    -------
    bool
        True if ``train`` was replaced, False if Lightning isn't installed, has the setter, or NNI doesn't
        need it.
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
    """Train the bound module with a fresh copy of the trainer, for at most so many steps and epochs.

    Parameters
    ----------
    self : LightningEvaluator
        The evaluator, with a model bound to it.
    max_steps : int, optional
        Number of optimizer steps after which training ends; the trainer's own limit by default.
    max_epochs : int, optional
        Number of epochs after which training ends; the trainer's own limit by default.
    """
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
