"""Rank the scores of each instruction, and select the best rows of each in bounded memory, for `score.top_per_instruction`.

The scores are grouped by instruction on disk. Memory holds one group of instructions and one byte for each row. Imports no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa

from cluster import storage
from generation import shards, units
from generation.export_pools import Partitions
from generation.sources.row import hash_text

KEYED = pa.schema([("key", pa.string()), ("logit", pa.float32()), ("position", pa.int64())])
"""A score: the hash of its instruction, the raw logit, and the position of the row in the source."""
FILE_ROWS = 1 << 20
"""Rows of the source for each file on disk."""
_THREADS = 8


def best_rows(staging: str, names: Sequence[str], unit_rows: int, rows: int, limit: int) -> np.ndarray:
    """Return whether each row is among the `limit` best rows of its instruction, bool (rows,).

    Of equal scores the first row is better. A row without a score is never selected.

    Args:
        staging: URI of the staging folder, with all units finished.
        names: The units, in the order of their rows.
        unit_rows: Rows of a unit.
        rows: Rows of all units.
        limit: Largest number of rows of an instruction.
    """
    kept = np.zeros(rows, bool)
    files = 1 + rows // FILE_ROWS
    with storage.temporary_folder("ranking") as folder:
        with Partitions(folder / "instructions", files, KEYED) as partitions:
            for table in _keyed_units(staging, names, unit_rows):
                partitions.add(table)
        for number in range(files):
            kept[_best_positions(partitions.read(number), limit)] = True
            partitions.delete(number)
    return kept


def _keyed_units(staging: str, names: Sequence[str], unit_rows: int) -> Iterator[pa.Table]:
    """Yield the scores of the units as tables of `KEYED`. Some units are read ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(names), _THREADS):
            chunk = slice(start, start + _THREADS)
            yield from pool.map(partial(_keyed_unit, staging, unit_rows), range(len(names))[chunk], names[chunk])


def _keyed_unit(staging: str, unit_rows: int, number: int, name: str) -> pa.Table:
    prepared = units.read_unit(units.unit_uri(staging, "prepared", name))
    scored = shards.read_finished(staging, name, "score")
    keys = [hash_text(text, 16).hex() for text in prepared["instruction"].to_pylist()]
    first = number * unit_rows
    table = pa.table([pa.array(keys, pa.string()), scored["logit"], pa.array(np.arange(first, first + len(keys)))], schema=KEYED)
    return table.drop_null()


def _best_positions(table: pa.Table, limit: int) -> np.ndarray:
    """Return the positions of the `limit` best rows of each key of a table of `KEYED`."""
    codes = table["key"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    logits, positions = (table[name].to_numpy() for name in ("logit", "position"))
    order = np.lexsort((positions, -logits, codes))
    ordered = codes[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    ranks = np.arange(len(ordered)) - np.repeat(starts, np.diff(np.append(starts, len(ordered))))
    return np.asarray(positions[order[ranks < limit]])
