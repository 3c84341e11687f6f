"""Receiver: asks the broker for messages while slots are free, and never for more than that. Lives in the broker's loop.

It asks when a quarter of the slots is free, for a third of them at most: while one part is received and settled, the others execute.
Asking for all free slots at once makes the worker and its broker take turns (measured: `docs/adr/0004-worker.md`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from crossdock.errors import BrokerClosed, BrokerUnavailable, CrossdockError
from crossdock.lanes import LaneKey, Lanes
from crossdock.spi import Broker, Clock, Delivery

WAIT: Final = 10.0
"""Seconds one receive waits for a first message."""
GATHER: Final = 0.0005
"""Seconds for which free slots may gather before they are offered, while fewer than a quarter are free."""
RETRY_PAUSE: Final = 0.2
"""Seconds between attempts while the broker is away; the backend itself does the reconnecting."""

_log = logging.getLogger("crossdock.worker")


class Receiver:
    """Keeps one receive outstanding while slots are free.

    Args:
        broker: Open, in this loop.
        lanes: Shares the slots out.
        slots: Most messages in hand at once.
        limits: Most messages in hand per queue, for queues that state one.
        deliver: Takes what was received.
        clock: For pauses.
    """

    def __init__(
        self,
        broker: Broker,
        lanes: Lanes,
        *,
        slots: int,
        limits: Mapping[str, int],
        deliver: Callable[[Sequence[Delivery]], None],
        clock: Clock,
    ) -> None:
        self._broker = broker
        self._lanes = lanes
        self._free = slots
        self._quarter = max(1, slots // 4)
        self._third = max(1, slots // 3)
        self._limits = limits
        self._in_hand: Counter[str] = Counter()
        self._deliver = deliver
        self._clock = clock
        self._freed = asyncio.Event()
        self.empty_handed = asyncio.Event()
        """Set when the last receive brought nothing though it could have brought something."""

    def release(self, deliveries: Sequence[Delivery]) -> None:
        """These are no longer in hand: their slots are free."""
        self._free += len(deliveries)
        for delivery in deliveries if self._limits else ():
            self._in_hand[delivery.message.queue] -= 1
        self._freed.set()

    async def run(self, wait: float = WAIT) -> None:
        """Receive until cancelled. Cancelling it loses nothing.

        Args:
            wait: Seconds one receive waits for a first message.
        """
        while True:
            await self._slots()
            try:
                await self._receive(wait)
            except BrokerClosed:
                raise
            except BrokerUnavailable:
                await self._clock.sleep(RETRY_PAUSE)
            except CrossdockError as error:
                _log.error("receiving failed, will go on: %s", error)
                await self._clock.sleep(RETRY_PAUSE)

    async def _slots(self) -> None:
        """Return when a quarter of the slots is free, or some slot has been for `GATHER` seconds."""
        await self._until_free(1)
        if self._free < self._quarter:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GATHER):
                    await self._until_free(self._quarter)

    async def _until_free(self, count: int) -> None:
        while self._free < count:
            self._freed.clear()
            await self._freed.wait()

    async def _receive(self, wait: float) -> None:
        full = {queue for queue, limit in self._limits.items() if self._in_hand[queue] >= limit}
        room = [limit - self._in_hand[queue] for queue, limit in self._limits.items() if queue not in full]
        free = min(self._free, self._third)
        if not room:
            await self._receive_from(free, wait, without=full)
            return
        # Pass 2 of a receive may fill any lane, so a receive that includes a limited queue asks for no more than that
        # queue may take; the other queues then fill the rest.
        others = self._lanes.plan(1, self._limits).lanes
        got = await self._receive_from(min(free, *room), 0.0 if others else wait, without=full)
        if others and self._free:
            got += await self._receive_from(min(self._free, self._third), 0.0, without=self._limits)
        if others and not got:
            await self._receive_from(min(free, *room), wait, without=full)

    async def _receive_from(self, limit: int, wait: float, without: set[str] | Mapping[str, int]) -> int:
        plan = self._lanes.plan(limit, without)
        if not plan.lanes:  # every queue is at its limit
            await self._until_free(self._free + 1)
            return 0
        deliveries = await self._broker.receive(plan.lanes, limit, wait)
        taken: dict[LaneKey, int] = {}
        for delivery in deliveries:
            message = delivery.message
            lane = message.queue, message.priority
            taken[lane] = taken.get(lane, 0) + 1
        self._lanes.record(plan, taken)
        if not deliveries:
            self.empty_handed.set()
            return 0
        self.empty_handed.clear()
        self._free -= len(deliveries)
        for delivery in deliveries if self._limits else ():
            self._in_hand[delivery.message.queue] += 1
        self._deliver(deliveries)
        return len(deliveries)
