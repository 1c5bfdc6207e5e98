"""Clusters of Dask and Ray search layers: the same results as alone."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from joblib import parallel_config

from nni_topo import GeneticSearch, TopologicalPruner, zoo
from nni_topo.runs.run import on_cpu


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
