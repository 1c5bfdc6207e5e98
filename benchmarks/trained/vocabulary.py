"""Trim the vocabulary of MiniLM, and of MiniLM with half of its MACs, and look at new sentences.

    python -m benchmarks.trained.vocabulary --out runs/trained
    python -m benchmarks.trained.vocabulary --out runs/trained --python PYTHON

Three cells, lines of ``vocabulary.jsonl``: trimmed to the tokens of 16,000 sentences; pruned to half of the MACs and
distilled, as ``docs/embedding_model.md`` has it and as the row "shrink, more sentences" of ``run.py`` makes it; and
this model trimmed. Each is written into a folder, which a fresh process reads with Transformers and, where it is
installed, with sentence-transformers, in this environment or that of ``--python``; the megabytes are those of this
folder. Figures are of 2,000 test sentences, as in ``run.py``. The same command goes on where it was stopped. Seconds
are those of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nni_topo
from benchmarks.trained import measures, pretrained, sentences
from benchmarks.trained.run import Encoder, timed
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import Record, append_record, read_records
from nni_topo.studies.tables import markdown_table

TRIMMED, PRUNED, BOTH = "trimmed", "half of the MACs", "half of the MACs, trimmed"
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
    parser.add_argument("--python", default=sys.executable, help="reads the folders (default: this Python)")
    parser.add_argument("--seconds", type=float, default=780, help="wall time of distillation's steps (default 780)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "vocabulary.jsonl"
    done = {record["key"] for record in read_records(path)}
    if done >= {TRIMMED, PRUNED, BOTH}:
        return
    subject = Encoder(options.out)
    model, tokenizer = subject.model, pretrained.tokenizer(pretrained.minilm_folder(options.out))
    learned = sentences.read("calibration", Encoder.learned, cache=options.out)
    tested = sentences.read("test", 2000, cache=options.out)
    theirs = measures.embeddings(model, _batches(tokenizer, tested))
    ones = torch.ones(2, sentences.TOKENS, dtype=torch.int64)  # an id that all have
    example = {"input_ids": ones, "attention_mask": ones}
    before = NetworkCost.on(model, example)({})
    megabytes_unpruned = _written(model, tokenizer, [], options.python)[0]

    def add(name: str, net: Any, words: Any, seconds: float, **more: Any) -> None:
        """Measure a network with its tokenizer, and add a record."""
        cost = NetworkCost.on(net, example)({})
        megabytes, loads = _written(net, words, tested, options.python)
        mine = measures.embeddings(net, _batches(words, tested))
        record = {
            "key": name,
            "figures": {key: asdict(figure) for key, figure in measures.like_encoder(mine, theirs).items()},
            "macs": cost.macs / before.macs,
            "params": cost.params / before.params,
            "megabytes": megabytes,
            "megabytes_unpruned": megabytes_unpruned,
            "loads": loads,
            "seconds": seconds,
            "data": subject.facts,
            **more,
            **provenance(),
        }
        append_record(path, record)
        print(f"{name}: {more} {record['figures']} {loads}", flush=True)

    if TRIMMED not in done:
        trimmed, seconds = timed(lambda: nni_topo.trim_vocabulary(model, tokenizer, learned, held_out=tested))
        add(TRIMMED, trimmed.model, trimmed.tokenizer, seconds, vocabulary=asdict(trimmed.report))
    half = options.out / "minilm-half"
    if PRUNED not in done:
        (small, verdict), seconds = timed(lambda: subject.shrunk(0.5, options.seconds, has_more=True))
        nni_topo.save_pretrained(small, half)
        course = {"steps": verdict.steps, "lr": verdict.lr, "is_kept": verdict.is_kept, "limit": options.seconds}
        add(PRUNED, small, tokenizer, seconds, distillation=course)
    if BOTH not in done:
        small = pretrained.minilm(half)
        trimmed, seconds = timed(lambda: nni_topo.trim_vocabulary(small, tokenizer, learned, held_out=tested))
        pruning = next(record["seconds"] for record in read_records(path) if record["key"] == PRUNED)
        add(BOTH, trimmed.model, trimmed.tokenizer, pruning + seconds, vocabulary=asdict(trimmed.report))


def _batches(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    return sentences.batches(sentences.tokens(tokenizer, texts))


def _written(net: Any, tokenizer: Any, texts: list[str], python: str) -> tuple[float, dict[str, bool]]:
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
            if subprocess.run([python, "-c", f"import {package}"], check=False, capture_output=True).returncode == 0:
                command = [python, "-c", program, str(folder), str(wanted)]
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
        vocabulary = record.get("vocabulary")
        rows.append(
            [
                record["key"],
                f"{vocabulary['tokens']:,} of {vocabulary['tokens_before']:,}" if vocabulary else "all",
                f"{100 * vocabulary['split']:.2f}" if vocabulary else "",
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
