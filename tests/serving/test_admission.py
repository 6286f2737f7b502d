import asyncio

import pytest

from serving.admission import AdmissionQueue
from serving.backend import ApiError


async def test_a_full_queue_rejects_the_next_request_and_accepts_one_after_a_request_has_ended():
    queue, release, started = AdmissionQueue(2, 1), asyncio.Event(), []

    async def request(number: int) -> None:
        with queue.reserve() as place:
            async with place.run():
                started.append(number)
                await release.wait()

    tasks = [asyncio.create_task(request(number)) for number in range(3)]
    await asyncio.sleep(0)
    assert started == [0, 1] and queue.active == 3 and not queue.has_capacity
    with pytest.raises(ApiError, match="the server is full: 3 requests are running, queued or arriving; retry later") as caught:
        await request(3)
    assert (caught.value.status, caught.value.code, queue.active) == (503, "overloaded", 3)
    release.set()
    await asyncio.gather(*tasks)
    assert started == [0, 1, 2] and queue.active == 0
    assert queue.has_capacity


async def test_a_cancelled_request_leaves_the_queue():
    queue = AdmissionQueue(1, 1)

    async def request() -> None:
        with queue.reserve() as place:
            async with place.run():
                await asyncio.Event().wait()

    with queue.reserve() as place:
        async with place.run():
            waiting = asyncio.create_task(request())
            await asyncio.sleep(0)
            assert not queue.has_capacity
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert queue.active == 1 and queue.has_capacity
    assert (queue.active, queue.arriving) == (0, 0)


async def test_a_request_whose_body_arrives_has_a_place_and_frees_it_when_the_body_is_refused():
    queue = AdmissionQueue(1, 1)
    with queue.reserve(), queue.reserve():
        assert (queue.arriving, queue.active, queue.has_capacity) == (2, 0, False)
        with pytest.raises(ApiError, match="the server is full: 2 requests"), queue.reserve():
            pass
    with pytest.raises(ValueError, match="refused"), queue.reserve():
        raise ValueError("refused")
    assert (queue.arriving, queue.active) == (0, 0)
