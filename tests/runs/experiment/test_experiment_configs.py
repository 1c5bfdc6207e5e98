"""NNI takes every file in configs/experiments, and the trial program takes what NNI would give it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml
from nni.experiment.config import ExperimentConfig

from nni_topo.errors import ConfigError
from nni_topo.runs.experiment.manager import load_experiment
from nni_topo.runs.trial import parsed, with_parameters

FOLDER = Path(__file__).parents[3] / "configs" / "experiments"
FILES = sorted(FOLDER.glob("*.yml"))


@pytest.fixture(autouse=True)
def _key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_rsa").write_text("")


def commands(config: dict) -> list[str]:
    """Every command that starts a trial."""
    service = config["trainingService"]
    roles = [*service.get("taskRoles", ()), *(service[role] for role in ("master", "worker") if role in service)]
    return [config["trialCommand"]] if "trialCommand" in config else [role["command"] for role in roles]


def proposals(space: dict) -> list[dict]:
    """The first and the last proposal of a search space."""
    first, last = {}, {}
    for name, part in space.items():
        assert part["_type"] in ("choice", "uniform", "loguniform")
        first[name], last[name] = part["_value"][0], part["_value"][-1]
    return [first, last]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
class TestEveryFile:
    def test_nni_validates_it(self, path):
        config = load_experiment(path)
        assert isinstance(config, ExperimentConfig)
        assert config.json()["trialConcurrency"] >= 1
        assert config.max_trial_number
        assert config.max_experiment_duration

    def test_the_trial_program_takes_its_commands_and_proposals(self, path):
        config = yaml.safe_load(path.read_text())
        for command in commands(config):
            words = shlex.split(command)
            given = parsed(words[words.index("nni_topo.runs.trial") + 1 :])
            for parameters in proposals(config["searchSpace"]):
                assert with_parameters(given, parameters).cell().key

    def test_the_head_says_how_to_run_it_safely(self, path):
        head = path.read_text().split("\n\n")[0]
        assert f"nnictl create --config configs/experiments/{path.name}" in head
        assert "ALL interfaces" in head


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("maxTrialNumber", "maxTrials"), "maxtrials"),
        (("platform: local", "platform: locally"), "is_missing|platform|locally"),
        (("trialConcurrency: 2", "trialConcurrency: 0"), "assert self.trial_concurrency > 0"),
    ],
)
def test_what_nni_refuses_is_a_clear_error(change, message, tmp_path):
    path = tmp_path / "bad.yml"
    path.write_text((FOLDER / "tpe_ratios.yml").read_text().replace(*change))
    with pytest.raises(ConfigError, match=message):
        load_experiment(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_experiment(tmp_path / "missing.yml")


def test_a_remote_file_without_a_key_is_refused(tmp_path):
    (tmp_path / ".ssh" / "id_rsa").unlink()
    with pytest.raises(ConfigError, match="SSH key file"):
        load_experiment(FOLDER / "remote.yml")
