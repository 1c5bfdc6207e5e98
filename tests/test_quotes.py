"""Every number of the first pages is what its records make, or is known to be no measurement."""

from __future__ import annotations

import re
import warnings

import pytest

from benchmarks import quotes
from benchmarks.quoted import QUOTES, WITHOUT_RECORD

TEXTS = {path.name: path.read_text(encoding="utf-8") for path in quotes.PAGES}


def test_every_number_is_what_its_records_make_or_no_measurement():
    assert quotes.faults(TEXTS) == []


def test_numbers_without_a_record_are_few():
    warnings.warn(f"measured, without a record: {', '.join(WITHOUT_RECORD)}", stacklevel=1)
    assert len(WITHOUT_RECORD) <= 5, "this list must become shorter"


def altered(printed):
    """Other numbers of the same form: the last digit or the sign changed, or the next word."""
    if printed[-1].isdigit():
        yield printed[:-1] + str((int(printed[-1]) + 1) % 10)
        yield printed[:-1] + str((int(printed[-1]) - 1) % 10)
        yield ("+" if printed[0] == "-" else "-") + printed.lstrip("+-")
        return
    words = [*quotes.CARDINALS] if printed.lower() in quotes.CARDINALS else [*quotes.PARTS]
    last = re.split("[ -]", printed)[-1].lower().rstrip("s")
    yield printed[: len(printed) - len(re.split("[ -]", printed)[-1])] + words[words.index(last) - 1]


@pytest.mark.parametrize("page", TEXTS)
def test_every_measured_number_that_is_falsified_is_noticed(page):
    places = [(begin, end) for name, begin, end in quotes.measured(TEXTS) if name == page]
    assert places
    text = TEXTS[page]
    for begin, end in places:
        first, last = text.rfind("\n\n", 0, begin) + 1, text.find("\n\n", end)  # the paragraph is enough, and fast
        for number in altered(text[begin:end]):
            paragraph = text[first:begin] + number + text[end:last]
            line = text.count("\n", first, begin) + 1
            noticed = [
                problem for problem in quotes.faults({page: paragraph}) if problem.startswith(f"{page}:{line}: ")
            ]
            assert noticed, f"{text[begin:end]} as {number}: {paragraph}"


@pytest.mark.parametrize(
    "sentence", ["It took four minutes.", "It gains +1.3 ± 0.2 points.", "a third as fast", "`f(7)`"]
)
def test_a_new_number_needs_an_entry_that_the_message_asks_for(sentence):
    text = TEXTS["README.md"] + f"\n{sentence}\n"
    (problem, *_) = quotes.faults({**TEXTS, "README.md": text})
    line = len(text.splitlines())
    assert re.fullmatch(rf"README.md:{line}: \S+ needs an entry in quoted.py: .*", problem)


def test_an_entry_without_its_sentence_is_noticed():
    text = TEXTS["choosing.md"]
    assert "L2, the best baseline, by" in text
    problems = quotes.faults({**TEXTS, "choosing.md": text.replace("the best baseline, by", "by")})
    assert any("no page has the sentence of an entry: L2, the best baseline" in problem for problem in problems)


@pytest.mark.parametrize(
    ("printed", "value", "other"),
    [
        ("0.946", 0.9464, 0.9466),
        ("+1.2", 1.24, -1.2),
        ("-0.9", -0.93, 0.93),
        ("1,024", 1024.3, 1025.0),
        ("thirteen", 13.2, 13.6),
        ("half", 0.499, 0.45),
        ("four fifths", 0.8, 0.85),
        ("an eighth"[3:], 0.125, 0.14),
    ],
)
def test_a_number_is_compared_to_its_printed_precision(printed, value, other):
    assert quotes.is_made(printed, value)
    assert not quotes.is_made(printed, other)


def test_statistics_of_rows_that_are_worked_out_by_hand():
    by_text = {quote.text: quote.values for quote in QUOTES}
    values = by_text["Of {} small networks {} came back unpruned at {} %, {} at {} % and {} at {} %"]
    assert values == [25, 20, 1, 15, 2, 2, 5]
    (taylor, networks) = by_text["Torch-Pruning's Taylor {} ({} networks)"]
    assert networks == 2
    assert taylor == pytest.approx(100 * ((0.7937 - 0.5123) + (0.81 - 0.4595)) / 2)
