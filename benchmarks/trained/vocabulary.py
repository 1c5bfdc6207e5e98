"""Trim MiniLM's vocabulary to the tokens of 16,000 sentences, prune it to half of its MACs, and look at new sentences.

    python -m benchmarks.trained.vocabulary --out runs/trained

Two cells, lines of ``vocabulary.jsonl``: trimmed, and trimmed and pruned by `shrink` on 512 sentences, without
distillation. Each is written into a folder, which a fresh process reads with Transformers and, where it is installed,
with sentence-transformers; the megabytes are those of this folder. Figures are of 2,000 test sentences, as in
``run.py``. The same command goes on where it was stopped. Seconds are those of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nni_topo
from benchmarks.trained import measures, pretrained, sentences
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import Record, append_record, read_records
from nni_topo.studies.tables import markdown_table

LEARNED, SELECTING, TESTED = 16_000, 512, 2000
TRIMMED, PRUNED = "trimmed", "trimmed, half of the MACs"
_FRESH = 8  # sentences on which a fresh process is compared
_TRANSFORMERS = """
import sys, torch
from transformers import AutoModel, AutoTokenizer
folder, texts, wanted = sys.argv[1], *torch.load(sys.argv[2])
model, words = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(), AutoTokenizer.from_pretrained(folder)
inputs = words(texts, padding=True, return_tensors="pt")
with torch.no_grad():
    states = model(**inputs).last_hidden_state
real = inputs["attention_mask"].unsqueeze(2).float()
means = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=1)
sys.exit(not torch.allclose(means, wanted, atol=1e-5))
"""
_SENTENCE_TRANSFORMERS = """
import sys, torch
from sentence_transformers import SentenceTransformer
folder, texts, wanted = sys.argv[1], *torch.load(sys.argv[2])
means = torch.tensor(SentenceTransformer(folder, device="cpu").encode(texts, normalize_embeddings=True))
sys.exit(not torch.allclose(means, wanted, atol=1e-5))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records, the model and the sentences")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "vocabulary.jsonl"
    done = {record["key"] for record in read_records(path)}
    if done >= {TRIMMED, PRUNED}:
        return
    folder = pretrained.minilm_folder(options.out)
    model, tokenizer = pretrained.minilm(folder), pretrained.tokenizer(folder)
    learned = sentences.read("calibration", LEARNED, cache=options.out)
    tested = sentences.read("test", TESTED, cache=options.out)
    theirs = measures.embeddings(model, _batches(tokenizer, tested))
    ones = torch.ones(2, sentences.TOKENS, dtype=torch.int64)  # an id that all have
    example = {"input_ids": ones, "attention_mask": ones}
    before = NetworkCost.on(model, example)({})

    began = time.process_time()
    trimmed = nni_topo.trim_vocabulary(model, tokenizer, learned, held_out=tested)
    seconds = time.process_time() - began
    unpruned_megabytes = _written(model, tokenizer, [])[0]
    for name in (TRIMMED, PRUNED):
        if name in done:
            continue
        net = trimmed.model
        if name == PRUNED:
            began = time.process_time()
            selecting = _batches(trimmed.tokenizer, learned[:SELECTING])
            net = nni_topo.shrink(net, selecting, {"flops": 0.5}, outputs=_embedding, distill=False, progress=False)
            seconds += time.process_time() - began
        cost = NetworkCost.on(net, example)({})
        megabytes, loads = _written(net, trimmed.tokenizer, tested)
        mine = measures.embeddings(net, _batches(trimmed.tokenizer, tested))
        record = {
            "key": name,
            "vocabulary": asdict(trimmed.report),
            "figures": {key: asdict(figure) for key, figure in measures.like_encoder(mine, theirs).items()},
            "macs": cost.macs / before.macs,
            "params": cost.params / before.params,
            "megabytes": megabytes,
            "megabytes_unpruned": unpruned_megabytes,
            "loads": loads,
            "seconds": seconds,
            "data": {"learned": LEARNED, "selecting": SELECTING, "test sentences": sentences.digest(tested)},
            **provenance(),
        }
        append_record(path, record)
        print(f"{name}: {trimmed.report} {record['figures']} {loads}", flush=True)


def _batches(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    return sentences.batches(sentences.tokens(tokenizer, texts))


def _embedding(output: Any, batch: dict[str, Tensor]) -> Tensor:
    return pretrained.embedding(output, batch["attention_mask"])


def _written(net: Any, tokenizer: Any, texts: list[str]) -> tuple[float, dict[str, bool]]:
    """Write a folder; return its megabytes, and which packages read embeddings of texts in it as they are here."""
    with tempfile.TemporaryDirectory() as home:
        folder, wanted = Path(home) / "folder", Path(home) / "wanted.pt"
        nni_topo.save_pretrained(net, folder)
        tokenizer.save_pretrained(folder)
        megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        loads = dict[str, bool]()
        if not texts:
            return megabytes, loads
        few = texts[:_FRESH]
        inputs = tokenizer(few, padding=True, truncation=True, max_length=256, return_tensors="pt")
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        torch.save((few, measures.embeddings(net, [batch])), wanted)
        programs = {"transformers": _TRANSFORMERS, "sentence_transformers": _SENTENCE_TRANSFORMERS}
        for package, program in programs.items():
            if importlib.util.find_spec(package) is not None:
                command = [sys.executable, "-c", program, str(folder), str(wanted)]
                loads[package] = subprocess.run(command, check=False).returncode == 0
    return megabytes, loads


def table(records: Sequence[Record]) -> str:
    """Return a row for each cell."""
    rows = []
    for record in records:
        figures = {}
        for name, figure in record["figures"].items():
            scale, digits = (100.0, 1) if name.startswith("recall") else (1.0, 3)
            half = (figure["high"] - figure["low"]) / 2
            figures[name] = f"{scale * figure['value']:.{digits}f} ± {scale * half:.{digits}f}"
        vocabulary = record["vocabulary"]
        rows.append(
            [
                record["key"],
                f"{vocabulary['tokens']:,} of {vocabulary['tokens_before']:,}",
                f"{100 * vocabulary['split']:.2f}",
                f"{100 * record['macs']:.1f}",
                f"{100 * record['params']:.1f}",
                f"{record['megabytes']:.1f} of {record['megabytes_unpruned']:.1f}",
                figures["cosine"],
                figures["recall@10"],
                ", ".join(package for package, is_same in record["loads"].items() if is_same),
                f"{record['seconds']:.0f}",
            ]
        )
    head = ["MiniLM-L6", "tokens", "split tokens %", "MACs %", "parameters %", "megabytes of the folder"]
    return markdown_table([*head, "cosine", "recall@10 %", "a fresh process reads it with", "CPU s"], rows)


if __name__ == "__main__":
    main()
