"""Why channels stay: the sentences, and what a user can do about each kind."""

from __future__ import annotations

import pytest

from nni_topo.network.channels import reasons
from nni_topo.network.channels.reasons import Reason, Sentence, advice

# The kinds that masks or a request bring about, not the model.
BY_MASKS = {
    "coupled_with_itself", "last_read", "norm_follows", "not_asked",
    "rounding", "shared",
}  # fmt: skip


KINDS = dict.fromkeys(each.kind for each in vars(reasons).values() if isinstance(each, Sentence))


@pytest.mark.parametrize("kind", KINDS)
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
