"""Files and folders: atomic writes, one writing process per folder, and clear errors for damage and full disks."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import platform
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from nni_topo.errors import ConfigError, DataError, NniTopoError

MIN_FREE_BYTES = 16 * 2**20
LOCK = ".lock"
DELETE = "delete it and run again"
"""Advice in errors about a damaged file that the run itself has written."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def path_of(path: Any, knob: str = "path") -> Path:
    """Return a string or path-like object as a Path; ConfigError for other types and empty strings."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ConfigError(f"a path must be text or a path-like object, got {type(path).__name__} ({knob})")
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise ConfigError(f"a path must name a place, got {os.fspath(path)!r} ({knob})")
    return Path(path)


_FOLDERS = re.compile(r"""(?<![\w.:/\\])(?:[A-Za-z]:)?(?:[/\\][^/\\\s'"()<>]+)+[/\\](?=[^/\\\s'"()<>])""")


def without_folders(text: str) -> str:
    """Shorten each absolute path in a text to its last part, because other people will read the file."""
    return os.path.basename(text) if os.path.isabs(text) else _FOLDERS.sub("", text)


def check_free_disk(folder: Path, needed: int = MIN_FREE_BYTES) -> None:
    """Raise DataError unless a folder, or its nearest existing parent, is writable and has ``needed`` bytes free."""
    rule = "an output folder must be a folder that can be written to"
    with disk_errors(folder):
        place = folder.expanduser().absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise DataError(f"{rule}, got one that can't ({place})")
    try:
        # Permissions aren't enough: the file system may be read-only.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        if error.errno not in _FULL:
            raise DataError(f"{rule}, got one that can't: {error.strerror} ({place})") from None
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DataError(
            f"an output folder needs {needed / 2**20:.0f} MiB of free disk, got {free / 2**20:.1f} MiB ({folder})"
        )


@contextmanager
def only_process(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Lock a folder, after waiting for other processes by default; a killed process releases its lock.

    DataError if the disk is full, or if another process holds the lock and ``wait`` is False.
    """
    check_free_disk(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_file(folder / LOCK), timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except Timeout:
            raise DataError(
                f"a folder must be written by one run at a time, got another run that writes there ({folder})"
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn errors of a full or read-only disk into a DataError that names the place."""
    try:
        yield
    except NniTopoError:
        raise
    except (OSError, RuntimeError) as error:
        # PyTorch raises an error about its archive; the operating system's error is in its __context__.
        said: BaseException | None = error
        while said is not None and not isinstance(said, OSError):
            said = said.__context__
        if said is None:
            raise
        if said.errno in _FULL:
            raise DataError(f"an output folder needs free disk, got none left ({place})") from None
        raise DataError(f"a file must be writable, got {said.strerror} ({place})") from None


def output_file(path: Path) -> Path:
    """Return the file that a path leads to, following links; DataError if it exists and isn't a regular file."""
    with disk_errors(path):
        target = Path(os.path.realpath(path))
        try:
            target.stat()
        except FileNotFoundError:
            return target
    if not target.is_file():
        got = "a folder" if target.is_dir() else "something else"
        raise DataError(f"an output file must be a regular file or a new one, got {got} ({path})")
    return target


def check_output_file(path: Path, *, makes_folder: bool = False) -> None:
    """Raise DataError, before long work, unless a file can be written; ``makes_folder``: its folder may be missing."""
    folder = output_file(path).parent
    if not makes_folder and not folder.is_dir():
        raise DataError(f"an output file must lie in a folder that exists, got none ({path})")
    check_free_disk(folder, 0)


def output_folder(folder: Path) -> Path:
    """Return an output folder, created if it doesn't exist."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside a file; at the end it replaces the file, after an error it is deleted.

    If the path is a link, the file that it leads to is replaced. DataError if that isn't a regular file.
    """
    target = output_file(path)
    if not target.parent.is_dir():
        raise DataError(f"an output file must lie in a folder that exists, got none ({path})")
    with disk_errors(path), scratch_folder(target.parent) as scratch:
        part = scratch / target.name
        yield part
        if target.exists():
            shutil.copymode(target, part)
        else:
            umask = os.umask(0)
            os.umask(umask)
            part.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
        part.replace(target)


_SCRATCH = ".nni_topo-"
_HOST = re.sub(r"\W", "_", platform.node())[:40]  # several machines may write into one folder


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a hidden folder for files that aren't whole yet, and delete it; also those that killed processes left."""
    owner = re.compile(rf"{re.escape(_SCRATCH)}.*\.{_HOST}\.(\d+)\.part")
    for leftover in parent.glob(f"{_SCRATCH}*.part"):
        match = owner.fullmatch(leftover.name)
        if match is not None and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(leftover, ignore_errors=True)
    scratch = tempfile.mkdtemp(prefix=_SCRATCH, suffix=f".{_HOST}.{os.getpid()}.part", dir=parent)
    try:
        yield Path(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, *, sort: bool = True, default: Callable[[Any], Any] | None = None) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1, sort_keys=sort, default=default) + "\n")


def plain(value: Any) -> Any:
    """Convert a value for JSON: dataclasses to mappings, keys to strings, arrays to lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def finite(value: Any) -> Any:
    """Replace NaN and infinite numbers, which JSON doesn't have, by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_figure(path: Path, figure: Any, dpi: int, metadata: dict[str, str] | None = None) -> None:
    """Write a matplotlib figure atomically, in the format of the file's suffix, with ``metadata`` that it can hold."""
    kind, kinds = path.suffix[1:].lower() or "png", figure.canvas.get_supported_filetypes()
    if kind not in kinds:
        raise ConfigError(f"a picture must be one of {', '.join(sorted(kinds))}, got {kind} ({path})")
    with whole_file(path) as part:
        figure.savefig(part, dpi=dpi, format=kind, metadata=metadata)


def write_tensors(path: Path, content: Any) -> None:
    """Write a file with ``torch.save`` atomically."""
    with whole_file(path) as part, part.open("wb") as stream:
        torch.save(content, stream)


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; errors of the disk are raised as OSError."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"(?:os error |code: )(\d+)", str(error))  # "Os { code: 2, ... }" before 0.6
        raise (error if number is None else OSError(int(number[1]), os.strerror(int(number[1])))) from error


@contextmanager
def reading(path: Path, what: str, holds: str = "", cure: str = "") -> Iterator[None]:
    """Turn errors of reading a file into a DataError that says what the file must be and hold, and what to do."""
    with disk_errors(path):
        is_file, exists = path.is_file(), path.exists()
    if not is_file:
        got = "none" if not exists else "a folder" if path.is_dir() else "something else"
        raise DataError(f"{what} must be a file that exists, got {got} ({path})")
    try:
        yield
    except NniTopoError as error:
        if str(path) in str(error):
            raise
        raise DataError(f"{what} must be a whole file{holds and ' '}{holds}, got: {error} ({path})") from None
    except Exception as error:
        # Damaged files can raise any error. PyTorch's messages are long and advise unsafe loading.
        words = "" if type(error).__module__.startswith(("torch", "pickle", "_pickle")) else str(error).split("\n")[0]
        raise DataError(
            f"{what} must be a whole file{holds and ' '}{holds}, got {path.stat().st_size} bytes that lead to "
            f"{type(error).__name__}{words and ': '}{words[:120]}{cure and '; '}{cure} ({path})"
        ) from None


def read_json(path: Path, what: str = "a file of a run") -> Any:
    """Read a JSON file; None if it doesn't exist, DataError if it isn't JSON."""
    if not path.exists():
        return None
    with reading(path, what, "of JSON"):
        return json.loads(path.read_text(encoding="utf-8"))


_IS_FOLDER = 0x10  # bit in the external attributes of a zip entry


def read_tensors(path: Path) -> Any:
    """Read a file of ``torch.save`` with tensors and plain values to the CPU; no pickled code is run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # PyTorch reads nothing from an entry that is marked as a folder, and returns uninitialised memory.
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & _IS_FOLDER]
            if folders:
                raise zipfile.BadZipFile(f"entries are marked as folders: {', '.join(folders)}")
            # PyTorch writes checksums by default, but doesn't check them.
            for entry in (entry for entry in archive.infolist() if entry.CRC):
                with archive.open(entry) as stream:
                    while stream.read(2**20):
                        pass
    try:
        with path.open("rb") as stream:  # given a path, PyTorch decides by its suffix
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "allowed global" not in str(error):
            raise
        raise DataError("it holds pickled objects, as torch.save(model) writes them; read it with torch.load") from None
