from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import nni_topo
from nni_topo import zoo
from nni_topo.disk import is_held
from nni_topo.errors import ConfigError, DataError
from nni_topo.runs import trial
from nni_topo.runs.choices import DataChoice, ModelChoice
from nni_topo.runs.run import load_model_data
from nni_topo.runs.trial import main, reported, run_trial

FILES = {"settings.json", "masks.pt", "dense.safetensors", "config_list.json", "metrics.json"}
SMALL_WORDS = ["--limit", "300", "--train-epochs", "4"]


def files(folder):
    return {path.name for path in folder.iterdir()} - {".lock"}


def whole_net():
    return zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8)


def test_a_trial_leaves_a_net_that_does_what_its_metrics_say(settings, nets, tmp_path):
    told = []
    metrics = run_trial(
        settings, tmp_path / "trial", cache=nets, report=lambda step, result: told.append((step, result))
    )
    assert files(tmp_path / "trial") == FILES
    assert json.loads((tmp_path / "trial" / "metrics.json").read_text()) == metrics
    dense = nni_topo.load(tmp_path / "trial" / "dense.safetensors", whole_net)
    data = load_model_data(ModelChoice("small_cnn"), DataChoice("digits", limit=300))
    assert zoo.evaluate(dense, data.test) == metrics["test_accuracy"]
    assert zoo.evaluate(dense, data.validation) == metrics["accuracy"] == metrics["score"]
    assert [step for step, _ in told] == [0, 1]
    assert told[0][1]["accuracy"] == metrics["accuracy_pruned"]
    assert told[1][1] == {"default": metrics["score"], "accuracy": metrics["accuracy"]}
    assert metrics["flops"] < 0.4 * metrics["flops_before"]


def test_the_config_list_leads_nnis_own_pruner_to_the_same_widths(settings, nets, tmp_path):
    metrics = run_trial(dataclasses.replace(settings, flops=0.3), tmp_path / "trial", cache=nets)
    assert metrics["flops_share"] == pytest.approx(0.3, abs=0.01)
    assert metrics["budget"] == {
        "kind": "flops",
        "asked": 0.3,
        "left": pytest.approx(metrics["flops_share"]),
        "is_met": True,
        "why": "",
    }
    net, images = whole_net(), torch.randn(2, 1, 8, 8)
    config_list = json.loads((tmp_path / "trial" / "config_list.json").read_text())
    pruner = nni_topo.create_pruner("l1", net, config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(net, images, masks)
    widths = {
        n: m.weight.shape[0] for n, m in dense.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    }
    assert widths == metrics["widths"]


def test_ratios_are_proportions_under_a_budget(settings, nets, tmp_path):
    ratios = {"features.conv1": 0.0, "features.*": 0.6, "classifier.fc1": 0.9}
    tried = dataclasses.replace(settings, flops=0.2, ratios=ratios, retrain_epochs=0)
    metrics = run_trial(tried, tmp_path / "trial", cache=nets)
    assert metrics["flops_share"] == pytest.approx(0.2, abs=0.01)
    widths = metrics["widths"]
    assert widths["features.conv1"] / 16 > widths["features.conv3"] / 64 > widths["classifier.fc1"] / 64
    wrong = dataclasses.replace(settings, ratios={"features.conv9": 0.5})
    with pytest.raises(ConfigError, match="did you mean features"):
        run_trial(wrong, tmp_path / "wrong", cache=nets)


def test_the_score_is_accuracy_less_what_size_and_time_cost(settings, nets, tmp_path):
    weighed = dataclasses.replace(settings, flops_weight=0.2, latency_weight=0.1, retrain_epochs=0, compensate=128)
    metrics = run_trial(weighed, tmp_path / "trial", cache=nets)
    price = 0.2 * metrics["flops_share"] + 0.1 * metrics["latency_share"]
    assert metrics["score"] == pytest.approx(metrics["accuracy"] - price)
    assert metrics["latency_share"] == pytest.approx(metrics["latency_ms"] / metrics["latency_before_ms"])
    assert set(reported(metrics)) == {"default", "accuracy", "flops_share", "latency_share"}


@pytest.mark.slow
def test_a_trial_may_distil_behind_compensation(settings, nets, tmp_path):
    small = dataclasses.replace(settings, limit=1000, ratio=0.85, retrain_epochs=0, compensate=128)
    plain = run_trial(small, tmp_path / "plain", cache=tmp_path)
    distilled = run_trial(dataclasses.replace(small, distill=1000), tmp_path / "distilled", cache=tmp_path)
    assert distilled["accuracy"] > plain["accuracy"]
    assert distilled["flops_share"] == plain["flops_share"]


def test_a_finished_trial_isnt_run_again_and_another_one_is_refused(settings, nets, tmp_path):
    first = run_trial(settings, tmp_path / "trial", cache=nets)
    began = time.perf_counter()
    assert run_trial(settings, tmp_path / "trial", cache=tmp_path / "none") == first
    assert time.perf_counter() - began < 1.0
    with pytest.raises(ConfigError, match="must hold one trial, got another one, with other ratio, seed"):
        run_trial(dataclasses.replace(settings, ratio=0.6, seed=1), tmp_path / "trial", cache=nets)


def test_pruners_of_single_weights_are_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="must remove whole channels, got 'level'"):
        run_trial(dataclasses.replace(settings, pruner="level"), tmp_path / "trial")


@pytest.mark.slow
def test_a_checkpoint_of_ones_own(settings, nets, tmp_path):
    (checkpoint,) = (nets / "checkpoints").glob("*seed0.pt")
    given = dataclasses.replace(settings, checkpoint=str(checkpoint))
    metrics = run_trial(given, tmp_path / "given", cache=tmp_path / "unused")
    assert not (tmp_path / "unused").exists()
    assert metrics["accuracy"] == run_trial(settings, tmp_path / "found", cache=nets)["accuracy"]


@pytest.mark.slow
def test_a_killed_trial_goes_on_to_the_same_result(nets, tmp_path, capsys):
    params = tmp_path / "params.json"
    params.write_text(json.dumps({"ratio": 0.5, "retrain_epochs": 60}))
    words = ["--params", str(params), "--cache", str(nets), *SMALL_WORDS]
    words_of_killed = [*words, "--out", str(tmp_path / "killed")]
    command = [sys.executable, "-m", "nni_topo.runs.trial", *words_of_killed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        lines = [json.loads(process.stdout.readline()) for _ in range(4)]
        process.send_signal(signal.SIGKILL)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"retraining.pt", "pruned.pt"} < files(tmp_path / "killed")
    assert main(words_of_killed) == 0
    steps = [json.loads(line).get("step") for line in capsys.readouterr().out.splitlines()]
    assert steps[0] >= 4
    assert steps[-2:] == [60, None]
    assert files(tmp_path / "killed") == FILES
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    killed, whole = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("killed", "whole"))
    assert killed["accuracy"] == whole["accuracy"]
    kept = [load_file(tmp_path / name / "dense.safetensors") for name in ("killed", "whole")]
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[1])


def tiny_disk(command, folder, kilobytes):
    """Run a command with a file system of a few kilobytes at a folder, in a mount namespace of its own."""
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {folder} && exec {command}"
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", mount], capture_output=True, text=True
    )


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("unshare") is None or tiny_disk("true", folder, 64).returncode:
        pytest.skip(
            "a small file system needs unshare and mount in a namespace of one's own, which this system refuses"
        )
    return folder


@pytest.mark.parametrize(
    ("kilobytes", "message"),
    [(64, "needs 16 MiB of free disk, got 0.1 MiB"), (17 * 1024, "needs free disk, got none left")],
    ids=["full before", "full on the way"],
)
@pytest.mark.slow
def test_a_full_disk_is_a_clear_error(kilobytes, message, nets, small_disk, tmp_path):
    params = tmp_path / "params.json"
    params.write_text("{}")
    script = tmp_path / "trial.sh"
    words = ["--params", str(params), "--cache", str(nets), "--out", str(small_disk / "out"), *SMALL_WORDS]
    command = f"exec {sys.executable} -m nni_topo.runs.trial {' '.join(words)}\n"
    if kilobytes > 1024:
        # the disk fills up once the trial has begun: after its check of the disk, before its first large file
        waiting = f"for i in $(seq 6000); do [ -e {small_disk}/out/settings.json ] && break; sleep 0.01; done"
        command = f"({waiting}; head -c 64M /dev/zero > {small_disk}/filler) > /dev/null 2>&1 &\n{command}"
    script.write_text(command)
    done = tiny_disk(f"timeout 120 bash {script}", small_disk, kilobytes)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert str(small_disk / "out") in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_cant_be_made_is_a_clear_error(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="must be a folder that can be written to"):
        run_trial(settings, tmp_path / "file" / "trial")


def test_outside_of_an_experiment_a_trial_counts_as_the_first(nets, tmp_path):
    (tmp_path / "parameters.json").write_text('{"ratio": 0.5}')
    words = [*SMALL_WORDS, "--retrain-epochs", "0", "--retrain-images", "50", "--double-images-after", "1"]
    words += ["--params", str(tmp_path / "parameters.json"), "--cache", str(nets), "--out", str(tmp_path / "trial")]
    assert main(words) == 0
    assert json.loads((tmp_path / "trial" / "settings.json").read_text())["retrain_images"] == 50


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.quick_every(2)
def test_of_trials_that_share_nets_one_trains_them(is_given, settings, nets, tmp_path, monkeypatch):
    held = []

    def noting(*arguments, **knobs):
        held.append(is_held(nets))
        return trained(*arguments, **knobs)

    trained = trial.trained
    monkeypatch.setattr(trial, "trained", noting)
    (checkpoint,) = (nets / "checkpoints").glob("*seed0.pt")
    own = str(checkpoint) if is_given else None
    run_trial(dataclasses.replace(settings, retrain_epochs=0, checkpoint=own), tmp_path / "trial", cache=nets)
    assert held == [not is_given]


class KilledError(Exception):
    pass


@pytest.mark.slow
def test_a_trial_that_stopped_in_an_epoch_goes_on_with_the_next(settings, nets, tmp_path, monkeypatch):
    asked = dataclasses.replace(settings, retrain_epochs=2)
    told = []

    def report(step, result):
        told.append(step)
        if len(told) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run_trial(asked, tmp_path / "trial", cache=nets, report=report)
    assert told == [0, 1]
    assert files(tmp_path / "trial") == {"settings.json", "masks.pt", "pruned.pt", "pruned.json", "retraining.pt"}
    with monkeypatch.context() as patch:  # what is in the folder isn't made anew
        patch.setattr(trial, "prune_to_ratios", None)
        patch.setattr(trial, "made_dense", None)
        began = time.perf_counter()
        metrics = run_trial(asked, tmp_path / "trial", cache=nets, report=report)
        assert 0.0 < metrics["seconds"] < time.perf_counter() - began
    assert told == [0, 1, 2]
    assert files(tmp_path / "trial") == FILES
    whole = run_trial(asked, tmp_path / "whole", cache=nets)
    assert {name: metrics[name] for name in ("accuracy", "test_accuracy", "widths", "score")} == {
        name: whole[name] for name in ("accuracy", "test_accuracy", "widths", "score")
    }


def test_damaged_masks_are_to_be_deleted(settings, nets, tmp_path):
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "masks.pt").write_bytes(b"half")
    with pytest.raises(DataError, match=r"a trial's masks must .*; delete it and run again \(.*masks.pt\)"):
        run_trial(settings, tmp_path / "trial", cache=nets)


@pytest.fixture
def retrainings(monkeypatch):
    """How many images are retrained on, each time; nothing is learned."""
    seen = []

    def retrain(net, data, recipe, **knobs):
        seen.append(len(data.train))

    monkeypatch.setattr(trial, "retrain", retrain)
    return seen


@pytest.mark.parametrize(("images", "seen"), [(None, 300), (50, 50), (900, 300)])
def test_retraining_takes_no_more_images_than_training_did(images, seen, settings, nets, tmp_path, retrainings):
    run_trial(dataclasses.replace(settings, retrain_images=images), tmp_path, cache=nets)
    assert retrainings == [seen]


def test_results_go_to_the_tuner_with_what_there_is():
    metrics = {"score": 0.25, "accuracy": 0.5, "flops_share": 0.75, "params": 3}
    assert reported(metrics) == {"default": 0.25, "accuracy": 0.5, "flops_share": 0.75}
    assert reported({"score": 0.0, "latency_share": 0.5}) == {"default": 0.0, "latency_share": 0.5}
    assert trial._result(0.75, {"price": 0.5}) == {"default": 0.25, "accuracy": 0.75}
