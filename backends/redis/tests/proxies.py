"""A way to a server that can be broken on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

HOST = "127.0.0.1"


class Proxy:
    """Forwards every connection to a server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._pairs: list[_Pair] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    def stall(self) -> None:
        """From now on nothing passes through the connections that there are: half-open, as when a firewall forgets them."""
        for pair in self._pairs:
            pair.stalled = True

    def cut(self) -> None:
        """End all connections without a word."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.ensure_future(self._forward(reader, writer)))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection(HOST, self._port)
        except OSError:
            writer.transport.abort()
            return
        pair = _Pair((reader, writer), there)
        self._pairs.append(pair)
        await pair.forward()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Proxy]:
        """Listen."""
        server = await asyncio.start_server(self._accept, HOST, 0)
        self.url = f"redis://{HOST}:{server.sockets[0].getsockname()[1]}/0"
        try:
            yield self
        finally:
            server.close()
            while any(not task.done() for task in self._tasks):
                self.cut()  # also what was on its way here when we closed
                await asyncio.wait(self._tasks, timeout=0.01)
            await asyncio.gather(*self._tasks)


class _Pair:
    def __init__(self, *ends: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self._ends = ends
        self.stalled = False

    async def forward(self) -> None:
        (here, to_here), (there, to_there) = self._ends
        await asyncio.gather(self._pump(here, to_there), self._pump(there, to_here))

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                if not self.stalled:
                    target.write(data)
        except OSError:
            pass
        if not self.stalled:
            self.abort()

    def abort(self) -> None:
        for _, writer in self._ends:
            writer.transport.abort()


def proxy_to(url: str) -> Proxy:
    """A proxy to the server of a URL."""
    port = urlsplit(url).port
    assert port
    return Proxy(port)
