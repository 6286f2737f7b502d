"""API keys and their rate limits. Imports neither Ray nor a web framework; the clock is an argument.

The config holds only the SHA-256 of each key. A key has 256 random bits, so its hash reveals nothing and needs no salt.
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
    """Return a new key for a client, and its SHA-256 for `serving.api_keys`."""
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, hash_key(key)


def hash_key(key: str) -> str:
    """Return the SHA-256 of a key in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class TokenBucket:
    """A rate limit of `per_minute` units, refilled evenly; None means no limit. `clock` returns seconds."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._available, self._updated = per_minute or 0.0, clock()

    def take(self, amount: float) -> float:
        """Take `amount` units and return 0, or take none and return the seconds until they are available.

        Returns infinity for an amount above the limit of a minute.
        """
        if self.per_minute is None:
            return 0.0
        if amount > self.per_minute:
            return float("inf")
        now = self._clock()
        self._available = min(self.per_minute, self._available + (now - self._updated) * self.per_minute / 60)
        self._updated = now
        if amount <= self._available:
            self._available -= amount
            return 0.0
        return (amount - self._available) * 60 / self.per_minute


@dataclass(frozen=True)
class Caller:
    """A client with a valid key, or any client of a server without keys."""

    name: str | None
    """Name of the key; None on a server without keys."""
    requests: TokenBucket
    candidates: TokenBucket

    def count_request(self) -> None:
        """Count a request. Raises `ApiError` (429) above the key's limit."""
        self._take(self.requests, 1, "requests")

    def count_candidates(self, count: int) -> None:
        """Count candidates before they are sampled.

        Raises `ApiError`: 429 above the key's limit, 400 for more candidates than the limit of a whole minute.
        """
        self._take(self.candidates, count, "candidates")

    def _take(self, bucket: TokenBucket, amount: int, unit: str) -> None:
        wait_s = bucket.take(amount)
        if wait_s == float("inf"):
            raise ApiError(
                f"{amount} {unit} are above this key's limit of {bucket.per_minute:g} per minute; request fewer", code="invalid_value"
            )
        if wait_s:
            raise ApiError(
                f"this key's limit of {bucket.per_minute:g} {unit} per minute is reached; retry in {wait_s:.0f} s",
                429,
                code="rate_limit_exceeded",
                retry_s=wait_s,
            )


class Keyring:
    """The keys of a server. A server without keys accepts every client without limit."""

    def __init__(self, keys: Sequence[ApiKeyConfig], clock: Callable[[], float] = time.monotonic) -> None:
        self._callers = [
            (key.sha256, Caller(key.name, TokenBucket(key.requests_per_minute, clock), TokenBucket(key.candidates_per_minute, clock)))
            for key in keys
        ]
        self._anonymous = Caller(None, TokenBucket(None), TokenBucket(None))

    def authenticate(self, authorization: str | None, x_api_key: str | None = None) -> Caller:
        """Return the caller that sent the headers `Authorization: Bearer KEY` or `X-API-Key: KEY`.

        Compares with every key, each in constant time. Raises `ApiError` (401) for a missing or an invalid key.
        """
        if not self._callers:
            return self._anonymous
        scheme, _, bearer = (authorization or "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else (x_api_key or "").strip()
        if not key:
            raise ApiError("no API key; send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`", 401, code="invalid_api_key")
        hashed = hash_key(key)
        found = [caller for known, caller in self._callers if hmac.compare_digest(known, hashed)]
        if not found:
            raise ApiError("the API key is not valid for this server; send a key that its operator created", 401, code="invalid_api_key")
        return found[0]
