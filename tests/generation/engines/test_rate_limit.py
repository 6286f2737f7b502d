import httpx
import pytest

from generation.engines.rate_limit import RateLimiter, parse_retry_after


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def start_times(limiter, clock, amounts):
    """Wait for each amount as the engine does; return the times since the start at which it may be used."""
    start, times = clock.now, []
    for amount in amounts:
        clock.now += limiter.reserve(amount)
        times.append(clock.now - start)
    return times


def test_a_rate_limiter_spaces_reservations_by_their_amounts():
    clock = Clock()
    assert start_times(RateLimiter(6000, clock), clock, [10, 20, 10]) == pytest.approx([0, 0.1, 0.3])
    assert start_times(RateLimiter(None, clock), clock, [1e9] * 3) == [0, 0, 0]


def test_concurrent_reservations_add_their_waits():
    clock = Clock()
    limiter = RateLimiter(60, clock)
    assert [limiter.reserve() for _ in range(3)] == pytest.approx([0, 1, 2])
    clock.now += 2.5
    assert limiter.delay_s == pytest.approx(0.5)


def test_a_released_amount_shortens_the_next_wait():
    clock = Clock()
    limiter = RateLimiter(600, clock)
    limiter.reserve(100)
    limiter.release(99)
    assert start_times(limiter, clock, [1]) == pytest.approx([0.1])


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "0.5"}, 0.5),
        ({"Retry-After": "Sat, 21 Nov 2026 07:00:09 GMT", "Date": "Sat, 21 Nov 2026 07:00:02 GMT"}, 7.0),
        ({"Retry-After": "Sat, 21 Nov 2020 07:00:00 GMT"}, 0.0),
        ({"Retry-After": "Sat, 21 Nov 2020 07:00:09 GMT", "Date": "yesterday"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": b"bient\xf4t"}, None),
        ({"Retry-After": "٣".encode()}, None),
        ({}, None),
    ],
)
def test_retry_after_is_parsed_as_seconds_or_a_date(headers, seconds):
    assert parse_retry_after(httpx.Response(429, headers=headers)) == seconds
