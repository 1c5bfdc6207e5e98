"""Write what ``--help`` prints for each verb, so that it is printed without PyTorch: ``python tools/help.py``."""

from __future__ import annotations

import importlib.metadata
import json
import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from nni_topo.cli import VERBS, main

FILE = Path(__file__).resolve().parents[1] / "nni_topo" / "cli" / "help.json"


def texts() -> dict[str, str]:
    """Return the help of each verb, and of each verb of a group, at 100 columns."""
    os.environ["COLUMNS"] = "100"
    verbs = [[name] for name in VERBS]
    groups = {name: choice() for name, choice in VERBS.items() if not isinstance(choice, type)}
    verbs += [[name, inner] for name, choices in groups.items() for inner in choices]
    return {" ".join(words): _help_of(words) for words in verbs}


def _help_of(words: list[str]) -> str:
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            main([*words, "--help"])
    except SystemExit:
        pass
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines()) + "\n"


if __name__ == "__main__":
    content = {"tyro": importlib.metadata.version("tyro"), "verbs": texts()}
    FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
