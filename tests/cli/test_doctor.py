"""What a newcomer meets first: doctor, and messages that say what comes next."""

from __future__ import annotations

import configparser
import importlib.util
import json
import socket
from pathlib import Path

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


def test_doctor_says_which_versions_do_not_fit(capsys, monkeypatch):
    from importlib import metadata

    real = metadata.requires
    asked = {
        # what is for others comes first: a later one is looked at all the same
        "nni_topo": [
            "elsewhere>=1; sys_platform == 'none'",
            "pytest>=1; extra == 'dev'",
            "gone>=1",
            "numpy<1",
            "torch>=1",
        ],
        "torchvision": ["numpy", "torch==1.0"],
    }
    monkeypatch.setattr(metadata, "requires", lambda name: asked[name] if name in asked else real(name))
    found = findings(capsys, status=1)
    assert not {"elsewhere", "pytest"} & set(found)
    version = metadata.version("numpy")
    wanted = {"what": "numpy", "state": "broken", "found": version, "remedy": "pip install 'numpy<1'"}
    assert found["numpy"] == wanted
    assert (found["gone"]["found"], found["gone"]["remedy"]) == ("isn't installed", "pip install 'gone>=1'")
    assert (found["torch"]["state"], found["torch"]["remedy"]) == ("ok", "")
    pair = found["torch and torchvision"]
    assert (pair["state"], pair["found"]) == (
        "broken",
        f"{metadata.version('torch')} with {metadata.version('torchvision')}",
    )
    assert pair["remedy"] == "pip install 'torch==1.0', or the torchvision of this torch"

    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "fix what is broken first"


def test_doctor_names_the_extra_of_a_package(capsys, monkeypatch):
    real = importlib.util.find_spec
    gone = ("torch_pruning", "onnxscript", "nni_node")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else real(name))
    found = findings(capsys)
    assert found["extra: bench"]["found"] == "no torch_pruning"
    assert found["extra: export"]["found"].endswith("onnxscript")
    assert found["extra: export"]["remedy"] == "pip install 'nni_topo[export]'"
    manager = found["NNI's manager"]
    assert (manager["state"], manager["found"]) == ("missing", "not installed; only experiments need it")
    assert manager["remedy"].startswith("pip install ")
