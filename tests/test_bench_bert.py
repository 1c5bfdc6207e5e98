"""The steps of the BERT tutorial on a tiny one: heads and neurons go, and compensation brings some of it back."""

from __future__ import annotations

import importlib

import pytest

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("benchmarks.transformers.bench_bert")


def test_products_and_times_of_a_tiny_bert_are_shares_of_the_whole_ones(bench):
    model = bench.random_bert(vocab_size=31, hidden_size=32, num_hidden_layers=1, intermediate_size=48)
    found = bench.times(model, bench.random_tokens(2, 8, most=31)["input_ids"])
    macs = [each["macs"] for each in found.values()]
    assert len(macs) == 3
    assert 1 > macs[0] > macs[1] > macs[2] > 0
    assert all(each["time"] > 0 for each in found.values())


@pytest.mark.slow
def test_a_tiny_bert_loses_heads_and_neurons_and_weights_are_reconstructed(bench):
    model = bench.random_bert(vocab_size=31, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    tokens = bench.random_tokens(64, 8, most=31)
    found = bench.measure(model, [{key: part[at : at + 32] for key, part in tokens.items()} for at in (0, 32)])
    # Of each layer half of four matrices of 32 x 32, three of them with a bias, and three quarters of the MLP's.
    gone = 2 * (2 * 32 * 32 + 3 * 16 + 36 * (2 * 32 + 1))
    first, then = found["heads and neurons"], found["width"]
    assert found["parameters"] - first["weight reconstruction, parameters"] == gone
    assert first["weight reconstruction, lost"] < 0.5 * first["no recovery, lost"]
    assert first["weight reconstruction, lost"] < then["weight reconstruction, lost"] < then["no recovery, lost"]
    # What the 32 channels of the stream have: embeddings, norms, what reads and writes it in two layers, the pooler's
    # inputs.
    rows = 31 + 512 + 2 + 2 + 2 * (4 * 16 + 1 + 2 + 2 * 12 + 1 + 2) + 32
    assert first["weight reconstruction, parameters"] - then["weight reconstruction, parameters"] == 8 * rows
    for each in (first, then):
        assert {key for key in each if key.endswith(", s")} == {
            f"{s}, s" for s in ("groups", "choose", "compensate", "dense")
        }
