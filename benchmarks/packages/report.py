"""Tables of ``make packages``: outcomes by package, causes, and classes that don't meet the budget.

python -m benchmarks.packages.report runs/packages.jsonl
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from nni_topo.studies.records import Record, read_records

HERE = Path(__file__).parent
RECORDS = Path(__file__).parents[1] / "records" / "packages"
SOURCE = "benchmarks/packages/report.py"
SHARE, NEAR, EQUAL = 0.5, 0.01, 1e-4
OUTPUT = "it gives the model's output"
PACKAGES = (
    "open_clip",
    "sentence-transformers",
    "transformers",
    "torchaudio",
    "torch_geometric",
    "segmentation_models_pytorch",
    "torchvision",
    "timm",
    "diffusers",
    "speechbrain",
    "monai",
)
BESIDE = "transformers, wider MLPs"
"""A set of classes beside the list, which isn't counted in all."""
ERRORS = {"refused", "raw error", "not finished"}


def outcome(record: Record) -> str:
    """Return "runs", "refused", "raw error", "not built", or "not finished" for a class that hit a limit."""
    return str(record["outcome"]) if record["status"] == "ok" else "not finished"


def package_of(record: Record) -> str:
    """Return the name of a class's package."""
    return str(record["model"]).partition("/")[0]


def is_met(record: Record) -> bool:
    """Whether the budget is met within 0.01, or within one head, group or channel of the layer where it costs most."""
    return outcome(record) == "runs" and abs(record["left"] - SHARE) <= max(NEAR, record.get("step", 0.0)) + 1e-9


def is_equal(record: Record) -> bool:
    """Whether the dense network equals the masked one on all inputs that were tried, and the masked one differs."""
    differences = record.get("differences", {})
    return bool(differences) and record.get("change", 0.0) > 0.0 and max(differences.values()) <= EQUAL


def is_saved(record: Record) -> bool:
    """Whether the smaller network is read as it was written, by its class's own means or by ours."""
    return "yes" in record.get("saved", {}).values()


def has_own(record: Record) -> bool:
    """Whether a network that ran has means of its own to be written and read."""
    return "own" in record.get("saved", {})


def tables(records: Sequence[Record], reasons: dict[str, str]) -> str:
    """Return all tables of one run of the list."""
    counted = [record for record in records if package_of(record) != BESIDE]
    counts = Counter(record["commit"] for record in records if "commit" in record)
    commits = ", ".join(f"{commit} ({count} classes)" for commit, count in counts.most_common())
    parts = [f"Recorded at {commits}."] if commits else []
    parts += [table(records, reasons), "Causes, by the number of classes:", causes_table(counted)]
    return "\n\n".join([*parts, "Classes that don't meet the budget:", missed_table(counted, reasons)])


def table(records: Sequence[Record], reasons: dict[str, str]) -> str:
    """Return the outcomes by package."""
    titles = ["package", "classes", "built", "run by default", "budget met", "or a true reason"]
    titles += ["channels offered", "requested channels removed", "equal", "saved", "by its own means"]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    groups = [(name, [record for record in records if package_of(record) == name]) for name in PACKAGES]
    counted = [record for record in records if package_of(record) != BESIDE]
    beside = [record for record in records if package_of(record) == BESIDE]
    for name, chosen in [*groups, ("all", counted), (BESIDE, beside)]:
        if chosen:
            cells = " | ".join(_cells(chosen, reasons))
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def _cells(records: Sequence[Record], reasons: dict[str, str]) -> list[str]:
    built = [record for record in records if outcome(record) != "not built"]
    ran = [record for record in built if outcome(record) == "runs"]
    pruned = [record for record in ran if record["removed"]]
    met = sum(map(is_met, built))
    explained = sum(not is_met(record) and record["model"] in reasons for record in built)
    own = [record for record in pruned if has_own(record)]
    offered = [share_offered(record) for record in ran]
    removed = [record["removed"] / record["requested"] for record in pruned]
    return [
        str(len(records)),
        str(len(built)),
        f"{len(ran)} of {len(built)}",
        f"{met} of {len(built)}",
        f"{explained} of {len(built) - met}",
        f"{sum(offered) / len(offered):.2f}" if offered else "",
        f"{sum(removed) / len(removed):.2f}" if removed else "",
        f"{sum(map(is_equal, pruned))} of {len(pruned)}",
        f"{sum(map(is_saved, pruned))} of {len(pruned)}",
        f"{sum(record['saved']['own'] == 'yes' for record in own)} of {len(own)}" if own else "",
    ]


def share_offered(record: Record) -> float:
    """Return the share of the channels of layers before the output that can be removed."""
    staying = {name: count for name, count in record["channels"].items() if name != "all"}
    outputs = sum(count for name, count in staying.items() if record["whole"][name] == OUTPUT)
    asked = record["channels"]["all"] - outputs
    return 1.0 - (sum(staying.values()) - outputs) / asked if asked else 0.0


def brief(text: str) -> str:
    """Return a reason or an error without names, numbers, shapes and places."""
    text = re.sub(r" ?\((?!\{)[^()]*(\([^()]*\)[^()]*)*\)", "", text)
    text = re.sub(r"'[^']*'", "'...'", text)
    text = re.sub(r"\[[^\]]*\]", "[...]", text)
    text = re.sub(r"\b[\w]+(\.[\w]+)+\b", "...", text)
    text = re.sub(r"\b\d[\d.e+-]*\b", "N", text)
    return text[:160]


def causes(records: Iterable[Record]) -> dict[str, list[str]]:
    """Return by cause the classes that it concerns: errors, and reasons of layers that keep all channels or some."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        kind = outcome(record)
        texts: list[str] = []
        if kind == "not finished":
            texts = [f"not finished: {brief(record['status'])}"]
        elif kind in ERRORS:
            texts = [f"{kind}: {brief(record['error'])}"]
        elif kind == "runs":
            texts += [f"stays: {brief(why)}" for why in record["whole"].values() if why != OUTPUT]
            texts += [f"stays in part: {brief(why)}" for why in record["kept"].values()]
            if record["removed"] and not is_equal(record):
                texts.append("dense differs from masked, or doesn't run")
            if record["removed"] and not is_saved(record):
                texts.append("can't be saved and loaded")
        for text in texts:
            found.setdefault(text, {})[record["model"]] = None
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return {text: list(models) for text, models in ordered}


def causes_table(records: Sequence[Record]) -> str:
    """Return the causes, those of the most classes first, and how many of their classes miss the budget."""
    missed = {record["model"] for record in records if not is_met(record)}
    lines = ["| cause | classes | of them without the budget | for example |", "|---|---:|---:|---|"]
    for text, models in causes(records).items():
        without = sum(model in missed for model in models)
        lines.append(f"| {text.replace('|', chr(92) + '|')} | {len(models)} | {without} | {', '.join(models[:3])} |")
    return "\n".join(lines)


def missed_table(records: Sequence[Record], reasons: dict[str, str]) -> str:
    """Return each built class that doesn't meet the budget, what is left, what it says, and whether that is true."""
    lines = ["| class | MACs left | what is said | true reason |", "|---|---:|---|---|"]
    for record in records:
        kind = outcome(record)
        if kind == "not built" or is_met(record):
            continue
        if kind == "runs":
            counts = Counter(brief(why) for why in record["whole"].values() if why != OUTPUT)
            said = "; ".join([record["why"], *(why for why, _ in counts.most_common(2))])
        else:
            said = record["status"] if kind == "not finished" else record["error"]
        left = f"{record['left']:.3f}" if kind == "runs" else ""
        cells = [record["model"], left, said.replace("|", r"\|")[:400], reasons.get(record["model"], "no")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def not_built(records: Sequence[Record]) -> str:
    """Return the classes that can't be built here, and why."""
    lines = ["| class | why |", "|---|---|"]
    lines += [f"| {each['model']} | {each['error'][:200]} |" for each in records if outcome(each) == "not built"]
    return "\n".join(lines)


def signed(path: Path = HERE / "reasons.txt") -> dict[str, str]:
    """Return by class the sentence that says why its reason is true, of those that were looked at."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pairs = [line.split(": ", 1) for line in lines if line and not line.startswith("#")]
    return dict(pairs)


def of_file(name: str) -> list[Record]:
    """Return the records of a run, in the order of the list."""
    return sorted(
        read_records(RECORDS / name),
        key=lambda record: ((*PACKAGES, BESIDE).index(package_of(record)), record["model"]),
    )


def losses(records: Sequence[Record], before: Sequence[Record]) -> list[str]:
    """Return what a class does no more: run, meet the budget, equal the masked network, or be saved."""
    now = {record["model"]: record for record in records}
    checks: dict[str, Callable[[Record], bool]] = {
        "runs": lambda record: outcome(record) == "runs",
        "meets the budget": is_met,
        "equals the masked network": is_equal,
        "is saved": is_saved,
    }
    return [
        f"{record['model']} no longer {what}"
        for record in before
        for what, check in checks.items()
        if record["model"] in now and check(record) and not check(now[record["model"]])
    ]


def main(path: Path) -> int:
    """Print the tables of a file, and what it has lost."""
    records = list({record["model"]: record for record in read_records(path)}.values())
    print(tables(records, signed()))
    lost = losses(records, of_file("last.jsonl"))
    print(*lost, sep="\n")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
