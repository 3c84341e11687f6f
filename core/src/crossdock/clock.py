"""Time for core: the system's, and one that tests turn by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time

from crossdock.spi import Clock

__all__ = ["Clock", "SystemClock", "VirtualClock"]


class SystemClock:
    """The machine's clocks."""

    def time_ms(self) -> int:
        """Wall-clock milliseconds since the Unix epoch."""
        return time.time_ns() // 1_000_000

    monotonic = staticmethod(time.monotonic)
    """Seconds of the system's monotonic clock."""

    async def sleep(self, seconds: float) -> None:
        """Sleep in real time."""
        await asyncio.sleep(seconds)


class VirtualClock:
    """A clock that stands still until `advance` is called. Use it in one event loop.

    It counts in microseconds, so that several small steps reach exactly what one large step does.

    Args:
        start_ms: First value of `time_ms()`; the default is 2026-01-01T00:00:00Z.
    """

    def __init__(self, start_ms: int = 1_767_225_600_000) -> None:
        self._start_ms = start_ms
        self._elapsed = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def time_ms(self) -> int:
        """Virtual wall-clock milliseconds since the Unix epoch."""
        return self._start_ms + round(self._elapsed * 1000)

    def monotonic(self) -> float:
        """Virtual seconds since the clock was made."""
        return self._elapsed

    async def sleep(self, seconds: float) -> None:
        """Return when the clock was advanced by `seconds`."""
        due = round(self._elapsed + seconds, 6)
        if due <= self._elapsed:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (due, next(self._order), future))
        await future

    def advance(self, seconds: float) -> None:
        """Move on by `seconds` and wake every sleeper whose time has come. They run at the next turn of the loop."""
        if seconds < 0:
            raise ValueError("a clock cannot go back")
        self._elapsed = round(self._elapsed + seconds, 6)
        while self._sleepers and self._sleepers[0][0] <= self._elapsed:
            future = heapq.heappop(self._sleepers)[2]
            if not future.done():
                future.set_result(None)

    def next_wakeup(self) -> float | None:
        """Seconds until the first sleeper is due; None if nobody sleeps."""
        while self._sleepers and self._sleepers[0][2].done():
            heapq.heappop(self._sleepers)
        return self._sleepers[0][0] - self._elapsed if self._sleepers else None
