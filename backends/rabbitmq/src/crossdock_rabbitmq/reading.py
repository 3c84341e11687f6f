"""Reading: looks through a whole queue without taking anything, and then may take some of it.

All of it, always: what a reader leaves goes back as a queue of its own that is served first, so that a second reader of a part would see
other messages than the first. When everything was read, everything is in order again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from crossdock_rabbitmq import wire
from crossdock_rabbitmq.link import Link, LinkBroken

_WINDOW: Final = 60_000
"""How many messages one consumer may hold; AMQP has two bytes for it."""
_PATIENCE: Final = 30.0
"""Seconds for the server to go on sending."""
_POLL: Final = 0.005

Take = Callable[[int, bytes, bytes, bytes], None]
"""Called with the tag, the arguments of the delivery, the header and the body of each message."""


class Reading:
    """One reader of one queue. Made by `begin`; what comes later is read, too, until it is closed."""

    def __init__(self, link: Link, queue: str, take: Take) -> None:
        self._link = link
        self._queue = queue
        self._take = take
        self._number = 0
        self._consumers = 0
        self._come = 0
        self._asked: list[asyncio.Future[None]] = []
        self.broken: str | None = None
        """Why it ended, if it did."""

    @classmethod
    async def begin(cls, link: Link, queue: str, take: Take) -> Reading:
        """Read a queue that is there. Raises `LinkBroken`."""
        reading = cls(link, queue, take)
        reading._number = await link.channel(lambda number: reading)
        return reading

    async def catch_up(self) -> None:
        """Return when all that is in the queue has been taken note of. Raises `LinkBroken`."""
        deadline = asyncio.get_running_loop().time() + _PATIENCE
        while True:
            found = await self._link.count(self._queue)
            if self._come >= self._consumers * _WINDOW and found is not None and found[0]:
                self._consumers += 1
                await self._ask(
                    (wire.qos(self._number, _WINDOW), wire.consume(self._number, self._queue, f"crossdock-look-{self._consumers}"))
                )
            await self._ask((wire.qos(self._number, _WINDOW),))  # answered after what was on its way
            if found is None or not found[0]:
                return
            if asyncio.get_running_loop().time() > deadline:
                raise LinkBroken(f"the messages of {self._queue!r} do not come")
            await asyncio.sleep(_POLL)

    async def take(self, tags: Iterable[int]) -> None:
        """Remove messages for good; return when that is done. Raises `LinkBroken`."""
        self._link.write(b"".join(wire.ack(self._number, tag) for tag in tags))
        await self._ask((wire.qos(self._number, _WINDOW),))

    async def close(self) -> None:
        """Let everything go back where it was."""
        if self.broken is None:
            self.broken = "it was closed"
            await self._link.close_channel(self._number)

    async def _ask(self, frames: tuple[bytes, ...]) -> None:
        if self.broken is not None:
            raise LinkBroken(self.broken)
        futures = [asyncio.get_running_loop().create_future() for _ in frames]
        self._asked += futures
        self._link.write(b"".join(frames))
        _, hanging = await asyncio.wait(futures, timeout=_PATIENCE)
        if hanging:
            self._link.abort("no answer came in time")
        if hanging or self.broken is not None:
            raise LinkBroken(self._why())

    def _why(self) -> str:
        return self.broken or "no answer came in time"

    # --- the sink ---

    def delivered(self, tag: int, redelivered: bool, header: bytes, body: bytes, arguments: bytes) -> None:
        self._come += 1
        self._take(tag, arguments, header, body)

    def answered(self, method: bytes, arguments: bytes) -> None:
        if self._asked:
            _finish(self._asked.pop(0))

    def lost(self, reason: str) -> None:
        self.broken = self.broken or reason
        while self._asked:
            _finish(self._asked.pop())

    def cancelled(self, consumer: str) -> None:
        self.lost("the queue was deleted")

    def confirmed(self, tag: int, *, multiple: bool, stored: bool) -> None:
        """Never on this channel."""

    def returned(self, key: bytes, header: bytes) -> None:
        """Never on this channel."""

    def flush(self) -> None:
        """Nothing is gathered here."""


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
