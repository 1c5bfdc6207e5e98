"""Upper confidence limits of a mean, from independent observations.

Proportions of yes and no have the exact limit of Clopper and Pearson [1]_. Other numbers between 0 and 1, such as the
share of a text's words whose prediction changes, have Hoeffding's [2]_, which is the same if all of them are 0.
Unbounded numbers have Student's t, which is exact only for normal ones.

References
----------
.. [1] C. Clopper and E. Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
   Biometrika 26, 1934
.. [2] W. Hoeffding, "Probability inequalities for sums of bounded random variables", Theorem 1, J. Am. Stat. Assoc. 58,
   1963
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import betaincinv, stdtrit, xlogy

RISK = 0.05
"""Probability that a value lies above its limit: limits have 95 % confidence."""


def limit_of_share(share: float, count: int, risk: float = RISK) -> float:
    """Return the upper limit of a probability by Clopper and Pearson, from the share of ``count`` observations.

    If ``share * count`` isn't an integer, the limit lies between the limits of the two nearest integers.
    """
    successes = share * count
    if successes >= count:
        return 1.0
    return float(betaincinv(successes + 1.0, count - successes, 1.0 - risk))


def limit_of_bounded(mean: float, count: int, risk: float = RISK) -> float:
    """Return the upper limit of the mean of numbers in [0, 1] by Hoeffding, from the mean of ``count`` observations."""
    if mean >= 1.0:
        return 1.0

    def excess(limit: float) -> float:
        """Return by how much the divergence of the two means exceeds what the risk allows; it rises with the limit."""
        divergence = xlogy(mean, mean / limit) + xlogy(1.0 - mean, (1.0 - mean) / (1.0 - limit))
        return float(count * divergence + math.log(risk))

    if mean == 0.0:
        return -math.expm1(math.log(risk) / count)
    highest = math.nextafter(1.0, 0.0)
    if excess(highest) <= 0.0:
        return highest
    return float(brentq(excess, mean, highest, xtol=1e-15))


def limit_of_mean(mean: float, deviation: float, count: int, risk: float = RISK) -> float:
    """Return the upper limit of a mean by Student's t; ``deviation``: the standard deviation (with ``count`` - 1)."""
    if count < 2 or not math.isfinite(mean):
        return math.inf
    return mean + float(stdtrit(count - 1, 1.0 - risk)) * deviation / math.sqrt(count)


def observations_needed(tolerance: float, risk: float = RISK) -> int:
    """Return how many observations, all 0, have an upper limit of at most ``tolerance``: 299 for 0.01."""
    count = max(1, math.ceil(math.log(risk) / math.log1p(-tolerance)))
    # Rounding may be off by one where the quotient is a whole number.
    while count > 1 and limit_of_share(0.0, count - 1, risk) <= tolerance:
        count -= 1
    while limit_of_share(0.0, count, risk) > tolerance:
        count += 1
    return count
