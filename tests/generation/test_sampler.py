import asyncio
import math

import pyarrow as pa
import pytest

from cluster.config import DecodingConfig, SamplerConfig
from cluster.errors import CappyError
from generation.engines.contract import request_seed
from generation.sampler import Sampler
from generation.schema import PREPARED
from tests.generation.fixed_llm import FixedLLM

CONFIG = SamplerConfig(decodings=(DecodingConfig(name="greedy", temperature=0), DecodingConfig(name="warm", n=3)), max_attempts=2)


def table(*instructions, choices=None):
    row = {"dataset": "d", "template": None, "references": ["a"], "answer_choices": choices, "shots": [], "mismatched": []}
    return pa.Table.from_pylist([{**row, "id": f"{n:032x}", "instruction": text} for n, text in enumerate(instructions)], PREPARED)


def sample(batch, load=FixedLLM):
    async def collect():
        return [part async for part in Sampler(CONFIG, 7, load)(batch)]

    (result,) = asyncio.run(collect())
    return result.to_pylist()


def test_each_row_gets_every_decodings_candidates_in_order():
    rows = sample(table("one", "two"))
    assert [[each["decoding"] for each in row["sampled"]] for row in rows] == [["greedy", "warm", "warm", "warm"]] * 2
    assert [row["error"] for row in rows] == [None, None]


def test_the_candidates_of_a_row_do_not_depend_on_the_other_rows():
    together, alone = sample(table("one", "two")), sample(table("one"))
    assert together[0] == alone[0]


def test_failed_rows_have_an_error_and_the_others_are_sampled():
    rows = sample(table("TOO LONG", "fine", "FAILS"))
    assert [row["error"] for row in rows] == [
        "the prompt has 9000 tokens",
        None,
        "sampling failed 2 times; the last error: ValueError: no such token",
    ]
    assert [len(row["sampled"]) for row in rows] == [0, 4, 0]


def test_a_classification_row_is_not_sampled():
    (row,) = sample(table("fox?", choices=["yes", "no"]))
    assert (row["sampled"], row["error"]) == ([], None)


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, math.inf])
def test_an_undefined_log_probability_is_null(logprob):
    class Undefined(FixedLLM):
        async def sample(self, *arguments):
            return [{**each, "logprob": logprob} for each in await super().sample(*arguments)]

    (row,) = sample(table("one"), Undefined)
    assert [each["logprob"] for each in row["sampled"]] == [None] * 4 and row["error"] is None


def test_a_temporary_failure_is_retried():
    class Flaky(FixedLLM):
        calls = 0

        async def sample(self, *arguments):
            Flaky.calls += 1
            if Flaky.calls == 1:
                raise ConnectionError("once")
            return await super().sample(*arguments)

    (row,) = sample(table("one"), Flaky)
    assert row["error"] is None and len(row["sampled"]) == 4


def test_the_cost_of_a_row_includes_its_failed_attempts():
    class Priced(FixedLLM):
        calls = 0

        async def sample(self, prompt, decoding, seed, request_id):
            Priced.calls += 1
            if Priced.calls == 1:
                raise ConnectionError("once")
            return await super().sample(prompt, decoding, seed, request_id)

        def pop_cost(self, request_id):
            return 0.25

        def max_cost(self, prompt, decoding):
            return decoding.n * len(prompt) / 8

    # Two decodings, and both again because one failed.
    assert [row["cost"] for row in sample(table("one"), Priced)] == [1.0]
    assert [row["cost"] for row in sample(table("TOO LONG"), Priced)] == [0.0]
    rows = [*table("one", "TOO LONG").to_pylist(), *table("fox?", choices=["yes"]).to_pylist()]
    assert Sampler(CONFIG, 7, Priced).max_cost(rows) == (1 + 3) * len("one\n") / 8


def test_an_error_that_no_row_caused_ends_the_run():
    class Locked(FixedLLM):
        async def sample(self, *arguments):
            raise CappyError("the API key was rejected")

    with pytest.raises(CappyError, match="the API key was rejected"):
        sample(table("one"), Locked)


def test_a_crashed_engine_ends_the_process_so_that_ray_replaces_it(monkeypatch):
    class Dead(FixedLLM):
        dead = True

        async def sample(self, *arguments):
            raise RuntimeError("engine dead")

    class Exit(BaseException):
        pass

    def exit_process(code):
        raise Exit(code)

    monkeypatch.setattr("os._exit", exit_process)
    with pytest.raises(Exit, match="1"):
        sample(table("one"), Dead)


def test_seeds_differ_by_row_and_decoding_and_are_stable():
    seeds = {request_seed(1, row, decoding) for row in ("a", "b") for decoding in ("x", "y")} | {request_seed(2, "a", "x")}
    assert len(seeds) == 5 and all(0 <= seed < 2**31 for seed in seeds)
    assert request_seed(1, "a", "x") == request_seed(1, "a", "x")
