"""The spending limit of a server whose LLM is an endpoint with prices. The limit holds across restarts and servers.

The server withdraws dollars from the limit in advance, one share at a time, and records each withdrawal before it spends the money.
A server that crashes leaves at most one share unspent, which counts as spent. Concurrent withdrawals create different files, so all
servers of a workspace share one limit. Imports no Ray.
"""

from __future__ import annotations

import asyncio

from cluster import storage
from generation.budget import Budget

# Withdrawals that use up the limit, if no single request needs more than a share.
_SHARES = 100


class Ledger:
    """Reserve and record the cost of requests, in dollars, within `limit`; withdrawals are files below `uri` (a folder or s3:// prefix)."""

    def __init__(self, uri: str, limit: float) -> None:
        self.uri, self.limit = uri, limit
        self._budget = Budget(0.0)
        self._withdrawal_lock = asyncio.Lock()

    async def reserve(self, request: str, max_cost: float) -> bool:
        """Reserve `max_cost` dollars for a request and return True; return False if that would exceed the limit."""
        async with self._withdrawal_lock:
            while not self._budget.reserve(request, max_cost):
                dollars = await asyncio.to_thread(self._withdraw, max_cost)
                if not dollars:
                    return False
                self._budget.ceiling = (self._budget.ceiling or 0.0) + dollars
        return True

    def settle(self, request: str, cost: float) -> None:
        """Record the actual cost of a request in dollars, and free the rest of its reservation."""
        self._budget.settle(request, cost)

    def _withdraw(self, at_least: float) -> float:
        """Withdraw `at_least` dollars or a share, whichever is more, and return the amount: less if less is left, 0 if nothing is."""
        while True:
            withdrawals = [name for name in storage.list_files(self.uri) if name.endswith(".json")]
            left = self.limit - sum(float(storage.read_json(storage.join(self.uri, name))["dollars"]) for name in withdrawals)
            share = min(max(at_least, self.limit / _SHARES), left)
            if share <= 0:
                return 0.0
            # Fails if another server created the file first; then read the withdrawals again.
            if storage.create_json(storage.join(self.uri, f"{len(withdrawals):06d}.json"), {"dollars": share}):
                return share
