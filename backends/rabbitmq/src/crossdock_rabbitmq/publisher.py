"""Publisher: stores messages, and says of each what became of it.

A batch is one write. The server confirms cumulatively and in the order of the tags, so a batch is a range of tags. Everything goes out
mandatory: what no queue takes comes back before its confirm.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from typing import Final, NamedTuple

from crossdock_rabbitmq import wire
from crossdock_rabbitmq.link import Link, LinkBroken, Refused

_CLOSED_FOR: Final = re.compile(r"(ACCESS_REFUSED|NOT_FOUND) .*exchange '([^']*)'")
_IN_ONE_WRITE: Final = 500
_PAUSES: Final = (0.05, 0.2, 0.5)
"""Seconds before what was refused is tried again."""
_REMEMBERED: Final = 10_000
"""How many routing keys are kept as they are on the wire."""


class Item(NamedTuple):
    """What to publish."""

    exchange: str
    key: str
    id: str
    properties: bytes
    body: bytes


class Fate(Enum):
    """What became of an item that was not stored for certain."""

    RETURNED = "returned"
    """Certainly not stored: no queue takes it."""
    REFUSED = "refused"
    """Certainly not stored: the queue is full, by a policy of the server's, or nobody leads it."""
    FAILED = "failed"
    """Certainly not stored: it was not written."""
    UNKNOWN = "unknown"
    """It was written, and no answer came."""


class Outcome(NamedTuple):
    """Of an item that was not stored for certain."""

    fate: Fate
    why: str = ""


class _Batch:
    """Items that are written together, and then have the tags from `first` on; `start` is the index of the first in the whole call."""

    def __init__(self, items: Sequence[Item], start: int) -> None:
        self.items = items
        self.start = start
        self.first = 0
        self.pending = 0
        self.outcomes: dict[int, Outcome] = {}
        self.changed: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.changed is not None and not self.changed.done():
            self.changed.set_result(None)


class _Channel:
    """A channel on which messages are published, with confirms. It is the sink of what comes back on it."""

    def __init__(self, link: Link, number: int) -> None:
        self.link = link
        self._number = number
        self._next = 1
        self._low = 1
        self._open: dict[int, _Batch] = {}
        self._returned: Counter[tuple[bytes, str]] = Counter()
        self._methods: dict[tuple[str, str], bytes] = {}
        self._left = False
        self.gone = False
        """Whether the server has closed it, or the connection is lost."""

    async def write(self, batch: _Batch) -> None:
        """Publish."""
        if self.gone:
            why = "the connection was lost before it was written"
            batch.outcomes = dict.fromkeys(range(len(batch.items)), Outcome(Fate.FAILED, why))
            return
        number, most, methods, opened = self._number, self.link.most_in_a_frame, self._methods, self._open
        first = tag = batch.first = self._next
        parts: list[bytes] = []
        for exchange, key, _, properties, body in batch.items:
            method = methods.get((exchange, key))
            if method is None:
                method = self._method(exchange, key)
            parts.append(method)
            parts.append(wire.content(number, properties, body, most))
            opened[tag] = batch
            tag += 1
        self._next = tag
        batch.pending = tag - first
        self.link.write(b"".join(parts))
        await self.link.writable()

    def _method(self, exchange: str, key: str) -> bytes:
        if len(self._methods) >= _REMEMBERED:
            self._methods.clear()
        method = self._methods[exchange, key] = wire.publish(self._number, exchange, key)
        return method

    async def wait_for(self, batch: _Batch, patience: float) -> None:
        """Wait until the fate of all is known, or that of none becomes known for so many seconds."""
        while before := batch.pending:
            batch.changed = asyncio.get_running_loop().create_future()
            await asyncio.wait([batch.changed], timeout=patience)
            if batch.pending == before:
                self._give_up(batch, f"no confirm came within {patience:g} s")
        await self._close_if_done()

    def _give_up(self, batch: _Batch, why: str) -> None:
        for tag in range(batch.first, batch.first + len(batch.items)):
            if self._open.get(tag) is batch:
                batch.outcomes[tag - batch.first] = Outcome(Fate.UNKNOWN, why)
        batch.pending = 0  # a late confirm finds the tag open, and nobody waiting

    async def leave(self) -> None:
        """Close it when nothing is under way on it any more."""
        self._left = True
        await self._close_if_done()

    async def _close_if_done(self) -> None:
        if self._left and not self.gone and not any(batch.pending for batch in self._open.values()):
            self.gone = True
            await self.link.close_channel(self._number)

    # --- the sink ---

    def confirmed(self, tag: int, *, multiple: bool, stored: bool) -> None:
        tags = range(self._low, tag + 1) if multiple else (tag,)
        if multiple:
            self._low = tag + 1
        opened = self._open
        for each in tags:
            batch = opened.pop(each, None)
            if batch is None:
                continue
            if not stored:
                batch.outcomes[each - batch.first] = Outcome(Fate.REFUSED, "the server refuses it")
            elif self._returned:
                self._check_returned(batch, each - batch.first)
            if batch.pending:
                batch.pending -= 1
                batch.wake()

    def _check_returned(self, batch: _Batch, index: int) -> None:
        item = batch.items[index]
        mark = (item.key.encode(), item.id)
        if self._returned[mark]:
            self._returned[mark] -= 1
            self._returned += Counter()  # forgets those at zero
            batch.outcomes[index] = Outcome(Fate.RETURNED, "there is no such queue")

    def returned(self, key: bytes, header: bytes) -> None:
        self._returned[key, wire.read_properties(header)[0]] += 1

    def delivered(self, tag: int, redelivered: bool, header: bytes, body: bytes, arguments: bytes) -> None:
        """Never on this channel."""

    def answered(self, method: bytes, arguments: bytes) -> None:
        """Never on this channel."""

    def cancelled(self, consumer: str) -> None:
        """Never on this channel."""

    def flush(self) -> None:
        """Nothing is gathered here."""

    def lost(self, reason: str) -> None:
        self.gone = True
        opened, self._open = self._open, {}
        why, exchange = _why_closed(reason)
        for tag, batch in opened.items():
            index = tag - batch.first
            if batch.pending:
                certain = batch.items[index].exchange == exchange
                batch.outcomes[index] = why if certain else Outcome(Fate.UNKNOWN, reason)
        for batch in set(opened.values()):
            batch.pending = 0
            batch.wake()


def _why_closed(reason: str) -> tuple[Outcome, str | None]:
    """What the server says when it closes a channel: the fate of what was for one exchange, and which; of the rest nothing is known."""
    found = _CLOSED_FOR.match(reason)
    if found is None:
        return Outcome(Fate.UNKNOWN, reason), None
    if found[1] == "NOT_FOUND":
        return Outcome(Fate.RETURNED, f"there is no exchange {found[2]!r}"), found[2]
    advice = "give it the permissions that crossdock-rabbitmq's README names"
    why = f"this user may not write to the exchange {found[2]!r}: {advice}"
    return Outcome(Fate.FAILED, why), found[2].replace("amq.default", "")


class Publisher:
    """Publishes, on the channel that `attach` gives it after each connect."""

    def __init__(self) -> None:
        self._channel: _Channel | None = None
        self._renewing = asyncio.Lock()

    async def attach(self, link: Link) -> None:
        """Publish on this link from now on. Raises `LinkBroken`, `Refused`."""
        self._channel = None
        self._channel = await _channel_on(link)

    async def store(self, items: Sequence[Item], patience: float) -> dict[int, Outcome]:
        """Publish, and wait for the confirms.

        What is refused is tried again a few times, each time on a new channel. Because on RabbitMQ 3.10 a channel that was opened while a
        queue had lost its leader believes in that leader for ever, and refuses everything for the queue.

        Args:
            items: In this order.
            patience: Seconds without any confirm after which the rest is unknown.

        Returns:
            The outcomes of those that were not stored for certain, by index.
        """
        outcomes = await self._store(items, patience)
        for pause in _PAUSES:
            again = [index for index, outcome in outcomes.items() if outcome.fate is Fate.REFUSED]
            if not again:
                break
            await asyncio.sleep(pause)
            if not await self._renew():
                break  # the connection is lost
            some = await self._store([items[index] for index in again], patience)
            for number, index in enumerate(again):
                if number in some:
                    outcomes[index] = some[number]
                else:
                    del outcomes[index]
        return outcomes

    async def _renew(self) -> bool:
        """Have another channel, unless somebody else just took one. Returns whether there is one."""
        channel = self._channel
        async with self._renewing:
            if channel is None or channel is not self._channel:
                return self._channel is not None
            try:
                renewed = await _channel_on(channel.link)
            except (LinkBroken, Refused):
                return False
            if channel is self._channel:
                self._channel = renewed
        await channel.leave()
        return True

    async def _store(self, items: Sequence[Item], patience: float) -> dict[int, Outcome]:
        if self._channel is not None and self._channel.gone and not self._channel.link.lost.done():
            await self._renew()  # only the channel was closed
        channel = self._channel
        if channel is None or channel.gone:
            await asyncio.sleep(0)  # who tries again and again lets us connect meanwhile
            return dict.fromkeys(range(len(items)), Outcome(Fate.FAILED, "there is no connection"))
        if channel.link.blocked is not None:
            why = f"the server takes no messages: {channel.link.blocked}"
            return dict.fromkeys(range(len(items)), Outcome(Fate.FAILED, why))
        outcomes: dict[int, Outcome] = {}
        batches = [_Batch(items[start : start + _IN_ONE_WRITE], start) for start in range(0, len(items), _IN_ONE_WRITE)]
        for batch in batches:
            await channel.write(batch)
        for batch in batches:
            await channel.wait_for(batch, patience)
            outcomes.update((batch.start + index, outcome) for index, outcome in batch.outcomes.items())
        return outcomes


async def _channel_on(link: Link) -> _Channel:
    channels: list[_Channel] = []

    def sink(number: int) -> _Channel:
        channels.append(_Channel(link, number))
        return channels[0]

    await link.channel(sink, confirms=True)
    return channels[0]
