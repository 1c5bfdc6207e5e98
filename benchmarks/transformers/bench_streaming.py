"""Memory and time of pruning a LLaMA with random weights block by block, and how they grow.

    python benchmarks/transformers/bench_streaming.py --out runs/streaming

writes LLaMA-like models in bfloat16, prunes each to 70 % of its parameters by `nni_topo.shrink_pretrained`, each in a
process of its own on one thread, and writes a line per model to ``streaming.jsonl``: the peak of its anonymous memory
above what the imports take, CPU seconds for each block, and how far the states are from the unpruned ones after the
last block. The weights are random: what is measured is memory and time. The same command goes on where it was stopped.

    python benchmarks/transformers/bench_streaming.py --out runs/streaming --device cuda \
        --widths 2048 --blocks 4 --samples 256

runs models of one's own choice, on a GPU: one for each width, number of blocks, number of samples and number of steps.
Its lines also have the GPU's name, the peak of its memory and wall seconds for each block, and a table of their own.

    python benchmarks/transformers/bench_streaming.py --out benchmarks/records --into benchmarks/results/transformers.md

writes the table of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import with_tables
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table

SOURCE = "benchmarks/transformers/bench_streaming.py"
SHARE, LENGTH, SAMPLES_A_BATCH = 0.7, 64, 4
TOKENS_A_CHANNEL = 16  # size of the vocabulary, as a multiple of the width
# Hidden width, blocks, samples of 64 tokens, steps of distillation. The last one has the widths of TinyLlama.
CASES = (
    (512, 3, 16, 0),
    (512, 3, 64, 0),
    (512, 3, 64, 50),
    (1024, 3, 16, 0),
    (1024, 3, 64, 0),
    (2048, 3, 16, 0),
    (2048, 22, 16, 0),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, run what is missing, print the table or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page whose table is replaced; nothing is run")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--widths", type=int, nargs="+", help="multiples of 512; default: the models of the table")
    parser.add_argument("--blocks", type=int, nargs="+", default=[3], help="with --widths; default: 3")
    parser.add_argument("--samples", type=int, nargs="+", default=[16], help="with --widths; default: 16")
    parser.add_argument("--steps", type=int, nargs="+", default=[0], help="of distillation, with --widths; default: 0")
    parser.add_argument("--case", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    path = options.out / "streaming.jsonl"
    if options.case is not None:
        print(json.dumps(measured(options.out, *options.case, device=options.device)))
        return
    if options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(with_tables(page, SOURCE, table(read_records(path))), encoding="utf-8")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    cases: Iterable[tuple[int, ...]] = CASES
    if options.widths is not None:
        cases = itertools.product(options.widths, options.blocks, options.samples, options.steps)
    done = {tuple(record["key"]) for record in read_records(path)}
    for case in cases:
        key = case if options.device == "cpu" else (*case, options.device)
        if key in done:
            continue
        command = [sys.executable, __file__, "--out", str(options.out), "--case", *map(str, case)]
        command += ["--device", options.device]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        record = json.loads(found.stdout.splitlines()[-1])
        append_record(path, {"key": list(key), **record})
        print(key, record, flush=True)
    for text in (table(read_records(path)), device_table(read_records(path))):
        print(text)


def measured(out: Path, width: int, blocks: int, samples: int, steps: int, *, device: str = "cpu") -> dict[str, Any]:
    """Make a model, prune it, and return what it took."""
    # What is imported here doesn't count.
    import accelerate  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import nni_topo
    import nni_topo.runs.streaming

    where = torch.device(device)
    if where.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.zeros((), device=where)  # the memory of the machine that a device takes doesn't count either
    source, target = out / f"llama-{width}-{blocks}", out / f"llama-{width}-{blocks}-small"
    for folder in (source, target):
        shutil.rmtree(folder, ignore_errors=True)
    # In a process of its own, for it holds the whole model. It imports what this one does, also from relative paths.
    made = "import bench_streaming, sys; bench_streaming.make(sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4])"
    drawn_on = device if where.type == "cuda" else "cpu"
    command = [sys.executable, "-c", made, str(source.resolve()), str(width), str(blocks), drawn_on]
    paths = os.pathsep.join(map(os.path.abspath, [str(Path(__file__).parent), *filter(None, sys.path)]))
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths})
    generator = torch.Generator().manual_seed(0)
    shape = (SAMPLES_A_BATCH, LENGTH)
    tokens = [
        torch.randint(TOKENS_A_CHANNEL * width, shape, generator=generator) for _ in range(samples // SAMPLES_A_BATCH)
    ]
    batches = [{"input_ids": each} for each in tokens]
    peak = Peak()
    began = time.process_time()
    distill: Any = {"steps": steps} if steps else False
    knobs: Any = {"distill": distill, "device": where, "progress": True}
    report = nni_topo.shrink_pretrained(source, batches, target, {"params": SHARE}, **knobs)
    seconds = time.process_time() - began
    found = {
        "params": report.params_before,
        "block_params": report.blocks[0].params_before,
        "outside_params": report.params_before - sum(row.params_before for row in report.blocks),
        "peak_mib": round(peak.stop()),
        "cpu_seconds_a_block": round(seconds / blocks, 1),
        "seconds_a_block": round(statistics.median(row.seconds for row in report.blocks), 2),
        "distance": report.blocks[-1].distance,
        "left": report.budget.left,
    }
    if where.type == "cuda":
        found["device_name"] = torch.cuda.get_device_name(where)
        found["device_peak_mib"] = round(torch.cuda.max_memory_allocated(where) / 2**20)
    shutil.rmtree(target)
    shutil.rmtree(source)
    return found


def make(folder: str, width: int, blocks: int, device: str = "cpu") -> None:
    """Write a model with random weights, drawn on a device."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TOKENS_A_CHANNEL * width,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 512 * 2,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="500MB")


class Peak:
    """The most anonymous memory of this process from now on, above what it has now, in MiB."""

    def __init__(self) -> None:
        self._base = self._most = self._now()
        self._goes_on = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def _now() -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 1024
        raise OSError("RssAnon must be in /proc/self/status, got none")

    def _watch(self) -> None:
        while self._goes_on:
            self._most = max(self._most, self._now())
            time.sleep(0.02)

    def stop(self) -> float:
        """Return the peak."""
        self._goes_on = False
        self._thread.join()
        return self._most - self._base


def table(records: list[dict[str, Any]]) -> str:
    """Return Markdown: what each model took on the CPU."""
    rows = []
    for record in records:
        if len(record["key"]) > 4:
            continue
        rows.append(
            [
                *_model_cells(record),
                _weights_mib(record["outside_params"]),
                _weights_mib(record["block_params"]),
                f"{record['peak_mib']:,}",
                f"{record['cpu_seconds_a_block']:.1f}",
            ]
        )
    head = [*_MODEL, "embeddings and head, MiB", "a block, MiB", "peak, MiB", "CPU s a block"]
    return markdown_table(head, rows, text_columns=0)


_MODEL = ("parameters", "width", "blocks", "tokens", "steps of distillation", "weights, MiB")


def _model_cells(record: dict[str, Any]) -> list[str]:
    """Return what a row says of its model and data, in the columns `_MODEL`."""
    width, blocks, samples, steps = record["key"][:4]
    size = f"{record['params'] / 1e6:,.0f} M"
    return [size, str(width), str(blocks), f"{samples * LENGTH:,}", str(steps), _weights_mib(record["params"])]


def _weights_mib(params: int) -> str:
    """Return the MiB of so many parameters of two bytes."""
    return f"{params * 2.0 / 2**20:,.0f}"


def device_table(records: list[dict[str, Any]]) -> str:
    """Return Markdown: what each model took on another device; empty where none was run."""
    rows = []
    for record in records:
        if len(record["key"]) == 4:
            continue
        rows.append(
            [
                record.get("device_name", record["key"][4]),
                *_model_cells(record),
                _weights_mib(record["block_params"]),
                f"{record['device_peak_mib']:,}" if "device_peak_mib" in record else "",
                f"{record['peak_mib']:,}",
                f"{record['seconds_a_block']:.1f}",
            ]
        )
    head = ["device", *_MODEL, "a block, MiB", "peak of the device, MiB", "peak of the machine, MiB", "s a block"]
    return markdown_table(head, rows, text_columns=1) if rows else ""


if __name__ == "__main__":
    main()
