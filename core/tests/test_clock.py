"""Clocks: the system's, and the one that tests turn."""

from __future__ import annotations

import asyncio
import time

import pytest

from crossdock.clock import SystemClock, VirtualClock


@pytest.mark.asyncio
async def test_the_system_clock_is_the_machines() -> None:
    """Milliseconds of the epoch, seconds that never go back, and sleep of at least what was asked."""
    clock = SystemClock()
    assert abs(clock.time_ms() - time.time() * 1000) < 1000
    before = clock.monotonic()
    await clock.sleep(0.01)
    assert clock.monotonic() - before >= 0.009
    await clock.sleep(0)
    await clock.sleep(-1)


def test_a_virtual_clock_stands_still() -> None:
    """Both its times move only by `advance`, and together."""
    clock = VirtualClock()
    assert (clock.time_ms(), clock.monotonic()) == (1_767_225_600_000, 0.0)
    clock.advance(1.5)
    assert (clock.time_ms(), clock.monotonic()) == (1_767_225_601_500, 1.5)
    clock.advance(0)
    assert VirtualClock(5).time_ms() == 5
    with pytest.raises(ValueError, match="a clock cannot go back"):
        clock.advance(-0.001)


@pytest.mark.asyncio
async def test_sleepers_wake_when_their_time_has_come() -> None:
    """In the order of their times, those of one time in the order in which they went to sleep."""
    clock, woken = VirtualClock(), []

    async def sleep(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(name)

    sleepers = [asyncio.create_task(sleep(name, seconds)) for name, seconds in (("c", 3), ("a", 1), ("b1", 2), ("b2", 2))]
    await asyncio.sleep(0)
    assert clock.next_wakeup() == 1
    clock.advance(0.999)
    await asyncio.sleep(0)
    assert woken == []
    clock.advance(0.001)
    await asyncio.wait([sleepers[1]])
    assert woken == ["a"]
    assert clock.next_wakeup() == 1
    clock.advance(100)
    await asyncio.wait(sleepers)
    assert woken == ["a", "b1", "b2", "c"]
    assert clock.next_wakeup() is None


@pytest.mark.asyncio
async def test_a_sleep_of_nothing_takes_one_turn() -> None:
    """It returns though the clock stands still, after others had their turn."""
    clock, turns = VirtualClock(), []
    asyncio.get_running_loop().call_soon(turns.append, "other")
    await clock.sleep(0)
    await clock.sleep(-5)
    assert turns == ["other"]


@pytest.mark.asyncio
async def test_a_cancelled_sleeper_is_forgotten() -> None:
    """It neither wakes nor counts as the next to wake."""
    clock = VirtualClock()
    sleeper = asyncio.create_task(clock.sleep(1))
    later = asyncio.create_task(clock.sleep(2))
    await asyncio.sleep(0)
    sleeper.cancel()
    await asyncio.wait([sleeper])
    assert clock.next_wakeup() == 2
    clock.advance(2)
    await later


@pytest.mark.asyncio
async def test_advancing_past_a_cancelled_sleeper_is_harmless() -> None:
    """Its time comes, and nobody is there."""
    clock = VirtualClock()
    sleeper = asyncio.create_task(clock.sleep(1))
    later = asyncio.create_task(clock.sleep(1))
    await asyncio.sleep(0)
    sleeper.cancel()
    await asyncio.wait([sleeper])
    clock.advance(1)
    await later
