import errno

import pytest
from ray.exceptions import RayTaskError
from safetensors import SafetensorError

from cluster.errors import CappyError, UsageError
from cluster.runtime import find_cappy_error, ray_session


@pytest.mark.parametrize("kind", [CappyError, UsageError])
def test_the_error_of_a_failed_task_is_one_line_without_a_traceback(kind):
    raised = RayTaskError("write", "Traceback (most recent call last):\n  deep inside", kind("x=1: too small; raise it"))
    for error in (raised, raised.as_instanceof_cause()):
        found = find_cappy_error(error)
        assert type(found) is kind and str(found) == "x=1: too small; raise it"
    assert find_cappy_error(RayTaskError("write", "Traceback (most recent call last):\n  deep inside", ValueError("a bug"))) is None


@pytest.mark.parametrize(
    ("cause", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x"),
            "/data/x cannot be written (No space left on device); free some space",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/data/x"), "/data/x cannot be written (Read-only file system); check the disk"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "a temporary file in TMPDIR="),
    ],
)
def test_a_full_or_broken_disk_in_a_task_is_one_line(cause, line):
    raised = RayTaskError("write", "Traceback (most recent call last):\n  deep inside", cause)
    for error in (cause, raised, raised.as_instanceof_cause()):
        found = find_cappy_error(error)
        assert str(found).startswith(line) and "\n" not in str(found)
    assert find_cappy_error(RayTaskError("write", "Traceback", OSError(errno.ENOENT, "No such file", "/data/x"))) is None


@pytest.mark.slow
def test_ray_in_this_process_does_not_join_another_cluster_on_the_machine(monkeypatch, no_ray):
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    other = Cluster(initialize_head=True, head_node_args={"num_cpus": 7})
    try:
        with ray_session():
            assert ray.get_runtime_context().gcs_address != other.address
            assert ray.cluster_resources()["CPU"] != 7
        monkeypatch.setenv("RAY_ADDRESS", other.address)
        with ray_session():
            assert ray.get_runtime_context().gcs_address == other.address
    finally:
        other.shutdown()
