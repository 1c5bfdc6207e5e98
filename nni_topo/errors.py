"""Exceptions that the package raises on purpose.

Every message states the rule, the value that broke it and the place it was found, in this order.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NniTopoError(Exception):
    """Base class of every error the package raises itself."""


class ConfigError(NniTopoError, ValueError):
    """A config_list, a knob or a name that can't be used."""


class DataError(NniTopoError, ValueError):
    """Tensors, files or data sets that can't be used: NaN weights, missing files, wrong shapes."""


class SpeedupError(NniTopoError, RuntimeError):
    """Masks that can't be turned into a dense model that computes the same function."""


class CompatibilityError(NniTopoError, RuntimeError):
    """The installed NNI or PyTorch isn't one the package can work with."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Build the error for a name that isn't in a table, with the nearest names that are.

    Parameters
    ----------
    kind : str
        What the name should name, e.g. ``"pruner"``.
    name : str
        The name that was given.
    known : iterable of str
        The names of the table.

    Returns
    -------
    ConfigError
        To be raised by the caller.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names)}"
    return ConfigError(f"{kind} must be a known name, got {name!r}; {hint}")
