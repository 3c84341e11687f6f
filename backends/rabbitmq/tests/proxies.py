"""A way to a server that can be broken on purpose. It has a thread of its own, so that nothing in a test can hold it up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

HOST = "127.0.0.1"

_End = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Proxy:
    """Forwards every connection to the server of a URL, from the moment it is entered."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._ready = threading.Event()
        self._end = asyncio.Event()
        self._pairs: set[_Pair] = set()
        self._refuses = False
        self._answers = asyncio.Event()
        self._answers.set()
        self._requests = 0
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._pairs)

    def cut(self) -> None:
        """End all connections without a word."""
        self._do(_Pair.abort)

    def stall(self) -> None:
        """From now on nothing passes through the connections that there are: half-open, as when a firewall forgets them."""
        self._do(_Pair.stall)

    def refuse(self, refuses: bool = True) -> None:
        """Let nobody in any more, or again."""
        self._refuses = refuses

    def withhold(self, request: int) -> None:
        """Let so many more requests pass, and nothing of what the server says from the last of them on, until `release`."""
        self._requests = request

    @property
    def withholds(self) -> bool:
        """Whether what the server says does not pass."""
        return not self._answers.is_set()

    def release(self) -> None:
        """Let everything pass again, first what was withheld."""
        self._requests = 0
        self._call(self._answers.set)

    def _do(self, act: Callable[[_Pair], None]) -> None:
        self._call(lambda: [act(pair) for pair in list(self._pairs)])

    def _call(self, act: Callable[[], object]) -> None:
        done = threading.Event()

        def call() -> None:
            act()
            done.set()

        self._loop.call_soon_threadsafe(call)
        assert done.wait(5)

    def _asked(self) -> None:
        self._requests -= 1
        if self._requests == 0:
            self._answers.clear()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        credentials = self._parts.netloc.rpartition("@")[0]
        query = f"?{self._parts.query}" if self._parts.query else ""
        self.url = f"{self._parts.scheme}://{credentials}@{HOST}:{port}{self._parts.path}{query}"
        self._ready.set()
        await self._end.wait()
        server.close()
        for pair in list(self._pairs):
            pair.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks, timeout=2)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._refuses:
                raise ConnectionRefusedError
            there = await asyncio.open_connection(HOST, self._parts.port)
        except OSError:
            writer.transport.abort()
            return
        pair = _Pair((reader, writer), there, self._asked, self._answers)
        self._pairs.add(pair)
        await pair.forward()
        self._pairs.discard(pair)


class _Pair:
    """One connection.

    Args:
        here: The client.
        there: The server.
        asked: Called before a request passes.
        answers: Set while what the server says passes.
    """

    def __init__(self, here: _End, there: _End, asked: Callable[[], None], answers: asyncio.Event) -> None:
        self._here = here
        self._there = there
        self._asked = asked
        self._answers = answers
        self._flows = asyncio.Event()
        self._flows.set()

    async def forward(self) -> None:
        await asyncio.gather(self._forward_requests(), self._forward_answers())

    async def _forward_requests(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._here[0].read(65_536):
                await self._flows.wait()
                self._asked()
                self._there[1].write(data)
                await self._there[1].drain()
        await self._flows.wait()
        self.abort()

    async def _forward_answers(self) -> None:
        with contextlib.suppress(OSError):
            while data := await self._there[0].read(65_536):
                await self._flows.wait()
                await self._answers.wait()
                self._here[1].write(data)
                await self._here[1].drain()
        await self._flows.wait()
        self.abort()

    def stall(self) -> None:
        self._flows.clear()

    def abort(self) -> None:
        for _, writer in (self._here, self._there):
            writer.transport.abort()
        self._flows.set()
        self._answers.set()
