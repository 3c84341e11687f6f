"""Waker: how a receiver that waits at several servers learns where there is something. A connection that waits for tokens only.

Each level of each queue has a list that holds a token when something became ready there. Of the receivers that wait for it the server
gives it to the one that has waited longest; that one looks, and hands a token on if it leaves anything. Should a token be lost with its
taker, the next look of the others finds what it stood for: no receiver waits longer than `LOOK` without one.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

from crossdock_redis.limits import LOOK
from crossdock_redis.link import Command, Link, LinkBroken, Outcome
from crossdock_redis.replies import ServerError

_ARMED: Final = 30
"""Seconds after which the server ends the wait for a token, so that a connection that died unseen is found out."""


class Waker:
    """Waits for tokens.

    Args:
        connect: Makes a link to the server.
        unclaimed: Told the key of a token that came while nobody waited.
    """

    def __init__(self, connect: Callable[[], Awaitable[Link]], unclaimed: Callable[[str], None]) -> None:
        self._connect = connect
        self._unclaimed = unclaimed
        self._keys: Sequence[str] = ()
        self._listener: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._wanted = asyncio.Event()
        self._token = ""
        self._resting = True
        self._closed = False

    async def wait(self, keys: Sequence[str], seconds: float) -> str | None:
        """Return the key of a token as soon as there is one, None after `seconds`.

        Args:
            keys: The lists to wait on.
            seconds: How long, at most.
        """
        if self._closed:
            return None
        self._resting = False
        if keys != self._keys or self._listener is None:
            await self._stop()
            self._keys = keys
            self._listener = asyncio.get_running_loop().create_task(self._listen(), name="crossdock-redis-waker")
        if not self._token:
            self._wanted.set()
            self._waiter = asyncio.get_running_loop().create_future()
            timer = asyncio.get_running_loop().call_later(seconds, _finish, self._waiter)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        token, self._token = self._token, ""
        return token or None

    def rest(self) -> None:
        """Nobody waits any more: a token that comes now is for others."""
        self._resting = True
        if self._token:
            token, self._token = self._token, ""
            self._unclaimed(token)

    def interrupt(self) -> None:
        """End a wait now."""
        if self._waiter is not None:
            _finish(self._waiter)

    async def close(self) -> None:
        """Stop listening; whoever waits returns at once."""
        self._closed = True
        self.interrupt()
        await self._stop()

    async def _stop(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait([self._listener])
            self._listener = None

    async def _listen(self) -> None:
        command: Command = ("BLPOP", *self._keys, _ARMED)
        link: Link | None = None
        try:
            while True:
                await self._wanted.wait()
                try:
                    link = link or await self._connect()
                    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    link.post([command], partial(self._answered, answered), _ARMED + 10)
                    await answered
                except LinkBroken:
                    if link is not None:
                        link.close()
                        link = None
                    await asyncio.sleep(LOOK * random.uniform(0.5, 1.0))  # meanwhile the receiver looks by itself
        finally:
            if link is not None:
                link.close()

    def _answered(self, answered: asyncio.Future[None], outcome: Outcome) -> None:
        """Called by the link itself, so that whoever waits is woken a turn of the loop earlier."""
        answer = outcome if isinstance(outcome, LinkBroken) else outcome[0]
        if answered.done():  # cancelled
            return
        if isinstance(answer, ServerError | LinkBroken):
            answered.set_exception(LinkBroken(str(answer)))
            return
        answered.set_result(None)
        if answer is not None:
            self._came(answer[0].decode())

    def _came(self, token: str) -> None:
        self._wanted.clear()
        self._token = token
        if self._resting:
            self.rest()
        elif self._waiter is not None:
            _finish(self._waiter)


def _finish(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
