from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from nni_topo.studies.pictures import comparison_figures
from nni_topo.studies.tables import (
    as_markdown,
    best_baseline,
    cells_of,
    epochs_taken,
    foot_of,
    grouped,
    in_short,
    interval,
    paired_difference,
    show_accuracies,
    tables_of,
)


def record(pruner, seed, retrained, name=None):
    return {
        "model": "net",
        "data": "digits",
        "target": "ratio 0.5",
        "pruner": pruner,
        "pruner_name": name or pruner,
        "seed": seed,
        "flops_before": 4e6,
        "flops": 1e6,
        "params_before": 8e3,
        "params": 2e3,
        "accuracy_before": 0.99,
        "accuracy_oneshot": 0.5,
        "accuracy_recalibrated": 0.7,
        "accuracy_retrained": retrained,
        "latency_before_ms": 2.0,
        "latency_ms": 1.0,
        "prune_seconds": 0.1,
    }


RECORDS = [
    *(record("l1", seed, value) for seed, value in enumerate([0.90, 0.92, 0.94])),
    *(record("fpgm", seed, value) for seed, value in enumerate([0.91, 0.92, 0.91])),
    *(record("ours", seed, value, "topological") for seed, value in enumerate([0.92, 0.93, 0.96])),
    *(record("random", seed, 0.85) for seed in range(3)),
]


def markdown(records):
    return as_markdown(tables_of(records))


def printed(records, width, **knobs):
    """What a terminal of a width shows."""
    console = Console(file=io.StringIO(), width=width)
    for part in tables_of(records, **knobs):
        console.print(part)
    return console.file.getvalue()


def test_interval_is_students():
    values = [0.5, 0.7, 0.9, 0.4]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


@pytest.mark.parametrize("name", ["my_package.pruners:NormPruner", "a_name_that_its_package_registers"])
def test_a_pruner_of_your_own_is_compared_with_the_baselines_and_is_none(name):
    mine = [record("mine", seed, 0.98, name) for seed in range(3)]
    for baseline, pruner in (("torch-pruning", None), ("by chance", "random")):
        (rows,) = grouped([*RECORDS, *mine, record(baseline, 0, 0.99, pruner), record("scratch", 0, 1.0)]).values()
        assert best_baseline(rows, "accuracy_retrained") == baseline
    (rows,) = grouped([*RECORDS, *mine]).values()
    assert best_baseline(rows, "accuracy_retrained") == "l1"
    columns, lines = cells_of(rows)
    (line,) = (line for line in lines if line[0] == "mine")
    assert " ± " in line[columns.index("vs best baseline")]


def test_the_best_baseline_is_chosen_on_the_validation_images_if_all_records_hold_them():
    tested = [record("l1", 0, 0.9), record("fpgm", 0, 0.8), record("topological", 0, 0.7)]
    (rows,) = grouped(tested).values()
    assert best_baseline(rows, "accuracy_retrained") == "l1"
    validated = [run | {"validation_retrained": 1.0 - run["accuracy_retrained"]} for run in tested]
    (rows,) = grouped(validated).values()
    assert best_baseline(rows, "accuracy_retrained") == "fpgm"
    assert foot_of(rows) in markdown(validated)
    assert "validation images" in foot_of(rows)
    # one baseline without it can't be compared on the validation images
    (rows,) = grouped([tested[0], *validated[1:]]).values()
    assert best_baseline(rows, "accuracy_retrained") == "l1"
    assert "validation" not in foot_of(rows)
    (rows,) = grouped([record("ours", 0, 0.9, "topological")]).values()
    assert foot_of(rows) == ""


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.9], [0.99, 0.95, 0.999, 1.0], [0.0, 0.01, 0.0]])
def test_intervals_of_accuracies_stay_within_0_and_100(values):
    found = interval(values)
    assert found.mean - found.half < 0 or found.mean + found.half > 1
    shown = re.fullmatch(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", show_accuracies(values))
    mean, low, high = map(float, shown.groups())
    assert mean == pytest.approx(100 * np.mean(values), abs=0.05)
    assert 0.0 <= low < mean < high <= 100.0


def converging(pruner, seed, *curve, **more):
    return {**record(pruner, seed, curve[-1]), "validation_before": 0.9, "curve": list(curve), **more}


CURVES = [
    *(converging("l1", seed, 0.2, 0.8, last, 0.95) for seed, last in enumerate([0.9, 0.89, 0.95])),
    *(converging("ours", seed, 0.2, 0.7, 0.8, last) for seed, last in enumerate([0.9, 0.89, 0.899])),
    *(converging("kept", seed, 0.91, 0.7, 0.8, 0.8) for seed in range(3)),
]


def stopped(pruner, seed, *curve, seconds=2.0, width=8):
    """A run that stops at 99 % of 0.9, which is 0.891."""
    timed = {"epoch_seconds": [seconds] * (len(curve) - 1), "widths": {"conv1": width}}
    return converging(pruner, seed, *curve, until=0.99, **timed)


STOPPED = [
    *(stopped("l1", seed, 0.1, 0.85, 0.86, 0.9, seconds=seed + 2, width=9) for seed in range(3)),
    *(stopped("l2", seed, 0.1, 0.87, 0.88, 0.88, 0.88) for seed in range(3)),
    stopped("topological", 0, 0.1, 0.895),
    stopped("topological", 1, 0.1, 0.86, 0.892, seconds=50.0),
    stopped("topological", 2, 0.1, 0.88, 0.88, 0.88, 0.88),
]


def convergence_rows(records):
    text = markdown(records)
    lines = text[text.index("**convergence: ") :].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: dict(zip(table[0][1:], row[1:], strict=True)) for row in table[1:]}


def test_epochs_until_the_accuracy_is_back_are_counted_from_the_pruned_network():
    assert [epochs_taken(found)[0] for found in CURVES] == [2, 3, 2, 3, 3, 3, 0, 0, 0]
    assert [epochs_taken(found)[1] for found in CURVES] == [True] * 4 + [False] * 2 + [True] * 3
    assert [epochs_taken(found, 0.99)[1] for found in CURVES] == [True] * 4 + [False] + [True] * 4
    rows = convergence_rows(CURVES)
    assert [rows[row]["epochs to 100 %"] for row in ("l1", "ours", "kept")] == ["2 [2, 3]", "> 3 [3, > 3]", "0"]
    assert rows["ours"]["epochs to 99 %"] == "3 [3, > 3]"
    assert not any("seconds" in head for head in rows["l1"])
    assert "convergence" not in markdown(RECORDS)


def test_convergence_counts_epochs_and_seconds_up_to_the_share_that_ended_fine_tuning():
    rows = convergence_rows(STOPPED)
    head = ["unpruned %", "before fine-tuning %"]
    head += [f"{unit} to {share} %" for share in (95, 98, 99) for unit in ("epochs", "seconds")]
    assert list(rows["l1"]) == [*head, "vs best baseline, epochs to 99 %"]
    # 95 % of 0.9 is 0.855, 98 % 0.882; an epoch takes 3 seconds at the widths of l1, at the others 2 but for one run
    assert [rows["l1"][name] for name in head[2:]] == ["2", "6", "3", "9", "3", "9"]
    assert [rows["l2"][name] for name in head[2:]] == ["1", "2", "> 4", "> 8", "> 4", "> 8"]
    ours = ["1", "2", "2 [1, > 4]", "4 [2, > 8]", "2 [1, > 4]", "4 [2, > 8]"]
    assert [rows["topological"][name] for name in head[2:]] == ours
    assert rows["l1"]["before fine-tuning %"] == "10.0 ± 0.0"


def test_differences_in_epochs_are_paired_and_a_run_that_never_gets_there_counts_as_all_its_epochs():
    rows = convergence_rows(STOPPED)
    difference = [rows[row]["vs best baseline, epochs to 99 %"] for row in ("l1", "l2", "topological")]
    expected = stats.ttest_rel([1, 2, 4], [3, 3, 3]).confidence_interval(0.95)
    half = (expected.high - expected.low) / 2
    assert difference == ["best baseline", "+1.0 ± 0.0", f"-0.7 ± {half:.1f}"]


def test_among_baselines_that_need_as_many_epochs_the_lower_share_decides():
    equal = [stopped(name, 0, 0.1, first, 0.9) for name, first in (("l1", 0.85), ("l2", 0.86))]
    rows = convergence_rows(equal)
    assert [rows[row]["vs best baseline, epochs to 99 %"] for row in ("l1", "l2")] == ["+0.0", "best baseline"]


def test_the_picture_of_convergence_has_a_line_and_a_band_per_row_and_one_legend(drawn, tmp_path):
    assert "convergence" not in comparison_figures(RECORDS)
    other = [{**entry, "data": "mnist"} for entry in STOPPED]
    comparison_figures([*CURVES, *RECORDS, *other])["convergence"].savefig(tmp_path / "convergence.png")
    lines = drawn.lines("convergence.png")
    assert set(lines) == {"unpruned", "l1", "ours", "kept"}
    assert lines["ours"] == [(epoch, pytest.approx(y)) for epoch, y in enumerate([20, 70, 80, 100 * 2.689 / 3])]
    assert [y for _, y in lines["unpruned"]] == pytest.approx([90, 90])
    figure = drawn["convergence.png"]
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["unpruned", "l1", "ours", "kept", "99 % of it", "l2", "topological"]
    assert [axis.get_legend() for axis in figure.axes] == [None, None]
    # bands go from the lowest to the highest seed; a run that has stopped keeps its last value
    second = drawn.lines("convergence.png", panel=1)
    assert [y for _, y in second["topological"]] == pytest.approx([10, 263.5 / 3, 266.7 / 3, 266.7 / 3, 266.7 / 3])
    assert [y for _, y in second["99 % of it"]] == pytest.approx([89.1, 89.1])
    band = figure.axes[1].collections[2].get_paths()[0].vertices
    for epoch, ends in ((1, (86.0, 89.5)), (4, (88.0, 89.5))):
        heights = [y for x, y in band if x == epoch]
        assert (min(heights), max(heights)) == pytest.approx(ends)


def test_differences_are_paired_by_seed_whatever_the_order_and_the_gaps():
    ours = {seed: record("ours", seed, 0.5 + seed / 10, "topological") for seed in (3, 0, 2, 1, 9)}
    theirs = {seed: record("l1", seed, 0.4 + seed / 10) for seed in (8, 0, 1, 2, 3)}
    del theirs[2]["accuracy_retrained"]
    difference = paired_difference(ours, theirs, "accuracy_retrained")
    assert (difference.mean, difference.half) == (pytest.approx(0.1), pytest.approx(0.0, abs=1e-12))


def test_the_table_names_every_row_and_the_best_baseline():
    text = printed(RECORDS, 160)
    assert "net on digits, ratio 0.5 (3 seeds)" in text
    (ours,) = [line for line in text.splitlines() if "ours" in line]
    assert "+1.7 ± 1.4" in ours
    (baseline,) = [line for line in text.splitlines() if "l1" in line]
    assert "best baseline" in baseline


def test_widths_are_means_over_seeds():
    runs = [{**record("l1", seed, 0.9), "widths": {"conv1": 4 + seed, "head": 10}} for seed in range(2)]
    shown = printed(runs, 100, widths=True)
    assert [line.split()[1::2] for line in shown.splitlines() if "conv1" in line] == [["conv1", "4.5"]]


def test_the_picture_shows_every_rows_mean_before_and_after():
    second = [entry for entry in RECORDS if entry["pruner"] == "fpgm"]
    other = [{**entry, "data": "mnist", "flops": 2e6, "target": "flops 0.5"} for entry in second]
    axes = comparison_figures([*RECORDS, *other])["accuracy"].axes
    titles = [f"net on {data}, {step}" for data in ("digits", "mnist") for step in ("no recovery", "fine-tuned")]
    assert [axis.get_title() for axis in axes] == titles
    rows = ("l1", "fpgm", "ours", "random")
    for axis, column in zip(axes[:2], ("accuracy_oneshot", "accuracy_retrained"), strict=True):
        unpruned = next(line for line in axis.get_lines() if line.get_label() == "unpruned")
        assert list(unpruned.get_ydata()) == pytest.approx([99.0, 99.0])
        assert [bars.get_label() for bars in axis.containers] == list(rows)
        for index, bars in enumerate(axis.containers):
            found = interval([100 * entry[column] for entry in RECORDS if entry["pruner"] == rows[index]])
            # Rows of one target stand side by side, a two-hundredth of the whole network apart.
            place = 1.0 + (index - 1.5) * 0.02
            assert np.ravel(bars[0].get_data()) == pytest.approx([place, found.mean])
            ((_, low), (_, high)) = bars[2][0].get_segments()[0]
            assert (low, high) == pytest.approx((found.mean - found.half, found.mean + found.half))
    # the one row of the other data has the same place and color among the rows as in the first panel
    (alone,) = axes[3].containers
    assert np.ravel(alone[0].get_data())[0] == pytest.approx(2.0 + (rows.index(alone.get_label()) - 1.5) * 0.02)
    same = next(bars for bars in axes[0].containers if bars.get_label() == alone.get_label())
    assert (alone[0].get_color(), alone[0].get_marker()) == (same[0].get_color(), same[0].get_marker())


def test_equal_networks_have_one_latency():
    wide, narrow = {"conv1": 8}, {"conv1": 4}
    times = {"l1": (wide, 1.0), "fpgm": (wide, 9.0), "random": (wide, 2.0), "ours": (narrow, 0.5)}
    runs = [{**record(name, 0, 0.9), "widths": own, "latency_ms": ms} for name, (own, ms) in times.items()]
    rows = [line.split(" | ") for line in markdown(runs).splitlines() if line.startswith("| ")]
    place = rows[0].index("latency ms")
    shown = {row[0].removeprefix("| "): row[place] for row in rows[1:]}
    assert shown == {"unpruned": "2.00", "l1": "2.00", "fpgm": "2.00", "random": "2.00", "ours": "0.50"}


@pytest.mark.parametrize("width", [60, 80, 100, 160, 300])
def test_no_number_and_no_head_is_cut_in_a_narrow_terminal(width):
    records = [{**entry, "accuracy_compensated": 0.9 + entry["seed"] / 100} for entry in RECORDS]
    rows = next(iter(grouped(records).values()))
    head, lines = cells_of(rows)
    text = printed(records, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("net on digits") == 1
    words = text.split()
    for name in head:
        assert all(word in words for word in name.split())
    # in every part a line begins with its row's name, and together the parts hold the row's cells in their order
    for line in lines:
        shown = [row[1:-1].split("│") for row in text.splitlines() if row.startswith(f"│ {line[0]} ")]
        assert [cell.strip() for part in shown for cell in part[1:]] == line[1:]
    assert len(shown) == 1 or width < 160


def test_in_short_a_table_names_the_best_method_on_validation_images_after_the_last_steps():
    def record(seed, row, validation, lost):
        sizes = {"flops_before": 8e6, "flops": 2e6, "params_before": 9e3, "params": 3e3, "accuracy_before": 0.9}
        steps = {"accuracy_oneshot": 0.1, "validation_oneshot": 0.1}
        steps |= {"accuracy_compensated": 0.9 - lost, "validation_compensated": validation}
        return {"pruner": row, "pruner_name": row, "seed": seed, **sizes, **steps}

    rows = {
        "l1": {seed: record(seed, "l1", 0.85, 0.05) for seed in range(3)},
        "fpgm": {seed: record(seed, "fpgm", 0.80, 0.01) for seed in range(3)},  # better on test images alone
        "scratch": {seed: record(seed, "scratch", 0.95, 0.0) for seed in range(3)},  # not pruned
    }
    assert in_short(rows)[0][1] == "best method on validation images"
    assert in_short(rows)[1] == [["weight reconstruction", "l1", "5.0 ± 0.0", "4.0", "3.0"]]
    for run in rows["fpgm"].values():
        run |= {"accuracy_retrained": 0.88, "validation_retrained": 0.9}
    assert in_short(rows)[1][1] == ["fine-tuned", "fpgm", "2.0 ± 0.0", "4.0", "3.0"]
