"""A home folder for the tests, so that none reads or changes what programs have left in the user's."""

from __future__ import annotations

import os
import site
from pathlib import Path

# Each leads past the home that HOME names. Without them caches, settings and tokens are looked for in that home.
PLACES = (
    *("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"),
    *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HF_MODULES_CACHE", "HF_XET_CACHE"),
    *("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_ASSETS_CACHE", "TRANSFORMERS_CACHE"),
    *("TORCH_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "YOLO_CONFIG_DIR", "MPLCONFIGDIR"),
    *("SCIKIT_LEARN_DATA", "DASK_CONFIG"),
)


def use_home(folder: Path) -> None:
    """Make an empty folder the home of this process and of the processes that it starts.

    Python's packages of the user, pip, git and pyenv go on with what they have, since tests install and build.
    """
    home = Path.home()
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    tools = {
        "PYTHONUSERBASE": [Path(site.getuserbase())],
        "PIP_CONFIG_FILE": [settings / "pip" / "pip.conf", home / ".pip" / "pip.conf"],
        "PIP_CACHE_DIR": [caches / "pip", home / "Library" / "Caches" / "pip"],
        "GIT_CONFIG_GLOBAL": [home / ".gitconfig", settings / "git" / "config"],
        "PYENV_ROOT": [home / ".pyenv"],
    }
    for variable, candidates in tools.items():
        existing = [place for place in candidates if place.exists()]
        if existing:
            os.environ.setdefault(variable, str(existing[0]))
    for variable in PLACES:
        os.environ.pop(variable, None)
    homes = ["HOME", "USERPROFILE", *(name for name in ("APPDATA", "LOCALAPPDATA") if name in os.environ)]
    os.environ |= {**dict.fromkeys(homes, str(folder)), "NNI_CONFIG_DIR": str(folder / ".config" / "nni")}
