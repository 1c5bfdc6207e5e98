"""Tables of numbers, and the tables of a comparison's records.

Baselines are NNI's pruners, Torch-Pruning's pruners and random selection. All other pruners, of this package, of users
and of third parties, are compared with the best baseline.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from scipy import special, stats

from nni_topo.network.runtime.reports import markdown_table
from nni_topo.pruners.registry import list_pruners, pruner_info
from nni_topo.runs.provenance import Record
from nni_topo.studies.baselines import PREFIX
from nni_topo.studies.plan import SCRATCH

Group = tuple[str, str, str]
Rows = Mapping[str, dict[int, Record]]
"""The records of one group, by row (label of the pruner) and seed."""
_BORDER = 3  # characters between two columns of a table
STEPS = {
    "oneshot": "no recovery",
    "compensated": "weight reconstruction",
    "distilled": "distilled",
    "retrained": "fine-tuned",
}
"""Steps after which accuracy is measured: the name in records, and the name in figures and tables."""
UNLABELLED = ("oneshot", "compensated", "distilled")
"""Steps that need no labels."""
SHARES = (0.95, 0.98, 0.99, 1.0)
"""Shares of the unpruned validation accuracy that are columns of convergence tables, up to the runs' ``until``."""
_SHORT = 2  # runs with at most this many epochs of fine-tuning don't show convergence
_NEAREST = 1e-3  # accuracies are kept this far from 0 and 1 before the log-odds are taken


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval (Student's t), which is NaN for a single value."""

    mean: float
    half: float

    def show(self, scale: float = 1.0, digits: int = 1, *, sign: bool = False) -> str:
        """Return ``mean ± half``, or only the mean for a single value."""
        plus = "+" if sign else ""
        mean = f"{scale * self.mean:{plus}.{digits}f}"
        if np.isnan(self.half):
            return mean
        return f"{mean} ± {scale * self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of at least one value, and half the width of its 95 % interval.

    >>> interval([1.0, 2.0, 3.0]).show(digits=2)
    '2.00 ± 2.48'
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return Interval(float(array.mean()), float("nan"))
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return Interval(float(array.mean()), float(half))


def show_range(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Return ``mean [lowest, highest]`` of at least one value, or only the mean if rounding makes both ends equal.

    >>> show_range([0.5, 0.625, 0.75], 100), show_range([0.5, 0.5])
    ('62.5 [50.0, 75.0]', '0.5')
    """
    numbers = [scale * float(value) for value in values]
    mean, low, high = (f"{number:.{digits}f}" for number in (float(np.mean(numbers)), min(numbers), max(numbers)))
    if low == high:
        return mean
    return f"{mean} [{low}, {high}]"


def show_accuracies(values: Sequence[float]) -> str:
    """Return the mean of accuracies in [0, 1] and its 95 % interval, in percent and within 0 and 100.

    If Student's interval leaves that range, both ends of the interval of the log-odds are shown instead; it is computed
    on values clipped to [0.001, 0.999].

    >>> show_accuracies([0.5, 0.6, 0.7]), show_accuracies([0.1, 0.2, 0.9])
    ('60.0 ± 24.8', '40.0 (0.2 to 99.5)')
    """
    accuracies = interval(values)
    if (
        np.isnan(accuracies.half)
        or 0.0 <= accuracies.mean - accuracies.half <= accuracies.mean + accuracies.half <= 1.0
    ):
        return accuracies.show(100)
    odds = interval(special.logit(np.clip(values, _NEAREST, 1.0 - _NEAREST)).tolist())
    low, high = special.expit([odds.mean - odds.half, odds.mean + odds.half])
    return f"{100 * accuracies.mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


@dataclass
class NumberTable:
    """A table whose numbers are never cut off in a terminal: columns that don't fit form another table below."""

    title: str | None  # stands above the first part
    head: Sequence[str]  # names of the columns, broken between words
    rows: Sequence[Sequence[str]]
    totals: Sequence[Sequence[str]] = ()  # lines below the others, after a rule
    text_columns: int = 1  # number of leading columns with text, which may be wrapped; every part repeats them
    unpruned_first: bool = False  # whether a rule follows the first line
    foot: str = ""  # stands below the last part

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield as many tables as the width requires; heads that don't fit on one line are wrapped."""
        lines = [*self.rows, *self.totals]
        widths = [
            max(1, *map(len, name.split()), *(len(line[index]) for line in lines))
            for index, name in enumerate(self.head)
        ]
        texts = list(range(self.text_columns))
        parts = [list(texts)]
        room = beside_texts = options.max_width - sum(widths[index] + _BORDER for index in texts) - 1
        for index in range(self.text_columns, len(self.head)):
            needed = widths[index] + _BORDER
            if needed > room and len(parts[-1]) > len(texts):
                parts.append(list(texts))
                room = beside_texts
            parts[-1].append(index)
            room -= needed
        for number, columns in enumerate(parts):
            unbroken = 1 + sum(max(widths[index], len(self.head[index])) + _BORDER for index in columns)
            table = Table(title=self.title if number == 0 else None, title_justify="left")
            for index in columns:
                name = self.head[index]
                if index < self.text_columns:
                    table.add_column(name, no_wrap=index == 0)
                else:
                    if unbroken > options.max_width:
                        name = "\n".join(textwrap.wrap(name, widths[index]))
                    table.add_column(name, justify="right", no_wrap=True)
            for place, line in enumerate(lines):
                is_last = place == len(self.rows) - 1 or (place == 0 and self.unpruned_first)
                table.add_row(*(Text(line[index]) for index in columns), end_section=is_last)
            yield table
        if self.foot:
            yield self.foot

    def to_markdown(self) -> str:
        """Return the table in Markdown, without its title and foot."""
        return markdown_table(self.head, [*self.rows, *self.totals], text_columns=self.text_columns)


def table_of(
    title: str | None,
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str],
    totals: Iterable[Mapping[str, Any]] = (),
    *,
    text_columns: int = 1,
) -> NumberTable:
    """Return a table of records; ``columns`` maps names to formats of a record's entries, e.g. ``"{accuracy:.1%}"``.

    Percent signs are removed from cells, because the columns' names have them.

    >>> print(table_of(None, [{"name": "l1", "accuracy": 0.5}], {"": "{name}", "%": "{accuracy:.1%}"}).to_markdown())
    |  | % |
    |---|---:|
    | l1 | 50.0 |
    """
    lines, sums = (
        [[cell.format_map(row).replace("%", "") for cell in columns.values()] for row in records]
        for records in (rows, totals)
    )
    return NumberTable(title, list(columns), lines, sums, text_columns)


def as_markdown(parts: Iterable[NumberTable | str]) -> str:
    """Return tables, with their titles and feet, and lines of text as Markdown."""
    lines = []
    for part in parts:
        if isinstance(part, str):
            lines += [part, ""]
            continue
        if part.title is not None:
            lines += [f"**{part.title}**", ""]
        lines += [part.to_markdown(), ""]
        if part.foot:
            lines += [part.foot, ""]
    return "\n".join(lines)


def grouped(records: Iterable[Record]) -> dict[Group, dict[str, dict[int, Record]]]:
    """Group records by model, data and target, then by pruner, then by seed."""
    groups: dict[Group, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        groups[record["model"], record["data"], record["target"]][record["pruner"]][record["seed"]] = record
    return groups


def tables_of(records: Iterable[Record], *, widths: bool = False) -> Iterator[NumberTable]:
    """Yield one table per model, data set and target, each followed by a table of convergence if runs are long enough.

    With ``widths``, tables of every layer's mean number of output channels follow.
    """
    groups = grouped(records)
    for group, rows in groups.items():
        title = title_of(group, rows)
        columns, lines = cells_of(rows)
        yield NumberTable(title, columns, lines, unpruned_first=True, foot=foot_of(rows))
        convergence = convergence_of(rows)
        if convergence is not None:
            yield NumberTable(f"convergence: {title}", *convergence)
    if not widths:
        return
    for group, rows in groups.items():
        yield NumberTable(f"widths: {title_of(group, rows)}", *widths_of(rows))


def title_of(group: Group, rows: Rows) -> str:
    """Return a group's model, data, target and number of seeds."""
    model, data, target = group
    seeds = max(len(runs) for runs in rows.values())
    plural = "s" if seeds > 1 else ""
    return f"{model} on {data}, {target} ({seeds} seed{plural})"


def _is_baseline(runs: dict[int, Record]) -> bool:
    """Say whether a row is a baseline: a pruner of NNI or Torch-Pruning, or random selection."""
    name = next(iter(runs.values()))["pruner_name"]
    is_nnis = name.startswith("nni.compression.") or (name in list_pruners() and pruner_info(name).origin == "nni")
    return name == "random" or name.startswith(PREFIX) or is_nnis


def _best_of(rows: Rows, column: str) -> tuple[str | None, str]:
    """Return the row with the highest mean accuracy on validation images, or on test images if records lack those.

    The second result is ``"validation"`` or ``"test"``.
    """
    runs_by_row = {row: [run for run in runs.values() if column in run] for row, runs in rows.items()}
    runs_by_row = {row: runs for row, runs in runs_by_row.items() if runs}
    validation = column.replace("accuracy_", "validation_")
    is_validated = all(validation in run for runs in runs_by_row.values() for run in runs)
    chosen_by = validation if is_validated else column
    means = {row: float(np.mean([run[chosen_by] for run in runs])) for row, runs in runs_by_row.items()}
    images = "validation" if is_validated else "test"
    return max(means, key=means.__getitem__, default=None), images


def _baselines(rows: Rows) -> Rows:
    return {row: runs for row, runs in rows.items() if _is_baseline(runs)}


def best_baseline(rows: Rows, column: str) -> str | None:
    """Return the row of the best baseline, as :func:`_best_of` chooses it; None without baselines."""
    return _best_of(_baselines(rows), column)[0]


def paired_difference(ours: dict[int, Record], baseline: dict[int, Record], column: str) -> Interval:
    """Return the mean difference of a column, paired by seed, over the seeds that both rows have."""
    seeds = [
        seed for seed in sorted(ours.keys() & baseline.keys()) if column in ours[seed] and column in baseline[seed]
    ]
    return interval([ours[seed][column] - baseline[seed][column] for seed in seeds])


class BestMethod(NamedTuple):
    """The method with the highest accuracy after a step."""

    step: str
    name: str
    records: list[Record]
    chosen_on: str  # "validation" or "test" images


def best_method(rows: Rows, steps: Sequence[str] = UNLABELLED) -> BestMethod | None:
    """Return the best method after the last of some steps that was run; None if none was."""
    pruned = {row: runs for row, runs in rows.items() if next(iter(runs.values()))["pruner_name"] != SCRATCH}
    for step in reversed(steps):
        column = f"accuracy_{step}"
        name, images = _best_of(pruned, column)
        if name is not None:
            return BestMethod(step, name, [run for run in pruned[name].values() if column in run], images)
    return None


def in_short(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Return the head and lines of a short table: the best method, the accuracy it loses, and how much smaller it is.

    The first line is for the last step that needs no labels, the second for fine-tuning if networks were fine-tuned.
    """
    lines, on = [], "validation"
    for steps in (UNLABELLED, ("retrained",)):
        best = best_method(rows, steps)
        if best is None:
            continue
        if best.chosen_on == "test":
            on = "test"
        macs = float(np.mean([run["flops_before"] / run["flops"] for run in best.records]))
        params = float(np.mean([run["params_before"] / run["params"] for run in best.records]))
        lost = interval([run["accuracy_before"] - run[f"accuracy_{best.step}"] for run in best.records]).show(100)
        lines.append([STEPS[best.step], best.name, lost, f"{macs:.1f}", f"{params:.1f}"])
    return ["after", f"best method on {on} images", "points lost", "times fewer MACs", "parameters"], lines


_PERCENT, _BITS, _VERSUS = (100.0, 1, True), (1.0, 3, True), ("", 100.0, 1, True)
_MEASURED = {
    "MACs (M)": ("flops", "flops_before", 1e-6, 2, False),
    "parameters (k)": ("params", "params_before", 1e-3, 1, False),
    "nonzero (k)": ("weights_left", "", 1e-3, 1, False),
    "before %": ("accuracy_before", "accuracy_before", *_PERCENT),
    "before bits": ("bits_before", "bits_before", *_BITS),
    "no recovery %": ("accuracy_oneshot", "", *_PERCENT),
    "no recovery bits": ("bits_oneshot", "", *_BITS),
    "BN recal. %": ("accuracy_recalibrated", "", *_PERCENT),
    "weight reconstruction %": ("accuracy_compensated", "", *_PERCENT),
    "weight reconstruction bits": ("bits_compensated", "", *_BITS),
    "vs best baseline, weight reconstruction": ("accuracy_compensated", *_VERSUS),
    "distilled %": ("accuracy_distilled", "", *_PERCENT),
    "distilled bits": ("bits_distilled", "", *_BITS),
    "vs best baseline, distilled": ("accuracy_distilled", *_VERSUS),
    "fine-tuned %": ("accuracy_retrained", "", *_PERCENT),
    "fine-tuned bits": ("bits_retrained", "", *_BITS),
    "vs best baseline": ("accuracy_retrained", *_VERSUS),
    "latency ms": ("latency_ms", "latency_before_ms", 1.0, 2, True),
    "prune s": ("prune_seconds", "", 1.0, 2, False),
}
"""By column: a record's entry, the unpruned network's entry, a factor, digits, and whether the interval is shown."""


def cells_of(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Return a table's head and lines: the unpruned network, then a line per row; empty columns are omitted."""
    timed = _with_equal_times(rows)
    lines = [{"method": "unpruned"}, *({"method": row} for row in timed)]
    for name, (key, before, scale, digits, spread) in _MEASURED.items():
        lines[0][name] = _show_mean(next(iter(timed.values())), before, scale, digits, spread)
        baseline = best_baseline(rows, key) if name.startswith("vs") else None
        for line, (row, runs) in zip(lines[1:], timed.items(), strict=True):
            # whether single weights were pruned, so that some weights are zero
            has_zeros = any(run.get("weights_left", run["params"]) < 0.999 * run["params"] for run in runs.values())
            if not name.startswith("vs"):
                line[name] = ""
                if has_zeros or key != "weights_left":
                    line[name] = _show_mean(runs, key, scale, digits, spread)
            elif row == baseline:
                line[name] = "best baseline"
            elif baseline is not None and any(key in run for run in runs.values()):
                line[name] = paired_difference(runs, rows[baseline], key).show(100, sign=True)
    used = [name for name in ("method", *_MEASURED) if any(line.get(name) for line in lines)]
    return used, [[line.get(name, "") for name in used] for line in lines]


def _with_equal_times(rows: Rows) -> dict[str, dict[int, Record]]:
    """Return rows in which networks of one seed and equal widths get the median of their latencies, to reduce noise."""
    measured: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    places = []
    for row, runs in rows.items():
        for seed, record in runs.items():
            for name, widths in (("latency_before_ms", ""), ("latency_ms", _widths(record))):
                if name in record:
                    measured[name, seed, widths].append(record[name])
                    places.append((row, seed, name, widths))
    timed = {row: {seed: dict(record) for seed, record in runs.items()} for row, runs in rows.items()}
    for row, seed, name, widths in places:
        timed[row][seed][name] = statistics.median(measured[name, seed, widths])
    return timed


def _show_mean(runs: dict[int, Record], name: str, scale: float, digits: int, spread: bool) -> str:
    """Return the mean and the interval of an entry over a row's seeds; an empty text without values."""
    values = [record[name] for record in runs.values() if name in record]
    if not values:
        return ""
    if name.startswith("accuracy"):
        return show_accuracies(values)
    values_interval = interval(values)
    if spread:
        return values_interval.show(scale, digits)
    return f"{scale * values_interval.mean:.{digits}f}"


def foot_of(rows: Rows) -> str:
    """Return the text below a group's table: on which images best baselines are chosen; empty without baselines."""
    columns = ("accuracy_compensated", "accuracy_distilled", "accuracy_retrained")
    chosen = [_best_of(_baselines(rows), column) for column in columns]
    images = {on for baseline, on in chosen if baseline is not None}
    if images == {"validation"}:
        return (
            "The best baseline has the highest mean accuracy on the validation images. All figures are of the test "
            "images, on which another baseline may be ahead."
        )
    if images:
        return "The best baseline has the highest mean on the test images, which are those of the figures."
    return ""


def widths_of(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Return the head and lines of a group's widths: for each layer the unpruned width and each row's mean width."""
    first = next(iter(next(iter(rows.values())).values()))
    before, reasons = first.get("widths_before"), first.get("whole")  # why a layer wasn't pruned, by layer
    head = ["layer", *rows]
    if before:
        head.insert(1, "before")
    if reasons:
        head.append("not pruned, because")
    lines = []
    for layer in first["widths"]:
        means = [float(np.mean([record["widths"][layer] for record in runs.values()])) for runs in rows.values()]
        line = [layer, *(f"{mean:g}" for mean in means)]
        if before:
            line.insert(1, str(before[layer]))
        if reasons:
            line.append(reasons.get(layer, ""))
        lines.append(line)
    return head, lines


def epochs_taken(record: Record, share: float = 1.0) -> tuple[int, bool]:
    """Return the epochs until a share of the unpruned validation accuracy is reached, or all epochs; and if it is."""
    for epoch, accuracy in enumerate(record["curve"]):
        if accuracy >= share * record["validation_before"]:
            return epoch, True
    return len(record["curve"]) - 1, False


def convergence_of(rows: Rows) -> tuple[list[str], list[list[str]]] | None:
    """Return the head and lines of a table: epochs of fine-tuning until shares of the unpruned accuracy are reached.

    Accuracy is measured on the validation images. Epochs and seconds are the median [lowest, highest] over seeds;
    ``> 40``: not reached in the 40 epochs that were run. The last column compares epochs with the best baseline, which
    needs the fewest, paired by seed, for the largest share that any run reaches; a run that doesn't reach it counts
    with all its epochs. None if no network was fine-tuned for more than two epochs.
    """
    long: dict[str, dict[int, Record]] = defaultdict(dict)
    seconds: dict[str, list[float]] = defaultdict(list)
    for row, runs in rows.items():
        for seed, record in runs.items():
            # Runs with `until` always count, even if they ended after few epochs.
            if "until" in record or len(record.get("curve", ())) > _SHORT + 1:
                long[row][seed] = record
                seconds[_widths(record)] += record.get("epoch_seconds") or []
    if not long:
        return None
    # Runs that end at 99 % don't show when 100 % would be reached.
    last = min(record.get("until", 1.0) for runs in long.values() for record in runs.values())
    shares = [*(share for share in SHARES if share < last), last]
    epochs_by_share: dict[float, dict[str, dict[int, tuple[float, bool]]]] = {}
    reached = []  # a share that no run reaches can't be compared
    for share in shares:
        by_row: dict[str, dict[int, tuple[float, bool]]] = {}
        for row, runs in long.items():
            by_row[row] = {seed: epochs_taken(run, share) for seed, run in runs.items()}
        if any(is_back for by_seed in by_row.values() for _, is_back in by_seed.values()):
            reached.append(share)
        epochs_by_share[share] = by_row
    compared = reached[-1] if reached else shares[0]
    # The best baseline has the fewest mean epochs to this share; ties are broken by the next lower share.
    fewer = [share for share in reversed(shares) if share <= compared]
    means: dict[str, list[float]] = {}
    for row in _baselines(long):
        means[row] = []
        for share in fewer:
            means[row].append(float(np.mean([epochs for epochs, _ in epochs_by_share[share][row].values()])))
    baseline = min(means, key=means.__getitem__, default=None)
    is_timed = all(seconds.values())
    head = ["method", "unpruned %", "before fine-tuning %"]
    for share in shares:
        head.append(f"epochs to {100 * share:g} %")
        if is_timed:
            head.append(f"seconds to {100 * share:g} %")
    head.append(f"vs best baseline, epochs to {100 * compared:g} %")
    lines = []
    for row, runs in long.items():
        unpruned = show_accuracies([record["validation_before"] for record in runs.values()])
        line = [row, unpruned, show_accuracies([record["curve"][0] for record in runs.values()])]
        for share in shares:
            epochs_by_seed = epochs_by_share[share][row]
            line.append(_median_of(epochs_by_seed.values()))
            if is_timed:
                epoch_seconds = {seed: statistics.median(seconds[_widths(record)]) for seed, record in runs.items()}
                line.append(
                    _median_of(
                        (epoch_seconds[seed] * epochs, is_back) for seed, (epochs, is_back) in epochs_by_seed.items()
                    )
                )
        versus = "best baseline" if row == baseline else ""
        if baseline is not None and row != baseline:
            ours, baseline_epochs = epochs_by_share[compared][row], epochs_by_share[compared][baseline]
            gains = [ours[seed][0] - baseline_epochs[seed][0] for seed in sorted(ours.keys() & baseline_epochs.keys())]
            versus = interval(gains).show(sign=True)
        lines.append([*line, versus])
    return head, lines


def _widths(record: Record) -> str:
    """Return a network's widths as a key; networks with the same key take equal time."""
    return json.dumps(record.get("widths"), sort_keys=True)


def _median_of(values: Iterable[tuple[float, bool]]) -> str:
    """Return ``median [lowest, highest]`` of numbers (the lower median), or one number if all are equal.

    A number whose second entry is False is a lower bound: it is shown with ``>`` and ranks above all others.
    """
    ranked = sorted(values, key=lambda value: (not value[1], value[0]))
    names = []
    for number, is_exact in ranked:
        bound = "" if is_exact else "> "
        names.append(f"{bound}{number:.0f}")
    middle = names[(len(names) - 1) // 2]
    if names[0] == names[-1]:
        return middle
    return f"{middle} [{names[0]}, {names[-1]}]"
