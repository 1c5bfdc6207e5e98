"""How small the two networks that nobody here trained get within a tolerance, and whether it holds on other data.

    python -m benchmarks.trained.tolerance efficientnet-lite0 minilm --out runs/trained

`shrink(..., tolerance=...)`, without distillation. EfficientNet-Lite0 gets 960 crops of the calibration photos: the
tolerance bounds the share of changed classes, and photos, not crops, are counted. MiniLM gets 2,048 sentences: the
tolerance bounds the squared distance of the pooled embeddings over their variance. What changes is then measured on
the test photos and test sentences, which nothing else looks at. A line per run goes to ``tolerance_trained.jsonl``; the
same command goes on where it was stopped. Seconds are those of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.trained import measures, pretrained
from benchmarks.trained.run import Cnn, Encoder, Subject
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table

TOLERANCES = {Cnn.name: (0.2, 0.3), Encoder.name: (0.05, 0.1, 0.2)}
SENTENCES, FILE = 2048, "tolerance_trained.jsonl"
TITLES = {Cnn.name: "EfficientNet-Lite0", Encoder.name: "MiniLM"}
MEASURES = {"answers": "changed classes", "distance": "squared distance"}

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line; run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=" or ".join(TOLERANCES))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    path = options.out / FILE
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        done = {tuple(record["key"]) for record in read_records(path)}
        if all((name, tolerance) in done for tolerance in TOLERANCES[name]):
            continue
        subject: Subject = Cnn() if name == Cnn.name else Encoder(options.out, SENTENCES)
        for tolerance in TOLERANCES[name]:
            if (name, tolerance) not in done:
                append_record(path, {"key": [name, tolerance], **found(subject, tolerance)})
    print(table(read_records(path)))


def found(subject: Subject, tolerance: float) -> Record:
    """Return what a tolerance finds, and what changes on test data."""
    is_cnn = isinstance(subject, Cnn)
    outputs: Any = None if is_cnn else _embedding
    began = time.process_time()
    model, data = subject.model, subject.data
    small: Any = nni_topo.shrink(
        model, data, tolerance=tolerance, measure="auto" if is_cnn else "distance", outputs=outputs, distill=False
    )
    seconds = time.process_time() - began
    outcome = small.report.tolerance
    figures = subject.figures(small)
    record: Record = {
        "measure": outcome.measure,
        "left": outcome.left,
        "is_met": outcome.is_met,
        "limit": outcome.limit if outcome.is_met else None,
        "confirmed_on": outcome.held_out,
        "tried": len(outcome.candidates),
        "seconds": seconds,
        "figures": {name: asdict(figure) for name, figure in figures.items()},
    }
    if is_cnn:
        record["changed"] = 1.0 - figures["top 1"].value
    else:
        record["changed"] = _distance(small, subject)
    return record


def _embedding(output: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return pretrained.embedding(output, batch["attention_mask"])


def _distance(small: nn.Module, subject: Any) -> float:
    """Return the mean squared distance of the embeddings of test sentences over their variance."""
    wanted, got = subject._wanted, measures.embeddings(small, subject._test)
    scale = (wanted - wanted.mean(0)).square().sum(1).mean()
    return float((wanted - got).square().sum(1).mean() / scale)


def table(records: Sequence[Record]) -> str:
    """Return a row for each network and tolerance."""
    rows = []
    for name, tolerances in TOLERANCES.items():
        for tolerance in tolerances:
            record = next((each for each in records if each["key"] == [name, tolerance]), None)
            if record is None:
                continue
            limit = f"{record['limit']:.3f} on {record['confirmed_on']}" if record["is_met"] else "none found"
            figures = ", ".join(f"{key} {figure['value']:.3g}" for key, figure in record["figures"].items())
            rows.append(
                [
                    TITLES[name],
                    f"{tolerance:g}",
                    MEASURES[record["measure"]],
                    f"{100 * record['left']:.1f}",
                    limit,
                    f"{record['changed']:.3f}",
                    figures,
                    str(record["tried"]),
                    f"{record['seconds']:.0f}",
                ]
            )
    head = ["network", "tolerance", "of", "MACs kept %", "upper limit", "on test data", "figures on test data"]
    return markdown_table([*head, "networks tried", "CPU s"], rows)


if __name__ == "__main__":
    main()
