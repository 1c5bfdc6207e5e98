"""Narrow a GPT's hidden width together with its heads and neurons, or heads and neurons alone, at the same time.

    python -m benchmarks.norms.gpt_width --out runs/gpt_width

trains the small GPT of ``trained_nets.py`` on the standard library's sources. All widths are cut to three quarters and
to half (least squares), or heads and neurons alone to the share at which a batch of 64 texts takes as long; weights are
reconstructed, then distilled for 300 steps. Bits per byte of 512 rows of text are measured after both. A line per
network goes to ``gpt_width.jsonl``, trained nets to files beside it; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nni_topo
from benchmarks.budgets.bench_equal_time import shown
from benchmarks.transformers.trained_nets import TrainedNet
from nni_topo import zoo
from nni_topo.network.cost.measure import time_shares
from nni_topo.network.runtime.reports import markdown_table
from nni_topo.studies.records import append_record, read_records

SHARES, SEEDS = (0.75, 0.5), range(5)
ALL, INNER = "hidden width, heads and neurons", "heads and neurons"


class Gpt(TrainedNet):
    """A trained GPT."""

    def pruned(self, cut: str, share: float, criterion: str = "reconstruction") -> Any:
        """Return masks that keep a share of all widths, or of heads and neurons."""
        asked: list[dict[str, Any]] = [
            {"op_names_re": [r".*\.attention"], "granularity": "head", "sparse_ratio": 1.0 - share},
            {"op_names_re": [r".*\.mlp\.(gate_proj|up_proj)"], "sparse_ratio": 1.0 - share},
        ]
        if cut == ALL:
            asked = [{"op_types": ["Linear", "Embedding"], "sparse_ratio": 1.0 - share}]
        net = copy.deepcopy(self.net)
        knobs: dict[str, Any] = {}
        if criterion == "reconstruction":
            knobs = {"calibration": self.batches, "example_inputs": self.batches[0][:2]}
        groups = nni_topo.dependency_groups(net, self.batches[0][:2], asked)
        return nni_topo.create_pruner(criterion, net, groups, **knobs).compress()[1]

    def as_fast_as(self, wide: nn.Module) -> float:
        """Return the share of heads and neurons at which the network takes about as long as another one."""
        heads = self.net.blocks[0].attention.num_kv_heads
        shares = [kept / heads for kept in range(1, heads)]
        nets = [self.recovered(self.pruned(INNER, share, "l1"), "none")[0] for share in shares]
        (wanted, _), *times = time_shares([wide, *nets], self.net, self.batches[0])
        apart = [abs(time - wanted) for time, _ in times]
        return shares[apart.index(min(apart))]


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--limit", type=int, default=4_000, help="rows to train on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpt_width.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    for seed, share in itertools.product(options.seeds, SHARES):
        if all((seed, share, cut) in done for cut in (ALL, INNER)):
            continue
        start = Gpt("gpt_small", seed, options)
        wide, _ = start.recovered(start.pruned(ALL, share), "reconstruct")
        kept = start.as_fast_as(wide)
        inner, _ = start.recovered(start.pruned(INNER, kept), "reconstruct")
        times = time_shares([wide, inner], start.net, start.batches[0])
        for cut, dense, of_each, (time, _) in zip((ALL, INNER), (wide, inner), (share, kept), times, strict=True):
            distilled, _ = start.distilled(dense)
            record = {"key": (seed, share, cut), "kept": of_each, "unpruned": start.unpruned, "time": time}
            record |= {"reconstructed": start.worth(dense), "distilled": start.worth(distilled)}
            append_record(path, record | {"params": zoo.count_params(dense) / zoo.count_params(start.net)})
            print(record, flush=True)
    print(table(read_records(path)))


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each cut: bits per byte that are lost, and the share of time and of parameters."""
    rows = []
    for share, cut in itertools.product(SHARES, (ALL, INNER)):
        mine = [each for each in records if each["key"][1:] == [share, cut]]
        percents = [shown([100.0 * each[key] for each in mine], 0) for key in ("kept", "time", "params")]
        lost = [shown([each[stage] - each["unpruned"] for each in mine], 3) for stage in ("reconstructed", "distilled")]
        rows.append([cut, str(len(mine)), *percents, *lost])
    head = ["cut", "seeds", "kept of each, %", "time, %", "parameters, %"]
    return markdown_table([*head, "bits per byte lost, reconstructed", "distilled"], rows, text_columns=1)


if __name__ == "__main__":
    main()
