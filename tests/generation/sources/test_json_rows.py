import io
import json

import pytest

from generation.sources import json_rows
from generation.sources.row import DeadLetter

A, B = {"a": 1}, {"b": [2, {"c": 3}]}
LONG = {"a": "x" * 3_000_000}


def document(text):
    return list(json_rows.read_document(io.BytesIO(text.encode("utf-8", "surrogatepass")), "f"))


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (f"\n\n{json.dumps(A)}\n\n{json.dumps(B)}\n", [A, B]),
        (f"{json.dumps(LONG)}\n{json.dumps(B)}\n", [LONG, B]),
        (json.dumps([A, B]), [A, B]),
        (json.dumps([A, B], indent=2), [A, B]),
        (json.dumps(B, indent=2), [B]),
        (f"\n{json.dumps(A)}", [A]),
        ("\ufeff" + json.dumps([A, B]), [A, B]),
        ("\n \n", []),
        ("", []),
    ],
)
def test_a_document_is_one_row_a_list_or_lines(text, rows):
    assert [row for _, row in document(text)] == rows


@pytest.mark.parametrize(
    ("text", "rows", "letters"),
    [
        (f'{{"a": 1\n{json.dumps(A)}\n{json.dumps(B)}\n', [A, B], 1),
        (f"x\n{json.dumps(A)}\n{{\n{json.dumps(B)}", [A, B], 2),
        (f"[\n {json.dumps(A)},\n {{broken,\n {json.dumps(B)}\n]", [A, B], 1),
        (f'[\n{json.dumps(A)},\n{json.dumps(B)},\n{{"trunc', [A, B], 1),
        (json.dumps([A, A, B], indent=2).replace('"b": [', '"b": [[['), [A, A], 1),
        (json.dumps(B, indent=2)[:-3], [], 1),
        ('{"a": 1} {"a": 2}', [], 1),
        ("[" * 100_000, [], 1),
        ('{"a": 1, "a": 2}', [], 1),
        ('[{"a": 1, "a": 2}, {"a": 1}]', [A], 1),
    ],
)
def test_the_good_rows_of_a_damaged_document_are_read(text, rows, letters):
    found = [row for _, row in document(text)]
    assert [row for row in found if not isinstance(row, DeadLetter)] == rows
    assert sum(isinstance(row, DeadLetter) for row in found) == letters


def test_lines_are_numbered_from_the_start_of_the_file():
    assert [where for where, _ in document(f"\n{json.dumps(A)}\n\n{json.dumps(B)}")] == ["f:2", "f:4"]
    lines = list(json_rows.read_lines(io.BytesIO(b'\n{"a": 1}\n{"a": 1, "a": 2}\n' + json.dumps(LONG).encode()), "f"))
    assert [where for where, _ in lines] == ["f:2", "f:3", "f:4"] and lines[2][1] == LONG
    assert lines[1][1].reason == "the row has a more than once"
