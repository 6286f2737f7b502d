import os

import pytest

from cluster.openmp import wait_briefly


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_threads_look_for_work_a_moment_unless_the_user_said_otherwise(before, after, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(before))
    assert wait_briefly() == after == wait_briefly()
