"""Connection: a link that is made again whenever it is lost, for ever, with jitter from the first second on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Awaitable, Callable
from typing import Final

from crossdock_rabbitmq.address import Address
from crossdock_rabbitmq.link import Link, LinkBroken, Refused

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
"""Seconds between two attempts, at most; half of it on average."""


class Connection:
    """One of the connections of a Broker.

    Args:
        address: Where to.
        name: What it is called in the server.
        heartbeat: Seconds between signs of life, asked each time.
        prepare: Makes a new link fit for use, before anybody gets it. Where that fails by `LinkBroken` or `Refused`, another one is made.
        up: Called when there is a link, but for the first one.
        down: Called with a reason when it is lost.
        blocked: Called with a reason when the server takes no messages on it, with None when it takes them again.
    """

    def __init__(
        self,
        address: Address,
        name: str,
        heartbeat: Callable[[], int],
        prepare: Callable[[Link], Awaitable[None]],
        up: Callable[[], None],
        down: Callable[[str], None],
        blocked: Callable[[str | None], None],
    ) -> None:
        self._address = address
        self._name = name
        self._heartbeat = heartbeat
        self._prepare = prepare
        self._up = up
        self._down = down
        self._blocked = blocked
        self._hosts = itertools.cycle(address.hosts)
        self._keeping: asyncio.Task[None] | None = None
        self._there = asyncio.Event()
        self._replaced: Link | None = None
        self.link: Link | None = None
        """The link, if there is one."""
        self.why_down = "it was never made"

    async def open(self) -> None:
        """Connect, and stay connected from then on. Raises `LinkBroken` if no host lets us in."""
        link = await self._first(len(self._address.hosts))
        self._keeping = asyncio.get_running_loop().create_task(self._keep(link), name="crossdock-rabbitmq-connection")

    async def _first(self, attempts: int) -> Link:
        while True:
            attempts -= 1
            try:
                return await self._connect()
            except LinkBroken:
                if not attempts:
                    raise

    async def close(self) -> None:
        """Disconnect. Can be called again."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
            self._keeping = None

    async def quicken(self) -> None:
        """Take another link if heartbeats are to be more frequent by now. Nothing may be under way on this one. Raises `LinkBroken`."""
        link = self.link
        if link is not None and self._heartbeat() < link.heartbeat:
            self._replaced = link
            await self._connect()
            await link.close()

    async def get(self, patience: float) -> Link:
        """The link, waited for. Raises `LinkBroken` if there is none in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self.link is None:  # who was woken may find it lost again
                    await self._there.wait()
        if self.link is None:
            raise LinkBroken(self.why_down)
        return self.link

    async def _connect(self) -> Link:
        host, port = next(self._hosts)
        link = await Link.to(self._address, host, port, self._heartbeat(), self._name)
        try:
            link.on_blocked = self._blocked
            await self._prepare(link)
        except Refused as error:
            await link.close()
            raise LinkBroken(str(error)) from error
        except BaseException:
            await link.close()
            raise
        self.link = link
        self._there.set()
        return link

    async def _keep(self, link: Link) -> None:
        try:
            while True:
                self.why_down = await asyncio.shield(link.lost)
                if link is self._replaced and self.link is not None and self.link is not link:
                    link, self._replaced = self.link, None
                    continue
                self.link = None
                self._there.clear()
                if link.blocked is not None:
                    self._blocked(None)
                self._down(self.why_down)
                await link.close()
                link = await self._again()
                self._up()
        finally:
            self.link = None
            self._there.clear()
            await link.close()

    async def _again(self) -> Link:
        pause = _FIRST_PAUSE
        while True:
            await asyncio.sleep(random.uniform(0, pause))
            pause = min(2 * pause, _LONGEST_PAUSE)
            try:
                return await self._connect()
            except LinkBroken as error:
                self.why_down = str(error)
