"""LeaseKeeper: renews the leases of what is in hand, and tells which are lost. Lives in the broker's loop, so that a handler that
blocks the worker's own loop costs no lease."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from crossdock.errors import BrokerClosed, CrossdockError
from crossdock.spi import Broker, Clock, Delivery

EXTEND_AFTER: Final = 1 / 3
"""Part of a lease after which it is extended."""
MARGIN: Final = 0.05
"""Part of a lease by which we reckon it to end earlier than the broker does."""
LOOKS_PER_LEASE: Final = 8
"""How often in the shortest lease the keeper looks through what is in hand. Most tasks end before the first look and cost a dict entry."""

_log = logging.getLogger("crossdock.worker")


class _Held:
    __slots__ = ("delivery", "extend_at", "lease", "until")

    def __init__(self, delivery: Delivery, lease: float, now: float) -> None:
        self.delivery = delivery
        self.lease = lease
        self.until = delivery.lease_until
        self.extend_at = now + lease * EXTEND_AFTER


class LeaseKeeper:
    """Extends leases until they are released.

    Args:
        broker: Open, in this loop.
        lease_of: Seconds of a queue's lease.
        shortest: The shortest lease of the queues received from, in seconds.
        lost: Told the receipts of lost leases.
        clock: Whose monotonic seconds `Delivery.lease_until` are.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        lease_of: Callable[[str], float],
        shortest: float,
        lost: Callable[[Sequence[object]], None],
        clock: Clock,
    ) -> None:
        self._broker = broker
        self._lease_of = lease_of
        self._pause = shortest / LOOKS_PER_LEASE
        self._lost = lost
        self._clock = clock
        self._held: dict[object, _Held] = {}

    @property
    def holds_nothing(self) -> bool:
        """Whether everything that was received is settled or lost."""
        return not self._held

    def hold(self, deliveries: Sequence[Delivery]) -> None:
        """Keep these leases from now on."""
        now = self._clock.monotonic()
        for delivery in deliveries:
            self._held[delivery.receipt] = _Held(delivery, self._lease_of(delivery.message.queue), now)

    def release(self, delivery: Delivery) -> None:
        """This one is settled, or lost."""
        self._held.pop(delivery.receipt, None)

    async def run(self) -> None:
        """Keep leases until cancelled."""
        while True:
            await self._clock.sleep(self._pause)
            now = self._clock.monotonic()
            due = [held for held in self._held.values() if held.extend_at <= now]
            if due:
                await self._extend(due, now)

    async def _extend(self, due: Sequence[_Held], now: float) -> None:
        lost: set[object] = set()
        try:
            refusals = await self._broker.extend([held.delivery for held in due])
        except BrokerClosed:
            raise
        except CrossdockError as error:
            # Nothing was attempted: each lease is still ours until the time we reckon with.
            _log.warning("%d leases could not be extended, will try again: %s", len(due), error)
            lost = {held.delivery.receipt for held in due if held.until <= now}
        else:
            lost = {due[refusal.index].delivery.receipt for refusal in refusals}
            for held in due:
                held.until = now + held.lease * (1 - MARGIN)
                held.extend_at = now + held.lease * EXTEND_AFTER
        # A delivery that was settled meanwhile is no longer held, and no loss.
        lost &= self._held.keys()
        for receipt in lost:
            del self._held[receipt]
        if lost:
            self._lost(list(lost))
