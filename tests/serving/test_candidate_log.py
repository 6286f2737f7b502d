"""The log of served candidates: its rows, and requests while the store is slow or down."""

import asyncio
import threading
import time
from datetime import UTC, datetime

import httpx
import pyarrow.parquet as pq
import pytest

from cluster import artifacts, storage
from cluster.config import Config, ServingConfig
from cluster.errors import CappyError
from generation.dataset import RegressionSet
from serving.candidate_log import CandidateLog
from serving.gateway import build_api
from serving.prometheus import Metrics
from tests.conftest import cappy
from tests.serving.standin import BODY, Echo

ROW = {
    "id": "a",
    "prompt": 0,
    "time": None,
    "instruction": "say hi",
    "candidates": [{"response": "hi", "decoding": "d", "tokens": 1, "finish_reason": "stop", "logprob": None, "score": 0.5, "picked": 0}],
}


@pytest.fixture
def row():
    return {**ROW, "time": datetime(2026, 1, 1, tzinfo=UTC)}


def logged(folder):
    """Return the rows of all parts below a folder, by id and prompt."""
    rows = [row for name in storage.list_files(str(folder)) for row in pq.read_table(f"{folder}/{name}").to_pylist()]
    return {(row["id"], row["prompt"]): row for row in rows}


def counted(metrics, result):
    return metrics.registry.get_sample_value("cappy_serving_logged_total", {"result": result}) or 0


async def serve(folder, *requests, backend=None, headers=None):
    """Send requests to a server with a log, and stop it; return the answers and the metrics."""
    metrics = Metrics()
    api = build_api(Config(serving=ServingConfig(log_candidates=str(folder), access_log=False)), backend or Echo(), (), metrics)
    transport = httpx.ASGITransport(api)
    async with api.router.lifespan_context(api), httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        answers = [(await http.post(path, json=body, headers=headers)).json() for path, body in requests]
    return answers, metrics


async def test_a_row_has_the_candidates_and_the_choices_and_nothing_of_the_client(tmp_path):
    chat = {**BODY, "n": 2, "user": "someone", "cappy": {"candidates": 4}}
    headers = {"Authorization": "Bearer cappy-secret", "X-Request-Id": "request-of-someone", "X-Forwarded-For": "192.0.2.7"}
    (answer,), metrics = await serve(tmp_path / "log", ("/v1/chat/completions", chat), headers=headers)
    row = logged(tmp_path / "log")[answer["id"], 0]
    assert (row["instruction"], row["model"], row["scorer"], row["scorer_version"]) == ("hi", "cappy", "cappy-scorer", "v1")
    assert row["llm"] == Config().sampler.model and row["selection"] == "score" and row["time"].timestamp() == answer["created"]
    assert [(each["response"], each["score"], each["logprob"], each["picked"]) for each in row["candidates"]] == [
        ("", 0.0, -1.0, None),
        ("x", 1.0, -1.0, None),
        ("xx", 2.0, -1.0, 1),
        ("xxx", 3.0, -1.0, 0),
    ]
    written = b"".join(file.read_bytes() for file in (tmp_path / "log").iterdir())
    assert not any(text in f"{row}" or text.encode() in written for text in ("secret", "someone", "192.0.2.7"))
    assert (counted(metrics, "written"), counted(metrics, "dropped")) == (1, 0)


async def test_the_command_line_makes_a_set_from_a_log_in_object_storage(tmp_path, bucket):
    (answer,), metrics = await serve(f"{bucket}/log", ("/v1/chat/completions", BODY))
    assert counted(metrics, "written") == 1
    (tmp_path / "ratings.csv").write_text(f"id,rating\n{answer['id']},0.25\n")
    result = cappy("annotate", f"{bucket}/log", f"{bucket}/set", "--feedback", f"{tmp_path}/ratings.csv")
    assert result.returncode == 0, result.stderr
    opened = RegressionSet(f"{bucket}/set")
    assert artifacts.verify(opened.uri, opened.manifest) == []
    rows = [row for split in opened.manifest["counts"] for row in opened.to_pandas(split).to_dict("records")]
    shown = answer["choices"][0]["message"]["content"]
    assert [(each["response"], each["label"]) for row in rows for each in row["candidates"]] == [(shown, 0.25)]
    again = cappy("annotate", f"{bucket}/set", f"{bucket}/again")
    assert again.returncode == 2 and "has ratings as labels, and most of its rows have no references" in again.stderr


async def test_each_prompt_is_a_row_and_requests_can_opt_out(tmp_path):
    text = {"model": "cappy", "prompt": ["one", "two"]}
    chat = "/v1/chat/completions"
    sent = [("/v1/completions", text), (chat, {**BODY, "store": False}), (chat, {**BODY, "store": True})]
    (texts, hidden, shown), _ = await serve(tmp_path / "log", *sent)
    rows = logged(tmp_path / "log")
    assert rows.keys() == {(texts["id"], 0), (texts["id"], 1), (shown["id"], 0)} and hidden["choices"]
    assert [rows[texts["id"], number]["instruction"] for number in (0, 1)] == ["one", "two"]


async def test_an_answer_below_min_score_has_no_picked_candidate(tmp_path):
    (answer,), _ = await serve(tmp_path / "log", ("/v1/chat/completions", {**BODY, "cappy": {"min_score": 9.0}}))
    assert [each["picked"] for each in logged(tmp_path / "log")[answer["id"], 0]["candidates"]] == [None] * 8


async def test_without_the_setting_nothing_is_logged(monkeypatch):
    monkeypatch.setattr(storage, "write_bytes", lambda *_: pytest.fail("nothing may be written"))
    api = build_api(Config(serving=ServingConfig(access_log=False)), Echo())
    async with api.router.lifespan_context(api), httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://localhost") as http:
        assert (await http.post("/v1/chat/completions", json=BODY)).status_code == 200


async def test_while_the_store_hangs_requests_are_answered_and_rows_above_the_limit_are_dropped(tmp_path, monkeypatch, row):
    started, resume, write = threading.Event(), threading.Event(), storage.write_bytes

    def hang(uri, data):
        started.set()
        assert resume.wait(60)
        return write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", hang)
    metrics = Metrics()
    log = CandidateLog(str(tmp_path), metrics, period_s=0.01, limit_chars=2000)
    log.add([{**row, "id": "first"}])
    await asyncio.to_thread(started.wait, 60)
    for number in range(10):
        log.add([{**row, "id": f"{number}"}])  # returns although the thread of the log waits for the store
    assert counted(metrics, "dropped") == 7
    resume.set()
    log.close()
    assert logged(tmp_path).keys() == {("first", 0), ("0", 0), ("1", 0), ("2", 0)}
    assert (counted(metrics, "written"), counted(metrics, "dropped")) == (4, 7)


def test_a_part_is_written_when_the_store_is_back(tmp_path, monkeypatch, row, capsys):
    failures, write = iter(range(3)), storage.write_bytes

    def fail(uri, data):
        if next(failures, None) is not None:
            raise CappyError("s3://bucket: access denied")
        return write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", fail)
    metrics = Metrics()
    log = CandidateLog(str(tmp_path), metrics, period_s=0.01, retry_s=0.01)
    log.add([row])
    deadline = time.monotonic() + 60
    while not counted(metrics, "written") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert logged(tmp_path).keys() == {("a", 0)} and capsys.readouterr().err.count("cannot be written; it is retried") == 1
    log.close()


def test_rows_that_cannot_be_written_are_dropped_and_a_dead_store_does_not_stop_the_server(tmp_path, monkeypatch, row):
    metrics = Metrics()
    log = CandidateLog(str(tmp_path), metrics)
    log.add([row, {**row, "id": "b", "instruction": "\ud800"}])
    log.close()
    assert logged(tmp_path).keys() == {("a", 0)} and counted(metrics, "dropped") == 1
    monkeypatch.setattr(storage, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("down")))
    log = CandidateLog(str(tmp_path), metrics, retry_s=0.01)
    log.add([row])
    log.close(timeout_s=0.05)
    assert counted(metrics, "dropped") == 2
    log.add([row])
    assert counted(metrics, "dropped") == 3
