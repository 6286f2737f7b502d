"""Parses JSON bodies of clients, with limits that `pydantic_core.from_json` does not have. Pure: no Ray, no web framework.

The parser itself rejects invalid JSON and half of a surrogate pair. This module adds limits of the nesting depth, of the names in an
object and of the digits in a number. It also rejects a name that occurs twice in one object, and names the reason for bytes that are
not UTF-8 and for NaN.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import numpy as np
from pydantic_core import from_json

MAX_DEPTH = 32
"""Levels of nested arrays and objects."""
MAX_KEYS = 1000
"""Names in one object."""
_STRING = re.compile(rb'"[^"]*"')
_LONG_NUMBER = re.compile(rb"[0-9]{100}")
_CONSTANT = re.compile(rb"NaN|Infinity")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DEPTH_CHANGES = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""Maps a bracket to the change of depth that it makes, +1 or -1 as int8."""


def parse_json(body: bytes) -> Any:
    """Return the JSON value in `body`.

    Raises `ValueError`, with a message of one line, for:
    - bytes that are not JSON in UTF-8, including `NaN`, `Infinity` and half of a surrogate pair;
    - more than `MAX_DEPTH` levels, or a number of 100 digits or more;
    - an object with a name that occurs twice, or with more than `MAX_KEYS` names.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    _check_structure(body)
    value = from_json(body, allow_inf_nan=False)
    # `from_json` keeps the last of several equal names. Another reader, such as a proxy, may keep the first.
    json.loads(text, object_pairs_hook=_check_names)
    return value


def _check_structure(body: bytes) -> None:
    """Raise `ValueError` for deep nesting or a long number, before a parser recurses or converts. Other invalid JSON passes."""
    outside_strings = _STRING.sub(b"", body.replace(rb"\\", b"").replace(rb"\"", b""))
    depths = np.frombuffer(outside_strings.translate(_DEPTH_CHANGES, _NOT_BRACKETS), np.int8).cumsum(dtype=np.int32)
    if depths.max(initial=0) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if _LONG_NUMBER.search(outside_strings):
        raise ValueError("a number has 100 digits or more")
    if constant := _CONSTANT.search(outside_strings):  # the parser reports only its position
        raise ValueError(f"{constant[0].decode()} is not a JSON number")


def _check_names(pairs: list[tuple[str, Any]]) -> None:
    """Raise `ValueError` for an object with too many names or with a name that occurs twice."""
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object has {len(pairs)} names, above the limit of {MAX_KEYS}")
    counts = Counter(name for name, _ in pairs)
    if len(counts) < len(pairs):
        name, times = counts.most_common(1)[0]
        raise ValueError(f"the name {name[:80]!r} occurs {times} times in one object; send it once")
