"""What distillation reaches when time isn't short: long courses on a GPU, with many crops (sentences).

    python -m benchmarks.trained.longer efficientnet-lite0 --out runs/longer --device cuda
    python -m benchmarks.trained.longer minilm --out runs/longer --device cuda --seconds 60

The tables of ``run.py`` allow a quarter of an hour on one core. Here the same networks are pruned the same way, and
learn for as long as ``--seconds`` says. Several courses run: they differ in what is done to the images, or in what the
pruned network starts from. A record has figures of the validation and of the test photos (sentences). Each course is a
line of ``longer.jsonl``; the same command goes on where it was stopped.

    python -m benchmarks.trained.longer --into benchmarks/records/trained/longer.jsonl benchmarks/results/trained.md

writes the table of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.tables import with_tables
from benchmarks.trained import measures, photos, pretrained, sentences
from benchmarks.trained.report import figure, title_of
from benchmarks.trained.run import Cnn, Encoder
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table

SOURCE = "benchmarks/trained/longer.py"  # as the comments around a page's table say
SHOWN = {Cnn.name: ("top 1", "KL"), Encoder.name: ("cosine", "recall@10")}
WHAT = {Cnn.name: "crops", Encoder.name: "sentences"}
_PART = 1000  # crops that one process cuts


@dataclass(frozen=True)
class Course:
    """How a pruned network learns."""

    criterion: str = "reconstruction"
    is_reconstructed: bool = True
    augment: Callable[[Tensor], Tensor] | None = None
    blend: bool = False
    blocks: float = 0.0
    lr: float | None = None
    batch_size: int = 256


def pasted(images: Tensor) -> Tensor:
    """Change the colours of images, and paste a rectangle of another one into half of them."""
    count, device = len(images), images.device
    gain = 1.0 + 0.4 * (torch.rand(count, 1, 1, 1) - 0.5)
    tint = 1.0 + 0.2 * (torch.rand(count, 3, 1, 1) - 0.5)
    shift = 0.3 * (torch.rand(count, 1, 1, 1) - 0.5)
    found = (images * (gain * tint).to(device) + shift.to(device)).clamp(-1.0, 1.0)
    found = torch.where((torch.rand(count, 1, 1, 1) < 0.5).to(device), found.flip(3), found)
    others = found[torch.randperm(count).to(device)]
    side = images.shape[-1]
    length = (side * torch.rand(count).sqrt()).round()
    corners = [((side - length) * torch.rand(count)).round() for _ in range(2)]
    places = torch.arange(side)
    rows, columns = ((places >= corner[:, None]) & (places < (corner + length)[:, None]) for corner in corners)
    inside = rows[:, None, :, None] & columns[:, None, None, :] & (torch.rand(count, 1, 1, 1) < 0.5)
    return torch.where(inside.to(device), others, found)


COURSES: dict[str, dict[str, Course]] = {
    Cnn.name: {
        "crops": Course(),
        "blended": Course(blend=True),
        "pasted": Course(augment=pasted),
        "pasted and blended": Course(augment=pasted, blend=True),
        "pasted and blended, blocks": Course(augment=pasted, blend=True, blocks=1.0),
        "pasted and blended, l1 alone": Course("l1", is_reconstructed=False, augment=pasted, blend=True),
    },
    Encoder.name: {
        "sentences": Course(blocks=0.2),
        "sentences, embeddings alone": Course(),
        "sentences, l1 alone": Course("l1", is_reconstructed=False, blocks=0.2),
    },
}


def _crops_of(seed: int) -> Tensor:
    return photos.random_crops("calibration", _PART, seed=seed, least=0.08).images


def many_crops(count: int, path: Path) -> Tensor:
    """Return crops of the calibration photos, kept in a file; several processes cut them."""
    if not path.is_file():
        # Forked processes would hang: PyTorch's threads and the GPU are in use already.
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            parts = list(pool.map(_crops_of, range(1000, 1000 + -(-count // _PART))))
        order = torch.randperm(len(parts) * _PART, generator=torch.Generator().manual_seed(0))
        torch.save(torch.cat(parts)[order[:count]].half(), path)
    return torch.load(path, weights_only=True).float()


class Longer:
    """A subject of ``run.py`` on a device, its pruned networks, and what they learn from."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.subject: Any = Cnn() if options.network == Cnn.name else Encoder(options.out)
        subject = self.subject
        self.original: nn.Module = subject.model.to(self.device)
        subject.example = on_device(subject.example, self.device)
        subject.data = nni_topo.Calibration(
            [on_device(each, self.device) for each in subject.data], groups=subject.data.groups
        )
        self.outputs = None
        if options.network == Cnn.name:
            crops = many_crops(options.samples, options.out / f"crops-{options.samples}.pt")
            self.learned = [each.to(self.device) for each in crops.split(256)]
            judges = photos.random_crops("validation", 960, seed=2)
            self.judges = judges.batches()
            self._judged = judges
            self._wanted = measures.answers(self.original, self.judges)
        else:
            subject._texts["calibration"] = sentences.read("calibration", options.samples, cache=options.out)
            self.learned = [on_device(each, self.device) for each in subject._batches("calibration")]
            self.judges = subject._batches("validation")
            self._wanted = measures.embeddings(self.original, self.judges)
            self.outputs = lambda output, batch: pretrained.embedding(output, batch["attention_mask"])

    def started(self, course: Course, share: float) -> nn.Module:
        """Return the network that a course starts from, dense."""
        net, masks = self.subject.choose(course.criterion, share)
        if course.is_reconstructed:
            net = nni_topo.compensate(net, masks, self.subject.data)
        dense: nn.Module = nni_topo.to_dense(net, self.subject.example, masks)
        return dense

    def figures(self, dense: nn.Module) -> dict[str, Any]:
        """Measure a network on the validation and on the test part."""
        net = dense.eval()
        if isinstance(self.subject, Cnn):
            found = measures.like_classifier(measures.answers(net, self.judges), self._wanted, self._judged)
        else:
            found = measures.like_encoder(measures.embeddings(net, self.judges), self._wanted)
        both = {"validation": found, "figures": self.subject.figures(net)}
        return {part: {name: asdict(each) for name, each in figures.items()} for part, figures in both.items()}


def on_device(value: Any, device: torch.device) -> Any:
    """Return a tensor, or a mapping of tensors, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    return {name: each.to(device) for name, each in value.items()}


def rows(options: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Run the courses that aren't done."""
    keys = [
        (options.network, share, name) for share in options.shares for name in options.only or COURSES[options.network]
    ]
    keys = [key for key in keys if key not in done]
    if not keys:
        return
    run = Longer(options)
    cost = NetworkCost.on(run.original, run.subject.example)({})
    for key in keys:
        course = COURSES[options.network][key[2]]
        began = time.perf_counter()
        dense = run.started(course, key[1])
        ready = time.perf_counter() - began
        before = run.figures(dense)
        began = time.perf_counter()
        found = nni_topo.distillation(
            dense,
            run.original,
            run.learned,
            held_out=[on_device(each, run.device) for each in run.judges],
            outputs=run.outputs,
            steps=options.steps,
            seconds=options.seconds,
            batch_size=course.batch_size,
            lr=course.lr,
            blocks=course.blocks,
            augment=course.augment,
            blend=course.blend,
            progress=False,
        )
        seconds = time.perf_counter() - began
        left = NetworkCost.on(found.model, run.subject.example)({})
        yield {
            "key": key,
            "before": before,
            **run.figures(found.model),
            "seconds": {"selected and reconstructed": ready, "distilled": seconds},
            "images": found.steps * course.batch_size,
            "samples": options.samples,
            "macs": left.macs / cost.macs,
            "steps": found.steps,
            "lr": found.lr,
            "is_kept": found.is_kept,
            "curve": [asdict(each) for each in found.curve],
            "verdict": repr(found.verdict),
        }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return a row for each course, with the figures before and after it."""
    parts = []
    for network, columns in SHOWN.items():
        own = [record for record in records if record["key"][0] == network]
        lines = []
        for record in own:
            _, share, name, samples = record["key"]
            line = [f"{100 * share:g}", name, f"{samples:,}", str(record["steps"]), f"{record['lr']:g}"]
            line.append(f"{record['seconds']['distilled']:.0f}")
            for part in ("validation", "figures"):
                for column in columns:
                    before, after = (figure(column, each[part][column]) for each in (record["before"], record))
                    line.append(f"{before} -> {after}" if record["is_kept"] else f"{before}, discarded")
            lines.append(line)
        head = ["cost kept %", "course", WHAT[network], "steps of 256", "learning rate", "seconds"]
        head += [f"{part}: {title_of(column)}" for part in ("validation", "test") for column in columns]
        if lines:
            parts.append(f"**{network}**\n\n{markdown_table(head, lines, text_columns=2)}")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the courses that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=tuple(COURSES), nargs="?")
    parser.add_argument("--out", type=Path, help="folder of the records")
    parser.add_argument("--into", nargs=2, type=Path, metavar=("RECORDS", "PAGE"), help="page whose table is replaced")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shares", nargs="+", type=float, help="shares of the cost to keep (default: the tables')")
    parser.add_argument("--only", nargs="+", metavar="COURSE", help="courses (default: all)")
    parser.add_argument("--samples", type=int, default=16_000, help="crops of the 40 photos, or sentences (16,000)")
    parser.add_argument("--steps", type=int, default=4000, help="at most (default 4,000)")
    parser.add_argument("--seconds", type=float, default=120.0, help="of a distillation (default 120)")
    options = parser.parse_args(arguments)
    if options.into is not None:
        records, page = options.into
        made = table(read_records(records))
        page.write_text(with_tables(page.read_text(encoding="utf-8"), SOURCE, made), encoding="utf-8")
        return
    if options.network is None or options.out is None:
        parser.error("a network and --out must be given")
    options.shares = options.shares or (Cnn.shares if options.network == Cnn.name else Encoder.shares)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "longer.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    for record in rows(options, done):
        append_record(path, record | provenance())
        shown = ", ".join(f"{name} {figure['value']:.3f}" for name, figure in record["figures"].items())
        judged = ", ".join(f"{name} {figure['value']:.3f}" for name, figure in record["validation"].items())
        print(
            f"{' | '.join(map(str, record['key']))}: test {shown}; validation {judged}; {record['verdict']}", flush=True
        )


if __name__ == "__main__":
    main()
