"""The first sentence of every report: what is left of the cost, and how much of the network's answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

_STEPS = ("oneshot", "compensated", "distilled", "retrained")


def headline(
    *,
    macs: float,
    time: float = math.nan,
    params: float = math.nan,
    answers: float = math.nan,
    error: float = math.nan,
    accuracy: float = math.nan,
    accuracy_before: float = math.nan,
    measured_on: str = "",
) -> str:
    """Return one sentence about a smaller network; what is NaN isn't told.

    Parameters
    ----------
    macs, time, params : float
        Shares of the unpruned network's multiply-accumulates, time and parameters.
    answers : float, default=NaN
        Share of the unpruned network's answers, in [0, 1].
    error : float, default=NaN
        Root of the mean squared distance from the unpruned network's outputs, in their standard deviations. It is told
        if ``answers`` is NaN.
    accuracy, accuracy_before : float, default=NaN
        Accuracy of the smaller and of the unpruned network, in [0, 1].
    measured_on : str, default=""
        The samples on which answers, error or accuracy are measured.

    Examples
    --------
    >>> headline(time=0.58, macs=0.5, answers=127 / 128, measured_on="128 held-out samples")
    '0.58 of the time, 0.50 of the MACs, 99.2 % of the answers on 128 held-out samples'
    """
    parts = [
        f"{share_in_words(share)} of the {cost}"
        for share, cost in ((time, "time"), (macs, "MACs"), (params, "parameters"))
        if not math.isnan(share)
    ]
    place = f" on {measured_on}" if measured_on else ""
    if not math.isnan(answers):
        parts.append(f"{percent_in_words(answers)} of the answers{place}")
    elif not math.isnan(error):
        parts.append(f"an error of {error:.2g} standard deviations{place}")
    if not math.isnan(accuracy):
        place = "" if len(parts) > 1 and parts[-1].endswith(place) else place
        unpruned = "" if math.isnan(accuracy_before) else f" (unpruned {percent_in_words(accuracy_before)})"
        parts.append(f"an accuracy of {percent_in_words(accuracy)}{place}{unpruned}")
    return ", ".join(parts)


def headline_of_records(records: Iterable[Mapping[str, Any]], step: str = "") -> str:
    """Return the sentence about the mean of a method's records, with its accuracy on test images after a step.

    A record is one of a comparison or of ``nni-topo prune``, or holds a trial's metrics. Without a ``step`` the last
    one counts.
    """
    rows = list(records)

    def mean_share(name: str, before: str, share: str) -> float:
        shares = [
            row[share] if share in row else row[name] / row[before] for row in rows if share in row or name in row
        ]
        return fmean(shares) if shares else math.nan

    def mean_of(name: str) -> float:
        values = [row[name] for row in rows if name in row]
        return fmean(values) if values else math.nan

    if any("test_accuracy" in row for row in rows):
        name, before = "test_accuracy", "test_accuracy_before"
    else:
        last = next((step for step in reversed(_STEPS) if any(f"accuracy_{step}" in row for row in rows)), "")
        name, before = f"accuracy_{step or last}", "accuracy_before"
    return headline(
        time=mean_share("latency_ms", "latency_before_ms", "latency_share"),
        macs=mean_share("flops", "flops_before", "flops_share"),
        accuracy=mean_of(name),
        accuracy_before=mean_of(before),
        measured_on="the test images",
    )


def share_in_words(share: float) -> str:
    """Return a share of a cost with two digits.

    >>> share_in_words(0.5), share_in_words(0.0312)
    ('0.50', '0.031')
    """
    return f"{share:.2f}" if share >= 0.1 else f"{share:.2g}"


def percent_in_words(share: float) -> str:
    """Return a share in percent; only a share of 1 is 100 %.

    >>> percent_in_words(1.0), percent_in_words(0.9999), percent_in_words(0.97)
    ('100 %', '99.9 %', '97 %')
    """
    percent = 100.0 * share
    if share < 1.0:
        percent = min(percent, 99.9)
    return f"{percent:.1f}".removesuffix(".0") + " %"
