"""Message ids: UUID version 7 (RFC 9562, section 5.7), so that they sort by time and indexes on them append."""

from __future__ import annotations

import random
from typing import Final

from crossdock.forks import forget_after_fork
from crossdock.spi import Clock

_VERSION_AND_VARIANT: Final = 0x7 << 76 | 0b10 << 62
_RANDOM: Final = (1 << 80) - 1 ^ (0xF << 76 | 0b11 << 62)


class IdSource:
    """Makes ids from an injected clock and source of randomness.

    Args:
        clock: Gives the milliseconds.
        rng: Gives the other bits. None: a private source, seeded by the system and seeded anew in a forked child,
            because two processes must never draw the same ids.
    """

    def __init__(self, clock: Clock, rng: random.Random | None = None) -> None:
        self._clock = clock
        self._rng = rng or random.Random()
        if rng is None:
            forget_after_fork(self)

    def __call__(self) -> str:
        """Return a new id: 36 characters, e.g. `019a8b7c-5a31-7c2e-9f10-2f6a1c0e8d44`."""
        text = f"{self._clock.time_ms() << 80 | self._rng.getrandbits(80) & _RANDOM | _VERSION_AND_VARIANT:032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    def forget(self) -> None:
        """In a forked child: draw from another seed than the parent."""
        self._rng.seed()
