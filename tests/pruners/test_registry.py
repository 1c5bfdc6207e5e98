from __future__ import annotations

import logging
import logging.handlers

import nni.compression.pruning
import pytest
from nni.compression.pruning import LinearPruner

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.pruners.registry import PRUNERS, PrunerInfo, check_pruner_knobs
from nni_topo.testing import toy_evaluator, toy_model

HALF = [{"op_names": ["hidden"], "sparse_ratio": 0.5}]


def test_own_pruners_and_nnis_stand_in_one_table():
    assert {"topological", "random", "l1", "l2", "fpgm", "level", "taylor", "slim"} <= set(nni_topo.list_pruners())
    assert nni_topo.list_pruners("topo*") == ["topological", "topological_magnitude"]
    assert nni_topo.pruner_info("l1").origin == "nni"
    assert nni_topo.pruner_info("topological").origin == "nni_topo"


def test_a_class_method_is_a_row_of_its_own():
    info = nni_topo.pruner_info("perera2022")
    assert {"combine", "search", "seed"} <= set(info.knobs())
    assert not {"cls", "model", "cloud", "criterion"} & set(info.knobs())
    pruner = nni_topo.create_pruner("perera2022", toy_model(), HALF, search={"generations": 2})
    assert type(pruner) is nni_topo.TopologicalPruner
    assert not hasattr(nni.compression.pruning, "perera2022")


def test_the_classes_are_where_users_of_nni_look():
    assert nni.compression.pruning.TopologicalPruner is nni_topo.TopologicalPruner
    from nni.compression.pruning import RandomPruner, ReconstructionPruner

    assert RandomPruner is nni_topo.RandomPruner
    assert ReconstructionPruner is nni_topo.ReconstructionPruner
    from nni.compression.pruning.tools import ConfigAllocator, MetricCalculator, WeightCollector

    assert WeightCollector is nni_topo.hooks.WeightCollector
    assert (ConfigAllocator, MetricCalculator) == (nni_topo.hooks.ConfigAllocator, nni_topo.hooks.MetricCalculator)


def test_schedulers_warn_of_strange_pruners_only():
    class Stranger(nni_topo.RandomPruner):
        pass

    logger = logging.getLogger("nni.compression.pruning.scheduled_pruner")

    def warns(kind):
        model, seen = toy_model(), logging.handlers.BufferingHandler(100)
        logger.addHandler(seen)
        try:
            LinearPruner(kind(model, HALF, toy_evaluator(model)), interval_steps=1, total_times=2)
        finally:
            logger.removeHandler(seen)
        return any("Compatibility not tested" in record.getMessage() for record in seen.buffer)

    assert warns(Stranger)
    assert not warns(nni_topo.RandomPruner)


@pytest.mark.parametrize(
    ("name", "knobs", "words"),
    [
        ("topologicl", {}, "pruner must be a known name, got 'topologicl'; did you mean topological"),
        ("topological", {"criterium": "cover"}, "did you mean criterion"),
        ("reconstruction", {}, "pruner 'reconstruction' needs calibration or evaluator, got none"),
        ("taylor", {}, "pruner 'taylor' needs evaluator, training_steps"),
    ],
)
def test_bad_names_are_refused_before_the_model_is_wrapped(name, knobs, words):
    model = toy_model()
    with pytest.raises(ConfigError, match=words):
        nni_topo.create_pruner(name, model, HALF, **knobs)
    assert not hasattr(model.hidden, "_nni_wrapper")


def test_nnis_own_pruners_get_the_same_checks_of_the_request():
    with pytest.raises(ConfigError, match="at least one module"):
        nni_topo.create_pruner("l1", toy_model(), [{"op_types": ["LSTM"], "sparse_ratio": 0.5}])


def test_a_third_party_joins_the_table(monkeypatch):
    info = PrunerInfo("mine", "nni_topo.pruners.random:RandomPruner", "what I like")
    monkeypatch.setattr(PRUNERS, "table", dict(PRUNERS.table))
    nni_topo.register_pruner(info)
    assert "mine" in nni_topo.list_pruners()
    check_pruner_knobs("mine", ["seed"], "here")
    with pytest.raises(ConfigError, match="must be free, got 'mine'"):
        nni_topo.register_pruner(PrunerInfo("mine", "other:Pruner", ""))


THIRD = """
import nni_topo


class Third(nni_topo.RandomPruner):
    pass


number = 3
"""


def test_a_third_party_is_known_by_its_path_and_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "third.py").write_text(THIRD)
    found = tmp_path / "third-1.0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: third\nVersion: 1.0\n")
    (found / "entry_points.txt").write_text("[nni_topo.pruners]\nthird_random = third:Third\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(PRUNERS, "table", dict(PRUNERS.table))
    PRUNERS.register_entry_points()
    config = [{"op_names": ["stem"], "sparse_ratio": 0.5}]
    for name in ("third_random", "third:Third"):
        _, masks = nni_topo.create_pruner(name, toy_model(), config, seed=1).compress()
        assert float(masks["stem"]["bias"].mean()) == 0.5
        assert type(nni_topo.create_pruner(name, toy_model(), config)).__name__ == "Third"
    assert "third_random" in nni_topo.list_pruners("third*")
    for name, words in (("third:Fourth", "be imported"), ("none_such:A", "be imported"), ("third:number", "class of")):
        with pytest.raises(ConfigError, match=words):
            nni_topo.create_pruner(name, toy_model(), config)
