"""Reports about the models that the package returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from nni_topo.network.runtime.modules import put_attribute


class ModelReport:
    """Report about a model that the package returns, in the model's attribute ``report``."""

    changed_since: tuple[str, ...]
    """Later changes by functions of the package, in order, such as ``"distilled (nni_topo.distill)"``."""


def give_report(model: nn.Module, report: ModelReport) -> bool:
    """Set the report of a model; return False if the model has an attribute ``report`` of its own."""
    has_room = isinstance(getattr(model, "report", report), ModelReport)
    if has_room:
        put_attribute(model, "report", report)
    return has_room


def report_of(model: nn.Module) -> ModelReport | None:
    """Return the latest report that the package gave a model; None if it gave it none."""
    report = getattr(model, "report", None)
    if isinstance(report, ModelReport):
        return report
    return None


def hand_on_report(model: nn.Module, changed: nn.Module, how: str) -> None:
    """Give a changed copy of a model the model's report, if it has one, with a note of ``how`` it was changed."""
    report: Any = report_of(model)
    if report is not None:
        give_report(changed, dataclasses.replace(report, changed_since=(*report.changed_since, how)))


SOLVED_ON = "_nni_topo_solved_on"
"""Name of a model's attribute with digests of the samples on which its weights were solved."""


def solved_on(model: nn.Module) -> frozenset[bytes]:
    """Return the digests of the samples that a model's weights were solved on or learned from, as far as is known."""
    digests: frozenset[bytes] = vars(model).get(SOLVED_ON, frozenset())
    return digests


def tell_solved_on(model: nn.Module, digests: Iterable[bytes]) -> None:
    """Note on which samples a model's weights were solved; models made from this one keep the note."""
    vars(model)[SOLVED_ON] = solved_on(model) | frozenset(digests)


_COMPENSATED = "_nni_topo_compensated"
"""Name of a model's attribute that says that its kept channels make up for removed ones."""


def tell_compensated(model: nn.Module, is_compensated: bool) -> None:
    """Note whether a model of full size comes from `compensate`."""
    if is_compensated:
        vars(model)[_COMPENSATED] = True
    else:
        vars(model).pop(_COMPENSATED, None)


def is_compensated(model: nn.Module) -> bool:
    """Whether a model of full size comes from `compensate`."""
    return _COMPENSATED in vars(model)


def told_of_changes(changed_since: Sequence[str]) -> str:
    """Return a sentence on the changes since a report was written; empty if none were made."""
    if changed_since:
        return f"changed since, and not in these figures: {', '.join(changed_since)}"
    return ""


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """Return a table in Markdown: the first ``text_columns`` columns hold text, the others numbers."""
    rule = "|" + "---|" * text_columns + "---:|" * (len(head) - text_columns)
    return "\n".join((f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)))
