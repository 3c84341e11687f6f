"""Tap: the fast lane beside aiormq.

It stands between the socket and aiormq, and divides what comes in frame by frame. What every message costs (deliveries, confirms, returns)
is read here with a few slices; all else goes on to aiormq byte for byte. aiormq takes 75 to 150 µs for such a frame, this about 4
(measured: `docs/adr/0008-rabbitmq-path.md`). It uses public hooks of aiormq only: a transport factory, and the number of a channel.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from crossdock_rabbitmq import wire

_FED: Final = 1.0
"""Seconds between two heartbeats that aiormq is shown while it sees nothing else of what comes in."""


class Sink(Protocol):
    """What takes the frames of one channel. Called from within the event loop; must not raise."""

    def confirmed(self, tag: int, *, multiple: bool, stored: bool) -> None:
        """The server has stored what was published, or has refused it."""

    def returned(self, key: bytes, header: bytes) -> None:
        """Nothing took what was published with this routing key."""

    def delivered(self, tag: int, redelivered: bool, header: bytes, body: bytes, arguments: bytes) -> None:
        """A message for one of the consumers, or the answer to a get; `wire.routing_key` reads the arguments of the former."""

    def answered(self, method: bytes, arguments: bytes) -> None:
        """The answer to what was asked on this channel, one of `ANSWERS`."""

    def cancelled(self, consumer: str) -> None:
        """The server has ended a consumer by itself."""

    def flush(self) -> None:
        """All frames that came at once have been told."""

    def lost(self, reason: str) -> None:
        """The channel is no more; nothing else will be told."""


ANSWERS: Final = frozenset({wire.DECLARE_OK, wire.QOS_OK, wire.CONSUME_OK, wire.CANCEL_OK, wire.GET_OK, wire.GET_EMPTY})
"""What is told by `Sink.answered`; before a GET_OK the message itself is told by `delivered`."""


class Tap(asyncio.StreamReaderProtocol):
    """The protocol of a connection's transport.

    Args:
        reader: Where aiormq reads.
        blocked: Called with a reason when the server stops taking messages, with None when it takes them again.
        gone: Called once, when the connection is lost.
    """

    def __init__(
        self, reader: asyncio.StreamReader, blocked: Callable[[str | None], None], gone: Callable[[BaseException | None], None]
    ) -> None:
        self._loop_of_ours = asyncio.get_running_loop()
        super().__init__(reader, loop=self._loop_of_ours)
        self.sinks: dict[int, Sink] = {}
        self.heard = self._loop_of_ours.time()
        """When anything came in, by the loop's clock."""
        self.farewell = ""
        """Why the server closes the connection, if it has said so."""
        self._blocked = blocked
        self._gone = gone
        self._rest = b""
        self._parts: dict[int, _Content] = {}
        self._fed = 0.0
        self._writable = asyncio.Event()
        self._writable.set()

    async def writable(self) -> None:
        """Return when the socket takes more, or is gone."""
        await self._writable.wait()

    # --- called by the transport ---

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writable.clear()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        super().connection_lost(exc)
        self._gone(exc)

    def data_received(self, data: bytes) -> None:
        self.heard = self._loop_of_ours.time()
        raw = self._rest + data if self._rest else data
        at, end, sinks = 0, len(raw), self.sinks
        others: list[bytes] = []
        touched: dict[int, Sink] = {}
        while end - at >= 8:
            if raw[at] == 0x41:  # "AMQP": a server that speaks another version says so
                others.append(raw[at:])
                at = end
                break
            stop = at + 8 + int.from_bytes(raw[at + 3 : at + 7], "big")
            if stop > end:
                break
            number = int.from_bytes(raw[at + 1 : at + 3], "big")
            sink = sinks.get(number)
            if sink is None:
                others.append(raw[at:stop])
                if number == 0 and raw[at] == wire.METHOD:
                    self._look(raw[at + 7 : stop - 1])
            elif self._take(sink, number, raw, at, stop):
                touched[number] = sink
            else:
                others.append(raw[at:stop])
            at = stop
        self._rest = raw[at:]
        if self.heard - self._fed > _FED:
            self._fed = self.heard
            if sinks:
                others.append(wire.HEARTBEAT)
        if others:
            super().data_received(b"".join(others))
        for sink in touched.values():
            sink.flush()

    def _look(self, payload: bytes) -> None:
        """See what the server says of itself; aiormq is told, too."""
        if payload[:4] == wire.BLOCKED:
            self._blocked(payload[5 : 5 + payload[4]].decode(errors="replace"))
        elif payload[:4] == wire.UNBLOCKED:
            self._blocked(None)
        elif payload[:4] == wire.CONNECTION_CLOSE:
            self.farewell = payload[7 : 7 + payload[6]].decode(errors="replace")

    def _take(self, sink: Sink, number: int, raw: bytes, at: int, stop: int) -> bool:
        """Take a frame of a channel of ours. Returns whether it was ours; if not, aiormq has to see it."""
        kind = raw[at]
        if kind == wire.METHOD:
            method = raw[at + 7 : at + 11]
            if method == wire.DELIVER or method == wire.RETURN or method == wire.GET_OK:
                self._parts[number] = _Content(method, raw[at + 11 : stop - 1])
            elif method == wire.ACK or method == wire.NACK:
                tag = int.from_bytes(raw[at + 11 : at + 19], "big")
                sink.confirmed(tag, multiple=bool(raw[at + 19] & 1), stored=method == wire.ACK)
            elif method in ANSWERS:
                sink.answered(method, raw[at + 11 : stop - 1])
            else:
                self._meanwhile(sink, number, method, raw[at + 11 : stop - 1])
                return False
            return True
        content = self._parts.get(number)
        if content is None:
            return False
        if kind == wire.HEADER:
            content.header = raw[at + 7 : stop - 1]
            content.missing = int.from_bytes(content.header[4:12], "big")
        else:
            content.body.append(raw[at + 7 : stop - 1])
            content.missing -= stop - 8 - at
        if content.missing <= 0:
            del self._parts[number]
            content.tell(sink)
        return True

    def _meanwhile(self, sink: Sink, number: int, method: bytes, arguments: bytes) -> None:
        """What is aiormq's to answer, and ours to know."""
        if method == wire.CANCEL:
            sink.cancelled(arguments[1 : 1 + arguments[0]].decode())
        elif method == wire.CHANNEL_CLOSE:
            self.sinks.pop(number, None)
            self._parts.pop(number, None)
            sink.lost(arguments[3 : 3 + arguments[2]].decode(errors="replace"))


class _Content:
    """A message of which some frames have come."""

    __slots__ = ("arguments", "body", "header", "method", "missing")

    def __init__(self, method: bytes, arguments: bytes) -> None:
        self.method = method
        self.arguments = arguments
        self.header = b""
        self.body: list[bytes] = []
        self.missing = 0

    def tell(self, sink: Sink) -> None:
        arguments = self.arguments
        body = self.body[0] if len(self.body) == 1 else b"".join(self.body)
        if self.method == wire.DELIVER:
            at = 1 + arguments[0]
            sink.delivered(int.from_bytes(arguments[at : at + 8], "big"), bool(arguments[at + 8]), self.header, body, arguments)
        elif self.method == wire.GET_OK:
            sink.delivered(int.from_bytes(arguments[:8], "big"), bool(arguments[8]), self.header, body, arguments)
            sink.answered(wire.GET_OK, arguments)
        else:
            at = 3 + arguments[2]  # behind the code and the text
            at += 1 + arguments[at]  # behind the exchange
            sink.returned(arguments[at + 1 : at + 1 + arguments[at]], self.header)
