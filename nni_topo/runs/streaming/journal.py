"""The progress of a run, in one JSON file beside the weights, and the states between blocks, in a hidden folder."""

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
from nni_topo.runs.streaming.skeleton import INDEX

JOURNAL = "shrink_pretrained.json"
"""The name of the file: digests of the run's settings, then its finished blocks or its report."""
_FOLDER = ".shrink_pretrained"  # folder of the states
_WEIGHTS = "model-*-of-*.safetensors"
_PART = ".part"  # suffix of files that aren't complete


class Journal:
    """The state of a run in its output folder.

    ``settings`` identify the run; ``blocks`` is the number of blocks. ConfigError if the folder holds other files, or a
    run with other settings that has finished a block.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], blocks: int) -> None:
        self.folder, self._blocks = folder, blocks
        # Digests, because the settings hold paths, and the report is published with the model. Addresses of objects are
        # removed, because they differ between processes.
        self._settings = {
            name: hashlib.sha256(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).encode()).hexdigest()
            for name, value in settings.items()
        }
        content: Any = read_json(folder / JOURNAL, "the journal of a run")
        if content is None:
            present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
            others = [name for name in present if name not in (_FOLDER, ".lock") and not name.endswith(_PART)]
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
        self.rows: list[dict[str, Any]] = content.get("rows", [])  # one record for each finished block
        self.report: dict[str, Any] | None = content.get("report")  # of a finished run
        self._states = folder / _FOLDER

    def begin(self) -> None:
        """Delete files of an interrupted run that can't be used."""
        with disk_errors(self.folder):
            patterns = (f"*{_PART}",) if self.rows else (f"*{_PART}", _WEIGHTS, "*config.json")
            for path in [path for pattern in patterns for path in self.folder.glob(pattern)]:
                if path.is_file():  # folders of killed saves go with the next save
                    path.unlink()
        if not self.rows:
            self._write()  # at once, so that a run that is killed early can be restarted

    def write_weights(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a file of weights: number 0 for the model without blocks, then one for each block.

        It is valid only after `note` has recorded it.
        """
        file = f"model-{number + 1:05d}-of-{self._blocks + 1:05d}.safetensors"
        _write_tensors(self.folder / file, tensors)

    def note(self, row: Mapping[str, Any] | None = None) -> None:
        """Record a finished block; None records that the run has begun."""
        if row is not None:
            self.rows.append(dict(row))
        self._write()
        for path in self._states.glob("states-*"):  # earlier states, which were needed until the record was written
            if path.name != f"states-{len(self.rows)}":
                shutil.rmtree(path, ignore_errors=True)

    def _write(self) -> None:
        write_json(self.folder / JOURNAL, {"settings": self._settings, "rows": self.rows})

    def begin_states(self, blocks: int) -> None:
        """Begin to write the states after ``blocks`` blocks; they are valid once `note` has recorded the block."""
        folder = self._states / f"states-{blocks}"
        shutil.rmtree(folder, ignore_errors=True)
        with disk_errors(folder):
            folder.mkdir(parents=True)

    def add_states(self, blocks: int, batch: int, states: Mapping[str, Tensor]) -> None:
        """Write the states of one batch."""
        _write_tensors(self._states / f"states-{blocks}" / f"{batch}.safetensors", states)

    def states(self, batches: int) -> Sequence[dict[str, Tensor]]:
        """Return the states after the finished blocks, batch by batch, memory-mapped."""
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
        """Replace the records by the report and delete the states."""
        write_json(self.folder / JOURNAL, {"settings": self._settings, "report": report})
        self.delete_states()

    def delete_states(self) -> None:
        """Delete the states and the lock of the folder."""
        shutil.rmtree(self._states, ignore_errors=True)
        (self.folder / ".lock").unlink(missing_ok=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as part:
        write_safetensors(part, plain, {"format": "pt"})  # Transformers requires this entry
