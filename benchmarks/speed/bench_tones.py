"""A trained network with large kernels: what selection and recovery cost, in passes over the data, and what they keep.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.bench_tones --out runs/tones

trains the "pitch" network of ``bench_seconds.py`` on tones that it makes, which takes seven minutes on one core, and
removes half of the channels of every convolution. A pass is one forward and one backward run over the 1,024 tones that
recovery has; seconds are those of the processor. What is kept is measured on 4,096 fresh tones: the share that get the
unpruned network's answer, and the share within half a semitone of the truth. A line per row goes to ``tones.jsonl``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_topo
from benchmarks.speed.bench_seconds import pitch
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table

PITCHES, LOWEST, CENTS, RATE = 360, 31.7, 20, 16_000  # classes, Hz, cents from one to the next, samples a second
LEARNED, CALIBRATION, FRESH, BATCH, STEPS = 8192, 1024, 4096, 64, 1280
NEAR = 2  # classes: within 50 cents, half a semitone

Distil = dict[str, Any] | None
# how channels are chosen; whether weights are reconstructed; knobs of distillation
ROWS: dict[str, tuple[str, bool, Distil]] = {
    "random": ("random", False, None),
    "L1": ("l1", False, None),
    "FPGM": ("fpgm", False, None),
    "reconstruction": ("reconstruction", False, None),
    "random, weights reconstructed": ("random", True, None),
    "L1, weights reconstructed": ("l1", True, None),
    "FPGM, weights reconstructed": ("fpgm", True, None),
    "reconstruction, weights reconstructed": ("reconstruction", True, None),
    "L1, distilled": ("l1", False, {}),
    "L1, weights reconstructed, distilled": ("l1", True, {}),
    "reconstruction, weights reconstructed, distilled": ("reconstruction", True, {}),
    "reconstruction, weights reconstructed, distilled, 300 steps": ("reconstruction", True, {"steps": 300}),
}


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make tones of eight harmonics in noise: (count, 1, 1024) of unit variance, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(PITCHES, (count,), generator=generator)
    frequency = LOWEST * 2.0 ** ((classes + torch.rand(count, generator=generator) - 0.5) * CENTS / 1200.0)
    seconds = torch.arange(1024) / RATE
    sound = torch.zeros(count, 1024)
    for harmonic in range(1, 9):
        height = torch.rand(count, 1, generator=generator) / harmonic
        phase = 2.0 * math.pi * torch.rand(count, 1, generator=generator)
        wave = torch.sin(2.0 * math.pi * harmonic * frequency[:, None] * seconds + phase)
        sound += height * wave * (harmonic * frequency[:, None] < RATE / 2)
    loudness = 0.1 * torch.rand(count, 1, generator=generator)
    sound += loudness * torch.randn(count, 1024, generator=generator)
    return functional.layer_norm(sound, (1024,))[:, None], classes


def trained(path: Path) -> nn.Module:
    """Train the network, or read it from a file."""
    torch.manual_seed(0)
    model, _ = pitch(BATCH)
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model.eval()
    sounds, classes = tones(LEARNED, seed=1)
    near = torch.arange(PITCHES)[None] - classes[:, None]
    wanted = (-((near / 1.25) ** 2) / 2.0).softmax(1)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    model.train()
    for _ in range(STEPS):
        drawn = torch.randint(LEARNED, (BATCH,))
        optimizer.zero_grad()
        functional.cross_entropy(model(sounds[drawn]), wanted[drawn]).backward()
        optimizer.step()
        schedule.step()
    torch.save(model.state_dict(), path)
    return model.eval()


def in_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of the processor, and the result."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def measure(model: nn.Module, choose: str, *, is_solved: bool, distil: Distil, a_pass: float) -> dict[str, Any]:
    """Prune and recover; return passes of each step and what is kept on fresh tones."""
    batches = list(tones(CALIBRATION, seed=2)[0].split(BATCH))
    layers = [{"op_types": ["Conv1d"], "sparse_ratio": 0.5}]

    def select() -> Any:
        config = nni_topo.dependency_groups(model, batches[0], layers)
        knobs = {"calibration": batches} if choose == "reconstruction" else {}
        pruner = nni_topo.create_pruner(choose, model, config, **knobs)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        return masks

    passes = {}
    seconds, masks = in_seconds(select)
    passes["select"] = seconds / a_pass
    weighted = model
    if is_solved:
        seconds, weighted = in_seconds(lambda: nni_topo.compensate(model, masks, batches))
        passes["reconstruct"] = seconds / a_pass
    small = nni_topo.to_dense(weighted, batches[0], masks)
    steps = None
    if distil is not None:
        seconds, done = in_seconds(lambda: nni_topo.distillation(small, model, batches, **distil))
        passes["distil"], small, steps = seconds / a_pass, done.model, done.steps
    return {"passes": passes, "steps": steps, **kept(small.eval(), model)}


def kept(small: nn.Module, model: nn.Module) -> dict[str, float]:
    """Return shares of fresh tones: the unpruned network's answer, and within half a semitone of the truth."""
    sounds, classes = tones(FRESH, seed=3)
    with torch.no_grad():
        found, wanted = small(sounds).argmax(1), model(sounds).argmax(1)
    return {
        "the same answer": float((found == wanted).float().mean()),
        "within half a semitone": float(((found - classes).abs() <= NEAR).float().mean()),
    }


def a_pass_over_the_data(model: nn.Module) -> float:
    """Return the seconds of one forward and one backward run, as the median of three."""
    batches = tones(CALIBRATION, seed=2)[0].split(BATCH)

    def run() -> None:
        for batch in batches:
            model(batch).square().mean().backward()
        model.zero_grad()

    run()
    return sorted(in_seconds(run)[0] for _ in range(3))[1]


def share(value: float) -> str:
    """Write a share in per cent with the 95 % interval of so many tones."""
    spread = 1.96 * math.sqrt(value * (1.0 - value) / FRESH)
    return f"{100 * value:.1f} ± {100 * spread:.1f}"


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each way of pruning."""
    head = ["channels by, recovery", "select: passes", "reconstruct: passes", "distil: passes (steps)"]
    head += ["the same answer, %", "within half a semitone, %"]
    rows = []
    for each in records:
        passes, figures = each["passes"], [each["the same answer"], each["within half a semitone"]]
        row = [each["key"]]
        row += [f"{passes[step]:.2f}" if step in passes else "-" for step in ("select", "reconstruct")]
        row.append(f"{passes['distil']:.1f} ({each['steps']})" if "distil" in passes else "-")
        rows.append([*row, *map(share, figures)])
    return markdown_table(head, rows)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    model, path = trained(options.out / "pitch.pt"), options.out / "tones.jsonl"
    seconds = a_pass_over_the_data(model)
    done = {record["key"] for record in read_records(path)}
    if "unpruned" not in done:
        append_record(path, {"key": "unpruned", "passes": {}, "steps": None, **kept(model, model), **provenance()})
    for name in options.rows:
        if name not in done:
            choose, is_solved, distil = ROWS[name]
            found = measure(model, choose, is_solved=is_solved, distil=distil, a_pass=seconds)
            append_record(path, {"key": name, "a pass, s": seconds, **found, **provenance()})
    print(table(read_records(path)))


if __name__ == "__main__":
    main()
