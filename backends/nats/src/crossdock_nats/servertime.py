"""Server time: what the server's clock shows, reckoned from ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from crossdock.spi import BrokerEvent, Clock, ClockSkew

WORTH_TELLING: Final = 5.0
"""Seconds by which clocks may differ before it is reported."""
FRESH: Final = 60.0
"""Seconds after which clocks are compared again."""


class ServerTime:
    """The server's clock.

    Args:
        clock: Ours.
        report: Told when they are far apart.
    """

    def __init__(self, clock: Clock, report: Callable[[BrokerEvent], None]) -> None:
        self._clock = clock
        self._report = report
        self._ahead_ms = 0.0
        self._told = False
        self._best = float("inf")
        self._known_until = float("-inf")

    @property
    def stale(self) -> bool:
        """Whether it should be asked for again before something depends on it."""
        return self._clock.monotonic() >= self._known_until

    def now_ms(self) -> int:
        """Milliseconds since the epoch, by the server's clock."""
        return round(self._clock.time_ms() + self._ahead_ms)

    def begin(self) -> float:
        """Say that the server is about to be asked; what this returns belongs to the answer."""
        return self._clock.monotonic()

    def heard(self, told_ms: float, began: float) -> None:
        """The server told its time."""
        now = self._clock.monotonic()
        took = now - began
        if took > 2 * self._best and not self.stale:
            return  # what we know is surer
        self._best = took
        self._known_until = now + FRESH
        self._ahead_ms = told_ms + took * 500 - self._clock.time_ms()
        if abs(self._ahead_ms) > WORTH_TELLING * 1000 and not self._told:
            self._told = True
            self._report(ClockSkew(self._ahead_ms / 1000))
