"""``nni-topo completion``: a script with which a shell completes verbs and flags."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import tyro
from rich.console import Console

from nni_topo.studies.study import Verb

_SCRIPT = """_nni_topo() {{
  local before="${{COMP_WORDS[*]:1:COMP_CWORD-1}}" words
  case "$before " in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _nni_topo nni-topo
"""


@dataclass(frozen=True, kw_only=True)
class Completion(Verb):
    """Print a script that completes verbs and flags: eval "$(nni-topo completion bash)"."""

    shell: tyro.conf.Positional[Literal["bash", "zsh"]] = "bash"  # bash or zsh

    def run(self, console: Console) -> int:
        """Print the script on standard output."""
        from nni_topo.cli import VERBS

        cases = [f'    "{path}"*) words="{" ".join(words)}" ;;' for path, words in _completed("", VERBS)]
        head = "autoload -U +X bashcompinit && bashcompinit\n" if self.shell == "zsh" else ""
        print(head + _SCRIPT.format(cases="\n".join(cases)), end="")
        return 0


def _completed(path: str, choices: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield commands and the words that may follow them, longer commands first."""
    if isinstance(choices, type):
        named = [field.name for field in fields(choices) if "Positional" not in str(field.type)]
        yield path, [f"--{name.replace('_', '-')}" for name in named]
        return
    known = choices if isinstance(choices, dict) else choices()
    for name, choice in known.items():
        yield from _completed(f"{path}{name} ", choice)
    yield path, list(known)
