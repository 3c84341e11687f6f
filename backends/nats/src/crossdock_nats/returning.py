"""Returning: what this Broker was handed and nobody gets from it goes back, with its count as it should be.

A message goes back by a write in its own place, on the condition that it is still what we were handed: so it has a new sequence, and
whatever a former holder says about the old one means nothing. That is also how a message is taken over whose lease was lost: it goes
back before anybody gets it, with one more loss noted, and is then delivered as what it is now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from crossdock.errors import BrokerError
from crossdock_nats import record
from crossdock_nats.link import Link

_GOODBYE: Final = 2.0
"""Seconds for what is under way at the end."""


class Handed(NamedTuple):
    """A message as it came, for the way back."""

    subject: bytes
    seq: int
    headers: bytes
    data: bytes
    losses: int
    """Hand-overs to be noted as lost."""


class Returning:
    """Gives back.

    Args:
        link: The connection.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._tasks: set[asyncio.Task[None]] = set()

    def give_back(self, messages: Sequence[Handed]) -> asyncio.Task[None]:
        """Store messages again in their places, in the background. What cannot be is delivered again when its lease is over."""
        task = asyncio.ensure_future(self._store(messages))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _store(self, messages: Sequence[Handed]) -> None:
        reply = self._link.reply_to()
        frames = [
            record.publish(
                message.subject,
                b"%s.%d" % (reply, index),
                record.expects(message.seq) + record.losses(message.losses) + _generation(message.headers),
                message.data,
            )
            for index, message in enumerate(messages)
        ]
        try:
            await self._link.exchange(reply, frames)
        except BrokerError:  # then the lease runs out
            return

    async def close(self) -> None:
        """Return when all is back, or it took too long."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_GOODBYE)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)


def _generation(headers: bytes) -> bytes:
    found = record.number(headers, b"cd-g")
    return b"cd-g: %d\r\n" % found if found else b""
