from __future__ import annotations

import json

import numpy as np
import pytest

from nni_topo.analysis import study_topology
from nni_topo.maths import topology
from nni_topo.testing import toy_model

CONFIG = [
    {"op_names": ["stem", "inner"], "sparse_ratio": 0.5, "dependency_group_id": "residual"},
    {"op_names": ["hidden"], "sparse_ratio": 0.25},
]


@pytest.mark.slow
def test_a_study_states_what_the_diagrams_say():
    model = toy_model()
    study = study_topology(model, CONFIG, solver={"generations": 5})
    group, hidden = study.layers
    assert (group.name, group.points, group.kept) == ("stem.weight+inner.weight", 8, 4)
    assert (hidden.points, hidden.kept, len(hidden.trace)) == (16, 12, 5)
    cloud = topology.with_origin(model.hidden.weight.detach().double().numpy())
    whole = topology.rips_diagram(cloud, dimension=0, keep_infinite=False)
    np.testing.assert_allclose(hidden.diagrams_before[0], whole)
    kept = np.append(study.masks["hidden"]["bias"].bool().numpy(), True)
    after = topology.rips_diagram(cloud[kept], dimension=0, keep_infinite=False)
    np.testing.assert_allclose(hidden.diagrams_after[0], after)
    assert hidden.bottleneck[0] == pytest.approx(topology.bottleneck_distance(whole, after))
    assert hidden.deaths.mean() == pytest.approx(1.0)
    for layer in study.layers:  # the stability theorem
        assert all(distance <= 2 * layer.hausdorff + 1e-9 for distance in layer.bottleneck.values())


def test_the_tolerance_is_a_threshold_that_gives_the_same_number():
    study = study_topology(toy_model(), CONFIG, solver="greedy")
    for above, counts in ((1e-9, [4, 12]), (-1e-9, [5, 13])):
        config = [
            {**CONFIG[0], "sparse_threshold": study.layers[0].tolerance + above},
            {**CONFIG[1], "sparse_threshold": study.layers[1].tolerance + above},
        ]
        for entry in config:
            del entry["sparse_ratio"]
        assert [layer.kept for layer in study_topology(toy_model(), config, solver="greedy").layers] == counts
    assert study_topology(toy_model(), [{"op_names": ["hidden"], "sparse_ratio": 0.0}]).layers[0].tolerance == 0.0


@pytest.mark.parametrize("solver", ["genetic", "greedy"])
@pytest.mark.quick_every(2)
def test_files(solver, tmp_path, drawn):
    study = study_topology(toy_model(), CONFIG, solver={"generations": 3} if solver == "genetic" else solver)
    files = study.save(tmp_path)
    names = ["topology.json", "deaths.png", "allocation.png", "diagrams.png", "barcodes.png"]
    assert [path.name for path in files][:5] == names
    assert (tmp_path / "search.png").exists() == (solver == "genetic")
    document = json.loads(files[0].read_text())
    assert [layer["kept"] for layer in document["layers"]] == [4, 12]
    assert [layer["share"] for layer in document["layers"]] == [0.5, 0.75]
    assert [layer["tolerance"] for layer in document["layers"]] == [layer.tolerance for layer in study.layers]
    assert sorted(drawn) == sorted(path.name for path in files[1:])
    check_pictures(drawn, study.layers)


def check_pictures(drawn, layers):
    """Every picture shows the record's numbers, layer by layer."""
    curves = drawn.lines("deaths.png")
    dots = drawn["deaths.png"].axes[0].get_lines()[1::2]
    allocation = drawn["allocation.png"].axes[0]
    before, after = allocation.containers
    assert list(curves) == ["stem +1", "hidden"] == [tick.get_text() for tick in allocation.get_yticklabels()]
    for index, (layer, (_, curve)) in enumerate(zip(layers, curves.items(), strict=True)):
        shares = np.arange(1, layer.points + 1) / layer.points
        np.testing.assert_allclose(curve, np.stack([shares, layer.deaths], axis=1))
        np.testing.assert_allclose(np.ravel(dots[index].get_data()), curve[layer.kept - 1])
        assert [bars[index].get_width() for bars in (before, after)] == [layer.points, layer.kept]
        assert f"tolerance {layer.tolerance:.2f}" in allocation.texts[index].get_text()
        points = drawn.lines("diagrams.png", index)
        for side, diagrams in (("before", layer.diagrams_before), ("after", layer.diagrams_after)):
            for degree, bars in diagrams.items():
                np.testing.assert_allclose(np.reshape(points[f"H{degree} {side}"], (-1, 2)), bars)
        if layer.trace:
            search = drawn.lines("search.png", index)
            for name in ("best", "mean"):
                assert [y for _, y in search[name]] == [getattr(generation, name) for generation in layer.trace]
