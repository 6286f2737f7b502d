"""Parses JSON bodies of clients, with limits that `pydantic_core.from_json` does not have.

The event loop of the gateway runs this code, so its time must stay small for every body. The checks scan the bytes with numpy, and the
parser runs only within the limits. Imports neither Ray nor a web framework.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
from pydantic_core import from_json

MAX_DEPTH = 32
"""Levels of nested arrays and objects."""
MAX_KEYS = 1000
"""Names in one object."""
MAX_CONTAINERS = 20_000
"""Arrays and objects in a body. 2,048 messages of several parts each have fewer."""
MAX_NAMES = 50_000
"""Names in all objects of a body."""
_MAX_DIGITS = 100
_CONTAINER_TYPES = {dict, list}
_QUOTE, _BACKSLASH = ord('"'), b"\\"
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DEPTH_CHANGES = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""Maps a bracket to the change of depth that it makes, +1 or -1 as int8."""


def parse_json(body: bytes) -> Any:
    """Return the JSON value in `body`.

    Raises `ValueError`, with a message of one line, for:
    - bytes that are not JSON in UTF-8, including `NaN`, `Infinity` and half of a surrogate pair;
    - more than `MAX_DEPTH` levels or `MAX_CONTAINERS` arrays and objects, or a number of 100 digits or more;
    - an object with a name that occurs twice, or with more than `MAX_KEYS` names, or more than `MAX_NAMES` names in all.
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    names = _check_structure(body)
    value = from_json(body, allow_inf_nan=False)
    # `from_json` keeps the last of several equal names. Another reader, such as a proxy, may keep the first.
    if _count_names(value) < names:
        json.loads(body, object_pairs_hook=_refuse_repeated_name)
    return value


def _check_structure(body: bytes) -> int:
    """Return the number of names in all objects of `body`. Other invalid JSON passes.

    Raises `ValueError` for a body above a limit, before a parser recurses, converts or creates objects.
    """
    outside_strings = _remove_strings(body)
    brackets = outside_strings.translate(_DEPTH_CHANGES, _NOT_BRACKETS)
    if np.frombuffer(brackets, np.int8).cumsum(dtype=np.int32).max(initial=0) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if (containers := brackets.count(b"\x01")) > MAX_CONTAINERS:
        raise ValueError(f"{containers} arrays and objects are above the limit of {MAX_CONTAINERS}")
    if b"0" * _MAX_DIGITS in outside_strings.translate(_DIGITS_TO_ZERO):
        raise ValueError(f"a number has {_MAX_DIGITS} digits or more")
    for constant in ("NaN", "Infinity"):  # the parser reports only its position
        if constant.encode() in outside_strings:
            raise ValueError(f"{constant} is not a JSON number")
    names = outside_strings.count(b":")
    if names > MAX_NAMES:
        raise ValueError(f"{names} names in objects are above the limit of {MAX_NAMES}")
    return names


def _remove_strings(body: bytes) -> bytes:
    """Return the bytes of `body` that are outside its strings."""
    if _BACKSLASH in body:
        body = body.replace(rb"\\", b"").replace(rb"\"", b"")
    data = np.frombuffer(body, np.uint8)
    quotes = data == _QUOTE
    # The parity of the quotes so far is 1 inside a string. An 8-bit sum overflows and keeps its parity.
    inside = np.cumsum(quotes, dtype=np.uint8) & 1
    outside: np.ndarray = data[~(quotes | inside.view(bool))]
    return outside.tobytes()


def _count_names(value: Any) -> int:
    """Return the number of names in all objects of a value. Raises `ValueError` for an object with more than `MAX_KEYS`."""
    count, containers = 0, [value] if isinstance(value, dict | list) else []
    while containers:
        container = containers.pop()
        values: Collection[Any] = container
        if isinstance(container, dict):
            if len(container) > MAX_KEYS:
                raise ValueError(f"an object has {len(container)} names, above the limit of {MAX_KEYS}")
            count += len(container)
            values = container.values()
        # All in C: an array may have hundreds of thousands of numbers.
        containers += itertools.compress(values, map(_CONTAINER_TYPES.__contains__, map(type, values)))
    return count


def _refuse_repeated_name(pairs: list[tuple[str, Any]]) -> None:
    """Raise `ValueError` for an object with a name that occurs twice."""
    counts = Counter(name for name, _ in pairs)
    if len(counts) < len(pairs):
        name, times = counts.most_common(1)[0]
        raise ValueError(f"the name {name[:80]!r} occurs {times} times in one object; send it once")
