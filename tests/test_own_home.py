"""Tests have a home of their own, whatever programs have left in the user's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from nni.tools.nnictl.config_utils import Experiments

# After the change of home: where NNI, Transformers, PyTorch and Matplotlib look, what they find, and where pip looks.
PROGRAM = """
import json, os, pathlib, subprocess, sys
from own_home import use_home
use_home(pathlib.Path(sys.argv[1]))
import huggingface_hub, matplotlib, torch
from huggingface_hub import constants as hub
from nni.runtime.config import get_config_file
from nni.tools.nnictl.config_utils import Experiments
places = [get_config_file("training_services.json"), hub.HF_HOME, hub.HF_HUB_CACHE, hub.HF_TOKEN_PATH,
          torch.hub.get_dir(), matplotlib.get_configdir(), matplotlib.get_cachedir(), Experiments().experiment_file]
contents = [Experiments().get_all_experiments(), huggingface_hub.get_token(), matplotlib.rcParams["lines.linewidth"]]
pip = [sys.executable, "-m", "pip"]
settings, cache = (subprocess.run([*pip, *words], capture_output=True, text=True).stdout
                   for words in (["config", "list"], ["cache", "dir"]))
print(json.dumps([[str(place) for place in places], contents, settings, cache.strip()]))
"""


def filled_home(home: Path, more: Path) -> dict[str, str]:
    """Fill a home with what programs leave there, partly in places that variables name; return these."""
    files = {
        home / "nni-experiments" / ".experiment": json.dumps({"abc": {"id": "abc", "port": 8080, "status": "STOPPED"}}),
        home / ".cache" / "huggingface" / "token": "hf_of_the_user",
        home / ".cache" / "pip" / "http" / "x": "",
        home / ".config" / "pip" / "pip.conf": "[global]\ntimeout = 77\n",
        more / "hub" / "token": "hf_of_a_variable",
        more / "matplotlib" / "matplotlibrc": "lines.linewidth: 9\n",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True)
        path.write_text(text)
    variables = {"HF_HOME": more / "hub", "TORCH_HOME": more / "torch", "MPLCONFIGDIR": more / "matplotlib"}
    return {"HOME": str(home), **{name: str(path) for name, path in variables.items()}}


def test_programs_of_a_test_see_nothing_of_a_filled_home_but_pips_settings(tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= filled_home(tmp_path / "home", tmp_path / "more")
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", PROGRAM, str(new)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    places, contents, settings, cache = json.loads(done.stdout.splitlines()[-1])
    assert [place for place in places if not Path(place).is_relative_to(new)] == []
    assert contents == [{}, None, 1.5]
    assert "timeout='77'" in settings
    assert Path(cache) == tmp_path / "home" / ".cache" / "pip"


def test_this_process_has_a_home_of_its_own():
    home = Path.home()
    assert home.name.startswith("nni-topo-home-")
    assert Path(Experiments().experiment_file).is_relative_to(home)
