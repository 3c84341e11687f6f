"""Storing: everything that puts messages into the server: enqueues, retries, give-backs, dead letters, replays.

What comes back because its queue is not there is declared and stored again, once, within the same call.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, NamedTuple

from crossdock.spi import Clock, DeadLetter, Message, Priority
from crossdock_rabbitmq import delays, names, record
from crossdock_rabbitmq.publisher import Fate, Item, Outcome, Publisher

_PAUSES: Final = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 2.0)
"""Seconds before each attempt to make a queue that somebody else deletes at the same time: RabbitMQ 3.10 cannot make it again for as long
as parts of the old one are there, and closes the connection."""


class Parcel(NamedTuple):
    """A message on its way: where to, and what queue that belongs to."""

    queue: str
    item: Item
    delayed: bool


class Storing:
    """The way of messages into the server.

    Args:
        namespace: Whose queues.
        publisher: Publishes.
        clock: Says how far an eta is away.
        timeout: Seconds after which no confirm is waited for any more.
        make: Declares queues that are not there; returns whether it could.
        there: Declares queues that are not there before something is left to the delay for them; or, where it may not, returns them.
    """

    def __init__(
        self,
        namespace: str,
        publisher: Publisher,
        clock: Clock,
        timeout: float,
        make: Callable[[Iterable[str]], Awaitable[bool]],
        there: Callable[[Iterable[str], bool], Awaitable[set[str]]],
    ) -> None:
        self._namespace = namespace
        self._publisher = publisher
        self._clock = clock
        self._timeout = timeout
        self._make = make
        self._there = there
        self._names: dict[tuple[str, Priority], str] = {}

    # --- parcels ---

    def wait_ms(self, message: Message) -> int:
        """How long a message has to wait; by its own clock where it is relative."""
        return message.delay_ms or (message.eta_ms - self._clock.time_ms() if message.eta_ms else 0)

    def parcel(self, message: Message, wait_ms: int = 0, losses: int = 0) -> Parcel:
        """A message for its queue, at once or after a wait."""
        properties = record.properties(message, losses)
        key = message.queue, message.priority
        if wait_ms > 0 and delays.ticks(wait_ms):
            routing = delays.routing_key(wait_ms, names.due_key(self._namespace, *key))
            return Parcel(message.queue, Item(names.DELAY_IN, routing, message.id, properties, message.body), True)
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = names.ready(self._namespace, *key)
        return Parcel(message.queue, Item("", name, message.id, properties, message.body), False)

    def letter(self, letter: DeadLetter) -> Parcel:
        """A dead letter for its queue."""
        message = letter.message
        name = names.dead(self._namespace, message.queue)
        return Parcel(message.queue, Item("", name, message.id, record.letter_properties(letter), message.body), False)

    # --- storing ---

    async def store(self, parcels: Sequence[Parcel], *, create: bool = True) -> dict[int, Outcome]:
        """Store parcels.

        Args:
            parcels: In this order.
            create: Whether queues that are not there are made. Without, what was meant for them is not stored.

        Returns:
            The outcomes of those that were not stored for certain, by index.

        Raises:
            BrokerUnavailable, ConfigurationError: Nothing was attempted.
        """
        if delayed := {parcel.queue for parcel in parcels if parcel.delayed}:
            gone = await self._there(delayed, create)
            if gone:
                return await self._store_but(parcels, gone)
        outcomes = await self._publisher.store([parcel.item for parcel in parcels], self._timeout)
        if create:
            for pause in _PAUSES:
                back = [index for index, outcome in outcomes.items() if outcome.fate is Fate.RETURNED]
                if not back:
                    break
                await asyncio.sleep(pause)
                if not await self._make({parcels[index].queue for index in back}):
                    break
                again = await self._publisher.store([parcels[index].item for index in back], self._timeout)
                for number, index in enumerate(back):
                    if number in again:
                        outcomes[index] = again[number]
                    else:
                        del outcomes[index]
        return outcomes

    async def _store_but(self, parcels: Sequence[Parcel], gone: set[str]) -> dict[int, Outcome]:
        """Store what is not for these queues."""
        kept = [index for index, parcel in enumerate(parcels) if parcel.queue not in gone]
        some = await self._publisher.store([parcels[index].item for index in kept], self._timeout)
        outcomes = {kept[number]: outcome for number, outcome in some.items()}
        away = Outcome(Fate.RETURNED, "there is no such queue")
        return outcomes | dict.fromkeys(set(range(len(parcels))).difference(kept), away)


def delay_ms(seconds: float) -> int:
    """A delay in milliseconds; what is longer than the longest counts as that."""
    return round(min(seconds, delays.LONGEST) * 1000) if not math.isnan(seconds) else 0
