"""Rows of JSON lines and of JSON documents, from a stream of bytes. Opens no file; imports no Ray."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from generation.sources.row import dead_letter

_CHUNK = 1 << 20
_BETWEEN_ITEMS = re.compile(r"[\s,]*")


class Stream(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most `size`; empty at the end."""


class _RepeatedKeys(dict[str, Any]):
    """An object that gives a key more than once; it holds the last values."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.names = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _RepeatedKeys(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_lines(stream: Stream, uri: str) -> Iterator[tuple[str, Any]]:
    """Yield `(location, row)` for each line that is not blank; a line that is not JSON is a dead letter."""
    return _parse_lines(_lines(stream), uri)


def read_document(stream: Stream, uri: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of one task, of a list of rows, or of JSON lines, which many datasets also name `.json`.

    JSON lines are streamed if the first line is an object. The rows of a damaged list or of damaged lines that can be parsed are read.
    """
    lines = _lines(stream)
    head: list[bytes] = []
    full: list[bytes] = []
    while len(full) < 2 and (line := next(lines, None)) is not None:
        head.append(line)
        full += [line] if line.strip() else []
    if len(full) == 2 and isinstance(_parse(full[0]), dict):
        yield from _parse_lines(itertools.chain(head, lines), uri)
        return
    text = b"\n".join([*head, *lines])
    if not text.strip():
        return
    value = _parse(text)
    if isinstance(value, list):
        yield from (_row(f"{uri}:{number}", row, b"") for number, row in enumerate(value, 1))
    elif not isinstance(value, ValueError):
        yield _row(uri, value, text)
    elif text.lstrip().startswith(b"["):
        yield from _items_of_damaged_list(text.decode("utf-8", "surrogateescape"), uri)
    elif any(line.startswith(b"{") and isinstance(_parse(line), dict) for line in text.split(b"\n")):
        yield from _parse_lines(text.split(b"\n"), uri)
    else:
        yield _row(uri, value, text)


def _lines(stream: Stream) -> Iterator[bytes]:
    """Yield the lines of a stream without their ends."""
    pieces: list[bytes] = []
    while chunk := stream.read(_CHUNK):
        first, *lines = chunk.split(b"\n")
        pieces.append(first)
        if lines:
            yield b"".join(pieces)
            yield from lines[:-1]
            pieces = [lines[-1]]
    if any(pieces):
        yield b"".join(pieces)


def _parse_lines(lines: Iterable[bytes], uri: str) -> Iterator[tuple[str, Any]]:
    return (_row(f"{uri}:{number}", _parse(line), line) for number, line in enumerate(lines, 1) if line.strip())


def _parse(text: bytes) -> Any:
    """Return the value of a JSON text, or the error of the parser."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except ValueError as error:
        return error
    except RecursionError as error:
        return ValueError(str(error))


def _row(location: str, value: Any, text: bytes) -> tuple[str, Any]:
    """Return the location with the row, or with a dead letter for an error or for an object with repeated keys."""
    if isinstance(value, ValueError):
        return location, dead_letter(location, f"the line is not JSON: {value}", text[:2000].decode("utf-8", "replace"))
    if isinstance(value, _RepeatedKeys):
        return location, dead_letter(location, f"the row has {', '.join(value.names)} more than once", dict(value))
    return location, value


def _items_of_damaged_list(text: str, uri: str) -> Iterator[tuple[str, Any]]:
    """Yield the items of a list that is not valid JSON. After a damaged item, reading resumes at the next line that starts like the first.

    An item must be an object: only its first character shows where an item starts.
    """
    start = text.index("[") + 1
    indent = re.match(r"\s*?([ \t]*)\{", text[start:])
    resume = re.compile(rf"^{indent.group(1) if indent else ''}\{{", re.MULTILINE)
    number = 0
    while (start := _BETWEEN_ITEMS.match(text, start).end()) < len(text) and text[start:].strip() != "]":  # type: ignore[union-attr]
        number += 1
        location = f"{uri}:{number}"
        try:
            value, start = _DECODER.raw_decode(text, start)
            yield _row(location, value, b"")
        except (ValueError, RecursionError) as error:
            following = resume.search(text, start + 1)
            end = following.start() if following else len(text)
            yield location, dead_letter(location, f"an item of the list is not JSON: {error}", text[start : start + 500])
            start = end
