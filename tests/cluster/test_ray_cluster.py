import copy
from pathlib import Path

import pytest
import yaml

FILE = Path(__file__).resolve().parents[2] / "ray_cluster.yaml"


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load(FILE.read_text())


def validate(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_ray_accepts_the_launcher_file(cluster):
    validate(cluster)


def test_the_check_finds_a_wrong_key_and_a_missing_head(cluster):
    with pytest.raises(Exception, match=r"max_wrokers|additional"):
        validate({**cluster, "max_wrokers": 3})
    with pytest.raises(Exception, match="head"):
        validate({**cluster, "head_node_type": "no_such_type"})


def test_the_head_takes_no_work_and_groups_fit_the_whole(cluster):
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    workers = {name: node for name, node in types.items() if name != cluster["head_node_type"]}
    assert any(node["resources"].get("GPU") for node in workers.values()) and any(
        "GPU" not in node["resources"] for node in workers.values()
    )
    for node in workers.values():
        assert node["min_workers"] <= node["max_workers"] <= cluster["max_workers"]
    assert sum(node["max_workers"] for node in workers.values()) <= cluster["max_workers"]


def test_nodes_install_this_project_and_no_nightly_ray(cluster):
    commands = "\n".join(cluster["setup_commands"])
    assert "make setup" in commands and "whl" not in commands and "nightly" not in commands
    assert list(cluster["file_mounts"].values()) == ["."]
