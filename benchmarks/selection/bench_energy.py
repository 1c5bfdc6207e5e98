"""Energy-based pruning: cost on ImageNet-sized networks, accuracy beside other rankings, chirp against data.

    python -m benchmarks.selection.bench_energy --data-dir FASHION_MNIST --out DIR

Each section runs in a process of its own and adds one line to DIR/energy.jsonl; sections that are there are left out.
Networks without a checkpoint in DIR are trained first. The pictures of the studies lie in DIR/NET.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.networks.energy_nets import NETS, trained
from nni_topo import (
    EnergyFilterPruner,
    StructuredPruner,
    create_pruner,
    dependency_groups,
    masked_model,
    recalibrate_batch_norm,
    zoo,
)
from nni_topo.disk import plain
from nni_topo.pruners.energy import TOLERANCE, CumulativeEnergyMetric
from nni_topo.pruners.hooks import Data, DataCollector, PruningContext
from nni_topo.pruners.planner import Planner
from nni_topo.runs.provenance import provenance
from nni_topo.runs.run import Start
from nni_topo.runs.widths import inner_layers
from nni_topo.studies.analysis.energy.dropout import RATES, study_dropout
from nni_topo.studies.analysis.energy.study import (
    LITTLE,
    THRESHOLDS,
    AnalyzeEnergy,
    EnergyStudy,
    accumulate_energy,
    layer_plot,
    masks_of,
    quality_on,
    show_energy,
    study_energy,
)
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.study import save_figures
from nni_topo.studies.tables import as_markdown, interval, markdown_table, show_accuracies, table_of
from nni_topo.zoo.labelled import subset

IMAGENET = ("torchvision/vgg16", "torchvision/resnet101")
SHARED_THRESHOLDS = (0.05, 0.1, 0.2)
SHARED_RATIOS = (0.1, 0.2, 0.3, 0.5)
DIRECTION_SEEDS = 3
RANDOM_SEEDS = 3
CALIBRATION = 1024
BASELINE_IMAGES = 500
STUDY_IMAGES = 500
STUDY_TRAINING = 3000
STUDIES = ("vgg16", "resnet20", "resnet29")
WITH_DROPOUT = ("vgg16",)
CHIRPS: dict[str, dict[str, Any]] = {
    "chirp": {},
    "chirp, radial": {"signal": {"direction": "radial"}},
    "chirp, one diagonal (thesis)": {"signal": {"direction": "diagonal"}},
    "chirp, to 1 cycle per pixel": {"signal": {"sweep": "thesis"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and energy.jsonl")
    parser.add_argument("--section", choices=SECTIONS, help="run one section in this process")
    parser.add_argument("--tables", action="store_true", help="print what is there, run nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / "energy.jsonl"
    if options.section:
        torch.set_num_threads(1)
        record = {"section": options.section, **SECTIONS[options.section](options)}
        record["peak_memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        append_record(lines, {**record, **provenance()})
        return
    if options.tables:
        print_tables({record["section"]: record for record in read_records(lines)})
        return
    done = {record["section"] for record in read_records(lines)}
    for section in SECTIONS:
        if section not in done:
            print(section, flush=True)
            subprocess.run(
                [sys.executable, "-m", "benchmarks.selection.bench_energy", *sys.argv[1:], "--section", section],
                check=True,
            )
    print_tables({record["section"]: record for record in read_records(lines)})


def cost(name: str) -> dict[str, Any]:
    """CPU seconds of a whole pruning at 224 pixels beside a plain forward pass, and what each threshold takes."""
    model = zoo.create_model(name, num_classes=1000, in_channels=3, image_size=224, seed=0).eval()
    images = torch.zeros(1, 3, 224, 224)
    layers = [n for n in inner_layers(model, images) if not isinstance(model.get_submodule(n), nn.Linear)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    config = [{"op_names": layers, "sparse_threshold": 0.1}]

    def prune() -> None:
        pruner = EnergyFilterPruner(model, config, example_inputs=images)
        pruner.compress()
        pruner.unwrap_model()

    def energies() -> None:
        pruner = EnergyFilterPruner(model, [{"op_names": layers, "sparse_ratio": 0.0}], example_inputs=images)
        pruner.score_blocks(pruner.collect_data())
        pruner.unwrap_model()

    seconds = {"forward": _seconds(lambda: model(images)), "energies": _seconds(energies), "prune": _seconds(prune)}
    study = study_energy(model, layers, images, together=False)
    removed = [[row.removed[t] for t in THRESHOLDS] for row in study.layers]
    return {
        "layers": [row.name for row in study.layers],
        "convolutions": len(convolutions),
        "filters": [row.filters for row in study.layers],
        "removed": removed,
        "monotone": all(low <= high for row in removed for low, high in pairwise(row)),
        "seconds": seconds,
    }


def compression(label: str, options: argparse.Namespace) -> dict[str, Any]:
    """Filters that each threshold takes from each layer, with a picture."""
    model, data = trained(label, options.data_dir, options.out)
    example = data.test.tensors[0][:2]
    study = study_energy(model, _layers(model, example), example, together=False)
    study.figures()["compression"].savefig(options.out / f"compression_{label}.png", dpi=130)
    layers = {row.name: [row.filters, *(row.removed[t] for t in THRESHOLDS)] for row in study.layers}
    return {"layers": list(layers.items())}


def baselines(label: str, threshold: float, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, as it is and re-calibrated, with as many filters of each layer gone as the threshold takes."""
    model, data = trained(label, options.data_dir, options.out)
    test = TensorDataset(*data.test[:BASELINE_IMAGES])
    example = test.tensors[0][:2]
    images = data.train.tensors[0][:CALIBRATION].split(128)
    study = study_energy(model, _layers(model, example), example, thresholds=[threshold], together=False)
    ratios = {n: (row.removed[threshold] + 0.5) / row.filters for row in study.layers for n in row.layers}
    entries = [{"op_names": [n], "sparse_ratio": min(ratio, 0.999)} for n, ratio in ratios.items()]
    config = dependency_groups(model, example, entries)
    rows: dict[str, list[list[float]]] = {}
    for row, masks in _all_masks(model, config, example, images):
        pruned = masked_model(model, example, masks)
        repaired = recalibrate_batch_norm(pruned, images)
        rows.setdefault(row, []).append([zoo.evaluate(pruned, test), zoo.evaluate(repaired, test)])
    removed = sum(row.removed[threshold] for row in study.layers)
    filters = sum(row.filters for row in study.layers)
    return {"rows": list(rows.items()), "removed": removed, "filters": filters, "before": zoo.evaluate(model, test)}


def directions(label: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the default was chosen by: accuracy on validation images, re-calibrated, at equal ratios, by seed."""
    rows: dict[str, list[list[float]]] = {}
    for seed in range(DIRECTION_SEEDS):
        model, data = trained(label, options.data_dir, options.out, seed)
        validation = TensorDataset(*data.validation[: 4 * BASELINE_IMAGES])
        example = data.test.tensors[0][:2]
        images = data.train.tensors[0][:CALIBRATION].split(128)
        rows.setdefault("unpruned", []).append([zoo.evaluate(model, validation)] * len(SHARED_RATIOS))
        for row, knobs in CHIRPS.items():
            found = []
            for ratio in SHARED_RATIOS:
                entry = {"op_names": _layers(model, example), "sparse_ratio": ratio}
                config = dependency_groups(model, example, [entry])
                pruner = EnergyFilterPruner(model, config, example_inputs=example, **knobs)
                _, masks = pruner.compress()
                pruner.unwrap_model()
                repaired = recalibrate_batch_norm(masked_model(model, example, masks), images)
                found.append(zoo.evaluate(repaired, validation))
            rows.setdefault(row, []).append(found)
    return {"rows": rows}


def correlation(label: str, options: argparse.Namespace) -> dict[str, Any]:
    """Spearman's rank correlation of what needs no data with the energy on data, per layer."""
    model, data = trained(label, options.data_dir, options.out)
    example = data.test.tensors[0][:2]
    layers = _layers(model, example)
    images = list(data.train.tensors[0][:CALIBRATION].split(128))
    scores = {name: _energies(model, layers, example, **knobs) for name, knobs in CHIRPS.items()}
    for order in (1, 2):
        weights = {name: model.get_submodule(name).weight.detach().flatten(1) for name in layers}
        scores[f"L{order} norm"] = {name: weight.norm(p=order, dim=1).tolist() for name, weight in weights.items()}
    measured = {name: energy.tolist() for name, energy in data_energies(model, layers, images).items()}
    rows = {
        row: {name: float(spearmanr(found[name], measured[name]).statistic) for name in layers}
        for row, found in scores.items()
    }
    return {"rows": rows}


def study(label: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the study that ``nni-topo analyze energy`` runs."""
    trained(label, options.data_dir, options.out)
    request = AnalyzeEnergy(
        model=NETS[label].model.name,
        width=NETS[label].model.width,
        data="fashion-mnist",
        data_dir=options.data_dir,
        limit=STUDY_TRAINING,
        images=STUDY_IMAGES,
        checkpoint=options.out / f"{label}.pt",
        out=options.out / label,
    )
    found, start = request.find(print), request.start(STUDY_IMAGES)
    evaluate = partial(quality_on, images=subset(start.data.validation, slice(STUDY_IMAGES)))
    found.more["accumulated"] = _accumulated(start, found, evaluate)
    if label in WITH_DROPOUT:
        found.more["dropout"] = _under_dropout(start, found, evaluate, request.out)
    found.save(request.out)
    return found.to_dict()


def _accumulated(start: Start, study: EnergyStudy, evaluate: Any) -> dict[str, Any]:
    """Prune, one after the other, the layers that cost less than two points alone at the lowest threshold."""
    threshold = study.thresholds[0]
    pruned = [row for row in study.layers if row.removed[threshold]]
    layers = [row.layers for row in pruned if study.lost(row, threshold) < LITTLE]
    steps = accumulate_energy(start.net, layers, start.example, evaluate, threshold=threshold)
    return {"threshold": threshold, "steps": plain(steps)}


def _under_dropout(start: Start, study: EnergyStudy, evaluate: Any, out: Path) -> dict[str, Any]:
    """Measure accuracy at every dropout rate: unpruned, and with each layer alone pruned at 1 and 10 %."""
    record = {"unpruned": plain(study_dropout({"": lambda: start.net}, evaluate, seed=start.seed)[""])}
    for threshold in (0.01, 0.1):
        models = {}
        for row in study.layers:
            masks = masks_of(row.layers, study.masks[threshold])
            models[row.name] = partial(masked_model, start.net, start.example, masks)
        found = study_dropout(models, evaluate, seed=start.seed)
        record[str(threshold)] = plain(found)
        lines = {f"rate {rate:g}": [100.0 * found[row.name][rate].accuracy for row in study.layers] for rate in RATES}
        label = f"accuracy %, one layer at {100 * threshold:g} % of its energy"
        save_figures(out, {f"dropout_{threshold:g}": layer_plot(study.layers, lines, label)})
    return record


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    **{f"cost {name}": lambda _, name=name: cost(name) for name in IMAGENET},
    **{f"correlation {label}": lambda options, label=label: correlation(label, options) for label in NETS},
    **{f"directions {label}": lambda options, label=label: directions(label, options) for label in NETS},
    **{f"compression {label}": lambda options, label=label: compression(label, options) for label in NETS},
    **{
        f"rivals {label} {t:g}": lambda options, label=label, t=t: baselines(label, t, options)
        for label in NETS
        for t in SHARED_THRESHOLDS
    },
    **{f"study {label}": lambda options, label=label: study(label, options) for label in STUDIES},
}


def print_tables(records: dict[str, dict[str, Any]]) -> None:
    """Print Markdown tables of everything that was measured."""
    for section, record in records.items():
        kind = section.split()[0]
        print(f"\n**{section}**\n")
        _PRINT[kind](record)


def _print_cost(record: dict[str, Any]) -> None:
    seconds, filters = record["seconds"], sum(record["filters"])
    ratios = {name: seconds[name] / seconds["forward"] for name in ("energies", "prune")}
    shares = (100 * sum(column) / filters for column in zip(*record["removed"], strict=True))
    print(
        f"forward {seconds['forward']:.2f} s; energies {seconds['energies']:.2f} s ({ratios['energies']:.2f}x); ",
        end="",
    )
    print(f"whole pruning {seconds['prune']:.2f} s ({ratios['prune']:.2f}x); monotone: {record['monotone']}")
    print("filters removed %:", ", ".join(f"{t:g}: {s:.1f}" for t, s in zip(THRESHOLDS, shares, strict=True)))


def _print_correlation(record: dict[str, Any]) -> None:
    print("| score | mean | lowest | highest |\n|---|---:|---:|---:|")
    for row, by_layer in record["rows"].items():
        values = list(by_layer.values())
        print(f"| {row} | {statistics.mean(values):.2f} | {min(values):.2f} | {max(values):.2f} |")


def _print_directions(record: dict[str, Any]) -> None:
    print(f"| chirp | {' | '.join(f'{100 * r:g} %' for r in SHARED_RATIOS)} | mean | less the thesis' |")
    print(f"|---|{'---:|' * (len(SHARED_RATIOS) + 2)}")
    thesis = [statistics.mean(values) for values in record["rows"]["chirp, one diagonal (thesis)"]]
    for row, seeds in record["rows"].items():
        means = [statistics.mean(values) for values in seeds]
        cells = [show_accuracies(values) for values in (*zip(*seeds, strict=True), means)]
        gain = interval([mine - theirs for mine, theirs in zip(means, thesis, strict=True)]).show(100, sign=True)
        print(
            f"| {row} | {' | '.join(cells)} | {'' if row in ('unpruned', 'chirp, one diagonal (thesis)') else gain} |"
        )


def _print_compression(record: dict[str, Any]) -> None:
    print(f"| layer | filters | {' | '.join(f'{100 * t:g} %' for t in THRESHOLDS)} |\n|---|{'---:|' * 7}")
    for name, counts in record["layers"]:
        print(f"| {name} | {' | '.join(map(str, counts))} |")


def _print_baselines(record: dict[str, Any]) -> None:
    print(f"{record['removed']} of {record['filters']} filters gone; before: {100 * record['before']:.1f} %\n")
    print("| filters by | as it is % | re-calibrated % |\n|---|---:|---:|")
    for row, runs in record["rows"]:
        once, again = (100 * statistics.mean(values) for values in zip(*runs, strict=True))
        print(f"| {row} | {once:.1f} | {again:.1f} |")


def _print_study(record: dict[str, Any]) -> None:
    print(as_markdown(show_energy(record)))
    columns = {"after layer": "{layers[0]}", "removed": "{removed}", "accuracy %": "{quality[accuracy]:.1%}"}
    print(table_of(None, record["accumulated"]["steps"], columns).to_markdown())
    if "dropout" in record:
        unpruned = record["dropout"].pop("unpruned")
        rows = {"unpruned": [100 * found["accuracy"] for found in unpruned.values()]}
        for threshold, layers in record["dropout"].items():
            found = [[100 * layer[rate]["accuracy"] for layer in layers.values()] for rate in unpruned]
            rows[f"one layer at {threshold}, mean"] = [statistics.mean(values) for values in found]
        cells = [[name, *(f"{value:.1f}" for value in values)] for name, values in rows.items()]
        print(markdown_table(["accuracy % at dropout rate", *unpruned], cells))


_PRINT: dict[str, Callable[[dict[str, Any]], None]] = {
    "cost": _print_cost,
    "correlation": _print_correlation,
    "directions": _print_directions,
    "compression": _print_compression,
    "rivals": _print_baselines,
    "study": _print_study,
}


def _all_masks(model: nn.Module, config: Any, example: Any, images: Any) -> Iterator[tuple[str, Any]]:
    """Yield every method's name and masks; random choice once per seed."""
    choices = [("random", "random", {"seed": seed}) for seed in range(RANDOM_SEEDS)]
    choices += [(name, name, {}) for name in ("l1", "l2", "fpgm")]
    choices += [(row, "energy", {"example_inputs": example, **knobs}) for row, knobs in CHIRPS.items()]
    for row, name, knobs in choices:
        yield row, _masks(create_pruner(name, model, config, **knobs))
    yield "energy on data", _masks(energy_on_data(model, config, list(images)))


def _masks(pruner: Any) -> Any:
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


def data_energies(model: nn.Module, layers: Sequence[str], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the mean energy of each channel's output on images, float64 ``(out,)``, by layer."""
    sums: dict[str, Any] = dict.fromkeys(layers, 0.0)
    samples = dict.fromkeys(layers, 0)

    def add(name: str, outputs: Tensor) -> None:
        rows = outputs.detach().transpose(0, 1).flatten(1).double()
        sums[name] = sums[name] + rows.pow(2).sum(1)
        samples[name] += rows.shape[1]

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: add(name, out)) for name in layers
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: sums[name] / samples[name] for name in layers}


class DataEnergyCollector(DataCollector):
    """Energy of each filter's responses to images."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches = batches

    def collect(self, context: PruningContext) -> Data:
        """Return energies ``(blocks, 1)``."""
        layers = dict.fromkeys(name for unit in context.units for name, _ in unit.members)
        energies = data_energies(context.model, list(layers), self.batches)
        return context.collected(lambda unit, module, target: energies[module][:, None])


def energy_on_data(model: nn.Module, config: Any, batches: Sequence[Tensor]) -> StructuredPruner:
    """Return a pruner by the energy of responses to images."""
    return StructuredPruner(
        model,
        config,
        collector=DataEnergyCollector(batches),
        calculator=CumulativeEnergyMetric(),
        planner=Planner(strict=True, tolerance=TOLERANCE),
    )


def _energies(model: nn.Module, layers: list[str], example: Any, **knobs: Any) -> dict[str, list[float]]:
    config = [{"op_names": layers, "sparse_ratio": 0.0}]
    pruner = EnergyFilterPruner(model, config, example_inputs=example, **knobs)
    data = pruner.collect_data()
    pruner.unwrap_model()
    return {name: data[name]["weight"][:, 0].tolist() for name in layers}


def _layers(model: nn.Module, example: Any) -> list[str]:
    return [name for name in inner_layers(model, example) if not isinstance(model.get_submodule(name), nn.Linear)]


def _seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    """Median CPU time on one thread; the first call warms up."""
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            began = time.process_time()
            call()
            times.append(time.process_time() - began)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
