"""Decode objects that a store holds with `Content-Encoding: gzip`. Standard library only.

Many tools set the header wrongly, so the bytes decide. A body that is not gzip is not changed. A `.gz` file is decoded only if it is
compressed twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from itertools import chain

_PIECE = 8 << 20
_MAGIC = b"\x1f\x8b"
_NOT_SUPPORTED = ("br", "zstd", "deflate", "compress")


class EncodingError(Exception):
    """The body does not have the encoding that its header names."""


def unsupported(header: str) -> str | None:
    """Return the encoding of a `Content-Encoding` header that cannot be decoded; None if there is none."""
    return next((each for each in _encodings(header) if each in _NOT_SUPPORTED), None)


def decode(chunks: Iterable[bytes], header: str, name: str) -> Iterator[bytes]:
    """Yield the content of a body. `name` is the name of the object.

    Raises `EncodingError` if a gzip body is damaged or cut.
    """
    if not {"gzip", "x-gzip"} & set(_encodings(header)):
        yield from chunks
        return
    pieces = iter(chunks)
    first = b""
    while len(first) < 1024 and (piece := next(pieces, None)) is not None:
        first += piece
    if not first.startswith(_MAGIC) or (name.endswith((".gz", ".tgz")) and not _starts_with_gzip(first)):
        yield first
        yield from pieces
        return
    yield from _decompress(chain([first], pieces))


def _encodings(header: str) -> list[str]:
    return [each.strip().lower() for each in header.split(",")]


def _starts_with_gzip(data: bytes) -> bool:
    """Return whether the decompressed data is gzip too."""
    try:
        return zlib.decompressobj(wbits=31).decompress(data, len(_MAGIC)) == _MAGIC
    except zlib.error:
        return False


def _decompress(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the content of one or several gzip members, in pieces of at most `_PIECE` bytes."""
    decoder = zlib.decompressobj(wbits=31)
    try:
        for data in chunks:
            while data:
                if decoder.eof:
                    if not data.strip(b"\0"):  # padding
                        break
                    decoder = zlib.decompressobj(wbits=31)
                yield decoder.decompress(data, _PIECE)
                data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
        yield decoder.flush()
    except zlib.error as error:
        raise EncodingError(f"its gzip body is damaged ({error})") from None
    if not decoder.eof:
        raise EncodingError("its gzip body is cut")
