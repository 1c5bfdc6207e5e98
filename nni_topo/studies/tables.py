"""Tables of a comparison's records, and functions for all other tables.

Baselines are NNI's own pruners, Torch-Pruning's, and random selection. Pruners of the package, and those of users and
third parties, are compared with them.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
_BORDER = 3  # characters between two columns of a table
STEPS = {
    "oneshot": "no recovery",
    "compensated": "weight reconstruction",
    "distilled": "distilled",
    "retrained": "fine-tuned",
}
"""The steps after which accuracy is measured, named as in the records, in the words of figures and tables."""
SHARES = (0.95, 0.98, 0.99, 1.0)
"""Shares of the unpruned network's validation accuracy, up to the one that ended fine-tuning, in tables."""
_SHORT = 2  # so many epochs of fine-tuning say nothing of convergence
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


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm's method, in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected = [1.0] * len(values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = largest
    return corrected


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


def epochs_taken(record: Record, share: float = 1.0) -> tuple[int, bool]:
    """Return the epochs of fine-tuning until a share of the unpruned validation accuracy is back, and whether it is.

    A run that doesn't get there has taken all of its epochs.
    """
    for epoch, accuracy in enumerate(record["curve"]):
        if accuracy >= share * record["validation_before"]:
            return epoch, True
    return len(record["curve"]) - 1, False


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
    """Return the row of the best baseline in a column, None if there is none.

    It is the one with the highest mean accuracy on the validation images; of text, and of records that don't hold that
    accuracy, the one with the highest mean of the column itself, which is measured on the test images.
    """
    return _best_of({row: runs for row, runs in rows.items() if _is_baseline(runs)}, column)


def _best_of(rows: dict[str, dict[int, Record]], column: str) -> str | None:
    """Return the row with the highest mean of an accuracy on validation images; on test ones if records lack those."""
    compared = {}
    for row, runs in rows.items():
        records = [record for record in runs.values() if column in record]
        if records:
            compared[row] = records
    chosen_by = _chosen_by(compared.values(), column)
    means = {row: float(np.mean([record[chosen_by] for record in records])) for row, records in compared.items()}
    return max(means, key=means.__getitem__, default=None)


def _chosen_by(rows: Iterable[Sequence[Record]], column: str) -> str:
    """Return the column of the accuracy on validation images if all records hold it, else the column itself."""
    validation = column.replace("accuracy_", "validation_")
    return validation if all(validation in record for records in rows for record in records) else column


def in_short(rows: dict[str, dict[int, Record]]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the lines of a short table: how much smaller networks are, and what the best method loses.

    A line is of the last step without labels, one of fine-tuning where networks were fine-tuned. The method of a line
    is the one with the highest mean accuracy on the validation images; on the test images, which the title then says,
    if records lack those.
    """
    pruned = {row: runs for row, runs in rows.items() if next(iter(runs.values()))["pruner_name"] != SCRATCH}
    lines, images = [], "validation"
    for steps in (("distilled", "compensated", "oneshot"), ("retrained",)):
        for step in steps:
            column = f"accuracy_{step}"
            best = _best_of(pruned, column)
            if best is None:
                continue
            runs = [run for run in pruned[best].values() if column in run]
            held = [[run for run in each.values() if column in run] for each in pruned.values()]
            if _chosen_by(held, column) == column:
                images = "test"
            macs = float(np.mean([run["flops_before"] / run["flops"] for run in runs]))
            params = float(np.mean([run["params_before"] / run["params"] for run in runs]))
            lost = interval([run["accuracy_before"] - run[column] for run in runs]).show(100)
            lines.append([STEPS[step], best, lost, f"{macs:.1f}", f"{params:.1f}"])
            break
    return ["after", f"best method on {images} images", "points lost", "times fewer MACs", "parameters"], lines


def _is_baseline(runs: dict[int, Record]) -> bool:
    """Return whether a row is a baseline: NNI's own pruners, Torch-Pruning's, and random selection."""
    name = next(iter(runs.values()))["pruner_name"]
    is_nnis = name.startswith("nni.compression.") or (name in list_pruners() and pruner_info(name).origin == "nni")
    return name == "random" or name.startswith(PREFIX) or is_nnis


@dataclass
class NumberTable:
    """A table whose numbers are never cut in a terminal: columns that don't fit are in another table below."""

    title: str | None  # stands above the first part
    head: Sequence[str]  # names of the columns, broken between words
    rows: Sequence[Sequence[str]]
    totals: Sequence[Sequence[str]] = ()  # lines that are set apart below the others
    text_columns: int = 1  # this many columns hold text, which may be broken, and begin every part
    unpruned_first: bool = False  # whether the first line is set apart

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield as many tables as the width asks for, with heads on one line or broken to the width of their column."""
        widths = [
            max(1, *map(len, name.split()), *(len(row[index]) for row in (*self.rows, *self.totals)))
            for index, name in enumerate(self.head)
        ]
        texts = list(range(self.text_columns))
        parts: list[list[int]] = []
        room = 0
        for index in range(self.text_columns, len(self.head)):
            needed = widths[index] + _BORDER
            if not parts or needed > room:
                parts.append(list(texts))
                room = options.max_width - sum(widths[each] + _BORDER for each in texts) - 1
            parts[-1].append(index)
            room -= needed
        for number, columns in enumerate(parts or [texts]):
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
            for row in self.rows:
                table.add_row(*(Text(row[index]) for index in columns))
            if self.unpruned_first:
                table.rows[0].end_section = True
            table.add_section()
            for row in self.totals:
                table.add_row(*(Text(row[index]) for index in columns))
            yield table

    def to_markdown(self) -> str:
        """Return the table in Markdown, without its title."""
        return markdown_table(self.head, [*self.rows, *self.totals], text_columns=self.text_columns)


def table_of(
    title: str | None,
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str],
    totals: Iterable[Mapping[str, Any]] = (),
    *,
    text_columns: int = 1,
) -> NumberTable:
    """Return a table of records, with a format of a record's entries for each column, such as ``"{accuracy:.1%}"``.

    Signs of per cent are left out, because they stand in the columns' names.

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


def with_tables(page: str, source: str, tables: str) -> str:
    """Return a Markdown page whose text between the two comments that name a source is replaced; ValueError if none.

    >>> page = with_tables("<!-- a.py: begin -->old<!-- a.py: end -->, and more", "a.py", "new")
    >>> print(page)
    <!-- a.py: begin -->
    <BLANKLINE>
    new
    <BLANKLINE>
    <!-- a.py: end -->, and more
    """
    begin, end = (f"<!-- {source}: {word} -->" for word in ("begin", "end"))
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"a page must have {begin} and {end}")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"


def tables_of(records: Iterable[Record], *, widths: bool = False) -> Iterator[NumberTable | str]:
    """Yield one table of records per model, data set and target, its foot, and a table of convergence after it.

    With ``widths``, tables of the mean number of output channels of every layer follow.
    """
    groups = grouped(records)
    for group, rows in groups.items():
        columns, lines = cells_of(rows)
        yield NumberTable(title_of(group, rows), columns, lines, unpruned_first=True)
        if foot := foot_of(rows):
            yield foot
        convergence = convergence_of(rows)
        if convergence is not None:
            yield NumberTable(f"convergence: {title_of(group, rows)}", *convergence)
    for group, rows in groups.items() if widths else ():
        yield NumberTable(f"widths: {title_of(group, rows)}", *widths_of(rows))


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


def as_markdown(parts: Iterable[NumberTable | str]) -> str:
    """Return tables, with their titles, and lines in Markdown."""
    lines = []
    for part in parts:
        if isinstance(part, NumberTable) and part.title is not None:
            lines += [f"**{part.title}**", ""]
        lines += [part if isinstance(part, str) else part.to_markdown(), ""]
    return "\n".join(lines)


def title_of(group: Group, rows: dict[str, dict[int, Record]]) -> str:
    """Return a group's model, data, target and number of seeds."""
    model, data, target = group
    seeds = max(len(runs) for runs in rows.values())
    return f"{model} on {data}, {target} ({seeds} seed{'s' if seeds > 1 else ''})"


def cells_of(rows: dict[str, dict[int, Record]]) -> tuple[list[str], list[list[str]]]:
    """Return a table's head and lines: the unpruned network, then a line per pruner; empty columns are omitted."""
    # Networks of one seed and equal widths get the same latency, the median of their measured ones: equal networks take
    # equal time, and differences between their rows come from the machine's other load.
    measured: dict[tuple[str, int, str], list[float]] = defaultdict(list)

    def keys(seed: int, record: Record) -> dict[str, tuple[str, int, str]]:
        widths = {"latency_before_ms": "", "latency_ms": _widths(record)}
        return {name: (name, seed, own) for name, own in widths.items() if name in record}

    for runs in rows.values():
        for seed, record in runs.items():
            for name, key in keys(seed, record).items():
                measured[key].append(record[name])
    timed: dict[str, dict[int, Record]] = {}
    for row, runs in rows.items():
        timed[row] = {}
        for seed, record in runs.items():
            latencies = {name: statistics.median(measured[key]) for name, key in keys(seed, record).items()}
            timed[row][seed] = record | latencies
    lines = [{"method": "unpruned"}]
    for name, (_, before, scale, digits, spread) in _MEASURED.items():
        lines[0][name] = _shown(next(iter(timed.values())), before, scale, digits, spread=spread)
    for row, runs in timed.items():
        line = {"method": row}
        # single weights were pruned if a share of the weights is zero
        has_zeros = any(run.get("weights_left", run["params"]) < 0.999 * run["params"] for run in runs.values())
        for name, (entry, _, scale, digits, spread) in _MEASURED.items():
            if name.startswith("vs"):
                line[name] = _versus(timed, row, entry)
            elif has_zeros or entry != "weights_left":
                line[name] = _shown(runs, entry, scale, digits, spread=spread)
        lines.append(line)
    used = [name for name in ("method", *_MEASURED) if any(line.get(name) for line in lines)]
    return used, [[line.get(name, "") for name in used] for line in lines]


def foot_of(rows: dict[str, dict[int, Record]]) -> str:
    """Return what stands below a group's table: on which images best baselines are chosen; empty without baselines."""
    images = set()
    for column in ("accuracy_compensated", "accuracy_distilled", "accuracy_retrained"):
        held = [[run for run in runs.values() if column in run] for runs in rows.values() if _is_baseline(runs)]
        if any(held):
            images.add("test" if _chosen_by(filter(None, held), column) == column else "validation")
    if images == {"validation"}:
        return (
            "The best baseline has the highest mean accuracy on the validation images. All figures are of the test "
            "images, on which another baseline may be ahead."
        )
    return (
        "The best baseline has the highest mean on the test images, which are those of the figures." if images else ""
    )


def convergence_of(rows: dict[str, dict[int, Record]]) -> tuple[list[str], list[list[str]]] | None:
    """Return the head and the lines of a table: fine-tuning until shares of the unpruned accuracy are back.

    Accuracy is measured on the validation images. Epochs and seconds of training are the median [lowest, highest] over
    seeds; ``> 40`` is more than the 40 epochs that were run. An epoch of networks of equal widths takes the same time,
    the median of all their epochs: differences come from the machine's other load. The last column is the mean
    difference in epochs to the largest share that any run reaches, paired by seed, with its 95 % interval, from the
    baseline with the fewest; a run that doesn't get there counts as all of its epochs. None if no network was
    fine-tuned for more than two epochs.
    """
    long: dict[str, dict[int, Record]] = {}
    for row, runs in rows.items():
        for seed, record in runs.items():
            # A fine-tuning that may stop early is long, however soon it stopped.
            if "until" in record or len(record.get("curve", ())) > _SHORT + 1:
                long.setdefault(row, {})[seed] = record
    if not long:
        return None
    records = [record for runs in long.values() for record in runs.values()]
    # Runs that stop at 99 % say nothing of 100 %.
    last = min(record.get("until", 1.0) for record in records)
    shares = [*(share for share in SHARES if share < last), last]
    measured: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.get("epoch_seconds"):
            measured[_widths(record)] += record["epoch_seconds"]
    per_epoch = {widths: statistics.median(seconds) for widths, seconds in measured.items()}
    is_timed = all(_widths(record) in per_epoch for record in records)
    head = ["method", "unpruned %", "before fine-tuning %"]
    for share in shares:
        head.append(f"epochs to {100 * share:g} %")
        if is_timed:
            head.append(f"seconds to {100 * share:g} %")
    # Where no run gets to a share, a difference of zero would say nothing.
    reached = [share for share in shares if any(epochs_taken(record, share)[1] for record in records)]
    compared = reached[-1] if reached else shares[0]
    head.append(f"vs best baseline, epochs to {100 * compared:g} %")
    # The baseline with the fewest mean epochs to this share; of equal ones, to the share before it.
    means = {}
    for row, runs in long.items():
        if _is_baseline(runs):
            fewer = [share for share in reversed(shares) if share <= compared]
            means[row] = [float(np.mean([epochs_taken(run, share)[0] for run in runs.values()])) for share in fewer]
    baseline = min(means, key=means.__getitem__, default=None)
    lines = []
    for row, runs in long.items():
        unpruned = show_accuracies([record["validation_before"] for record in runs.values()])
        line = [row, unpruned, show_accuracies([record["curve"][0] for record in runs.values()])]
        for share in shares:
            taken = {seed: epochs_taken(record, share) for seed, record in runs.items()}
            line.append(_median_of(taken.values()))
            if is_timed:
                seconds = {seed: per_epoch[_widths(record)] for seed, record in runs.items()}
                line.append(_median_of((seconds[seed] * epochs, is_back) for seed, (epochs, is_back) in taken.items()))
        if row == baseline:
            line.append("best baseline")
        elif baseline is None:
            line.append("")
        else:
            ours, theirs = (
                {seed: {"epochs": epochs_taken(record, compared)[0]} for seed, record in each.items()}
                for each in (runs, long[baseline])
            )
            line.append(paired_difference(ours, theirs, "epochs").show(sign=True))
        lines.append(line)
    return head, lines


def _widths(record: Record) -> str:
    """Return a network's widths as a key; networks with the same key take equal time."""
    return json.dumps(record.get("widths"), sort_keys=True)


def _median_of(values: Iterable[tuple[float, bool]]) -> str:
    """Return median [lowest, highest] of numbers, or the one that they share; of an even number the lower middle one.

    A number whose second entry is False is a lower bound, shown by ``>`` and larger than all others.
    """
    ranked = sorted(values, key=lambda value: (not value[1], value[0]))
    names = [f"{number:.0f}" if is_exact else f"> {number:.0f}" for number, is_exact in ranked]
    middle = names[(len(names) - 1) // 2]
    return middle if names[0] == names[-1] else f"{middle} [{names[0]}, {names[-1]}]"


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
"""By column: a record's entry, that of the unpruned network, a factor, digits, and whether the interval is shown."""


def _shown(runs: dict[int, Record], name: str, scale: float, digits: int, *, spread: bool) -> str:
    """Return the mean and the interval of an entry over a row's seeds; an empty text without values."""
    values = [record[name] for record in runs.values() if name in record]
    if not values:
        return ""
    if name.startswith("accuracy"):
        return show_accuracies(values)
    found = interval(values)
    return found.show(scale, digits) if spread else f"{scale * found.mean:.{digits}f}"


def _versus(rows: dict[str, dict[int, Record]], row: str, column: str) -> str:
    """Show a row's paired difference to the best baseline in a column."""
    baseline = best_baseline(rows, column)
    if baseline is None or not any(column in record for record in rows[row].values()):
        return ""
    if row == baseline:
        return "best baseline"
    return paired_difference(rows[row], rows[baseline], column).show(100, sign=True)
