"""Tables of a comparison's records, and functions for all other tables.

Baselines are the pruners of other packages, and random selection.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from scipy import special, stats

from nni_topo.pruners.registry import list_pruners, pruner_info
from nni_topo.runs.provenance import Record
from nni_topo.studies.plan import SCRATCH

Group = tuple[str, str, str]
_BORDER = 3  # characters between two columns of a table
_NEAREST = 1e-3  # accuracies are kept this far from 0 and 1 before the log-odds are taken


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % interval (Student's t); ``nan`` with one value."""

    mean: float
    half: float

    def show(self, scale: float = 1.0, digits: int = 1, *, sign: bool = False) -> str:
        """Return ``mean ± half``, or the mean of a single value."""
        mean = f"{scale * self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if np.isnan(self.half) else f"{mean} ± {scale * self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of at least one value, and half its 95 % interval.

    >>> interval([1.0, 2.0, 3.0]).show(digits=2)
    '2.00 ± 2.48'
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return Interval(float(array.mean()), float("nan"))
    half = stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array))
    return Interval(float(array.mean()), float(half))


def show_range(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Return the mean of at least one value, and the lowest and the highest where they differ from it as shown.

    >>> show_range([0.5, 0.625, 0.75], 100), show_range([0.5, 0.5])
    ('62.5 [50.0, 75.0]', '0.5')
    """
    numbers = [scale * float(value) for value in values]
    mean, low, high = (f"{number:.{digits}f}" for number in (float(np.mean(numbers)), min(numbers), max(numbers)))
    return mean if low == high else f"{mean} [{low}, {high}]"


def show_accuracies(values: Sequence[float]) -> str:
    """Return the mean of accuracies in [0, 1] and its 95 % interval, in percent and within 0 and 100.

    If Student's interval leaves that range, the interval of the log-odds is shown instead, by its ends; for it, values
    are clipped to [0.001, 0.999].

    >>> show_accuracies([0.5, 0.6, 0.7]), show_accuracies([0.1, 0.2, 0.9])
    ('60.0 ± 24.8', '40.0 (0.2 to 99.5)')
    """
    found = interval(values)
    if np.isnan(found.half) or 0.0 <= found.mean - found.half <= found.mean + found.half <= 1.0:
        return found.show(100)
    odds = interval(special.logit(np.clip(values, _NEAREST, 1.0 - _NEAREST)).tolist())
    low, high = special.expit([odds.mean - odds.half, odds.mean + odds.half])
    return f"{100 * found.mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def epochs_until_back(record: Record) -> int | None:
    """Return after how many epochs of fine-tuning the validation accuracy reaches the unpruned one's; None: never."""
    for epoch, accuracy in enumerate(record["curve"]):
        if accuracy >= record["validation_before"]:
            return epoch
    return None


def grouped(records: Iterable[Record]) -> dict[Group, dict[str, dict[int, Record]]]:
    """Sort records by model, data and target, then by pruner, then by seed."""
    groups: dict[Group, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        groups[record["model"], record["data"], record["target"]][record["pruner"]][record["seed"]] = record
    return groups


def paired_difference(ours: dict[int, Record], theirs: dict[int, Record], column: str) -> Interval:
    """Return the mean difference of a column, paired by seed, over the seeds that both rows have."""
    seeds = [seed for seed in sorted(ours.keys() & theirs.keys()) if column in ours[seed] and column in theirs[seed]]
    return interval([ours[seed][column] - theirs[seed][column] for seed in seeds])


def best_baseline(rows: dict[str, dict[int, Record]], column: str) -> str | None:
    """Return the baseline with the highest mean: among the pruners of other packages, and random selection."""
    own = {name for name in list_pruners() if pruner_info(name).origin == "nni_topo"} - {"random"} | {SCRATCH}
    means = {}
    for row, runs in rows.items():
        values = [record[column] for record in runs.values() if column in record]
        if values and next(iter(runs.values()))["pruner_name"] not in own:
            means[row] = float(np.mean(values))
    return max(means, key=means.__getitem__, default=None)


@dataclass
class NumberTable:
    """A table for the terminal whose numbers are never cut: what is too wide goes on in another table below.

    Attributes
    ----------
    title : str or None
        Stands above the first part.
    head : sequence of str
        Names of the columns, broken between words.
    rows, totals : sequence of sequence of str
        Lines, and lines that are set apart below them.
    text_columns : int
        How many columns hold text; every part begins with them. A text is broken where it is too long, a number never.
    unpruned_first : bool
        Whether the first line is set apart.
    """

    title: str | None
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    totals: Sequence[Sequence[str]] = ()
    text_columns: int = 1
    unpruned_first: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield as many tables as the width asks for."""
        for index, columns in enumerate(self._parts(options.max_width)):
            unbroken = 1 + sum(max(self._width(column), len(self.head[column])) + _BORDER for column in columns)
            title = self.title if index == 0 else None
            yield self._part(columns, title, breaks_heads=unbroken > options.max_width)

    def _parts(self, width: int) -> list[list[int]]:
        """Deal the number columns out to tables that are no wider than the terminal, one column at least in each."""
        texts = list(range(self.text_columns))
        left = width - sum(self._width(index) + _BORDER for index in texts) - 1
        parts: list[list[int]] = []
        room = 0
        for index in range(self.text_columns, len(self.head)):
            needed = self._width(index) + _BORDER
            if not parts or needed > room:
                parts.append(list(texts))
                room = left
            parts[-1].append(index)
            room -= needed
        return parts or [texts]

    def _width(self, column: int) -> int:
        """Return the width of a column: of its longest number, or of the longest word in its head."""
        cells = [len(row[column]) for row in (*self.rows, *self.totals)]
        return max(*map(len, self.head[column].split()), 1, *cells)

    def _part(self, columns: Sequence[int], title: str | None, *, breaks_heads: bool) -> Table:
        """Return the table of some columns, with heads on one line or broken to the width of their column."""
        table = Table(title=title, title_justify="left")
        for index in columns:
            is_text = index < self.text_columns
            name = self.head[index]
            if is_text:
                table.add_column(name, no_wrap=index == 0)
            else:
                if breaks_heads:
                    name = "\n".join(textwrap.wrap(name, self._width(index)))
                table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(row[index]) for index in columns))
        if self.unpruned_first:
            table.rows[0].end_section = True
        table.add_section()
        for row in self.totals:
            table.add_row(*(Text(row[index]) for index in columns))
        return table


def as_table(
    title: str | None,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: int = 1,
    totals: Iterable[Sequence[str]] = (),
) -> NumberTable:
    """Return a table for the terminal: first ``text_columns`` columns of text, then numbers; ``totals`` set apart."""
    return NumberTable(title, list(head), [list(row) for row in rows], [list(row) for row in totals], text_columns)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """Return a table in Markdown: the first ``text_columns`` columns hold text, the others numbers."""
    rule = "|" + "---|" * text_columns + "---:|" * (len(head) - text_columns)
    return "\n".join((f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)))


def print_report(records: Iterable[Record], console: Console) -> None:
    """Print one table of records per model, data set and target."""
    for group, rows in grouped(records).items():
        columns, lines = cells_of(rows)
        console.print(NumberTable(title_of(group, rows), columns, lines, unpruned_first=True))


def print_widths(records: Iterable[Record], console: Console) -> None:
    """Print the mean number of output channels of every layer, one table per model, data set and target."""
    for group, rows in grouped(records).items():
        console.print(as_table(f"widths: {title_of(group, rows)}", *widths_of(rows)))


def widths_of(rows: dict[str, dict[int, Record]]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the lines of a group's widths: by layer the unpruned width and each row's mean width."""
    first_runs = next(iter(rows.values()))
    first = next(iter(first_runs.values()))
    before = first.get("widths_before", {})
    reasons = first.get("whole", {})  # why a layer wasn't pruned, by layer
    head = ["layer"]
    if before:
        head.append("before")
    head.extend(rows)
    if reasons:
        head.append("not pruned, because")
    lines = []
    for layer in first["widths"]:
        line = [layer]
        if before:
            line.append(str(before[layer]))
        for runs in rows.values():
            mean = interval([record["widths"][layer] for record in runs.values()]).mean
            line.append(f"{mean:g}")
        if reasons:
            line.append(reasons.get(layer, ""))
        lines.append(line)
    return head, lines


def markdown_report(records: Iterable[Record]) -> str:
    """Return one Markdown table of records per model, data set and target."""
    lines = []
    for group, rows in grouped(records).items():
        lines += [f"**{title_of(group, rows)}**", "", markdown_table(*cells_of(rows)), ""]
    return "\n".join(lines)


def title_of(group: Group, rows: dict[str, dict[int, Record]]) -> str:
    """Return a group's model, data, target and number of seeds."""
    model, data, target = group
    seeds = max(len(runs) for runs in rows.values())
    return f"{model} on {data}, {target} ({seeds} seed{'s' if seeds > 1 else ''})"


def cells_of(rows: dict[str, dict[int, Record]]) -> tuple[list[str], list[list[str]]]:
    """Return a table's head and lines: the unpruned network, then a line per pruner; empty columns are omitted."""
    rows = _timed_together(rows)
    lines = [_unpruned(next(iter(rows.values()))), *(_cells(rows, row) for row in rows)]
    used = [name for name in lines[-1] if any(line.get(name) for line in lines)]
    return used, [[line.get(name, "") for name in used] for line in lines]


def _unpruned(runs: dict[int, Record]) -> dict[str, str]:
    """Return the cells of the unpruned network by column, from the runs of one row."""
    cell = _column(runs)
    return {
        "method": "unpruned",
        "MACs (M)": cell("flops_before", 1e-6, 2, spread=False),
        "parameters (k)": cell("params_before", 1e-3, spread=False),
        "before %": cell("accuracy_before"),
        "before bits": cell("bits_before", 1, 3),
        "latency ms": cell("latency_before_ms", 1, 2),
    }


def _cells(rows: dict[str, dict[int, Record]], row: str) -> dict[str, str]:
    """Return the cells of a row by column."""
    runs = rows[row]
    cell = _column(runs)
    return {
        "method": row,
        "MACs (M)": cell("flops", 1e-6, 2, spread=False),
        "parameters (k)": cell("params", 1e-3, spread=False),
        "nonzero (k)": cell("weights_left", 1e-3, spread=False) if _has_zeros(runs) else "",
        "before %": cell("accuracy_before"),
        "before bits": cell("bits_before", 1, 3),
        "no recovery %": cell("accuracy_oneshot"),
        "no recovery bits": cell("bits_oneshot", 1, 3),
        "BN recal. %": cell("accuracy_recalibrated"),
        "weight reconstruction %": cell("accuracy_compensated"),
        "weight reconstruction bits": cell("bits_compensated", 1, 3),
        "vs best baseline, weight reconstruction": _versus(rows, row, "accuracy_compensated"),
        "distilled %": cell("accuracy_distilled"),
        "distilled bits": cell("bits_distilled", 1, 3),
        "vs best baseline, distilled": _versus(rows, row, "accuracy_distilled"),
        "fine-tuned %": cell("accuracy_retrained"),
        "fine-tuned bits": cell("bits_retrained", 1, 3),
        "vs best baseline": _versus(rows, row, "accuracy_retrained"),
        "epochs to recover": _convergence(runs),
        "latency ms": cell("latency_ms", 1, 2),
        "prune s": cell("prune_seconds", 1, 2, spread=False),
    }


def _timed_together(rows: dict[str, dict[int, Record]]) -> dict[str, dict[int, Record]]:
    """Give networks of one seed and equal widths the same latency: the median of their measured ones."""
    # Equal networks take equal time: differences between their rows come from the machine's other load.
    measured: dict[tuple[str, int, str], list[float]] = defaultdict(list)

    def keys(seed: int, record: Record) -> dict[str, tuple[str, int, str]]:
        widths = {"latency_before_ms": "", "latency_ms": json.dumps(record.get("widths"), sort_keys=True)}
        return {name: (name, seed, own) for name, own in widths.items() if name in record}

    for runs in rows.values():
        for seed, record in runs.items():
            for name, key in keys(seed, record).items():
                measured[key].append(record[name])
    medians = {key: statistics.median(values) for key, values in measured.items()}
    timed: dict[str, dict[int, Record]] = {}
    for row, runs in rows.items():
        timed[row] = {}
        for seed, record in runs.items():
            latencies = {name: medians[key] for name, key in keys(seed, record).items()}
            timed[row][seed] = record | latencies
    return timed


def _has_zeros(runs: dict[int, Record]) -> bool:
    """Return whether single weights were pruned, by the share of weights that are zero."""
    return any(record.get("weights_left", record["params"]) < 0.999 * record["params"] for record in runs.values())


def _column(runs: dict[int, Record]) -> Callable[..., str]:
    """Return a function that shows a column's mean and interval over a row's seeds; an empty text without values."""

    def show(name: str, scale: float = 100, digits: int = 1, *, spread: bool = True) -> str:
        values = [record[name] for record in runs.values() if name in record]
        if not values:
            return ""
        if name.startswith("accuracy"):
            return show_accuracies(values)
        found = interval(values)
        return found.show(scale, digits) if spread else f"{scale * found.mean:.{digits}f}"

    return show


def _convergence(runs: dict[int, Record]) -> str:
    """Return median, lowest and highest number of epochs to recover; an empty text after two epochs or fewer."""
    records = [record for record in runs.values() if len(record.get("curve", ())) > 3]
    if not records:
        return ""
    last = len(records[0]["curve"]) - 1
    found = sorted(last + 1 if epochs is None else epochs for epochs in map(epochs_until_back, records))
    names = [f"> {last}" if epochs > last else str(epochs) for epochs in found]
    middle = names[(len(names) - 1) // 2]
    return middle if names[0] == names[-1] else f"{middle} [{names[0]}, {names[-1]}]"


def _versus(rows: dict[str, dict[int, Record]], row: str, column: str) -> str:
    """Show a row's paired difference to the best baseline in a column."""
    baseline = best_baseline(rows, column)
    if baseline is None or not any(column in record for record in rows[row].values()):
        return ""
    if row == baseline:
        return "best baseline"
    return paired_difference(rows[row], rows[baseline], column).show(100, sign=True)
