"""Brokers that break one promise each."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import msgspec

from crossdock.spi import (
    Ack,
    Broker,
    BrokerSettings,
    Cursor,
    Delivery,
    Lane,
    Message,
    Nack,
    Page,
    Priority,
    QueueStats,
    Refusal,
    Replay,
    Settlement,
    State,
)
from crossdock_conformance.teeth.honest import Honest

# --- messages in ---


class DropsOneIn500(Honest):
    """Says that a message is stored, and one in five hundred is not."""

    _stored = itertools.count(1)

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        return await super().enqueue([message for message in messages if next(self._stored) % 500])


class StoresTwice(Honest):
    """Stores a message again that is stored already, under an id of its own."""

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        held: set[str] = set()
        for message in messages:
            for state in State:
                page = await self.inner.peek(message.queue, state, ids=[message.id])
                held.update(entry.message.id for entry in page.entries)
        again = [message for message in messages if message.id in held]
        twins = [msgspec.structs.replace(message, id=f"{message.id}-2") for message in again]
        await self.inner.enqueue(twins)
        return await super().enqueue(messages)


class ComesEarly(Honest):
    """Delivers what is scheduled 200 ms before its time."""

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        return await super().enqueue(
            [
                msgspec.structs.replace(
                    message,
                    eta_ms=max(0, message.eta_ms - 200),
                    delay_ms=max(0, message.delay_ms - 200),
                )
                for message in messages
            ]
        )


class LosesSightOfWhatFallsDue(Honest):
    """Moves a due message in two steps: takes it out of the schedule, and puts it into line at the next occasion."""

    _underway: dict[tuple[str, str], Message]
    _seen: dict[tuple[str, str], Message]

    def __init__(self, settings: BrokerSettings) -> None:
        super().__init__(settings)
        self._underway, self._seen = {}, {}

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        refusals = await super().enqueue(messages)
        self._seen |= {(message.queue, message.id): message for message in messages if message.eta_ms or message.delay_ms}
        return refusals

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        await self._move()
        return await super().receive(lanes, limit, wait)

    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        await self._move()
        return await super().stats(queues)

    async def _move(self) -> None:
        for message in self._underway.values():
            await self.inner.enqueue([msgspec.structs.replace(message, eta_ms=0, delay_ms=0)])
        self._underway.clear()
        for (queue, id), message in list(self._seen.items()):
            if not await self.inner.remove(queue, State.READY, [id]):
                self._underway[queue, id] = self._seen.pop((queue, id))
                del message


# --- deliveries ---


class AcksAtReceive(Honest):
    """Forgets a message when it hands it over, as a broker with automatic acknowledgement does."""

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        deliveries = await super().receive(lanes, limit, wait)
        await self.inner.settle([Ack(delivery) for delivery in deliveries])
        return deliveries

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        return ()


class IgnoresReceipts(Honest):
    """Settles by the id of the message, whoever holds it now."""

    _holders: dict[tuple[str, str, str], tuple[Broker, Delivery]] = {}  # noqa: RUF012 - shared by all, as a server would

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        deliveries = await super().receive(lanes, limit, wait)
        for delivery in deliveries:
            self._holders[self._name(delivery)] = self.inner, delivery
        return deliveries

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        refusals: list[Refusal] = []
        for index, settlement in enumerate(settlements):
            holder, delivery = self._holders.get(self._name(settlement.delivery), (self.inner, settlement.delivery))
            refused = await holder.settle([msgspec.structs.replace(settlement, delivery=delivery)])
            refusals += [Refusal(index, refusal.error) for refusal in refused]
        return refusals

    def _name(self, delivery: Delivery) -> tuple[str, str, str]:
        return self.settings.namespace, delivery.message.queue, delivery.message.id


class ForgetsLeases(Honest):
    """Takes extensions, and lets the lease run out all the same."""

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        return ()


class CountsGiveBacks(Honest):
    """Counts what was given back as delivered, so that deploys look like crashes."""

    _given_back: dict[tuple[str, str, str], int] = {}  # noqa: RUF012 - as above

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        deliveries = await super().receive(lanes, limit, wait)
        return [
            msgspec.structs.replace(
                delivery, delivery_count=delivery.delivery_count + self._given_back.get(self._name(delivery), 0)
            )
            for delivery in deliveries
        ]

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        refusals = await super().settle(settlements)
        for settlement in settlements:
            if isinstance(settlement, Nack) and settlement.replacement is None:
                name = self._name(settlement.delivery)
                self._given_back[name] = self._given_back.get(name, 0) + 1
        return refusals

    def _name(self, delivery: Delivery) -> tuple[str, str, str]:
        return self.settings.namespace, delivery.message.queue, delivery.message.id


class CountsNoLosses(Honest):
    """Calls every delivery the first."""

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        return [msgspec.structs.replace(delivery, delivery_count=1) for delivery in await super().receive(lanes, limit, wait)]


class DeliversTheNewestFirst(Honest):
    """Reverses what it hands over."""

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        return list(reversed(await super().receive(lanes, limit, wait)))


class LosesTheCancelled(Honest):
    """Keeps what came for a receive that nobody awaits any more."""

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        return await asyncio.shield(super().receive(lanes, limit, min(wait, 0.5)))


class IgnoresQuotas(Honest):
    """Fills the limit from the first lane that has something."""

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        return await super().receive([msgspec.structs.replace(lane, quota=limit) for lane in lanes], limit, wait)


class LosesPriorityOnRetry(Honest):
    """Stores a replacement at the usual level, whatever it says."""

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        return await super().settle([self._levelled(settlement) for settlement in settlements])

    @staticmethod
    def _levelled(settlement: Settlement) -> Settlement:
        if isinstance(settlement, Nack) and settlement.replacement is not None:
            usual = msgspec.structs.replace(settlement.replacement, priority=Priority.NORMAL)
            return msgspec.structs.replace(settlement, replacement=usual)
        return settlement


# --- looking and repairing ---


class ListingConsumes(Honest):
    """Takes dead letters out of their queue to show them, and puts all back but the last."""

    async def peek(
        self, queue: str, state: State, *, ids: Sequence[str] = (), after: Cursor | None = None, limit: int = 100
    ) -> Page:
        page = await super().peek(queue, state, ids=ids, after=after, limit=limit)
        if state is State.DEAD and len(page.entries) > 1:
            await self.inner.remove(queue, state, [page.entries[-1].message.id])
        return page


class ReplayRemovesFirst(Honest):
    """Removes a letter, then stores the message: what is cut in between is lost."""

    async def replay(self, queue: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        refusals: list[Refusal] = []
        for index, order in enumerate(replays):
            refused = await self.inner.remove(queue, State.DEAD, [order.id])
            refused = refused or await self.inner.enqueue([order.message])
            refusals += [Refusal(index, refusal.error) for refusal in refused]
        return refusals


class StatsOffByOne(Honest):
    """Counts one READY message too many wherever there is any."""

    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        return [
            msgspec.structs.replace(stats, ready=stats.ready + 1) if stats.ready else stats for stats in await super().stats(queues)
        ]


class LeaksNamespaces(Honest):
    """Serves a receiver from another namespace when its own has nothing."""

    _all: list[Broker] = []  # noqa: RUF012 - as above

    async def open(self) -> None:
        await super().open()
        self._all.append(self.inner)

    async def close(self) -> None:
        if self.inner in self._all:
            self._all.remove(self.inner)
        await super().close()

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        deliveries = await super().receive(lanes, limit, 0)
        for neighbour in [*self._all] if not deliveries else ():
            deliveries = deliveries or await neighbour.receive(lanes, limit, 0)
        return deliveries or await super().receive(lanes, limit, wait)


# --- life and errors ---


class SecondCloseHangs(Honest):
    """Waits for ever when it is closed again."""

    _closed = False

    async def open(self) -> None:
        self._closed = False
        await super().open()

    async def close(self) -> None:
        if self._closed:
            await asyncio.Event().wait()
        self._closed = True
        await super().close()


class ForeignExceptions(Honest):
    """Lets an exception of its driver through."""

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        if any(message.priority not in Priority.__members__.values() for message in messages):
            raise KeyError("priority")
        return await super().enqueue(messages)


class DeniesWhatItDoes(Honest):
    """Declares that it cannot list queues, and lists them."""

    async def open(self) -> None:
        await super().open()
        denied = msgspec.structs.replace(self.capabilities.signals, note="It says so.")
        self.capabilities = msgspec.structs.replace(self.capabilities, list_queues=denied)
