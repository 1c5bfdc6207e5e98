"""A trial's folder: one process at a time, files that appear whole, and clear words when the disk is full."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.files import whole_file

MIN_FREE_BYTES = 16 * 2**20
_LOCK = ".lock"


def check_free_disk(folder: Path, needed: int = MIN_FREE_BYTES) -> None:
    """Raise DataError unless a folder, or the nearest one above it, can be written to and has ``needed`` bytes free."""
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise DataError(f"an output folder must be a folder that can be written to, got one that can't ({place})")
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DataError(
            f"an output folder needs {needed / 2**20:.0f} MiB of free disk, got {free / 2**20:.1f} MiB ({folder})"
        )


@contextmanager
def only_process(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a folder with room to write, by default as soon as no other process does; a killed one lets go."""
    check_free_disk(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / _LOCK).open("w")
    with stream:
        # the system drops the lock with the process, however that ends
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"a folder must be written by one run at a time, got one at work there ({folder})"
            ) from error
        yield


def is_held(folder: Path) -> bool:
    """Say whether a process holds a folder by :func:`only_process`."""
    try:
        stream = (folder / _LOCK).open("r")
    except OSError:
        return False
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a full disk raises into a :class:`~nni_topo.errors.DataError` that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f"an output folder needs free disk, got none left ({folder})") from error


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, and move it there when it is whole; DataError if the disk is full."""
    try:
        with disk_errors(path.parent), whole_file(path) as part:
            write(part)
    except (RuntimeError, DataError) as error:
        # torch.save says what a full disk did to its archive, not that the disk is full
        if shutil.disk_usage(path.parent).free >= MIN_FREE_BYTES:
            raise
        raise DataError(f"an output folder needs free disk, got none left ({path})") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read a JSON file; None if it isn't there, ConfigError if it isn't JSON."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"a trial's file must be JSON, got: {error} ({path})") from error
