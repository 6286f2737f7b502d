import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.json_limits import MAX_DEPTH, parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(value=VALUES, ascii_only=st.booleans())
@settings(deadline=None, max_examples=100)
def test_what_json_writes_is_read_back(value, ascii_only):
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize("text", ["[" * 99, '"', '\\"[[', "\\\\", '\\\\"{'])
def test_brackets_inside_texts_are_no_levels(text):
    assert parse_json(json.dumps({text: text * 20}).encode()) == {text: text * 20}


@pytest.mark.parametrize("pair", [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_the_last_level_is_read_and_the_next_is_not(pair):
    levels = MAX_DEPTH // sum(pair[0].count(bracket) for bracket in "[{")
    opened, closed = pair[0] * levels, pair[1] * levels
    parse_json(f"{opened}1{closed}".encode())
    with pytest.raises(ValueError, match="nested deeper than 32"):
        parse_json(f"[{opened}1{closed}]".encode())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "Expecting value"),
        (b"[1", "Expecting"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"\xff", "not UTF-8 at byte 0"),
        ("[1]".encode("utf-32"), "not UTF-8"),
        (b"[" * 100_000, "nested deeper"),
        (b"NaN", "NaN is not a JSON number"),
        (b"[-" + b"1" * 100 + b"]", "100 digits or more"),
        (b'{"a": 1, "a": 1}', "'a' stands 2 times"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' stands 2 times"),
        (json.dumps(dict.fromkeys(map(str, range(1001)))).encode(), "1001 names"),
        (b'"\\udfff"', "half of a surrogate pair"),
    ],
)
def test_what_is_not_read_is_named_in_one_line(body, says):
    with pytest.raises(ValueError, match=says) as caught:
        parse_json(body)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
