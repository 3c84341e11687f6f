"""Wire: one connection to one server, from its greeting to its end.

nats-py connects, speaks TLS and proves who we are; then a parser of our own reads. A message costs a slice and one call, where nats-py
makes an object, a queue entry and a task switch of it (measured: `docs/adr/0007-nats-path.md`). Nothing is made again here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any, Final, cast

from nats import errors
from nats.aio.client import Client

from crossdock.spi import urls
from crossdock_nats.address import Address

Handler = Callable[[bytes, bytes, bytes, bytes], None]
"""Takes the subject, the reply subject, the headers and the payload of one message."""

_READ: Final = 256 * 1024
_GOODBYE: Final = 0.2
"""Seconds for what is still connecting when nobody wants it any more."""
_TASKS: Final = ("_reading_task", "_ping_interval_task", "_flusher_task")
"""What nats-py starts."""


class WireLost(Exception):
    """The connection could not be made, or is lost. `__cause__` is what the system or the driver said."""


class WireRefused(WireLost):
    """The server is there and will not have us."""


class Wire(Client):
    """A connection. Made by `to`.

    Args:
        handlers: By subscription id, shared with whoever subscribes.
        forbidden: Told of each subject that we may not use.
    """

    def __init__(self, handlers: dict[bytes, Handler], forbidden: Callable[[str], None]) -> None:
        super().__init__()
        self._handlers = handlers
        self._forbidden = forbidden
        self._rest = b""
        self._echoes: list[asyncio.Future[None]] = []
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done when the connection is over, with the reason."""
        self.info: dict[str, Any] = {}
        """What the server said of itself."""

    @classmethod
    async def to(
        cls, address: Address, host: str, port: int, handlers: dict[bytes, Handler], forbidden: Callable[[str], None]
    ) -> Wire:
        """Connect to a server.

        Raises:
            WireLost: Nobody answers in time, or it is no such server.
            WireRefused: It refuses us.
        """
        wire = cls(handlers, forbidden)
        greeting = asyncio.ensure_future(wire._greet(address, host, port))
        try:
            await asyncio.wait([greeting], timeout=address.timeout)
            if not greeting.done():
                raise TimeoutError
            greeting.result()
        except BaseException as error:
            await asyncio.shield(asyncio.ensure_future(wire._give_up(greeting)))
            if isinstance(error, (OSError, errors.Error, ValueError)):  # a TimeoutError is an OSError
                if wire._server_info.get("tls_verify") and address.tls.certfile is None:
                    text = f"{host}:{port} asks for a certificate of ours: name one by the options ssl_certfile and ssl_keyfile"
                    raise WireRefused(text) from error
                raise _explained(error, address, host, port) from error
            raise
        return wire

    async def _give_up(self, greeting: asyncio.Task[None]) -> None:
        """End what is still connecting. A connection that is cancelled while it comes about is nobody's, so that may take a moment."""
        if not greeting.done():
            transport = cast(Any, self._transport)
            writer = transport._io_writer if transport is not None else None
            if writer:
                writer.close()
            await asyncio.wait([greeting], timeout=_GOODBYE)
            greeting.cancel()
            await asyncio.wait([greeting])
        if not greeting.cancelled():
            greeting.exception()
        await self.end()

    async def _greet(self, address: Address, host: str, port: int) -> None:
        given: dict[str, Any] = {}
        if address.creds is not None:
            given["user_credentials"] = address.creds
        elif address.nkey is not None:
            given["nkeys_seed"] = address.nkey
        await self.connect(
            f"{'tls' if address.tls_only else 'nats'}://{f'[{host}]' if ':' in host else host}:{port}",
            error_cb=_ignore,
            name="crossdock",
            allow_reconnect=False,
            max_reconnect_attempts=1,
            connect_timeout=cast(int, address.timeout),
            tls=cast(Any, address.tls.context if address.tls_only or address.tls_first or address.tls != urls.Tls() else None),
            tls_hostname=host,
            tls_handshake_first=address.tls_first,
            user=address.user,
            password=address.password,
            token=address.token,
            **given,
        )
        self.info = self._server_info
        if address.tls_only and not (self.info.get("tls_required") or address.tls_first):
            raise WireRefused("the server does not speak TLS, and the URL says tls://")

    # --- what nats-py does otherwise ---

    async def _select_next_server(self) -> None:
        """The one there is, once: nats-py would try again, after two seconds, and then say no more of why."""
        [server] = self._server_pool
        await self._connect_to_server(server)
        self._current_server = server

    async def _read_loop(self) -> None:
        reason = "the server closed the connection: it stops, or we were too slow to read (its log says which)"
        try:
            while data := await self._transport.read(_READ):  # type: ignore[union-attr]
                self._parse(data)
        except asyncio.CancelledError:
            reason = "it was closed"
        except Exception as error:  # whatever it is, nobody reads any more: not to say so would leave everybody deaf
            reason = str(error) or type(error).__name__
        self._over(reason)

    async def _ping_interval(self) -> None:
        """Nothing: `echo` asks for signs of life."""

    async def _flusher(self) -> None:
        """Nothing: we write straight away."""

    # --- reading ---

    def _parse(self, data: bytes) -> None:
        buffer = self._rest + data if self._rest else data
        at, length, find, handlers = 0, len(buffer), buffer.find, self._handlers
        while at < length:
            end = find(b"\r\n", at)
            if end < 0:
                break
            kind = buffer[at]
            if kind == 77:  # MSG subject sid [reply] size
                words = buffer[at + 4 : end].split()
                stop = end + 2 + int(words[-1])
                if stop + 2 > length:
                    break
                if handler := handlers.get(words[1]):
                    handler(words[0], words[2] if len(words) == 4 else b"", b"", buffer[end + 2 : stop])
                at = stop + 2
            elif kind == 72:  # HMSG subject sid [reply] size-of-headers size
                words = buffer[at + 5 : end].split()
                middle, stop = end + 2 + int(words[-2]), end + 2 + int(words[-1])
                if stop + 2 > length:
                    break
                if handler := handlers.get(words[1]):
                    handler(words[0], words[2] if len(words) == 5 else b"", buffer[end + 2 : middle], buffer[middle:stop])
                at = stop + 2
            else:
                self._control(buffer[at:end])
                at = end + 2
        self._rest = buffer[at:]

    def _control(self, line: bytes) -> None:
        if line.startswith(b"PING"):
            self.write(b"PONG\r\n")
        elif line.startswith(b"PONG"):
            if self._echoes and not (echo := self._echoes.pop(0)).done():
                echo.set_result(None)
        elif line.startswith(b"INFO"):
            self.info = json.loads(line[5:])
            if self.info.get("ldm"):
                self._over("the server is about to shut down")
        elif line.startswith(b"-ERR"):
            said = line[5:].decode(errors="replace").strip(" '")
            if said.lower().startswith("permissions violation"):
                self._forbidden(said)
            elif not said.lower().startswith("invalid subject"):
                self._over(f"the server said: {said}")

    # --- writing ---

    def write(self, data: bytes) -> None:
        """Send, at the end of what is under way."""
        if not self.lost.done():
            self._transport.write(data)  # type: ignore[union-attr]

    def echo(self) -> asyncio.Future[None]:
        """Ask for a sign of life. It comes behind the answers to all that was written before."""
        echo: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.lost.done():
            echo.cancel()
        else:
            self._echoes.append(echo)
            self.write(b"PING\r\n")
        return echo

    async def until_lost_or(self, other: asyncio.Future[None], seconds: float) -> None:
        """Return when the connection is over, the other future done, or the time."""
        both: list[asyncio.Future[Any]] = [self.lost, other]
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    def _over(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
        while self._echoes:
            self._echoes.pop().cancel()

    async def end(self, reason: str = "it was closed") -> None:
        """Disconnect, and return when nothing of it is left."""
        self._over(reason)
        started: list[asyncio.Task[None] | None] = [getattr(self, name) for name in _TASKS]
        tasks = [task for task in started if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        transport = cast(Any, self._transport)
        writer = transport and transport._io_writer
        if writer is None:
            return
        bare = transport._bare_io_writer
        for each in {writer, bare} - {None}:
            with contextlib.suppress(Exception):
                each.close()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(0.5):
                await writer.wait_closed()
        for each in {writer, bare} - {None}:
            with contextlib.suppress(Exception):
                each.transport.abort()
        for _ in range(3):  # transports end in the turns after they are told to
            await asyncio.sleep(0)


async def _ignore(error: Exception) -> None:
    """What nats-py would log, we raise."""


def _explained(error: Exception, address: Address, host: str, port: int) -> WireLost:
    place = f"{host}:{port}"
    said = str(error)
    if isinstance(error, WireLost):
        return error
    if isinstance(error, ConnectionRefusedError):
        return WireLost(f"nobody answers at {place}")
    if isinstance(error, socket.gaierror):
        return WireLost(f"the name {host!r} leads to no address")
    if isinstance(error, TimeoutError):
        return WireLost(f"{place} gave no answer within {address.timeout:g} s")
    if isinstance(error, errors.Error):
        if "authorization" in said.lower() or "authentication" in said.lower() or "user" in said.lower():
            return WireRefused(f"{place} refused who we are: {said.removeprefix('nats: ')}")
        return WireLost(f"{place}: {said.removeprefix('nats: ')}")
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return WireRefused(f"{place}: the credentials cannot be used")
    return WireLost(f"{place}: {said}")
