"""What a newcomer meets first: doctor, and messages that say what comes next."""

from __future__ import annotations

import configparser
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nni_topo.cli import main


def findings(capsys, *words, status=0):
    assert main(["doctor", "--json", *words]) == status
    return {each["what"]: each for each in json.loads(capsys.readouterr().out)}


def test_doctor_knows_what_is_here_and_what_a_port_is_used_for(capsys, tmp_path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        found = findings(capsys, "--port", str(port), "--data-dir", str(tmp_path))
    assert found[f"port {port}"]["state"] == "missing"
    assert (
        found["torch and torchvision"]["state"]
        == found["patches of NNI"]["state"]
        == found["data: digits"]["state"]
        == "ok"
    )
    assert found["data: mnist"]["state"] == "missing"
    assert (found["NNI's manager"]["state"], found["NNI's manager"]["found"]) == ("ok", "installed")
    assert all(each["remedy"] for each in found.values() if each["state"] == "broken")
    assert not any(each["remedy"] for each in found.values() if each["state"] == "ok")
    found = findings(capsys, "--port", str(port))
    assert found[f"port {port}"]["state"] == "ok"
    # without a folder there are no files of other data to read
    assert [name for name in found if name.startswith("data: ")] == ["data: digits"]
    assert main(["doctor", "--port", str(port)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: nni-topo demo"


def test_doctor_looks_at_extras_that_pip_knows(capsys):
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    named = {name.removeprefix("extra: ") for name in findings(capsys) if name.startswith("extra: ")}
    assert named == set(setup["options.extras_require"]) - {"runtimes", "upstream", "test", "dev", "nightly"}


def test_doctor_names_the_command_for_what_is_missing(capsys, monkeypatch):
    from importlib import metadata

    real = metadata.requires
    monkeypatch.setattr(
        metadata, "requires", lambda name: ["gone>=1", "torch>=1"] if name == "nni_topo" else real(name)
    )
    found = findings(capsys, status=1)
    assert found["gone"] == {
        "what": "gone",
        "state": "broken",
        "found": "isn't installed",
        "remedy": "pip install 'gone>=1'",
    }
    assert found["torch"]["state"] == "ok"  # what comes after it is looked at too
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "fix what is broken first"


def test_doctor_says_which_versions_do_not_fit(capsys, monkeypatch):
    from importlib import metadata

    real = metadata.requires
    asked = {
        # what is for others comes first: a later one is looked at all the same
        "nni_topo": ["elsewhere>=1; sys_platform == 'none'", "pytest>=1; extra == 'dev'", "numpy<1", "torch>=1"],
        "torchvision": ["numpy", "torch==1.0"],
    }
    monkeypatch.setattr(metadata, "requires", lambda name: asked[name] if name in asked else real(name))
    found = findings(capsys, status=1)
    assert not {"elsewhere", "pytest"} & set(found)
    version = metadata.version("numpy")
    wanted = {"what": "numpy", "state": "broken", "found": version, "remedy": "pip install 'numpy<1'"}
    assert found["numpy"] == wanted
    assert (found["torch"]["state"], found["torch"]["remedy"]) == ("ok", "")
    pair = found["torch and torchvision"]
    assert (pair["state"], pair["found"]) == (
        "broken",
        f"{metadata.version('torch')} with {metadata.version('torchvision')}",
    )
    assert pair["remedy"] == "pip install 'torch==1.0', or the torchvision of this torch"


def test_doctor_names_the_extra_of_a_package_and_a_full_disk(capsys, monkeypatch):
    real = importlib.util.find_spec
    gone = ("torch_pruning", "onnxscript", "nni_node")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else real(name))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    found = findings(capsys)
    assert found["extra: bench"]["found"] == "no torch_pruning"
    assert found["extra: export"]["found"].endswith("onnxscript")
    manager = found["NNI's manager"]
    assert (manager["state"], manager["found"]) == ("missing", "not installed; only experiments need it")
    assert manager["remedy"].startswith("pip install ")
    assert found["extra: export"]["remedy"] == "pip install 'nni_topo[export]'"
    disk = found["temporary files"]
    assert (disk["state"], disk["remedy"]) == ("missing", "set TMPDIR to a folder with more free space")
    assert disk["found"].startswith("1.0 GiB free in ")


WITHOUT_MANAGER = """
import sys
sys.modules["nni_node"] = None
import torch, nni_topo
from nni_topo.cli import main
net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
small = nni_topo.shrink(net, [torch.randn(64, 16)], {"flops": 0.5}, distill=False)
assert small[0].out_features < 32
sys.exit(main(["doctor", "--json"]))
"""


@pytest.mark.slow
def test_without_the_manager_of_experiments_networks_are_pruned_and_doctor_says_what_is_missing():
    done = subprocess.run([sys.executable, "-c", WITHOUT_MANAGER], capture_output=True, text=True, check=True)
    (manager,) = [each for each in json.loads(done.stdout) if each["what"] == "NNI's manager"]
    assert manager["state"] == "missing"
    assert "pip install" in manager["remedy"]
