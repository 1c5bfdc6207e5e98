"""Samples that come from sources: whole sources are held out, and the report has figures on new and on known ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import nni_topo

SOURCES = 32


def drawn():
    """Rows around the centres of 32 sources, and the source of each."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.randint(0, SOURCES, (400,), generator=generator)
    centers = 2.0 * torch.randn(SOURCES, 12, generator=generator)
    return centers[sources] + torch.randn(400, 12, generator=generator), sources


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def shrunk(rows, sources, **knobs):
    data = nni_topo.Calibration(rows.split(64), groups=sources)
    return nni_topo.shrink(network(), data, {"flops": 0.3}, **{"distill": False, **knobs})


def split():
    """The rows by what `shrink` does: of sixteen sources one judges and one reports, and so do rows of the others."""
    rows, sources = drawn()
    order = list(dict.fromkeys(sources.tolist()))
    place = torch.tensor([order.index(source) % 16 for source in sources.tolist()])
    others = (place != 7) & (place != 15)
    ordered = torch.tensor([order.index(source) for source in sources[others].tolist()]).argsort(stable=True)
    known = others.nonzero().flatten()[ordered[15::16]]
    return rows, sources, place == 15, known


def test_the_report_has_figures_on_new_sources_and_on_new_samples_of_known_ones():
    rows, sources, is_new, known = split()
    report = shrunk(rows, sources).report
    net, small = network(), shrunk(rows, sources)
    with torch.no_grad():
        agreed = (net(rows).argmax(1) == small(rows).argmax(1)).double()
        scale = net(rows[is_new]).var(0, correction=0).sum()
        distances = (net(rows) - small(rows)).square().sum(1) / scale
    stage = report.stages[-1]
    assert (report.held_out, report.sources, report.known) == (int(is_new.sum()), 2, len(known))
    assert stage.agreement == pytest.approx(float(agreed[is_new].mean()))
    assert stage.known_agreement == pytest.approx(float(agreed[known].mean()))
    assert stage.distance == pytest.approx(float(distances[is_new].mean()), rel=1e-4)
    assert stage.known_distance == pytest.approx(float(distances[known].mean()), rel=1e-4)
    text = str(report)
    assert f"{report.held_out} held-out samples of 2 new sources" in text
    assert f"on {report.known} new samples" in text
    assert f"distance {stage.known_distance:.4g}" in text


def test_no_step_uses_the_samples_of_either_figure():
    rows, sources, is_new, known = split()
    other = rows.clone()
    other[is_new] += 1.0
    other[known] += 1.0
    one, two = (shrunk(inputs, sources, distill={"steps": 20}) for inputs in (rows, other))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name])


def test_samples_without_sources_have_one_figure():
    rows, _ = drawn()
    rows[300:340] = rows[:40]  # equal inputs are held out together, and are no source
    report = shrunk(rows, None).report
    assert (report.sources, report.known, report.grouped) == (0, 0, False)
    assert np.isnan(report.to_frame().known_distance).all()


def test_the_error_for_channels_that_cannot_be_scored_says_what_reads_them():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.weight = nn.Linear(12, 16), nn.Parameter(torch.randn(16, 4))

        def forward(self, x):
            return self.first(x).relu() @ self.weight

    with pytest.raises(nni_topo.errors.LayerError, match="got matmul with the parameter weight: "):
        nni_topo.shrink(Read().eval(), [drawn()[0]], {"flops": 0.5}, distill=False)
