"""NNI's manager gets a minute to answer; an NNI that waits as long is left alone."""

from __future__ import annotations

import http.client
import inspect
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nni_node
import pytest
from nni.experiment import launcher

from nni_topo.compat import LOOPBACK, PAIRING, launching


def tries() -> Any:
    return inspect.signature(launcher._check_rest_server).parameters["retry"].default


@pytest.mark.parametrize(("retry", "expected"), [(3, 60), (90, 90)])
def test_the_number_of_tries_is_raised_and_nothing_else(
    retry: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(port: int, retry: int = retry, url_prefix: str | None = None, pause: float = 0.5) -> None:
        """Ask the manager."""

    monkeypatch.setattr(launcher, "_check_rest_server", check)
    assert launching.wait_for_manager() is (retry < 60)
    assert tries() == expected
    assert check.__defaults__ == (expected, None, 0.5)
    assert launching.wait_for_manager() is False


SERVER = """
const server = require("http").createServer((request, reply) => reply.end("done"));
server.on("upgrade", (request, socket) => socket.end("HTTP/1.1 101 Switching Protocols\\r\\n\\r\\n"));
server.listen(0, () => console.log(server.address().port));
"""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of a server under NNI's own Node, into which the script is loaded as into its manager."""
    node = Path(nni_node.__file__).with_name("node")
    with subprocess.Popen([node, f"--require={LOOPBACK}", "-e", SERVER], stdout=subprocess.PIPE, text=True) as process:
        yield int(process.stdout.readline())
        process.kill()


UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "rebound.example", "Expect": "100-continue"}, 403),
        ({"Origin": "http://localhost:9000"}, 200),
        ({"Origin": "https://other.example"}, 403),
        (UPGRADE, 101),
        ({"Host": "rebound.example", **UPGRADE}, 403),
        ({"Origin": "https://other.example", **UPGRADE}, 403),
    ],
)
def test_a_bound_manager_answers_what_names_this_machine_alone(headers: dict[str, str], status: int, port: int) -> None:
    connection = http.client.HTTPConnection("localhost", port, timeout=60)
    connection.request("GET", "/", headers=headers)
    assert connection.getresponse().status == status
    connection.close()


# A service whose trials end before the manager knows that it has stopped them.
EARLY = """
require("common/globals");
const { V3asV1 } = require("training_service/v3/compat");
const trials = { first: { status: "RUNNING" }, second: { status: "RUNNING" } };
const status = {};
const service = Object.assign(Object.create(V3asV1.prototype), {
  trialJobs: trials,
  v3: { stopTrial: async (id) => { status[id] = trials[id].isEarlyStopped ? "EARLY_STOPPED" : "USER_CANCELED"; } },
});
(async () => {
  await service.cancelTrialJob("first", true);
  await service.cancelTrialJob("second");
  console.log(JSON.stringify(status));
})();
"""


def test_what_an_assessor_ends_does_not_count_as_canceled_by_the_user():
    folder = Path(nni_node.__file__).parent
    command = [folder / "node", f"--require={PAIRING}", "-e", EARLY]
    environment = {**os.environ, "NODE_PATH": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == {"first": "EARLY_STOPPED", "second": "USER_CANCELED"}, done.stderr
