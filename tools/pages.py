"""Pages of the site that lie elsewhere in the project, or follow from its code; a hook of MkDocs, see mkdocs.yml."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
_TITLES = {
    "comparisonplan": "A plan of `compare`",
    "modelchoice": "An entry of `models`",
    "datachoice": "An entry of `data`",
    "prunerchoice": "An entry of `pruners`",
    "target": "An entry of `targets`, as `{flops: 0.25}`",
    "compensationchoice": "`compensate`",
    "distillationchoice": "`distill`",
    "pruneconfig": "A file for `prune`",
}
ELSEWHERE = {
    "results.md": "benchmarks/RESULTS.md",
    **{
        f"{folder}/{page.name}": f"benchmarks/{folder}/{page.name}"
        for folder in ("results", "archive")
        for page in PROJECT.glob(f"benchmarks/{folder}/*.md")
    },
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and the pictures of the figures' page."""
    from mkdocs.structure.files import File  # the site's own environment has it, the tests' hasn't

    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=relinked((PROJECT / source).read_text(), source)))
    for picture in PROJECT.glob("benchmarks/*/*.png"):
        files.append(File.generated(config, f"{picture.parent.name}/{picture.name}", abs_src_path=str(picture)))
    files.append(File.generated(config, "api.md", content=api()))
    files.append(File.generated(config, "verbs.md", content=verbs()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links that leave the folder of the pages lead to the pages made of those files."""
    return markdown if page.file.generated_by else relinked(markdown, f"docs/{page.file.src_uri}")


def relinked(text: str, source: str) -> str:
    """Return a file's text with its links as seen from its page; what isn't part of the site is named only."""
    pages = {source: page for page, source in ELSEWHERE.items()} | {"README.md": "index.md"}
    top = "../" if source.startswith(("benchmarks/results/", "benchmarks/archive/")) else ""

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found[1], found[2], found[3] or ""
        if re.match(r"https?:|#|mailto:", target) or not target:
            return found[0]
        place = (PROJECT / source).parent.joinpath(target).resolve()
        inside = place.is_relative_to(PROJECT) and place.relative_to(PROJECT).as_posix()
        if inside in pages:
            return f"{words}({top}{pages[inside]}{anchor})"
        # of the benchmarks' pages only those above are part of the site
        for folder, suffixes in (("docs", (".md", ".png", ".ipynb")), ("benchmarks", (".png",))):
            if inside and inside.startswith(f"{folder}/") and place.suffix in suffixes:
                return f"{words}({top}{inside.removeprefix(f'{folder}/')}{anchor})"
        return re.sub(r"^!?\[(.*)\]$", r"\1", words)

    return re.sub(r"(!?\[[^\]]*\])\(([^)#\s]*)(#[^)]*)?\)", link, text)


def api() -> str:
    """Return the page of the public names, by what `nni_topo` lists."""
    tree = ast.parse((PROJECT / "nni_topo" / "__init__.py").read_text())
    homes = {
        alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nni_topo.")
        for alias in node.names
    }
    listed = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    homes |= {name: f"nni_topo.runs.{name}.{name}" for name in ("frontier", "shrink")}
    homes["shrink_pretrained"] = "nni_topo.runs.streaming.shrinking.shrink_pretrained"
    names = [name for name in listed if name in homes and not (PROJECT / homes[name].replace(".", "/")).is_dir()]
    parts = ["# The public names", "", *(f"::: {homes[name]}\n" for name in names if name != "__version__")]
    return "\n".join(parts)


def verbs() -> str:
    """Return the page of the command line: each verb's flags with what the comments behind the fields say."""
    parts = [
        "# The command line",
        "",
        "Every verb takes `--json`, `--seed` and `--device`; `nni-topo VERB --help` says the same.",
        "",
    ]
    for path in sorted(PROJECT.glob("nni_topo/cli/*.py")) + sorted(PROJECT.glob("nni_topo/studies/analysis/**/*.py")):
        for name, summary, flags in _classes(path.read_text()):
            if path.parent.name != "cli" and not name.startswith("analyze "):
                continue
            group = "experiment " if path.stem == "experiment" else ""
            parts += [f"## {group}{name}", "", summary, "", "| flag | default | |", "|---|---|---|", *flags, ""]
    parts += ["## YAML", "", "Keys of a plan for `compare`, of a file for `prune`, and of the mappings in them."]
    parts += ["`configs/` of the sources has a commented file per use. A study's plan has its flags as keys.", ""]
    texts = [(PROJECT / "nni_topo" / path).read_text() for path in ("studies/plan.py", "runs/choices.py")]
    for name, summary, keys in [found for text in texts for found in _classes(text, of_verbs=False)]:
        if name != "cell":
            parts += [f"### {_TITLES[name]}", "", summary, "", "| key | default | |", "|---|---|---|", *keys, ""]
    return "\n".join(parts)


def _classes(text: str, *, of_verbs: bool = True) -> Iterator[tuple[str, str, list[str]]]:
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ClassDef) or of_verbs != any(
            "Verb" in ast.unparse(b) or "Study" in ast.unparse(b) for b in node.bases
        ):
            continue
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        flags = []
        for item in fields:
            default = "" if item.value is None else f"`{ast.unparse(item.value)}`"
            said = lines[item.lineno - 1].partition("  # ")[2]
            name = ast.unparse(item.target)
            flags.append(f"| `{name.replace('_', '-') if of_verbs else name}` | {default} | {said} |")
        if flags and not node.name.startswith("_"):
            title = re.sub(r"^Analyze", "analyze ", node.name).lower()
            yield title, (ast.get_docstring(node) or "").partition("\n")[0], flags
