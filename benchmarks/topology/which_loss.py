"""T5 of HYPOTHESES.md: what distillation should keep of an embedding network.

    python benchmarks/topology/which_loss.py --images runs/fresh/images.npz --out runs/topology

Trains encoders of patches, removes half of every convolution's filters by L1, reconstructs the weights
(``compensate``), distils with each loss for the same CPU time, and writes a line per encoder, loss, learning rate and
weight to ``which_loss.jsonl``. The same command goes on where it was stopped. ``images.npz`` is made by
``benchmarks/fresh_networks/split.py``.

    python benchmarks/topology/which_loss.py --out benchmarks/records/topology --into benchmarks/results/topology.md

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoders import (
    centre_patches,
    embedded,
    nearest,
    pruned_encoder,
    random_patches,
    recall,
    trained_encoder,
)
from registered import CONFIRMATION, EXPLORATION, Figures, benchmark, best_of, difference_row
from rtd import rtd_lite_loss
from torch import Tensor, nn
from torch.nn.functional import normalize

from nni_topo import zoo
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table, show_accuracies

SOURCE = "benchmarks/topology/which_loss.py"  # as the comments around a page's tables say
KEPT = 0.5  # of every convolution's filters
SECONDS = 5.0  # CPU time of a course
BATCH = 64
RATES = (3e-3, 1e-2, 3e-2)  # of AdamW
WEIGHTS = (0.1, 1.0, 10.0)  # of RTD-Lite
VIEWS = 2  # random patches of each training image
WARMUP, FALL = 0.1, 0.4  # shares of the time in which the rate rises, and falls to zero
SIMILARITIES = 5.0  # their weight beside the cosine, as nni_topo.distill has it

Record = dict[str, Any]
Course = tuple[str, float, float]
"""A loss, the learning rate, and the weight of RTD-Lite, 0 for the other losses."""


def main() -> None:
    """Parse the command line; run what is missing and print the tables."""
    benchmark(__doc__, SOURCE, tables, measure)


def measure(images: Path, out: Path, path: Path) -> None:
    """Explore learning rates, then the weight of RTD-Lite at the rate of squares alone, and measure the chosen ones."""
    data = zoo.load_data(str(images), limit=5_000)
    plain = [(loss, rate, 0.0) for loss in LOSSES for rate in RATES]
    for seed in EXPLORATION:
        run(seed, data, out, path, plain)
    _, rate, _ = chosen_course(read_records(path), SQUARES)
    for seed in EXPLORATION:
        run(seed, data, out, path, [(OURS, rate, weight) for weight in WEIGHTS])
    records = read_records(path)
    chosen = [chosen_course(records, loss) for loss in (*LOSSES, OURS)]
    for seed in CONFIRMATION:
        run(seed, data, out, path, chosen)


def run(seed: int, data: zoo.DataBundle, out: Path, path: Path, courses: list[Course]) -> None:
    """Distil the pruned encoder of a seed by the courses that aren't there yet."""
    known = {tuple(record["key"]) for record in read_records(path)}
    missing = [course for course in courses if (seed, *course) not in known]
    if not missing:
        return
    model = trained_encoder(seed, data, out)
    images = data.train.tensors[0]
    dense = pruned_encoder(model, KEPT, centre_patches(images), seed)
    generator = torch.Generator().manual_seed(seed)
    patches = torch.cat([random_patches(images, generator) for _ in range(VIEWS)])
    wanted = embedded(model, patches)
    judges = {
        "validation": centre_patches(data.validation.tensors[0]),
        "test": centre_patches(data.test.tensors[0]),
    }
    neighbours = {name: neighbours_of(model, each) for name, each in judges.items()}
    undistilled = {name: recall(neighbours_of(dense, each), neighbours[name]) for name, each in judges.items()}
    for course in missing:
        student, steps = distilled(dense, patches, wanted, course, seed)
        record = {"key": [seed, *course], "steps": steps, "undistilled": undistilled}
        record |= {name: recall(neighbours_of(student, each), neighbours[name]) for name, each in judges.items()}
        append_record(path, record)
        print(*record["key"], steps, f"{100 * record['test']:.1f} %", flush=True)


def neighbours_of(model: nn.Module, patches: Tensor) -> Tensor:
    """Return the neighbours of each patch among the others."""
    vectors = embedded(model, patches)
    return nearest(vectors, vectors)


def distilled(dense: nn.Module, patches: Tensor, wanted: Tensor, course: Course, seed: int) -> tuple[nn.Module, int]:
    """Return a copy of a network that learned for some seconds of CPU time, and the number of its steps."""
    loss, rate, weight = course
    student = copy.deepcopy(dense).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    variance = wanted.var(0).mean()
    steps = 0
    began = time.process_time()
    done = 0.0
    while done < 1.0:
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (done + 1e-3) / WARMUP, (1.0 - done) / FALL)
        chosen = torch.randint(len(patches), (BATCH,), generator=generator)
        found, theirs = student(patches[chosen]), wanted[chosen]
        if loss == OURS:
            value = squares(found, theirs, variance) + weight * rtd_lite(found, theirs)
        else:
            value = LOSSES[loss](found, theirs, variance)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        steps += 1
        done = (time.process_time() - began) / SECONDS
    return student.eval(), steps


def squares(found: Tensor, wanted: Tensor, variance: Tensor) -> Tensor:
    """Return the mean squared distance of outputs (n, features) over the variance of those that are wanted."""
    return (found - wanted).square().mean() / variance


def cosine(found: Tensor, wanted: Tensor, variance: Tensor) -> Tensor:
    """Return one minus the mean cosine of outputs."""
    return 1.0 - (normalize(found) * normalize(wanted)).sum(1).mean()


def similarities(found: Tensor, wanted: Tensor, variance: Tensor) -> Tensor:
    """Return the mean squared difference of the rows of similarities, scaled to length one, as similarity-preserving.

    F. Tung and G. Mori, "Similarity-preserving knowledge distillation", https://arxiv.org/abs/1907.09682, equation 4.
    """
    one, other = (normalize(each @ each.T) for each in (found, wanted))
    return (one - other).square().sum() / len(found)


def cosine_and_similarities(found: Tensor, wanted: Tensor, variance: Tensor) -> Tensor:
    """Return the loss of ``nni_topo.distill(objective="cosine")``."""
    one, other = normalize(found), normalize(wanted)
    return cosine(found, wanted, variance) + SIMILARITIES * (one @ one.T - other @ other.T).square().mean()


def rtd_lite(found: Tensor, wanted: Tensor) -> Tensor:
    """Return RTD-Lite of a batch, per point, between outputs of length one: neighbours are those of large cosine."""
    return rtd_lite_loss(normalize(found), normalize(wanted)) / len(found)


SQUARES, OURS = "squares", "squares and RTD-Lite"
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    SQUARES: squares,
    "cosine": cosine,
    "similarity-preserving": similarities,
    "cosine and similarities": cosine_and_similarities,
}
BASELINES = (SQUARES, "cosine", "similarity-preserving")


def chosen_course(records: list[Record], loss: str) -> Course:
    """Return the course of a loss with the highest mean recall on the validation images of exploration."""
    explored = by_course(records, EXPLORATION, "validation")
    return max((course for course in explored if course[0] == loss), key=lambda each: _mean(explored[each]))


def by_course(records: list[Record], seeds: range, measure: str = "test") -> dict[Course, dict[int, float]]:
    """Return recalls by course, then by seed."""
    found: dict[Course, dict[int, float]] = {}
    for record in records:
        seed, *course = record["key"]
        if seed in seeds:
            found.setdefault(tuple(course), {})[seed] = record[measure]
    return found


def _mean(by_seed: dict[int, float]) -> float:
    return float(np.mean(list(by_seed.values())))


def tables(records: list[Record]) -> str:
    """Return Markdown: exploration, confirmation, and the difference that the hypothesis is about."""
    blocks = []
    for title, seeds in (("Exploration", EXPLORATION), ("Confirmation", CONFIRMATION)):
        found = by_course(records, seeds)
        if not found:
            continue
        before = {record["key"][0]: record["undistilled"]["test"] for record in records if record["key"][0] in seeds}
        rows = [["no distillation", "", "", "", show_accuracies(list(before.values()))]]
        for (loss, rate, weight), by_seed in found.items():
            steps = [record["steps"] for record in records if record["key"] in [[s, loss, rate, weight] for s in seeds]]
            shown = f"{weight:g}" if weight else ""
            rows.append([loss, f"{rate:g}", shown, f"{np.mean(steps):.0f}", show_accuracies(list(by_seed.values()))])
        head = ["loss", "learning rate", "weight of RTD-Lite", "steps", "recall@10, %"]
        blocks += [f"**{title}, {len(before)} encoders**", markdown_table(head, rows)]
    blocks += outcome(records)
    return "\n\n".join(blocks)


def outcome(records: list[Record]) -> list[str]:
    """Return the table of differences between squares with RTD-Lite and each other loss on the fresh encoders."""
    fresh: Figures = {course[0]: by_seed for course, by_seed in by_course(records, CONFIRMATION).items()}
    if not all(len(fresh.get(loss, {})) > 1 for loss in (*LOSSES, OURS)):
        return []
    explored = by_course(records, EXPLORATION, "validation")
    best = best_of(BASELINES, {loss: explored[chosen_course(records, loss)] for loss in BASELINES})
    rows = []
    for loss in sorted(LOSSES, key=lambda name: name != best):
        label = f"{loss} (best baseline)" if loss == best else loss
        rows.append([label, *difference_row(fresh[OURS], fresh[loss])])
    title = f"**Differences on {len(fresh[OURS])} fresh encoders**"
    return [title, markdown_table([f"{OURS} against", "difference, points", "p"], rows)]


if __name__ == "__main__":
    main()
