"""What a run has done: finished blocks and their states, in a folder beside the weights, and at the end its report."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from nni_topo.disk import disk_errors, read_json, reading, write_json
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.processes import Processes
from nni_topo.runs.streaming.shards import INDEX, write_shard

FOLDER = ".shrink_pretrained"
REPORT = "shrink_pretrained.json"
"""The report of a finished run, with digests of its settings and the sizes of the files that it wrote."""
WRITTEN = "model-*-of-*.safetensors"  # files of weights
_FILE = "journal.json"
_PART = "part"


class Journal:
    """The state of a run in its output folder.

    Where processes share the calibration data, the first one reads and writes what all have in common; each has the
    states of its own samples.

    Parameters
    ----------
    folder : Path
        The output folder.
    settings : mapping
        What tells this run from others. A journal with other settings is an error.
    processes : Processes, optional
        Those that share the calibration data.

    Raises
    ------
    ConfigError
        If the folder holds the journal of another run, or files but no journal.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], processes: Processes | None = None) -> None:
        self.folder, self._place = folder, folder / FOLDER
        self._settings, self._processes = _digests(settings), processes
        self._own = self._place  # where the states of this process's samples lie
        self._content: dict[str, Any] = {"settings": self._settings, "done": 0, "kept": [], "files": {}, "rows": []}
        if self._is_first:
            self._open()
        if processes is not None:
            self._content = processes.first(self._content, "the journal")
            if processes.rank > 0:
                self._own = self._place / f"rank-{processes.rank}"

    @property
    def _is_first(self) -> bool:
        return self._processes is None or self._processes.rank == 0

    def _open(self) -> None:
        """Read the journal of a run that was stopped, or begin one."""
        folder = self.folder
        found = read_json(self._place / _FILE, "the journal of a run")
        if isinstance(found, dict) and not found.get("done") and found.get("settings") != self._settings:
            self._begin_anew()  # no block was finished, so that nothing is lost
            found = None
        if found is None:
            others = sorted(path.name for path in folder.iterdir() if path.name not in (FOLDER, ".lock"))
            if others:
                got = "a whole model" if INDEX in others else others[0]
                raise ConfigError(
                    f"the folder for the pruned model must be empty or new, or hold a run that was stopped, got "
                    f"{got} there ({folder})"
                )
            self._write()  # before any other file, so that a run which is killed early may begin again
            return
        _check_settings(found, self._settings, "a run that was stopped must go on with", folder)
        self._content = found
        for path in folder.glob("*.part"):  # a file that was written when the run was killed
            path.unlink(missing_ok=True)

    def _begin_anew(self) -> None:
        """Delete what a run with other settings has written."""
        with disk_errors(self.folder):
            for pattern in (WRITTEN, "*config.json", "*.part"):
                for path in self.folder.glob(pattern):
                    path.unlink()
            shutil.rmtree(self._place)

    @property
    def done(self) -> int:
        """Number of blocks that are finished."""
        return int(self._content["done"])

    @property
    def kept(self) -> list[int]:
        """Numbers of the blocks that aren't removed, in the source."""
        found: list[int] = self._content["kept"]
        return found

    @kept.setter
    def kept(self, numbers: Sequence[int]) -> None:
        """Note the blocks that stay; `note` makes it count."""
        self._content["kept"] = list(numbers)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """By file of weights that is written, the names of its tensors and their bytes."""
        found: dict[str, dict[str, Any]] = self._content["files"]
        return found

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was noted of each finished block."""
        found: list[dict[str, Any]] = self._content["rows"]
        return found

    def write_weights(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file of weights, in the first process; `note` makes it count."""
        if not self._is_first:
            return
        nbytes = write_shard(self.folder / file, tensors)
        self.files[file] = {"names": list(tensors), "nbytes": nbytes}

    def note(self, done: int, row: Mapping[str, Any] | None = None) -> None:
        """Write down that so many blocks are finished, and what is to be known of the last one."""
        if self._processes is not None:  # all have their states
            row = self._processes.first(row, f"the states after {done} blocks")
        if row is not None:
            self.rows.append(dict(row))
        self._content["done"] = done
        if self._is_first:
            self._write()
        if self._processes is not None:  # states of before are needed until the others are known to count
            self._processes.gather(None, f"the journal of {done} blocks")
        for path in self._own.glob("states-*"):
            if path.name != f"states-{done}":
                shutil.rmtree(path, ignore_errors=True)

    def _write(self) -> None:
        with disk_errors(self._place):
            self._place.mkdir(parents=True, exist_ok=True)
        write_json(self._place / _FILE, self._content)

    def begin_states(self) -> None:
        """Begin to write the states after a block."""
        shutil.rmtree(self._own / _PART, ignore_errors=True)
        with disk_errors(self._own):
            (self._own / _PART).mkdir(parents=True)

    def add_states(self, batch: int, states: Mapping[str, Tensor]) -> None:
        """Write the states of one batch."""
        write_shard(self._own / _PART / f"{batch}.safetensors", states)

    def end_states(self, done: int) -> None:
        """Make the states count as those after so many blocks."""
        target = self._own / f"states-{done}"
        with disk_errors(target):
            shutil.rmtree(target, ignore_errors=True)
            (self._own / _PART).rename(target)

    def states(self, batches: int) -> Sequence[dict[str, Tensor]]:
        """Return the states after the finished blocks, batch by batch; they are mapped from their files."""
        found = []
        for number in range(batches):
            path = self._own / f"states-{self.done}" / f"{number}.safetensors"
            cure = f"delete {self.folder} to begin anew"
            with reading(path, "a file of states", cure=cure), safe_open(str(path), "pt") as opened:
                found.append({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        return found

    def finish(self, report: Mapping[str, Any]) -> None:
        """Write the report, and delete the journal and the states: the folder is complete."""
        if self._is_first:
            files = {file: (self.folder / file).stat().st_size for file in (*self.files, INDEX)}
            write_json(self.folder / REPORT, {"settings": self._settings, "files": files, "report": report})
            _delete(self.folder)
        if self._processes is not None:
            self._processes.gather(None, "the report")
            shutil.rmtree(self._own, ignore_errors=True)


def finished_report(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the report of a finished run holds, and delete what is left of the run if it was killed at its end.

    ConfigError for a run with other settings, DataError where a file of the model is missing or has another size.
    """
    found = read_json(folder / REPORT, "the report of a run")
    _check_settings(found, _digests(settings), "a finished model must be asked for with", folder)
    for file, nbytes in found["files"].items():
        path = folder / file
        size = path.stat().st_size if path.is_file() else None
        if size != nbytes:
            got = "none" if size is None else f"{size} bytes where it wrote {nbytes}"
            raise DataError(f"a finished model must have the files that its run wrote, got {got} ({path})")
    _delete(folder)
    report: dict[str, Any] = found["report"]
    return report


def _delete(folder: Path) -> None:
    """Delete the journal and the states."""
    # The journal first: one without states would say that the run must go on, which it can't.
    (folder / FOLDER / _FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _digests(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each setting: they name folders of this machine, and a report goes where its model goes."""
    found = {}
    for name, value in settings.items():
        found[name] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return found


def _check_settings(found: Any, settings: Mapping[str, str], rule: str, folder: Path) -> None:
    """Raise ConfigError for the journal or the report of a run with other settings."""
    known = found.get("settings") if isinstance(found, dict) else None
    if known == settings:
        return
    different = []
    if isinstance(known, dict):
        different = sorted(key for key in known if known[key] != settings.get(key))
    hint = " (a loader that shuffles gives other batches each time)" if "batches" in different else ""
    raise ConfigError(
        f"{rule} the same settings, got others: {', '.join(different) or 'all'}{hint}; delete the folder to begin anew "
        f"({folder})"
    )
