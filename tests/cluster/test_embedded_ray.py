"""An embedded Ray is private to this machine and user."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest

from cluster.embedded_ray import private_ray, protect_token

# All listening sockets of the driver and of the processes of its Ray; then the state after the session.
_PROBE = """
import json, os, psutil, ray
from cluster.runtime import ray_session
with ray_session():
    assert ray.get(ray.remote(lambda: os.getpid()).remote()) != os.getpid()
    me = psutil.Process()
    connections = [each for process in (me, *me.children(recursive=True)) for each in process.net_connections("inet")]
    sockets = [each.laddr.ip for each in connections if each.status == "LISTEN"]
print(json.dumps(sockets))
"""


@pytest.mark.slow
def test_it_listens_on_loopback_addresses_only_and_its_token_file_is_private(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    probe = subprocess.run([sys.executable, "-c", _PROBE], env={**environment, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert probe.returncode == 0, probe.stderr
    sockets = json.loads(probe.stdout.splitlines()[-1])
    assert len(sockets) > 5 and set(sockets) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    token = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and len(token.read_text()) == 64


@pytest.fixture
def token(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".ray" / "auth_token"


def test_the_token_file_is_created_once_and_made_private(token):
    before = os.umask(0)
    try:
        protect_token(token)
    finally:
        os.umask(before)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    text = token.read_text()
    token.chmod(0o644)
    protect_token(token)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and token.read_text() == text
    assert list(token.parent.iterdir()) == [token]


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "mine"), ("RAY_AUTH_TOKEN_PATH", "/x")])
def test_no_token_file_is_created_that_ray_does_not_use(name, value, token, monkeypatch):
    monkeypatch.setenv(name, value)
    protect_token(token)
    assert not token.exists()


def test_settings_of_ray_are_restored(monkeypatch):
    from ray._private import ray_constants

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    before = ray_constants.ENABLE_RAY_CLUSTER
    with private_ray():
        assert not ray_constants.ENABLE_RAY_CLUSTER
    assert ray_constants.ENABLE_RAY_CLUSTER is before and os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1"
