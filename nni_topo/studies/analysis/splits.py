"""A figure of how sub-clustering split a layer's clusters."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from nni_topo.errors import ConfigError
from nni_topo.maths.clustering.subclustering import SplitTree
from nni_topo.rules import checked
from nni_topo.studies.pictures import finish, panels


@checked()
def draw_splits(trees: Mapping[str, SplitTree]) -> list[Axes]:
    """Draw trees of splits, such as :attr:`nni_topo.SubclusterPruner.trees`.

    Parameters
    ----------
    trees : mapping of str to SplitTree
        Trees by name, at least one.

    Returns
    -------
    list of matplotlib.axes.Axes
        The panels of one figure, one per tree. A cluster is drawn at the variance that was compared with the threshold
        (dashed line), with an area proportional to its number of nodes, and filled if it wasn't split.

    Raises
    ------
    ConfigError
        If there is no tree.
    """
    if not trees:
        raise ConfigError("a picture of splits needs at least one tree, got none (draw_splits)")
    titled = (
        (f"{name.removesuffix('.weight')}: {len(tree.initial)} to {len(tree.leaves)} clusters", tree)
        for name, tree in trees.items()
    )
    return panels(titled, _draw, size=(5.0, 3.2)).axes


def _draw(axis: Axes, tree: SplitTree) -> None:
    places = leaf_places(tree)
    for number, cluster in enumerate(tree.clusters):
        if cluster.parent is not None:
            ends = (cluster.parent, number)
            axis.plot([places[n] for n in ends], [tree.clusters[n].variance for n in ends], color="0.75", linewidth=0.6)
    leaves = set(tree.leaves)
    for split in (True, False):
        chosen = [n for n in range(len(tree.clusters)) if (n in leaves) != split]
        x, heights = [places[n] for n in chosen], [tree.clusters[n].variance for n in chosen]
        areas = [4.0 * len(tree.clusters[n].members) for n in chosen]
        face, edge = ("none", "C0") if split else ("C1", "C1")
        label = "split" if split else "kept as one node"
        axis.scatter(x, heights, areas, facecolors=face, edgecolors=edge, label=label, linewidths=0.6, zorder=2)
    axis.axhline(tree.threshold, color="black", linestyle="--", linewidth=0.8, label="threshold")
    positive = all(cluster.variance > 0 for cluster in tree.clusters)
    finish(axis, "clusters", "compared with the threshold", yscale="log" if positive else "symlog", xticks=[])


def leaf_places(tree: SplitTree) -> dict[int, float]:
    """Return a horizontal position per cluster: leaves side by side, a split cluster midway between its two parts."""
    places: dict[int, float] = {}
    drawn = 0
    waiting = list(reversed(tree.initial))
    while waiting:
        number = waiting.pop()
        children = tree.clusters[number].children
        if not children:
            places[number] = float(drawn)
            drawn += 1
        elif children[0] in places and children[1] in places:
            places[number] = (places[children[0]] + places[children[1]]) / 2.0
        else:
            waiting += [number, children[1], children[0]]
    return places
