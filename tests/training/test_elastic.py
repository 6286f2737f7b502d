from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.training.conftest import publish, settings
from tests.training.test_train import last_step, launch, wait_for, wait_for_step, weights

pytestmark = pytest.mark.full

EPOCHS, STEPS = 8, 53


def workers(node: Any) -> int:
    """Return the number of workers of Ray Train on a node of a `Cluster`."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return sum("RayTrainWorker" in " ".join(each.cmdline()) for each in raylet.children(recursive=True))


def test_sharded_workers_that_lose_a_node_end_with_the_weights_of_one_worker(encoder: Path, tmp_path: Path, no_ray: None):
    from ray.cluster_utils import Cluster

    publish(str(tmp_path / "dataset"), 70, 20)
    # Dropout depends on the worker, so the weights can be equal only without dropout.
    still = shutil.copytree(encoder, tmp_path / "encoder")
    config = json.loads((still / "config.json").read_text())
    (still / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.0}))
    plain = settings(str(tmp_path), still, epochs=EPOCHS, learning_rate=2e-3, batch_size=4, checkpoint_every=20)
    alone = plain.model_copy(update={"scorer_path": str(tmp_path / "alone" / "scorer")})
    training = plain.training.model_copy(update={"workers": 2, "min_workers": 1, "parallel": "fsdp"})
    shared = plain.model_copy(update={"scorer_path": str(tmp_path / "shared" / "scorer"), "training": training})
    for folder in ("alone", "shared"):
        (tmp_path / folder).mkdir()
    log = tmp_path / "shared" / "log"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        process = launch(shared, tmp_path / "shared", {"RAY_ADDRESS": str(cluster.address)})
        wait_for_step(process, shared, 40)
        assert [workers(node) for node in nodes] == [1, 1]
        assert last_step(shared) < EPOCHS * STEPS
        cluster.remove_node(nodes[0], allow_graceful=False)
        wait_for(process, shared, lambda: "resuming from step" in log.read_text())
        assert workers(nodes[1]) == 1
        assert process.wait(300) == 0, log.read_text()
    finally:
        cluster.shutdown()
    assert launch(alone, tmp_path / "alone").wait(300) == 0, (tmp_path / "alone" / "log").read_text()
    one, two = weights(alone.scorer_uri), weights(shared.scorer_uri)
    assert one.keys() == two.keys()
    assert max(float(np.abs(one[name] - two[name]).max()) for name in one) < 1e-3
