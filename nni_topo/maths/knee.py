"""The knee of a curve: the point from which a further step costs more than it saves [1]_.

References
----------
.. [1] V. Satopaa, J. Albrecht, D. Irwin and B. Raghavan, "Finding a 'kneedle' in a haystack: detecting knee points in
   system behavior", ICDCS Workshops 2011
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nni_topo.maths.ties import first_largest


def knee(costs: ArrayLike, losses: ArrayLike) -> int | None:
    """Return the index of the knee of losses (n,) that rise as costs (n,) fall; None if the curve has none.

    Both are scaled to [0, 1]. The knee is the point farthest below the straight line between the points of the largest
    and the least cost; of equally far points, the first one.
    """
    x, y = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(x) < 3 or not np.isfinite(y).all() or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return None
    x, y = (x - x.min()) / np.ptp(x), (y - y.min()) / np.ptp(y)
    start, end = int(x.argmin()), int(x.argmax())
    below = y[start] + (y[end] - y[start]) * x - y
    index = first_largest(below, 1.0)
    if below[index] <= 1e-9:
        return None
    return index
