"""Lightning's step limit is patched, and trainers are left alone where their packages aren't installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nni
import pytest
import pytorch_lightning as pl
import torch
import transformers
from nni.common import version
from nni.compression.utils import evaluator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from nni_topo.compat import evaluators


@pytest.fixture
def _not_imported_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """NNI's evaluators as they are while nobody has made one, whatever this process has imported."""
    for cls in (evaluator.LightningEvaluator, evaluator.TransformersEvaluator):
        cls.__new__(cls)  # other tests find both libraries in place again
    for library in ("pl", "HFTrainer"):
        monkeypatch.delattr(evaluator, library)
    monkeypatch.setattr(evaluator, "PatchCallback", object)
    for flag in ("LIGHTNING_INSTALLED", "TRANSFORMERS_INSTALLED"):
        monkeypatch.setattr(evaluator, flag, False)
    assert evaluators.import_trainers_late() is True
    assert evaluators.import_trainers_late() is False
    assert evaluator.LIGHTNING_INSTALLED
    assert evaluator.TRANSFORMERS_INSTALLED
    assert not hasattr(evaluator, "pl")
    assert not hasattr(evaluator, "HFTrainer")


@pytest.mark.usefixtures("_not_imported_yet")
def test_an_evaluator_brings_its_library() -> None:
    # no constructor runs where an evaluator is copied, or read from a file
    for cls in (evaluator.LightningEvaluator, evaluator.TransformersEvaluator):
        assert type(cls.__new__(cls)) is cls
    assert evaluator.pl is pl
    assert evaluator.HFTrainer is transformers.Trainer
    assert issubclass(evaluator.PatchCallback, transformers.TrainerCallback)
    assert version.version_dump()["pytorch_lightning"] == tuple(map(int, pl.__version__.split(".")[:2]))


@pytest.mark.usefixtures("_not_imported_yet")
@pytest.mark.parametrize("library", ["pytorch_lightning", "transformers"])
def test_a_library_that_cannot_be_imported_is_told(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    cls: Any = evaluator.LightningEvaluator if library == "pytorch_lightning" else evaluator.TransformersEvaluator
    with pytest.raises(AssertionError, match=f"^{library} is not installed"):
        cls(None, None)


class Line(pl.LightningModule):
    """A linear model that counts its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.steps = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return nni.trace(torch.optim.SGD)(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.ones(12, 2)), batch_size=2)


@pytest.mark.parametrize(
    ("limits", "steps"), [({"max_steps": 4}, 4), ({"max_steps": 15}, 15), ({"max_epochs": 1}, 6), ({}, 12)]
)
def test_lightning_trains_for_so_many_steps(limits: dict[str, int], steps: int, tmp_path: Path) -> None:
    model = Line()
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    trainer = nni.trace(pl.Trainer)(max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    driver = evaluator.LightningEvaluator(trainer, nni.trace(Data)())
    driver._init_optimizer_helpers(model)
    driver.bind_model(model)
    driver.train(**limits)
    assert model.steps == steps
    assert model._trainer is None
