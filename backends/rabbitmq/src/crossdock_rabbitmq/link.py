"""Link: one connection to a server. aiormq speaks on it, and beside it, through the tap, we do.

aiormq does the greeting, TLS, heartbeats, channels and whatever is asked rarely; `call` is the way to that. What a link begins, ends with
it: aiormq starts tasks that nobody could wait for, so it is given a loop that remembers them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, Final, TypeVar, cast

import aiormq
from aiormq.channel import Channel
from aiormq.connection import Connection, TransportFactory
from aiormq.exceptions import AMQPError, ChannelNotFoundEntity
from pamqp import commands
from pamqp.base import Frame
from pamqp.exceptions import PAMQPException
from yarl import URL

from crossdock_rabbitmq.address import Address
from crossdock_rabbitmq.tap import Sink, Tap

T = TypeVar("T")

_AT_ONCE: Final = 8
"""How many questions may be under way at the same time, each on a channel of its own: a refusal closes the channel."""
_GOODBYE: Final = 1.0
"""Seconds for the server to take its leave of us."""
_ours: ContextVar[bool] = ContextVar("crossdock_rabbitmq_ours", default=False)


class LinkBroken(Exception):
    """The connection could not be made, or is lost. `__cause__` is the driver's or the system's error, where there is one."""


class LinkRefused(LinkBroken):
    """The server is there and will not have us: wrong password, no such virtual host, too many connections."""


class Refused(Exception):
    """The server refused what was asked, and the connection goes on.

    Args:
        code: AMQP's reply code: 403 no permission, 404 not there, 405 in other hands, 406 there with other arguments.
        text: What the server says.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Link:
    """A connection. Made by `to`."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._tasks = _Remembering(self._loop)
        self._connection: Connection | None = None
        self._made: _Taps | None = None
        self._idle: list[Channel] = []
        self._asking = asyncio.Semaphore(_AT_ONCE)
        self._ending: asyncio.Task[None] | None = None
        self._why = ""
        self._number = 0
        self.heartbeat = 0
        """Seconds between signs of life."""
        self.blocked: str | None = None
        """Why the server takes no messages, if it does not."""
        self.lost: asyncio.Future[str] = self._loop.create_future()
        """Done with a reason when the connection is lost or closed."""
        self.on_blocked: Callable[[str | None], None] = lambda reason: None

    @classmethod
    async def to(cls, address: Address, host: str, port: int, heartbeat: int, name: str) -> Link:
        """Connect.

        Args:
            address: Says how.
            host: Where.
            port: Where.
            heartbeat: Seconds between signs of life.
            name: What the connection is called in the server.

        Raises:
            LinkBroken: Nobody answers in time, or it is no such server.
            LinkRefused: It refuses us.
        """
        link = cls(address.timeout)
        try:
            async with asyncio.timeout(address.timeout):
                await link._connect(address, host, port, heartbeat, name)
        except TimeoutError as error:
            await link.close()
            raise LinkBroken(f"{host}:{port} does not answer within {address.timeout:g} s") from error
        except (OSError, AMQPError, PAMQPException, EOFError) as error:
            await link.close()
            raise _why_not(error, address, host, port) from error
        except BaseException:
            await link.close()
            raise
        return link

    async def _connect(self, address: Address, host: str, port: int, heartbeat: int, name: str) -> None:
        url = URL.build(
            scheme="amqps" if address.tls else "amqp",
            user=address.user,
            password=address.password,
            host=host,
            port=port,
            path="/",
            query={"heartbeat": str(heartbeat)},
        )
        made = self._made = _Taps(self._note_blocked, self._note_gone, address.tls.context if address.tls else None)
        connection = self._connection = Connection(
            url,
            loop=cast("asyncio.AbstractEventLoop", self._tasks),
            transport_factory=made,
            client_properties={"connection_name": name, "product": "crossdock"},
        )
        connection.vhost = address.vhost
        await self._shielded(cast("Any", connection).connect())
        self.heartbeat = heartbeat
        self._watch(heartbeat)

    # --- what happens to it ---

    def _note_blocked(self, reason: str | None) -> None:
        self.blocked = reason
        self.on_blocked(reason)

    def _note_gone(self, error: BaseException | None) -> None:
        tap = self._made.tap if self._made is not None else None
        if not self.lost.done():
            said = f"the server closed the connection{f': {tap.farewell}' if tap is not None and tap.farewell else ''}"
            self.lost.set_result(self._why or (said if error is None else str(error)))
        if tap is not None:
            sinks, tap.sinks = tap.sinks, {}
            for sink in sinks.values():
                sink.lost(self.lost.result())

    def _watch(self, heartbeat: int) -> None:
        """Notice a server that has gone silent: it sends something twice per heartbeat, if it is there."""

        def look() -> None:
            if self.lost.done():
                return
            if self._loop.time() - self._tap.heard > 2 * heartbeat:
                self.abort("the server has not given a sign of life")
            else:
                self._loop.call_later(heartbeat / 2, look)

        look()

    def abort(self, reason: str) -> None:
        """End the connection at once, without a word to the server."""
        self._why = self._why or reason
        if self._made is not None and self._made.transport is not None:
            self._made.transport.abort()

    async def close(self) -> None:
        """Take leave of the server, if it is there, and end all that was begun. Can be called again, and is not torn when cancelled."""
        if self._ending is None:
            self._ending = self._loop.create_task(self._end(), name="crossdock-rabbitmq-close")
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        self._why = self._why or "it was closed"
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_GOODBYE):
                    await connection.close()
        self.abort("it was closed")
        await self._tasks.end()
        if self._made is None or self._made.tap is None:
            if not self.lost.done():
                self.lost.set_result("it was never made")
            return
        await asyncio.wait([self.lost], timeout=_GOODBYE)

    # --- what is known of the server ---

    @property
    def _tap(self) -> Tap:
        assert self._made is not None
        assert self._made.tap is not None
        return self._made.tap

    @property
    def silent(self) -> bool:
        """Whether the server has said nothing for so long that the connection may be gone: it, or we, stood still."""
        return self._loop.time() - self._tap.heard > 1.5 * self.heartbeat

    async def ping(self) -> None:
        """Return when the server has answered. Raises `LinkBroken`."""
        with contextlib.suppress(Refused):
            await self.call(commands.Basic.Qos(prefetch_count=1))

    @property
    def server(self) -> dict[str, Any]:
        """What the server introduced itself with."""
        assert self._connection is not None
        return cast("dict[str, Any]", self._connection.server_properties)

    @property
    def most_in_a_frame(self) -> int:
        """Bytes of a body that one frame may carry."""
        assert self._connection is not None
        return (self._connection.connection_tune.frame_max or 131072) - 8

    # --- the fast lane ---

    async def channel(self, sink: Callable[[int], Sink], *, confirms: bool = False) -> int:
        """Open a channel whose frames go to a sink, which is made for its number. Returns the number.

        Raises:
            LinkBroken: The connection is lost, or there is no answer.
        """
        assert self._connection is not None
        number = await self._open_channel(confirms=confirms)
        if self.lost.done():
            raise LinkBroken(self.lost.result())
        self._tap.sinks[number] = sink(number)
        return number

    async def _open_channel(self, *, confirms: bool) -> int:
        """Open a channel. Its number is the next that is free, round and round: the last one may not be closed on both sides yet."""
        assert self._connection is not None
        used = self._connection.channels
        most = self._connection.connection_tune.channel_max or 65535
        for _ in range(most):
            self._number = self._number % most + 1
            if self._number not in used:
                break
        else:
            raise Refused(504, "the server allows no more channels on a connection")
        number = self._number
        await self._answer(self._connection.channel(number, publisher_confirms=confirms))
        return number

    async def close_channel(self, number: int) -> None:
        """Close a channel; what was delivered on it and not acked goes back to its queue."""
        assert self._connection is not None
        if self.lost.done():
            return
        self._tap.sinks.pop(number, None)
        channel = self._connection.channels.get(number)
        if channel is not None:
            with contextlib.suppress(LinkBroken, Refused):
                await self._answer(channel.close())

    def write(self, data: bytes) -> None:
        """Send frames. On a connection that is lost nothing happens."""
        assert self._made is not None
        if self._made.transport is not None and not self.lost.done():
            try:
                self._made.transport.write(data)
            except RuntimeError:  # aiormq has shut the door, because the server did
                self._made.transport.abort()

    async def writable(self) -> None:
        """Return when what was written is on its way, or lost."""
        await self._tap.writable()

    # --- the slow one ---

    async def call(self, frame: Frame, patience: float | None = None) -> Any:
        """Ask the server for something and return its answer.

        Args:
            frame: The question.
            patience: Seconds for the answer; the default is the URL's timeout.

        Raises:
            LinkBroken: The connection is lost, or there is no answer.
            Refused: The server will not.
        """
        assert self._connection is not None
        async with self._asking:
            channel: Channel | None = None
            while self._idle and (channel is None or channel.is_closed):
                channel = self._idle.pop()
            if channel is None or channel.is_closed:
                channel = cast("Channel", self._connection.channels[await self._open_channel(confirms=False)])
            question = self._tasks.create_task(_waiting_for(channel.rpc(frame)))
            question.add_done_callback(partial(self._answered, channel))  # also where nobody waits for the answer any more
            return await self._answer(question, patience)

    def _answered(self, channel: Channel, question: asyncio.Task[Any]) -> None:
        self._idle.append(channel)

    async def count(self, queue: str) -> tuple[int, int] | None:
        """How many messages of a queue are READY, and how many consumers it has; None if there is no such queue."""
        try:
            answer = await self.call(commands.Queue.Declare(queue=queue, passive=True))
        except ValueError:  # nothing can have such a name
            return None
        except Refused as error:
            if error.code == 404:
                return None
            raise
        return answer.message_count, answer.consumer_count

    async def _answer(self, call: Awaitable[T], patience: float | None = None) -> T:
        if self.lost.done():
            if asyncio.iscoroutine(call):
                call.close()
            raise LinkBroken(self.lost.result())
        try:
            async with asyncio.timeout(patience or self._patience):
                return await self._shielded(call)
        except TimeoutError as error:
            self.abort("no answer came in time")
            raise LinkBroken("no answer came in time") from error
        except ChannelNotFoundEntity as error:
            if "no queue" in str(error) or "no exchange" in str(error):
                raise Refused(404, str(error)) from error
            raise Refused(500, str(error)) from error  # there, on a node that is not
        except AMQPError as error:
            code = _CODES.get(type(error).__name__)
            if code is not None and not self.lost.done():
                raise Refused(code, str(error)) from error
            raise LinkBroken(self.lost.result() if self.lost.done() else str(error) or "the channel is closed") from error
        except (OSError, RuntimeError, PAMQPException) as error:
            raise LinkBroken(self.lost.result() if self.lost.done() else str(error)) from error

    async def _shielded(self, call: Awaitable[T]) -> T:
        """Wait for a call of aiormq's, which must not be cancelled: it would close the channel."""
        task = self._tasks.create_task(_waiting_for(call))
        task.add_done_callback(_look_at_error)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # aiormq cancels what waits when it loses its connection
                current = asyncio.current_task()
                if current is None or not current.cancelling():
                    raise LinkBroken(self.lost.result() if self.lost.done() else "the connection was lost") from None
            raise


_CODES: Final = {"ChannelAccessRefused": 403, "ChannelLockedResource": 405, "ChannelPreconditionFailed": 406, "ChannelClosed": 500}


async def _waiting_for(call: Awaitable[T]) -> T:
    return await call


def _look_at_error(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


class _Remembering:
    """An event loop that remembers the tasks that are made with it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._tasks: set[asyncio.Task[Any]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def create_task(self, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        context = copy_context()
        context.run(_ours.set, True)  # and so for all that the task starts
        task = self._loop.create_task(coroutine, context=context, **options)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_look_at_error)
        return task

    async def end(self) -> None:
        """Wait until all have ended, and see to it that they do."""
        for patience in (0.2, 1.0, 1.0):
            if tasks := {task for task in self._tasks if task is not asyncio.current_task()}:
                await asyncio.wait(tasks, timeout=patience)
                for task in tasks:
                    if not task.done():
                        task.cancel()


class _Taps(TransportFactory):
    """Makes the one transport of a link, with a tap in it."""

    def __init__(
        self,
        blocked: Callable[[str | None], None],
        gone: Callable[[BaseException | None], None],
        context: ssl.SSLContext | None,
    ) -> None:
        self._blocked = blocked
        self._gone = gone
        self._context = context
        self.tap: Tap | None = None
        self.transport: asyncio.Transport | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        transport, tap = await loop.create_connection(
            lambda: Tap(reader, self._blocked, self._gone), url.host or "", url.port or 0, ssl=self._context
        )
        self.tap, self.transport = tap, transport
        return reader, asyncio.StreamWriter(transport, tap, reader, loop)


def _why_not(error: BaseException, address: Address, host: str, port: int) -> LinkBroken:
    """A sentence's end: why there is no connection, and what to do."""
    place = f"{host}:{port}"
    match error:
        case ssl.SSLCertVerificationError():
            return LinkBroken(
                f"the certificate of {place} is not trusted: {error.verify_message}; name the file of who signed it by ssl_ca_certs, "
                "and the server as its certificate does"
            )
        case ssl.SSLError():
            return LinkBroken(
                f"{place} and we do not agree on TLS ({error.reason or error}); does it speak TLS, and want a certificate of ours?"
            )
        case ConnectionRefusedError():
            return LinkBroken(f"nobody answers at {place}")
        case aiormq.exceptions.AuthenticationError() | aiormq.exceptions.ProbableAuthenticationError():
            return LinkRefused(f"{place} refuses the user and password of the URL")
        case aiormq.exceptions.InvalidFrameError() | aiormq.exceptions.ConnectionClosed() if "Close" in str(
            error
        ) or "vhost" in str(error):
            return LinkRefused(
                f"{place} refuses the connection; is there a virtual host {address.vhost!r}, and may this user connect to it?"
            )
        case OSError() if address.tls is None and ("reset" in str(error) or "unexpectedly closed" in str(error)):
            return LinkBroken(f"{place} ended the connection at once; does it want TLS (amqps://)?")
        case OSError():
            return LinkBroken(f"{place} cannot be reached: {error.strerror or error}")
        case _:
            return LinkBroken(f"{place} does not speak AMQP 0-9-1 with us, or went away while it did")


class _NotOurs(logging.Filter):
    """Keeps silent what aiormq says of connections that are ours: it is reported as events and errors."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _ours.get()


for _name in ("aiormq.connection", "aiormq.channel", "aiormq.base"):
    logging.getLogger(_name).addFilter(_NotOurs())
