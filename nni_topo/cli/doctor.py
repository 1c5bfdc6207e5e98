"""``nni-topo doctor``: what this machine has of what the package needs, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.console import Console

from nni_topo import compat
from nni_topo.errors import NniTopoError
from nni_topo.studies.study import Verb
from nni_topo.studies.tables import as_table
from nni_topo.zoo import list_data, load_data

_EXTRAS = {
    "fast": ("numba",),
    "bench": ("torch_pruning",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "evaluators": ("pytorch_lightning", "transformers"),
    "dask": ("distributed",),
}
_FREE_DISK = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``ok``, ``missing`` (needed only for some things) or ``broken``."""

    what: str
    state: str
    found: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Doctor(Verb):
    """Check versions, NNI, PyTorch's pair, data, GPU, NNI's port and optional packages; say what to do."""

    data_dir: Path | None = None  # folder with data sets' files, to be read as a comparison reads them
    port: int = 8080  # of NNI's manager

    def run(self, console: Console) -> int:
        """Print what was found; return 1 if anything needed is broken."""
        found = [
            *_packages(),
            _pair(),
            _nni(),
            _gpu(),
            *self._data(),
            _manager(),
            _free(self.port),
            _disk(),
            *_optional(),
        ]
        rows = [(each.what, each.state, each.found, each.remedy) for each in found]
        broken = [each for each in found if each.state == "broken"]
        way_on = "fix what is broken first" if broken else "next: nni-topo demo"
        table = as_table(None, ("what", "is", "found", "what to do"), rows, left=4)
        self.put_out(console, [asdict(each) for each in found], [table, way_on])
        return 1 if broken else 0

    def _data(self) -> Iterator[Finding]:
        for name in list_data() if self.data_dir else ["digits"]:
            try:
                load_data(name, self.data_dir, limit=8)
            except (NniTopoError, OSError) as error:
                yield Finding(f"data: {name}", "missing", str(error).partition("\n")[0], "name the folder: --data-dir")
            else:
                yield Finding(f"data: {name}", "ok", "can be read")


def _packages() -> Iterator[Finding]:
    """Look at what setup.cfg requires; where the package isn't installed itself, at nothing."""
    yield Finding("python", "ok", platform.python_version())
    try:
        required = [Requirement(text) for text in importlib.metadata.requires("nni_topo") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("nni_topo", "missing", "runs from its folder, not installed", "pip install .")
        return
    for need in required:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(need.name, "broken", "isn't installed", f"pip install '{need.name}{need.specifier}'")
            continue
        fits = need.specifier.contains(version, prereleases=True)
        remedy = "" if fits else f"pip install '{need.name}{need.specifier}'"
        yield Finding(need.name, "ok" if fits else "broken", version, remedy)


def _pair() -> Finding:
    """Look whether torchvision was built for the torch that is there."""
    torch_version, vision = (importlib.metadata.version(name) for name in ("torch", "torchvision"))
    needs = [Requirement(text) for text in importlib.metadata.requires("torchvision") or ()]
    wanted = next((need.specifier for need in needs if need.name == "torch"), None)
    fits = wanted is None or wanted.contains(torch_version, prereleases=True)
    remedy = "" if fits else f"pip install 'torch{wanted}', or the torchvision of this torch"
    return Finding("torch and torchvision", "ok" if fits else "broken", f"{torch_version} with {vision}", remedy)


def _nni() -> Finding:
    failed = compat.enable().failed
    if failed:
        return Finding(
            "patches of NNI", "broken", ", ".join(failed), "see docs/compatibility.md for the versions that fit"
        )
    return Finding("patches of NNI", "ok", "all in place")


def _gpu() -> Finding:
    if torch.cuda.is_available():
        return Finding("GPU", "ok", torch.cuda.get_device_name())
    return Finding("GPU", "missing", f"none that this torch can use; {torch.get_num_threads()} threads instead")


def _manager() -> Finding:
    if importlib.util.find_spec("nni_node") is None:
        remedy = "pip install --force-reinstall --no-deps 'nni>=3.0,<4'"
        return Finding("NNI's manager", "missing", "not there, so no experiments; nothing else needs it", remedy)
    return Finding("NNI's manager", "ok", "there for experiments")


def _free(port: int) -> Finding:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError as error:
            return Finding(f"port {port}", "missing", f"in use ({error.strerror})", "name another port for experiments")
    return Finding(f"port {port}", "ok", "free for NNI's manager")


def _disk() -> Finding:
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    state, remedy = ("ok", "") if free > _FREE_DISK else ("missing", "set TMPDIR to a folder with more room")
    return Finding("temporary files", state, f"{free / 2**30:.1f} GiB free in {folder}", remedy)


def _optional() -> Iterator[Finding]:
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        state, found = ("missing", f"no {', '.join(missing)}") if missing else ("ok", ", ".join(modules))
        yield Finding(f"extra: {extra}", state, found, f"pip install 'nni_topo[{extra}]'" if missing else "")
