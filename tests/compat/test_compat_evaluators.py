"""Lightning's step limit is mended where Lightning is installed, and nothing is imported where it isn't."""

from __future__ import annotations

import sys

from nni.compression.utils import evaluator

from nni_topo.compat import CompatReport, evaluators


def test_mend_is_applied_where_lightning_is_installed_only(compat_report: CompatReport) -> None:
    assert ("set_lightning_steps" in compat_report.applied) is evaluator.LIGHTNING_INSTALLED
    assert ("pytorch_lightning" in sys.modules) is evaluator.LIGHTNING_INSTALLED
    assert evaluators.set_lightning_steps() is False


if evaluator.LIGHTNING_INSTALLED:
    from pathlib import Path

    import nni
    import pytest
    import pytorch_lightning as pl
    import torch
    from torch import Tensor
    from torch.utils.data import DataLoader, TensorDataset

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

    @pytest.mark.parametrize(("limits", "steps"), [({"max_steps": 4}, 4), ({"max_epochs": 1}, 6), ({}, 12)])
    def test_lightning_trains_for_so_many_steps(limits: dict[str, int], steps: int, tmp_path: Path) -> None:
        trainer = nni.trace(pl.Trainer)(
            max_epochs=2,
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
        )
        driver = evaluator.LightningEvaluator(trainer, nni.trace(Data)())
        model = Line()
        driver._init_optimizer_helpers(model)
        driver.bind_model(model)
        driver.train(**limits)
        assert model.steps == steps
