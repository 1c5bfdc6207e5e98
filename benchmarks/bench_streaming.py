"""Memory and time of pruning a LLaMA with random weights block by block, and how they grow.

    python benchmarks/bench_streaming.py --out runs/streaming

writes LLaMA-like models in bfloat16, prunes each to 70 % of its parameters by `nni_topo.shrink_pretrained`, each in a
process of its own on one thread, and writes a line per model to ``streaming.jsonl``: the peak of its anonymous memory
above what the imports take, CPU seconds for each block, and how far the states are from the unpruned ones after the
last block. The weights are random: what is measured is memory and time. The same command goes on where it was stopped.

    python benchmarks/bench_streaming.py --out benchmarks/records --into benchmarks/results/transformers.md

writes the table of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table, with_tables

SOURCE = "benchmarks/bench_streaming.py"
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


def main() -> None:
    """Parse the command line, run what is missing, print the table or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page whose table is replaced; nothing is run")
    parser.add_argument("--case", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = options.out / "streaming.jsonl"
    if options.case is not None:
        print(json.dumps(measured(options.out, *options.case)))
        return
    if options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(with_tables(page, SOURCE, table(read_records(path))), encoding="utf-8")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    done = {tuple(record["key"]) for record in read_records(path)}
    for case in CASES:
        if case in done:
            continue
        command = [sys.executable, __file__, "--out", str(options.out), "--case", *map(str, case)]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        record = json.loads(found.stdout.splitlines()[-1])
        append_record(path, {"key": list(case), **record})
        print(case, record, flush=True)
    print(table(read_records(path)))


def measured(out: Path, width: int, blocks: int, samples: int, steps: int) -> dict[str, Any]:
    """Make a model, prune it, and return what it took."""
    # What is imported here doesn't count.
    import accelerate  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import nni_topo
    import nni_topo.runs.streaming

    torch.set_num_threads(1)
    source, target = out / f"llama-{width}-{blocks}", out / f"llama-{width}-{blocks}-small"
    for folder in (source, target):
        shutil.rmtree(folder, ignore_errors=True)
    # In a process of its own, for it holds the whole model.
    made = "import bench_streaming, sys; bench_streaming.make(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
    command = [sys.executable, "-c", made, str(source.resolve()), str(width), str(blocks)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent)
    generator = torch.Generator().manual_seed(0)
    shape = (SAMPLES_A_BATCH, LENGTH)
    tokens = [
        torch.randint(TOKENS_A_CHANNEL * width, shape, generator=generator) for _ in range(samples // SAMPLES_A_BATCH)
    ]
    batches = [{"input_ids": each} for each in tokens]
    peak = Peak()
    began = time.process_time()
    distill: Any = {"steps": steps} if steps else False
    report = nni_topo.shrink_pretrained(source, batches, target, {"params": SHARE}, distill=distill, progress=True)
    seconds = time.process_time() - began
    found = {
        "params": report.params_before,
        "block_params": report.blocks[0].params_before,
        "outside_params": report.params_before - sum(row.params_before for row in report.blocks),
        "peak_mib": round(peak.stop()),
        "cpu_seconds_a_block": round(seconds / blocks, 1),
        "distance": report.blocks[-1].distance,
        "left": report.budget.left,
    }
    shutil.rmtree(target)
    shutil.rmtree(source)
    return found


def make(folder: str, width: int, blocks: int) -> None:
    """Write a model with random weights."""
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
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")


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
    """Return Markdown: what each model took."""
    rows = []
    for record in records:
        width, blocks, samples, steps = record["key"]
        two_bytes = 2.0 / 2**20
        rows.append(
            [
                f"{record['params'] / 1e6:,.0f} M",
                str(width),
                str(blocks),
                f"{samples * LENGTH:,}",
                str(steps),
                f"{record['params'] * two_bytes:,.0f}",
                f"{record['outside_params'] * two_bytes:,.0f}",
                f"{record['block_params'] * two_bytes:,.0f}",
                f"{record['peak_mib']:,}",
                f"{record['cpu_seconds_a_block']:.1f}",
            ]
        )
    head = ["parameters", "width", "blocks", "tokens", "steps of distillation", "weights, MiB"]
    head += ["embeddings and head, MiB", "a block, MiB", "peak, MiB", "CPU s a block"]
    return markdown_table(head, rows, text_columns=0)


if __name__ == "__main__":
    main()
