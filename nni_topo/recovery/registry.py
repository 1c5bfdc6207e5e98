"""Recovery methods by name: each is a class of settings with the rule that solves the layers of a pruned network.

A method of your own is a frozen dataclass that derives from :class:`RecoveryMethod` and overrides
:meth:`~RecoveryMethod.tasks`. Pass an instance to :func:`nni_topo.compensate`, or register the class under a name.

`docs/own_recovery.md` shows a whole method. Its task derives from `ReconstructTask` in `reconstruct.py` and overrides
`fit`, which takes sums over samples (`NormalEquations`) and returns a `Fit`; both are in
`maths/least_squares/normal.py`. A task that samples something other than the layer's inputs also overrides `unknowns`,
`samples` and `apply`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

from nni_topo.errors import ConfigError
from nni_topo.recovery.networks import Networks
from nni_topo.recovery.plan import Plan
from nni_topo.recovery.samples import Task
from nni_topo.registry import ClassInfo, Registry
from nni_topo.rules import checked


class RecoveryMethod:
    """A way to change the kept weights of a pruned network; the fields of a subclass are its settings."""

    recalibrates: ClassVar[bool] = False
    """Whether the statistics of batch norms are measured anew at the end."""

    def tasks(self, plan: Plan, networks: Networks) -> list[Task]:
        """Return one :class:`Task` or several for each layer, in the order in which they are solved."""
        raise NotImplementedError


@dataclass(frozen=True)
class Recalibrate(RecoveryMethod):
    """Measure the statistics of batch norms anew and change no weight."""

    recalibrates = True

    def tasks(self, plan: Plan, networks: Networks) -> list[Task]:
        """Return nothing to solve."""
        del plan, networks
        return []


@dataclass(frozen=True)
class RecoveryInfo(ClassInfo[RecoveryMethod]):
    """A recovery method in the table.

    Attributes
    ----------
    name : str
        Name that :func:`nni_topo.compensate` takes as ``method``.
    path : str
        ``"package.module:Class"`` of a :class:`RecoveryMethod` whose settings all have defaults; imported when needed.
    summary : str
        Description in one line.
    """

    kind: ClassVar[str] = "method"
    base: ClassVar[type] = RecoveryMethod

    def make(self, **settings: Any) -> RecoveryMethod:
        """Return a method with these settings and defaults for the others; ConfigError if one has no default."""
        method = self.load()
        try:
            inspect.signature(method).bind(**settings)
        except TypeError as error:
            raise ConfigError(
                f"a method's settings must have defaults if it is named, got {error} ({self.name})"
            ) from None
        return method(**settings)


RECOVERIES = Registry(RecoveryInfo, "nni_topo.recoveries")


@checked()
def register_recovery(info: RecoveryInfo) -> None:
    """Add a recovery method to the table, for example a third party's.

    Raises
    ------
    ConfigError
        If the name is taken by another class.
    """
    RECOVERIES.register(info)


@checked()
def list_recoveries(pattern: str = "*") -> list[str]:
    """Return the names of all registered recovery methods that match a shell pattern, sorted.

    Examples
    --------
    >>> list_recoveries("re*")
    ['recalibrate', 'reconstruct']
    """
    return RECOVERIES.names(pattern)


def recovery_info(name: str) -> RecoveryInfo:
    """Return a recovery method's record, by its name, or by ``package.module:Class`` for a third party's class.

    Raises
    ------
    ConfigError
        If the name isn't a string, isn't registered (the message has the nearest names that are), or is the path of a
        class that isn't a RecoveryMethod.
    """
    return RECOVERIES.info(name, "recovery_info")


_OWN = "nni_topo.recovery"
RECOVERIES.register(
    RecoveryInfo("reconstruct", f"{_OWN}.reconstruct:Reconstruct", "solves each layer after removed channels again"),
    RecoveryInfo("pair", f"{_OWN}.mixing:Pair", "predicts each removed channel from one kept one and a constant"),
    RecoveryInfo("recalibrate", f"{_OWN}.registry:Recalibrate", "measures statistics of batch norms and nothing else"),
)
