"""NNI's remote service with an SSH server that the test starts on this machine."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nni_topo.runs.experiment.manager import free_port

CONFIG = """
searchSpace:
  pruner: {{_type: choice, _value: [l1, random]}}
trialCommand: python -m nni_topo.runs.trial --limit 300 --train-epochs 4 --cache {nets}
trialCodeDirectory: {code}
trialConcurrency: 1
maxTrialNumber: 2
nniManagerIp: 127.0.0.1
tuner: {{name: GridSearch}}
experimentWorkingDirectory: {home}/nni-experiments
trainingService:
  platform: remote
  reuseMode: false
  machineList:
    - host: 127.0.0.1
      port: {port}
      user: {user}
      sshKeyFile: {home}/key
      pythonPath: {python}
"""
SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")


@pytest.fixture
def ssh_port(home):
    """Port of an SSH server that lets this user in with the key in the home folder."""
    if SSHD is None:
        pytest.skip("needs an SSH server: apt-get install openssh-server")
    if sys.platform != "linux":
        pytest.skip("the SSH server is set up for Linux only")
    folder, port = home.folder, free_port()
    for name in ("key", "host_key"):
        # NNI's SSH library reads PEM keys
        subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-m", "PEM", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copyfile(folder / "key.pub", folder / "authorized_keys")
    settings = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder}/host_key",
        f"AuthorizedKeysFile {folder}/authorized_keys",
        "PasswordAuthentication no",
        "StrictModes no",
        "PermitRootLogin prohibit-password",
        f"PidFile {folder}/sshd.pid",
        f"SetEnv HOME={folder} OMP_NUM_THREADS=1",
        "Subsystem sftp internal-sftp",
    ]
    home.write("sshd_config", "\n".join(settings) + "\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    assert server.poll() is None, f"the SSH server didn't start: {server.stderr.read().strip()}"
    yield port
    server.send_signal(signal.SIGTERM)
    server.wait()


@pytest.mark.slow
def test_two_trials_over_ssh(home, nets, ssh_port):
    (home.folder / "code").mkdir()
    # NNI refuses to send an empty folder
    home.write("code/README", "no code is needed\n")
    text = CONFIG.format(
        nets=nets,
        code=home.folder / "code",
        home=home.folder,
        port=ssh_port,
        user=getpass.getuser(),
        python=Path(sys.executable).parent,
    )
    config = home.write("config.yml", text)
    words = ["experiment", "run", str(config), "--port", str(home.port), "--out", "out", "--json"]
    done = home.topo(*words)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [trial["status"] for trial in document["trials"]] == ["SUCCEEDED"] * 2
    # the trials' files are on the other machine, so the best one was run again for the export
    assert document["best"]["metrics"]["score"] == document["best"]["result"]["default"]
    assert (home.folder / "out" / "best" / "dense.safetensors").exists()
