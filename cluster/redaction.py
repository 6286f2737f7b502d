"""Replace credentials in URLs, in texts and in trees of settings. Pure: imports nothing else of Cappy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"

_URL = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*://[^\s"<>]+')
# Up to the last `@` before a path, or, for a password with `/`, `?` or `#` in it, up to the last `@` of the URL. `host:8000/a@b` has none.
_USER = re.compile(r"(?<=://)(?:[^/\s]*|[^/\s@:]+:(?!\d+(?:[/?#]|$))\S*)(?=@)")
_PARAMETER = re.compile(r"(?<=[?&;#])([^=&;#\s]+)=[^&;#\s']*")


def redact_text(text: str) -> str:
    """Return a text with the user, the password and the values of the parameters of each URL replaced."""
    return _URL.sub(_redact_url, text) if "://" in text else text


def _redact_url(url: re.Match[str]) -> str:
    return _PARAMETER.sub(rf"\1={REDACTED}", _USER.sub(REDACTED, url[0], count=1))


def redact_tree(value: Any) -> Any:
    """Return a tree of plain values with `redact_text` applied to every text in it."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {key: redact_tree(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [redact_tree(inner) for inner in value]
    return value
