"""Records of finished cells: one JSON line each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from nni_topo.disk import disk_errors, output_file
from nni_topo.errors import ConfigError, DataError
from nni_topo.rules import Rule, check_knobs, instance, number, whole
from nni_topo.runs.provenance import Record

COMPARED: dict[str, Rule] = {
    **dict.fromkeys(("model", "data", "target", "pruner"), instance(str)),
    **dict.fromkeys(("flops", "flops_before", "params", "params_before"), number(0.0)),
    "seed": whole(0),
    "accuracy_before": number(0.0, 1.0),
}
"""What every record of a comparison holds."""


def read_records(path: Path, rules: Mapping[str, Rule] | None = None, with_key: str | None = None) -> list[Record]:
    """Read the records of ``results.jsonl`` and check their keys by rules; DataError names the line that breaks one.

    Records without the key ``with_key`` are skipped.
    A last line without a line break is ignored: a crash cut it short, or another process is writing it.
    """
    if not path.exists():
        return []
    rules = rules or {}
    lines = path.read_bytes().splitlines(keepends=True)
    records = []
    for index, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):  # the last one, cut short
            continue
        place = f"{path}:{index}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"every line must be a JSON record, got: {error} ({place})") from error
        if not isinstance(record, dict):
            raise DataError(f"every line must be a JSON record of a run, got a {type(record).__name__} ({place})")
        if with_key is not None and with_key not in record:
            continue
        if not record.keys() >= rules.keys():
            keys = ", ".join(record)[:80]
            raise DataError(f"every line must be a JSON record of a run, got the keys {keys} ({place})")
        try:
            check_knobs(place, record, rules)
        except ConfigError as error:
            raise DataError(f"every line must be a JSON record of a run: {error}") from None
        records.append(record)
    return records


def compared_records(path: Path) -> list[Record]:
    """Read the records of comparisons; records of studies, which have no target, are skipped."""
    return read_records(path, COMPARED, with_key="target")


def append_record(path: Path, record: Record) -> None:
    """Append a record to ``results.jsonl`` and wait until it is on the disk; replace a last line without a break."""
    with disk_errors(path), output_file(path).open("ab") as stream:
        if path.stat().st_size:
            before = path.read_bytes()
            if not before.endswith(b"\n"):
                stream.truncate(before.rfind(b"\n") + 1)
        stream.write(json.dumps(record, sort_keys=True).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
