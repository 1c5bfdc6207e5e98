"""What a run has done, in one JSON file beside the weights, and the states between blocks, in a folder beside it."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from nni_topo.disk import disk_errors, read_json, reading, whole_file, write_json, write_safetensors
from nni_topo.errors import ConfigError
from nni_topo.network.runtime.processes import Processes
from nni_topo.runs.streaming.skeleton import INDEX

JOURNAL = "shrink_pretrained.json"
"""Digests of a run's settings, and what was done; of a finished run its report."""
_FOLDER = ".shrink_pretrained"  # of the states
_WEIGHTS = "model-*-of-*.safetensors"
_PART = ".part"  # ends the names of files that a process is writing, or was when it was killed


class Journal:
    """The state of a run in its output folder.

    ``settings`` tell this run from others. Where processes share the calibration data, the first one reads and writes
    what all have in common; each has the states of its own samples.

    ConfigError if the folder holds a run with other settings of which a block is finished, or files of something else.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], processes: Processes | None = None) -> None:
        self.folder, self._processes = folder, processes
        self.is_first = processes is None or processes.rank == 0
        # Digests, because settings name folders of this machine, and the report is published with the model. Addresses
        # of objects differ between processes.
        self._settings = {
            name: hashlib.sha256(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).encode()).hexdigest()
            for name, value in settings.items()
        }
        content: Any = read_json(folder / JOURNAL, "the journal of a run") if self.is_first else None
        if processes is not None:
            content = processes.first(content, "the journal")
        if content is None:
            own, others = (_FOLDER, ".lock"), list[str]()
            if self.is_first and folder.is_dir():
                others = sorted(path.name for path in folder.iterdir() if path.name not in own and path.suffix != _PART)
            if others:
                raise ConfigError(
                    "the folder for the pruned model must be empty or new, or hold a run that was stopped, got "
                    f"{others[0]} there ({folder})"
                )
            content = {"settings": self._settings}
        known = content.get("settings") if isinstance(content, dict) else None
        if known != self._settings and (not isinstance(known, dict) or content.get("rows") or content.get("report")):
            names = sorted(name for name in self._settings if not known or known.get(name) != self._settings[name])
            hint = " (a loader that shuffles gives other batches each time)" if "batches" in names else ""
            raise ConfigError(
                f"a run that was stopped or is finished must be called with the same settings, got others: "
                f"{', '.join(names)}{hint}; delete the folder to begin anew ({folder})"
            )
        self.kept: list[int] = content.get("kept", [])  # numbers of the blocks that aren't removed, in the source
        self.rows: list[dict[str, Any]] = content.get("rows", [])  # what was noted of each finished block
        self.report: dict[str, Any] | None = content.get("report")  # of a finished run
        self._states = folder / _FOLDER
        if processes is not None and not self.is_first:
            self._states /= f"rank-{processes.rank}"

    def begin(self) -> None:
        """Delete what a run that has finished no block, or was killed in a block, has written to no purpose."""
        if not self.is_first:
            return
        with disk_errors(self.folder):
            patterns = (f"*{_PART}",) if self.rows else (f"*{_PART}", _WEIGHTS, "*config.json")
            for path in [path for pattern in patterns for path in self.folder.glob(pattern)]:
                path.unlink()
        if not self.rows:
            self.kept = []
            self._write()  # before any other file, so that a run which is killed early may begin again

    def write_weights(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a file of weights, in the first process: 0 is what lies outside of the blocks, then one a block.

        `note` makes it count.
        """
        if self.is_first:
            file = f"model-{number + 1:05d}-of-{len(self.kept) + 1:05d}.safetensors"
            _write_tensors(self.folder / file, tensors)

    def note(self, row: Mapping[str, Any] | None = None) -> None:
        """Write down that one more block is finished, and what is to be known of it; None before the first block."""
        if self._processes is not None:  # all have their states
            row = self._processes.first(row, f"the states after {len(self.rows)} blocks")
        if row is not None:
            self.rows.append(dict(row))
        if self.is_first:
            self._write()
        if self._processes is not None:  # states of before are needed until the others are known to count
            self._processes.gather(None, f"the journal of {len(self.rows)} blocks")
        for path in self._states.glob("states-*"):
            if path.name != f"states-{len(self.rows)}":
                shutil.rmtree(path, ignore_errors=True)

    def _write(self) -> None:
        write_json(self.folder / JOURNAL, {"settings": self._settings, "kept": self.kept, "rows": self.rows})

    def begin_states(self, blocks: int) -> None:
        """Begin to write the states after so many blocks; `note` makes them count."""
        folder = self._states / f"states-{blocks}"
        shutil.rmtree(folder, ignore_errors=True)
        with disk_errors(folder):
            folder.mkdir(parents=True)

    def add_states(self, blocks: int, batch: int, states: Mapping[str, Tensor]) -> None:
        """Write the states of one batch."""
        _write_tensors(self._states / f"states-{blocks}" / f"{batch}.safetensors", states)

    def states(self, batches: int) -> Sequence[dict[str, Tensor]]:
        """Return the states after the finished blocks, batch by batch; they are mapped from their files."""
        found = []
        for number in range(batches):
            path = self._states / f"states-{len(self.rows)}" / f"{number}.safetensors"
            cure = f"delete {self.folder} to begin anew"
            with reading(path, "a file of states", cure=cure), safe_open(str(path), "pt") as opened:
                found.append({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        return found

    def write_index(self) -> None:
        """Write the index of the weights."""
        where, nbytes = dict[str, str](), 0
        for path in sorted(self.folder.glob(_WEIGHTS)):
            with safe_open(str(path), "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    where[name] = path.name
                    nbytes += opened.get_tensor(name).nbytes
        write_json(self.folder / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": where})

    def finish(self, report: Mapping[str, Any]) -> None:
        """Write the report in the place of what was noted, and delete the states: the folder is complete."""
        if self.is_first:
            write_json(self.folder / JOURNAL, {"settings": self._settings, "report": report})
        if self._processes is not None:
            self._processes.gather(None, "the report")
        self.delete_states()

    def delete_states(self) -> None:
        """Delete the states of this process, and in the first one the lock of the folder."""
        shutil.rmtree(self._states, ignore_errors=True)
        if self.is_first:
            (self.folder / ".lock").unlink(missing_ok=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors, whole or not at all; DataError where the disk is full."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as part:
        write_safetensors(part, plain, {"format": "pt"})  # Transformers reads files that say they are PyTorch's
