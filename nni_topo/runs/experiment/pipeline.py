"""One trial: prune, make dense, compensate, retrain, measure; killed anywhere, the same call goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nni_topo import zoo
from nni_topo.disk import DELETE, only_process, read_json, read_tensors, reading, write_json, write_tensors
from nni_topo.errors import ConfigError, unknown_name
from nni_topo.network.io import checkpoint as serialization
from nni_topo.pruners.hooks import Masks
from nni_topo.pruners.registry import pruner_info
from nni_topo.runs.experiment.settings import TrialSettings
from nni_topo.runs.processes import broadcast, broadcast_masks, data_share, world
from nni_topo.runs.provenance import Record, provenance
from nni_topo.runs.run import (
    WHOLE_CHANNELS,
    budget_facts,
    costs,
    distilled,
    latencies,
    layer_widths,
    load_model_data,
    made_dense,
    on_cpu,
    prune_to_ratios,
    retrain,
    trained,
)
from nni_topo.runs.widths import inner_layers, layer_ratios, proposed_ratios, pruning_config

METRICS, SETTINGS = "metrics.json", "settings.json"
DENSE, MASKS, CONFIG_LIST = "dense.safetensors", "masks.pt", "config_list.json"
_PRUNED, _RETRAINING = "pruned.pt", "retraining.pt"

ReportMetrics = Callable[[int, dict[str, float]], None]


def run_trial(
    settings: TrialSettings, out: str | Path, *, cache: str | Path | None = None, report: ReportMetrics | None = None
) -> Record:
    """Run a trial, or what is left of it, in a folder; return what ``metrics.json`` holds, accuracies in [0, 1].

    The folder gets ``settings.json`` at once, ``masks.pt``, and at the end ``dense.safetensors`` (see
    :func:`nni_topo.load`), ``config_list.json`` (the ratios that were realised) and ``metrics.json``; ``cache`` holds
    the trained nets that trials share. ``report`` is called with 0 and the result after pruning, then with every
    epoch's number and result: ``default``, the score, and ``accuracy``, both on validation images, so that a search
    doesn't learn the test images.
    Processes of one ``torch.distributed`` group run one trial together: the first one prunes, all retrain on their
    shares of the images and of the batch; retraining then starts anew after a kill. ConfigError if the settings can't
    be used or the folder holds another trial; DataError if data can't be read or the disk is full; SpeedupError if the
    masks can't be made dense.
    """
    out = Path(out)
    rank, size = world()
    with only_process(out) if rank == 0 else nullcontext():
        metrics: Record | None = None  # of a trial that is done
        if rank == 0:
            known, mine = read_json(out / SETTINGS), settings.to_dict()
            if known is None:
                write_json(out / SETTINGS, mine)
            elif known != mine:
                other = ", ".join(sorted(key for key in mine if known.get(key) != mine[key]))
                raise ConfigError(f"a trial's folder must hold one trial, got another one, with other {other} ({out})")
            metrics = read_json(out / METRICS)
        metrics = broadcast(metrics)
        if metrics is not None:
            return dict(metrics)
        began = time.perf_counter()
        trial = _Trial(settings, out, out / "nets" if cache is None else Path(cache))
        masks = broadcast_masks(trial.masks() if rank == 0 else None)
        dense, facts = trial.pruned(masks) if rank == 0 else (made_dense(trial.start, masks)[0], {})
        facts = broadcast(facts)
        dense = trial.retrained(dense, facts, report if rank == 0 else None, rank, size)
        if rank == 0:
            facts = trial.finish(dense, masks, facts, time.perf_counter() - began)
        return broadcast(facts)


def reported(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the part of a trial's metrics that goes to the tuner, as ``default``, and to NNI's web page."""
    names = ("accuracy", "flops_share", "latency_share")
    return {"default": metrics["score"], **{name: metrics[name] for name in names if name in metrics}}


class _Trial:
    """A trial's net and data, and its stages."""

    def __init__(self, settings: TrialSettings, out: Path, cache: Path) -> None:
        if not pruner_info(settings.pruner).structured:
            raise ConfigError(f"a trial's pruner must remove whole channels, got {settings.pruner!r} (pruner)")
        self.settings, self.out, self.cell = settings, out, settings.cell()
        with only_process(cache) if settings.checkpoint is None else nullcontext():
            self.start = trained(
                self.cell.model,
                self.cell.data,
                recipe=self.cell.train,
                checkpoint=settings.checkpoint,
                folder=cache / "checkpoints",
                seed=self.cell.seed,
                device=settings.device,
            )

    def masks(self) -> Masks:
        """Return the masks, on the CPU: those in the folder, or the pruner's."""
        path = self.out / MASKS
        if path.exists():
            with reading(path, "a trial's masks", cure=DELETE):
                return read_tensors(path)  # type: ignore[no-any-return]
        settings, net, example = self.settings, self.start.net, self.start.example
        names = inner_layers(net, example)
        for pattern in settings.ratios:
            if not any(name == pattern or fnmatchcase(name, pattern) for name in names):
                raise unknown_name("the layer of a ratio", pattern, names, "ratios")
        if settings.flops is not None and not settings.ratios:
            ratios = layer_ratios(net, example, self.cell.target)
        else:
            proposed = {name: settings.layer_ratio(name) for name in names}
            ratios = proposed_ratios(net, example, proposed, settings.flops)
        masks = on_cpu(prune_to_ratios(self.start, self.cell.pruner, self.cell.target, ratios).masks)
        write_tensors(path, masks)
        return masks

    def pruned(self, masks: Masks) -> tuple[nn.Module, Record]:
        """Return the dense net, compensated and distilled if asked for, and what is known of it."""
        path = self.out / _PRUNED
        known = read_json(self.out / "pruned.json")
        if known is not None:
            return serialization.load(path, self.start.net), known
        dense, _ = made_dense(self.start, masks, self.cell.compensate)
        if self.cell.distill is not None:
            dense = distilled(self.start, dense, self.cell.distill).model
        # What retraining doesn't change, and the accuracy before it.
        settings = self.settings
        facts: Record = {"accuracy_pruned": self.start.validated(dense), **costs(self.start, dense)}
        facts["flops_share"] = facts["flops"] / facts["flops_before"]
        facts["price"] = settings.flops_weight * facts["flops_share"]
        if settings.latency_weight:
            facts |= latencies(self.start, dense)
            facts["latency_share"] = facts["latency_ms"] / facts["latency_before_ms"]
            facts["price"] += settings.latency_weight * facts["latency_share"]
        if self.cell.target.kind != "ratio":
            facts |= budget_facts(self.start, dense, self.cell.target, facts, WHOLE_CHANNELS)
        serialization.save(dense, path)
        write_json(self.out / "pruned.json", facts)
        return dense, facts

    def retrained(
        self, dense: nn.Module, facts: Record, report: ReportMetrics | None, rank: int, size: int
    ) -> nn.Module:
        """Fine-tune the network in place, alone or with the group, and report every epoch; return the network."""
        tell = report or (lambda step, result: None)
        state = self.out / _RETRAINING if size == 1 else None
        if state is None or not state.exists():
            tell(0, _result(facts["accuracy_pruned"], facts))
        if not self.cell.retrain.epochs:
            return dense

        def epoch_done(log: zoo.EpochLog) -> None:
            tell(log.epoch, _result(log.validation_accuracy or 0.0, facts))

        data, recipe = self._retraining_data(), self.cell.retrain
        net: nn.Module | None = None
        if size > 1:
            data = data_share(data, rank, size)
            recipe = replace(recipe, batch_size=max(1, recipe.batch_size // size))
            net = DistributedDataParallel(dense)
        seed = self.cell.seed + rank
        retrain(dense, data, recipe, seed=seed, through=net, callback=epoch_done, state=state)
        return dense

    def _retraining_data(self) -> zoo.DataBundle:
        images = self.settings.retrain_images
        if images is None:
            return self.start.data
        limit = images if self.cell.data.limit is None else min(images, self.cell.data.limit)
        return load_model_data(self.cell.model, replace(self.cell.data, limit=limit))

    def finish(self, dense: nn.Module, masks: Masks, facts: Record, seconds: float) -> Record:
        """Measure the network and write the trial's files."""
        accuracy = self.start.validated(dense) if self.cell.retrain.epochs else facts["accuracy_pruned"]
        metrics: Record = {
            **facts,
            "score": _result(accuracy, facts)["default"],
            "accuracy": accuracy,
            "test_accuracy": self.start.tested(dense),
            "test_accuracy_before": self.start.accuracy,
            "seconds": seconds,
            "settings": self.settings.to_dict(),
            **provenance(),
        }
        serialization.save(dense, self.out / DENSE)
        # A config_list that leads any structured pruner to the same widths.
        net, example = self.start.net, self.start.example
        before, after = layer_widths(net), layer_widths(dense)
        ratios: dict[str, float] = {}
        for name in inner_layers(net, example):
            count = before[name] - after[name]
            ratios[name] = (count + 0.5) / before[name] if count else 0.0
        write_json(self.out / CONFIG_LIST, pruning_config(net, example, ratios))
        write_json(self.out / METRICS, metrics)
        for name in (_PRUNED, "pruned.json", _RETRAINING):
            (self.out / name).unlink(missing_ok=True)
        return metrics


def _result(accuracy: float, facts: Record) -> dict[str, float]:
    return {"default": accuracy - facts["price"], "accuracy": accuracy}
