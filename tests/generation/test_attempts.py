import asyncio
import functools
import multiprocessing
import os
import signal

import pyarrow as pa
import pytest

from cluster import storage
from cluster.config import load
from cluster.errors import CappyError
from generation import labels, units
from generation.attempts import EngineAccess
from generation.schema import PREPARED
from generation.units import BudgetGate
from tests.generation.engine_process import ProcessLLM, requests
from tests.generation.fixed_llm import FixedLLM
from tests.generation.test_units import in_process

CONFIG = ["sampler.decodings=[{name: greedy, temperature: 0}]", "sampler.prompt.form=raw", "sampler.max_attempts=2"]
UNIT = "train-000000"


@pytest.fixture(scope="module", autouse=True)
def compiled_metric():
    """Load the metric before the processes are forked, so that none of them needs to."""
    labels.warm_up(load(None, CONFIG).generate.label)


def write_rows(staging, texts, unit=UNIT):
    row = {"references": ["x"], "dataset": "d", "shots": [], "mismatched": []}
    table = pa.Table.from_pylist([{**row, "id": f"{unit}:{n}", "instruction": text} for n, text in enumerate(texts)], PREPARED)
    units.write_unit(units.unit_uri(staging, "prepared", unit), table)


def work(staging, load_llm, names, failure):
    """Sample the units concurrently, as an actor does; put the text of an error into `failure`."""

    async def sample(worker, unit):
        return [each async for each in worker(pa.table({"unit": [unit]}))]

    async def sample_all(worker):
        await asyncio.gather(*(sample(worker, unit) for unit in names))

    try:
        asyncio.run(sample_all(units.UnitWorker(staging, load(None, CONFIG), load_llm, in_process(BudgetGate()))))
    except CappyError as error:
        failure.put(str(error))


def run(staging, load_llm, names=(UNIT,), limit=30):
    """Replace the sampling process after each crash, as Ray does; return the number of processes and the error."""
    fork = multiprocessing.get_context("fork")
    for count in range(1, limit + 1):
        failure = fork.SimpleQueue()
        process = fork.Process(target=work, args=(staging, load_llm, names, failure))
        process.start()
        process.join()
        if not failure.empty():
            return count, failure.get()
        if process.exitcode == 0:
            return count, None
    raise AssertionError(f"the unit was not finished by {limit} processes")


def result(staging, unit=UNIT):
    """Return the instructions with samples, and the dead letters."""
    table = units.read_unit(units.unit_uri(staging, "units", unit))
    return table["instruction"].to_pylist(), units.unit_metadata(table)["letters"]


@pytest.mark.parametrize("place", ["disk", "s3"], indirect=True)
def test_a_row_that_kills_the_engine_is_a_dead_letter_and_the_others_are_sampled(place, tmp_path):
    texts = [f"say {n}" for n in range(8)]
    write_rows(place, ["KILL first", *texts])
    count, error = run(place, functools.partial(ProcessLLM, log=tmp_path / "log"))
    assert error is None and count == 5  # two as a whole, two for the row, one to finish
    found, (letter,) = result(place)
    assert found == texts and "the sampling engine ended 2 times while it sampled this row alone" in letter
    # After the first try of the row alone, the engine answers a probe and the other rows before the second try.
    assert requests(tmp_path / "log")[-11:] == ["KILL first", "Say hello.", *texts, "KILL first"]


@pytest.mark.parametrize(
    "texts",
    [["KILL"], ["KILL a", "KILL b"], ["say 1", "KILL a", "say 2", "KILL b"], ["KILL a", "KILL b", "KILL c", "say 1"]],
    ids=len,
)
def test_units_with_several_such_rows_finish(texts, tmp_path):
    write_rows(str(tmp_path), texts)
    count, error = run(str(tmp_path), functools.partial(ProcessLLM, log=tmp_path / "log"))
    killers = sum("KILL" in text for text in texts)
    assert error is None and count == 2 + 2 * killers + 1
    found, letters = result(str(tmp_path))
    assert found == [text for text in texts if "KILL" not in text] and len(letters) == killers


def test_the_other_units_of_the_process_lose_no_row(tmp_path):
    names = [UNIT, "train-000001", "train-000002"]
    for unit, texts in zip(names, (["say 1", "KILL"], ["say 2", "say 3"], ["say 4"]), strict=True):
        write_rows(str(tmp_path), texts, unit)
    _, error = run(str(tmp_path), functools.partial(ProcessLLM, log=tmp_path / "log"), names)
    assert error is None
    assert [result(str(tmp_path), unit)[0] for unit in names] == [["say 1"], ["say 2", "say 3"], ["say 4"]]
    assert [len(result(str(tmp_path), unit)[1]) for unit in names] == [1, 0, 0]


@pytest.mark.parametrize("step", [3, 5, 7])
def test_engines_that_are_killed_again_and_again_reject_no_row(step, tmp_path):
    texts = [f"say {n}" for n in range(12)]
    write_rows(str(tmp_path), texts)
    plan = range(step, 1000, step)
    count, error = run(str(tmp_path), functools.partial(ProcessLLM, log=tmp_path / "log", plan=plan))
    assert error is None and count >= 3
    assert result(str(tmp_path)) == (texts, [])


def test_an_engine_without_any_answer_ends_the_run_and_the_next_run_retries(tmp_path):
    texts = [f"say {n}" for n in range(8)]
    write_rows(str(tmp_path), texts)
    count, error = run(str(tmp_path), functools.partial(ProcessLLM, log=tmp_path / "log", plan=["all"]))
    assert count == 2 + 5 + 1 and error and "\n" not in error
    assert "the sampling engine ended 5 times in succession without an answer to any row of train-000000" in error
    assert run(str(tmp_path), functools.partial(ProcessLLM, log=tmp_path / "log")) == (1, None)
    assert result(str(tmp_path)) == (texts, [])


class KilledAtLoad(FixedLLM):
    """An LLM whose process is killed while it loads, until `file` has this many lines."""

    def __init__(self, config, file, times):
        super().__init__(config)
        with file.open("a") as log:
            log.write("load\n")
        if len(file.read_text().splitlines()) <= times:
            os.kill(os.getpid(), signal.SIGKILL)


def test_processes_that_are_killed_at_every_load_end_the_run_and_the_next_run_retries(tmp_path):
    write_rows(str(tmp_path), ["say 1"])
    count, error = run(str(tmp_path), functools.partial(KilledAtLoad, file=tmp_path / "log", times=5))
    assert (
        count == 6
        and error
        and "5 processes in succession ended without an error while they loaded the engine" in error
        and "\n" not in error
    )
    assert run(str(tmp_path), functools.partial(KilledAtLoad, file=tmp_path / "log", times=5)) == (1, None)


def test_a_load_that_succeeds_deletes_the_records_of_killed_processes(tmp_path):
    write_rows(str(tmp_path), ["say 1"])
    assert run(str(tmp_path), functools.partial(KilledAtLoad, file=tmp_path / "log", times=4)) == (5, None)
    assert storage.list_files(f"{tmp_path}/attempts") == {}


def test_a_finished_unit_leaves_no_record_of_an_attempt(tmp_path):
    write_rows(str(tmp_path), ["say 1"])
    assert run(str(tmp_path), functools.partial(ProcessLLM, log=tmp_path / "log")) == (1, None)
    assert storage.list_files(f"{tmp_path}/attempts") == {}


def test_a_unit_that_needs_the_engine_alone_waits_for_the_others_and_the_next_wait_for_it():
    events = []

    async def use(access, name, seconds):
        async with access:
            events.append(f"{name} starts")
            await asyncio.sleep(seconds)
            events.append(f"{name} ends")

    async def use_all():
        access = EngineAccess()
        first = [asyncio.create_task(use(access.shared(), name, 0.01)) for name in ("a", "b")]
        await asyncio.sleep(0)
        alone = asyncio.create_task(use(access.alone(), "alone", 0.01))
        await asyncio.sleep(0)
        await asyncio.gather(*first, alone, use(access.shared(), "c", 0))

    asyncio.run(use_all())
    assert events == ["a starts", "b starts", "a ends", "b ends", "alone starts", "alone ends", "c starts", "c ends"]
