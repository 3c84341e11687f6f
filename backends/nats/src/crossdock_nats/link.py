"""Link: the connection of a Broker, which comes back, and requests that outlive it.

A request is some frames in one write; each frame that wants an answer has a reply subject of its own under the Broker's inbox, which is
the same on every connection. So what is not answered can be sent again, as it is, over the next connection or after a second of silence:
the server knows a repeated write by its message id. Whoever must not repeat says so. That nobody is there for a write that was sent again
does not prove that it is not stored, since the first time somebody may have been: it is sent once more.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from crossdock.errors import BrokerClosed, BrokerUnavailable, ConfigurationError
from crossdock.spi import BrokerEvent, Connected, Disconnected
from crossdock_nats.address import Address
from crossdock_nats.wire import Handler, Wire, WireLost, WireRefused

Answer = tuple[bytes, bytes]
"""Headers and payload."""

FIRST_PAUSE: Final = 0.02
"""Seconds to the second attempt to reconnect."""
LONGEST_PAUSE: Final = 1.0
"""Seconds between attempts, at most."""
SILENCE: Final = 1.0
"""Seconds after which an unanswered frame is sent again: a server that has just opened its port may leave requests unanswered."""
ABSENCE: Final = 0.1
"""Seconds after which a write that was sent again, and nobody was there for, is sent once more."""
_NOBODY: Final = b"NATS/1.0 503"
NO_PERMISSION: Final = b"NATS/1.0 403"
"""What an answer begins with that we make up where the server only says that a subject is forbidden."""


class _Request:
    """Frames that wait for answers."""

    __slots__ = (
        "absent",
        "all",
        "answered",
        "answers",
        "deadline",
        "done",
        "frames",
        "left",
        "repeat",
        "repeated",
        "silent",
        "stores",
        "timer",
    )

    def __init__(self, frames: Sequence[bytes], silent: bytes, *, all: bool, repeat: bool, stores: bool, deadline: float) -> None:
        self.frames = frames
        self.silent = silent
        self.all = all
        self.repeat = repeat
        self.stores = stores
        self.deadline = deadline
        self.answers: dict[int, Answer] = {}
        self.answered = bytearray(len(frames))
        self.left = len(frames)
        self.repeated = False
        """Whether it was sent more than once."""
        self.absent: asyncio.TimerHandle | None = None
        """Sends it once more, as nobody was there for it."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.timer: asyncio.TimerHandle | None = None

    def again(self) -> bytes:
        """What to send once more: all that has no answer."""
        self.repeated = True
        answered = self.answered
        return self.silent + b"".join([frame for index, frame in enumerate(self.frames) if not answered[index]])


class Link:
    """The connection.

    Args:
        address: What to connect to.
        report: Told of losses and returns.
        back: Called after each connection was made again.
    """

    def __init__(self, address: Address, report: Callable[[BrokerEvent], None], back: Callable[[], None]) -> None:
        self._address = address
        self._report = report
        self._back = back
        self._random = random.Random()
        self._handlers: dict[bytes, Handler] = {}
        self._subscriptions: dict[bytes, bytes] = {}
        self._sids = itertools.count(1)
        self._tokens = itertools.count(1)
        self._requests: dict[bytes, _Request] = {}
        self._hosts: list[tuple[str, int]] = list(address.hosts)
        self._up = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._former: Wire | None = None
        self.wire: Wire | None = None
        """The connection there is."""
        self.closed = True
        self.inbox = f"{address.inbox}.{secrets.token_hex(10)}".encode()
        """What the subjects of answers to this Broker begin with."""
        self._start = len(self.inbox) + 3
        self.reason = "it was not opened yet"
        """Why there is no connection."""
        self.subscribe(self.inbox + b".r.*.*", self._on_answer)

    # --- life ---

    async def open(self) -> None:
        """Connect.

        Raises:
            BrokerUnavailable: No server answers.
        """
        try:
            wire = await self._connect()
        except WireLost as error:
            raise BrokerUnavailable(f"The NATS server at {self._address.shown} cannot be used: {error}.") from error
        self.closed = False
        self._begin(wire)
        self._keeper = asyncio.ensure_future(self._keep(wire))
        self._report(Connected())

    async def close(self) -> None:
        """Disconnect, and return when nothing is left. Whatever waits raises `BrokerClosed`."""
        self.closed = True
        self.reason = "it was closed"
        for request in list(self._requests.values()):
            _fail(request, BrokerClosed("The NATS broker was closed while it waited for an answer."))
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait([self._keeper])
            self._keeper = None
        wires, self.wire, self._former = (self.wire, self._former), None, None
        self._up.set()  # wakes who waits for a connection
        self._up = asyncio.Event()
        for wire in wires:
            if wire is not None:
                await wire.end()

    async def _connect(self) -> Wire:
        """Try each server once, in any order."""
        hosts = self._hosts.copy()
        self._random.shuffle(hosts)
        failure: WireLost | None = None
        for host, port in hosts:
            try:
                return await Wire.to(self._address, host, port, self._handlers, self._forbidden)
            except WireLost as error:
                failure = error if failure is None or isinstance(error, WireRefused) else failure
        assert failure is not None
        raise failure

    def _begin(self, wire: Wire) -> None:
        self.wire = wire
        frames = [b"SUB %s %s\r\n" % (subject, sid) for sid, subject in self._subscriptions.items()]
        frames += [request.again() for request in self._requests.values() if request.repeat]
        wire.write(b"".join(frames))
        for url in wire.info.get("connect_urls") or ():
            host, _, port = url.rpartition(":")
            place = host.strip("[]"), int(port)
            if place not in self._hosts:
                self._hosts.append(place)
        self._up.set()

    async def _keep(self, wire: Wire) -> None:
        """Watch over the connection and make it again, for ever."""
        while True:
            reason = await self._watch(wire)
            self.wire, self._former = None, wire  # should we be told to stop amid its end, `close` goes on with that
            self._up.clear()
            self.reason = reason
            self._report(Disconnected(reason))
            for request in list(self._requests.values()):
                if not request.repeat and not request.done.done():
                    request.done.set_result(None)
            await wire.end(reason)
            self._former = None
            pause = FIRST_PAUSE
            while True:
                try:
                    wire = await self._connect()
                    break
                except (WireLost, ConfigurationError) as error:
                    self.reason = str(error)
                await asyncio.sleep(pause * self._random.uniform(0.5, 1.0))
                pause = min(LONGEST_PAUSE, pause * 2)
            self._begin(wire)
            self._report(Connected())
            self._back()

    async def _watch(self, wire: Wire) -> str:
        """Return when the connection is over, with the reason. One that gives no sign of life for `timeout` is."""
        timeout = self._address.timeout
        while not wire.lost.done():
            await asyncio.wait([wire.lost], timeout=timeout)
            if not wire.lost.done():
                echo = wire.echo()
                await wire.until_lost_or(echo, timeout)
                if not echo.done():
                    return f"the server gave no sign of life for {timeout:g} s"
        return wire.lost.result()

    # --- subscriptions ---

    def subscribe(self, subject: bytes, handler: Handler) -> bytes:
        """Have messages handled, on this connection and all that follow. Returns what `unsubscribe` wants."""
        sid = b"%d" % next(self._sids)
        self._handlers[sid] = handler
        self._subscriptions[sid] = subject
        if self.wire is not None:
            self.wire.write(b"SUB %s %s\r\n" % (subject, sid))
        return sid

    def unsubscribe(self, sid: bytes) -> None:
        """End a subscription. Its handler still gets what is on the way."""
        if self._subscriptions.pop(sid, None) is None:
            return
        if self.wire is None:
            self._handlers.pop(sid, None)
            return
        self.wire.write(b"UNSUB %s\r\n" % sid)
        self.wire.echo().add_done_callback(lambda _: self._handlers.pop(sid, None))

    # --- requests ---

    async def ready(self, deadline: float | None = None) -> Wire:
        """The connection, as soon as there is one.

        Raises:
            BrokerUnavailable: There is none within `timeout`, or until the deadline, in seconds of the loop's time.
            BrokerClosed: The Broker is closed.
        """
        if self.wire is not None and not self.wire.lost.done():
            return self.wire
        loop = asyncio.get_running_loop()
        end = loop.time() + self._address.timeout if deadline is None else deadline
        while not self.closed:
            if self.wire is not None and not self.wire.lost.done():
                return self.wire
            try:
                async with asyncio.timeout_at(end):
                    if self.wire is not None:  # lost, and nobody has noticed yet
                        await asyncio.sleep(0.001)
                    else:
                        await self._up.wait()
            except TimeoutError as error:
                text = f"There is no connection to the NATS server at {self._address.shown}: {self.reason}."
                raise BrokerUnavailable(text) from error
        raise BrokerClosed("The NATS broker was closed.")

    def reply_to(self) -> bytes:
        """What the reply subjects of a new request begin with; `.` and the index of a frame follow."""
        return b"%s.r.%d" % (self.inbox, next(self._tokens))

    async def exchange(
        self,
        reply: bytes,
        frames: Sequence[bytes],
        *,
        silent: bytes = b"",
        all: bool = False,
        repeat: bool = True,
        stores: bool = False,
        timeout: float = 0.0,
    ) -> tuple[dict[int, Answer], bytearray]:
        """Send frames and wait for an answer to each.

        Args:
            reply: From `reply_to`.
            frames: Each asks for an answer at `<reply>.<its index>`.
            silent: Frames before them that ask for none.
            all: Return every answer; else those with headers or an error only.
            repeat: Send what is not answered again, after a second and over the next connection.
            stores: The frames are writes: that nobody is there is no answer to one that was sent again.
            timeout: Seconds to wait, instead of the address' own.

        Returns:
            Answers by index; and for each index whether it was answered, as 1 or 0.

        Raises:
            BrokerUnavailable, BrokerClosed: Nothing was written.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + (timeout or self._address.timeout)
        wire = self.wire
        if wire is None or wire.lost.done():
            wire = await self.ready(end)
        token = reply[self._start :]
        request = _Request(frames, silent, all=all, repeat=repeat, stores=stores, deadline=end)
        self._requests[token] = request
        request.timer = loop.call_later(min(SILENCE, end - loop.time()), self._nudge, request)
        try:
            wire.write(silent + b"".join(frames))
            await request.done
        finally:
            request.timer.cancel()
            if request.absent is not None:
                request.absent.cancel()
            del self._requests[token]
        return request.answers, request.answered

    def _nudge(self, request: _Request) -> None:
        """A request waits too long."""
        loop = asyncio.get_running_loop()
        if request.done.done():
            return
        if loop.time() >= request.deadline - 0.001:
            request.done.set_result(None)
            return
        if request.repeat and self.wire is not None:
            self.wire.write(request.again())
        request.timer = loop.call_later(min(2 * SILENCE, request.deadline - loop.time()), self._nudge, request)

    def _once_more(self, request: _Request) -> None:
        request.absent = None
        if self.wire is not None and not request.done.done():
            self.wire.write(request.again())

    def _on_answer(self, subject: bytes, reply: bytes, headers: bytes, data: bytes) -> None:
        token, _, place = subject[self._start :].partition(b".")
        request = self._requests.get(token)
        if request is None:
            return
        index = int(place)
        if request.answered[index]:
            return
        if request.stores and request.repeated and headers.startswith(_NOBODY):
            if request.absent is None:
                request.absent = asyncio.get_running_loop().call_later(ABSENCE, self._once_more, request)
            return
        request.answered[index] = 1
        if request.all or headers or b'"error"' in data:
            request.answers[index] = headers, data
        request.left -= 1
        if not request.left and not request.done.done():
            request.done.set_result(None)

    def _forbidden(self, said: str) -> None:
        """Answer what waits for a subject that we may not use, since the server will not."""
        subject = said.partition('"')[2].partition('"')[0].encode()
        for token, request in list(self._requests.items()):
            for index, frame in enumerate(request.frames):
                if subject in frame[: len(subject) + 6]:
                    answer = b"%s.r.%s.%d" % (self.inbox, token, index)
                    self._on_answer(answer, b"", NO_PERMISSION + b" " + said.encode() + b"\r\n\r\n", b"")


def _fail(request: _Request, error: Exception) -> None:
    if not request.done.done():
        request.done.set_exception(error)
