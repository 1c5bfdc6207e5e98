from __future__ import annotations

import numpy as np
import pytest

from nni_topo.analysis import draw_splits
from nni_topo.clustering import Cluster, Growth, SplitTree, grow
from nni_topo.errors import ConfigError

TREE = SplitTree(
    (
        Cluster((0,), 0.5),
        Cluster((1, 2, 3), 4.0, children=(2, 3)),
        Cluster((1,), 4.0, parent=1),
        Cluster((2, 3), 2.0, parent=1, children=(4, 5)),
        Cluster((2,), 2.0, parent=3),
        Cluster((3,), 1.5, parent=3),
    ),
    1.8,
)


def test_a_panel_per_tree_is_drawn(tmp_path, drawn):
    generator = np.random.default_rng(0)
    points = generator.normal(size=(30, 8)) * generator.uniform(0.1, 3.0, size=(30, 1))
    grown = grow(points, np.cov(points), 3, Growth())
    axes = draw_splits({"fc1.weight": grown, "by hand": TREE})
    figure = axes[0].figure
    figure.savefig(tmp_path / "splits.png")
    assert drawn["splits.png"] is figure
    titles = [axis.get_title() for axis in axes]
    assert titles == [f"fc1: 3 to {len(grown.leaves)} clusters", "by hand: 2 to 4 clusters"]
    split, kept = axes[1].collections
    assert split.get_offsets().tolist() == [[1.75, 4.0], [2.5, 2.0]]
    assert kept.get_offsets().tolist() == [[0.0, 0.5], [1.0, 4.0], [2.0, 2.0], [3.0, 1.5]]
    assert (split.get_sizes().tolist(), kept.get_sizes().tolist()) == ([12.0, 8.0], [4.0, 4.0, 4.0, 4.0])
    *edges, threshold = (np.stack(line.get_data(), axis=1).tolist() for line in axes[1].get_lines())
    assert edges == [
        [[1.75, 4.0], [1.0, 4.0]], [[1.75, 4.0], [2.5, 2.0]], [[2.5, 2.0], [2.0, 2.0]], [[2.5, 2.0], [3.0, 1.5]]
    ]  # fmt: skip
    assert {height for _, height in threshold} == {1.8}


def test_no_trees_are_refused():
    with pytest.raises(ConfigError, match="at least one tree"):
        draw_splits({})
