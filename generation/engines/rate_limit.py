"""Rate limits of requests and tokens, and the `Retry-After` header. Pure: no requests, no Ray."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Protocol


class RateLimiter:
    """A rate limit of `per_minute` requests or tokens, evenly spaced; None has no limit."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._clock = clock

    @property
    def delay_s(self) -> float:
        """Seconds until the next reservation may start."""
        return max(0.0, self._next - self._clock())

    def reserve(self, amount: float = 1.0) -> float:
        """Reserve `amount` requests or tokens, and return the seconds to wait before using them."""
        delay_s = self.delay_s
        self._next = self._clock() + delay_s + amount * self._seconds
        return delay_s

    def release(self, amount: float) -> None:
        """Return an unused `amount` of a reservation, so that later reservations start earlier."""
        self._next -= amount * self._seconds


class HasHeaders(Protocol):
    """An HTTP answer."""

    @property
    def headers(self) -> Mapping[str, str]: ...


def parse_retry_after(response: HasHeaders) -> float | None:
    """Return the seconds of a `Retry-After` header (a number or an HTTP date), or None if it is missing or invalid."""
    text = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    until = _date(text)
    if until is None:
        return None
    # Compare with the clock of the server, if it sends one. Its dates have whole seconds, so the result may be up to 1 s too long.
    now = _date(response.headers.get("Date", "")) or datetime.now(UTC)
    return max(0.0, (until - now).total_seconds())


def _date(text: str) -> datetime | None:
    """Return the time of an HTTP date, or None if it is none. A date without a time zone is UTC."""
    try:
        found = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
