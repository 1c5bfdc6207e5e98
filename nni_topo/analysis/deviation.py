"""Net Deviation: how far a pruned network's error lies from what its pruning could have done.

References
----------
.. [1] S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
   Technology, 2019, equations 3.12 and 3.13.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from nni_topo.analysis.bounds.propagation import ErrorBound, error_bound
from nni_topo.errors import unknown_name

Form = Literal["first_order", "directional", "lipschitz"]
_FORMS = ("first_order", "directional", "lipschitz")


@dataclass(frozen=True)
class NetDeviation:
    """The Net Deviation of a pruned network.

    Attributes
    ----------
    dev : float
        ``||delta Y|| - bound``, equation (3.12).
    sign : float
        ``dev / ||dev||``, equation (3.13) as printed: for a number this is its sign, -1, 0 or 1, and nothing more.
    relative : float
        ``dev / bound``, at least -1: what (3.13) is described as, a *normalised* difference of error and bound. -1: no
        error; 0: all of the bound is used up; above 0: the bound, which holds to first order, is broken, infinitely
        where it is 0. 0 if there is neither error nor bound.
    error, bound : float
        Euclidean norms over the batch.
    """

    dev: float
    sign: float
    relative: float
    error: float
    bound: float


def net_deviation(
    original: nn.Module, pruned: nn.Module, inputs: Tensor, *, form: Form = "first_order", iterations: int = 100
) -> NetDeviation:
    """Compare the error of a pruned network's output with its bound; less is better.

    Parameters
    ----------
    original, pruned : torch.nn.Module
        As in :func:`~nni_topo.analysis.error_bound`.
    inputs : torch.Tensor
        A batch, shape ``(n, ...)``, of the data used for pruning; labels aren't needed.
    form : {"first_order", "directional", "lipschitz"}, default="first_order"
        The bound: (3.9) as printed, its tighter form (B.5), or the one that always holds.
    iterations : int, default=100
        Most steps of each power iteration.

    Returns
    -------
    NetDeviation

    Raises
    ------
    ConfigError, DataError, SpeedupError
        As :func:`~nni_topo.analysis.error_bound` does; ConfigError for an unknown form.

    Notes
    -----
    ``dev`` grows with the bound: a pruning whose bound is larger has the lower deviation at the same error. Read it
    beside ``error`` itself.

    References
    ----------
    .. [1] S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
       Technology, 2019, equations 3.12 and 3.13.
    """
    if form not in _FORMS:
        raise unknown_name("form", str(form), _FORMS)
    return deviation_of(error_bound(original, pruned, inputs, iterations=iterations), form)


def deviation_of(found: ErrorBound, form: Form = "first_order") -> NetDeviation:
    """Return the Net Deviation of an error whose bounds are known."""
    bound = float(getattr(found, form))
    dev = found.error - bound
    sign = 0.0 if dev == 0.0 else dev / abs(dev)
    relative = dev / bound if bound > 0 else (math.inf if dev > 0 else 0.0)
    return NetDeviation(dev, sign, relative, found.error, bound)
