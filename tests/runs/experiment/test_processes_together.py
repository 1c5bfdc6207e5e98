"""Two processes retrain one net, and a Dask cluster searches layers: the same results as alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from joblib import parallel_config

from nni_topo import GeneticSearch, TopologicalPruner, zoo
from nni_topo.errors import ConfigError
from nni_topo.runs.processes import data_share
from nni_topo.runs.run import on_cpu

RANKS = """
import hashlib, json, os, runpy, sys
import torch
from torch.nn.parallel import DistributedDataParallel
import nni_topo
from nni_topo import zoo
from nni_topo.runs.processes import broadcast, broadcast_masks, data_share, process_group
from nni_topo.runs.experiment.manager import free_port

def digest(tensors):
    found = hashlib.sha256()
    for module in sorted(tensors):
        for name, tensor in sorted(tensors[module].items()):
            if tensor is not None:  # a target without a mask
                found.update(f"{module}.{name}".encode() + tensor.detach().float().contiguous().numpy().tobytes())
    return found.hexdigest()

torch.set_num_threads(1)
data = zoo.load_data("digits", limit=301)
images = data.test.tensors[0][:2]
with process_group() as (rank, size):
    # each process begins with weights and masks of its own
    net = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=rank)
    config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = nni_topo.create_pruner("random", net, config_list, seed=rank)
    _, own = pruner.compress()
    pruner.unwrap_model()
    masks = broadcast_masks(own if rank == 0 else None)
    dense = nni_topo.to_dense(net, images, masks)
    share = data_share(data, rank, size)
    shared = DistributedDataParallel(dense)
    before = digest({"net": dict(dense.state_dict())})
    zoo.train(shared, share, zoo.Recipe(epochs=3, batch_size=16), seed=rank)
    after = {"net": dict(dense.named_parameters())}
    print(json.dumps({
        "rank": rank, "size": size, "own": digest(own), "masks": digest(masks),
        "images": len(share.train), "before": before, "after": digest(after),
        "accuracy": zoo.evaluate(dense, data.test),
    }), file=open(f"{sys.argv[1]}/{rank}.json", "w"))
    port = broadcast(free_port())

# the same processes then carry out a trial, in a group of its own: torchrun's store serves only one
os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
del sys.argv[1]
runpy.run_module("nni_topo.runs.trial", run_name="__main__", alter_sys=True)
"""


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def ranks(nets, tmp_path_factory):
    """What two processes leave: a folder with RANKS' two files and a trial's folder, and the trial's words."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(RANKS)
    params = folder / "params.json"
    params.write_text(json.dumps({"pruner": "random", "retrain_epochs": 2}))
    words = ["--params", str(params), "--cache", str(nets), "--limit", "300", "--train-epochs", "4"]
    done = torchrun(str(folder / "ranks.py"), str(folder), *words, "--out", str(folder / "trial"))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_two_processes_get_the_first_ones_masks_and_train_the_same_net(ranks):
    folder, _ = ranks
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first["size"], first["images"], second["images"]) == (2, 150, 150)
    assert first["own"] != second["own"]
    assert first["masks"] == second["masks"] == first["own"]
    assert first["before"] == second["before"]
    assert first["after"] == second["after"]
    assert first["accuracy"] > 0.5


@pytest.mark.slow
def test_a_trial_by_two_processes(ranks):
    folder, words = ranks
    assert [json.loads(line).get("step") for line in words.splitlines()] == [0, 1, 2, None]
    metrics = json.loads((folder / "trial" / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.3


def test_shares_are_equal_and_apart():
    data = zoo.load_data("digits", limit=11)
    shares = [data_share(data, rank, 3).train.tensors[0] for rank in range(3)]
    assert [len(share) for share in shares] == [3, 3, 3]
    assert len(torch.cat(shares).flatten(1).unique(dim=0)) == 9
    with pytest.raises(ConfigError, match="each process must get a training image, got 11 for 12"):
        data_share(data, 0, 12)


def searched(n_jobs: int):
    """Masks of a search over the layers of a network, so many of them at a time."""
    net = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0)
    config_list = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]
    search = GeneticSearch(generations=5)
    return TopologicalPruner(net, config_list, seed=1, n_jobs=n_jobs, solver=search).compress()[1]


@pytest.mark.slow
def test_a_dask_cluster_searches_layers_to_the_same_masks(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="needs Dask: pip install 'nni_topo[dask]'")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path, host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        workers = client.scheduler_info()["workers"]
        with distributed.get_task_stream(client) as tasks, parallel_config(backend="dask"):
            spread = searched(-1)
    assert len(tasks.data) >= 4
    assert {task["worker"] for task in tasks.data} <= set(workers)
    torch.testing.assert_close(on_cpu(spread), on_cpu(searched(1)), rtol=0, atol=0)


@pytest.mark.slow
def test_ray_searches_layers_to_the_same_masks(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")
    from ray.util.joblib import register_ray

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else workers starve beside other tests
    places = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=2**27,
        log_to_driver=False,
        runtime_env={"env_vars": places},
    )
    try:
        register_ray()
        with parallel_config(backend="ray"):
            spread = searched(-1)
    finally:
        ray.shutdown()
    torch.testing.assert_close(on_cpu(spread), on_cpu(searched(1)), rtol=0, atol=0)
