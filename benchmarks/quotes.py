"""Recompute from raw records every number on README, choosing.md and index.md.

    python -m benchmarks.quotes          # the numbers without a record, and each fault; exit code 1 if there is one
    python -m benchmarks.quotes --run    # run README's code anew and keep what its report says as records/readme.jsonl

``quoted.py`` says by which statistic of which records each number is made, and which numbers aren't measured. A number
that it doesn't name, one that its records don't make and an entry that no page has any more are faults.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.quoted import NOT_MEASURED, QUOTES, README_RECORDS, RECORDS, WITHOUT_RECORD
from nni_topo.runs.provenance import provenance

PROJECT = Path(__file__).resolve().parents[1]
PAGES = (PROJECT / "README.md", PROJECT / "docs" / "choosing.md", PROJECT / "docs" / "index.md")
_CARDINALS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
CARDINALS = {word: float(number) for number, word in enumerate(_CARDINALS.split(), start=1)}
CARDINALS |= {"thirty": 30.0, "forty": 40.0, "fifty": 50.0, "sixty": 60.0, "seventy": 70.0, "eighty": 80.0}
CARDINALS |= {"ninety": 90.0, "dozen": 12.0, "dozens": 12.0, "hundred": 100.0, "thousand": 1000.0, "twice": 2.0}
PARTS = {
    "half": 2,
    "third": 3,
    "quarter": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
}
_DIGITS = r"(?:(?<![\w.)])[-+])?\d+(?:,\d{3})*(?!\d)(?:\.\d+)*"
_PART = rf"(?:(?:{'|'.join(CARDINALS)})[ -])?(?:halves|(?:{'|'.join(PARTS)})s?)"
_WORD = rf"(?<![a-z])(?:{_PART}|{'|'.join(CARDINALS)}|(?<!half )an?(?= (?:second|minute|hour|day)\b))(?![a-z])"
NUMBER = re.compile(rf"{_DIGITS}|{_WORD}", re.IGNORECASE)
"""Digits wherever they stand, number words, fractions, and ``a minute``."""
_NEAR = 0.05
"""Relative deviation that a fraction in words leaves open: a quarter may be 0.26."""


def main() -> int:
    """Print what is wrong; return 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run README's code and keep what it reports")
    if parser.parse_args().run:
        keep_readme()
    texts = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
    for phrase in WITHOUT_RECORD:
        print(f"measured, without a record: {phrase}")
    problems = faults(texts)
    print(*problems, sep="\n")
    print(f"{len(measured(texts))} numbers are recomputed, {len(problems)} faults")
    return int(bool(problems))


def numbers(text: str) -> list[re.Match[str]]:
    """Return the numbers of a page, without the targets of its links."""
    return list(NUMBER.finditer(re.sub(r"\]\([^)]*\)", lambda target: "]" + " " * (len(target[0]) - 1), text)))


def amount(printed: str) -> float:
    """Return the value of a printed number."""
    word = printed.lower().strip()
    if word in CARDINALS:
        return CARDINALS[word]
    if word in ("a", "an"):
        return 1.0
    if word[-1].isdigit():
        return float(word.replace(",", ""))
    count, _, part = word.replace("halves", "half").rpartition(" ") if " " in word else word.rpartition("-")
    return CARDINALS.get(count, 1.0) / PARTS[part.rstrip("s") if part not in PARTS else part]


def is_made(printed: str, value: float) -> bool:
    """Return whether a number is printed as a value rounds; fractions in words may deviate by 5 %."""
    if printed[-1].isdigit():
        decimals = len(printed.partition(".")[2])
        sign = "+" if printed[0] == "+" else ""
        return f"{value:{sign},.{decimals}f}" == (
            printed if "," in printed else f"{amount(printed):{sign},.{decimals}f}"
        )
    if printed.lower() in CARDINALS:
        return round(value) == amount(printed)
    return abs(value / amount(printed) - 1) <= _NEAR


@functools.cache
def pattern(phrase: str) -> re.Pattern[str]:
    """Return what a phrase looks like on a page, with any number for each ``{}``; line breaks count as blanks."""
    pieces = [r"\s+".join(map(re.escape, piece.split(" "))) for piece in phrase.split("{}")]
    begin, end = (r"(?<!\w)" if phrase[0].isalnum() else "", r"(?!\w)" if phrase[-1].isalnum() else "")
    return re.compile(begin + f"({NUMBER.pattern})".join(pieces) + end, re.IGNORECASE)


def measured(texts: dict[str, str]) -> list[tuple[str, int, int]]:
    """Return page, begin and end of each number that records make."""
    return sorted(
        (page, *match.span(group))
        for quote in QUOTES
        for page, text in texts.items()
        for match in pattern(quote.text).finditer(text)
        for group in range(1, len(quote.figures) + 1)
    )


def faults(texts: dict[str, str]) -> list[str]:
    """Return the faults of pages, by page and line."""
    covered: set[tuple[str, int]] = set()
    problems = []

    def line(page: str, begin: int) -> str:
        return f"{page}:{texts[page].count(chr(10), 0, begin) + 1}"

    for quote in QUOTES:
        matches = [(page, match) for page, text in texts.items() for match in pattern(quote.text).finditer(text)]
        if not matches:
            problems.append(f"no page has the sentence of an entry: {quote.text}")
        for page, match in matches:
            for group, value in enumerate(quote.values, start=1):
                covered.add((page, match.start(group)))
                if not is_made(match[group], value):
                    place = line(page, match.start(group))
                    problems.append(
                        f"{place}: {match[group]} isn't what the records make, {value:.6g} ({quote.text.strip()})"
                    )
    for phrase in [*WITHOUT_RECORD, *(phrase for phrases in NOT_MEASURED.values() for phrase in phrases)]:
        matches = [(page, match) for page, text in texts.items() for match in pattern(phrase).finditer(text)]
        if not matches:
            problems.append(f"no page has an entry's words: {phrase}")
        covered |= {(page, at) for page, match in matches for at in range(*match.span())}
    for page, text in texts.items():
        for match in numbers(text):
            if (page, match.start()) not in covered:
                around = " ".join(text[max(0, match.start() - 40) : match.end() + 30].split())
                problems.append(
                    f"{line(page, match.start())}: {match[0]} needs an entry in quoted.py: ... {around} ..."
                )
    return problems


def run_readme() -> dict[str, Any]:
    """Run README's code in the current folder and return its names."""
    names: dict[str, Any] = {"__name__": "readme"}
    for snippet in re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.S):
        exec(compile(snippet, "README.md", "exec"), names)
    return names


def run_diff(names: dict[str, Any]) -> dict[str, float]:
    """Run the script that README changes, as it was and as it is then, on the network of README's code.

    Returns the accuracy of both, and of the new lines without weight reconstruction, by name.
    """
    (lines,) = re.findall(r"```diff\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.S)
    scripts = {
        name: "\n".join(line[1:] for line in lines.splitlines() if line[:1] in ("", " ", sign))
        for name, sign in (("old lines", "-"), ("new lines", "+"))
    }
    without = re.sub(r"nni_topo\.compensate\((\w+), .*?\)", r"\1", scripts["new lines"])
    accuracies = {}
    for name, script in {**scripts, "new lines without compensate": without}.items():
        settings = {
            "model": copy.deepcopy(names["model"]),
            "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}],
            "inputs": names["images"][:2],
            "batches": names["images"].split(64),
        }
        exec(compile(script, "README.md", "exec"), settings)
        accuracies[name] = names["zoo"].evaluate(settings["model"], names["data"].test)
    return accuracies


def keep_readme() -> None:
    """Run README's code and keep a line for each step of its report, and for both scripts of its diff."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            began = time.process_time()
            names = run_readme()
            seconds = time.process_time() - began
        finally:
            os.chdir(here)
    report = names["dense"].report
    milliseconds = {"unpruned": report.time.unpruned_ms, "distilled": report.time.ms}
    of_run = {
        "tested": len(names["data"].test.tensors[0]),
        "macs_before": report.stages[0].macs,
        "batch": report.time.samples,
        "held_out": report.held_out,
        "time_share": report.time.share[0],
        "cpu_seconds": seconds,
        **provenance(),
    }
    lines = []
    for stage in report.stages:
        record = {"key": [stage.network], **asdict(stage), "ms": milliseconds.get(stage.network), **of_run}
        lines.append(json.dumps(record, sort_keys=True))
    for name, accuracy in run_diff(names).items():
        record = {"key": [name], "accuracy": accuracy, "tested": of_run["tested"], **provenance()}
        lines.append(json.dumps(record, sort_keys=True))
    (RECORDS / README_RECORDS).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
