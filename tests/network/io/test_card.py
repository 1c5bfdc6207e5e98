"""Cards of pruned models: which file one may replace, and what it says of the model."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
from torch import nn

from nni_topo.network.io.card import may_write_card, model_card
from nni_topo.network.runtime.reports import ModelReport

TEXT = "# A pruned net\n\nIt is smaller.\n"
MARK = (
    "<!-- written by nni_topo.save_pretrained, which replaces this file until someone changes it: "
    f"{hashlib.sha256(TEXT.encode()).hexdigest()[:16]} -->\n"
)


@pytest.mark.parametrize(
    ("written", "may_be"),
    [
        (TEXT + MARK, True),
        ((TEXT + MARK).replace("\n", "\r\n"), True),
        (TEXT.replace("smaller", "larger") + MARK, False),
        (TEXT + MARK + "More.\n", False),
        (TEXT, False),
        ("", False),
    ],
    ids=["ours", "other line ends", "changed", "longer", "without a mark", "empty"],
)
def test_a_card_is_replaced_that_nobody_has_changed(written, may_be, tmp_path):
    place = tmp_path / "README.md"
    assert may_write_card(place)
    place.write_bytes(written.encode())
    assert may_write_card(place) == may_be


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "README.md").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert not may_write_card(tmp_path / "README.md")
    assert not may_write_card(tmp_path / "link")


class Report(ModelReport):
    """Says one sentence."""

    changed_since = ()
    parameters_left = None

    def to_markdown(self) -> str:
        return "Half of it is gone."


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["It needs Transformers alone, not nni_topo."]),
        ({"pruned_heads": {0: [1]}}, ["It needs Transformers 4, which reads from its config"]),
        ({"_name_or_path": ".", "_commit_hash": "abc"}, []),  # a folder
        ({"_name_or_path": "no/name/of/a/model", "_commit_hash": "abc"}, []),
        ({"_name_or_path": "nobody/nothing-of-this-name"}, []),  # nothing says that it came from there
        (
            {"_name_or_path": "nobody/net", "_commit_hash": "abc"},
            ["base_model: nobody/net", "made from [nobody/net](https://huggingface.co/nobody/net) by structured"],
        ),
    ],
)
def test_a_card_says_what_the_model_is_and_is_one_of_ours(config, words, tmp_path):
    pytest.importorskip("transformers")
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(**config)
    text = model_card(model, Report())
    for each in (
        *words,
        "# Linear, pruned",
        "Half of it is gone.",
        'model = Linear.from_pretrained("path of',
        "- pruned",
    ):
        assert each in text
    assert "from transformers import Linear" not in text
    assert ("base_model" in text) == ("huggingface.co" in text) == (config.get("_name_or_path") == "nobody/net")
    (tmp_path / "README.md").write_text(text)
    assert may_write_card(tmp_path / "README.md")
