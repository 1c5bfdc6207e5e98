"""The pages do what they say: snippets run, links lead somewhere, the shelves hold every page."""

from __future__ import annotations

import builtins
import configparser
import importlib.util
import linecache
import os
import re
import subprocess
import symtable
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from markdown_sections import sections

import nni_topo
from benchmarks import quotes
from benchmarks.quoted import README_RECORDS, read
from nni_topo import zoo
from nni_topo.cli import main
from nni_topo.pruners.registry import PRUNERS
from nni_topo.recovery.registry import RECOVERIES
from nni_topo.testing import STRUCTURED_CHECKS
from tools import transcript

PROJECT = Path(__file__).parent.parent


PAGES = sorted([*PROJECT.glob("docs/*.md"), PROJECT / "README.md", PROJECT / "CONTRIBUTING.md"])
# what a page's snippets take for granted beside a model of the digits, its images, batches and a
# config_list; None: nothing
YOURS = {
    "how_it_works": None,
    "clustering": "",
    "energy": "",
    "experiments": """
from dask.distributed import LocalCluster
scheduler = LocalCluster(n_workers=1, processes=False, dashboard_address=None)
""",
    "export": None,
    "from_file": None,
    "faq": """
class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.mix, self.head = nn.Linear(6, 24), nn.Linear(24, 32), nn.Linear(32, 4)

    def forward(self, frame, state):
        state = torch.tanh(self.mix(torch.relu(self.enter(frame))) + 0.5 * state)
        return self.head(state), state

stream, frames, new = Stream().eval(), torch.randn(16, 12, 6), torch.randn(8, 30, 6)
labels = targets[:16]
""",
    "how_small": "batches = data.train.tensors[0][:240].split(64)",
    "larger_than_memory": None,
    "magnitude": """
from nni_topo.runs.evaluators import recipe_evaluator
evaluate = lambda net: zoo.evaluate(net, data.test)
my_evaluator = lambda net: recipe_evaluator(net, data, zoo.Recipe(epochs=1, batch_size=32))
""",
    "own_operator": None,
    "own_pruner": None,
    "own_recovery": None,
    "recovery": "batches = batches[:1]",
    "reliability": None,
    "topological": "",
    "topology_of_weights": """
from nni_topo.runs.evaluators import recipe_evaluator
weight = torch.randn(100, 784)
evaluator = recipe_evaluator(model, data, zoo.Recipe(epochs=1, batch_size=32))

def train():
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.nn.functional.cross_entropy(model(images), targets[:16]).backward()
    optimizer.step()
""",
    "transformers": None,
}
NEEDED = {
    "export": ["onnxruntime"],
    "experiments": ["distributed"],
    "larger_than_memory": ["accelerate"],
    "transformers": ["transformers"],
}  # packages
SLOW = ("export", "how_small", "larger_than_memory", "magnitude", "recovery", "transformers")


def snippets(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


def yours(stem):
    """The names that a page's snippets take for granted."""
    if YOURS.get(stem) is None:
        return {"__name__": stem}
    data = zoo.load_data("digits", limit=256)
    model = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0).eval()
    inputs, targets = data.train.tensors
    images, batches = inputs[:16], inputs.split(64)
    labelled = list(zip(batches, targets.split(64), strict=True))
    asked = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    config_list = nni_topo.dependency_groups(model, images, asked)
    names = {**globals(), **locals(), "nn": torch.nn, "__name__": stem}
    exec(YOURS[stem], names)
    return names


def run(path, tmp_path, monkeypatch):
    for needed in NEEDED.get(path.stem, []):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    # Dataclasses look their module up, and paths lead into it, as a page's are in a file of the reader's.
    name = f"{path.stem}_page" if importlib.util.find_spec(path.stem) else path.stem  # which would hide a package
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    for registry in (PRUNERS, RECOVERIES):  # a page registers classes of its own
        monkeypatch.setattr(registry, "table", dict(registry.table))
    names = vars(module)
    names.update(yours(path.stem), __name__=name)
    for number, snippet in enumerate(snippets(path)):
        # PyTorch reads the source of an operator, and a page isn't Python.
        place = f"{path}, snippet {number}"
        monkeypatch.setitem(linecache.cache, place, (len(snippet), None, snippet.splitlines(keepends=True), place))
        exec(compile(snippet, place, "exec"), names)
    if path.stem == "experiments":
        names["scheduler"].close()
    return names


def words(text):
    """A transcript's lines, without what depends on the processor."""
    lines = [line for line in text.splitlines() if not re.search("[\u2500-\u257f]", line)]  # a table's cells wrap
    # whether distillation helps, and whether its figures disagree
    lines = [line for line in lines if not re.match(r"distillation is (kept|discarded): ", line)]
    lines = [line.replace("distilled (discarded)", "distilled") for line in lines]
    return [re.sub(r"[-+]?\d+(\.\d+)?(e[-+]\d+)?", "#", " ".join(line.split())) for line in lines]


@pytest.mark.slow
def test_the_roads_of_a_new_user_run_in_an_empty_folder_and_print_what_the_page_says(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("transformers")
    page = (PROJECT / "docs" / "start.md").read_text(encoding="utf-8")
    found = transcript.transcribed(page, tmp_path)

    def accuracy(step):
        return float(re.search(rf"^{step}: ([\d.]+)", found, re.M)[1])

    assert words(found) == words(page)
    assert accuracy("trained") > 0.8
    assert accuracy("fine-tuned") > accuracy("trained") - 0.05
    assert accuracy("ReconstructionPruner") > accuracy("L1NormPruner")
    assert float(re.search(r"intermediate_size \d+, largest difference (\S+)", found)[1]) < 1e-5
    assert (tmp_path / "small" / "report.html").exists()


@pytest.mark.slow
def test_the_comparison_runs_in_an_empty_folder_and_prints_what_the_page_says(tmp_path):
    page = (PROJECT / "docs" / "compare.md").read_text(encoding="utf-8")
    found = transcript.transcribed(page, tmp_path)
    assert words(found) == words(page)
    assert all(re.search(rf"^│ {name} ", found, re.M) for name in ("unpruned", "reconstruction", "l1", "fpgm"))
    assert (tmp_path / "runs" / "digits" / "report.html").exists()


@pytest.mark.slow
def test_the_pages_evaluators_print_what_the_page_says(tmp_path):
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("transformers")
    page = (PROJECT / "docs" / "migrating.md").read_text(encoding="utf-8")
    found = transcript.transcribed(page, tmp_path)
    assert words(found) == words(page)
    widths = r"Conv2d\(.*|Linear\(.*|\w+Pruner \[.*"
    assert re.findall(widths, found) == re.findall(widths, page)
    assert float(re.search(r"^accuracy of the dense network: ([\d.]+)", found, re.M)[1]) > 0.9


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in YOURS])
@pytest.mark.quick_every(12)
def test_snippets_of_a_page_run_one_after_the_other(name, tmp_path, monkeypatch, capsys):
    page = PROJECT / "docs" / f"{name}.md"
    run(page, tmp_path, monkeypatch)
    if name == "how_it_works":
        printed = capsys.readouterr().out
        assert "stem " in printed
        assert printed in page.read_text(encoding="utf-8")


def test_no_page_has_snippets_that_no_test_runs():
    # of CONTRIBUTING by tests/cli/test_verbs.py, of the networks from wheels by tests/test_trained.py, of runtimes by
    # tests/test_runtimes.py, of ultralytics by tests/test_ultralytics.py, of the others here
    elsewhere = {"start", "config_list", "six_jobs", "README", "CONTRIBUTING", "cnn_from_a_wheel", "embedding_model"}
    elsewhere |= {"migrating", "runtimes", "ultralytics"}
    assert {path.stem for path in PAGES if snippets(path)} == YOURS.keys() | elsewhere


@pytest.mark.slow
def test_the_conformance_suite_passes_under_pytest_as_the_page_shows_it(tmp_path):
    (snippet,) = snippets(PROJECT / "docs" / "reliability.md")
    (tmp_path / "test_mine.py").write_text(snippet)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "test_mine.py"]
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert f"{len(STRUCTURED_CHECKS)} passed" in done.stdout, done.stdout


def test_caps_and_floors_hold_under_a_budget_as_the_page_says(tmp_path, monkeypatch):
    masks = run(PROJECT / "docs" / "config_list.md", tmp_path, monkeypatch)["masks"]
    kept = {name: int(found["weight"].flatten(1).amax(1).sum()) for name, found in masks.items()}
    assert kept["0"] >= 12
    assert kept["2"] <= 8


def test_snippets_of_the_readme_run_and_report_what_their_record_says(tmp_path, monkeypatch):
    names = run(PROJECT / "README.md", tmp_path, monkeypatch)
    assert {path.name for path in tmp_path.iterdir()} == {"small.safetensors", "small.pt2"}
    records = read(README_RECORDS)  # tests/test_quotes.py holds README's output against it
    stages = names["dense"].report.stages
    for stage, record in zip(stages, records[: len(stages)], strict=True):
        assert (stage.network, stage.macs, stage.params) == (record["network"], record["macs"], record["params"])
        near = 0.15 if stage.network == "pruned" else 0.03  # other processors train another network
        assert (stage.accuracy, stage.agreement) == pytest.approx((record["accuracy"], record["agreement"]), abs=near)
    recorded = {record["key"][0]: record["accuracy"] for record in records[len(stages) :]}
    found = quotes.run_diff(names)
    assert found.keys() == recorded.keys()
    assert found["new lines"] == pytest.approx(recorded["new lines"], abs=0.03)
    assert found["old lines"] < found["new lines"] - 0.1


JOBS = PROJECT / "docs" / "six_jobs.md"
LIBRARIES = ("NNI", "Torch-Pruning", "ModelOpt", "Here")


def jobs():
    """Each job's own text before the first library, and the code of each library, by its name in bold."""
    found = {}
    for section in JOBS.read_text(encoding="utf-8").split("\n## ")[1:]:
        head, _, text = section.partition("\n")
        own = re.findall(r"```python\n(.*?)```", text.partition("\n**")[0], re.S)
        codes = {}
        for said, code in re.findall(r"\n(\*\*[^\n]*)\n\n```\w+\n(.*?)```", text, re.S):
            codes |= dict.fromkeys(re.findall(r"\*\*([\w-]+)\*\*", said), code)
        found[head] = ("".join(own), codes)
    return found


def test_the_table_of_six_jobs_counts_the_lines_below_it():
    def count(code):
        lines = [line.strip() for line in code.splitlines()]
        return len([line for line in lines if line and not line.startswith(("import ", "from ", "#"))])

    rows = re.findall(r"^\| \[(.*?)\]\(.*?\) \|(.*)\|$", JOBS.read_text(encoding="utf-8"), re.M)
    table = {job.capitalize(): [cell.strip() for cell in cells.split("|")] for job, cells in rows}
    written = {
        job.capitalize(): [str(count(codes[name])) if name in codes else "" for name in LIBRARIES]
        for job, (_, codes) in jobs().items()
    }
    assert len(written) == 6
    assert all(codes.keys() <= {*LIBRARIES} for _, codes in jobs().values())
    assert table == written


@pytest.mark.slow
def test_the_six_jobs_run(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch_pruning")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "six_jobs"}
    exec(snippets(JOBS)[0], names)
    for job, (own, codes) in jobs().items():
        exec(own, names)
        for library, code in codes.items():
            if code.startswith("nni-topo "):
                assert main([*code.split()[1:], "--train-epochs", "1"]) == 0
            elif library != "ModelOpt":
                exec(compile(code, f"{job}, {library}", "exec"), names)
    assert names["done"].int8_distance < 0.1


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)]*)\)", text):
        place = path.parent / target if target else path
        assert place.exists(), f"{target} ({path.name})"
        assert not anchor or anchor in sections(place), f"{target}#{anchor} ({path.name})"


def test_the_page_of_the_installation_has_every_required_package_and_extra():
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    required = {re.match(r"[\w-]+", line)[0] for line in lines if line[:1].isalpha()}
    page = (PROJECT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*`) \|", page, re.M)
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    extras = {"bench", "export", "runtimes", "evaluators", "dask"}
    assert named == required | extras
    assert extras <= {line.partition(" ")[0] for line in setup["options.extras_require"]}


def test_every_page_that_installs_says_so_with_the_same_words():
    for path in PAGES:
        for line in re.findall(r"^git clone.*", path.read_text(encoding="utf-8"), re.M):
            assert line.startswith("git clone REPOSITORY nni_topo && cd nni_topo"), path


def test_cells_of_the_first_page_are_short():
    for line in (PROJECT / "README.md").read_text(encoding="utf-8").splitlines():
        for cell in line.strip("|").split("|") if line.startswith("|") else ():
            assert len(re.sub(r"\]\([^)]*\)", "]", cell).split()) <= 12, cell


def test_the_site_has_every_page_and_groups_of_at_most_six_that_tell_how_to():
    nav = yaml.safe_load((PROJECT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2])

    def pages(entry):
        values = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else None
        return [entry] if values is None else [page for value in values for page in pages(value)]

    named = pages(nav)
    made = {"api.md", "verbs.md", "results.md", "contributing.md", "changelog.md"}
    results = {f"results/{path.name}" for path in PROJECT.glob("benchmarks/results/*.md")}
    assert sorted(named) == sorted({path.name for path in PROJECT.glob("docs/*.md")} | made | results)
    (how_to,) = (entry["How to"] for entry in nav if "How to" in entry)
    assert all(len(pages(group)) <= 6 for group in how_to)


def names_of(code: str) -> tuple[set[str], set[str]]:
    """The names that a block reads and that Python doesn't have, and those that it defines."""
    read, defined = set(), set()

    def walk(table, *, is_top):
        for symbol in table.get_symbols():
            if is_top and (symbol.is_assigned() or symbol.is_imported()):
                defined.add(symbol.get_name())
            if symbol.is_referenced() and (is_top or symbol.is_global()):
                read.add(symbol.get_name())
        for child in table.get_children():
            walk(child, is_top=False)

    walk(symtable.symtable(code, "block", "exec"), is_top=True)
    return read - {*dir(builtins)}, defined


@pytest.mark.parametrize(
    "page", [page for page in PAGES if snippets(page) and page.stem != "CONTRIBUTING"], ids=lambda page: page.stem
)
def test_a_block_that_uses_what_no_block_defines_begins_with_what_is_the_readers(page):
    known = {"__name__"}
    for code in snippets(page):
        read, defined = names_of(code)
        told = set(re.findall(r"(\w+):", re.match(r"(?:#.*\n)*", code)[0]))
        assert read - known - defined <= told, f"{page.name}: {code.partition(chr(10))[0]}"
        known |= defined
