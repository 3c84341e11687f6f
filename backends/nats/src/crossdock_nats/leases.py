"""Leases: that those who hold deliveries keep them.

A sign of work to the consumer prolongs a lease. Those of one consumer are handled in order, so the answer to the last one stands for all.
Where a queue's lease is made shorter, what is held was promised for longer; it is prolonged here until that is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from crossdock.errors import BrokerError, LeaseLost, SettleUnknown
from crossdock.spi import Clock, Delivery, Refusal
from crossdock_nats.api import Api, Problem
from crossdock_nats.limits import margin
from crossdock_nats.link import Link
from crossdock_nats.queues import Level, Queue, Queues
from crossdock_nats.receipt import Fate, Receipt


class Leases:
    """Prolongs leases, for one Broker while it is open.

    Args:
        owner: What receipts of this Broker name as theirs.
        link: The connection.
        api: JetStream on it.
        queues: Their streams and consumers.
        clock: For the ends of leases.
    """

    def __init__(self, owner: object, link: Link, api: Api, queues: Queues, clock: Clock) -> None:
        self._owner = owner
        self._link = link
        self._api = api
        self._queues = queues
        self._clock = clock
        self._keepers: set[asyncio.Task[None]] = set()
        queues.shortened = self._keep_promises

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        """As `Broker.extend`."""
        began = self._clock.monotonic()
        refusals: list[Refusal] = []
        live: list[tuple[int, Delivery, Receipt]] = []
        for index, delivery in enumerate(deliveries):
            receipt = delivery.receipt
            if (
                type(receipt) is not Receipt
                or receipt.owner is not self._owner
                or receipt.ending is not None
                or began >= receipt.deadline
            ):
                refusals.append(Refusal(index, lease_lost(delivery)))
            else:
                live.append((index, delivery, receipt))
        if not live:
            return refusals
        for queue in {receipt.level.queue for _, _, receipt in live}:
            if queue.stale:
                await self._queues.look([queue.name])
        reply = self._link.reply_to()
        last: dict[Level, int] = {receipt.level: place for place, (_, _, receipt) in enumerate(live)}
        asking = set(last.values())
        silent = [b"PUB %s 4\r\n+WPI\r\n" % receipt.ack for place, (_, _, receipt) in enumerate(live) if place not in asking]
        levels = [level for level, _ in sorted(last.items(), key=lambda pair: pair[1])]
        frames = [b"PUB %s %s.%d 4\r\n+WPI\r\n" % (live[last[level]][2].ack, reply, place) for place, level in enumerate(levels)]
        answers, answered = await self._link.exchange(reply, frames, silent=b"".join(silent))
        gone = await self.vanished([levels[place] for place in answers]) if answers else set[Level]()
        silent_levels = {level for place, level in enumerate(levels) if not answered[place]}
        failed = {levels[place] for place in answers}
        for index, delivery, receipt in live:
            if receipt.level in silent_levels or (receipt.level in failed and receipt.level not in gone):
                error = SettleUnknown(f"Whether the lease on message {delivery.message.id!r} was extended is not known; try again.")
                refusals.append(Refusal(index, error))
            elif receipt.level in gone:
                refusals.append(Refusal(index, lease_lost(delivery)))
            else:
                lease = receipt.level.queue.spec.lease
                receipt.deadline = began + lease - margin(lease)
        return refusals

    # --- promises ---

    def _keep_promises(self, queue: Queue) -> None:
        """The queue's lease became shorter: what we hold was promised a longer one, so it is extended until that is over."""
        lease = queue.spec.lease
        now = self._clock.monotonic()
        held = {
            receipt: receipt.deadline
            for level in queue.levels.values()
            for receipt in level.out.values()
            if receipt.deadline > now + lease - margin(lease)
        }
        if held:
            task = asyncio.ensure_future(self._keep(held, lease))
            self._keepers.add(task)
            task.add_done_callback(self._keepers.discard)

    async def _keep(self, held: dict[Receipt, float], lease: float) -> None:
        while held:
            now = self._clock.monotonic()
            held = {
                receipt: until
                for receipt, until in held.items()
                if receipt.fate is Fate.OPEN and receipt.deadline == until and now < until - lease
            }
            if self._link.wire is not None:
                self._link.wire.write(b"".join([b"PUB %s 4\r\n+WPI\r\n" % receipt.ack for receipt in held]))
            await asyncio.sleep(lease / 3)

    async def close(self) -> None:
        """End what runs in the background."""
        for task in self._keepers:
            task.cancel()
        if self._keepers:
            await asyncio.wait(self._keepers)

    async def vanished(self, levels: Iterable[Level]) -> set[Level]:
        """Those of these levels whose consumers are there no more, and all leases with them."""
        asked = list(dict.fromkeys(levels))
        try:
            infos = await self._api.consumer_infos([(level.stream, level.consumer.decode()) for level in asked])
        except BrokerError:
            return set()
        gone = {level for level, info in zip(asked, infos, strict=True) if isinstance(info, Problem) and info.err_code}
        self._queues.doubt(level.queue.name for level in gone)
        for level in gone:
            level.ready = False
        return gone


def lease_lost(delivery: Delivery) -> LeaseLost:
    """Somebody else has the message, or had it."""
    message = delivery.message
    return LeaseLost(f"The lease on message {message.id!r} of queue {message.queue!r} is over; nothing was changed.")
