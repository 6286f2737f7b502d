"""The spending limit of servers, recorded in a folder."""

import asyncio

import pytest

from cluster import storage
from serving.ledger import Ledger


def withdrawn(folder):
    """Return the dollars of all recorded withdrawals."""
    return sum(storage.read_json(f"{folder}/{name}")["dollars"] for name in storage.list_files(str(folder)))


async def spend(ledger, name, cost, max_cost=None):
    """Reserve and settle a request; return whether the ledger accepted it."""
    accepted = await ledger.reserve(name, max_cost or cost)
    if accepted:
        ledger.settle(name, cost)
    return accepted


async def test_requests_are_accepted_until_the_limit_is_spent(tmp_path):
    ledger = Ledger(str(tmp_path), 1.0)
    assert [await spend(ledger, str(number), 0.25) for number in range(5)] == [True] * 4 + [False]
    assert withdrawn(tmp_path) == pytest.approx(1.0)


async def test_a_reservation_counts_in_full_until_it_is_settled(tmp_path):
    ledger = Ledger(str(tmp_path), 1.0)
    assert await ledger.reserve("long", 0.8)
    assert not await ledger.reserve("other", 0.3)
    ledger.settle("long", 0.1)
    assert await ledger.reserve("other", 0.8)


async def test_every_withdrawal_is_recorded_before_the_money_is_spent(tmp_path):
    ledger = Ledger(str(tmp_path), 1.0)
    for number in range(50):
        assert await ledger.reserve(str(number), 0.003)
        assert withdrawn(tmp_path) >= 0.003 * (number + 1)
    # Shares of a hundredth: a withdrawal for each request would make 50 files.
    assert len(storage.list_files(str(tmp_path))) == pytest.approx(0.15 / 0.01, abs=2)


async def test_a_restarted_server_loses_at_most_one_share(tmp_path):
    # A share of this limit is one dollar.
    assert await spend(Ledger(str(tmp_path), 100.0), "before", 0.25)
    after = Ledger(str(tmp_path), 100.0)
    assert [await spend(after, str(number), 1.0) for number in range(100)] == [True] * 99 + [False]


async def test_concurrent_servers_of_a_workspace_share_one_limit(tmp_path):
    ledgers = [Ledger(str(tmp_path), 1.0) for _ in range(4)]
    results = await asyncio.gather(*(spend(ledger, str(number), 0.05) for number in range(8) for ledger in ledgers))
    assert sum(results) * 0.05 <= 1.0 and sum(results) >= 12
    assert withdrawn(tmp_path) <= 1.0 + 1e-9
    assert not await spend(Ledger(str(tmp_path), 1.0), "late", 0.3)
