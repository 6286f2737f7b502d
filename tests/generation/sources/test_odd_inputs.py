"""The published rows of each odd input in `tests/data/odd`, and of random rows: no row is lost, and no row ends the reading."""

from __future__ import annotations

import csv
import json
import string
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import odd
from generation.sources import formats

ODD = Path(__file__).parents[2] / "data" / "odd"
SNI = "Definition: Paraphrase the sentence.\n\nNow complete the following example -\nInput: The cat sleeps.\nOutput: "
ANY = None

# Per input: the published (instruction, references, choices) in any order, the reasons of the dead letters, and the merged rows.
# ANY instead of the rows: their number only.
PUBLISHED = {
    "alp_list.jsonl": ([("x", ["a", "b"], None), ("y\n\np\nq", ["z"], None), ("w\n\n5", ["z"], None)], [], 0),
    "alpaca_sys.jsonl": ([("Answer in French\n\nUser: a\n\nAssistant: b\n\nUser: Say cat", ["chat"], None)], [], 0),
    "bad_first.json": ([("c", ["d"], None), ("e", ["f"], None)], ["the line is not JSON"], 0),
    "bb_num.json": (
        [("\nQ: 2+2\nA: ", ["4"], None), ("\nQ: 3+3\nA: ", ["6"], None), ("\nQ: 7\nA: ", ["7"], None)],
        ["`target_scores` gives no choice a score above 0", "the example has no `target` and no `target_scores`"],
        0,
    ),
    "binary.parquet": ([("q1", ["a"], None), ("q2", ["b"], None)], [], 0),
    "blank_first.json": ([("a", ["b"], None), ("c", ["d"], None)], [], 0),
    "dolly.jsonl": ([("Who?\n\nBob did it.", ["Bob"], None)], [], 0),
    "dups.jsonl": ([("Same q", ["number 1"], None), *((f"Other {n}", ["x"], None) for n in range(6))], [], 5),
    "evalset2.jsonl": ([("Which city is the capital of France and largest?", ["Paris"], None), ("q", ["z"], None)], [], 0),
    "hid": ([(f"d question {n}?", [f"ans {n}"], None) for n in range(3)], [], 0),
    "hubdir": ([(f"{name}{n}", ["a"], None) for name in "qt" for n in range(3)], [], 0),
    "json_answer_text.jsonl": (
        [("Give two fruits as a JSON list", ['["apple", "pear"]'], None), ("list of ints", ["[1, 2, 3]"], None)],
        [],
        0,
    ),
    "mixdir": ([*((f"{name} question {n}?", [f"ans {n}"], None) for name in "aBce" for n in range(3)), ("q", ["a"], None)], [], 0),
    "mm_same_q.jsonl": ([("Name a prime", ["7", "11"], None)], [], 5),
    "nullel.parquet": ([("q", ["a"], None)], [], 0),
    "orca.jsonl": ([("You are X\n\nq?", ["a"], None)], [], 0),
    "p3_choices_pipes.jsonl": ([("Is it good?", ["Yes"], ["Yes", "No"])], [], 0),
    "p3_empty_choices.jsonl": ([(f"Summarise {n}", ["short"], None) for n in range(3)], [], 0),
    "pandas_choices_repr.csv": ([(f"Is {n} even?", ["yes"], ["yes", "no"]) for n in range(2)], [], 0),
    "pandas_list_repr.csv": ([(f"Name fruit number {n}", ["apple", "pear"], None) for n in range(3)], [], 0),
    "qa_context.jsonl": ([("Who did it?\n\nBob did it.", ["Bob"], None)], [], 0),
    "same_template.jsonl": (ANY, [], 0),
    "set [v2]": ([(f"b question {n}?", [f"ans {n}"], None) for n in range(3)], [], 0),
    "sharegpt.jsonl": ([("hi", ["hello"], None)], [], 0),
    "sni_two_outputs.json": ([(SNI, ["The cat is asleep.", "The cat is sleeping.", "A cat sleeps."], None)], [], 2),
    "surrogate_key.jsonl": ([("ok", ["x"], None)], ["`instruction` is missing; the row has \\ud83d_emoji"], 0),
    "train_cont.jsonl": (ANY, [], 0),
    "ts.parquet": ([("q1", ["a"], None), ("q2", ["b"], None)], [], 0),
    "zh.jsonl": (ANY, [], 0),
}
# Inputs without a usable row: the error gives the reason of the first dead letter.
ERRORS = {
    "dup_hdr.csv": "the header has the column references more than once; rename or remove all but one",
    "mc_index.jsonl": "the first error: `references` holds '1', which is not in `answer_choices` at",
    "ps_none_target.jsonl": "the first error: template 't': TypeError: `answer` is null at",
    "ps_undefined_col.jsonl": "the first error: template 't': UndefinedError: 'text' is undefined at",
}


def test_the_table_has_every_input():
    assert {*PUBLISHED, *ERRORS} == {path.name for path in ODD.iterdir() if path.suffix != ".yaml"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_right_rows_of_an_odd_input_are_published(name):
    rows, reasons, merged = PUBLISHED[name]
    outcome = odd.measure(ODD / name)
    if rows is not ANY:
        key = [(row["instruction"], row["references"], row["answer_choices"]) for row in outcome.published]
        assert sorted(key, key=str) == sorted(rows, key=str)
    assert [letter.reason.startswith(reason) for letter, reason in zip(outcome.dead_letters, reasons, strict=True)] == [True] * len(reasons)
    assert (outcome.merged, outcome.error) == (merged, None) and outcome.is_complete


@pytest.mark.parametrize("name", ERRORS)
def test_an_odd_input_without_a_usable_row_is_an_error_of_one_line(name):
    error = odd.measure(ODD / name).error
    assert error is not None
    assert ERRORS[name] in error and "\n" not in error


def test_rows_of_a_test_file_are_not_train_rows():
    assert {(row["split"], row["instruction"][0]) for row in odd.measure(ODD / "hubdir").published} == {("train", "q"), ("validation", "t")}


NAMES = sorted(
    formats.columns_of("auto") | {"id", "input", "role", "content", "from", "value", "text", "target", "target_scores", "output"}
)
TEXTS = st.text(st.characters(codec=None), max_size=12) | st.sampled_from(["a", "['a', 'b']", "a ||| b", "[1", " ", "train", "test"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | TEXTS, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES) | TEXTS, VALUES, max_size=5) | VALUES, max_size=6)
GOOD = {"instruction": "good", "references": ["a"]}
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(path, format):
    """Assert that the rows of a file are published, set aside or merged, also by a named format; or that the error has one line."""
    outcome = odd.measure(path, f"source.format={format}")
    if outcome.error is None:
        assert outcome.is_complete
    else:
        assert "\n" not in outcome.error
        outcome.error.encode()
    for letter in outcome.dead_letters:
        letter.to_json().encode()
    for row in outcome.published:
        json.dumps(row, ensure_ascii=False).encode()
    return outcome


FORMATS = st.sampled_from(["auto", *formats.CONVERTERS])


@pytest.mark.slow
@FUZZ
@given(rows=ROWS, format=FORMATS, whole=st.booleans())
def test_random_json_rows_are_published_set_aside_or_merged(tmp_path, rows, format, whole):
    path = tmp_path / ("rows.json" if whole else "rows.jsonl")
    text = json.dumps([*rows, GOOD]) if whole else "\n".join(json.dumps(row) for row in [*rows, GOOD])
    path.write_text(text)
    outcome = check(path, format)
    assert format not in ("auto", "cappy") or any(row["instruction"] == "good" for row in outcome.published)


@pytest.mark.slow
@FUZZ
@given(
    lines=st.lists(st.binary(max_size=20) | st.just(json.dumps(GOOD).encode()), max_size=6),
    end=st.sampled_from(["jsonl", "json", "csv", "tsv"]),
)
def test_random_bytes_are_rows_or_dead_letters(tmp_path, lines, end):
    path = tmp_path / f"rows.{end}"
    path.write_bytes(b"\n".join(lines))
    check(path, "auto")


CELLS = TEXTS | st.text(string.punctuation + "a1 \n", max_size=8)


@pytest.mark.slow
@FUZZ
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True),
    rows=st.lists(st.lists(CELLS, max_size=5), max_size=5),
    format=FORMATS,
)
def test_random_csv_rows_are_published_set_aside_or_merged(tmp_path, names, rows, format):
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "references", *(name for name in names if name not in GOOD)])
        writer.writerows([["".join(char for char in cell if not "\ud800" <= char <= "\udfff") for cell in row] for row in rows])
        writer.writerow(["good", "a"])
    check(tmp_path / "rows.csv", format)


@pytest.mark.slow
@FUZZ
@given(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True), data=st.data(), format=FORMATS)
def test_random_parquet_rows_are_published_set_aside_or_merged(tmp_path, names, data, format):
    size = data.draw(st.integers(1, 4))
    columns = {}
    for name in names:
        values = data.draw(st.lists(VALUES, min_size=size, max_size=size))
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            columns[name] = pa.array([str(value).encode("utf-8", "surrogatepass") for value in values])
    try:
        pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    except pa.ArrowException:  # e.g. an object without keys, which Parquet cannot hold
        return
    check(tmp_path / "rows.parquet", format)


@pytest.mark.slow
@settings(FUZZ, max_examples=15)
@given(rows=st.lists(st.dictionaries(st.sampled_from(["text", "label", "answers"]), VALUES, max_size=3), min_size=1, max_size=5))
def test_random_rows_of_a_template_are_published_set_aside_or_blank(template_file, rows):
    template_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check(template_file, "auto")


@pytest.fixture(scope="module")
def template_file(tmp_path_factory):
    """Return the path of a JSONL file with two templates beside it."""
    folder = tmp_path_factory.mktemp("templates")
    a = {"answer_choices": "No ||| Yes", "jinja": "{{ text }}? ||| {{ answer_choices[label] }}"}
    b = {"jinja": "{% if label %}{{ text }}{% endif %} ||| {{ answers[0] }}"}
    (folder / "rows.yaml").write_text(json.dumps({"templates": {"a": a, "b": b}}))
    return folder / "rows.jsonl"
