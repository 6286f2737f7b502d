"""The money ceiling of a server in front of an endpoint with prices: nothing is asked that could pass it, across restarts.

Dollars are drawn from the ceiling in advance, a share at a time, each draw written down before it is spent. A server that dies
leaves at most one share unspent, which counts as spent. Of draws at once each takes another place, so servers of one workspace
share a ceiling.
"""

from __future__ import annotations

import asyncio

from cluster import storage
from generation.budget import Budget

_SHARES = 100


class Ledger:
    """Dollars drawn from `ceiling`, kept below `uri` (a folder or s3:// prefix)."""

    def __init__(self, uri: str, ceiling: float) -> None:
        self.uri, self.ceiling = uri, ceiling
        self._budget = Budget(0.0)
        self._drawing = asyncio.Lock()

    async def reserve(self, request: str, most: float) -> bool:
        """Promise a request the `most` it can cost, and return True; or return False where the ceiling has no room for it."""
        async with self._drawing:
            while not self._budget.reserve(request, most):
                drawn = await asyncio.to_thread(self._draw, most)
                if not drawn:
                    return False
                self._budget.ceiling = (self._budget.ceiling or 0.0) + drawn
        return True

    def settle(self, request: str, cost: float) -> None:
        """Count what a request under way did cost."""
        self._budget.settle(request, cost)

    def _draw(self, most: float) -> float:
        """Return dollars drawn, at least `most` where they are there; 0 where all are drawn."""
        while True:
            draws = [name for name in storage.list_files(self.uri) if name.endswith(".json")]
            left = self.ceiling - sum(float(storage.read_json(storage.join(self.uri, name))["dollars"]) for name in draws)
            share = min(max(most, self.ceiling / _SHARES), left)
            if share <= 0:
                return 0.0
            if storage.create_json(storage.join(self.uri, f"{len(draws):06d}.json"), {"dollars": share}):
                return share
