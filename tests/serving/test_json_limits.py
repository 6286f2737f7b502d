import json
import sys

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
def test_parse_json_reads_the_output_of_json_dumps(value, ascii_only):
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize("text", ["[" * 99, '"', '\\"[[', "\\\\", '\\\\"{'])
def test_brackets_inside_strings_do_not_count_as_levels(text):
    assert parse_json(json.dumps({text: text * 20}).encode()) == {text: text * 20}


@pytest.mark.parametrize("pair", [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_max_depth_is_accepted_and_one_more_level_is_rejected(pair):
    levels = MAX_DEPTH // sum(pair[0].count(bracket) for bracket in "[{")
    opened, closed = pair[0] * levels, pair[1] * levels
    parse_json(f"{opened}1{closed}".encode())
    with pytest.raises(ValueError, match="nested deeper than 32"):
        parse_json(f"[{opened}1{closed}]".encode())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "EOF while parsing a value at line 1 column 0"),
        (b"[1", "EOF while parsing a list at line 1 column 2"),
        (b"\xef\xbb\xbf{}", "expected value at line 1 column 1"),
        (b"\xff", "not UTF-8 at byte 0"),
        ("[1]".encode("utf-32"), "not UTF-8"),
        (b"[" * 100_000, "nested deeper"),
        (b"NaN", "NaN is not a JSON number"),
        (b"[-Infinity]", "Infinity is not a JSON number"),
        (b"[-" + b"1" * 100 + b"]", "100 digits or more"),
        (b'{"a": 1, "a": 1}', "the name 'a' occurs 2 times in one object; send it once"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the name 'b' occurs 2 times"),
        (json.dumps(dict.fromkeys(map(str, range(1001)))).encode(), "an object has 1001 names, above the limit of 1000"),
        (b"[" + b"{}," * 20_000 + b"{}]", "20002 arrays and objects are above the limit of 20000"),
        (b"[" + b'{"a":1,"b":2,"c":3},' * 17_000 + b"0]", "51000 names in objects are above the limit of 50000"),
        (b'[{"a":[{"\\u0061\\"":1,"a\\"":2}]}]', "occurs 2 times"),
        (b'"\\udfff"', "lone leading surrogate in hex escape at line 1 column 7"),
    ],
)
def test_a_rejected_body_gives_its_reason_in_one_line(body, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(body)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


FILLERS = [b'{"a":{}}', b"{}", b"[]", b'""', b"0", b'"x"', b"1e5", b"null"]


@pytest.mark.parametrize("filler", FILLERS)
def test_a_large_body_is_checked_without_a_python_call_for_each_value(filler):
    """The gateway's event loop parses bodies, so their checks must not run Python code for each of a million values."""
    body = b'{"model": [' + b",".join([filler] * ((1 << 20) // (len(filler) + 1))) + b"]}"
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        parse_json(body)
    except ValueError:
        pass
    finally:
        sys.setprofile(None)
    assert calls < 500
