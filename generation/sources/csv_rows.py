"""Rows of CSV and TSV files with a header row. Opens no file; imports no Ray.

A line whose quotation marks do not match becomes a dead letter, and reading resumes at the next line. Otherwise its row would contain
the lines after it, up to the next quotation mark or the end of the file.
"""

from __future__ import annotations

import csv
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from cluster.errors import UsageError
from generation.sources.row import dead_letter
from generation.sources.values import Cells

_MAX_ROW_CHARACTERS = 1 << 27
"""Limit of a row; Python's default limit of a cell is 2^17."""


def read_rows(lines: Iterator[str], uri: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Yield `(location, Cells or DeadLetter)`; an empty cell is None, and a location is `uri:number` with the last line of the row.

    Raises `UsageError` for a header with two equal names, or in another encoding than UTF-8.
    """
    csv.field_size_limit(_MAX_ROW_CHARACTERS)
    header: list[str] | None = None
    for number, cells in _records(lines, delimiter):
        location = f"{uri}:{number}"
        if header is None:
            header = _checked_header(cells, uri)
        elif isinstance(cells, str):
            yield location, dead_letter(location, "a quotation mark in the line is not closed, or text follows the closing one", cells)
        elif len(cells) > len(header):
            row = {**dict(zip(header, cells, strict=False)), "": cells[len(header) :]}
            yield location, dead_letter(location, f"the row has more cells than the header's {len(header)}", row)
        else:
            padded = [*cells, *[""] * (len(header) - len(cells))]
            yield location, Cells((name, cell or None) for name, cell in zip(header, padded, strict=True) if name)


def _checked_header(cells: list[str] | str, uri: str) -> list[str]:
    if isinstance(cells, str):
        raise UsageError(f"source: {uri}: a quotation mark in the header is not closed; fix the first line")
    names = [cell.strip() for cell in cells]
    if any("\0" in name for name in names) or names[0].startswith(("\udcff\udcfe", "\udcfe\udcff")):
        raise UsageError(f"source: {uri} is UTF-16; save it as UTF-8")
    repeated = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if repeated:
        shown = ", ".join(repeated).encode("utf-8", "backslashreplace").decode()
        raise UsageError(f"source: {uri}: the header has the column {shown} more than once; rename or remove all but one")
    return names


def _records(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield `(number of the last line, cells)` of each row, or `(number, line)` for a line with an unmatched quotation mark."""
    again: deque[str] = deque()
    number = 0
    while (first := again.popleft() if again else next(lines, None)) is not None:
        taken = [first]

        def feed(taken: list[str] = taken) -> Iterator[str]:
            yield taken[0]
            size = len(taken[0])
            while size < _MAX_ROW_CHARACTERS and (line := again.popleft() if again else next(lines, None)) is not None:
                taken.append(line)
                size += len(line)
                yield line

        record = (first,) if '"' not in first else feed()
        try:
            cells = next(csv.reader(record, delimiter=delimiter, strict=True), [])
        except csv.Error:
            again.extendleft(reversed(taken[1:]))
            number += 1
            yield number, first
            continue
        number += len(taken)
        if cells:
            yield number, cells
