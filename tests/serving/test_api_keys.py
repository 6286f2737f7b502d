import hashlib
import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from cappy.cli import app
from cluster.config import ApiKeyConfig, ServingConfig
from cluster.errors import UsageError
from serving.api_keys import Keyring, TokenBucket, create_key, hash_key
from serving.backend import ApiError
from serving.serve import _check_access


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def ring(clock=None, **limits):
    key, sha256 = create_key()
    other, other_sha256 = create_key()
    entries = [ApiKeyConfig(name="a", sha256=sha256, **limits), ApiKeyConfig(name="b", sha256=other_sha256)]
    return Keyring(entries, clock or Clock()), key, other


def test_create_key_returns_a_long_random_key_and_its_sha_256():
    keys = [create_key() for _ in range(50)]
    assert len({key for key, _ in keys}) == 50 and all(len(key) >= 43 for key, _ in keys)
    assert all(sha256 == hashlib.sha256(key.encode()).hexdigest() for key, sha256 in keys)


def test_a_valid_key_identifies_its_caller_in_either_header():
    keyring, key, other = ring()
    assert (
        keyring.authenticate(f"Bearer {key}").name
        == keyring.authenticate(f"bearer  {key} ").name
        == keyring.authenticate(None, key).name
        == "a"
    )
    assert keyring.authenticate(f"Bearer {other}").name == "b"


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic {key}", "Bearer {key}x", "Bearer é", "{key}"]
)
def test_an_invalid_key_is_a_401_that_does_not_contain_the_key(authorization):
    keyring, key, _ = ring()
    with pytest.raises(ApiError) as caught:
        keyring.authenticate(authorization and authorization.format(key=key))
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"} and key not in str(caught.value.body)


def test_a_server_without_keys_has_no_rate_limit():
    caller = Keyring(()).authenticate(None)
    for _ in range(1000):
        caller.count_request()
        caller.count_candidates(1000)


def test_a_token_bucket_refills_evenly_up_to_its_limit():
    clock = Clock()
    bucket = TokenBucket(60, clock)
    assert [bucket.take(30), bucket.take(30)] == [0, 0]
    assert bucket.take(2) == pytest.approx(2)
    clock.now += 1
    assert bucket.take(2) == pytest.approx(1) and bucket.take(1) == 0
    clock.now += 3600
    assert bucket.take(60) == 0 and bucket.take(1) > 0
    assert bucket.take(61) == float("inf")


def test_above_a_keys_limit_the_error_gives_the_wait_and_other_keys_are_unaffected():
    clock = Clock()
    keyring, key, other = ring(clock, requests_per_minute=2, candidates_per_minute=10)
    caller = keyring.authenticate(f"Bearer {key}")
    caller.count_request()
    keyring.authenticate(f"Bearer {key}").count_request()
    with pytest.raises(ApiError, match="this key's limit of 2 requests per minute is reached; retry in 30 s") as caught:
        caller.count_request()
    assert (caught.value.status, caught.value.code, caught.value.headers) == (429, "rate_limit_exceeded", {"Retry-After": "30"})
    keyring.authenticate(f"Bearer {other}").count_request()
    caller.count_candidates(8)
    with pytest.raises(ApiError, match="this key's limit of 10 candidates per minute is reached") as caught:
        caller.count_candidates(8)
    assert caught.value.headers == {"Retry-After": "36"}
    with pytest.raises(ApiError, match="11 candidates are above this key's limit of 10 per minute; request fewer") as caught:
        caller.count_candidates(11)
    assert caught.value.status == 400


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "gpu-box"])
def test_a_server_without_keys_refuses_other_machines_unless_allowed(host):
    with pytest.raises(UsageError, match=f"serving.host={host} is reachable from other machines and serving.api_keys is empty"):
        _check_access(ServingConfig(host=host))
    _check_access(ServingConfig(host=host, allow_no_keys=True))
    _check_access(ServingConfig(host=host, api_keys=[{"name": "a", "sha256": create_key()[1]}]))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_loopback_server_needs_no_keys(host):
    _check_access(ServingConfig(host=host))


def test_the_command_line_creates_a_key_and_its_config_entry():
    output = CliRunner().invoke(app, ["serve", "--new-key", "team a"]).stdout
    key = re.search(r"cappy-\S+", output)[0]
    serving = yaml.safe_load(output.split("for the config:")[1])["serving"]
    assert Keyring(ServingConfig(**serving).api_keys).authenticate(f"Bearer {key}").name == "team a"
    entry = json.loads(CliRunner().invoke(app, ["serve", "--new-key", "b", "--json"]).stdout)
    assert entry["sha256"] == hash_key(entry["key"]) and entry["name"] == "b"


def test_the_llm_and_the_scorer_need_different_names():
    with pytest.raises(ValueError, match="model_name and scorer_name are both 'x'"):
        ServingConfig(model_name="x", scorer_name="x")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([{"name": "a", "sha256": "cappy-not-a-hash"}], "sha256"),
        ([{"name": "a", "sha256": "0" * 64}, {"name": "a", "sha256": "1" * 64}], "the name 'a' twice"),
    ],
)
def test_a_key_instead_of_its_hash_and_a_repeated_name_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        ServingConfig(api_keys=keys)
