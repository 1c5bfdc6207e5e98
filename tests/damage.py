"""Damaged files: bytes turned, cut, put in; what the readers make of them. `python tests/damage.py --cases 500`."""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import logging
import random
import resource
import struct
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import nni_topo
from nni_topo.errors import NniTopoError
from nni_topo.network.cost.latency import LatencyTable
from nni_topo.runs.choices import load_prune_config
from nni_topo.runs.trial import read_parameters
from nni_topo.studies.plan import load_plan
from nni_topo.studies.records import COMPARED, read_records
from nni_topo.zoo import load_checkpoint, load_data, save_checkpoint

Reader = Callable[[Path], Any]


def net() -> nn.Sequential:
    """Return a small network for 1x4x4 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def values(model: nn.Module) -> list[Any]:
    """Return what a model holds."""
    return [(name, value.tolist()) for name, value in model.state_dict().items()]


def of_checkpoint(path: Path) -> Any:
    """Read a checkpoint into a network; an error leaves that as it was."""
    model, before = net(), values(net())
    try:
        meta = load_checkpoint(path, model)
    except NniTopoError:
        assert values(model) == before, "an error leaves the model as it was"
        raise
    return values(model), meta


def of_npz(path: Path) -> Any:
    """Read a data set."""
    return [part.tolist() for part in load_data(str(path), validation=0.5).train.tensors]


def of_idx(path: Path) -> Any:
    """Read the folder of Fashion-MNIST that a damaged file is in."""
    return [part.tolist() for part in load_data("fashion-mnist", path.parent, validation=0.5).train.tensors]


def files(folder: Path) -> Iterator[tuple[str, Path, Reader, bool]]:
    """Yield kind, whole file, reader, and whether the file can tell that it is whole."""
    save_checkpoint(folder / "checkpoint.pt", net(), {"accuracy": 0.5})
    yield "checkpoint", folder / "checkpoint.pt", of_checkpoint, True
    nni_topo.save(net(), folder / "dense.safetensors")
    yield "dense model", folder / "dense.safetensors", lambda path: values(nni_topo.load(path, net)), True
    torch.save(net().state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    yield "checkpoint of old", folder / "old.pt", of_checkpoint, False
    images, labels = np.arange(8 * 16, dtype=np.uint8).reshape(8, 4, 4), np.arange(8) % 2
    sets = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(folder / "set.npz", **sets)
    np.savez_compressed(folder / "packed.npz", **sets)
    for name in ("set", "packed"):
        yield (
            f"{name}.npz",
            folder / f"{name}.npz",
            lambda path: [t.tolist() for t in load_data(str(path)).train[:]],
            True,
        )
    for stem in ("train", "t10k"):
        head = struct.pack(">IIII", 0x803, 8, 4, 4)
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 8) + bytes(labels.tolist()))
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes(), mtime=0))
    yield "idx", folder / "train-labels-idx1-ubyte", of_idx, False
    yield "idx.gz", folder / "train-images-idx3-ubyte.gz", of_idx, True
    plans = Path(__file__).parents[1] / "configs"
    for name, read in (("compare_digits.yaml", load_plan), ("prune_l1.yaml", load_prune_config)):
        yield name, plans / name, read, False
    record = {**dict.fromkeys(COMPARED, "a"), "seed": 0, "accuracy_before": 0.5}
    record |= dict.fromkeys(("flops", "flops_before", "params", "params_before"), 100)
    (folder / "results.jsonl").write_text("".join(json.dumps({**record, "key": f"{n}"}) + "\n" for n in range(3)))
    yield "results.jsonl", folder / "results.jsonl", lambda path: read_records(path, COMPARED), False
    layer = {"entering": [1, 2], "leaving": [1, 4], "seconds": [[1.0, 2.0], [3.0, 4.0]], "activation": 1.0}
    (folder / "latency.json").write_text(json.dumps({"layers": {"a": layer}}))
    yield "latency table", folder / "latency.json", LatencyTable.load, False
    (folder / "parameters.json").write_text(json.dumps({"lr": 0.1, "ratio.conv1": 0.5}))
    yield "parameters", folder / "parameters.json", read_parameters, False


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return bytes of which some are turned, cut off, left out, doubled or put in."""
    change, at = (
        draw.choice(("turn", "turn", "bit", "cut", "drop", "double", "insert", "zero")),
        draw.randrange(len(content)),
    )
    end = min(len(content), at + draw.choice((1, 1, 4, 64, 1000)))
    if change == "bit":
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    middle = {
        "turn": draw.randbytes(end - at),
        "cut": b"",
        "drop": b"",
        "double": 2 * content[at:end],
        "insert": draw.randbytes(end - at) + content[at:end],
        "zero": bytes(end - at),
    }[change]
    return content[:at] + middle + (b"" if change == "cut" else content[end:])


def outcome(path: Path, content: bytes, read: Reader, wanted: Any, *, tells: bool) -> str:
    """Read a damaged file; return what came of it, or raise what shouldn't have."""
    path.write_bytes(content)
    refused: NniTopoError | None = None
    try:
        found = read(path)
    except NniTopoError as error:
        refused = error
    if refused is not None:
        told = f"{refused}{refused.__cause__ or ''}"
        assert path.name in told or not tells, f"an error names the file: {told}"
        assert "weights_only" not in told, "no advice to load unsafely"
        return type(refused).__name__
    same = repr(found) == repr(wanted)
    assert same or not tells, "a file that can tell gives what was written, or an error"
    return "the same" if same else "other values"


def served(
    cases: int, seed: int, kinds: tuple[str, ...] = ()
) -> Iterator[tuple[str, collections.Counter[str], list[str]]]:
    """Yield each kind of file, what came of it, damaged so many times, and the first errors that aren't ours."""
    with tempfile.TemporaryDirectory() as name:
        for kind, path, read, tells in files(Path(name)):
            whole, draw = path.read_bytes(), random.Random(f"{seed} {kind}")
            place = Path(name) / path.name
            place.write_bytes(whole)
            wanted, counts, broken = read(place), collections.Counter[str](), []
            for _ in range(cases):
                try:
                    counts[outcome(place, damaged(whole, draw), read, wanted, tells=tells)] += 1
                except Exception as error:
                    counts["broken"] += 1
                    last = traceback.extract_tb(error.__traceback__)[-1]
                    broken.append(f"{type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})")
            place.write_bytes(whole)
            yield kind, counts, broken


def peak_memory() -> float:
    """Return the most memory, in MiB, that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Damage files many times and count what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    began, failed, peak = time.monotonic(), False, peak_memory()
    for kind, counts, broken in served(options.cases, options.seed):
        found = ", ".join(f"{count} {came}" for came, count in counts.most_common())
        print(f"{kind}: {found}", *dict.fromkeys(broken), sep="\n    ", flush=True)
        failed |= bool(broken)
    more = peak_memory() - peak
    print(f"{options.cases} of each kind in {time.monotonic() - began:.0f} s; {more:.0f} MiB more memory than before")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
