"""``nni-topo doctor``: check this machine for everything that the package needs, and say how to install the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.console import Console

from nni_topo import compat
from nni_topo.errors import NniTopoError
from nni_topo.studies.study import Verb
from nni_topo.studies.tables import NumberTable
from nni_topo.zoo import list_data, load_data

_EXTRAS = {
    "bench": ("torch_pruning",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "evaluators": ("pytorch_lightning", "transformers"),
    "dask": ("distributed",),
}


@dataclass(frozen=True)
class Finding:
    """Result of one check; ``state``: ``ok``, ``missing`` (something optional) or ``broken``."""

    what: str
    state: str
    found: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Doctor(Verb):
    """Check versions, NNI, torch and torchvision, data, GPU, NNI's port and extras; say what to do."""

    data_dir: Path | None = None  # folder with the files of data sets; the check reads them
    port: int = 8080  # port of NNI's manager

    def run(self, console: Console) -> int:
        """Print the checks; return 1 if anything is broken."""
        findings = list(self._findings())
        broken = any(finding.state == "broken" for finding in findings)
        next_step = "fix what is broken first" if broken else "next: nni-topo demo"
        rows = [(finding.what, finding.state, finding.found, finding.remedy) for finding in findings]
        table = NumberTable(None, ("what", "is", "found", "what to do"), rows, text_columns=4)
        self.put_out(console, [asdict(finding) for finding in findings], [table, next_step])
        return 1 if broken else 0

    def _findings(self) -> Iterator[Finding]:
        """Yield the checks, in the order in which they are printed."""
        yield Finding("python", "ok", platform.python_version())
        # the requirements of setup.cfg
        try:
            required = [Requirement(text) for text in importlib.metadata.requires("nni_topo") or ()]
        except importlib.metadata.PackageNotFoundError:
            yield Finding("nni_topo", "missing", "runs from its folder, not installed", "pip install .")
            required = []
        for need in required:
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            install = f"pip install '{need.name}{need.specifier}'"
            try:
                version = importlib.metadata.version(need.name)
            except importlib.metadata.PackageNotFoundError:
                yield Finding(need.name, "broken", "isn't installed", install)
                continue
            if need.specifier.contains(version, prereleases=True):
                yield Finding(need.name, "ok", version)
            else:
                yield Finding(need.name, "broken", version, install)

        # whether torchvision was built for the installed torch
        torch_version, vision = (importlib.metadata.version(name) for name in ("torch", "torchvision"))
        needs = [Requirement(text) for text in importlib.metadata.requires("torchvision") or ()]
        required_torch = next((need.specifier for need in needs if need.name == "torch"), None)
        versions = f"{torch_version} with {vision}"
        if required_torch is None or required_torch.contains(torch_version, prereleases=True):
            yield Finding("torch and torchvision", "ok", versions)
        else:
            remedy = f"pip install 'torch{required_torch}', or the torchvision of this torch"
            yield Finding("torch and torchvision", "broken", versions, remedy)

        if failed := compat.enable().failed:
            remedy = "see docs/compatibility.md for supported versions"
            yield Finding("patches of NNI", "broken", ", ".join(failed), remedy)
        else:
            yield Finding("patches of NNI", "ok", "all in place")
        if torch.cuda.is_available():
            yield Finding("GPU", "ok", torch.cuda.get_device_name())
        else:
            yield Finding(
                "GPU", "missing", f"none that this torch can use; {torch.get_num_threads()} threads of the CPU"
            )

        for name in list_data() if self.data_dir else ["digits"]:
            try:
                load_data(name, self.data_dir, limit=8)
            except (NniTopoError, OSError) as error:
                yield Finding(f"data: {name}", "missing", str(error).partition("\n")[0], "name the folder: --data-dir")
            else:
                yield Finding(f"data: {name}", "ok", "can be read")

        if importlib.util.find_spec("nni_node") is None:
            remedy = "pip install --force-reinstall --no-deps 'nni>=3.0,<4'"
            yield Finding("NNI's manager", "missing", "not installed; only experiments need it", remedy)
        else:
            yield Finding("NNI's manager", "ok", "installed")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError as error:
                remedy = "name another port for experiments"
                yield Finding(f"port {self.port}", "missing", f"in use ({error.strerror})", remedy)
            else:
                yield Finding(f"port {self.port}", "ok", "free for NNI's manager")

        for extra, modules in _EXTRAS.items():
            missing = [name for name in modules if importlib.util.find_spec(name) is None]
            if missing:
                remedy = f"pip install 'nni_topo[{extra}]'"
                yield Finding(f"extra: {extra}", "missing", f"no {', '.join(missing)}", remedy)
            else:
                yield Finding(f"extra: {extra}", "ok", ", ".join(modules))
