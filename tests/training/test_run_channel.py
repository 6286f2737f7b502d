from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from cluster.errors import CappyError
from training.run_channel import RunChannel


def test_events_are_taken_once_in_their_order():
    async def run() -> None:
        channel = RunChannel()
        await channel.post({"step": 1})
        await channel.post({"log": "resuming"})
        assert await channel.take_events() == [{"step": 1}, {"log": "resuming"}]
        assert await channel.take_events() == []

    asyncio.run(run())


def test_the_first_failure_is_kept():
    async def run() -> None:
        channel = RunChannel()
        assert await channel.failure() is None
        first = CappyError("the loss is nan")
        await channel.report_failure(first)
        await channel.report_failure(CappyError("another worker failed too"))
        assert await channel.failure() is first

    asyncio.run(run())


def test_workers_wait_until_a_stop_is_requested():
    async def run() -> None:
        channel = RunChannel()
        waiting = asyncio.ensure_future(channel.wait_for_stop())
        await asyncio.sleep(0)
        assert not waiting.done()
        await channel.request_stop()
        await waiting

    asyncio.run(run())


def test_the_module_imports_neither_torch_nor_transformers():
    script = "import sys; import training.run_channel; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    shown = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
