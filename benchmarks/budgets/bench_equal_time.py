"""Blocks, channels or both at the same time of a batch, and which rule names the blocks: what transformers lose.

    python -m benchmarks.budgets.bench_equal_time --data-dir DIR --out runs/equal_time
    python -m benchmarks.budgets.bench_equal_time --data-dir DIR --out runs/equal_time \
        --nets vit_small --batch 1 --share 0.6

trains a ViT, a BERT and a GPT as ``trained_nets.py`` does, and makes each take half of the time of a batch of 64,
measured on one thread, or with the second command the ViT six tenths of the time of a single image: by `shrink` with
fewer channels, by `shrink` with ``depth=True``, and by removing whole blocks alone, in the order of their held-out
loss, of two scores that others have proposed, or at random. The layers before a gap make up for a removed block, and
all networks are distilled for 200 steps, from the same 768 unlabelled rows. Of blocks as few go as the time allows. A
line per network goes to ``equal_time.jsonl``, trained nets to files beside it; the same command goes on where it was
stopped. Of 2,000 test images accuracies are counted, of 512 rows of text bits per byte; differences are paired by
network.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.transformers.trained_nets import BATCH, TrainedNet
from nni_topo.maths.ties import first_smallest
from nni_topo.network.cost.latency import LatencyTable, measure_latency
from nni_topo.network.cost.measure import time_shares
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.runs.depth import DepthPath, Removal, cost_saved, removable_blocks
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

NETS = {"vit_small": "ViT, small", "bert_small": "BERT, small", "gpt_small": "GPT, small"}
SHARE, SEEDS, STEPS, NEAR = 1 / 2, (0, 1, 2), 200, 1.05
WAYS = {
    "channels": "channels",
    "both": "blocks and channels",
    "loss": "blocks, by held-out loss",
    "cosine": "blocks, by the cosine of ShortGPT",
    "residual": "blocks, by the residual of a linear map",
    "random": "blocks, at random",
}


class RivalPath(DepthPath):
    """Removes the block with the smallest score first."""

    by_block: dict[str, float] | None = None

    def choose(self, candidates: Sequence[Removal], scores: Sequence[float]) -> int:
        """Return the number of the block with the smallest score of its own; without scores by the loss."""
        if self.by_block is None:
            return super().choose(candidates, scores)
        own = [self.by_block[candidate.name] for candidate in candidates]
        return first_smallest(own)


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--share", type=float, default=SHARE, help="of the time")
    parser.add_argument("--batch", type=int, default=BATCH, help="rows whose time counts")
    parser.add_argument("--limit", type=int, default=4_000, help="rows to train on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "equal_time.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    for seed, name in itertools.product(options.seeds, options.nets):
        keys = [(name, seed, options.share, way, options.batch) for way in WAYS]
        if all(key in done for key in keys):
            continue
        trained = TrainedNet(name, seed, options)
        example = trained.batches[0][: options.batch]
        layers = measure_latency(trained.net, example)
        for key in keys:
            if key not in done:
                made_of_it = made(trained, example, layers, *key[1:4])
                record = {"key": key, "unpruned": trained.unpruned, **made_of_it}
                append_record(path, record)
                print(record, flush=True)
    print(table(read_records(path)))


def made(
    trained: TrainedNet, example: Tensor, layers: LatencyTable, seed: int, share: float, way: str
) -> dict[str, Any]:
    """Make one network; return what it loses on test rows, and its share of the unpruned network's time."""
    net, began = trained.net, time.process_time()
    images = Calibration([*trained.batches, *trained.judging])
    if way in ("channels", "both"):
        # `shrink` times batches as large as the first one.
        first = trained.batches[0]
        parts = [part for part in (first[: len(example)], first[len(example) :]) if len(part)]
        images = Calibration([*parts, *trained.batches[1:], *trained.judging])
        knobs: dict[str, Any] = {"depth": way == "both", "distill": {"steps": STEPS}, "progress": False}
        small = nni_topo.shrink(net, images, {"latency": share}, **knobs)
        report: Any = small.report
        removed = [each.name for each in report.depth.removed] if report.depth else []
    else:
        scored = scores(way, net, trained.batches, seed)
        small, removed = without_blocks(net, images, example, share, layers, scored)
    seconds = time.process_time() - began
    ((taken, _),) = time_shares([small.eval()], net, example, seconds=3.0)
    worth = trained.worth(small)
    return {"worth": worth, "time": taken, "removed": removed, "seconds": seconds}


def scores(way: str, net: nn.Module, batches: list[Tensor], seed: int) -> Callable[[list[str]], Any]:
    """Return a function that scores blocks by a rule, from the unpruned network; of the loss it returns None."""

    def scored(names: list[str]) -> dict[str, float] | None:
        if way == "loss":
            return None
        if way == "random":
            drawn = torch.rand(len(names), generator=torch.Generator().manual_seed(seed))
            return dict(zip(names, drawn.tolist(), strict=True))
        sys.path.append(str(Path(__file__).parents[1] / "topology"))
        from which_blocks import COSINE, RESIDUAL, stream_scores

        of_blocks = stream_scores(net, names, torch.cat(batches)[:256])
        return {name: of_blocks[name][COSINE if way == "cosine" else RESIDUAL] for name in names}

    return scored


def without_blocks(
    net: nn.Module,
    images: Calibration,
    example: Tensor,
    share: float,
    layers: LatencyTable,
    scored: Callable[[list[str]], Any],
) -> tuple[nn.Module, list[str]]:
    """Remove whole blocks until a batch takes at most a share of the time, and distil the network."""
    learned, judges = images.split()
    assert judges is not None
    removable = removable_blocks(net, images, whole_blocks=True)
    path = RivalPath(net, learned, judges, None, removable, cost_saved(net, example, "latency", layers))
    path.by_block = scored([candidate.name for candidate in removable.candidates])
    path.nearest(1e-6)  # as many as can go
    for state in path.states:
        if state.removed:
            ((taken, _),) = time_shares([state.net], net, example, share)
            if taken <= NEAR * share:
                break
    distilled = nni_topo.distill(state.net, net, learned, steps=STEPS, held_out=judges, progress=False)
    return distilled, [each.name for each in state.removed]


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each network, batch, time and way, with means over the seeds and 95 % intervals."""
    rows = []
    for net, share, batch in dict.fromkeys((key[0], key[2], key[4]) for key in (each["key"] for each in records)):
        # Of text fewer bits per byte are better.
        is_text = net == "gpt_small"
        scale, digits = (-1.0, 3) if is_text else (100.0, 1)
        lost: dict[str, dict[int, float]] = {}
        for way, name in WAYS.items():
            mine = [
                record for record in records if record["key"][0] == net and record["key"][2:] == [share, way, batch]
            ]
            if not mine:
                continue
            lost[way] = {each["key"][1]: scale * (each["unpruned"] - each["worth"]) for each in mine}
            less = [lost["channels"][seed] - own for seed, own in lost[way].items() if seed in lost["channels"]]
            rows.append(
                [
                    NETS[net],
                    str(batch),
                    f"{100 * share:g} %",
                    name,
                    str(len(mine)),
                    shown([100 * each["time"] for each in mine], 1),
                    "bits per byte" if is_text else "points",
                    shown(list(lost[way].values()), digits),
                    "" if way == "channels" else shown(less, digits),
                    shown([float(len(each["removed"])) for each in mine], 1),
                    shown([each["seconds"] for each in mine], 0),
                ]
            )
    head = ["network", "batch", "time asked", "what is removed", "seeds", "time kept %", "unit", "lost"]
    return markdown_table([*head, "less than channels", "blocks removed", "CPU s"], rows, text_columns=4)


def shown(values: list[float], digits: int) -> str:
    """Return the mean with its 95 % interval; a single value as it is."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return interval(values).show(1, digits)


if __name__ == "__main__":
    main()
