import re

import pytest

from cluster.config import DecodingConfig
from cluster.errors import UsageError
from generation.engines.contract import read_api_key, request_identity, request_seed
from generation.prompts import messages

WARM = DecodingConfig(name="warm", n=3, temperature=0.7, top_p=0.9, max_tokens=8, stop=("\n",))
ONE = DecodingConfig(name="one", max_tokens=8)
TURNS = messages("Which fox?", system="Be brief.")


def test_only_equal_requests_have_equal_identities():
    one = request_identity("m", TURNS, ONE, 3)
    assert re.fullmatch(r"[0-9a-f]{32}", one) and one == request_identity("m", list(TURNS), DecodingConfig(name="one", max_tokens=8), 3)
    others = [("n", TURNS, ONE, 3), ("m", TURNS[1:], ONE, 3), ("m", TURNS, WARM, 3), ("m", TURNS, ONE, 4)]
    assert len({one, *(request_identity(*other) for other in others)}) == 5
    # A fixed value, because it must be equal on every machine and in every process.
    assert one == "2c46910578c072af0d6c6ce146cec8cf"


def test_a_seed_depends_on_run_row_and_decoding_and_has_31_bits():
    seeds = {request_seed(seed, row, name) for seed in (1, 2) for row in ("a", "b") for name in ("greedy", "warm")}
    assert len(seeds) == 8 and all(0 <= seed < 2**31 for seed in seeds)
    # A fixed value: the same config must draw the same candidates on every machine.
    assert request_seed(1, "a", "greedy") == 1712321695


def test_the_api_key_is_read_from_the_named_variable_without_white_space(monkeypatch):
    monkeypatch.setenv("FOX_KEY", " very-secret\n")
    assert read_api_key("FOX_KEY") == "very-secret" and read_api_key(None) is None


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_a_variable_that_is_not_set_or_blank_is_an_error(value, monkeypatch):
    monkeypatch.delenv("FOX_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("FOX_KEY", value)
    with pytest.raises(UsageError, match=r"sampler\.engine\.api_key_env=FOX_KEY: the variable is not set .*; export it there"):
        read_api_key("FOX_KEY")
