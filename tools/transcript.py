"""Run a page's snippets and write what they print below them: ``python tools/transcript.py PAGE FOLDER``.

FOLDER is made for it and stays, so that pictures can be taken of what is there.

Python snippets run one after the other, as one program; one that begins with ``# NAME.py`` is that file instead. A
block of ``text`` right below a snippet holds its output; commands of the shell run only where they have one.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

SNIPPET = re.compile(r"```(python|console)\n(.*?)```\n(\n```text\n.*?```\n)?", re.S)
PROGRESS = re.compile(r"^\w[\w ]*: +\d+%\||^\{'(train|eval)_\w+': |^[A-Z]+:\d{4}-\d\d-\d\d .*\.cpp:\d+\]")
"""Progress bars, which appear where a machine is slow, lines of a Trainer and of a profiler."""
PROJECT = Path(__file__).parents[1]


def transcribed(page: str, folder: Path) -> str:
    """Return a page with the output of its snippets as they run in a folder."""
    names: dict[str, Any] = {"__name__": "page"}

    def run(found: re.Match[str]) -> str:
        language, code, old = found.groups()
        file = re.match(r"# (\w+\.py)\n", code)
        if file:
            Path(file[1]).write_text(code, encoding="utf-8")
            return found[0]
        if language == "console" and old is None:
            return found[0]
        said = python(code, names) if language == "python" else "".join(map(shell, code.splitlines()))
        return found[0] if old is None else f"```{language}\n{code}```\n\n```text\n{tidy(said)}```\n"

    before = Path.cwd()
    os.chdir(folder)
    try:
        return SNIPPET.sub(run, page)
    finally:
        os.chdir(before)


def python(code: str, names: dict[str, Any]) -> str:
    """Run Python code; return what it prints."""
    with redirect_stdout(StringIO()) as said:
        exec(compile(code, "page", "exec"), names)
    return said.getvalue()


def shell(command: str) -> str:
    """Run a command of the shell, without its comment; return what it prints."""
    program, *words = shlex.split(command, comments=True)
    known = {"nni-topo": [sys.executable, "-m", "nni_topo"], "ls": ["ls"]}
    done = subprocess.run(
        [*known[program], *words],
        env={**os.environ, "COLUMNS": "178", "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
    )
    return done.stdout.decode()  # with the carriage returns of progress bars


def tidy(said: str) -> str:
    """Return a text as a terminal shows it, without lines on progress and without space at the ends of its lines."""
    lines = (line.rpartition("\r")[2].rstrip() for line in said.rstrip().split("\n"))
    return "".join(f"{line}\n" for line in lines if not PROGRESS.match(line))


if __name__ == "__main__":
    path, made = map(Path, sys.argv[1:])
    made.mkdir(parents=True)
    path.write_text(transcribed(path.read_text(encoding="utf-8"), made), encoding="utf-8")
    for picture in made.rglob("accuracy.png"):
        shutil.copy(picture, path.parent / "figures" / f"{path.stem}.png")
