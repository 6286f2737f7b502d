import pytest

from cluster.errors import UsageError
from generation.sources import csv_rows
from generation.sources.row import DeadLetter


def read(text, delimiter=","):
    return list(csv_rows.read_rows(iter(text.splitlines(keepends=True)), "f", delimiter))


QUOTES = [
    ('a,b\n1,"x\n2,y\n3,z\n', {"f:2"}, ["y", "z"]),
    ('a,b\n1,x\n"2,y\n3,z\n', {"f:3"}, ["x", "z"]),
    ('a,b\n"1,x\n"2",y\n3,z\n', {"f:2"}, ["y", "z"]),
    ('a,b\n1,"x\n', {"f:2"}, []),
    ('a,b\n1,"x"y\n2,z\n', {"f:2"}, ["z"]),
    ('a,b\n1,"a \\"b\\" c"\n2,z\n', {"f:2"}, ["z"]),
]


@pytest.mark.parametrize(("text", "letters", "kept"), QUOTES)
def test_a_line_with_an_unmatched_quotation_mark_is_a_dead_letter_and_the_next_lines_are_read(text, letters, kept):
    rows = read(text)
    assert {where for where, row in rows if isinstance(row, DeadLetter)} == letters
    assert [row["b"] for _, row in rows if not isinstance(row, DeadLetter)] == kept


def test_quoted_cells_can_hold_lines_and_marks():
    rows = read('a,b\n1,"x\n""y"", z"\n5" pipe,b\n')
    assert rows == [("f:3", {"a": "1", "b": 'x\n"y", z'}), ("f:4", {"a": '5" pipe', "b": "b"})]


def test_names_are_stripped_missing_cells_are_none_and_blank_lines_are_skipped():
    assert read("a, b,\n1\n\n2,3,4\n") == [("f:2", {"a": "1", "b": None}), ("f:4", {"a": "2", "b": "3"})]
    assert read("a\tb\n1,2\t3\n", "\t") == [("f:2", {"a": "1,2", "b": "3"})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,b\n1,2,3\n", "f: the header has the column b more than once; rename or remove all but one"),
        ("a, b ,b\n1,2,3\n", "the column b more than once"),
        ('a,"b\n1,2\n', "f: a quotation mark in the header is not closed; fix the first line"),
        ("a\0,\0b\0\n", "f is UTF-16; save it as UTF-8"),
    ],
)
def test_a_header_that_cannot_be_used_is_an_error_of_one_line(text, message):
    with pytest.raises(UsageError) as caught:
        read(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)
