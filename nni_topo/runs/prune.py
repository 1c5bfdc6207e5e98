"""Prune one trained model as a YAML file says: the library function behind ``nni-topo prune``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from nni_topo import zoo
from nni_topo.network import files as serialization
from nni_topo.errors import ConfigError, DataError, unknown_name
from nni_topo.pruners.hooks import Masks
from nni_topo.pruners.checks import check_request
from nni_topo.recovery import compensation
from nni_topo.pruners.registry import create_pruner, needs_rule, pruner_info
from nni_topo.runs.plan import CompensationChoice, DataChoice, ModelChoice, changed_recipe, compensation_choice
from nni_topo.runs.run import (STILL, build_model, calibration_batches, layer_widths, load_model_data, resolve_device,)
from nni_topo.runs.records import Record, provenance
from nni_topo.runs.scheduled import recipe_evaluator
from nni_topo.network.dense import to_dense
from nni_topo.network.dependency import dependency_groups
from nni_topo.network.zeros import zeros_held
from nni_topo.network.dependency import channel_flow
from nni_topo.network.inputs import call_arguments
from nni_topo.network.masks import check_masks
from nni_topo.network.resolve import resolve_masks
from nni_topo.network.zeros import weights_left

_GRADIENT_STEPS = 32


@dataclass(frozen=True)
class PruneConfig:
    """What a pruning configuration file says.

    Attributes
    ----------
    pruner : str
        Registered name.
    config_list : list of dict
        NNI's config_list.
    knobs : dict
        The pruner's own arguments.
    calibration : int
        Training images (without labels) given to the pruner; 0: none.
    dependency_groups : bool
        Whether layers that meet in an addition are tied, so that they lose the same channels.
    compensate : CompensationChoice, dict or None
        Compensation on training images without labels, for any pruner: ``images`` and ``method``; None: none.
    round_to : int or None
        Layers keep a multiple of so many channels.
    retrain : dict
        Fields of the retraining recipe, ``epochs`` first of all; empty: no retraining.
    """

    pruner: str
    config_list: list[dict[str, Any]]
    knobs: Mapping[str, Any] = field(default_factory=dict)
    calibration: int = 0
    dependency_groups: bool = True
    compensate: CompensationChoice | None = None
    round_to: int | None = None
    retrain: Mapping[str, Any] = field(default_factory=dict)


def load_prune_config(path: str | Path) -> PruneConfig:
    """Read a pruning configuration from a YAML file.

    Raises
    ------
    DataError
        If the file is missing or isn't YAML.
    ConfigError
        If a key is unknown or missing, or the pruner's name is unknown.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"a configuration must be a readable YAML file, got: {error} ({path})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"a configuration must be a mapping, got {type(content).__name__} ({path})")
    known = {item.name for item in fields(PruneConfig)}
    for key in content:
        if key not in known:
            raise unknown_name(f"key of {path.name}", str(key), known)
    for key in ("pruner", "config_list"):
        if key not in content:
            raise ConfigError(
                f"a configuration must name {key}, got {', '.join(map(str, content)) or 'nothing'} ({path})"
            )
    pruner_info(content["pruner"])
    return PruneConfig(**{**content, "compensate": compensation_choice(content.get("compensate"))})


def prune_checkpoint(
    model: ModelChoice,
    checkpoint: str | Path | None,
    config: PruneConfig,
    data: DataChoice,
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> Record:
    """Prune a trained model and write the dense one.

    Parameters
    ----------
    model : ModelChoice
        Which architecture.
    checkpoint : str, Path or None
        Its trained weights. None: the model is trained first by its default recipe.
    config : PruneConfig
        How to prune.
    data : DataChoice
        Example inputs, calibration images, test images.
    out : str or Path
        Folder for ``dense.pt``, ``masks.pt`` and ``summary.json``. It must be new or empty.
    seed : int, default=0
        Seed of training; the pruner's own seed is a knob.
    device : {"cpu", "cuda", "auto"}, default="cpu"
        Where to compute.
    progress : bool, default=False
        Show a bar while training.

    Returns
    -------
    dict
        What ``summary.json`` holds: accuracies, MACs, parameters, layer widths, seconds, provenance.

    Raises
    ------
    ConfigError
        If the folder isn't empty, or the configuration can't be used with the model.
    DataError
        If the checkpoint or the data can't be used.
    SpeedupError
        If the masks can't be made dense.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"an output folder must be new or empty, got {len(list(out.iterdir()))} entries ({out})")
    place = resolve_device(device)

    def accept(untrained: nn.Module) -> None:
        check_request(untrained, config.config_list, needs_rule=needs_rule(config.pruner, config.knobs))

    net, bundle = trained_network(model, checkpoint, data, seed=seed, device=device, progress=progress, accept=accept)
    record = {"model": model.label, "data": data.name, "pruner": config.pruner, "seed": seed}
    record |= _measured(net, bundle, place, accuracy="accuracy_before", suffix="_before")
    masks, record["prune_seconds"] = _masks(net, config, bundle)
    example = bundle.test.tensors[0][:2].to(place)
    masks = _rounded(net, example, masks, config.round_to)
    dense = to_dense(net, example, masks)
    record |= _measured(dense, bundle, place, accuracy="accuracy_oneshot")
    if config.compensate is not None:
        choice = config.compensate
        images = [batch.to(place) for batch in calibration_batches(bundle, choice.images)]
        done = compensation(net, masks, images, method=choice.method, refine=choice.refine, progress=progress)
        dense = to_dense(done.model, example, masks)
        record["accuracy_compensated"] = zoo.evaluate(dense, bundle.test, device=place)
        record["compensation"] = done.report.to_frame().replace({float("nan"): None}).to_dict("records")
    record["widths"] = layer_widths(dense)
    if config.retrain:
        recipe = zoo.default_recipe(model.name, data.name)
        retraining = changed_recipe(recipe.for_retraining(int(config.retrain.get("epochs", 1))), config.retrain)
        with zeros_held(dense):
            zoo.train(dense, bundle, retraining, seed=seed, device=place, progress=progress)
        record["accuracy_retrained"] = zoo.evaluate(dense, bundle.test, device=place)
    record |= provenance()
    out.mkdir(parents=True, exist_ok=True)
    serialization.save(dense, out / "dense.pt")
    torch.save(masks, out / "masks.pt")
    (out / "summary.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return record


def trained_network(
    model: ModelChoice,
    checkpoint: str | Path | None,
    data: DataChoice,
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
    accept: Callable[[nn.Module], None] | None = None,
) -> tuple[nn.Module, zoo.DataBundle]:
    """Return a model with the weights of a checkpoint, or trained by its default recipe, and its data.

    ``accept`` gets the untrained network: what it refuses isn't trained first.

    Raises
    ------
    ConfigError
        If a name or the device is unknown.
    DataError
        If the checkpoint or the data can't be used.
    """
    place = resolve_device(device)
    bundle = load_model_data(model, data)
    net = build_model(model, bundle, seed)
    if accept is not None:
        accept(net)
    if checkpoint is None:
        recipe = zoo.default_recipe(model.name, data.name)
        zoo.train(net, bundle, recipe, seed=seed, device=place, progress=progress)
    else:
        zoo.load_checkpoint(checkpoint, net)
    net = net.to(place).eval()
    zoo.check_model(net, bundle)
    return net, bundle


def data_knobs(name: str, net: nn.Module, data: zoo.DataBundle, calibration: int = 0) -> dict[str, Any]:
    """Return the knobs of a pruner that come from the data.

    Parameters
    ----------
    name : str
        Registered name.
    net : torch.nn.Module
        The network that will be pruned, for an evaluator is bound to it.
    data : DataBundle
        Its data; test images aren't used.
    calibration : int, default=0
        Training images for a pruner's calibration; 0: none.

    Returns
    -------
    dict
        ``calibration``; ``validation``, the labelled validation images, where the pruner has that knob; an
        ``evaluator`` that measures gradients and leaves weights as they are, with ``training_steps``, where it needs
        them.
    """
    info, knobs = pruner_info(name), dict[str, Any]()
    if calibration:
        knobs["calibration"] = calibration_batches(data, calibration)
    if "validation" in info.knobs():
        knobs["validation"] = list(zip(*(part.split(512) for part in data.validation.tensors), strict=True))
    if "evaluator" in info.needs:
        recipe = zoo.Recipe(epochs=1, lr=STILL, weight_decay=0.0)
        knobs["evaluator"] = recipe_evaluator(net, data, recipe)
        knobs["training_steps"] = min(_GRADIENT_STEPS, -(-len(data.train) // recipe.batch_size))
    return knobs


def _rounded(net: nn.Module, example: Tensor, masks: Masks, round_to: int | None) -> Masks:
    """Return masks by which layers keep a multiple of so many channels."""
    if round_to is None:
        return masks
    on_device = {name: {t: mask.to(example.device) for t, mask in found.items()} for name, found in masks.items()}
    flow = channel_flow(net, call_arguments(example, net))
    return resolve_masks(net, flow, check_masks(net, on_device), round_to)


def _measured(net: nn.Module, data: zoo.DataBundle, device: torch.device, *, accuracy: str, suffix: str = "") -> Record:
    return {
        accuracy: zoo.evaluate(net, data.test, device=device),
        f"flops{suffix}": zoo.count_macs(net, data.test.tensors[0][:1].to(device)),
        f"params{suffix}": zoo.count_params(net),
        f"weights_left{suffix}": weights_left(net),
    }


def _masks(net: nn.Module, config: PruneConfig, data: zoo.DataBundle) -> tuple[Masks, float]:
    """Run the pruner and take NNI's wrappers off again; return the masks, on the CPU, and the seconds."""
    example = data.test.tensors[0][:2].to(next(net.parameters()).device)
    config_list = config.config_list
    if config.dependency_groups:
        config_list = dependency_groups(net, example, config_list)
    knobs = {**data_knobs(config.pruner, net, data, config.calibration), **config.knobs}
    if "example_inputs" in pruner_info(config.pruner).knobs():
        knobs["example_inputs"] = example
    began = time.perf_counter()
    pruner = create_pruner(config.pruner, net, config_list, **knobs)
    _, masks = pruner.compress()
    seconds = time.perf_counter() - began
    pruner.unwrap_model()
    return {m: {t: v.cpu() for t, v in found.items() if v is not None} for m, found in masks.items()}, seconds
