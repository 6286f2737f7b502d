import pytest

from cluster.runtime import ray_session


@pytest.mark.slow
def test_an_embedded_ray_is_its_own_though_another_cluster_runs_on_the_machine(monkeypatch):
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
