"""A regression set from logged candidates and a file of references or ratings."""

import io
import json
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cappy import display
from cappy.inspection import run_inspect
from cluster import artifacts, storage
from cluster.config import Config, load
from cluster.errors import CappyError, UsageError
from generation.annotate import replace_labels
from generation.dataset import RegressionSet
from generation.feedback import RATING, run_feedback
from generation.schema import CANDIDATE_LOG

RESPONSES = ("a red fox", "a fox", "a cat")


def answer(number, picked=0, instruction=None, responses=RESPONSES):
    common = {"decoding": "d", "tokens": 2, "finish_reason": "stop", "logprob": -1.0, "score": 0.1}
    candidates = [{"response": text, **common, "picked": 0 if at == picked else None} for at, text in enumerate(responses)]
    return {
        "id": f"chatcmpl-{number}",
        "prompt": 0,
        "time": datetime(2026, 1, 1, tzinfo=UTC),
        "instruction": instruction or f"which animal is number {number}",
        "candidates": candidates,
        **{"model": "cappy", "llm": "tiny", "scorer": "s", "scorer_version": "v", "selection": "score"},
    }


@pytest.fixture
def log(tmp_path):
    """A log of 20 answers in two parts."""
    for part in range(2):
        rows = [answer(number, picked=number % 3) for number in range(part * 10, part * 10 + 10)]
        storage.write_bytes(f"{tmp_path}/log/candidates-{part}.parquet", b"")
        pq.write_table(pa.Table.from_pylist(rows, CANDIDATE_LOG), f"{tmp_path}/log/candidates-{part}.parquet")
    return f"{tmp_path}/log"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def annotate(tmp_path, log, *rows, **options):
    return run_feedback(Config(), src=log, dst=f"{tmp_path}/set", feedback=write(tmp_path / "feedback.jsonl", *rows), **options)


def read(tmp_path):
    opened = RegressionSet(f"{tmp_path}/set")
    assert artifacts.verify(opened.uri, opened.manifest) == []
    return {row["instruction"]: row for split in opened.manifest["counts"] for row in opened.to_pandas(split).to_dict("records")}


def test_references_label_all_candidates(tmp_path, log):
    rows = [{"id": f"chatcmpl-{number}", "reference": ["a fox"], "dataset": "animals"} for number in range(12)]
    summary = annotate(tmp_path, log, *rows)
    assert (summary["instructions"], summary["pairs"], summary["dead_letters"]) == (12, 48, 0)
    assert summary["splits"]["train"]["instructions"] + summary["splits"].get("validation", {"instructions": 0})["instructions"] == 12
    row = read(tmp_path)["which animal is number 4"]
    assert row["dataset"] == "animals" and list(row["references"]) == ["a fox"]
    labels = [(each["source"], each["response"], round(each["label"], 2), each["model"]) for each in row["candidates"]]
    assert labels == [
        ("reference", "a fox", 1.0, None),
        ("sampled", "a red fox", 0.8, "tiny"),
        ("sampled", "a fox", 1.0, "tiny"),
        ("sampled", "a cat", 0.5, "tiny"),
    ]
    manifest = storage.read_json(f"{tmp_path}/set/_MANIFEST.json")
    assert manifest["metric"]["name"] == "rouge_l" and manifest["config"]["sampler"]["model"] == "tiny"
    console = Console(file=io.StringIO(), width=200)
    display.show_summary("dataset", summary, console)
    display.show_inspection(run_inspect(f"{tmp_path}/set"), console)
    assert "model tiny; from the log of served candidates" in console.file.getvalue() and "labels rouge_l" in console.file.getvalue()
    card = storage.read_bytes(f"{tmp_path}/set/README.md").decode()
    assert "The prompt form and the settings of the decodings are unknown" in card and "| decoding | n |" not in card
    assert "is its Rouge-L against the references" in card and manifest["lineage"]["log"] == log
    # The rows are those of any set, so that `annotate` can label them again.
    table = pa.concat_tables(RegressionSet(f"{tmp_path}/set").batches("train"))
    again = replace_labels(table, load(None, {"generate.label.metric": "exact_match"}).generate.label)
    assert {each["label"] for pool in again["candidates"].to_pylist() for each in pool if each["source"] == "sampled"} == {0.0, 1.0}


def test_a_rating_is_the_label_of_the_rated_response(tmp_path, log):
    given = [
        {"id": "chatcmpl-0", "rating": 0.25},
        {"id": "chatcmpl-0", "rating": 0.75},
        {"id": "chatcmpl-1", "rating": 1, "response": "a cat"},
        {"id": "chatcmpl-1", "rating": 0},
        {"id": "chatcmpl-2", "rating": 1, "response": "a cat"},
        {"id": "chatcmpl-2", "rating": 0},  # of the first choice, which is the same response
    ]
    annotate(tmp_path, log, *given)
    rows = read(tmp_path)
    found = {name: [(each["response"], each["label"]) for each in row["candidates"]] for name, row in rows.items()}
    assert found == {
        "which animal is number 0": [("a red fox", 0.5)],
        "which animal is number 1": [("a fox", 0.0), ("a cat", 1.0)],
        "which animal is number 2": [("a cat", 0.5)],
    }
    assert storage.read_json(f"{tmp_path}/set/_MANIFEST.json")["metric"] == RATING
    card = storage.read_bytes(f"{tmp_path}/set/README.md").decode()
    assert "its rating by users, in [0, 1]" in card and "against the references" not in card and "None" not in card


def test_answers_to_one_instruction_are_one_row(tmp_path):
    rows = [answer(0, instruction="same", responses=("a", "b")), answer(1, instruction="same", responses=("b", "c"))]
    storage.write_bytes(f"{tmp_path}/log/candidates-0.parquet", b"")
    pq.write_table(pa.Table.from_pylist(rows, CANDIDATE_LOG), f"{tmp_path}/log/candidates-0.parquet")
    annotate(tmp_path, f"{tmp_path}/log", {"id": "chatcmpl-0", "reference": "a"}, {"id": "chatcmpl-1", "reference": "a"})
    assert [each["response"] for each in read(tmp_path)["same"]["candidates"]] == ["a", "a", "b", "c"]
    rated = [
        *({"id": "chatcmpl-0", "rating": rating, "response": "b"} for rating in (1, 1, 0.5)),
        {"id": "chatcmpl-1", "rating": 0, "response": "b"},
    ]
    annotate(tmp_path, f"{tmp_path}/log", *rated, overwrite=True)
    assert [(each["response"], each["label"]) for each in read(tmp_path)["same"]["candidates"]] == [("b", 0.625)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"reference": "x"}, "no id; give the id of the answer as a text"),
        ({"id": "chatcmpl-1"}, "needs either reference or rating, and has neither"),
        ({"id": "chatcmpl-1", "reference": "x", "rating": 1}, "needs either reference or rating, and has both"),
        ({"id": "chatcmpl-1", "rating": 3}, "rating=3 is outside [0, 1]"),
        ({"id": "chatcmpl-1", "rating": "good"}, "rating='good' is not a number"),
        ({"id": "chatcmpl-1", "prompt": float("inf"), "rating": 1}, "prompt=inf or rating=1 is not a number"),
        ({"id": "chatcmpl-1", "reference": " "}, "reference is empty or not a text"),
        ({"id": "chatcmpl-1", "reference": 5}, "reference is empty or not a text"),
        ({"id": "chatcmpl-1", "reference": {"text": "x"}}, "reference is empty or not a text"),
        ({"id": "chatcmpl-1", "rating": 1, "response": ["a cat"]}, "response is not a text"),
        ({"id": "chatcmpl-1", "reference": "x", "dataset": "\ud800"}, "dataset is not a text"),
        ({"id": "chatcmpl-99", "rating": 1}, "the log has no answer with this id and prompt"),
        ({"id": "chatcmpl-1", "rating": 1, "response": "a dog"}, "a rated response is not a candidate of the answer"),
        (["a list"], "no id; give the id of the answer as a text"),
    ],
)
def test_feedback_that_cannot_be_used_is_a_dead_letter_and_alone_an_error(tmp_path, log, row, reason):
    with pytest.raises(CappyError, match="no answer there has usable feedback") as error:
        annotate(tmp_path, log, row)
    assert reason in str(error.value)
    annotate(tmp_path, log, row, {"id": "chatcmpl-2", "rating": 1})
    (letter,) = (tmp_path / "set" / "dead_letters.jsonl").read_text().splitlines()
    assert reason in json.loads(letter)["reason"] and "feedback.jsonl:1" in json.loads(letter)["where"]


def test_the_rating_of_an_unknown_response_is_a_dead_letter_beside_those_of_known_ones(tmp_path, log):
    annotate(tmp_path, log, *({"id": "chatcmpl-1", "rating": rating, "response": text} for text, rating in (("a cat", 1), ("a dog", 0))))
    assert [(each["response"], each["label"]) for row in read(tmp_path).values() for each in row["candidates"]] == [("a cat", 1.0)]
    (letter,) = (tmp_path / "set" / "dead_letters.jsonl").read_text().splitlines()
    assert "a rated response is not a candidate of the answer" in json.loads(letter)["reason"]


def test_the_rating_of_a_withheld_answer_is_a_dead_letter_beside_those_of_its_candidates(tmp_path):
    storage.write_bytes(f"{tmp_path}/log/candidates-0.parquet", b"")
    pq.write_table(pa.Table.from_pylist([answer(0, picked=None)], CANDIDATE_LOG), f"{tmp_path}/log/candidates-0.parquet")
    annotate(tmp_path, f"{tmp_path}/log", {"id": "chatcmpl-0", "rating": 0}, {"id": "chatcmpl-0", "rating": 1, "response": "a cat"})
    assert [(each["response"], each["label"]) for row in read(tmp_path).values() for each in row["candidates"]] == [("a cat", 1.0)]
    assert "not a candidate of the answer" in (tmp_path / "set" / "dead_letters.jsonl").read_text()


def test_references_beside_ratings_and_a_used_destination_are_refused(tmp_path, log):
    with pytest.raises(UsageError, match="has references and ratings, and a set has labels of one kind; make two files"):
        annotate(tmp_path, log, {"id": "chatcmpl-1", "rating": 1}, {"id": "chatcmpl-2", "reference": "x"})
    with pytest.raises(UsageError, match=r"is not a log of served candidates: no column candidates; give the folder of serving"):
        annotate(tmp_path, f"{tmp_path}/feedback.jsonl", {"id": "chatcmpl-1", "rating": 1})
    annotate(tmp_path, log, {"id": "chatcmpl-1", "rating": 1})
    with pytest.raises(UsageError, match="already holds a finished run"):
        annotate(tmp_path, log, {"id": "chatcmpl-2", "rating": 1})
    assert annotate(tmp_path, log, {"id": "chatcmpl-2", "rating": 1}, overwrite=True)["instructions"] == 1
    assert list(read(tmp_path)) == ["which animal is number 2"]
