from __future__ import annotations

import copy
import math

import pytest
import torch

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.recovery.lesson import Judgement
from nni_topo.runs import prepared
from nni_topo.runs.pipeline import Pipeline
from nni_topo.testing import toy_images, toy_model

AUTO = {"flops": 0.4, "allocation": "auto"}
IMAGES = list(toy_images(96, seed=1).split(32))


def sure_model():
    """One whose answers differ by more than rounding."""
    model = toy_model().eval()
    with torch.no_grad():
        model.head.weight.mul_(30.0)
    return model


def shrunk(budget, images=IMAGES, model=None, **knobs):
    return nni_topo.shrink(model or sure_model(), images, budget, **{"distill": False, **knobs})


def divergence(original, net, images):
    """Mean Kullback-Leibler divergence at temperature 2, times its square, and agreement, straight from torch."""
    with torch.no_grad():
        mine = net(images)
        theirs = (original(images) / 2.0).log_softmax(1)
        loss = 4.0 * (theirs.exp() * (theirs - (mine / 2.0).log_softmax(1))).sum(1).mean()
        return float(loss), float((mine.argmax(1) == original(images).argmax(1)).float().mean())


@pytest.mark.slow
def test_the_widths_that_the_images_held_out_choose_stay():
    model = sure_model()
    before = copy.deepcopy(model.state_dict())
    small = shrunk(AUTO, model=model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    tried = {each.allocation: each for each in small.report.tried}
    assert list(tried) == ["uniform", "topological", "error"]
    assert [stage.network for stage in small.report.stages] == ["unpruned", "pruned", "reconstructed"]
    judging = torch.cat(IMAGES)[7::16]  # the other half of those held out gives the report
    for name, each in tried.items():
        alone = shrunk({"flops": 0.4, "allocation": name}, model=model)
        loss, agreement = divergence(model, alone, judging)
        assert (each.loss, each.agreement) == (pytest.approx(loss, rel=1e-3), pytest.approx(agreement))
        if each.is_chosen:
            torch.testing.assert_close(alone.state_dict(), small.state_dict())
    (chosen,) = (each for each in tried.values() if each.is_chosen)
    assert chosen.loss == min(each.loss for each in tried.values())
    assert len({round(each.loss, 6) for each in tried.values()}) > 1
    assert repr(small.report).count("(chosen)") == 1


def test_no_step_sees_the_images_that_judge(monkeypatch):
    held_out = torch.cat(IMAGES)[7::8]
    seen = []

    def reconstruct(made, method, images, **knobs):
        seen.append(torch.cat(list(images)))
        return own(made, method, images, **knobs)

    own = Pipeline.reconstruct
    monkeypatch.setattr(Pipeline, "reconstruct", reconstruct)
    shrunk(AUTO)
    assert len(seen) == 3
    for images in seen:
        assert len(images) == 84
        assert not (images[:, None] == held_out[None]).flatten(2).all(2).any()


@pytest.mark.parametrize("knobs", [{"compensate": None}, {"pruner": "topological"}])
@pytest.mark.quick_every(2)
def test_without_compensation_and_with_other_pruners(knobs):
    small = shrunk(AUTO, **knobs)
    names = [each.allocation for each in small.report.tried]
    assert names == ["uniform", "topological", "error"][: 3 if "compensate" in knobs else 2]
    assert small.report.stages[-1].macs == pytest.approx(0.4 * small.report.stages[0].macs, rel=0.25)


def test_too_few_images_are_refused():
    with pytest.raises(DataError, match="allocation='auto' needs at least 8 samples, of which one judges, got 5"):
        shrunk(AUTO, [toy_images(5)])


def test_of_equal_losses_the_first_is_chosen_and_none_that_is_not_finite(monkeypatch):
    found = [Judgement(loss, 1.0, 0.0) for loss in (math.nan, 0.5, 0.5)]
    monkeypatch.setattr(prepared, "judged", lambda *given: found)
    assert [each.is_chosen for each in shrunk(AUTO, compensate=None).report.tried] == [False, True, False]


@pytest.mark.parametrize("pruner", ["l1", "energy"])
def test_what_has_nothing_to_choose_from_is_refused_before_anything_runs(pruner):
    message = rf"allocation='auto', got '{pruner}' \(budget\)"
    with pytest.raises(ConfigError, match=message):
        shrunk(AUTO, pruner=pruner, evaluate=lambda net: pytest.fail("something ran"))


@pytest.mark.parametrize(
    ("kind", "known"),
    [(nni_topo.ReconstructionPruner, "'error'"), (nni_topo.TopologicalPruner, "'uniform' or 'topological'")],
)
def test_a_pruner_alone_says_what_to_use_instead(kind, known):
    model = toy_model()
    with pytest.raises(ConfigError, match=rf"allocation must be .*{known}, got 'auto': nni_topo.shrink.*\(budget\)"):
        kind(model, [{"op_names": ["stem"]}], calibration=IMAGES, budget=AUTO)
    assert not any("_nni_wrapper" in name for name, _ in model.named_modules())
