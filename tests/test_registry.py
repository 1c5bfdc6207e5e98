"""Tables of classes by name, with classes that are no pruner and no recovery method."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from fractions import Fraction
from numbers import Number
from typing import ClassVar

import pytest

from nni_topo.errors import ConfigError
from nni_topo.registry import ClassInfo, Registry


@dataclass(frozen=True)
class NumberInfo(ClassInfo[Number]):
    kind: ClassVar[str] = "number"
    base: ClassVar[type] = Number


@pytest.fixture
def numbers() -> Registry[NumberInfo]:
    found = Registry(NumberInfo, "tests_of_nni_topo.numbers")
    found.register(
        NumberInfo("fraction", "fractions:Fraction", "of two integers"),
        NumberInfo("decimal", "decimal:Decimal", "with a point"),
        NumberInfo("ratio", "fractions:Fraction.from_float", "of a float"),
    )
    return found


def test_a_class_is_found_by_its_name_and_by_its_path(numbers):
    for name in ("fraction", "fractions:Fraction"):
        info = numbers.info(name, "here")
        assert info.load() is Fraction
        assert info.origin == "fractions"
        assert info.knobs()[:2] == ("numerator", "denominator")
    assert NumberInfo("mean", "a.b.c:D", "").origin == "a"
    assert numbers.info("ratio", "here").load()(0.5) == Fraction(1, 2)
    assert numbers.names("*:*") == []  # a class by its path isn't entered


def test_a_name_is_taken_by_one_class(numbers):
    numbers.register(NumberInfo("fraction", "fractions:Fraction", "in other words"))
    assert numbers.info("fraction", "here").summary == "in other words"
    with pytest.raises(ConfigError, match=r"a number's name must be free, got 'ratio', taken by .* \(NumberInfo\)"):
        numbers.register(NumberInfo("ratio", "decimal:Decimal", "another"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fracton", "number must be a known name, got 'fracton'; did you mean fraction.*here"),
        (3, r"a number's name must be text, got 3 \(here\)"),
        ("fractions:Fracton", "a number must be a class that can be imported, got 'fractions:Fracton'"),
        ("no_such_module:A", "a number must be a class that can be imported"),
        ("decimal:Context", "a number must be a class of numbers.Number, got <class 'decimal.Context'>"),
    ],
)
def test_what_is_no_class_of_the_kind_is_told(numbers, name, message):
    with pytest.raises(ConfigError, match=message):
        numbers.info(name, "here")


def test_packages_offer_classes_by_entry_points(numbers, tmp_path, monkeypatch, caplog):
    found = tmp_path / "more_numbers-1.0.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: more-numbers\nVersion: 1.0\n")
    points = "[tests_of_nni_topo.numbers]\nthird = fractions:Fraction\ndecimal = fractions:Fraction\n"
    (found / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        numbers.register_entry_points()
    assert numbers.info("third", "here").load() is Fraction
    assert numbers.info("third", "here").summary == "of more-numbers"
    assert numbers.info("decimal", "here").path == "decimal:Decimal"
    assert "an entry point of more-numbers is left out: a number's name must be free, got 'decimal'" in caplog.text
