"""T8 of HYPOTHESES.md: what the functional cloud is worth over twelve kinds of networks, beside ten other rows.

    python -m benchmarks.topology.which_estimate --images runs/fresh/images.npz --out runs/topology

Trains the networks, makes each smaller by every row to a quarter and to a tenth of its MACs, and writes a line per
network, share and row to ``which_estimate.jsonl``: accuracy with batch norms recalibrated, and with weights
reconstructed. The same command goes on where it was stopped. It needs a committed program, and stops if the lines that
are there come from another commit or from networks that were trained otherwise. ``images.npz`` is made by
``benchmarks/fresh_networks/split.py``.

    python -m benchmarks.topology.which_estimate --out benchmarks/records/topology \
        --into benchmarks/results/topology.md

writes the tables and the verdict of the records into a page, between the two comments that name this file. Rows of runs
that were stopped or discarded go to ``which_estimate_discarded.jsonl``, by hand, with the reason in HYPOTHESES.md.
"""

from __future__ import annotations

import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning
from scipy import stats
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from benchmarks.norms.under_masks import RECIPES
from benchmarks.tables import holm, outcome
from benchmarks.topology.registered import benchmark
from benchmarks.topology.scenes import SIDE, composed, mean_intersection_over_union, outputs_for
from benchmarks.topology.which_clouds import DIGITS, TRAIN, VARIANTS, Kind, split_of
from benchmarks.topology.which_clouds import KINDS as ASKED_BEFORE
from nni_topo import zoo
from nni_topo.recovery import recalibrate_batch_norm
from nni_topo.runs.choices import CompensationChoice, DataChoice, ModelChoice, PrunerChoice, Target
from nni_topo.runs.provenance import provenance
from nni_topo.runs.run import Start, build_model, made_dense, prune_to_ratios, trained
from nni_topo.runs.widths import layer_ratios
from nni_topo.studies.baselines import PREFIX, baseline_masks
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table, show_accuracies
from nni_topo.zoo.evaluation import by_label

SOURCE = "benchmarks/topology/which_estimate.py"  # as the comments around a page's tables say
SEEDS = range(800, 805)
SHARES = (0.25, 0.1)
RECOVERIES = {"recalibrated": "batch norms recalibrated", "reconstructed": "weights reconstructed"}
NEAR = 0.1  # of a requested share of the MACs: a row that is farther from it has other widths, and no figure
SCENES = "U-Net of scenes"
SCENE_COUNTS = {"train": 3_000, "validation": 500, "test": 1_000}


def _of_fashion(model: str, width: float = 1.0, **changes: Any) -> Kind:
    recipe = replace(zoo.default_recipe(model, "fashion-mnist"), epochs=10)
    return Kind(ModelChoice(model, width), replace(recipe, **changes))


_NORMS, _NETS = "benchmarks.norms.under_masks", "benchmarks.recovery_nets"
KINDS = {
    **ASKED_BEFORE,
    "VGG-16, a quarter of its width": _of_fashion("vgg16", 0.25),
    "ViT, small": _of_fashion("vit_small"),
    "ConvNeXt, small": Kind(ModelChoice(f"{_NORMS}:convnext_like"), RECIPES["under_masks:convnext_like"]),
    "ResNet-29, bottlenecks": _of_fashion("benchmarks.networks.bottleneck_resnet:resnet29", lr=0.1),
    "DenseNet, small": _of_fashion(f"{_NETS}:densenet_like", lr=0.1),
    "ResNet-20, group norms": Kind(
        ModelChoice(f"{_NORMS}:groupnorm_resnet20"), RECIPES["under_masks:groupnorm_resnet20"]
    ),
    "1-D convolutions": _of_fashion(f"{_NETS}:sequence_like", lr=0.1),
    SCENES: Kind(
        ModelChoice("benchmarks.topology.scenes:PlaceLabeller"),
        zoo.Recipe(6, batch_size=64, lr=2e-2, weight_decay=1e-4, optimizer="adamw"),
    ),
}
OURS, COVER, NO_ORIGIN, SQUARES, HESSIAN = "functional cloud", "mean distance", "no origin", "least squares", "hessian"
SETTINGS = {
    OURS: PrunerChoice("topological"),
    COVER: VARIANTS["mean distance, searched"],
    NO_ORIGIN: VARIANTS["no origin"],
}
"""Settings of `TopologicalPruner`; the first was named beforehand."""
CRITERIA = {**SETTINGS, SQUARES: PrunerChoice("reconstruction")}
BASES = ("l1", "random", PREFIX)
"""Rows that the named setting must be ahead of."""
ROWS = (*CRITERIA, *BASES, "l2", "fpgm", "taylor", HESSIAN)
PRIMARY = (SHARES[0], "recalibrated")

Record = dict[str, Any]
Accuracies = dict[tuple[float, str], dict[str, dict[str, dict[int, float]]]]
"""Accuracies in [0, 1] by share and recovery, then by kind, row and seed."""


def main() -> None:
    """Parse the command line; run what is missing and print the tables."""
    benchmark(__doc__, SOURCE, tables, measure)


# Runs


def measure(images: Path, out: Path, path: Path) -> None:
    """Measure every row that isn't there yet, all kinds of the first seed first."""
    revision = committed_revision()
    others = {record["revision"] for record in read_records(path)} - {revision}
    if others:
        raise SystemExit(f"all rows must come from one commit, got {revision} and {', '.join(others)} ({path})")
    for seed, name in product(SEEDS, KINDS):
        run(name, seed, images, out, path)


def committed_revision() -> str:
    """Return the commit of the program; SystemExit if a file of it differs."""
    root = Path(__file__).parents[2]
    program = ("nni_topo", "benchmarks", ":!benchmarks/records", ":!benchmarks/results")
    git = ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", *program]
    changed = subprocess.check_output(git, text=True).strip()
    if changed:
        raise SystemExit(f"the program must be committed before a row is measured, got changes: {changed}")
    return str(provenance()["revision"])


def run(name: str, seed: int, images: Path, out: Path, path: Path) -> None:
    """Measure every row on the network of a kind and a seed, and keep what isn't there yet."""
    there = {tuple(record["key"]): record for record in read_records(path)}
    missing = [key for key in product([name], [seed], SHARES, ROWS) if key not in there]
    if not missing:
        return
    start = started(name, seed, images, out)
    unpruned = {f"unpruned_{part}": quality(name, start, start.net, part) for part in ("validation", "test")}
    for key, record in there.items():
        if key[:2] == (name, seed) and any(record[part] != value for part, value in unpruned.items()):
            raise SystemExit(f"rows must come from one trained network, got {unpruned} beside {record} ({path})")
    facts = {name: provenance()[name] for name in ("revision", "versions", "hardware")}
    ratios: dict[float, dict[str, float]] = {}
    for key in missing:
        _, _, share, row = key
        began = time.process_time()
        try:
            if share not in ratios:
                ratios[share] = layer_ratios(start.net, start.example, Target("flops", share))
            figures = measured(name, row, Target("flops", share), ratios[share], start)
        except (MemoryError, OSError):
            raise
        except Exception as error:  # a row that can't be had on a kind; other libraries raise anything
            figures = {"error": f"{type(error).__name__}: {error}"[:300]}
        record = {"key": key, **unpruned, **figures, "cpu_seconds": time.process_time() - began, **facts}
        append_record(path, record)
        print(*key, figures.get("error", figures.get("test_recalibrated")), flush=True)


def started(name: str, seed: int, images: Path, out: Path) -> Start:
    """Return the trained network of a kind and a seed with its own split of the data."""
    kind = KINDS[name]
    file = str(split_of(name, seed, images, out))
    folder = out / "checkpoints"
    if name != SCENES:
        data = DataChoice(file, limit=None if name == DIGITS else TRAIN)
        return trained(kind.model, data, recipe=kind.recipe, folder=folder, seed=seed, progress=False)
    bundle = scenes_of(zoo.load_data(file, limit=TRAIN), seed)
    net = build_model(kind.model, bundle, seed)
    path = folder / f"scenes-{seed}.pt"
    if path.exists():
        zoo.load_checkpoint(path, net)
    else:
        zoo.train(net, bundle, kind.recipe, seed=seed, progress=False)
        zoo.save_checkpoint(path, net, {"seed": seed})
    return Start(net.eval(), bundle, kind.recipe, seed)


def scenes_of(data: zoo.DataBundle, seed: int) -> zoo.DataBundle:
    """Return scenes of the images of each part; labels are the classes of every second pixel, 0 the background."""
    parts = {}
    for place, (part, count) in enumerate(SCENE_COUNTS.items()):
        scenes = composed(*getattr(data, part)[:], count, 3 * seed + place)
        parts[part] = TensorDataset(scenes.images, scenes.pixels[:, ::2, ::2].contiguous())
    names = ("background", *data.class_names)
    return replace(data, **parts, num_classes=len(names), class_names=names, image_size=SIDE)


def measured(name: str, row: str, target: Target, ratios: dict[str, float], start: Start) -> Record:
    """Return what a network is worth that a row made smaller."""
    count = KINDS[name].images
    began = time.process_time()
    masks, loss = selected(row, target, ratios, start, count)
    record: Record = {"select_cpu_seconds": time.process_time() - began, "loss": loss}
    dense, _ = made_dense(start, masks)
    record["share"] = share = zoo.count_macs(dense, start.example) / zoo.count_macs(start.net, start.example)
    if abs(share / target.value - 1.0) > NEAR:
        raise ValueError(f"a row must keep {target.value:g} of the MACs, got {share:.3f} ({row})")
    recalibrated = recalibrate_batch_norm(dense, start.images(count))
    reconstructed, _ = made_dense(start, masks, CompensationChoice(count), progress=False)
    for recovery, net in (("recalibrated", recalibrated), ("reconstructed", reconstructed)):
        for part in ("validation", "test"):
            record[f"{part}_{recovery}"] = quality(name, start, net, part)
    return record


def quality(name: str, start: Start, net: nn.Module, part: str) -> float:
    """Return the accuracy, or of scenes the mean intersection over union, on the validation or test images."""
    dataset = getattr(start.data, part)
    if name != SCENES:
        return zoo.evaluate(net, dataset)
    scenes, places = dataset[:]
    return mean_intersection_over_union(outputs_for(net, scenes).permute(0, 3, 1, 2), places)


def selected(row: str, target: Target, ratios: dict[str, float], start: Start, count: int) -> tuple[Any, float | None]:
    """Return the masks of a row, and the mean loss of the labelled images that it used."""
    labelled = start.data.validation
    if row in (PREFIX, HESSIAN):
        importance_of = hessian_of(labelled) if row == HESSIAN else None
        masks, _ = baseline_masks(PREFIX, start.analysis, ratios, importance_of)
    elif row == "taylor":
        # The training images' loss may be next to zero, and with it all gradients.
        on_validation = replace(start, data=replace(start.data, train=labelled))
        masks = prune_to_ratios(on_validation, PrunerChoice("taylor"), target, ratios).masks
    else:
        choice = replace(CRITERIA[row], calibration=count) if row in CRITERIA else PrunerChoice(row)
        masks = prune_to_ratios(start, choice, target, ratios).masks
    return masks, zoo.loss_and_accuracy(start.net, labelled)[0] if row in ("taylor", HESSIAN) else None


def hessian_of(labelled: TensorDataset) -> Callable[[nn.Module], Any]:
    """Return what measures Torch-Pruning's Hessian importance: weights squared times mean squared gradients by image.

    Its own sum of squared gradients (version 1.6.1) keeps the last image's alone.
    """

    def importance_of(model: nn.Module) -> Any:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for image, label in zip(*(tensor.split(1) for tensor in labelled[:]), strict=True):
            loss = cross_entropy(*by_label(model(image), label))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient)
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total / len(labelled)
        return torch_pruning.importance.GroupHessianImportance()

    return importance_of


# The estimate


def accuracies_of(records: Iterable[Record]) -> Accuracies:
    """Return the accuracies of the rows without an error."""
    accuracies: Accuracies = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for record in records:
        kind, seed, share, row = record["key"]
        if "error" not in record:
            for recovery in RECOVERIES:
                accuracies[share, recovery][kind][row][seed] = record[f"test_{recovery}"]
    return accuracies


def kind_means(accuracies: Accuracies, cell: tuple[float, str], row: str, base: str) -> dict[str, float]:
    """Return by kind the mean paired difference in points, over the networks that have both rows."""
    means = {}
    for kind in KINDS:
        ours, theirs = accuracies[cell][kind][row], accuracies[cell][kind][base]
        seeds = ours.keys() & theirs.keys()
        if seeds:
            means[kind] = 100.0 * float(np.mean([ours[seed] - theirs[seed] for seed in sorted(seeds)]))
    return means


def complete(records: list[Record]) -> set[tuple[str, int]]:
    """Return the networks of which every row is there."""
    counts: dict[tuple[str, int], int] = defaultdict(int)
    for record in records:
        counts[record["key"][0], record["key"][1]] += 1
    return {network for network, count in counts.items() if count == len(SHARES) * len(ROWS)}


def secondary() -> list[tuple[tuple[float, str], str, str]]:
    """Return the comparisons that are corrected together: cell, row, and the row beside it."""
    pairs = [*product(SETTINGS, BASES), *((row, BASES[0]) for row in ROWS if row not in (*SETTINGS, BASES[0]))]
    pairs.append((OURS, SQUARES))
    cells = list(product(SHARES, RECOVERIES))
    return [(cell, *pair) for cell in cells for pair in pairs if cell != PRIMARY or pair not in product([OURS], BASES)]


def verdict(records: list[Record]) -> tuple[dict[str, Any], str]:
    """Return by base the interval of the primary mean over kinds, and the outcome in words."""
    accuracies = accuracies_of(records)
    estimates = {base: list(kind_means(accuracies, PRIMARY, OURS, base).values()) for base in BASES}
    primary = {base: interval(means) for base, means in estimates.items() if len(means) > 1}
    networks = len(complete(records))
    if networks < len(KINDS) * len(SEEDS):
        return primary, f"Open: {networks} of {len(KINDS) * len(SEEDS)} networks."
    if all(base in primary and primary[base].mean > primary[base].half for base in BASES):
        return primary, "All three intervals lie above zero: it becomes the default where batch norms alone follow."
    return primary, "Not all three intervals lie above zero: no default changes."


# Tables


def tables(records: list[Record]) -> str:
    """Return Markdown: how much was run, the primary comparison with its verdict, the others, and each kind."""
    blocks = ["**How much was run**", progress(records)]
    primary, word = verdict(records)
    where = f"{100 * PRIMARY[0]:g} % of the MACs, {RECOVERIES[PRIMARY[1]]}"
    blocks += [f"**The functional cloud's points more, {where}.** {word}"]
    if not primary:
        return "\n\n".join(blocks)
    accuracies = accuracies_of(records)
    lines = []
    for base, points in primary.items():
        kinds = kind_means(accuracies, PRIMARY, OURS, base)
        is_above = "yes" if points.mean > points.half else "no"
        lines.append([base, str(len(kinds)), points.show(1.0, 2, sign=True), is_above])
    blocks += [markdown_table(["than", "kinds", "mean over kinds", "above zero"], lines)]
    blocks += ["**By kind, points**", kinds_table(accuracies)]
    blocks += ["**Other comparisons, means over kinds, corrected by Holm's method**", secondary_table(accuracies)]
    for cell in product(SHARES, RECOVERIES):
        title = f"**All rows, {100 * cell[0]:g} % of the MACs, {RECOVERIES[cell[1]]}, %**"
        blocks += [title, rows_table(accuracies, cell)]
    errors = [record for record in records if "error" in record]
    blocks += [f"{'; '.join(map(str, record['key']))}: {record['error']}" for record in errors]
    return "\n\n".join(blocks)


def progress(records: list[Record]) -> str:
    """Return the table of how many networks and rows of each kind are there."""
    done = complete(records)
    lines = []
    for kind in KINDS:
        mine = [record for record in records if record["key"][0] == kind]
        unpruned = list({record["key"][1]: record["unpruned_test"] for record in mine}.values())
        networks = sum((kind, seed) in done for seed in SEEDS)
        errors = sum("error" in record for record in mine)
        line = [kind, f"{networks} of {len(SEEDS)}", str(len(mine)), str(errors)]
        lines.append([*line, show_accuracies(unpruned) if unpruned else "not run"])
    return markdown_table(["kind", "networks", "rows", "errors", "unpruned %"], lines)


def kinds_table(accuracies: Accuracies) -> str:
    """Return the table of the primary comparison by kind."""
    means = {base: kind_means(accuracies, PRIMARY, OURS, base) for base in (*BASES, SQUARES)}
    lines = []
    for kind in KINDS:
        cells = [f"{by_kind[kind]:+.2f}" if kind in by_kind else "not run" for by_kind in means.values()]
        lines.append([kind, *cells])
    return markdown_table(["kind", *(f"than {base}" for base in means)], lines)


def secondary_table(accuracies: Accuracies) -> str:
    """Return the table of all comparisons but the primary ones; one that can't be tested counts as p = 1."""
    comparisons = secondary()
    points = [list(kind_means(accuracies, *comparison).values()) for comparison in comparisons]
    p_values = [float(stats.ttest_1samp(each, 0.0).pvalue) if np.ptp(each or [0.0]) > 0 else 1.0 for each in points]
    lines = []
    for ((share, recovery), row, base), means, p, corrected in zip(
        comparisons, points, p_values, holm(p_values), strict=True
    ):
        where = [f"{100 * share:g} %", RECOVERIES[recovery], row, base]
        if not means:
            lines.append([*where, "not run", "0", "", "", ""])
            continue
        over_kinds = interval(means)
        word = outcome(over_kinds, corrected, "ahead", "behind")
        points_shown = over_kinds.show(digits=2, sign=True)
        lines.append([*where, word, str(len(means)), points_shown, f"{p:.2g}", f"{corrected:.2g}"])
    head = ["MACs", "recovery", "row", "than", "outcome", "kinds", "points", "p", "p by Holm"]
    return markdown_table(head, lines, text_columns=5)


def rows_table(accuracies: Accuracies, cell: tuple[float, str]) -> str:
    """Return the table of mean accuracies by kind and row."""
    lines = []
    for kind in KINDS:
        by_row = accuracies[cell][kind]
        cells = [f"{100 * np.mean(list(by_row[row].values())):.1f}" if by_row[row] else "" for row in ROWS]
        if any(cells):
            lines.append([kind, *cells])
    return markdown_table(["kind", *ROWS], lines)


if __name__ == "__main__":
    main()
