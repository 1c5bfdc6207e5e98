"""Reports of models that were changed after the report was written."""

from __future__ import annotations

import torch
from torch import nn

import nni_topo
from nni_topo.network.runtime.reports import report_of
from nni_topo.testing import toy_images, toy_model


def shrunk():
    return nni_topo.shrink(toy_model().eval(), [toy_images(64)], {"flops": 0.5}, distill=False)


def half_of_hidden(model):
    mask = torch.ones_like(model.hidden.weight)
    mask[: len(mask) // 2] = 0.0
    return {"hidden": {"weight": mask}}


def test_a_changed_copy_has_the_report_with_a_note_of_every_change():
    small, images = shrunk(), [toy_images(64)]
    before = repr(small.report)
    assert "changed since" not in before
    once = nni_topo.recalibrate_batch_norm(small, images)
    assert once.report.changed_since == ("batch norms recalibrated (nni_topo.recalibrate_batch_norm)",)
    twice = nni_topo.compensate(once, half_of_hidden(once), images)
    assert twice.report.changed_since == (*once.report.changed_since, "weights reconstructed (nni_topo.compensate)")
    told = "changed since, and not in these figures: batch norms recalibrated (nni_topo.recalibrate_batch_norm), "
    assert f"{told}weights reconstructed (nni_topo.compensate)" in repr(twice.report)
    masked = nni_topo.masked_model(small, images[0], half_of_hidden(small))
    assert masked.report.changed_since == ("masked (nni_topo.masked_model)",)
    # The model that was handed over and its report stay.
    assert repr(small.report) == before
    # A network of other widths has a report of its own.
    assert nni_topo.to_dense(twice, images[0], half_of_hidden(twice)).report.changed_since == ()
    assert nni_topo.shrink(twice, images, {"flops": 0.7}, distill=False).report.changed_since == ()


def test_distilled_weights_are_noted_where_they_are_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    images = [torch.randn(256, 16)]
    small = nni_topo.shrink(model, images, {"flops": 0.25}, compensate=None, distill=False)
    kept = nni_topo.distillation(small, model, images, steps=40)
    assert kept.is_kept
    assert kept.model.report.changed_since == ("distilled (nni_topo.distill)",)
    discarded = nni_topo.distillation(small, model, images, steps=3, lr=1e3)
    assert not discarded.is_kept
    assert discarded.model.report.changed_since == ()
    own = nni_topo.shrink(model, images, {"flops": 0.25}, compensate=None, distill={"steps": 40})
    assert own.report.distillation.is_kept
    assert own.report.changed_since == own.report.layers.changed_since == ()


class Reporting(nn.Sequential):
    """A model that has a report of its own."""

    def report(self):
        """Return a text."""
        return "the model's own"


def test_a_model_with_a_report_of_its_own_keeps_it(caplog):
    torch.manual_seed(0)
    model, images = Reporting(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)), [torch.randn(64, 8)]
    small = nni_topo.shrink(model, images, {"flops": 0.5}, distill=False)
    later = nni_topo.recalibrate_batch_norm(small, images)
    assert later.report() == "the model's own"
    assert report_of(later) is None
    assert "the model has an attribute of its own called report" in caplog.text


def test_a_file_read_into_a_shrunk_model_brings_no_report_of_that_model(tmp_path):
    small = shrunk()
    nni_topo.save(toy_model(), tmp_path / "unpruned.pt")
    nni_topo.save(nni_topo.shrink(small, [toy_images(64)], {"flops": 0.6}, distill=False), tmp_path / "smaller.pt")
    read = nni_topo.load(tmp_path / "smaller.pt", small)
    assert not hasattr(read, "report")
    assert report_of(read) is None
    assert report_of(small) is not None
