"""API keys: who may ask, and how much. Pure but for the clock: no Ray, no web server.

The config holds the SHA-256 of each key alone. A key has 256 bits of chance, so its hash gives nothing away and needs no salt.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.config import ApiKeyConfig
from serving.backend import ApiError

_PREFIX = "cappy-"


def create_key() -> tuple[str, str]:
    """Return a key to give to a client and the SHA-256 to put into `serving.api_keys`."""
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, hash_key(key)


def hash_key(key: str) -> str:
    """Return the SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class TokenBucket:
    """A minute's worth of something, refilled evenly; None has no end. `clock` gives seconds."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._full, self._clock = per_minute, clock
        self._left, self._looked = per_minute or 0.0, clock()

    def take(self, amount: float) -> float:
        """Take it and return 0, or take nothing and return the seconds until it would be there; infinity where it never will."""
        if self._full is None:
            return 0.0
        if amount > self._full:
            return float("inf")
        now = self._clock()
        self._left = min(self._full, self._left + (now - self._looked) * self._full / 60)
        self._looked = now
        if amount <= self._left:
            self._left -= amount
            return 0.0
        return (amount - self._left) * 60 / self._full


@dataclass(frozen=True)
class Caller:
    """A client that gave a known key, or anyone where the server has none."""

    name: str | None
    """Of the key; None where the server has none."""
    requests: TokenBucket
    candidates: TokenBucket

    def count_request(self) -> None:
        """Count a request. Raises `ApiError` (429) above the key's limit."""
        self._take(self.requests, 1, "requests")

    def count_candidates(self, count: int) -> None:
        """Count candidates about to be sampled. Raises `ApiError` (429) above the key's limit, (400) where it never fits."""
        self._take(self.candidates, count, "candidates")

    def _take(self, allowance: TokenBucket, amount: int, what: str) -> None:
        wait = allowance.take(amount)
        if wait == float("inf"):
            raise ApiError(f"{amount} {what} are more than this key may have in a minute; ask for fewer", code="invalid_value")
        if wait:
            raise ApiError(
                f"this key's {what} for the minute are used up; try again in {wait:.0f} s", 429, code="rate_limit_exceeded", retry_s=wait
            )


class Keyring:
    """The keys a server knows; without any, everyone may ask without limit."""

    def __init__(self, keys: Sequence[ApiKeyConfig], clock: Callable[[], float] = time.monotonic) -> None:
        self._callers = [
            (key.sha256, Caller(key.name, TokenBucket(key.requests_per_minute, clock), TokenBucket(key.candidates_per_minute, clock)))
            for key in keys
        ]
        self._anyone = Caller(None, TokenBucket(None), TokenBucket(None))

    def authenticate(self, authorization: str | None, x_api_key: str | None = None) -> Caller:
        """Return who sent the headers `Authorization: Bearer KEY` or `X-API-Key: KEY`.

        Compares with every key, each in constant time. Raises `ApiError` (401) for a key that is missing or not known.
        """
        if not self._callers:
            return self._anyone
        scheme, _, bearer = (authorization or "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else (x_api_key or "").strip()
        if not given:
            raise ApiError("no API key; send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`", 401, code="invalid_api_key")
        hashed = hash_key(given)
        found = [caller for known, caller in self._callers if hmac.compare_digest(known, hashed)]
        if not found:
            raise ApiError("the API key is not known to this server", 401, code="invalid_api_key")
        return found[0]
