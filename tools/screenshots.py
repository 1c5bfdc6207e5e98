"""Pictures for the pages, by headless Chromium: ``python tools/screenshots.py RUN`` after ``make docs``.

RUN is the folder of a comparison with its ``report.html``; the other reports are made beside it. Chromium has no
network here: what a page needs is in its file.
"""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

PROJECT = Path(__file__).parents[1]
FIGURES = PROJECT / "docs" / "figures"
BAR = 200  # pixels of a window's height that a page may not get
FRONTIER = """
import nni_topo
from nni_topo import zoo

data = zoo.load_data("digits")
model = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0)
zoo.train(model, data, zoo.Recipe(epochs=10, batch_size=32), seed=0)
batches = data.train.tensors[0].split(64)
found = nni_topo.frontier(model, batches, shares=(0.5, 0.25, 0.1, 0.05, 0.03), time=True)
open("sizes.html", "w", encoding="utf-8").write(found.to_html())
"""
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"
FRAME = """<iframe src="{page}" style="width:{width}px;height:900px;border:0"></iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, style = getComputedStyle(page.body);
  page.querySelectorAll("details").forEach(part => part.open = true);
  document.title = JSON.stringify({{
    wide: page.documentElement.scrollWidth, text: page.body.innerText, paper: style.backgroundColor,
    broken: [...page.images].filter(image => !image.naturalWidth).length,
  }});
}};
</script>"""


def chromium(*words: str) -> str:
    """Run headless Chromium without a network; return what it prints."""
    base = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", OFFLINE]
    with tempfile.TemporaryDirectory() as profile:
        words = (f"--user-data-dir={profile}", *words)
        done = subprocess.run([*base, *words], capture_output=True, text=True, check=True, timeout=300)
    return done.stdout


def scheme(dark: bool) -> str:
    """Return the flag for the colours that a reader prefers."""
    return f"--blink-settings=preferredColorScheme={0 if dark else 1}"


def facts(page: Path, *, width: int, dark: bool) -> dict[str, Any]:
    """Return how wide a page is in a window of a width, its text, its background, and the number of broken pictures.

    Folded parts are opened.
    """
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(FRAME.format(page=page.resolve().as_uri(), width=width))
        flags = ("--allow-file-access-from-files", "--virtual-time-budget=10000", "--dump-dom", scheme(dark))
        shown = chromium(*flags, frame.as_uri())
    title = re.search(r"<title>(.*?)</title>", shown, re.S)
    return json.loads(html.unescape(title[1]))


def picture(page: Path, name: str, size: tuple[int, int], *, dark: bool = False) -> None:
    """Write a picture of a page's top."""
    path = FIGURES / f"{name}.png"
    window = f"--window-size={size[0]},{size[1] + BAR}"
    chromium(scheme(dark), "--virtual-time-budget=10000", f"--screenshot={path}", window, page.resolve().as_uri())
    Image.open(path).crop((0, 0, *size)).save(path, optimize=True)


def other_reports(folder: Path) -> dict[str, Path]:
    """Run a shrink, a frontier and an experiment of eight trials in a folder; return their reports by name."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "nni_topo"]
    settings = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}, "check": True}
    words = ["shrink", "--model", "small_cnn", "--data", "digits", "--flops", "0.25", "--images", "512"]
    subprocess.run([*command, *words, "--out", "small"], **settings)
    subprocess.run([sys.executable, "-c", FRONTIER], **settings)
    plan = (PROJECT / "configs" / "experiments" / "tpe_ratios.yml").read_text(encoding="utf-8")
    for name, number in (("maxTrialNumber", 8), ("trialConcurrency", 1), ("n_startup_jobs", 3)):
        plan = re.sub(rf"{name}: \d+", f"{name}: {number}", plan)
    (folder / "ratios.yml").write_text(plan, encoding="utf-8")
    subprocess.run([*command, "experiment", "run", "ratios.yml", "--out", "ratios"], **settings)
    return {
        "report_shrink": folder / "small" / "report.html",
        "report_frontier": folder / "sizes.html",
        "report_experiment": folder / "ratios" / "report.html",
    }


if __name__ == "__main__":
    report = Path(sys.argv[1]) / "report.html"
    picture(report, "report", (1280, 1150))
    picture(report, "report_dark", (1280, 1150), dark=True)
    picture(report, "report_phone", (390, 844))
    for name, page in other_reports(Path(sys.argv[1]).parent / "others").items():
        picture(page, name, (1280, 860))
    picture(PROJECT / "site" / "choosing" / "index.html", "site", (1300, 860))
