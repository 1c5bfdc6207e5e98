"""The ``nni-topo`` command: each verb is a dataclass whose fields are its flags, see :mod:`nni_topo.studies.study`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Sequence

import tyro
from rich.console import Console

import nni_topo
from nni_topo.cli import doctor, experiment, profile, verbs
from nni_topo.context import in_context
from nni_topo.errors import ConfigError, NniTopoError
from nni_topo.studies.study import Verb
from nni_topo_command import chosen

_INTERRUPTED = 130
Choices = dict[str, "type[Verb] | Callable[[], Choices]"]


def studies() -> Choices:
    """Study one model without changing it."""
    from nni_topo.studies import analysis

    choices: Choices = {}
    for info in pkgutil.iter_modules(analysis.__path__):
        module = importlib.import_module(f"{analysis.__name__}.{info.name}")
        kind = getattr(module, f"Analyze{info.name.capitalize()}", None)
        if kind:
            choices[info.name] = kind
    return choices


def experiment_parts() -> Choices:
    """Run NNI's experiments and show their results."""
    return {
        "run": experiment.Run,
        "status": experiment.Status,
        "best": experiment.Best,
        "export": experiment.Export,
    }


VERBS: Choices = {
    "shrink": verbs.Shrink,
    "demo": verbs.Demo,
    "prune": verbs.Prune,
    "compare": verbs.Compare,
    "report": verbs.Report,
    "experiment": experiment_parts,
    "analyze": studies,
    "profile": profile.Profile,
    "list": verbs.List,
    "doctor": doctor.Doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if cells or trials failed, 2 after an error, 130 if interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name, choice = "nni-topo", _choose("nni-topo", VERBS, words)
    while not isinstance(choice, type):
        name = f"{name} {words.pop(0)}"
        choice = _choose(name, choice(), words)
    name = f"{name} {words.pop(0)}"
    try:
        check_names(name, words)
        verb = parsed(name, choice, words)
        # With --json, standard output holds only the document.
        with in_context(is_command=True):
            return verb.run(Console(stderr=verb.json, width=None if sys.stdout.isatty() else 160))
    except NniTopoError as error:
        return _report_failure(name, str(error), error.page)
    except OSError as error:
        return _report_failure(name, f"files must be readable and writable, got {error}")
    except KeyboardInterrupt as interruption:
        how_to_resume = interruption.args[0] if interruption.args else "the same command resumes it"
        Console(stderr=True).print(f"{name}: interrupted; {how_to_resume}", markup=False, soft_wrap=True)
        return _INTERRUPTED


def _report_failure(name: str, reason: str, page: str = "") -> int:
    if page and "docs/" not in reason:
        reason = f"{reason}; see {page}"
    Console(stderr=True).print(f"{name}: {reason}", style="red", markup=False, highlight=False)
    return 2


def _choose(name: str, choices: Choices, words: list[str]) -> type[Verb] | Callable[[], Choices]:
    """Return the choice named by the first word; without a word, or with ``--help``, print the choices and exit."""
    lines = {verb: (inspect.getdoc(choice) or "").partition("\n")[0] for verb, choice in choices.items()}
    return choices[chosen(name, lines, words, f"nni_topo {nni_topo.__version__}")]


def check_names(name: str, words: Sequence[str]) -> None:
    """Raise ConfigError if one cost is asked for by both of its names."""
    flags = {word.partition("=")[0] for word in words}
    if {"--flops", "--macs"} <= flags:
        raise ConfigError(f"--flops and --macs are two names of one cost: give one of them, got both ({name})")


def parsed(name: str, kind: type[Verb], words: Sequence[str]) -> Verb:
    """Return a verb whose fields are set from the command line's words."""
    return tyro.cli(kind, prog=name, args=words, config=(tyro.conf.FlagCreatePairsOff,))
