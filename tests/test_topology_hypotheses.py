"""The benchmark of a hypothesis about topology: its clouds, its figures, and its page against its records."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench_modules import BENCHMARKS, imported
from scipy import stats

from nni_topo.studies.records import read_records
from nni_topo.studies.tables import with_tables

RECORDS = BENCHMARKS / "records" / "topology" / "which_filters.jsonl"


@pytest.fixture(scope="module")
def bench():
    with imported(BENCHMARKS / "topology", "which_filters") as module:
        yield module


def test_the_page_holds_the_tables_of_the_records(bench):
    page = (BENCHMARKS / "results" / "topology.md").read_text(encoding="utf-8")
    assert with_tables(page, bench.SOURCE, bench.tables(read_records(RECORDS))) == page


def test_the_difference_is_paired_by_network(bench):
    records = read_records(RECORDS)
    ours = f"magnitude, contributions, {bench.chosen_scale(records, bench.MAGNITUDE):g}"
    found = {tuple(record["key"]): record["test"] for record in records}
    seeds = range(310, 325)
    gains = [100 * (found[seed, 0.25, ours] - found[seed, 0.25, "least squares"]) for seed in seeds]
    half = stats.t.ppf(0.975, 14) * np.std(gains, ddof=1) / np.sqrt(15)
    (line,) = (text for text in bench.outcome(records)[1].splitlines() if text.startswith("| 25 % | least squares"))
    assert f"| {np.mean(gains):+.1f} ± {half:.1f} |" in line


def test_contributions_are_what_a_channel_brings_its_reader(bench):
    torch.manual_seed(0)
    model = bench.four_convolutions(3, 1).eval()
    images = torch.randn(6, 1, 8, 8)
    found = list(bench.contributions(model, images))
    assert [len(gram) for gram in found] == list(bench.WIDTHS)
    # The linear layer reads each averaged channel once: its contributions are vectors, and theirs is the Gram matrix.
    features = model[:-1](images).detach().double()
    weight = model[-1].weight.detach().double()
    vectors = (features - features.mean(0)).T[:, :, None] * weight.T[:, None, :] / len(images) ** 0.5
    vectors = vectors.flatten(1)
    torch.testing.assert_close(found[-1], vectors @ vectors.T, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_a_channel_that_contributes_nothing_goes_first(bench, scale):
    vectors = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 2.0], [2.9, 0.1]], dtype=torch.float64)
    kept = bench.most_magnitude(vectors @ vectors.T, 3, scale)
    assert kept.tolist() == [0, 2, 3]
    assert set(bench.most_magnitude(vectors @ vectors.T, 2, scale).tolist()) in ({0, 2}, {2, 3})
