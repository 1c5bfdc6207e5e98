from __future__ import annotations

import logging
import os
import subprocess
import sys

import nni
import pytest
import torch
from nni.common.concrete_trace_utils import operator_patcher
from nni.compression import TorchEvaluator
from nni.compression.pruning import AGPPruner, L1NormPruner, MovementPruner, SlimPruner, TaylorPruner
from nni.compression.pruning.basic_pruner import _NormPruner
from nni.compression.speedup import ModelSpeedup, mask_conflict

import nni_topo
from nni_topo.compat import wording
from nni_topo.errors import ConfigError
from nni_topo.testing import toy_evaluator, toy_images, toy_model

HALF = [{"op_names": ["hidden"], "sparse_ratio": 0.5}]

WHOLE = """
import copy, torch, nni_topo
from nni.compression.pruning import AGPPruner
from nni.compression.pruning.basic_pruner import _NormPruner
from nni.compression.speedup import ModelSpeedup
from nni_topo.testing import toy_evaluator, toy_images, toy_model

class Doubtful(type(toy_model())):
    def forward(self, images):
        found = super().forward(images)
        twice = self.training and images.requires_grad
        return found * 2 if twice else found

torch.manual_seed(0)
model = Doubtful().eval()
config = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
config = nni_topo.dependency_groups(model, toy_images(2), config)
pruner = AGPPruner(nni_topo.create_pruner("random", model, config, toy_evaluator(model)), 2, 2)
_, masks = pruner.compress(max_steps=8, max_epochs=None)
pruner.unwrap_model()
ModelSpeedup(copy.deepcopy(model), toy_images(2), masks).speedup_model()
print(nni_topo.to_dense(model, toy_images(2), masks).stem.out_channels)
"""


@pytest.mark.slow
def test_a_whole_pruning_and_both_speedups_say_nothing(tmp_path):
    (tmp_path / "whole.py").write_text(WHOLE)
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(tmp_path / "whole.py")]
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("4\n", "")


def test_the_details_are_there_on_demand(caplog):
    model = toy_model().eval()
    pruner = nni_topo.RandomPruner(model, HALF)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    logger = logging.getLogger("nni.compression")
    quiet = logger.level
    try:
        logger.setLevel(logging.INFO)
        with caplog.at_level(logging.INFO, logger="nni"):
            ModelSpeedup(model, toy_images(2), masks).speedup_model()
    finally:
        logger.setLevel(quiet)
    assert quiet == logging.WARNING
    assert sum("Propagate variables" in record.getMessage() for record in caplog.records) > 5


class Foreign(_NormPruner):
    """A pruner that nobody has tested."""


def test_pruners_that_nobody_has_tested_are_still_named(caplog):
    for create, said in ((nni_topo.RandomPruner, 0), (Foreign, 1)):
        model = toy_model()
        caplog.clear()
        AGPPruner(create(model, HALF, toy_evaluator(model)), 2, 2).unwrap_model()
        assert sum("Compatibility not tested" in record.getMessage() for record in caplog.records) == said


def untraced(model):
    return TorchEvaluator(lambda *_: None, torch.optim.SGD(model.parameters(), lr=0.1), lambda *_: None)


def schedule(model, **knobs):
    return AGPPruner(L1NormPruner(model, HALF, toy_evaluator(model)), interval_steps=2, total_times=3, **knobs)


def taylor(model, **knobs):
    return TaylorPruner(model, HALF, toy_evaluator(model), training_steps=2, **knobs)


SLIM = [{"op_names": ["norm"], "sparse_ratio": 0.5}]
CASES = {
    "an optimizer of one's own": (untraced, r"must be of nni\.trace, .* got optimizers SGD"),
    "no evaluator": (
        lambda model: L1NormPruner(model, HALF, 3),
        "evaluator must be an evaluator of NNI, got evaluator 3",
    ),
    "no pruner": (lambda model: AGPPruner(model, 2, 3), "given a pruner that prunes in steps"),
    "a schedule without": (lambda model: AGPPruner(L1NormPruner(model, HALF), 2, 3), r"evaluator None \(AGPPruner\)"),
    "too short": (lambda model: schedule(model).compress(5, None), "got max_steps 5, total_times 3, interval_steps 2"),
    "no length": (lambda model: schedule(model).compress(None, None), "to prune in training needs max_steps"),
    "a length": (lambda model: taylor(model).compress(5, None), "must be left out where training_steps"),
    "slim": (lambda model: SlimPruner(model, SLIM, toy_evaluator(model), 2).compress(5, None), "must be left out"),
    "movement": (
        lambda model: MovementPruner(model, HALF, toy_evaluator(model), 5, 2),
        "warmup_step 5, cooldown_begin",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_nni_asserts_without_a_word_names_rule_value_and_place(case):
    run, words = CASES[case]
    with pytest.raises(ConfigError, match=words):
        run(toy_model())


@pytest.mark.parametrize("words", [(), ("mine",)])
def test_assertions_of_the_users_code_stay_as_they_are(words):
    def train(*_):
        raise AssertionError(*words)

    model = toy_model()
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1)
    evaluator = TorchEvaluator(train, optimizer, lambda *_: None)
    with pytest.raises(AssertionError) as caught:
        TaylorPruner(model, HALF, evaluator, training_steps=2).compress()
    assert type(caught.value) is AssertionError
    assert caught.value.args == words


@pytest.mark.parametrize(
    ("module", "words"), [(operator_patcher, '"and/or" will'), (mask_conflict, "both dim0 and dim1 masks found")]
)
def test_other_warnings_are_logged(caplog, module, words):
    logger = logging.getLogger(module.__name__)
    with caplog.at_level(logging.WARNING, logger=logger.name):
        for text in (words, "something else"):
            logger.warning(text)
    assert [record.getMessage() for record in caplog.records if record.name == logger.name] == ["something else"]


def test_each_is_in_place_once():
    assert not wording.log_details_on_demand()
    assert not wording.trust_tested_pruners()
    assert not wording.word_assertions()
