import asyncio
from types import SimpleNamespace

import pyarrow as pa
import pytest

from cluster.config import load
from generation import units
from generation.schema import PREPARED
from generation.units import BudgetGate
from tests.generation.fixed_llm import FixedLLM


def test_a_unit_above_the_budget_waits_for_units_in_progress_and_is_refused_without_any():
    gate = BudgetGate(ceiling=1.0)
    assert gate.acquire("a", 0.7) is True
    assert gate.acquire("b", 0.7) is None and not gate.exhausted()
    gate.release("a", 0.2)
    assert gate.acquire("b", 0.7) is True
    gate.release("b", 0.5)
    assert gate.acquire("c", 0.7) is False and gate.exhausted()


def test_a_second_release_of_a_unit_has_no_effect():
    gate = BudgetGate(ceiling=1.0)
    assert gate.acquire("a", 0.9) is True
    gate.release("a", 0.5)
    gate.release("a", 0.5)
    assert gate.acquire("b", 0.5) is True


def test_a_closed_gate_admits_no_unit():
    gate = BudgetGate()
    assert gate.acquire("a", 0.0) is True
    gate.close()
    assert gate.acquire("b", 0.0) is False and not gate.exhausted()


class CostlyLLM(FixedLLM):
    """An LLM with prices: 0.1 dollars per request, at most 0.3 per candidate. A request with "lost" is cancelled."""

    def max_cost(self, prompt, decoding):
        return 0.3 * decoding.n

    def pop_cost(self, request_id):
        return 0.1

    async def sample(self, token_ids, decoding, seed, request_id):
        if b"lost" in bytes(token_ids):
            raise asyncio.CancelledError
        return await super().sample(token_ids, decoding, seed, request_id)


def in_process(gate):
    """Return a gate in this process with the call syntax of a Ray actor."""

    def method(call):
        async def remote(*arguments):
            return call(*arguments)

        return SimpleNamespace(remote=remote)

    return SimpleNamespace(acquire=method(gate.acquire), release=method(gate.release))


@pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)
def test_the_maximum_cost_of_an_interrupted_unit_counts_as_spent(place):
    decodings = "sampler.decodings=[{name: one, max_tokens: 8}]"
    prices = "price_per_million_prompt: 1, price_per_million_sampled: 1"
    engine = f"sampler.engine={{kind: endpoint, base_url: 'http://127.0.0.1:9/v1', max_cost: 9, {prices}}}"
    config = load(None, [decodings, engine, "sampler.prompt.form=raw"])
    row = {"references": ["x"], "dataset": "d", "shots": [], "mismatched": []}
    for name, text in (("train-000000", "kept"), ("train-000001", "lost")):
        table = pa.Table.from_pylist([{**row, "id": name, "instruction": text}], PREPARED)
        units.write_unit(units.unit_uri(place, "prepared", name), table)
    worker = units.UnitWorker(place, config, CostlyLLM, in_process(BudgetGate(9.0)))

    async def work(unit):
        return [each async for each in worker(pa.table({"unit": [unit]}))]

    (done,) = asyncio.run(work("train-000000"))[0].to_pylist()
    assert done["cost"] == pytest.approx(0.1)
    assert units.dollars_spent(place, ["train-000000"]) == pytest.approx(0.1)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(work("train-000001"))
    assert units.dollars_spent(place, ["train-000000"]) == pytest.approx(0.1 + 0.3)


def test_max_per_bin_limits_train_units_and_the_counts_include_all_samples(tmp_path):
    config = load(None, ["generate.max_per_bin=1", "sampler.prompt.form=raw"])
    row = {"id": "a", "instruction": "say", "references": ["number 1 0"], "dataset": "d", "shots": [], "mismatched": []}
    kept = {}
    for unit in ("train-000000", "validation-000000"):
        units.write_unit(units.unit_uri(str(tmp_path), "prepared", unit), pa.Table.from_pylist([row], PREPARED))
        worker = units.UnitWorker(str(tmp_path), config, FixedLLM, in_process(BudgetGate()))

        async def work(worker=worker, unit=unit):
            return [each async for each in worker(pa.table({"unit": [unit]}))]

        (done,) = asyncio.run(work())[0].to_pylist()
        assert done["candidates"] == 17 and done["tokens"] == 17 * 3
        (candidates,) = units.read_unit(units.unit_uri(str(tmp_path), "units", unit))["candidates"].to_pylist()
        kept[unit] = [min(int(each["label"] * 10), 9) for each in candidates if each["source"] == "sampled"]
    assert len(kept["validation-000000"]) == 17
    assert sorted(kept["train-000000"]) == sorted(set(kept["validation-000000"]))
