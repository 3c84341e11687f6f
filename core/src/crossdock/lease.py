"""LeaseKeeper: renews the leases of what is in hand, and tells which are lost. Lives in the broker's loop, so that a handler that
blocks the worker's own loop costs no lease."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from crossdock.errors import BrokerClosed, CrossdockError, LeaseLost
from crossdock.spi import Broker, Clock, Delivery

EXTEND_AFTER: Final = 1 / 3
"""Part of a lease after which it is extended."""
MARGIN: Final = 0.05
"""Part of a lease by which we reckon it to end earlier than the broker does."""
LOOKS_PER_LEASE: Final = 8
"""How often in the shortest lease the keeper looks through what is in hand. Most tasks end before the first look and cost a dict entry."""

_log = logging.getLogger("crossdock.worker")


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
        self._held: dict[object, Delivery] = {}  # their `lease_until` moves on with each extension

    @property
    def holds_nothing(self) -> bool:
        """Whether everything that was received is settled or lost."""
        return not self._held

    def hold(self, deliveries: Sequence[Delivery]) -> None:
        """Keep these leases from now on."""
        for delivery in deliveries:
            self._held[delivery.receipt] = delivery

    def release(self, deliveries: Iterable[Delivery]) -> None:
        """These are settled, or lost."""
        for delivery in deliveries:
            self._held.pop(delivery.receipt, None)

    async def run(self) -> None:
        """Keep leases until cancelled."""
        while True:
            await self._clock.sleep(self._pause)
            now = self._clock.monotonic()
            due = [delivery for delivery in self._held.values() if self._is_due(delivery, now)]
            if due:
                await self._extend(due, now)

    def _is_due(self, delivery: Delivery, now: float) -> bool:
        return delivery.lease_until - now <= self._lease_of(delivery.message.queue) * (1 - EXTEND_AFTER)

    async def _extend(self, due: Sequence[Delivery], now: float) -> None:
        errors: dict[int, CrossdockError]
        try:
            errors = {refusal.index: refusal.error for refusal in await self._broker.extend(due)}
        except BrokerClosed:
            raise
        except CrossdockError as error:
            errors = dict.fromkeys(range(len(due)), error)
        lost: set[object] = set()
        unsure: list[CrossdockError] = []
        for index, delivery in enumerate(due):
            refused = errors.get(index)
            if refused is None:
                if delivery.receipt in self._held:
                    until = now + self._lease_of(delivery.message.queue) * (1 - MARGIN)
                    self._held[delivery.receipt] = msgspec.structs.replace(delivery, lease_until=until)
            elif isinstance(refused, LeaseLost) or delivery.lease_until <= now:
                lost.add(delivery.receipt)
            else:  # nobody has it but us until the time we reckon with
                unsure.append(refused)
        if unsure:
            _log.warning("%d leases could not be extended, will try again: %s", len(unsure), unsure[0])
        # A delivery that was settled meanwhile is no longer held, and no loss.
        lost &= self._held.keys()
        for receipt in lost:
            del self._held[receipt]
        if lost:
            self._lost(list(lost))
