import asyncio
import math

import pyarrow as pa
import pytest

from cluster.config import DecodingConfig, SamplerConfig
from generation.sampler import Sampler
from generation.schema import PREPARED
from generation.sources.row import Instruction
from generation.token_limits import ReferenceLengths, limit_decodings
from tests.generation.fixed_llm import FixedLLM


def row(dataset, *references, split="train", choices=None):
    return Instruction(dataset, None, split, f"say {references}", references, choices)


def test_the_limit_is_the_percentile_of_the_longest_reference_in_bytes_over_sampled_train_rows():
    lengths = ReferenceLengths()
    for size in range(1, 101):
        lengths.add(row("words", "x", "ä" * size))  # 2 bytes each
    lengths.add(row("words", "x" * 10_000, split="validation"))
    lengths.add(row("words", "x" * 10_000, choices=("x" * 10_000, "no")))
    lengths.add(row("one", "four"))
    lengths.add(row("unseen", "four", split="validation"))
    assert lengths.limits() == {"one": math.ceil(4 / 3) + 8, "words": math.ceil(190 / 3) + 8}


def test_a_limit_lowers_max_tokens_but_not_below_min_tokens():
    decodings = tuple(DecodingConfig(name=str(n), max_tokens=n, min_tokens=low) for n, low in ((8, 0), (64, 3), (32, 20)))
    assert [each.max_tokens for each in limit_decodings(decodings, 16)] == [8, 16, 20]
    assert limit_decodings(decodings, None) == decodings


class Spy(FixedLLM):
    """Records the room and the largest length of each request."""

    def encode(self, turns, form, room):
        self.rooms = [*getattr(self, "rooms", []), room]
        return super().encode(turns, form, room)

    async def sample(self, token_ids, decoding, seed, request_id):
        found = await super().sample(token_ids, decoding, seed, request_id)
        return [{**each, "tokens": decoding.max_tokens} for each in found]

    def max_cost(self, prompt, decoding):
        return float(decoding.max_tokens)


def test_the_sampler_uses_the_limit_of_the_dataset_of_each_row():
    decodings = (DecodingConfig(name="greedy", temperature=0, max_tokens=48), DecodingConfig(name="warm", n=2, max_tokens=12))
    plain = {"template": None, "references": ["a"], "answer_choices": None, "shots": [], "mismatched": []}
    rows = [{**plain, "id": f"{n:032x}", "dataset": name, "instruction": name} for n, name in enumerate(("long", "short", "other"))]
    stage = Sampler(SamplerConfig(decodings=decodings), 7, Spy, {"long": 64, "short": 10})

    async def collect():
        return [part async for part in stage(pa.Table.from_pylist(rows, PREPARED))]

    (result,) = asyncio.run(collect())
    assert [[each["tokens"] for each in pool] for pool in result["sampled"].to_pylist()] == [[48, 12, 12], [10, 10, 10], [48, 12, 12]]
    assert stage.llm.rooms == [48, 10, 48]
    assert stage.max_cost(rows) == (48 + 12) + (10 + 10) + (48 + 12)


@pytest.mark.parametrize(("value", "kept"), [("decodings", False), ("references", True)])
def test_the_default_is_not_part_of_the_settings_of_a_run(value, kept):
    assert ("max_tokens_from" in SamplerConfig(max_tokens_from=value).result_settings()) is kept
