"""What NNI 3.0's manager answered in one experiment, told again over HTTP: NNI's client and ours can't tell.

The experiment: GridSearch over four ratios; two trials succeeded, one failed, one was still running.
`recorded_manager.json` holds the replies of the REST API as they came, with names in place of folders.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_suffix(".json")
SUCCEEDED = ("RVApu", "epUED")  # with scores 0.125 and 0.25
FAILED, RUNNING = "NKlsg", "LDsaB"


class Manager:
    """The replies, which a test may change, and the port at which they are given."""

    def __init__(self, trials: Path) -> None:
        text = RECORDED.read_text()
        for name, folder in (("TRIALS", trials), ("EXPERIMENTS", trials.parent), ("CODE", trials.parent)):
            text = text.replace(name, str(folder))
        self.replies: dict[str, Any] = json.loads(text)
        self.replies["experiments-info"][0]["pid"] = None  # that manager has ended
        self.port = 0

    @property
    def id(self) -> str:
        return str(self.replies["experiment"]["id"])

    def job(self, trial: str) -> dict[str, Any]:
        """A trial's row, to be changed."""
        return next(job for job in self.replies["trial-jobs"] if job["trialJobId"] == trial)

    def answer(self, what: str) -> str | None:
        if what == f"trial-file/{FAILED}/stderr":
            return str(self.replies["stderr"])
        return json.dumps(self.replies[what]) if what in self.replies else None


@contextmanager
def recorded_manager(trials: Path) -> Iterator[Manager]:
    """Answer as the manager did; ``trials`` is where the trials' folders lie."""
    manager = Manager(trials)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = manager.answer(self.path.removeprefix("/api/v1/nni/"))
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_: Any) -> None:
            """Stay silent."""

    with ThreadingHTTPServer(("localhost", 0), Handler) as server:
        manager.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield manager
        finally:
            server.shutdown()
            thread.join()
