"""The spanning tree of a chain of linear layers as one graph, and its share of the largest weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import minimum_spanning_tree


def network_tree(weights: Sequence[NDArray[Any]]) -> list[NDArray[np.bool_]]:
    """Mark the weights, ``(n_1, n_0), (n_2, n_1), ...``, of the maximum spanning tree of the whole network.

    Its nodes are the inputs, the neurons of every layer and the outputs, its edges the |w| of all layers. Of equal |w|
    the first in the network's order is taken.
    """
    lengths = np.concatenate([np.abs(weight).ravel() for weight in weights])
    ranks = np.empty(len(lengths))
    ranks[np.argsort(-lengths, kind="stable")] = np.arange(1, len(lengths) + 1)
    sources, targets, first = [], [], 0
    for weight in weights:
        rows, columns = np.divmod(np.arange(weight.size), weight.shape[1])
        sources.append(first + columns)
        first += weight.shape[1]
        targets.append(first + rows)
    nodes = first + len(weights[-1])
    graph = csr_matrix((ranks, (np.concatenate(sources), np.concatenate(targets))), shape=(nodes, nodes))
    kept = np.isin(ranks, minimum_spanning_tree(graph).data)
    ends = np.cumsum([weight.size for weight in weights])[:-1]
    return [part.reshape(weight.shape) for part, weight in zip(np.split(kept, ends), weights, strict=True)]


def network_tree_overlap(weights: Sequence[NDArray[Any]]) -> float:
    """Return the share of the tree among the largest weights of all layers, as many as it has."""
    tree = np.concatenate([mask.ravel() for mask in network_tree(weights)])
    lengths = np.concatenate([np.abs(weight).ravel() for weight in weights])
    largest = np.argsort(-lengths, kind="stable")[: int(tree.sum())]
    return float(tree[largest].mean())


def network_overlap_bound(widths: Sequence[int]) -> float:
    """Bound from below the expected share of a network's tree among its largest weights, from its layers' widths.

    All N weights are independent and identically distributed. The i-th largest one belongs to the tree for certain if
    none of the larger ones touches its ends. A weight between two layers has c other weights at its ends, so that it is
    the i-th largest and untouched with probability ``1/N * product over j < i of (N - 1 - c - j) / (N - 1 - j)``. The
    bound is the sum over all weights and the first ``nodes - 1`` places, divided by these.
    """
    sizes = list(widths)
    counts = [entering * leaving for entering, leaving in pairwise(sizes)]
    total, alpha = sum(counts), sum(sizes) - 1
    padded = [0, *sizes, 0]
    places = np.arange(alpha, dtype=np.float64)
    certain = 0.0
    for layer, count in enumerate(counts):
        before, entering, leaving, after = padded[layer : layer + 4]
        # the input end has weights to both neighbouring layers, and so has the output end; each counts the weight once
        others = (before + leaving) + (entering + after) - 2
        factors = np.maximum(0.0, total - 1 - others - places[:-1]) / (total - 1 - places[:-1])
        untouched = np.cumprod(np.concatenate([[1.0], factors]))
        certain += count / total * float(untouched.sum())
    return certain / alpha
