"""First homology of Vietoris-Rips filtrations from lunes of edges, for clouds of up to a few hundred points.

The lune of an edge holds the points that are nearer to both of its ends than the ends are to each other. When
the edge enters the filtration with all its simplices, then

- an empty lune makes it join two components or close a new loop: a bar is born,
- a lune of several components, in the complex before, fills the loops that run through one of the edge's ends,
  a point of one component, the other end and a point of another component: up to one bar less than components
  dies,
- a lune of one component changes nothing.

So only a handful of edges ever need algebra, where a matrix reduction goes through all triangles.

Source: M. Koyama, F. Memoli, V. Robins and K. Turner, Faster computation of degree-1 persistent homology using the
reduced Vietoris-Rips filtration, arXiv:2307.16333, 2023.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nni_topo.maths.topology import kernels
from nni_topo.maths.topology.checks import FloatArray, IntArray

# Codes take points^2 * bars bits, some 9 MB here: larger clouds are Ripser's.
LARGEST = 320


class SortedEdges(NamedTuple):
    """All edges of a cloud of n points, shortest first, and its points, most central first."""

    starts: NDArray[np.int32]
    ends: NDArray[np.int32]
    lengths: FloatArray
    central: IntArray


def sort_edges(distances: FloatArray) -> SortedEdges:
    """Sort the edges of a distance matrix (n, n), ties by index."""
    starts, ends = np.triu_indices(len(distances), 1)
    lengths = distances[starts, ends]
    # Stable, so that equal edges enter in one order on every machine. Any order of them is a filtration by simplices
    # that refines the one by length; it adds bars of length 0, which are dropped at the end, and changes no other.
    order = np.argsort(lengths, kind="stable")
    # A central point is near most others: a lune is seen to be connected soonest from there.
    central = np.argsort(distances.sum(axis=1), kind="stable")
    return SortedEdges(starts[order].astype(np.int32), ends[order].astype(np.int32), lengths[order], central)


def loop_bars(edges: SortedEdges, points: IntArray) -> FloatArray:
    """Return the bars (bars, 2) of H1 over Z/2 of a cloud's subset, whose k points (k,) ascend; deaths > births."""
    place = np.full(len(edges.central), -1)
    kept = np.zeros(len(place), dtype=np.bool_)
    kept[points] = True
    # Numbered from the most central point of the subset on: the kernel's scans meet those first.
    place[edges.central[kept[edges.central]]] = np.arange(len(points))
    # Room for at least two bars per point; a kernel that runs out of it says so and runs again with twice as much.
    words, count = len(points) // 32 + 1, -1
    while count < 0:
        bars = np.full((64 * words, 2), np.inf)
        count = kernels.compiled(write_loops)(edges.starts, edges.ends, edges.lengths, place, bars)
        words *= 2
    bars = bars[:count]
    # A bar that is born and filled at one length comes from a tie, and is none.
    return bars[bars[:, 1] > bars[:, 0]]


def write_loops(
    starts: NDArray[np.int32],
    ends: NDArray[np.int32],
    lengths: FloatArray,
    place: NDArray[np.int64],
    bars: FloatArray,
) -> int:
    """Write the bars of H1 of a subset into bars (64 words, 2), inf before; return how many, or -1 without room."""
    # Every edge carries a code: the sum, over Z/2, of the bars whose loops it stands for. The codes along a closed path
    # sum up to its homology class, modulo the relations from the bars' deaths. Edges come shortest first;
    # `place` (n,) has each point's number in the subset, below 0 for points outside.
    size = place.max() + 1
    words = len(bars) // 64
    # Unsigned throughout: of an unsigned and a signed 64-bit integer the common type is a float, which has no bits.
    one = np.uint64(1)
    linked = np.zeros((size, size), np.uint8)
    degree = np.zeros(size, np.int64)
    parent = np.arange(size)
    lune = np.zeros(size, np.uint8)
    reached = np.zeros(size, np.uint8)
    # The word of a bar lies last: the sums below run over neighbouring memory.
    codes = np.zeros((size, size, words), np.uint64)
    # relations[b] is the class that became zero when bar b died, with b its youngest bar: a row of the elimination
    # below.
    relations = np.zeros((len(bars), words), np.uint64)
    cycle = np.zeros(words, np.uint64)
    count = 0
    for edge in range(len(lengths)):
        u, v = place[starts[edge]], place[ends[edge]]
        if u < 0 or v < 0:
            continue
        rest = np.uint8(0)
        for w in range(size):
            # Linked to both ends by now: nearer to both than they are to each other, or as near and of a lower index.
            lune[w] = linked[u, w] & linked[v, w]
            rest |= lune[w]
        if rest == 0:
            # Nothing fills a loop through this edge at its own length: no triangle enters with it.
            a, b = u, v
            # Union-find without ranks or shortened paths: only the few edges with an empty lune come here.
            while parent[a] != a:
                a = parent[a]
            while parent[b] != b:
                b = parent[b]
            # Two components: no loop, and the edge keeps the code 0. So loops are counted from a spanning tree.
            if a != b:
                parent[a] = b
            else:
                if count == len(bars):
                    return -1
                # One component: a loop that depends on none before, so it gets a bit of its own.
                bars[count, 0] = lengths[edge]
                codes[u, v, count // 64] = codes[v, u, count // 64] = one << np.uint64(count % 64)
                count += 1
        else:
            # The component that is looked at first decides which code the edge gets, not which classes die: other
            # choices differ by loops that this same edge fills.
            x = 0
            while lune[x] == 0:
                x += 1
            lune[x] = 0
            for i in range(words):
                # The triangle u, x, v enters with the edge: the edge stands for what the way over x stands for.
                codes[u, v, i] = codes[v, u, i] = codes[u, x, i] ^ codes[x, v, i]
            reached[:] = 0
            while True:
                # Move what is linked to x from the lune to the points reached.
                rest = np.uint8(0)
                for w in range(size):
                    near = lune[w] & linked[x, w]
                    reached[w] |= near
                    lune[w] ^= near
                    rest |= lune[w]
                if rest == 0:
                    break
                x = 0
                while x < size and reached[x] == 0:
                    x += 1
                if x < size:
                    reached[x] = 0
                    continue
                # Another component: the loop through it and the first one is filled.
                x = 0
                while lune[x] == 0:
                    x += 1
                lune[x] = 0
                # Two triangles over the edge, u x v and u y v, bound the loop u x v y: their sum has no edge u v.
                for i in range(words):
                    cycle[i] = codes[u, v, i] ^ codes[u, x, i] ^ codes[x, v, i]
                # Elimination over Z/2, the youngest bar first: that is the one that dies. A loop that comes out as zero
                # was filled before.
                # Codes aren't cleared of a bar when it dies, which would take a pass over all of them: each loop is
                # reduced by the relations when it is met.
                for bar in range(count - 1, -1, -1):
                    if cycle[bar // 64] >> np.uint64(bar % 64) & one:
                        if bars[bar, 1] == np.inf:
                            bars[bar, 1] = lengths[edge]
                            relations[bar] = cycle
                            break
                        for i in range(words):
                            cycle[i] ^= relations[bar, i]
        linked[u, v] = linked[v, u] = 1
        degree[u] += 1
        degree[v] += 1
        if max(degree[u], degree[v]) == size - 1:
            # A point that is linked to all others makes a cone of the complex: every loop is filled, and none comes
            # any more. So a run ends at the cloud's radius, not at its diameter.
            break
    return count
