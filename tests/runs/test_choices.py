from __future__ import annotations

import pytest

from nni_topo.errors import ConfigError
from nni_topo.runs.choices import (
    CompensationChoice,
    DataChoice,
    DistillationChoice,
    ModelChoice,
    PruneConfig,
    PrunerChoice,
    Target,
)

ALL = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneConfig("l1", ALL, calibration=-1), "calibration must be .*, got -1"),
        (lambda: PruneConfig("l1", ALL, round_to=0), "round_to must be .*, got 0"),
        (lambda: PruneConfig("l1", 0.5), "config_list must be .*, got 0.5"),
        (lambda: PrunerChoice("l1", calibration=-1), "calibration must be .*, got -1"),
        (lambda: CompensationChoice(0), "images must be .*, got 0"),
        (lambda: CompensationChoice(refine=-1), "refine must be .*, got -1"),
        (lambda: CompensationChoice(method="solve"), "got 'solve'"),
        (lambda: DistillationChoice(1), "images must be .*, got 1"),
        (lambda: DistillationChoice(seconds=0), "seconds must be .*, got 0"),
        (lambda: DataChoice("digits", data_dir=1), "data_dir must be .*, got 1"),
        (lambda: ModelChoice("small_cnn", checkpoint=1), "checkpoint must be .*, got 1"),
        (lambda: Target("ratio", 1.0), r"in \[0, 1\), got 1.0"),
        (lambda: Target("flops", 0.0), r"in \(0, 1\], got 0.0"),
        (lambda: Target("size", 0.5), "got 'size'"),
    ],
)
def test_what_is_out_of_range_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_edges_of_the_ranges_are_taken():
    assert PruneConfig("l1", ALL, calibration=0, round_to=1).round_to == 1
    assert (CompensationChoice(1, refine=0).images, DistillationChoice(2).images) == (1, 2)
    assert [Target("ratio", 0.0).label, Target("flops", 1.0).label] == ["ratio 0", "100 % of the MACs left"]
    assert [ModelChoice("net").label, ModelChoice("net", 0.5).label] == ["net", "net x0.5"]
