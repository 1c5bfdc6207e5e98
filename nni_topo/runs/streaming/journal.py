"""What a run that was killed has done: finished blocks and their states, in a folder beside the weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from nni_topo.disk import disk_errors, read_json, reading, write_json
from nni_topo.errors import ConfigError
from nni_topo.runs.streaming.shards import INDEX, write_shard

FOLDER = ".shrink_pretrained"
WRITTEN = "model-*-of-*.safetensors"  # files of weights
_FILE = "journal.json"
_PART = "part"


class Journal:
    """The state of a run in its output folder.

    Parameters
    ----------
    folder : Path
        The output folder.
    settings : mapping
        What tells this run from others. A journal with other settings is an error.

    Raises
    ------
    ConfigError
        If the folder holds the journal of another run, or files but no journal.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self._place = folder, folder / FOLDER
        self._settings = dict(settings)
        found = read_json(self._place / _FILE, "the journal of a run")
        if isinstance(found, dict) and not found.get("done") and found.get("settings") != self._settings:
            self._begin_anew()  # no block was finished, so that nothing is lost
            found = None
        self._content: dict[str, Any] = {"settings": self._settings, "done": 0, "files": {}, "rows": []}
        if found is None:
            others = sorted(path.name for path in folder.iterdir() if path.name not in (FOLDER, ".lock"))
            if others:
                got = "a whole model" if INDEX in others else others[0]
                raise ConfigError(
                    f"the folder for the pruned model must be empty or new, or hold a run that was stopped, got "
                    f"{got} there ({folder})"
                )
            self.note(0)  # before any other file, so that a run which is killed early may begin again
            return
        known = found.get("settings") if isinstance(found, dict) else None
        if known != self._settings:
            different = []
            if isinstance(known, dict):
                different = sorted(key for key in known if known[key] != self._settings.get(key))
            hint = " (a loader that shuffles gives other batches each time)" if "batches" in different else ""
            raise ConfigError(
                "a run that was stopped must go on with the same settings, got others: "
                f"{', '.join(different) or 'all'}{hint}; delete the folder to begin anew ({folder})"
            )
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
        """Write a file of weights; `note` makes it count."""
        nbytes = write_shard(self.folder / file, tensors)
        self.files[file] = {"names": list(tensors), "nbytes": nbytes}

    def note(self, done: int, row: Mapping[str, Any] | None = None) -> None:
        """Write down that so many blocks are finished, and what is to be known of the last one."""
        if row is not None:
            self.rows.append(dict(row))
        self._content["done"] = done
        with disk_errors(self._place):
            self._place.mkdir(parents=True, exist_ok=True)
        write_json(self._place / _FILE, self._content)
        for path in self._place.glob("states-*"):
            if path.name != f"states-{done}":
                shutil.rmtree(path, ignore_errors=True)

    def begin_states(self) -> None:
        """Begin to write the states after a block."""
        shutil.rmtree(self._place / _PART, ignore_errors=True)
        with disk_errors(self._place):
            (self._place / _PART).mkdir(parents=True)

    def add_states(self, batch: int, states: Mapping[str, Tensor]) -> None:
        """Write the states of one batch."""
        write_shard(self._place / _PART / f"{batch}.safetensors", states)

    def end_states(self, done: int) -> None:
        """Make the states count as those after so many blocks."""
        target = self._place / f"states-{done}"
        with disk_errors(target):
            shutil.rmtree(target, ignore_errors=True)
            (self._place / _PART).rename(target)

    def states(self, batches: int) -> Sequence[dict[str, Tensor]]:
        """Return the states after the finished blocks, batch by batch; they are mapped from their files."""
        found = []
        for number in range(batches):
            path = self._place / f"states-{self.done}" / f"{number}.safetensors"
            cure = f"delete {self.folder} to begin anew"
            with reading(path, "a file of states", cure=cure), safe_open(str(path), "pt") as opened:
                found.append({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        return found

    def finish(self) -> None:
        """Delete the journal and the states: the folder is complete."""
        # The journal first: one without states would say that the run must go on, which it can't.
        (self._place / _FILE).unlink(missing_ok=True)
        shutil.rmtree(self._place, ignore_errors=True)
