"""Narrow MiniLM's hidden width together with its heads and neurons, and beside it heads and neurons alone.

    python -m benchmarks.trained.width --out runs/trained

The encoder gets a linear layer behind it, at first the identity, so that its embeddings keep their size. All widths are
cut to three quarters and to half (least squares), or heads and neurons alone to the share at which a batch of 64
sentences takes as long; weights are reconstructed, then distilled for 250 steps. A line a cell goes to
``width.jsonl``; the same command goes on where it was stopped. Times are medians of interleaved runs on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.trained.run import OURS, Encoder, Row
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table

SHARES = (0.75, 0.5)
RECOVERIES = ("compensate", "compensate, distill")
ALL, INNER = "hidden width, heads and neurons", "heads and neurons"


class Mapped(nn.Module):
    """An encoder whose hidden states a linear layer maps, at first to themselves."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder, width = encoder, encoder.config.hidden_size
        self.map = nn.Linear(width, width)
        with torch.no_grad():
            self.map.weight.copy_(torch.eye(width))
            self.map.bias.zero_()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Return the encoder's output with its states mapped."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        output.last_hidden_state = self.map(output.last_hidden_state)
        return output


class MappedEncoder(Encoder):
    """MiniLM with a linear layer behind it, of which the hidden width can be cut too."""

    blocks = 0.0  # blocks of another width have no hidden states to compare

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.model = Mapped(self.model).eval()

    def masks(self, row: str, share: float, criterion: str = OURS) -> Any:
        """Prune heads and neurons to a share, and with `ALL` the hidden width too."""
        asked: list[dict[str, Any]] = [
            {"op_names_re": [r".*\.attention\.self"], "granularity": "head", "sparse_ratio": 1.0 - share},
            {"op_names_re": [r".*\.intermediate\.dense"], "sparse_ratio": 1.0 - share},
        ]
        if row == ALL:  # layers by type; what writes to the residual stream is among them
            asked = [{"op_types": ["Linear", "Embedding"], "sparse_ratio": 1.0 - share}]
        return self.masks_of(criterion, self.model, nni_topo.dependency_groups(self.model, self.example, asked))

    def milliseconds(self, *nets: nn.Module) -> list[float]:
        """Time networks in turns on a batch of 64 sentences."""
        batch, times = self.data[0], [list[float]() for _ in nets]
        with torch.no_grad():
            for _ in range(9):
                for net, own in zip(nets, times, strict=True):
                    began = time.perf_counter()
                    net(**batch)
                    own.append(1000 * (time.perf_counter() - began))
        return [statistics.median(own[1:]) for own in times]

    def share_as_fast_as(self, wide: nn.Module) -> float:
        """Return the share of heads and neurons at which the network takes as long as another one."""
        heads = self.model.encoder.config.num_attention_heads
        best, nearest = 1.0, float("inf")
        for kept in range(1, heads):
            share = kept / heads
            dense = nni_topo.to_dense(self.model, self.example, self.masks(INNER, share, "l1"), check=False)
            mine, other = self.milliseconds(dense, wide)
            if abs(mine / other - 1) < nearest:
                best, nearest = share, abs(mine / other - 1)
        return best


def main() -> None:
    """Run the cells that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "width.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    subject = MappedEncoder(options.out)
    cost = NetworkCost.on(subject.model, subject.example)({})
    for share in SHARES:
        wide = nni_topo.to_dense(subject.model, subject.example, subject.masks(ALL, share, "l1"), check=False)
        for name in (ALL, INNER):
            if all((name, share, recovery) in done for recovery in RECOVERIES):
                continue
            kept = share if name == ALL else subject.share_as_fast_as(wide)
            row = Row(subject, share, subject.model, subject.masks(name, kept))
            for recovery in RECOVERIES:
                dense, seconds, _ = row.recovered(recovery, {"steps": 250, "seconds": None})
                unpruned, mine = subject.milliseconds(subject.model, dense)
                left = NetworkCost.on(dense, subject.example)({})
                record = {
                    "key": (name, share, recovery),
                    "kept": kept,
                    "figures": {key: asdict(figure) for key, figure in subject.figures(dense).items()},
                    "seconds": seconds,
                    "macs": left.macs / cost.macs,
                    "params": left.params / cost.params,
                    "milliseconds": [unpruned, mine],
                }
                append_record(path, record | {"data": subject.facts, **provenance()})
                print(record["key"], {key: each["value"] for key, each in record["figures"].items()}, flush=True)
    print(table(read_records(path)))


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each cell."""
    rows = []
    for record in records:
        name, _, recovery = record["key"]
        unpruned, mine = record["milliseconds"]
        figures = [f"{each['value']:.3f}" for each in record["figures"].values()]
        sizes = [f"{100 * record[key]:.0f} %" for key in ("macs", "params")]
        rows.append(
            [name, f"{100 * record['kept']:.0f} %", recovery, *sizes, f"{100 * mine / unpruned:.0f} %", *figures]
        )
    head = ["cut", "kept of each", "recovery", "MACs", "parameters", "time", *records[0]["figures"]]
    return markdown_table(head, rows, text_columns=3)


if __name__ == "__main__":
    main()
