"""Room: what `max_ready` leaves of a queue.

The server can hold nobody back, so producers count. A count and the last sequence of the stream belong together; what is then written on
the condition that the sequence is still the last one is exact, however many producers there are.
"""

from __future__ import annotations

import asyncio

from crossdock_nats.looking import Looking
from crossdock_nats.queues import Queue


class Room:
    """Room in the queues that have a limit.

    Args:
        looking: Counts.
    """

    def __init__(self, looking: Looking) -> None:
        self._looking = looking
        self._turns: dict[str, asyncio.Lock] = {}

    def turn(self, queue: str) -> asyncio.Lock:
        """Held by who stores there: of one Broker's calls one at a time, so that they do not overtake each other."""
        return self._turns.setdefault(queue, asyncio.Lock())

    async def left(self, queue: Queue) -> tuple[int, int]:
        """How many messages there is room for, and the last sequence for which that is true. Raises `BrokerUnavailable`."""
        stats, seq = await self._looking.count(queue, exactly=True)
        limit = queue.spec.max_ready
        return (max(0, limit - stats.ready) if limit is not None else 2**62), seq
