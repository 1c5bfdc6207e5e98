"""Run one cell: train or load, prune, make dense, measure, retrain."""

from __future__ import annotations

import copy
import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nni_topo import zoo
from nni_topo.errors import ConfigError
from nni_topo.pruners.hooks import Masks
from nni_topo.recovery import compensation, recalibrate_batch_norm
from nni_topo.pruners.registry import create_pruner, pruner_info
from nni_topo.runs.plan import Cell, DataChoice, ModelChoice, SCRATCH
from nni_topo.runs.records import Record, provenance
from nni_topo.runs.rivals import is_rival, rival_masks
from nni_topo.runs.scheduled import recipe_evaluator
from nni_topo.runs.widths import layer_ratios, pruning_config
from nni_topo.network.dense import to_dense
from nni_topo.network.zeros import zeros_held
from nni_topo.network.zeros import weights_left

LATENCY_BATCH = 64
_RECALIBRATION_IMAGES = 1024
STILL = 1e-30
"""Learning rate at which an evaluator measures gradients and leaves weights as they are."""


def run_cell(cell: Cell, out: Path) -> Record:
    """Run a cell and return its record.

    Parameters
    ----------
    cell : Cell
        What to run.
    out : Path
        Folder of the comparison; its ``checkpoints`` hold the trained models.

    Returns
    -------
    dict
        The cell's settings, accuracies in [0, 1] on the test images, MACs and parameters before and after, seconds,
        median latencies in milliseconds at a batch of 64 on one thread, peak memory in bytes, and provenance.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)
    device = resolve_device(cell.device)
    data = load_model_data(cell.model, cell.data)
    model, accuracy_before = trained_model(cell, data, out, device)
    example = data.test.tensors[0][:2].to(device)
    macs = zoo.count_macs(model, example)
    ratios = shared_ratios(cell, model, example, out)
    masks, prune_seconds = prune(cell, model, data, example, ratios)
    began = time.perf_counter()
    dense = to_dense(model, example, masks)
    speedup_seconds = time.perf_counter() - began
    record = {
        **cell_facts(cell),
        "sparse_ratios": ratios,
        "flops_before": macs,
        "flops": zoo.count_macs(dense, example),
        "params_before": zoo.count_params(model),
        "params": zoo.count_params(dense),
        "weights_left": weights_left(dense),
        "widths": layer_widths(dense),
        "accuracy_before": accuracy_before,
        "prune_seconds": prune_seconds,
        "speedup_seconds": speedup_seconds,
        **_latencies(model, dense, data.test.tensors[0][:LATENCY_BATCH].to(device)),
    }
    if cell.pruner.name == SCRATCH:
        dense, recipe = with_new_weights(dense, cell.seed), cell.train
    else:
        dense, recipe = _recovered(cell, model, masks, dense, data, record), cell.retrain
    if recipe.epochs:
        with zeros_held(dense):
            log = zoo.train(dense, data, recipe, seed=cell.seed, device=device)
        record["accuracy_retrained"] = zoo.evaluate(dense, data.test, device=device)
        record["retrain_seconds"] = log.seconds
    record["peak_memory_bytes"] = _peak_memory()
    record["seconds"] = time.perf_counter() - start
    return {**record, **provenance()}


def cell_facts(cell: Cell) -> Record:
    """Return what every record says of its cell."""
    return {
        "key": cell.key,
        "pruner": cell.pruner.row,
        "pruner_name": cell.pruner.name,
        "seed": cell.seed,
        "model": cell.model.label,
        "data": cell.data.name,
        "target": cell.target.label,
    }


def load_model_data(model: ModelChoice, data: DataChoice) -> zoo.DataBundle:
    """Load a data set, padded to the size that a model needs."""
    pad_to = zoo.model_info(model.name).pad_to
    bundle = zoo.load_data(data.name, data.data_dir, limit=data.limit, pad_to=pad_to, download=data.download)
    if data.test_limit is None:
        return bundle
    if data.test_limit < 1:
        raise ConfigError(f"test_limit must be at least 1, got {data.test_limit} (data)")
    return replace(bundle, test=TensorDataset(*bundle.test[: data.test_limit]))


def build_model(model: ModelChoice, data: zoo.DataBundle, seed: int) -> nn.Module:
    """Return an untrained model that fits a data set."""
    return zoo.create_model(
        model.name,
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        image_size=data.image_size,
        width=model.width,
        seed=seed,
    )


def trained_model(cell: Cell, data: zoo.DataBundle, out: Path, device: torch.device) -> tuple[nn.Module, float]:
    """Return the cell's trained model and its accuracy, from its checkpoint if there is one; else train and keep it."""
    model = build_model(cell.model, data, cell.seed)
    path = out / "checkpoints" / f"{cell.training_key}.pt"
    if path.exists():
        meta = zoo.load_checkpoint(path, model)
    else:
        log = zoo.train(model, data, cell.train, seed=cell.seed, device=device)
        accuracy = zoo.evaluate(model, data.test, device=device)
        meta = {"seed": cell.seed, "seconds": log.seconds, "accuracy": accuracy}
        zoo.save_checkpoint(path, model, meta)
    return model.to(device).eval(), float(meta["accuracy"])


def shared_ratios(cell: Cell, model: nn.Module, example: Tensor, out: Path) -> dict[str, float]:
    """Return every layer's ``sparse_ratio``; those solved for a budget are kept in ``ratios.json``.

    They depend on the architecture alone, so all seeds and pruners share them.
    """
    path = out / "ratios.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = f"{cell.model.label}, {tuple(example.shape[1:])}, {cell.target.label}"
    if key not in known:
        known[key] = layer_ratios(model, example, cell.target)
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return dict(known[key])


def prune(
    cell: Cell, model: nn.Module, data: zoo.DataBundle, example: Tensor, ratios: dict[str, float]
) -> tuple[Masks, float]:
    """Run the cell's pruner on a copy of the model; return its masks and the seconds it took.

    A pruner with the knob ``allocation`` deals out a budget of multiply-accumulates itself. A pruner that needs an
    evaluator gets one that leaves the weights as they are: at a rate of almost zero it measures gradients only.
    """
    if is_rival(cell.pruner.name):
        return rival_masks(cell.pruner.name, model, example, ratios)
    victim = copy.deepcopy(model)
    config_list = pruning_config(victim, example, ratios)
    name = "random" if cell.pruner.name == SCRATCH else cell.pruner.name
    info = pruner_info(name)
    knobs: dict[str, Any] = dict(cell.pruner.knobs)
    if "allocation" in knobs and cell.target.kind == "flops":
        knobs["target"] = {"flops": cell.target.value}
        config_list = [{key: item for key, item in entry.items() if key != "sparse_ratio"} for entry in config_list]
    if cell.pruner.calibration:
        knobs["calibration"] = calibration_batches(data, cell.pruner.calibration)
    if "example_inputs" in info.knobs():
        knobs["example_inputs"] = example
    if "evaluator" in info.needs:
        still = replace(cell.retrain, lr=STILL)
        knobs["evaluator"] = recipe_evaluator(victim, data, still, seed=cell.seed)
    began = time.perf_counter()
    pruner = create_pruner(name, victim, config_list, **knobs)
    _, masks = pruner.compress()
    return masks, time.perf_counter() - began


def calibration_batches(data: zoo.DataBundle, images: int) -> list[Tensor]:
    """Return the first training images, without labels, in batches of 128."""
    return list(data.train.tensors[0][:images].split(128))


def layer_widths(model: nn.Module) -> dict[str, int]:
    """Return the output channels of every convolution and linear layer, by module name."""
    return {
        name: int(module.weight.shape[0])
        for name, module in model.named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    }


def resolve_device(name: str) -> torch.device:
    """Return the device of a name: ``cpu``, ``cuda``, ``cuda:1`` or another that PyTorch can compute on here.

    ``auto`` is CUDA where it is there, else the CPU.

    Raises
    ------
    ConfigError
        If it isn't one.
    """
    there = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    if name == "cuda" and not there:
        raise ConfigError("device 'cuda' must be there to be used, got no CUDA device (device)")
    try:
        device = torch.device(name)
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device must be cpu, cuda or auto, or another that PyTorch can use, got {name!r}: {reason} (device)"
        ) from error
    return device


def with_new_weights(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a model with newly drawn weights."""
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in fresh.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    return fresh


def _recovered(
    cell: Cell, model: nn.Module, masks: Masks, dense: nn.Module, data: zoo.DataBundle, record: Record
) -> nn.Module:
    """Measure a pruned network as it is and with batch norms re-calibrated; return it, compensated if asked for."""
    device = next(dense.parameters()).device
    example = data.test.tensors[0][:2].to(device)
    record["accuracy_oneshot"] = zoo.evaluate(dense, data.test, device=device)
    images = [batch.to(device) for batch in calibration_batches(data, _RECALIBRATION_IMAGES)]
    record["accuracy_recalibrated"] = zoo.evaluate(recalibrate_batch_norm(dense, images), data.test, device=device)
    choice = cell.compensate
    if choice is None:
        return dense
    images = [batch.to(device) for batch in calibration_batches(data, choice.images)]
    done = compensation(model, masks, images, method=choice.method, refine=choice.refine)
    dense = to_dense(done.model, example, masks)
    record["accuracy_compensated"] = zoo.evaluate(dense, data.test, device=device)
    record["compensate_seconds"] = done.report.seconds
    return dense


def _latencies(model: nn.Module, dense: nn.Module, images: Tensor) -> Record:
    found = zoo.latencies({"before": model, "after": dense}, images)
    return {"latency_before_ms": found["before"], "latency_ms": found["after"], "latency_batch": len(images)}


def _peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
