"""Pictures for docs/compare.md, by headless Chromium: ``python tools/screenshots.py RUN`` behind ``make docs``.

RUN is the folder of a run with its ``report.html``. Chromium has no network here: what a page needs is in its file.
"""

from __future__ import annotations

import html
import json
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


if __name__ == "__main__":
    report = Path(sys.argv[1]) / "report.html"
    picture(report, "report", (1250, 1150))
    picture(report, "report_dark", (1250, 1150), dark=True)
    picture(report, "report_phone", (390, 844))
    picture(PROJECT / "site" / "choosing" / "index.html", "site", (1300, 860))
