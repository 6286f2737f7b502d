"""Parses JSON with limits that the standard parser does not have: depth, duplicate names, digits of a number. Pure."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, NoReturn

import numpy as np

MAX_DEPTH = 32
"""Levels of arrays and objects."""
MAX_KEYS = 1000
"""Names in an object."""
_STRING = re.compile(rb'"[^"]*"')
_LONG_NUMBER = re.compile(rb"[0-9]{100}")
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""A bracket as the step it is between levels, +1 or -1 as int8."""


def parse_json(body: bytes) -> Any:
    """Return the value in `body`.

    Raises `ValueError`, one line, for what is no JSON, too deep, has endless numbers, `NaN`, half of a surrogate pair, a name twice
    in an object or too many of them.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    _check_shape(body)
    tree = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    try:
        json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("an escape such as \\ud800 is half of a surrogate pair and no character") from None
    return tree


def _check_shape(body: bytes) -> None:
    """Refuse depth and endless numbers before a parser recurses or computes; what is no JSON at all is left to it."""
    bare = _STRING.sub(b"", body.replace(rb"\\", b"").replace(rb"\"", b""))
    levels = np.frombuffer(bare.translate(_STEPS, _NO_BRACKET), np.int8).cumsum(dtype=np.int32)
    if levels.max(initial=0) > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    if _LONG_NUMBER.search(bare):
        raise ValueError("a number in it has 100 digits or more")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object in it has {len(pairs)} names, more than {MAX_KEYS}")
    tree = dict(pairs)
    if len(tree) < len(pairs):
        name, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name[:80]!r} stands {times} times in one object; give it once")
    return tree
