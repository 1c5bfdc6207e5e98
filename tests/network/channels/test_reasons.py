"""Why channels stay: the sentences, and what a user can do about each kind."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from nni_topo.network.channels import reasons
from nni_topo.network.channels.reasons import Kind, Reason, advice

# The kinds that masks or a request bring about, not the model.
BY_MASKS = {
    "blocks_equal", "carries_constant", "coupled_with_itself", "head_size", "last_read", "norm_follows", "not_asked",
    "rounding", "shared",
}  # fmt: skip


@pytest.mark.parametrize("kind", get_args(Kind))
def test_there_is_advice_for_each_kind_that_a_model_brings_about(kind):
    found = advice((Reason(kind), Reason(kind, text="of another layer")))
    assert len(found) == (kind not in BY_MASKS)
    assert all("{" not in text for text in found)


def test_advice_belongs_to_kinds_and_comes_in_their_order():
    found = advice((Reason("no_batch"), Reason("shared"), Reason("not_run"), Reason("no_batch")))
    assert found == (
        "give the convolution's input a batch dimension",
        "delete the layer from the model if nothing uses it",
    )


class Summed(nn.Module):
    def forward(self, x):
        return (x.relu() + 1).sum(1)


SENTENCES = {
    "weight": (
        lambda: reasons.computed_weight(can_convert=False),
        ("computed_weight", "its weight is computed from other parameters"),
    ),
    "weight that can be plain": (
        lambda: reasons.computed_weight(can_convert=True),
        (
            "computed_weight",
            "its weight is computed from other parameters, by weight norm, another parametrization or a pruning mask: "
            "model = nni_topo.as_torch_layers(model) makes plain layers that compute the same",
        ),
    ),
    "untraced": (
        lambda: reasons.untraced_output(is_noise=False),
        ("untraced_output", "its output enters code that could not be traced"),
    ),
    "noise": (
        lambda: reasons.untraced_output(is_noise=True),
        (
            "untraced_output",
            "its output enters code that could not be traced: the forward draws random numbers of Python's or NumPy's",
        ),
    ),
    "untraced model": (lambda: reasons.untraced_model(ValueError("no graph")), ("untraced_model", "no graph")),
    "shared": (lambda: reasons.shared(["a", "b"], []), ("shared", "shared by a, b")),
    "shared without masks": (
        lambda: reasons.shared(["a", "b"], ["b"]),
        ("shared", "shared by a, b; of these without a mask: b"),
    ),
    "one unselected": (
        lambda: reasons.unselected(["a"]),
        ("unselected", "shared with a, which isn't among the layers to prune"),
    ),
    "two unselected": (
        lambda: reasons.unselected(iter(["a", "b"])),
        ("unselected", "shared with a, b, which aren't among the layers to prune"),
    ),
    "blocks": (
        lambda: reasons.blocks_equal(["chunk", "norm"]),
        ("blocks_equal", "blocks of channels keep equally many, as chunk, norm requires"),
    ),
    "rounding": (lambda: reasons.rounding(8), ("rounding", "round_to=8")),
    "not run": (lambda: reasons.not_run(), ("not_run", "the forward doesn't use the layer")),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences(name):
    make, expected = SENTENCES[name]
    reason = make()
    assert (reason.kind, str(reason), reason.place, reason.layer, reason.line) == (*expected, "", "", "")


def test_reasons_of_layers_name_them():
    reason = reasons.shared_weight("one.weight", "two.inner.weight")
    assert (reason.kind, reason.place, reason.layer) == ("shared_weight", "two.inner", "two.inner")
    assert str(reason) == "one.weight is the same parameter as two.inner.weight, where these channels stay"
    heads = reasons.head_size(["a", "b"])
    assert (heads.place, heads.layer) == ("a, b", "a, b")
    assert str(heads).endswith("in a way that can't be adapted (a, b)")


def test_reasons_of_operations_name_these():
    relu, add, total = (node for node in torch.fx.symbolic_trace(Summed()).graph.nodes if node.op.startswith("call"))
    assert str(reasons.fixed_sizes(total)) == "the sizes of an operation don't fit fewer channels (sum)"
    failed = reasons.fixed_sizes(total, ValueError("9"))
    assert str(failed) == "the sizes of an operation don't fit fewer channels: ValueError (sum)"
    made = reasons.nonzero_values(total, add)
    assert (made.place, str(made)) == (
        "add",
        "removed channels arrive as values that aren't zero (made by add, read by sum)",
    )
    assert str(reasons.nonzero_values(add, add)) == "removed channels arrive as values that aren't zero (add)"
    assert reasons.no_rule(relu).place == "relu"


def test_the_line_of_a_reason_is_told_and_makes_no_other_reason():
    assert Reason("not_run").line == ""
    assert Reason("not_run", line="net.py:3") == Reason("not_run", line="net.py:9")
    assert Reason("not_run", text="one") != Reason("not_run", text="other")


def test_why_outputs_differ():
    rest = "check=False returns the dense model all the same; its outputs differ and it has to be fine-tuned"
    assert reasons.unchecked() == rest
    anywhere = reasons.unequal([], None)
    assert anywhere.startswith("removed channels of the layers before it aren't zero there: ")
    assert anywhere.endswith(rest)
    assert reasons.unequal(["a", "b"], None).startswith("removed channels of a, b aren't zero there: ")
    at = reasons.unequal(["a"], "add")
    assert at.startswith("removed channels of a arrive at add as values that aren't zero: ")
    assert 'constants="keep"' in at
    statistics = reasons.unequal(["a"], "norm", "LayerNorm")
    assert statistics.startswith("LayerNorm takes its statistics over removed channels too: ")
