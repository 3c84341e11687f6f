"""ServerTime: the server's clock as reckoned here, from what it last told and our monotonic clock. Good to some milliseconds."""

from __future__ import annotations

from crossdock.spi import Clock


class ServerTime:
    """Reckons the server's wall clock.

    Args:
        clock: Ours, for the time since the server told its own.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ahead = clock.time_ms() - clock.monotonic() * 1000

    def heard(self, server_ms: int) -> None:
        """The server told its clock just now."""
        self._ahead = server_ms - self._clock.monotonic() * 1000

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch."""
        return int(self._ahead + self._clock.monotonic() * 1000)
