"""`cappy generate` with an OpenAI-compatible server on loopback: the cost limit and the wait after a 429 response."""

import json
from collections import Counter

import pytest

from cluster import artifacts, storage
from cluster.config import load
from cluster.errors import CappyError
from generation import generate
from generation.dataset import RegressionSet
from tests.generation.engines.openai_server import OpenAIServer, error, good

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here")]

ROWS, CENT_A_TOKEN = 40, 10_000


def test_max_cost_stops_the_run_a_429_pauses_it_and_a_higher_max_cost_completes_it(tmp_path):
    server = OpenAIServer()
    # The 9th request gets a 429 response with a wait of two seconds.
    server.reply = lambda body, number: error(429, headers={"Retry-After": "2"}) if number == 8 else good(body)
    rows, place = tmp_path / "rows.jsonl", str(tmp_path / "set")
    rows.write_text("".join(json.dumps({"instruction": f"say {n}", "references": [f"answer {n}"]}) + "\n" for n in range(ROWS)))

    def config(max_cost):
        engine = f"base_url: '{server.url}', max_cost: {max_cost}, price_per_million_prompt: 0, price_per_million_sampled: {CENT_A_TOKEN}"
        decodings = "sampler.decodings=[{name: two, n: 2, max_tokens: 8}]"
        settings = [
            f"source={{kind: files, path: '{rows}'}}",
            f"dataset={place}",
            f"sampler.engine={{kind: endpoint, concurrency: 4, {engine}}}",
        ]
        return load(None, [*settings, decodings, "sampler.model=fox", "generate.unit_rows=4"])

    try:
        with pytest.raises(
            CappyError, match=r"sampler.engine.max_cost=2: .* raise max_cost and run the same command again to resume"
        ) as stopped:
            generate.run_generate(config(2))
        spent, requests = server.billed[1] / 100, len(server.bodies)
        pauses = [later - sooner for sooner, later in zip(server.times, server.times[1:], strict=False)]
        assert 0 < spent <= 2 and not storage.exists(f"{place}/{artifacts.MANIFEST}")
        # Requests in flight at the time of the 429 can still arrive; after them no request arrives for two seconds.
        assert max(pauses) >= 1.9
        summary = generate.run_generate(config(5))
        answered = Counter(each["x-request-id"] for number, each in enumerate(server.headers) if number != 8)
    finally:
        server.close()
    assert summary["instructions"] == ROWS and summary["sources"]["sampled"] == 2 * ROWS
    assert set(answered.values()) == {1} and len(answered) == ROWS
    assert RegressionSet(place).manifest["cost"]["dollars"] == pytest.approx(server.billed[1] / 100) == pytest.approx(0.06 * ROWS)
    print(f"\n{stopped.value}\n{requests} requests before, {len(server.bodies)} in all; longest pause {max(pauses):.2f} s; then {summary}")
