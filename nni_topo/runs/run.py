"""Runs on a data set: train, prune, make dense, compensate, distil, retrain, measure.

Each stage is one function, which comparisons, ``nni-topo prune``, trials, studies and the demonstration share. So
every pruner gets the same knobs from all of them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo import zoo
from nni_topo.disk import DELETE
from nni_topo.errors import ConfigError, DataError, NniTopoError, raised
from nni_topo.network.cost.cost import cost_of
from nni_topo.network.layers.kinds import output_channels, weights_left, zeros_held
from nni_topo.network.runtime.calibration import HELD_OUT, Calibration
from nni_topo.network.runtime.progress import quiet_if_asked
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dependency import groups_of
from nni_topo.pruners.budget import BudgetOutcome, budget_outcome
from nni_topo.pruners.hooks import Masks
from nni_topo.pruners.registry import create_pruner, needs_rule, pruner_info
from nni_topo.recovery import CompensationReport, Distillation, distillation, recovery_info
from nni_topo.runs.choices import (
    CompensationChoice,
    DataChoice,
    DistillationChoice,
    ModelChoice,
    PrunerChoice,
    Target,
    training_key,
)
from nni_topo.runs.evaluators import recipe_evaluator
from nni_topo.runs.pipeline import Pipeline
from nni_topo.runs.provenance import Record
from nni_topo.runs.widths import as_entries, reasons_of_unpruned_layers
from nni_topo.zoo.evaluation import bits
from nni_topo.zoo.external import accepted, pretrained_preprocessing
from nni_topo.zoo.labelled import ImageFiles, sources_of, subset
from nni_topo.zoo.models import model_info

LATENCY_BATCH = 64
_GRADIENT_STEPS = 32
_IMAGES_AT_ONCE = 128
_LABELLED_AT_ONCE = 512
_VALIDATION_FILES = 1024
_IMAGENET = 1000  # classes
STILL = 1e-30
"""Learning rate at which an evaluator measures gradients without changing weights."""
WHOLE_CHANNELS = "the numbers that were tried come no nearer, or the pruner keeps other channels than requested"
"""Why a pruner that gets ratios of layers misses a budget."""


@dataclass(frozen=True)
class Start:
    """A trained network in evaluation mode, and its data, with which every run begins. No stage changes the network."""

    net: nn.Module
    data: zoo.DataBundle
    recipe: zoo.Recipe  # how it was trained, or would be
    seed: int = 0  # of its training, and of all later stages
    known_accuracy: float | None = None  # on the test images, if it was measured before
    known_validation: float | None = None  # likewise on the validation images

    @property
    def device(self) -> torch.device:
        """The network's device."""
        return next(self.net.parameters()).device

    @cached_property
    def example(self) -> Tensor:
        """Two test images, on the device."""
        return self.data.test[:2][0].to(self.device)

    @cached_property
    def analysis(self) -> Analysis:
        """How channels go through the network."""
        return Analysis.on(self.net, self.example)

    @cached_property
    def timing_batch(self) -> Tensor:
        """The batch of test images that networks are timed on, on the device."""
        return self.data.test[:LATENCY_BATCH][0].to(self.device)

    @cached_property
    def accuracy(self) -> float:
        """Accuracy of the unpruned network on the test images, in [0, 1]."""
        return self.tested(self.net) if self.known_accuracy is None else self.known_accuracy

    @cached_property
    def validation_accuracy(self) -> float:
        """Accuracy of the unpruned network on the validation images, in [0, 1]."""
        return self.validated(self.net) if self.known_validation is None else self.known_validation

    def validated(self, net: nn.Module) -> float:
        """Return a network's accuracy on the validation images, in [0, 1]."""
        return zoo.evaluate(net, self.data.validation, device=self.device)

    def tested(self, net: nn.Module) -> float:
        """Return a network's accuracy on the test images, in [0, 1]."""
        return zoo.evaluate(net, self.data.test, device=self.device)

    def figures(self, net: nn.Module, step: str) -> dict[str, float]:
        """Return a record's figures of a network on the test images; for text also bits per byte (less is better)."""
        if not self.data.is_text:
            return {f"accuracy_{step}": self.tested(net)}
        loss, accuracy = zoo.loss_and_accuracy(net, self.data.test, device=self.device)
        return {f"accuracy_{step}": accuracy, f"bits_{step}": bits(loss)}

    def calibration(self, count: int) -> Calibration:
        """Return the first training images, without labels; folders within those of the classes are groups."""
        rows = subset(self.data.train, slice(count))
        inputs = Calibration(self.images(count), groups=sources_of(rows, in_classes=True))
        inputs.name = "images"
        return inputs

    def images(self, count: int, skip: int = 0) -> list[Tensor]:
        """Return ``count`` training images after the first ``skip``, without labels, in batches on the device."""
        images = self.data.train[skip : skip + count][0].to(self.device)
        return list(images.split(_IMAGES_AT_ONCE)) if len(images) else []

    def validation(self) -> list[tuple[Tensor, ...]]:
        """Return the validation images with labels, in batches on the device; from image files the first 1,024."""
        among = slice(_VALIDATION_FILES if isinstance(self.data.validation, ImageFiles) else None)
        parts = (tensor.to(self.device).split(_LABELLED_AT_ONCE) for tensor in self.data.validation[among])
        return list(zip(*parts, strict=True))


@quiet_if_asked
def trained(
    model: ModelChoice,
    data: DataChoice,
    *,
    recipe: zoo.Recipe | None = None,
    checkpoint: str | Path | None = None,
    folder: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool | None = None,
    accept: Callable[[Start], None] | None = None,
) -> Start:
    """Return a trained network, from a given checkpoint, a folder of checkpoints or the model's own; else train it.

    A network trained by a ``recipe`` (None: the model's own) is kept in the ``folder``. ``accept`` gets the untrained
    network with its data, so that it can raise an error before the training. ConfigError or DataError if a name, the
    device, the checkpoint or the data can't be used.
    """
    place = resolve_device(device)
    bundle = load_model_data(model, data)
    recipe = zoo.default_recipe(model.name, data.name) if recipe is None else recipe
    net = build_model(model, bundle, seed)
    if accept is not None:
        net.to(place)
        net.eval()
        accept(Start(net, bundle, recipe, seed))
        net.train()
    key = training_key(model, data, recipe, seed)
    path = folder / f"{key}.pt" if folder is not None and checkpoint is None else None
    known: dict[str, Any] = {}
    if checkpoint is not None:
        zoo.load_checkpoint(checkpoint, net)
        zoo.check_model(net, bundle)
    elif path is not None and path.exists():
        try:
            known = zoo.load_checkpoint(path, net)
        except DataError as error:
            raise DataError(f"{error}; {DELETE}") from None
    elif model.checkpoint is not None:
        zoo.load_checkpoint(model.checkpoint, net)
        zoo.check_model(net, bundle)
    else:
        log = zoo.train(net, bundle, recipe, seed=seed, device=place, progress=progress)
        known = {"seed": seed, "seconds": log.seconds}
    net.to(place)
    net.eval()
    start = Start(net, bundle, recipe, seed, known.get("accuracy"), known.get("validation_accuracy"))
    if path is not None and not path.exists():
        accuracies = {"accuracy": start.accuracy, "validation_accuracy": start.validation_accuracy}
        zoo.save_checkpoint(path, net, {**known, **accuracies})
    return start


def pruner_knobs(name: str, victim: nn.Module, start: Start, calibration: int = 0) -> dict[str, Any]:
    """Return the arguments that every run passes to a pruner; test images aren't used.

    These are the pruner's knobs ``seed``, ``example_inputs``, ``calibration`` (this number of training images) and
    ``validation``, the labelled validation images. A pruner that needs an ``evaluator`` gets one for the ``victim``,
    the network to prune, with ``training_steps``; it measures gradients without changing weights.
    """
    info = pruner_info(name)
    known: dict[str, Callable[[], Any]] = {
        "seed": lambda: start.seed,
        "example_inputs": lambda: start.example,
        "validation": start.validation,
    }
    knobs = {knob: value() for knob, value in known.items() if knob in info.knobs()}
    if calibration:
        knobs["calibration"] = start.images(calibration)
    if "evaluator" in info.needs:
        still = replace(start.recipe, epochs=1, lr=STILL)
        knobs["evaluator"] = recipe_evaluator(victim, start.data, still, seed=start.seed)
        knobs["training_steps"] = min(_GRADIENT_STEPS, -(-len(start.data.train) // still.batch_size))
    return knobs


def created(start: Start, pruner: PrunerChoice, config_list: list[dict[str, Any]]) -> Any:
    """Return a pruner of a copy of the network; it has checked its knobs and its request."""
    victim = copy.deepcopy(start.net)
    knobs = {**pruner_knobs(pruner.name, victim, start, pruner.calibration), **pruner.knobs}
    return create_pruner(pruner.name, victim, config_list, **knobs)


def prune(start: Start, pruner: PrunerChoice, config_list: list[dict[str, Any]]) -> Pipeline:
    """Prune a copy of the network; the choice's knobs replace those of :func:`pruner_knobs`."""
    began = time.perf_counter()
    selected = Pipeline(start.analysis).select(created(start, pruner, config_list))
    return replace(selected, seconds=time.perf_counter() - began)


def prune_to_ratios(start: Start, choice: PrunerChoice, target: Target, ratios: dict[str, float]) -> Pipeline:
    """Prune a copy of the network with a ratio for every layer, or by the target if the pruner distributes it."""
    config_list: list[dict[str, Any]]
    if pruner_info(choice.name).structured:
        config_list = groups_of(start.analysis, as_entries(ratios))
        if not needs_rule(choice.name, {}):
            # The pruner chooses the ratio up to this one; the same lower bound fixes it.
            for entry in config_list:
                entry["min_sparse_ratio"] = entry["sparse_ratio"]
    else:  # single weights have no groups of channels
        config_list = as_entries(ratios)
    # A pruner with an allocation distributes the budget itself.
    allocation = choice.knobs.get("budget", {}).get("allocation")
    if allocation is not None and target.kind != "ratio":
        budget = {target.kind: target.value, "allocation": allocation}
        timed = {"example_inputs": start.timing_batch} if target.kind == "latency" else {}
        choice = replace(choice, knobs={**timed, **choice.knobs, "budget": budget})
        config_list = [{key: item for key, item in entry.items() if key != "sparse_ratio"} for entry in config_list]
    return prune(start, choice, config_list)


def on_cpu(masks: Masks) -> Masks:
    """Return masks for a file: on the CPU, without targets that have no mask."""
    return {m: {t: v.detach().cpu() for t, v in found.items() if v is not None} for m, found in masks.items()}


def made_dense(
    start: Start, masks: Masks, compensate: CompensationChoice | None = None, *, progress: bool | None = None
) -> tuple[nn.Module, CompensationReport | None]:
    """Return the dense network, compensated if asked for, and the report of the compensation."""
    pruned = Pipeline(start.analysis, masks=masks)
    if compensate is None:
        return pruned.remove().dense, None
    info = recovery_info(compensate.method)
    method = info.make(refine=compensate.refine) if "refine" in info.knobs() else info.make()
    # No images are held out here: others judge distillation.
    images = Calibration(start.images(compensate.images), hold_out=False)
    done = pruned.reconstruct(method, images, progress=progress).remove()
    return done.dense, done.compensation


def distilled(
    start: Start, dense: nn.Module, choice: DistillationChoice, *, progress: bool | None = None
) -> Distillation:
    """Let a dense network learn from the unpruned one, on training images without labels."""
    images, knobs = start.images(choice.images), distillation_knobs(start, choice)
    # Compensation used the same images, so the next ones judge, an eighth as many; if no images are left, some of the
    # first.
    judges = start.images(choice.images // HELD_OUT, choice.images) or None
    return distillation(dense, start.net, images, held_out=judges, seed=start.seed, progress=progress, **knobs)


def distillation_knobs(start: Start, choice: DistillationChoice) -> dict[str, Any]:
    """Return a choice as arguments of :func:`nni_topo.distill`."""
    black = start.data.black.to(start.device)
    knobs = {name: value for name, value in asdict(choice).items() if name not in ("images", "augmentation")}
    if choice.augmentation == "none":
        return knobs
    return {**knobs, "augment": lambda images: zoo.augmented(images, choice.augmentation, black)}


def retrain(net: nn.Module, data: zoo.DataBundle, recipe: zoo.Recipe, *, seed: int, **knobs: Any) -> zoo.TrainingLog:
    """Train a pruned network in place; single weights that are zero stay zero. Knobs: :func:`nni_topo.zoo.train`'s."""
    with zeros_held(net):
        device = next(net.parameters()).device
        return zoo.train(net, data, recipe, seed=seed, device=device, **knobs)


def costs(start: Start, dense: nn.Module) -> Record:
    """Return multiply-accumulates of one image, parameters, nonzero parameters and widths, before and after.

    ``whole`` has the reason for each layer that keeps its width.
    """
    found: Record = {
        "widths": layer_widths(dense),
        "widths_before": layer_widths(start.net),
        "whole": reasons_of_unpruned_layers(start.analysis, dense),
    }
    for suffix, net in (("_before", start.net), ("", dense)):
        found[f"flops{suffix}"] = zoo.count_macs(net, start.example)
        found[f"params{suffix}"] = zoo.count_params(net)
        found[f"weights_left{suffix}"] = weights_left(net)
    return found


def budget_facts(start: Start, dense: nn.Module, asked: Target | BudgetOutcome, times: Record, why: str) -> Record:
    """Return a record's facts of a budget: the requested cost and the dense network's.

    ``times`` come from :func:`latencies`; ``why`` is the reason if the budget is missed.
    """
    share = asked.value if isinstance(asked, Target) else asked.asked
    if asked.kind == "latency":
        left = times["latency_ms"] / times["latency_before_ms"]
    else:
        before, after = (cost_of(asked.kind, net, start.example) for net in (start.net, dense))
        left = after / before
    return {"budget": asdict(budget_outcome(asked.kind, share, left, why))}


def latencies(start: Start, dense: nn.Module) -> Record:
    """Return milliseconds before and after, measured alternately on a batch of test images."""
    found = zoo.latencies({"before": start.net, "after": dense}, start.timing_batch)
    return {
        "latency_before_ms": found["before"],
        "latency_ms": found["after"],
        "latency_batch": len(start.timing_batch),
    }


def layer_widths(model: nn.Module) -> dict[str, int]:
    """Return the output channels of every convolution and linear layer, by module name."""
    return {
        name: output_channels(module) or 0
        for name, module in model.named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    }


def load_model_data(model: ModelChoice, data: DataChoice) -> zoo.DataBundle:
    """Load a data set, padded to the size that a model needs."""
    pad_to = model_info(model.name).pad_to
    bundle = zoo.load_data(
        data.name,
        data.data_dir,
        limit=data.limit,
        pad_to=None if data.image_size else pad_to,
        image_size=data.image_size,
        download=data.download,
        preprocessing=pretrained_preprocessing(model.name),
        workers=data.workers,
    )
    if data.test_limit is None:
        return bundle
    if data.test_limit < 1:
        raise ConfigError(f"test_limit must be at least 1, got {data.test_limit} (data)")
    return replace(bundle, test=subset(bundle.test, slice(data.test_limit)))


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


def weighted_model(
    model: ModelChoice, shape: Sequence[int], *, checkpoint: str | Path | None, classes: int | None, device: str
) -> nn.Module:
    """Return a model with the weights of a checkpoint, or those that a user's own factory gives it.

    ``shape``: of a batch of inputs; a batch of images gives a factory channels and side. ``classes``: number of logits
    for factories that ask for it; None: their default, of torchvision's and timm's models 1,000.
    """
    is_own = ":" in model.name
    if checkpoint is None and not is_own:
        raise ConfigError(
            f"a model must come with its weights where data has no labels to train it by, got none ({model.name}, "
            "checkpoint)"
        )
    sizes = {"in_channels": shape[1], "image_size": shape[-1]} if len(shape) == 4 else {}
    classes = classes if classes is not None or is_own else _IMAGENET
    arguments = {**sizes, "width": model.width, **({} if classes is None else {"num_classes": classes})}
    build = model_info(model.name).build
    given = accepted(build, arguments)
    try:
        net = build(**given)
    except NniTopoError:
        raise
    except Exception as error:  # a user's code runs, and may raise anything
        names = ", ".join(given) or "no arguments"
        raise ConfigError(f"a model factory must take {names}, got {raised(error)} ({model.name})") from error
    if not isinstance(net, nn.Module):
        raise ConfigError(f"a model factory must return an nn.Module, got {type(net).__name__} ({model.name})")
    if checkpoint is not None:
        zoo.load_checkpoint(checkpoint, net)
    return net.to(resolve_device(device)).eval()


def resolve_device(name: str | torch.device) -> torch.device:
    """Return a device that PyTorch can compute on here, else ConfigError; ``auto``: CUDA if available, else the CPU."""
    name = str(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # PyTorch also parses names of devices that this machine doesn't have
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device must be cpu, cuda or auto, or another that PyTorch can use, got {name!r}: {reason} (device)"
        ) from error
    return device
