"""Log the candidates of served requests (`serving.log_candidates`) as Parquet parts, for training once references or ratings exist.

A request adds its rows to a buffer in memory and continues. One thread writes the buffer as a part, every minute or when it is large
enough. If the store is slow or down, the buffer stays until its limit, and further rows are dropped and counted. So a request never
waits for the log and never fails because of it. A part is written whole: readers find no half of it.

A row has no API key, address or header of a client, and no name of one. Imports neither Ray nor a web framework.
"""

from __future__ import annotations

import io
import math
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import first_line
from cluster.progress import log
from generation.engines.contract import Candidate
from generation.schema import CANDIDATE_LOG
from generation.sources.row import is_encodable

_PERIOD_S = 60.0
_PART_CHARS = 8 << 20
_LIMIT_CHARS = 64 << 20
# Memory of a candidate beside its texts, in characters.
_OVERHEAD_CHARS = 200
_RETRY_S = 10.0
# Time for the last part when the server stops.
_CLOSE_S = 10.0


class Counts(Protocol):
    """Counts rows; `serving.prometheus.Metrics` is one."""

    def count_logged(self, result: str, rows: int) -> None:
        """Count rows that were `written` or `dropped`."""


class CandidateLog:
    """Writes rows of requests to parts below `uri`, a folder or s3:// prefix, in the background.

    Args:
        uri: The folder of the parts.
        counts: Counts the written and the dropped rows.
        period_s: Longest time between the first row of a part and the write, in seconds.
        limit_chars: Largest size of the rows in memory, in characters of text.
        retry_s: Time between attempts to write a part, in seconds.
    """

    def __init__(
        self, uri: str, counts: Counts, *, period_s: float = _PERIOD_S, limit_chars: int = _LIMIT_CHARS, retry_s: float = _RETRY_S
    ) -> None:
        self.uri, self._counts = uri, counts
        self._period_s, self._limit_chars, self._retry_s = period_s, limit_chars, retry_s
        self._changed = threading.Condition()
        self._rows: list[dict[str, Any]] = []
        self._chars = self._waiting_chars = 0
        """Size of all rows in memory, and of the rows that are not in a part yet."""
        self._closes_at: float | None = None
        self._thread: threading.Thread | None = None

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the rows of a request (`schema.CANDIDATE_LOG`) to the buffer, or drop and count them if it is full. Never waits."""
        size = sum(_size(row) for row in rows)
        with self._changed:
            if self._chars + size > self._limit_chars or self._closes_at is not None:
                self._counts.count_logged("dropped", len(rows))
                return
            self._rows += rows
            self._chars += size
            self._waiting_chars += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_parts, name="candidate-log", daemon=True)
                self._thread.start()
            if self._waiting_chars >= _PART_CHARS:
                self._changed.notify_all()

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Write the last part. Rows that are not written within `timeout_s` seconds are dropped and counted."""
        with self._changed:
            self._closes_at = time.monotonic() + timeout_s
            self._changed.notify_all()
        if self._thread:
            self._thread.join(timeout_s + self._retry_s)

    def _write_parts(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closes_at is not None or self._waiting_chars >= _PART_CHARS, self._period_s)
                rows, self._rows, self._waiting_chars = self._rows, [], 0
                closing = self._closes_at is not None
            if rows:
                size = sum(_size(row) for row in rows)
                written = self._write(rows)
                self._counts.count_logged("written", written)
                self._counts.count_logged("dropped", len(rows) - written)
                with self._changed:
                    self._chars -= size
            if closing:
                return

    def _write(self, rows: Sequence[dict[str, Any]]) -> int:
        """Write a part, with retries until the server stops; return the number of rows written."""
        sound = [row for row in rows if is_encodable(row["instruction"] + "".join(each["response"] for each in row["candidates"]))]
        if not sound:
            return 0
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(sound, CANDIDATE_LOG), sink, compression="zstd", write_page_checksum=True)
        name = f"candidates-{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}.parquet"
        reported = False
        while True:
            try:
                storage.write_bytes(storage.join(self.uri, name), sink.getvalue())
                return len(sound)
            except Exception as error:  # the thread must survive every error of the store
                if not reported:
                    log(f"warning: serving.log_candidates={self.uri}: a part cannot be written; it is retried ({first_line(error)})")
                reported = True
            with self._changed:
                left = math.inf if self._closes_at is None else self._closes_at - time.monotonic()
                if left <= 0:
                    return 0
                self._changed.wait(min(self._retry_s, left))


def _size(row: Mapping[str, Any]) -> int:
    return len(row["instruction"]) + _OVERHEAD_CHARS + sum(len(each["response"]) + _OVERHEAD_CHARS for each in row["candidates"])


def build_row(
    instruction: str,
    candidates: Sequence[Candidate],
    scores: Sequence[float],
    picked: Sequence[int],
    *,
    created: int,
    models: Mapping[str, str | None],
    selection: str | None,
) -> dict[str, Any]:
    """Return the row of one prompt, without the id of its request.

    Args:
        instruction: The instruction that the scorer reads.
        candidates: The pool, in the order of sampling.
        scores: The scorer's raw logit of each candidate, NaN without a score.
        picked: Positions of the choices of the answer, the best first; empty if the answer was withheld.
        created: Unix time of the answer, in seconds.
        models: `model`, `llm`, `scorer` and `scorer_version`.
        selection: The selection or the fallback that ranked the candidates.
    """
    return {
        "time": datetime.fromtimestamp(created, UTC),
        "instruction": instruction,
        "candidates": [
            {
                **{name: candidate[name] for name in ("response", "decoding", "tokens", "finish_reason", "logprob")},
                "score": None if math.isnan(score) else score,
                "picked": picked.index(position) if position in picked else None,
            }
            for position, (candidate, score) in enumerate(zip(candidates, scores, strict=True))
        ],
        **models,
        "selection": selection,
    }
