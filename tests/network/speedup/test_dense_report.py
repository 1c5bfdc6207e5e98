"""What stays although it is masked is said, with the reason; the report says what went."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from speedup_nets import Chunked, Residual, chain, filter_mask, masks_of
from torch import nn

import nni_topo
from nni_topo import to_dense
from nni_topo.network.speedup.dense_report import DenseReport, LayerChannels
from nni_topo.speedup import dependency_groups

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def rows(dense):
    return {row.name: (row.before, row.asked, row.after) for row in dense.report.rows}


def warned(caplog, model, inputs, masks, **knobs):
    with caplog.at_level(logging.WARNING, "nni_topo"):
        dense = to_dense(model, inputs, masks, **knobs)
    return dense, [record.getMessage() for record in caplog.records]


def test_the_report_of_a_chain_counts_by_hand(caplog):
    model = chain()
    masks = {"0": filter_mask(model[0], [1, 4, 5]), "3": filter_mask(model[3], [0, 4])}
    dense, messages = warned(caplog, model, IMAGES, masks)
    assert rows(dense) == {"0": (8, 5, 5), "3": (6, 4, 4), "8": (4, 4, 4)}
    assert dense.report.kept == ()
    assert messages == []
    assert not hasattr(model, "report")


def test_a_kept_channel_is_in_one_warning_and_in_the_report(caplog):
    model = Residual()
    dense, messages = warned(caplog, model, IMAGES, {"stem": filter_mask(model.stem, [0, 1])})
    assert rows(dense)["stem"] == (8, 6, 8)
    (row,) = dense.report.kept
    assert (row.name, row.kept) == ("stem", 2)
    assert "point" in row.reason
    (message,) = messages
    assert f"stem 2 of 8 ({row.reason})" in message
    assert repr(dense.report).splitlines()[1].split()[:4] == ["stem", "8", "6", "8"]
    assert row.reason in repr(dense.report)


def test_chunks_and_rounding_say_so(caplog):
    model = Chunked()
    dense, messages = warned(caplog, model, IMAGES, {"first": filter_mask(model.first, [0])}, check=False)
    assert len(messages) == 1
    model, (row,) = chain(), dense.report.kept
    assert row == LayerChannels("first", 8, 7, 8, "some of its channels are coupled with one another")
    caplog.clear()
    dense, messages = warned(caplog, model, IMAGES, {"0": filter_mask(model[0], [1, 4, 5])}, round_to=4)
    assert messages == []
    assert dense.report.kept == (LayerChannels("0", 8, 5, 8, "round_to=4"),)


def test_the_report_survives_pickle_copies_and_saving(tmp_path):
    model = chain()
    masks = {"0": filter_mask(model[0], [1, 4, 5])}
    dense = to_dense(model, IMAGES, masks)
    report = pickle.loads(pickle.dumps(dense.report))
    assert isinstance(report, DenseReport)
    assert report == dense.report == copy.deepcopy(dense).report
    stream = io.BytesIO()
    torch.save(dense, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False).report == report
    with pytest.raises(AttributeError):
        report.rows = ()
    nni_topo.save(dense, tmp_path / "dense.pt")
    loaded = nni_topo.load(tmp_path / "dense.pt", chain)
    assert torch.equal(loaded.eval()(IMAGES), dense.eval()(IMAGES))
    again = to_dense(dense, IMAGES, {"0": filter_mask(dense[0], [0])})
    assert rows(again)["0"] == (5, 4, 4)


class Linear(nn.Module):
    """NNI takes it for PyTorch's, by its name."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(6, 4)), nn.Parameter(torch.rand(6))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias).tanh()


class BatchNorm1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

    def forward(self, x):
        return (x - x.mean(0)) * self.weight + self.bias


def test_masked_modules_of_unknown_classes_are_in_the_report():
    model, x = nn.Sequential(Linear(), BatchNorm1d(), nn.Linear(6, 2)).eval(), torch.rand(5, 4)
    config = [{"op_types": ["Linear", "BatchNorm1d"], "sparse_ratio": 0.5, "exclude_op_names": ["2"]}]
    masks = masks_of(L1NormPruner(model, config))
    dense = to_dense(model, x, masks)
    assert rows(dense) == {"0": (6, 3, 6), "1": (6, 3, 6), "2": (2, 2, 2)}
    assert [row.reason for row in dense.report.kept] == [
        f"its class {name} ({__name__}) isn't PyTorch's and computes something else"
        for name in ("Linear", "BatchNorm1d")
    ]
    groups = dependency_groups(model, x, config)
    assert groups == []
    assert groups.skipped == {row.name: row.reason for row in dense.report.kept}
