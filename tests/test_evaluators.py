"""NNI's Torch, Lightning and Transformers evaluators drive the package's pruners and NNI's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nni
import pytest
import pytorch_lightning as pl
import torch
import transformers
from nni.compression import LightningEvaluator, TransformersEvaluator
from nni.compression.base.compressor import Pruner
from nni.compression.pruning import AGPPruner, LinearPruner, MovementPruner, SlimPruner, TaylorPruner
from torch import Tensor, nn

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.hooks import called
from nni_topo.testing import toy_evaluator, toy_images, toy_model

Setup = Callable[[], tuple[nn.Module, Any]]
SPARSE = {"sparse_ratio": 0.5}


def torch_setup() -> tuple[nn.Module, Any]:
    model = toy_model()
    return model, toy_evaluator(model)


def kept(masks: dict[str, dict[str, Tensor]], name: str) -> int:
    weight = masks[name]["weight"]
    return int(weight.reshape(len(weight), -1)[:, 0].sum())


def ours(setup: Setup, cls: Callable[..., Pruner], layers: dict[str, int], schedule: Any = LinearPruner) -> None:
    """Prune in steps while the model trains."""
    model, evaluator = setup()
    pruner = schedule(cls(model, [{"op_names": list(layers), **SPARSE}], evaluator), 2, 2)
    _, masks = pruner.compress(max_steps=6, max_epochs=None)
    pruner.unwrap_model()
    assert {name: kept(masks, name) for name in layers} == layers


def trained(setup: Setup, cls: Callable[..., Pruner], layers: dict[str, int]) -> None:
    """Prune by what three steps of training tell."""
    model, evaluator = setup()
    _, masks = cls(model, [{"op_names": list(layers), **SPARSE}], evaluator, training_steps=3).compress()
    assert {name: kept(masks, name) for name in layers} == layers


def movement(setup: Setup, layers: list[str]) -> None:
    model, evaluator = setup()
    config = [{"op_names": layers, "sparse_threshold": 0.4, "granularity": "default"}]
    pruner = MovementPruner(model, config, evaluator, warmup_step=2, cooldown_begin_step=5)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in layers}
    _, masks = pruner.compress(max_steps=7, max_epochs=None)
    pruner.unwrap_model()
    for name in layers:
        assert set(masks[name]["weight"].unique().tolist()) <= {0.0, 1.0}
        assert not torch.equal(before[name], model.get_submodule(name).weight)


TOY = {"stem": 4, "inner": 4, "hidden": 8}


@pytest.mark.parametrize("cls", [nni_topo.TopologicalPruner, nni_topo.RandomPruner])
def test_torch_evaluator_drives_our_pruners(cls: type[Pruner]) -> None:
    ours(torch_setup, cls, TOY)


def test_torch_evaluator_drives_nnis_pruners() -> None:
    trained(torch_setup, TaylorPruner, TOY)
    trained(torch_setup, SlimPruner, {"norm": 4})
    movement(torch_setup, ["hidden"])


def test_recovery_takes_an_evaluators_images() -> None:
    model, evaluator = torch_setup()
    pruner = nni_topo.RandomPruner(model, [{"op_names": ["stem", "hidden"], **SPARSE}], evaluator)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    model.eval()  # else the batch norms learn from what is evaluated here
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluated: list[Tensor] = []
    with called(model, lambda args, _: evaluated.append(args[0])):
        evaluator.bind_model(model)
        evaluator.evaluate()
        evaluator.unbind_model()
    for recover in (
        lambda data: nni_topo.compensate(model, masks, data),
        lambda data: nni_topo.distill(nni_topo.masked_model(model, evaluated[0], masks), model, data, steps=3),
        lambda data: nni_topo.recalibrate_batch_norm(model, data),
    ):
        given, by_evaluator = recover(evaluated), recover(evaluator)
        for one, other in zip(given.state_dict().values(), by_evaluator.state_dict().values(), strict=True):
            assert torch.equal(one, other)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    whole, fresh = torch_setup()
    nni_topo.recalibrate_batch_norm(whole, fresh)
    assert not fresh._initialization_complete
    evaluator.bind_model(model)
    with pytest.raises(
        ConfigError, match="an evaluator that serves as calibration must not be in use, got one that has a model"
    ):
        nni_topo.compensate(model, masks, evaluator)


def test_an_evaluator_that_fails_is_named_with_its_error() -> None:
    model, evaluator = torch_setup()
    evaluator.evaluating_func = lambda net: net(torch.zeros(1, 5))
    with pytest.raises(
        ConfigError,
        match=r"an evaluator that serves as images must evaluate the model, got RuntimeError: .*\(TorchEval",
    ):
        nni_topo.shrink(model, evaluator, {"flops": 0.5})
    evaluator.evaluating_func = lambda net: 0.5
    with pytest.raises(DataError, match=r"must call the model, got no call \(evaluator\)"):
        nni_topo.shrink(toy_model(), evaluator, {"flops": 0.5})


def lightning_setup() -> tuple[nn.Module, Any]:
    images, labels = toy_images(), torch.arange(32) % 4
    batches = [(images[start : start + 4], labels[start : start + 4]) for start in range(0, 32, 4)]

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            for name, module in toy_model().named_children():
                self.add_module(name, module)

        def forward(self, images: Tensor) -> Tensor:
            return type(toy_model()).forward(self, images)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def test_step(self, batch: Any, index: int) -> None:
            self.log("default", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> Any:
            return nni.trace(torch.optim.SGD)(self.parameters(), lr=0.01)

    class Batches(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(batches, batch_size=None)

        test_dataloader = train_dataloader

    trainer = nni.trace(pl.Trainer)(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return Net(), LightningEvaluator(trainer, nni.trace(Batches)())


def test_lightnings_optimizers_that_nni_cannot_trace_are_named() -> None:
    model, evaluator = lightning_setup()
    small = nni_topo.shrink(model, evaluator, {"flops": 0.5}, compensate=None, distill=False)
    assert type(small) is type(model)
    type(model).configure_optimizers = lambda self: torch.optim.SGD(self.parameters(), lr=0.01)
    _, fresh = lightning_setup()
    with pytest.raises(ConfigError, match=r"must evaluate the model, got AssertionError: Please use nni\.trace"):
        nni_topo.shrink(model, fresh, {"flops": 0.5})


def test_lightning_drives_our_pruners() -> None:
    ours(lightning_setup, nni_topo.TopologicalPruner, TOY)
    ours(lightning_setup, nni_topo.RandomPruner, TOY)


# Each evaluates between two steps of training, but for reconstruction, which evaluated before.
ON_DATA: dict[str, Callable[..., Pruner]] = {
    "cluster": nni_topo.ClusterPruner,
    "reconstruction": nni_topo.ReconstructionPruner,
    "functional": partial(nni_topo.TopologicalPruner, cloud="functional"),
}


@pytest.mark.parametrize("name", ON_DATA)
def test_lightning_and_agp_drive_pruners_that_look_at_data(name: str) -> None:
    ours(lightning_setup, ON_DATA[name], TOY, AGPPruner)


def test_lightnings_progress_bars_leave_its_training_alone(tmp_path: Path) -> None:
    model, evaluator = lightning_setup()
    evaluator.trainer = nni.trace(pl.Trainer)(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, logger=False)
    ours(lambda: (model, evaluator), nni_topo.ClusterPruner, TOY)


def test_lightning_drives_nnis_pruners() -> None:
    trained(lightning_setup, TaylorPruner, TOY)
    trained(lightning_setup, SlimPruner, {"norm": 4})
    movement(lightning_setup, ["hidden"])


@pytest.fixture(params=["SGD", "default"])
def bert_setup(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """A BERT of one layer with random weights, trained on random tokens by SGD or by the optimizer of Transformers."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def setup() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 12}
        config = transformers.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_labels=2)
        model = transformers.BertForSequenceClassification(config)
        tokens = torch.randint(40, (16, 8))
        data = [{"input_ids": row, "attention_mask": row * 0 + 1, "labels": i % 2} for i, row in enumerate(tokens)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=6,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        given: dict[str, Any] = {}
        if request.param == "SGD":
            given["optimizers"] = (nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01), None)
        trainer = nni.trace(transformers.Trainer)(model, arguments, train_dataset=data, eval_dataset=data, **given)
        return model, TransformersEvaluator(trainer)

    return setup


INTERMEDIATE = "bert.encoder.layer.0.intermediate.dense"


def test_transformers_drives_our_pruners(bert_setup: Setup) -> None:
    ours(bert_setup, nni_topo.TopologicalPruner, {INTERMEDIATE: 12})
    ours(bert_setup, nni_topo.ClusterPruner, {INTERMEDIATE: 12}, AGPPruner)


def test_transformers_drives_nnis_pruners(bert_setup: Setup) -> None:
    trained(bert_setup, TaylorPruner, {INTERMEDIATE: 12})
    trained(bert_setup, SlimPruner, {INTERMEDIATE: 12})
    movement(bert_setup, [INTERMEDIATE])


@pytest.mark.parametrize("bert_setup", ["default"], indirect=True)
def test_the_default_optimizer_is_that_of_the_trainer(bert_setup: Setup) -> None:
    model, evaluator = bert_setup()
    trainer = transformers.Trainer(model, evaluator.traced_trainer.args)
    decayed, plain = trainer.create_optimizer().param_groups
    evaluator._init_optimizer_helpers(model)
    evaluator.bind_model(model)
    own = evaluator.trainer.optimizer
    assert type(own).__name__ == "AdamW"
    for group, expected in zip(own.param_groups, (decayed, plain), strict=True):
        assert [id(each) for each in group["params"]] == [id(each) for each in expected["params"]]
        assert (group["lr"], group["weight_decay"]) == (expected["lr"], expected["weight_decay"])
    evaluator.unbind_model()
    assert transformers.Trainer(model, trainer.args).create_optimizer().param_groups  # no other Trainer has changed


def test_transformers_adds_to_the_loss(bert_setup: Setup) -> None:
    model, evaluator = bert_setup()
    evaluator._init_optimizer_helpers(model)
    evaluator.bind_model(model)
    losses: list[float] = []

    def double(loss: Tensor, batch: Any) -> Tensor:
        losses.append(loss.item())
        return 2 * loss

    evaluator.patch_loss(double)
    evaluator.train(max_steps=3)
    assert len(losses) == 3
    evaluator.unbind_model()
